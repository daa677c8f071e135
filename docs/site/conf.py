"""The documentation site: Sphinx with MyST. CONTRIBUTING.md has the command that builds it.

Before the build, this module writes the pages that have another source: those of the default
service, and the reference, from docstrings. They are in ``generated/``, which git ignores.
"""

import ast
import re
import shutil
import sys
import tempfile
from pathlib import Path

SITE = Path(__file__).resolve().parent
ROOT = SITE.parent.parent
GENERATED = SITE / "generated"

sys.path.insert(0, str(ROOT / "docs"))

from example import write_example  # noqa: E402

project = "cookiecutter-prodserver"
extensions = ["myst_parser"]
myst_heading_anchors = 3
html_theme = "furo"
html_title = project
html_show_copyright = False
exclude_patterns = ["generated/*/images/**"]

#: How-to pages: the documents of the default service.
HOW_TO = tuple(
    "recipes processes schedules tasks email api settings deploy move restore upgrades".split()
)

LIBRARY = Path("vendor", "prodserver-ops")
SOURCES = LIBRARY / "src" / "prodserver_ops"


def keep_links(text, pages):
    """Return Markdown whose links to files lead to a page of the site, or are plain text."""

    def replace(match):
        label, target = match.groups()
        path, hash_, anchor = target.partition("#")
        name = Path(path).stem
        if not path or re.match(r"\w+:", target):
            return match[0]
        return f"[{label}]({name}.md{hash_}{anchor})" if name in pages else label

    return re.sub(r"(?<!!)\[([^\]]+)\]\(([^)\s]+)\)", replace, text)


def read_docstring(node):
    """Return the docstring of a module, class or function as Markdown."""
    return re.sub(r"``([^`]+)``", r"`\1`", ast.get_docstring(node) or "")


def describe_commands(folder):
    """Return a section for each management command, from its docstrings and options."""
    sections = []
    for path in sorted(folder.glob("[a-z]*.py")):
        module = ast.parse(path.read_text())
        (command,) = (
            node
            for node in module.body
            if isinstance(node, ast.ClassDef) and node.name == "Command"
        )
        options = [
            (call.args, {keyword.arg: keyword.value for keyword in call.keywords})
            for call in ast.walk(command)
            if isinstance(call, ast.Call) and ast.unparse(call.func).endswith(".add_argument")
        ]
        rows = [
            (" ".join(f"`{name.value}`" for name in names), ast.literal_eval(words["help"]))
            for names, words in options
            if isinstance(words.get("help"), ast.Constant)
        ]
        table = "".join(f"| {name} | {text} |\n" for name, text in rows)
        header = "\n| argument | |\n|---|---|\n" if rows else ""
        sections.append(f"## {path.stem}\n\n{read_docstring(command)}\n{header}{table}")
    return "# Commands\n\nRun them with `uv run manage.py`.\n\n" + "\n".join(sections)


def describe_checks(path):
    """Return a table of the system checks of the library, from their docstrings and ids."""
    rows = []
    for node in ast.parse(path.read_text()).body:
        if not isinstance(node, ast.FunctionDef):
            continue
        register = [ast.unparse(each) for each in node.decorator_list]
        if not any(each.startswith("checks.register") for each in register):
            continue
        when = "`--deploy`" if any("deploy=True" in each for each in register) else "always"
        when = "`--database`" if any("Tags.database" in each for each in register) else when
        ids = re.findall(r"['\"]([a-z]+\.[EW]\d+)['\"]", ast.unparse(node))
        names = ", ".join(f"`{id_}`" for id_ in dict.fromkeys(ids))
        rows.append(f"| {read_docstring(node).splitlines()[0]} | {names} | {when} |\n")
    return (
        "# Checks\n\n`uv run manage.py check` runs these checks besides those of Django; "
        "`--deploy` and `--database default` add some.\n\n| reports | ids | when |\n|---|---|---|\n"
    ) + "".join(rows)


def write_pages():
    """Write the pages that are generated."""
    shutil.rmtree(GENERATED, ignore_errors=True)
    with tempfile.TemporaryDirectory() as folder:
        service = Path(folder, "service")
        write_example(service)
        pages = {name: service / "docs" / f"{name}.md" for name in HOW_TO}
        texts = {name: path.read_text() for name, path in pages.items()}
        texts |= {
            "service": (service / "README.md").read_text(),
            "library": (service / LIBRARY / "README.md").read_text(),
            "questions": (ROOT / "docs" / "questions.md").read_text(),
            "decisions": (ROOT / "docs" / "decisions.md").read_text(),
            "figures": (ROOT / "bench" / "RESULTS.md").read_text().replace("\n### ", "\n## "),
            "changelog": (ROOT / "CHANGELOG.md").read_text(),
            "commands": describe_commands(service / SOURCES / "management" / "commands"),
            "checks": describe_checks(service / SOURCES / "console" / "checks.py"),
        }
    GENERATED.mkdir()
    for name, text in texts.items():
        (GENERATED / f"{name}.md").write_text(keep_links(text, texts))


write_pages()
