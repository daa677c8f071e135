"""Read the recipes in a service's ``docs/recipes.md``, and apply them as they are printed.

A recipe is a section. The sentence above each of its code blocks says what the block is for:

| sentence ends with | block |
|---|---|
| ``Run:`` | commands, run in the folder of the service |
| ``Create `PATH`:`` | the contents of a new file |
| ``In `PATH`, in `CLASS`:`` | definitions that are added to the class, or replace those of the same name |
| ``In `PATH`:`` | a diff without line numbers; or code that is added at the end, its imports at the top |

All other blocks, such as commands for a server, are only shown.
"""

import ast
import re
import shlex
import textwrap
from dataclasses import dataclass, field
from pathlib import Path

from markdown_it import MarkdownIt

#: What teams do to a service besides the recipes, in the same format.
CHANGES = Path(__file__).resolve().parent.parent / "trials" / "changes.md"

LEADS = {
    "run": re.compile(r"(?:^|\s)[Rr]un:$"),
    "create": re.compile(r"(?:^|\s)[Cc]reate `([^`]+)`:$"),
    "set": re.compile(r"(?:^|\s)[Ii]n `([^`]+)`, in `([^`]+)`:$"),
    "change": re.compile(r"(?:^|\s)[Ii]n `([^`]+)`:$"),
}


class DoesNotApply(Exception):
    """A file does not have the lines that a recipe changes."""


@dataclass
class Step:
    """A code block: what to do with it, in which file, and perhaps in which class."""

    kind: str
    names: tuple[str, ...]
    language: str
    text: str

    @property
    def commands(self):
        """The lines for a shell, without those that only continue another one."""
        return self.text.replace("\\\n", " ").splitlines()


@dataclass
class Recipe:
    """A section of the document."""

    title: str
    steps: list[Step] = field(default_factory=list)
    shown: list[Step] = field(default_factory=list)

    @property
    def commands(self):
        """The commands to run, each for a shell."""
        return [command for step in self.steps if step.kind == "run" for command in step.commands]

    @property
    def requirements(self):
        """The packages that it adds."""
        words = [shlex.split(command) for command in self.commands]
        return [word for each in words if each[:2] == ["uv", "add"] for word in each[2:]]

    def apply(self, folder, run=lambda command: None):
        """Change the files of a service, and call ``run`` with each command."""
        for step in self.steps:
            if step.kind == "run":
                for command in step.commands:
                    run(command)
            elif step.kind == "create":
                create(folder / step.names[0], step.text)
            elif step.kind == "set":
                set_in_class(folder / step.names[0], step.names[1], step.text)
            elif step.language == "diff":
                change(folder / step.names[0], step.text)
            else:
                append(folder / step.names[0], step.text)


def read_recipes(path):
    """Return the recipes of a document by title."""
    tokens = MarkdownIt().parse(path.read_text())
    recipes, lead, recipe = {}, "", None
    for number, token in enumerate(tokens):
        if token.type == "heading_open" and token.tag == "h2":
            title = tokens[number + 1].content
            recipe = recipes[title] = Recipe(title)
        elif token.type == "inline":
            lead = " ".join(token.content.split())
        elif token.type == "fence" and recipe is not None:
            step = make_step(lead, token.info, token.content)
            (recipe.steps if step.kind else recipe.shown).append(step)
            lead = ""
    return recipes


def read_changes(package):
    """Return the changes of ``trials/changes.md`` for a service with this package."""
    changes = read_recipes(CHANGES)
    for step in (step for change in changes.values() for step in change.steps):
        step.names = tuple(name.replace("SLUG", package) for name in step.names)
        step.text = step.text.replace("SLUG", package)
    return changes


def make_step(lead, language, text):
    """Return the step of a code block and the sentence above it."""
    for kind, pattern in LEADS.items():
        if match := pattern.search(lead):
            return Step(kind, match.groups(), language, text)
    return Step("", (), language, text)


def create(path, text):
    """Create a file that does not exist."""
    if path.exists():
        raise DoesNotApply(f"{path.name} exists")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def change(path, diff):
    """Apply a diff without line numbers; its parts are separated by lines with ``@@``."""
    text = path.read_text()
    for part in re.split(r"^@@.*\n", diff, flags=re.M):
        lines = [line or " " for line in part.splitlines()]
        if not lines:
            continue
        assert all(line[0] in " +-" for line in lines), (path, part)
        old = "".join(f"{line[1:]}\n" for line in lines if line[0] != "+")
        new = "".join(f"{line[1:]}\n" for line in lines if line[0] != "-")
        places = f"\n{text}".count(f"\n{old}")
        if places != 1:
            raise DoesNotApply(f"{path.name} has these lines {places} times:\n{old}")
        text = f"\n{text}".replace(f"\n{old}", f"\n{new}")[1:]
    path.write_text(text)


def append(path, text):
    """Add text at the end of a file, and the imports of Python code below those at the top."""
    old = path.read_text()
    if path.suffix != ".py":
        path.write_text(f"{old.rstrip()}\n{text}")
        return
    lines = text.splitlines(keepends=True)
    imports = [
        node for node in ast.parse(text).body if isinstance(node, ast.Import | ast.ImportFrom)
    ]
    end = max((node.end_lineno for node in imports), default=0)
    moved = [line for line in lines[:end] if line.strip()]
    old_lines = old.splitlines(keepends=True)
    if moved:
        top = [
            node for node in ast.parse(old).body if isinstance(node, ast.Import | ast.ImportFrom)
        ]
        place = top[-1].end_lineno if top else 0
        old_lines[place:place] = [line for line in moved if line not in old_lines]
    rest = "".join(lines[end:]).strip("\n")
    path.write_text("".join(old_lines).rstrip() + (f"\n\n\n{rest}\n" if rest else "\n"))


def set_in_class(path, name, text):
    """Define names in a class: replace those that it defines itself, and add the others."""
    text = textwrap.dedent(text)
    chunk_lines, start = text.splitlines(), 0
    for node in ast.parse(text).body:
        chunk = "\n".join(chunk_lines[start : node.end_lineno]).strip("\n")
        start = node.end_lineno
        define(path, name, get_name(node), chunk)


def define(path, class_name, name, chunk):
    """Add a definition to a class, or replace the one of the same name."""
    lines = path.read_text().splitlines()
    (found,) = [
        node
        for node in ast.parse("\n".join(lines)).body
        if isinstance(node, ast.ClassDef) and node.name == class_name
    ] or [None]
    if found is None:
        raise DoesNotApply(f"{path.name} has no class {class_name}")
    new = textwrap.indent(chunk, "    ").splitlines()
    for node in found.body:
        if name is not None and get_name(node) == name:
            first = min(
                [node.lineno, *(each.lineno for each in getattr(node, "decorator_list", []))]
            )
            lines[first - 1 : node.end_lineno] = new
            break
    else:
        lines[found.end_lineno : found.end_lineno] = ["", *new]
    path.write_text("\n".join(lines) + "\n")


def get_name(node):
    """Return the name that a statement defines, or None if it only extends a value."""
    if isinstance(node, ast.AugAssign):
        return None
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return node.name
    target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
    return target.id if isinstance(target, ast.Name) else None


def get_path(folder):
    """Return the path of a service's recipes."""
    return Path(folder) / "docs" / "recipes.md"
