"""Code that ``manage.py add`` writes: an app, a task, a schedule, a digest or a process.

Each function takes ``Files``, which collects new and changed files and refuses what exists
already, so that nothing is written unless everything can be.
"""

import ast
import json
import keyword
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from string import Template
from typing import Any

from django.apps import AppConfig, apps
from django.conf import settings
from django.core.management import get_commands
from django.db.migrations.loader import MigrationLoader

from ..mail.digests import registry
from ..scheduling import crontabs
from ..scheduling.operations import REQUIRED_MIGRATION, CreateSchedule, get_migrations

#: The longest name: that of a digest, with ``send_`` in front, is part of longer ones.
MAX_LENGTH = 40

#: The crontab of the schedule of a digest: Mondays at eight.
WEEKLY = "0 8 * * 1"

#: The folder with the templates of new code and e-mail.
TEMPLATES = Path(__file__).parent.parent / "templates" / "ops" / "new"

#: Folders of code that is not the team's own.
OTHERS = {"site-packages", "vendor"}

#: What a Procfile runs before the processes are started.
RELEASE = "release"


class Refused(ValueError):
    """The addition is not possible; the message says why, in one line."""


class Files:
    """The new and changed files of an addition, which ``write()`` writes."""

    def __init__(self) -> None:
        self.base = Path(settings.BASE_DIR)
        self.texts: dict[Path, str] = {}
        self.notes: list[str] = []

    def name(self, path: Path) -> str:
        """Return the path relative to ``BASE_DIR``."""
        return str(path.relative_to(self.base)) if path.is_relative_to(self.base) else str(path)

    def create(self, path: Path, text: str) -> None:
        """Add a new file. Raises Refused if it exists."""
        if path.exists() or path in self.texts:
            raise Refused(f"{self.name(path)} exists already; choose another name")
        self.texts[path] = text

    def read(self, path: Path) -> str:
        """Return the text of a file, with the changes so far."""
        if path in self.texts:
            return self.texts[path]
        return path.read_text(encoding="utf-8") if path.exists() else ""

    def create_package(self, path: Path) -> None:
        """Add an ``__init__.py`` unless there is one."""
        if not (path / "__init__.py").exists():
            self.texts[path / "__init__.py"] = ""

    def append(self, path: Path, code: str, name: str, imports: list[str]) -> None:
        """Add a class or function at the end of a module, and the imports that it lacks.

        Raises Refused if the module has the name already.
        """
        text = self.read(path)
        try:
            body = ast.parse(text).body
        except SyntaxError as error:
            raise Refused(f"{self.name(path)}:{error.lineno}: {error.msg}") from error
        if name in find_names(body):
            raise Refused(f"{self.name(path)} has {name} already; choose another name")
        missing = [
            line for line in imports if not find_names(ast.parse(line).body) <= find_names(body)
        ]
        lines = text.splitlines()
        place = find_import_place(body)
        lines[place:place] = [""] * (place > 0 and bool(missing)) + missing
        self.texts[path] = "\n".join(lines).strip() + f"\n\n\n{code}"

    def write(self) -> list[str]:
        """Write the files, and sort the imports; return a line for each file."""
        lines = []
        for path, text in self.texts.items():
            lines.append(f"{'changed' if path.exists() else 'written'}: {self.name(path)}")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        modules = [str(path) for path in self.texts if path.suffix == ".py"]
        # Ruff is a development dependency of a service, and another project may not have it.
        if find_spec("ruff"):
            ruff = [sys.executable, "-m", "ruff"]
            for command in (["check", "--select=I", "--fix", "--quiet"], ["format", "--quiet"]):
                subprocess.run([*ruff, *command, *modules], cwd=self.base, check=False)
        return lines


def check_name(name: str) -> None:
    """Raise Refused unless the name is a Python identifier in lower case."""
    if not re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)*", name) or len(name) > MAX_LENGTH:
        raise Refused(
            f"{name!r} is not a valid name: use at most {MAX_LENGTH} lower-case letters, digits and "
            "single underscores, and start with a letter"
        )
    if keyword.iskeyword(name):
        raise Refused(f"{name!r} is a word of Python; choose another name")


def get_app(label: str | None) -> AppConfig:
    """Return the app with a label, or that of the service. Raises Refused for another one."""
    for app in apps.get_app_configs():
        if app.label == label or (label is None and app.name == settings.PACKAGE):
            path = Path(app.path)
            if path.is_relative_to(settings.BASE_DIR) and OTHERS.isdisjoint(path.parts):
                return app
            break
    named = label or settings.PACKAGE
    raise Refused(f"{named!r} is not an app of this service in INSTALLED_APPS")


def find_names(body: list[ast.stmt]) -> set[str]:
    """Return the names that statements define or import."""
    names = set()
    for node in body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            names |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return names


def find_import_place(body: list[ast.stmt]) -> int:
    """Return the number of lines before the place for imports: below the docstring."""
    place = 0
    for node in body:
        is_docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        is_future = isinstance(node, ast.ImportFrom) and node.module == "__future__"
        if not (is_docstring or is_future):
            break
        place = node.end_lineno or 0
    return place


def get_class_name(name: str) -> str:
    """Return ``NewsOfTheWeek`` for ``news_of_the_week``."""
    return "".join(word.capitalize() for word in name.split("_"))


def render(template: str, **values: str) -> str:
    """Fill in the names; ``$`` marks them, because Django's templates have braces."""
    text = (TEMPLATES / f"{template}.py-tpl").read_text(encoding="utf-8")
    return Template(text).substitute(values)


def add_app(files: Files, name: str) -> None:
    """Add an empty app next to the package of the service."""
    if find_spec(name) is not None or name in {app.label for app in apps.get_app_configs()}:
        raise Refused(f"{name!r} is the name of a Python module or app; choose another name")
    folder = files.base / name
    if folder.exists():
        raise Refused(f"{files.name(folder)} exists already; choose another name")
    for path in (folder / "__init__.py", folder / "migrations" / "__init__.py"):
        files.create(path, "")
    files.create(folder / "apps.py", render("app", name=name, class_name=get_class_name(name)))
    files.create(folder / "models.py", f'"""The models of the app {name}."""\n')
    files.create(files.base / "tests" / f"test_{name}.py", render("app_test", name=name))
    insert_setting(files, "INSTALLED_APPS", f'"{name}",', after=settings.PACKAGE)


def add_task(files: Files, app: AppConfig, name: str) -> None:
    """Add a task and its test."""
    module = Path(app.path, "tasks.py")
    code = render("task", name=name)
    files.append(module, code, name, ["from celery import shared_task"])
    values = {"name": name, "module": app.name}
    files.create(files.base / "tests" / f"test_{name}.py", render("task_test", **values))


def add_schedule(files: Files, app: AppConfig, name: str, crontab: str | None) -> None:
    """Add a task and a migration that creates its schedule, daily or as the crontab says."""
    add_task(files, app, name)
    schedule = name.replace("_", "-")
    create_schedule(files, app, schedule, name, crontab)
    path = files.base / "tests" / f"test_{name}.py"
    test = files.texts[path].replace(
        "import pytest\n", "import pytest\nfrom django_celery_beat.models import PeriodicTask\n", 1
    )
    files.texts[path] = test + "\n\n" + render("schedule_test", schedule=schedule, task=name)


def create_schedule(
    files: Files, app: AppConfig, schedule: str, task: str, crontab: str | None
) -> None:
    """Add a migration that creates a schedule. Raises Refused for an invalid crontab."""
    if crontab is not None:
        try:
            crontabs.parse(*crontab.split())
        except (TypeError, ValueError) as error:
            raise Refused(f"{crontab!r} is not a valid crontab: {error}") from error
    loader = MigrationLoader(None, ignore_no_migrations=True)
    for _, migration in get_migrations(loader):
        for operation in migration.operations:
            if isinstance(operation, CreateSchedule) and operation.name == schedule:
                raise Refused(f"a migration has the schedule {schedule!r}; choose another name")
    leaves = loader.graph.leaf_nodes(app.label)
    if len(leaves) > 1:
        raise Refused(
            "there are conflicting migrations; run: uv run manage.py makemigrations --merge"
        )
    last = re.match(r"\d+", leaves[0][1]) if leaves else None
    number = int(last[0]) + 1 if last else len(leaves) + 1
    folder = Path(app.path, "migrations")
    files.create_package(folder)
    values = {
        "imports": "from datetime import timedelta\n\n" if crontab is None else "",
        "dependencies": "\n        ".join(
            f'("{key[0]}", "{key[1]}"),' for key in [*leaves, REQUIRED_MIGRATION]
        ),
        "schedule": schedule,
        "module": app.name,
        "task": task,
        "timing": f'crontab="{crontab}"' if crontab else "interval=timedelta(days=1)",
    }
    files.create(folder / f"{number:04d}_schedule_{task}.py", render("schedule", **values))


def add_digest(files: Files, app: AppConfig, name: str, crontab: str | None) -> None:
    """Add a weekly digest with its templates, task, schedule and test."""
    if name in registry:
        raise Refused(f"there is an e-mail with the name {name!r}; choose another name")
    class_name = get_class_name(name).removesuffix("Digest") + "Digest"
    schedule = f"send-{name.replace('_', '-')}"
    imports = [
        "from django.contrib.auth import get_user_model",
        "from django.utils import timezone",
        "from prodserver_ops.mail.digests import WeeklyDigest, register",
    ]
    code = render("digest", name=name, class_name=class_name, words=name.replace("_", " "))
    module = Path(app.path, "digests.py")
    if not files.read(module):
        files.texts[module] = '"""The e-mail of the service."""\n'
    files.append(module, code, class_name, imports)
    for path in sorted(TEMPLATES.glob("digest.[ht]*")):
        place = Path(app.path, "templates", "email", f"{name}{path.suffix}")
        files.create(place, path.read_text(encoding="utf-8"))
    files.append(
        Path(app.path, "tasks.py"),
        render("digest_task", name=name),
        f"send_{name}",
        ["from prodserver_ops.mail.tasks import digest_task"],
    )
    create_schedule(files, app, schedule, f"send_{name}", crontab or WEEKLY)
    values = {"name": name, "module": app.name, "schedule": schedule}
    files.create(files.base / "tests" / f"test_{name}.py", render("digest_test", **values))


def add_process(files: Files, app: AppConfig, name: str) -> None:
    """Add a process that runs a management command, and start it wherever processes start."""
    if name in settings.PRODUCTION_PROCESSES or name == RELEASE:
        raise Refused(f"there is a process with the name {name!r}; choose another name")
    if name in get_commands():
        raise Refused(f"there is a management command {name!r}; choose another name")
    commands = Path(app.path, "management", "commands")
    files.create_package(commands.parent)
    files.create_package(commands)
    files.create(commands / f"{name}.py", render("command", name=name))
    values = {"name": name, "module": app.name}
    files.create(files.base / "tests" / f"test_{name}.py", render("command_test", **values))
    line = f'"{name}": processes.command(self, "{name}"),'
    insert_setting(files, "PRODUCTION_PROCESSES", line, after=None)
    start_process(files, name)


def insert_setting(files: Files, setting: str, line: str, after: str | None) -> None:
    """Insert a line into a list or dictionary of the settings: below an item, or at the end.

    Raises Refused if the settings do not have the setting as a display with a line for each item.
    """
    path = Path(str(sys.modules[settings.SETTINGS_MODULE].__file__))
    text = files.read(path)
    lines = text.splitlines()
    for node in ast.walk(ast.parse(text)):
        value: Any = None
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == setting:
            value = node.value
        elif isinstance(node, ast.FunctionDef) and node.name == setting:
            value = next((each.value for each in node.body if isinstance(each, ast.Return)), None)
        items = value.elts if isinstance(value, ast.List) else getattr(value, "keys", None)
        if not items or not isinstance(value, ast.List | ast.Dict):
            continue
        found = [item for item in items if isinstance(item, ast.Constant) and item.value == after]
        place = found[0].lineno if found else int(value.end_lineno or 0) - 1
        above = lines[place - 1]
        if (found or after is None) and above.rstrip().endswith(","):
            indent = lines[items[0].lineno - 1]
            lines.insert(place, indent[: len(indent) - len(indent.lstrip())] + line)
            files.texts[path] = "\n".join(lines) + "\n"
            return
    raise Refused(f"{files.name(path)}: no place was found in {setting} for {line}")


def start_process(files: Files, name: str) -> None:
    """Add the process to the Procfiles, ``app.json`` and systemd; note other files."""
    for file in ("Procfile", "Procfile.dev"):
        path = files.base / file
        lines = files.read(path).splitlines()
        places = [
            number for number, line in enumerate(lines) if re.match(r"(?!release)\w+: ", line)
        ]
        if not places:
            continue
        # honcho gives each process a port of its own; see Procfile.dev.
        last = re.sub(r"^\w+:", f"{name}:", lines[places[-1]])
        last = re.sub(r"(?<=prodserver )\w+", name, last)
        last = re.sub(r"(?<=PORT == )\d+", lambda match: str(int(match[0]) + 100), last)
        last = re.sub(r"(?<=PORT - )\d+", lambda match: str(int(match[0]) + 100), last)
        lines.insert(places[-1] + 1, last)
        files.texts[path] = "\n".join(lines) + "\n"
    path = files.base / "app.json"
    if path.exists():
        app = json.loads(path.read_text(encoding="utf-8"))
        if "formation" in app:
            app["formation"][name] = {"quantity": 1}
            for check in app.get("healthchecks", {}).get("beat", [])[:1]:
                command = [*check["command"][:-1], name]
                check = check | {"name": f"{name} runs", "command": command}
                app["healthchecks"][name] = [check]
            text = json.dumps(app, indent=2, ensure_ascii=False)
            # Short objects and lists stay on one line.
            text = re.sub(r'\{\n\s+("quantity": \d+)\n\s+\}', r"{ \1 }", text)
            text = re.sub(
                r"\[\n\s+([^\[\]{}]*?)\n\s+\]",
                lambda match: f"[{re.sub(r',\s+', ', ', match[1])}]",
                text,
            )
            files.texts[path] = text + "\n"
    for unit in files.base.glob("*-beat.service"):
        new = unit.with_name(unit.name.replace("-beat.", f"-{name.replace('_', '-')}."))
        files.create(new, re.sub(r"\bbeat\b", name, unit.read_text(encoding="utf-8")))
    if (files.base / "compose.yaml").exists():
        files.notes.append(
            f"Add a service to compose.yaml as for beat, with: python manage.py prodserver {name}"
        )
