"""Bring a service of release 1.x to 2.0, after ``uv run manage.py upgrade``.

    python3 vendor/prodserver-ops/upgrade_from_1.py

Run it in the folder of the service. In 1.x a copy of the code that all services share was the
folder ``ops`` of the service's package; in 2.0 it is the library ``prodserver_ops`` in ``vendor``.
This script merges what the upgrade could not place, changes imports and dotted names in the
team's files, completes the settings, and deletes ``ops`` and ``tests/ops``. What the team had
changed there is kept in ``ops-1x-edits``. It lists what is left to do, and then exits with
status 1; run it again until it says that nothing is left.

It needs Python 3.11, git, and uv, which renders the two versions of the template.
"""

import ast
import difflib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tokenize
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any

LIBRARY = "prodserver_ops"

#: The library's folder in a service.
VENDOR = "vendor/prodserver-ops"

#: Where the team's versions of files of ``ops`` are kept.
EDITS = "ops-1x-edits"

#: Renders a version of the template.
CRUFT = ["tool", "run", "--from", "cruft>=2.16,<3", "--with", "cookiecutter>=2.7.1,<2.8", "cruft"]

#: The longest line of a changed import.
LINE_LENGTH = 100

#: The modules of ``ops``, and those of the library that have their contents.
MODULES = {
    "access": "core.access",  # The name of a logger
    "admin": "console.admin",
    "adoption": "console.adoption",
    "api": "api.views",
    "apps": "apps",
    "asgi": "web.asgi",
    "attempts": "mail.attempts",
    "beat": "scheduling.beat",
    "broker": "broker.embedded",
    "celery": "worker.app",
    "checks": "console.checks",
    "clients": "core.clients",
    "crontabs": "scheduling.crontabs",
    "csp": "web.csp",
    "database": "core.database",
    "deliveries": "mail.deliveries",
    "digests": "mail.digests",
    "doctor": "console.doctor",
    "email_preview": "mail.preview",
    "environment": "conf.environment",
    "failed_tasks": "worker.failed",
    "gunicorn_log": "web.gunicorn",
    "gunicorn_worker": "web.gunicorn_worker",
    "health": "web.health",
    "heartbeats": "scheduling.heartbeats",
    "large_tables": "console.large_tables",
    "limits": "core.limits",
    "locks": "core.locks",
    "logins": "web.logins",
    "logs": "core.logs",
    "mailer": "mail.transport",
    "management": "management",
    "messages": "mail.composing",
    "migrations": "migrations",
    "models": "models",
    "monitoring": "conf.flower",
    "openapi": "api.openapi",
    "operations": "console.operations",
    "overlaps": "console.migration_safety",
    "parsers": "api.parsers",
    "processes": "console.processes",
    "publishing": "broker.publishing",
    "queues": "conf.queues",
    "realtime": "conf.channels",
    "runs": "scheduling.claims",
    "scheduler": "scheduling.scheduler",
    "schedules": "scheduling.operations",
    "schema": "api.schema",
    "sentry": "core.sentry",
    "settings": "conf.defaults",
    "task_runs": "worker.record",
    "tasks": "mail.tasks",
    "templatetags": "templatetags",
    "throttles": "api.throttles",
    "tokens": "api.tokens",
    "unsubscribe": "mail.unsubscribe",
    "uploads": "web.uploads",
    "web_server": "conf.processes",
    "websockets": "web.websockets",
}

#: The modules of ``ops`` that have no successor
REMOVED = {
    "leases": None,
}

#: Names that are elsewhere than the rest of their module, or have another name.
NAMES = {
    "adoption.check_history": "console.checks.check_history",
    "api.ErrorSerializer": "api.openapi.ErrorSerializer",
    "api.INVALID": "api.openapi.INVALID",
    "api.errors": "api.openapi.errors",
    "deliveries.start_run": "mail.deliveries.get_run",
    "failed_tasks.make_failed_queue": "worker.app.make_failed_queue",
    "gunicorn_log.GunicornLogger": "web.gunicorn.Logger",
    "messages.deferred_sigterm": "core.signals.deferred_sigterm",
    "monitoring.Flower": "web.flower.Flower",
    "overlaps.check_migrations": "console.checks.check_migrations",
    "realtime.send_to_group": "web.channels.send_to_group",
    "runs.start_run": "scheduling.claims.claim",
    "tasks.delete_records": "tasks.delete_records",
    "tasks.requeue": "worker.failed.requeue",
}

#: What to write for names that are gone.
GONE = {
    "settings.BASE_DIR": "settings.BASE_DIR, with `from django.conf import settings`",
    "settings.PACKAGE": "settings.PACKAGE, with `from django.conf import settings`",
    "settings.MAIL_QUEUE": "settings.PACKAGE + '.mail', with `from django.conf import settings`",
    "settings.make_queue": "self.make_queue in the class of settings",
    "api.SchemaView": "prodserver_ops.api.schema.view",
    "schedules.CRONTAB_FIELDS": "the five names of the fields",
}

#: What ``conf`` has of the module ``settings`` of 1.x.
CONF = {"Defaults", "TestDefaults", "ProductionDefaults", "StagingDefaults", "SCHEMA_CLASS"}

#: Folders that have no files of the team.
IGNORED = {"vendor", EDITS, ".venv", "node_modules", ".git"}

#: Files that are not Python, and may name modules.
TEXT = re.compile(
    r"(^|/)(Procfile|Dockerfile|Makefile|justfile)[^/]*$"
    r"|\.(toml|ini|cfg|ya?ml|json|md|rst|html|sh|service|conf)$|(^|/)\.env[^/]*$"
)
SKIPPED_TEXT = {".cruft.json", "openapi.yaml", "uv.lock"}

MARKER = re.compile(r"^(<{7}|>{7})( |$)", re.M)


class Failed(Exception):
    """A command did not work."""


# The report


@dataclass
class Report:
    """What was done, and what is left."""

    done: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)

    def print(self) -> int:
        """Print it; return the exit status."""
        for title, lines in (("Done", self.done), ("Good to know", self.notes)):
            if lines:
                print(f"{title}:", *(f"- {line}" for line in lines), "", sep="\n")
        if self.left:
            print("Left to do:", *(f"- {line}" for line in self.left), "", sep="\n")
            print(f"{len(self.left)} left to do. Then run this script again.")
            return 1
        if not self.done:
            print("Nothing to do: this service is at 2.0.")
            return 0
        print(
            "This service is at 2.0. Next: uv sync, uv run ruff check --fix, uv run ruff format, "
            "uv run manage.py openapi, uv run pytest."
        )
        return 0


# Git and files


def run(command: list[str], folder: Path | None = None) -> str:
    """Run a command; return its output, or raise Failed."""
    try:
        done = subprocess.run(
            command, cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, check=False
        )
    except OSError as error:
        raise Failed(f"{command[0]}: {error}") from None
    if done.returncode:
        last = (done.stderr or done.stdout).decode(errors="replace").strip().splitlines()[-5:]
        raise Failed(f"{' '.join(command[:4])} ...: " + " ".join(last))
    return done.stdout.decode(errors="surrogateescape")


def git(*arguments: str) -> str:
    """Run git in the service's folder."""
    return run(["git", *arguments])


def read(path: str | Path) -> str | None:
    """Return the text of a file, or None for a missing one and one that is no text."""
    try:
        with open(path, encoding="utf-8", newline="") as file:
            return file.read()
    except (OSError, UnicodeDecodeError):
        return None


def write(path: str | Path, text: str) -> None:
    """Write a file, and its folder if it is missing."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8", newline="") as file:
        file.write(text)


def show(revision: str, path: str) -> str | None:
    """Return the text of a file of the service in a commit, or None."""
    try:
        text = git("show", f"{revision}:./{path}" if revision else path)
    except Failed:
        return None
    return None if "\0" in text else text


def list_files(*arguments: str) -> list[str]:
    """Return the paths that ``git ls-files`` prints, relative to the service."""
    return sorted({name for name in git("ls-files", "-z", *arguments).split("\0") if name})


def list_team_files() -> list[str]:
    """Return the paths of the team's files."""
    names = list_files("--cached", "--others", "--exclude-standard")
    return [
        name
        for name in names
        if not IGNORED & set(PurePosixPath(name).parts) and Path(name).is_file()
    ]


def list_unmerged() -> dict[str, set[str]]:
    """Return the stages that git has of each file with a conflict."""
    stages: dict[str, set[str]] = {}
    for line in git("ls-files", "--unmerged", "-z").split("\0"):
        if line:
            information, name = line.split("\t", 1)
            stages.setdefault(name, set()).add(information.split()[2])
    return stages


def merge(ours: str, base: str, theirs: str, *options: str) -> tuple[str, bool]:
    """Merge two versions of a text; return the result, and whether it has no conflicts."""
    if theirs in (base, ours):
        return ours, True
    if ours == base:
        return theirs, True
    with tempfile.TemporaryDirectory() as folder:
        for name, text in (("service", ours), ("base", base), ("template", theirs)):
            write(Path(folder, name), text)
        command = ["git", "merge-file", "-p", *options, "service", "base", "template"]
        done = subprocess.run(command, cwd=folder, capture_output=True, check=False)
    return done.stdout.decode(), done.returncode == 0


def find_conflicts(text: str) -> list[tuple[str, str]]:
    """Return both sides of each conflict in a merged text."""
    pattern = r"^<{7} .*?\n(.*?)^={7}\n(.*?)^>{7} .*?\n"
    return re.findall(pattern, text, re.M | re.S)


# Versions of the template


@dataclass
class Record:
    """A state of ``.cruft.json``."""

    revision: str
    template: str
    commit: str
    directory: str | None
    answers: dict[str, Any]

    @classmethod
    def parse(cls, text: str, revision: str = "") -> "Record":
        """Return the record of a text."""
        record = json.loads(text)
        answers = record["context"]["cookiecutter"]
        return cls(revision, record["template"], record["commit"], record.get("directory"), answers)

    @property
    def version(self) -> str:
        """The template's version."""
        return str(self.answers.get("_version", "1.0.0"))

    @property
    def slug(self) -> str:
        """The name of the package that the template has."""
        return str(self.answers["project_slug"])

    def render(self, folder: Path) -> Path:
        """Render the version; return the folder of the service."""
        uv = os.environ.get("UV") or shutil.which("uv")
        if uv is None:
            raise Failed("uv was not found. Run: python3 -m pip install uv")
        given = {name: value for name, value in self.answers.items() if name[0] != "_"}
        answers = json.dumps(given | {"setup": False})
        place = ["--directory", self.directory] if self.directory else []
        command = [uv, *CRUFT, "create", self.template, "--checkout", self.commit, *place]
        folder.mkdir()
        run([*command, "--no-input", "--extra-context", answers, "--output-dir", str(folder)])
        return next(path.parent for path in folder.glob("*/.cruft.json"))


def read_history() -> list[Record]:
    """Return the records of 1.x in the service's history, the last one first."""
    records: list[Record] = []
    later = ""
    for revision in git("log", "--format=%H", "--", ".cruft.json").split():
        text = show(revision, ".cruft.json")
        if text is not None:
            # The last commit before the upgrade has the team's files as they were.
            record = Record.parse(text, f"{later}^" if later else "HEAD")
            known = {record.commit for record in records}
            shipped = git("ls-tree", "--name-only", record.revision, f"{VENDOR}/pyproject.toml")
            if not shipped and record.commit not in known:
                records.append(record)
        later = revision
    return records


# Packages


@dataclass(frozen=True)
class Package:
    """A package that had the folder ``ops``."""

    path: str
    name: str

    @property
    def ops(self) -> str:
        """The path of the folder."""
        return f"{self.path}/ops"


def get_dotted_name(folder: str, files: set[str]) -> str:
    """Return the dotted name of a package."""
    parts = list(PurePosixPath(folder).parts)
    first = len(parts) - 1
    while first and "/".join([*parts[:first], "__init__.py"]) in files:
        first -= 1
    return ".".join(parts[first:])


def find_packages(revision: str) -> list[Package]:
    """Return the packages that had ``ops`` in a commit, wherever they were."""
    names = git("ls-tree", "-r", "-z", "--name-only", revision, ".").split("\0")
    found = []
    for name in names:
        if name.endswith("/ops/apps.py") and re.search(
            r"""^\s+label = ["']ops["']""", show(revision, name) or "", re.M
        ):
            path = name.removesuffix("/ops/apps.py")
            found.append(Package(path, get_dotted_name(path, set(names))))
    return found


# Imports and dotted names


@cache
def get_names(module: str) -> frozenset[str] | None:
    """Return the names that a module of the library has, or None if there is no such module."""
    base = Path(VENDOR, "src", LIBRARY, *module.split(".")) if module else Path()
    path = base / "__init__.py" if base.is_dir() else base.with_suffix(".py")
    text = read(path)
    if text is None:
        return None
    names = {child.stem for child in base.glob("*")} if base.is_dir() else set()
    nodes: list[ast.AST] = [ast.parse(text)]
    while nodes:
        node = nodes.pop()
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names.add(node.name)
            continue  # What is inside is no name of the module.
        nodes += ast.iter_child_nodes(node)
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names.update(alias.asname or alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
    return frozenset(names)


@dataclass
class Edit:
    """A part of a text, from one offset to another, and what comes in its place."""

    start: int
    end: int
    text: str


def apply(text: str, edits: Iterable[Edit]) -> str:
    """Apply edits, which do not overlap."""
    for edit in sorted(edits, key=lambda edit: edit.start, reverse=True):
        text = text[: edit.start] + edit.text + text[edit.end :]
    return text


class Translator:
    """Changes the imports and dotted names of ``ops`` into those of the library."""

    def __init__(
        self, packages: Iterable[Package], answers: dict[str, Any], own: Iterable[str] = ()
    ) -> None:
        self.packages = sorted({package.name for package in packages}, key=len, reverse=True)
        self.roots = [f"{name}.ops" for name in self.packages]
        self.server = str(answers.get("web_server", "gunicorn"))
        self.modules = MODULES | {
            "production_broker": f"broker.{answers.get('broker', 'rabbitmq')}",
            "web_backend": f"web.{self.server}",
        }
        # The team's own modules of ``ops`` stay.
        self.own = set(own)
        roots = "|".join(re.escape(root) for root in self.roots)
        self.dotted = re.compile(rf"(?<![\w.])(?:{roots})\.(?P<rest>\w+(?:\.\w+)*)(?P<colon>:\w+)?")
        self.exact = re.compile(rf"""^(\w*["']+)(?:{roots})(["']+)$""")

    def get_target(self, dotted: str) -> str | None:
        """Return where a module or name is in the library, without the library's name.

        ``dotted`` is relative to ``ops``. None is for the team's own modules.
        """
        first, _, rest = dotted.partition(".")
        if first in self.own or first not in self.modules:
            return None
        name, _, attributes = rest.partition(".")
        moved = NAMES.get(f"{first}.{name}")
        if moved:
            return f"{moved}.{attributes}" if attributes else moved
        return f"{self.modules[first]}.{rest}" if rest else self.modules[first]

    def replace_dotted(self, text: str) -> str:
        """Change the dotted names in a text."""

        def change(match: re.Match[str]) -> str:
            colon = match["colon"] or ""
            target = self.get_target(match["rest"] + colon.replace(":", "."))
            if target is None:
                return match[0]
            if colon:
                target = ":".join(target.rsplit(".", 1))
            return f"{LIBRARY}.{target}"

        return self.dotted.sub(change, text)

    def resolve(self, node: ast.ImportFrom, package: str) -> str:
        """Return the absolute name of the module that an import is from."""
        if not node.level:
            return node.module or ""
        parts = package.split(".") if package else []
        kept = parts[: len(parts) - node.level + 1]
        return ".".join([*kept, *([node.module] if node.module else [])])

    def translate(self, text: str, package: str) -> tuple[str, list[tuple[int, str]]]:
        """Return a Python file's new text, and what to do by hand: line numbers and texts.

        ``package`` is the dotted name of the package that the file is in. Raises SyntaxError.
        """
        if not re.search(r"\bops\b", text):
            return text, []
        self.text, self.package = text, package
        self.tree = ast.parse(text)
        lines = text.splitlines(keepends=True)
        self.offsets = [0]
        for line in lines:
            self.offsets.append(self.offsets[-1] + len(line))
        self.lines = lines
        self.edits: list[Edit] = []
        self.left: list[tuple[int, str]] = []
        for node in ast.walk(self.tree):
            if isinstance(node, ast.ImportFrom):
                self.translate_from(node)
            elif isinstance(node, ast.Import):
                self.translate_import(node)
            elif isinstance(node, ast.Attribute):
                self.translate_attribute(node)
        self.translate_mixed()
        self.translate_strings()
        return apply(text, self.edits), sorted(set(self.left))

    def translate_mixed(self) -> None:
        """Change ``ops.Defaults`` in settings whose import is that of 2.0.

        This happens if a conflict in the classes is resolved with what the team had.
        """
        imports = [
            node for node in ast.walk(self.tree) if isinstance(node, ast.Import | ast.ImportFrom)
        ]
        names = {alias.asname or alias.name for node in imports for alias in node.names}
        if "conf" in names and "ops" not in names:
            self.replace_settings("ops")

    def offset(self, line: int, column: int) -> int:
        """Return the offset of a position of ``ast``, whose columns are bytes."""
        content = self.lines[line - 1].encode()[:column].decode()
        return self.offsets[line - 1] + len(content)

    def span(self, node: Any) -> tuple[int, int]:
        """Return the offsets of a node."""
        return (
            self.offset(node.lineno, node.col_offset),
            self.offset(node.end_lineno, node.end_col_offset),
        )

    def check(self, old: str, target: str, line: int) -> None:
        """Note a name that the library does not have."""
        module, _, name = target.rpartition(".")
        names = get_names(module)
        if get_names(target) is None and names is not None and name not in names:
            instead = GONE.get(old)
            text = f"`{LIBRARY}.{module}` has no `{name}`"
            self.left.append((line, f"{text}: write {instead}" if instead else text))

    def translate_from(self, node: ast.ImportFrom) -> None:
        """Change ``from ... import ...``."""
        module = self.resolve(node, self.package)
        if module in self.packages:
            for alias in node.names:
                if alias.name == "ops":
                    self.left.append(
                        (
                            node.lineno,
                            f"`ops` itself is imported: import the modules that you use, such as "
                            f"`from {LIBRARY}.core import logs`",
                        )
                    )
            return
        root = next((r for r in self.roots if module == r or module.startswith(r + ".")), None)
        if root is None:
            return
        inside = module.removeprefix(root).lstrip(".")
        groups: dict[str, list[str]] = {}
        for alias in node.names:
            old = f"{inside}.{alias.name}" if inside else alias.name
            if alias.name == "*":
                base = self.get_target(inside) if inside else None
                if base is None:
                    return
                groups.setdefault(f"{LIBRARY}.{base}", []).append("*")
                continue
            if inside == "web_server" and alias.name in ("WEB_BACKEND", "get_web_arguments"):
                self.replace_web_server(alias.asname or alias.name, alias.name)
                added = groups.setdefault(f"{LIBRARY}.conf", [])
                if "processes" not in added:
                    added.append("processes")
                continue
            if old == "settings" and self.replace_settings(alias.asname or "settings"):
                groups.setdefault(LIBRARY, []).append("conf")
                continue
            target = self.get_target(old)
            if target is None:  # The team's own module
                own = "." * node.level + (node.module or "")
                groups.setdefault(own, []).append(
                    f"{alias.name} as {alias.asname}" if alias.asname else alias.name
                )
                if old.partition(".")[0] not in self.own:
                    self.left.append((node.lineno, f"`{module}.{alias.name}` is not in 2.0"))
                continue
            self.check(old, target, node.lineno)
            parent, _, leaf = target.rpartition(".")
            local = alias.asname or alias.name
            source = f"{LIBRARY}.{parent}" if parent else LIBRARY
            item = leaf if leaf == local else f"{leaf} as {local}"
            groups.setdefault(source, []).append(item)
            if not inside:
                self.check_attributes(local, old, target)
        self.replace_statement(node, groups)

    def check_attributes(self, local: str, old: str, target: str) -> None:
        """Note the attributes of an imported module that the library's module does not have."""
        names = get_names(target)
        if names is None:
            return
        for node in ast.walk(self.tree):
            if (
                isinstance(node, ast.Attribute)
                and isinstance(node.value, ast.Name)
                and node.value.id == local
                and node.attr not in names
                and not node.attr.startswith("__")
            ):
                moved = NAMES.get(f"{old}.{node.attr}")
                text = f"`{LIBRARY}.{target}` has no `{node.attr}`"
                if moved:
                    module, _, name = moved.rpartition(".")
                    text += f": write `from {LIBRARY}.{module} import {name}`"
                elif f"{old}.{node.attr}" in GONE:
                    text += f": write {GONE[f'{old}.{node.attr}']}"
                self.left.append((node.lineno, text))

    def replace_settings(self, local: str) -> bool:
        """Change ``ops.Defaults`` into ``conf.Defaults``, if the module's name is used for these."""
        uses = [
            node for node in ast.walk(self.tree) if isinstance(node, ast.Name) and node.id == local
        ]
        attributes = [
            node
            for node in ast.walk(self.tree)
            if isinstance(node, ast.Attribute)
            and isinstance(node.value, ast.Name)
            and node.value.id == local
        ]
        if len(uses) != len(attributes) or any(node.attr not in CONF for node in attributes):
            return False
        self.edits += [Edit(*self.span(node), "conf") for node in uses]
        return True

    def replace_web_server(self, local: str, name: str) -> None:
        """Change the web server's backend and arguments into an entry of the library."""
        entry = f"processes.{self.server}(self)"
        whole: set[int] = set()
        for node in ast.walk(self.tree):
            # {"BACKEND": WEB_BACKEND, "ARGS": get_web_arguments(self)}
            if isinstance(node, ast.Dict) and len(node.keys) == 2:
                values = [ast.unparse(value) for value in node.values]
                if values == ["WEB_BACKEND", "get_web_arguments(self)"]:
                    whole.update(id(child) for child in ast.walk(node))
                    edit = Edit(*self.span(node), entry)
                    if edit not in self.edits:
                        self.edits.append(edit)
        for node in ast.walk(self.tree):
            if id(node) in whole:
                continue
            if name == "WEB_BACKEND" and isinstance(node, ast.Name) and node.id == local:
                self.edits.append(Edit(*self.span(node), f'{entry}["BACKEND"]'))
            if (
                name == "get_web_arguments"
                and isinstance(node, ast.Call)
                and isinstance(node.func, ast.Name)
                and node.func.id == local
            ):
                self.edits.append(Edit(*self.span(node), f'{entry}["ARGS"]'))

    def replace_statement(self, node: ast.ImportFrom, groups: dict[str, list[str]]) -> None:
        """Write imports in the place of one, with its comments."""
        start, end = self.span(node)
        line_start = self.offsets[node.lineno - 1]
        indent = self.text[line_start:start]
        separator = "; " if indent.strip() else "\n" + indent
        end_of_line = self.text.find("\n", end)
        tail = self.text[end : end_of_line if end_of_line >= 0 else len(self.text)]
        suffix = tail if tail.lstrip().startswith("#") else ""
        old = self.text[start:end]
        comments = []
        for token in tokenize.generate_tokens(io.StringIO(old + "\n").readline):
            if token.type == tokenize.COMMENT:
                comments.append(token.string)
        count = sum(len(items) for items in groups.values())
        if len(groups) == 1 and count == len(node.names) and (comments or "\n" in old):
            # Its lines stay as they are.
            ((source, items),) = groups.items()
            names = re.split(r"\bimport\b", old, maxsplit=1)[1]
            new = f"from {source} import" + names
            position = len(f"from {source} import")
            for alias, item in zip(node.names, items, strict=False):
                before = f"{alias.name} as {alias.asname}" if alias.asname else alias.name
                found = re.compile(rf"\b{re.escape(before)}(?![\w.])").search(new, position)
                if found:
                    new = new[: found.start()] + item + new[found.end() :]
                    position = found.start() + len(item)
            self.edits.append(Edit(start, end, new))
            return
        statements = []
        for source, items in groups.items():
            statement = f"from {source} import {', '.join(items)}"
            if len(indent) + len(statement) > LINE_LENGTH and "; " not in separator:
                inner = "".join(f"{indent}    {item},\n" for item in items)
                statement = f"from {source} import (\n{inner}{indent})"
            statements.append(statement)
        statements = [*comments, *statements] if "; " not in separator else statements
        text = (suffix + separator).join(statements) if suffix else separator.join(statements)
        self.edits.append(Edit(start, end, text))

    def translate_import(self, node: ast.Import) -> None:
        """Change ``import package.ops.module``."""
        for alias in node.names:
            for root in self.roots:
                if alias.name == root:
                    self.left.append(
                        (
                            node.lineno,
                            f"`{root}` is imported: import the modules that you use, such as "
                            f"`import {LIBRARY}.core.logs`",
                        )
                    )
                elif alias.name.startswith(root + "."):
                    inside = alias.name.removeprefix(root + ".")
                    target = self.get_target(inside)
                    if target is not None:
                        start, _ = self.span(alias)
                        end = start + len(alias.name)
                        self.edits.append(Edit(start, end, f"{LIBRARY}.{target}"))

    def translate_attribute(self, node: ast.Attribute) -> None:
        """Change ``package.ops.module`` in an expression."""
        dotted = ast.unparse(node) if isinstance(node.value, (ast.Attribute, ast.Name)) else ""
        for root in self.roots:
            inside = dotted.removeprefix(root + ".")
            if dotted == inside or "(" in inside:
                continue
            if inside.count(".") == 1 and self.get_target(inside):
                self.check(inside, self.get_target(inside) or "", node.lineno)
                if inside in NAMES:
                    self.left.append((node.lineno, f"write `{LIBRARY}.{NAMES[inside]}`"))
            if "." in inside:
                continue
            target = self.get_target(inside)
            if target is not None:
                self.edits.append(Edit(*self.span(node), f"{LIBRARY}.{target}"))

    def translate_strings(self) -> None:
        """Change dotted names in strings."""
        middle = getattr(tokenize, "FSTRING_MIDDLE", None)
        for token in tokenize.generate_tokens(io.StringIO(self.text).readline):
            if token.type not in (tokenize.STRING, middle):
                continue
            if token.type == tokenize.STRING and self.exact.match(token.string):
                new = self.exact.sub(rf"\g<1>{LIBRARY}\g<2>", token.string)
            else:
                new = self.replace_dotted(token.string)
            if new != token.string:
                start = self.offsets[token.start[0] - 1] + token.start[1]
                end = self.offsets[token.end[0] - 1] + token.end[1]
                if self.text[start:end] == token.string:
                    self.edits.append(Edit(start, end, new))
            if match := re.search(r"(?:^|\})\.ops\.(\w+)", token.string):
                before = self.text[: self.offsets[token.start[0] - 1] + token.start[1]]
                composed = "}.ops." in token.string or before.endswith("}")
                target = self.get_target(match[1]) if composed else None
                if target:
                    self.left.append(
                        (token.start[0], f"a name is composed: write `{LIBRARY}.{target}`")
                    )


def get_package(path: str) -> str:
    """Return the dotted name of the package that a Python file is in."""
    parts = list(PurePosixPath(path).parent.parts)
    first = len(parts)
    while first and Path(*parts[:first], "__init__.py").exists():
        first -= 1
    # A folder without __init__.py, such as tests, is a package of its own name.
    return ".".join(parts[first:]) if first < len(parts) else ".".join(parts)


# Configuration


def find_list(text: str, name: str) -> re.Match[str] | None:
    """Find a list in ``pyproject.toml`` that has one item a line; group 1 is its lines."""
    return re.search(rf"^{name} = \[\n((?:[ \t].*\n)*)\]", text, re.M)


def get_distribution(line: str) -> str:
    """Return the name of the distribution that a line of a list requires."""
    match = re.match(r"""\s*["']([\w.-]+)""", line)
    return match[1].lower() if match else line


def change_list(given: list[str], before: list[str], after: list[str]) -> list[str]:
    """Return a list of requirements with the template's changes; the team's lines stay."""
    lines = [line for line in given if line in after or line not in before]
    for line in after:
        if line not in before and get_distribution(line) not in map(get_distribution, lines):
            later = (i for i, other in enumerate(lines) if other.strip() > line.strip())
            lines.insert(next(later, len(lines)), line)
    return lines


def change_project(text: str, record: Record, old: str, new: str) -> str:
    """Return ``pyproject.toml`` with the library, without what the library brings."""
    for name in ("dependencies", "dev"):
        match = find_list(text, name)
        if match is None:
            continue
        before, after = (
            found[1].splitlines(keepends=True) if (found := find_list(version, name)) else []
            for version in (old, new)
        )
        lines = change_list(match[1].splitlines(keepends=True), before, after)
        if name == "dependencies" and "prodserver-ops" not in "".join(lines):
            extras = record.answers.get("__extras") or "api,sentry"
            lines = change_list(lines, [], [f'    "prodserver-ops[{extras}]",\n'])
        text = text[: match.start(1)] + "".join(lines) + text[match.end(1) :]
    source = f'prodserver-ops = {{ path = "{VENDOR}" }}\n'
    if source not in text:
        if "[tool.uv.sources]\n" in text:
            text = text.replace("[tool.uv.sources]\n", f"[tool.uv.sources]\n{source}", 1)
        elif match := re.search(r"^\[tool\.uv\]\n(?:[^\[\n].*\n)*", text, re.M):
            section = f"\n[tool.uv.sources]\n{source}"
            text = text[: match.end()] + section + text[match.end() :]
        else:
            text = text.rstrip("\n") + f"\n\n[tool.uv.sources]\n{source}"
    ruff = re.search(r"^\[tool\.ruff\]\n((?:[^\[\n].*\n)*)", text, re.M)
    if ruff and "vendor" not in ruff[1]:
        if "extend-exclude = [" in ruff[1]:
            section = ruff[0].replace("extend-exclude = [", 'extend-exclude = ["vendor", ')
        else:
            section = ruff[0] + 'extend-exclude = ["vendor"]\n'
        text = text[: ruff.start()] + section + text[ruff.end() :]
    mypy = re.search(r"^\[tool\.mypy\]\n((?:[^\[\n].*\n)*)", text, re.M)
    if mypy and "vendor" not in mypy[1]:
        if 'exclude = ["^tests/"]' in mypy[0]:
            section = mypy[0].replace('exclude = ["^tests/"]', 'exclude = ["^tests/", "^vendor/"]')
        else:
            section = mypy[0].replace("exclude = [", 'exclude = ["^vendor/", ')
        text = text[: mypy.start()] + section + text[mypy.end() :]
    # The strict rules for ops
    pattern = r'^\[\[tool\.mypy\.overrides\]\].*\nmodule = "[\w.]+\.ops\.\*"\n(?:[^\[\n].*\n)*\n?'
    return re.sub(pattern, "", text, flags=re.M)


def change_image(text: str) -> str:
    """Return a Dockerfile, or a file that has one, which copies the library before it installs."""
    if re.search(r"^\s*COPY vendor\b", text, re.M):
        return text
    return re.sub(
        r"^([ \t]*)(COPY [^\n]*\buv\.lock\b[^\n]*)\n",
        r"\1\2\n\1COPY vendor vendor\n",
        text,
        count=1,
        flags=re.M,
    )


def change_settings(text: str, path: str, package: str, record: Record) -> str:
    """Return the settings with what the library's classes need."""
    tree = ast.parse(text)
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    # A module with another class above it, such as the team's, has the settings below.
    settings = next((node for node in classes if node.name == "Settings"), None)
    if settings is None or LIBRARY not in text:
        return text
    names = {
        target.id
        for node in settings.body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    defined = {node.name for node in settings.body if isinstance(node, ast.FunctionDef)}
    lines = text.splitlines(keepends=True)
    brokers = record.answers.get("_brokers", {})
    variable = brokers.get(record.answers.get("broker"), {}).get("variable", "CELERY_BROKER_URL")
    depth = len(PurePosixPath(path).parts)
    values = {
        "PACKAGE": f'"{package}"',
        "BASE_DIR": "Path(__file__).resolve()" + ".parent" * depth,
        "BROKER_VARIABLE": f'"{variable}"',
    }
    missing = [name for name in values if name not in names | defined]
    if not missing:
        return text
    after = next(
        (
            node
            for node in settings.body
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "DOMAIN"
        ),
        settings.body[0],
    )
    new = [f"    {name} = {values[name]}\n" for name in missing]
    position = after.end_lineno or 0
    lines[position:position] = new
    if "BASE_DIR" in missing and not re.search(r"^from pathlib import .*\bPath\b", text, re.M):
        first = next(
            (node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))), None
        )
        position = first.lineno - 1 if first else 0
        lines[position:position] = ["from pathlib import Path\n", "\n"]
    return "".join(lines)


# The upgrade


class Upgrade:
    """All steps, and their report."""

    def __init__(self, record: Record, history: list[Record], packages: list[Package]) -> None:
        self.report = Report()
        self.record = record
        self.history = history
        self.revision = history[0].revision
        self.packages = packages
        self.main = packages[0]
        self.slug = record.slug
        template = Package(self.slug, self.slug)
        self.files = {
            path
            for package in packages
            for path in git("ls-tree", "-r", "--name-only", self.revision, f"{package.ops}/").split(
                "\n"
            )
            if path
        }
        self.own = self.find_own_modules()
        #: The service as the releases had it that it was at, the last one first
        self.versions: list[Path] = []
        self.translator = Translator([*packages, template], record.answers, self.own)

    def find_own_modules(self) -> set[str]:
        """Return the names of modules and packages that only this team's ``ops`` has."""
        known = {
            *MODULES,
            *REMOVED,
            "production_broker",
            "web_backend",
            "__init__",
            "static",
            "templates",
        }
        names = {
            PurePosixPath(path).relative_to(package.ops).parts[0]
            for package in self.packages
            for path in self.files
            if path.startswith(package.ops + "/")
        }
        return {name.removesuffix(".py") for name in names} - known

    @property
    def renamed(self) -> bool:
        """Whether the package is not where the template has it."""
        return self.main.path != self.slug

    def run(self) -> int:
        """Do all steps; return the exit status."""
        pending = [package.ops for package in self.packages if Path(package.ops).is_dir()]
        own = [path for path in self.files if self.is_own(path)]
        leftover = any(
            path.is_file()
            and "__pycache__" not in path.parts
            and path.as_posix() not in own
            and path.name != "__init__.py"
            for folder in pending
            for path in Path(folder).rglob("*")
        )
        if leftover:
            with tempfile.TemporaryDirectory() as folder:
                self.take_template(Path(folder))
        self.translate_files()
        self.complete()
        self.list_left()
        return self.report.print()

    def is_own(self, path: str) -> bool:
        """Return whether a file in ``ops`` is the team's own module, which stays."""
        for package in self.packages:
            if path.startswith(package.ops + "/"):
                first = PurePosixPath(path).relative_to(package.ops).parts[0]
                return first.removesuffix(".py") in self.own
        return False

    def map(self, text: str) -> str:
        """Return a text of the template with the package's name that the service has."""
        if not self.renamed:
            return text
        return re.sub(rf"\b{re.escape(self.slug)}\b", self.main.name, text)

    def translate(self, text: str, path: str) -> str:
        """Return a file's text with the library's names; as it is, if it cannot be parsed."""
        if path.endswith(".py"):
            try:
                return self.translator.translate(text, self.get_package(path))[0]
            except (SyntaxError, tokenize.TokenError, ValueError):
                return text
        return text

    def get_package(self, path: str) -> str:
        """Return the package of a file of the template or the service."""
        if path.startswith(self.slug + "/"):
            return ".".join(PurePosixPath(path).parent.parts)
        return get_package(path)

    # With the template

    def take_template(self, folder: Path) -> None:
        """Do what needs both versions of the template."""
        try:
            new = self.record.render(folder / "new")
            self.versions = [self.history[0].render(folder / "old-0")]
            if self.renamed or self.find_edits():
                # Files may be of an earlier release, because later ones did not arrive.
                self.versions += [
                    record.render(folder / f"old-{number}")
                    for number, record in enumerate(self.history[1:], 1)
                ]
        except (Failed, StopIteration) as error:
            self.report.left.append(f"the template could not be rendered, so ops stays: {error}")
            return
        self.restore_library(new)
        self.merge_unmerged()
        self.merge_rejected(self.versions[0], new)
        if self.renamed:
            self.merge_package(self.find_best_version(), new)
            self.rename_in_new_lines(new)
        self.keep_edits()

    def find_best_version(self) -> Path:
        """Return the version that most files of the service's ``ops`` are from."""

        def count(version: Path) -> int:
            edited = {path for path, _, _ in self.find_edits([version])}
            return -len(edited & self.files)

        return max(self.versions, key=count)

    def find_edits(self, versions: list[Path] | None = None) -> list[tuple[str, str, list[str]]]:
        """Return paths and texts of files in the old folders that no version has.

        The third part are the texts that the versions have.
        """
        tests = git("ls-tree", "-r", "--name-only", self.revision, "tests/ops/").splitlines()
        found = []
        for path in sorted([*self.files, *tests]):
            package = next((p for p in self.packages if path.startswith(p.ops + "/")), None)
            source = path if package is None else f"{self.slug}{path.removeprefix(package.path)}"
            ours = show(self.revision, path)
            texts = [
                text
                for version in versions or self.versions
                if (text := read(version / source)) is not None
            ]
            if ours is not None and all(ours not in (text, self.map(text)) for text in texts):
                found.append((path, ours, texts))
        return found

    def restore_library(self, new: Path) -> None:
        """Give the library the template's bytes: edits of ``ops`` may have followed its files."""
        source = new / VENDOR
        changed = []
        shipped = {p.relative_to(source) for p in source.rglob("*") if p.is_file()}
        for path in sorted(shipped):
            target = Path(VENDOR, path)
            content = (source / path).read_bytes()
            if not target.exists() or target.read_bytes() != content:
                changed.append(target.as_posix())
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(content)
        for path in Path(VENDOR).rglob("*"):
            if (
                path.is_file()
                and path.relative_to(VENDOR) not in shipped
                and path.suffix in {".py", ".rej", ".html", ".css", ".js"}
            ):
                changed.append(path.as_posix())
                path.unlink()
        git("add", "--all", "--force", "--", VENDOR)
        if changed:
            self.report.done.append(
                f"{VENDOR}: has the template's files again. git had moved your edits of ops there: "
                + ", ".join(name.removeprefix(f"{VENDOR}/src/") for name in changed)
            )

    def merge_file(self, path: str, ours: str, base: str, theirs: str) -> bool:
        """Merge a file, and write it; return whether it has no conflicts."""
        if PurePosixPath(path).name == "pyproject.toml":
            base, theirs = self.map(base), self.map(theirs)
            old = base
            base = change_project(base, self.record, old, theirs)
            ours = change_project(ours, self.record, old, theirs)
        else:
            base = self.map(self.translate(base, path))
            theirs = self.map(theirs)
            ours = self.translate(ours, path)
        result, clean = merge(ours, base, theirs)
        if not clean and PurePosixPath(path).name == "settings.py":
            # The team's lines are good for 2.0, because their names were translated.
            for ours_, theirs_ in find_conflicts(result):
                shown = "".join(f"\n      {line}" for line in theirs_.splitlines())
                line = result[: result.index(ours_)].count("\n") if ours_ else 1
                self.report.notes.append(
                    f"{path}:{line}: your lines were kept; the template has here:{shown}"
                )
            result, clean = merge(ours, base, theirs, "--ours")
        write(path, result)
        return clean

    def merge_unmerged(self) -> None:
        """Merge the files with conflicts again, with imports that are translated on both sides."""
        for path, stages in list_unmerged().items():
            if path.startswith(("vendor/", *(f"{p.ops}/" for p in self.packages), "tests/ops/")):
                continue
            if path == "openapi.yaml":  # It is written, not merged.
                write(path, show("", f":2:./{path}") or "")
                git("add", "--", path)
                self.report.done.append(f"{path}: is yours; `manage.py openapi` writes it again")
                continue
            if stages != {"1", "2", "3"}:
                continue
            base, ours, theirs = (show("", f":{stage}:./{path}") for stage in "123")
            if base is None or ours is None or theirs is None:
                continue
            if self.merge_file(path, ours, base, theirs):
                git("add", "--", path)
                self.report.done.append(f"{path}: merged")

    def merge_rejected(self, old: Path, new: Path) -> None:
        """Merge the files that have changes that git rejected."""
        for name in list_files("--others", "--exclude-standard"):
            path = name.removesuffix(".rej")
            if path == name or path.startswith(("vendor/", *(f"{p.ops}/" for p in self.packages))):
                continue
            base, ours, theirs = read(old / path), show(self.revision, path), read(new / path)
            if base is None or theirs is None or ours is None:
                continue
            Path(name).unlink()
            if self.merge_file(path, ours, base, theirs):
                self.report.done.append(f"{path}: merged")

    def merge_package(self, old: Path, new: Path) -> None:
        """Bring the template's changes to a package with another name."""
        changed, absent = [], []
        names = {
            path.relative_to(folder / self.slug).as_posix()
            for folder in (old, new)
            for path in (folder / self.slug).rglob("*")
            if path.is_file()
        }
        for name in sorted(names):
            if name.startswith("ops/"):
                continue
            path, source = f"{self.main.path}/{name}", f"{self.slug}/{name}"
            base, theirs, ours = read(old / source), read(new / source), read(path)
            before = ours
            if theirs is None:
                if base is not None and ours in (base, self.map(base)):
                    Path(path).unlink()
                    changed.append(path)
                elif ours is not None:
                    self.report.notes.append(f"{path}: the template has no such file any more")
                continue
            if base == theirs:
                continue
            if base is None and ours is not None:
                self.report.notes.append(f"{path}: yours; the template has a file of this name too")
                continue
            if ours is None:
                if base is None:
                    write(path, self.map(theirs))
                    changed.append(path)
                else:
                    absent.append(path)
                continue
            self.merge_file(path, ours, base or "", theirs)
            if read(path) != before:
                changed.append(path)
        # What the upgrade wrote under the template's name for the package
        for path in sorted(Path(self.slug).rglob("*")) if Path(self.slug).is_dir() else ():
            name = path.as_posix()
            if path.is_file() and show(self.revision, name) is None and (new / name).exists():
                path.unlink()
        remove_empty(Path(self.slug))
        git("add", "--all", "--", *[p for p in (self.slug,) if list_files("--", p)])
        if changed:
            self.report.done.append(
                f"the template's changes came to the renamed package: {', '.join(changed)}"
            )
        if absent:
            self.report.notes.append(
                "the template changed files that you do not have: " + ", ".join(absent)
            )

    def rename_in_new_lines(self, new: Path) -> None:
        """Write the package's name in lines that the upgrade added outside the package."""
        for path in list_team_files():
            text, template = read(path), read(new / path)
            if text is None or template is None or path in SKIPPED_TEXT:
                continue
            before = set((show(self.revision, path) or "").splitlines())
            given = set(template.splitlines())
            lines = [
                self.map(line) if line.rstrip("\r\n") in given - before else line
                for line in text.splitlines(keepends=True)
            ]
            if "".join(lines) != text:
                write(path, "".join(lines))
                self.report.done.append(f"{path}: has the package's name {self.main.name}")

    # The old folders

    def keep_edits(self) -> None:
        """Delete ``ops`` and ``tests/ops``; keep what the team changed there."""
        tests = git("ls-tree", "-r", "--name-only", self.revision, "tests/ops/").splitlines()
        own_tests = []
        for path, ours, texts in self.find_edits():
            package = next((p for p in self.packages if path.startswith(p.ops + "/")), None)
            if not texts and not ours.strip():
                continue
            if not texts and package is None:
                own_tests.append(path)
            elif not texts and self.is_own(path):
                self.report.notes.append(f"{path}: your own module; it stays")
                if not Path(path).exists():
                    write(path, ours)
            elif texts or package is None or not self.move_own_file(package, path, ours):
                self.keep_file(path, ours, texts)
        keep = {"tests/ops/conftest.py"} if own_tests else set()
        for path in own_tests:
            self.report.notes.append(f"{path}: your own test; it stays")
        gone = [p for p in self.files if not self.is_own(p)]
        gone += [p for p in tests if p not in own_tests and p not in keep]
        for name in keep:
            text = show(self.revision, name)
            if text is not None and not Path(name).exists():
                write(name, text)
        for path in gone:
            Path(path).unlink(missing_ok=True)
            Path(f"{path}.rej").unlink(missing_ok=True)
        for folder in (*(package.ops for package in self.packages), "tests/ops"):
            if Path(folder).is_dir():
                for cache_folder in Path(folder).rglob("__pycache__"):
                    shutil.rmtree(cache_folder, ignore_errors=True)
                remove_empty(Path(folder))
            if Path(folder).is_dir() and folder != "tests/ops":
                Path(folder, "__init__.py").touch()
            if list_files("--cached", "--", folder) or Path(folder).is_dir():
                git("add", "--all", "--", folder)
            kept = "; what is yours stays" if Path(folder).is_dir() else ""
            self.report.done.append(f"{folder}: deleted; {VENDOR} is in its place{kept}")

    def move_own_file(self, package: Package, path: str, text: str) -> bool:
        """Move a file that the team added to ``ops`` to the package, which is an app."""
        inside = PurePosixPath(path).relative_to(package.ops)
        target = Path(package.path, inside)
        if target.exists() or inside.parts[0] not in (
            "management",
            "static",
            "templates",
            "templatetags",
        ):
            return False
        write(target, text)
        Path(path).unlink(missing_ok=True)
        if target.suffix == ".py":
            folder = target.parent
            while folder != Path(package.path):
                (folder / "__init__.py").touch()
                folder = folder.parent
        self.report.done.append(f"{target.as_posix()}: moved there from ops")
        return True

    def keep_file(self, path: str, ours: str, texts: list[str]) -> None:
        """Keep a file of ``ops`` that the team edited, and what it changed."""
        write(f"{EDITS}/{path}.1x", ours)
        if texts:
            matcher = difflib.SequenceMatcher(None, "", ours.splitlines(), False)

            def compare(text: str) -> float:
                matcher.set_seq1(self.map(text).splitlines())
                return matcher.ratio()

            shipped = max(texts, key=compare)
            difference = difflib.unified_diff(
                self.map(shipped).splitlines(keepends=True),
                ours.splitlines(keepends=True),
                "as it was released",
                path,
            )
            write(f"{EDITS}/{path}.diff", "".join(difference))

    # Without the template

    def translate_files(self) -> None:
        """Change imports and dotted names in all files of the team."""
        changed = []
        for path in list_team_files():
            text = read(path)
            if text is None or path in SKIPPED_TEXT:
                continue
            if path in self.files and not self.is_own(path):
                continue
            if path.endswith(".py"):
                try:
                    new, left = self.translator.translate(text, get_package(path))
                except (SyntaxError, tokenize.TokenError, ValueError) as error:
                    if not MARKER.search(text) and re.search(r"\bops\.", text):
                        line = getattr(error, "lineno", None) or 1
                        self.report.left.append(f"{path}:{line}: correct its syntax: {error}")
                    continue
                # Lines move when an import becomes several.
                for line, message in left:
                    self.report.left.append(f"{path}:{find_line(text, new, line)}: {message}")
            elif TEXT.search(path):
                new = self.translator.replace_dotted(text)
            else:
                continue
            if new != text:
                write(path, new)
                changed.append(path)
        if changed:
            self.report.done.append(f"names of ops changed in: {', '.join(changed)}")

    def complete(self) -> None:
        """Bring settings and configuration to 2.0 where that is not so yet."""
        edits = {"pyproject.toml": lambda text: change_project(text, self.record, "", "")}
        for path in list_team_files():
            name = PurePosixPath(path).name
            if name.startswith(("Dockerfile", "compose")):
                edits[path] = change_image
        for package in self.packages:
            path = f"{package.path}/settings.py"
            edits[path] = lambda text, path=path, name=package.name: change_settings(
                text, path, name.partition(".")[0], self.record
            )
        for path, change in edits.items():
            text = read(path)
            if text is None or MARKER.search(text):
                continue
            try:
                new = change(text)
            except SyntaxError:
                continue
            if new != text:
                write(path, new)
                self.report.done.append(f"{path}: completed for 2.0")

    def list_left(self) -> None:
        """List conflicts, rejected changes and kept edits."""
        for path in list_team_files():
            text = read(path)
            if path.endswith(".rej"):
                name = path.removesuffix(".rej")
                self.report.left.append(
                    f"{path}:1: a change of the template that did not fit: make it in {name}, "
                    f"and delete {path}"
                )
            elif text and (match := MARKER.search(text)):
                line = text.count("\n", 0, match.start()) + 1
                self.report.left.append(
                    f"{path}:{line}: a conflict: keep the right lines, then: git add {path}"
                )
        for path, stages in list_unmerged().items():
            text = read(path)
            if text is None or not MARKER.search(text):
                wanted = (
                    "keep or delete the file" if stages != {"1", "2", "3"} else "it is resolved"
                )
                self.report.left.append(f"{path}:1: git has a conflict: {wanted}: git add {path}")
        for kept in sorted(Path(EDITS).rglob("*.1x")):
            path = kept.relative_to(EDITS).as_posix().removesuffix(".1x")
            difference = kept.with_suffix(".diff")
            where = self.describe(path)
            if difference.exists():
                text = difference.read_text(encoding="utf-8")
                lines = [line for line in text.splitlines()[2:] if line]
                shown = "\n".join(f"      {line}" for line in lines[:30])
                more = f"\n      ... all of it: {difference}" if len(lines) > 30 else ""
                self.report.left.append(
                    f"{kept.as_posix()}:1: you had changed {path}{where}. Do it in your own code, "
                    f"then delete this file:\n{shown}{more}"
                )
            else:
                self.report.left.append(
                    f"{kept.as_posix()}:1: {path} is not a file of the release{where}. Take what "
                    "you need into your own code, then delete this file"
                )

    def describe(self, path: str) -> str:
        """Return where the library has what a file of ``ops`` had."""
        for package in self.packages:
            if path.startswith(package.ops + "/") and path.endswith(".py"):
                inside = path.removeprefix(package.ops + "/").removesuffix(".py")
                target = self.translator.get_target(inside.replace("/", "."))
                if target:
                    return f" (now {LIBRARY}.{target})"
        return ""


def find_line(before: str, after: str, line: int) -> int:
    """Return the number that a line has after a change."""
    if before == after:
        return line
    matcher = difflib.SequenceMatcher(None, before.splitlines(), after.splitlines(), False)
    for block in matcher.get_opcodes():
        _, start, end, other, _ = block
        if start <= line - 1 < end:
            return other + 1 + (line - 1 - start if block[0] == "equal" else 0)
    return line


def remove_empty(folder: Path) -> None:
    """Delete a folder if it has no files, and the empty ones in it."""
    if not folder.is_dir():
        return
    for child in list(folder.iterdir()):
        if child.is_dir():
            remove_empty(child)
    if not any(folder.iterdir()):
        folder.rmdir()


def main() -> int:
    """Upgrade the service in the current folder; return the exit status."""
    text = read(".cruft.json")
    if text is None:
        print("There is no .cruft.json here. Run this script in the folder of the service.")
        return 1
    record = Record.parse(text)
    history = read_history()
    if record.commit in {past.commit for past in history}:
        print(f"This service is at {record.version}. First run: uv run manage.py upgrade")
        return 1
    if not history:
        print("Nothing to do: this service was never at 1.x.")
        return 0
    packages = find_packages(history[0].revision)
    if not packages:
        print("Nothing to do: this service had no ops when it was at 1.x.")
        return 0
    return Upgrade(record, history, packages).run()


if __name__ == "__main__":
    try:
        sys.exit(main())
    except Failed as error:
        sys.exit(str(error))
