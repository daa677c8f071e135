"""Rooms: the library knows nothing of a service, imports run one way, and choices are data."""

import ast
import graphlib
import json
import re
import shlex
import sys

import pytest

from tests.conftest import ROOT
from tests.generate import LIBRARY, SOURCES, TEMPLATE, get_template
from tests.test_output import ANSWERS

#: Words of the example, which is the team's to replace. A word counts wherever it starts.
DOMAIN_WORDS = (
    "prayer",
    "submission",
    "moderator",
    "author(?!ization)",
    "answer",
    "approve",
    "flagged",
    "archive",
)

parses_the_library = pytest.mark.skipif(
    sys.version_info < (3, 12), reason="the library is written for Python 3.12 and later"
)

#: The script for services of 1.x, which reads their answers and the template of their release.
FROM_1 = "upgrade_from_1.py"

#: Files that are about the template: its answers, and the authors of commits.
UPGRADES = {
    FROM_1,
    "propose_upgrade.py",
    "src/prodserver_ops/console/upgrades.py",
    "src/prodserver_ops/management/commands/change.py",
    "src/prodserver_ops/management/commands/upgrade.py",
}

#: Imports inside functions of the library, with the reason for each.
IMPORTS_IN_FUNCTIONS = {
    # They need loaded models.
    ("apps.py", "console.alerts"),
    ("apps.py", "console.checks"),
    ("apps.py", "scheduling.heartbeats"),
    ("apps.py", "scheduling.restores"),
    ("apps.py", "web.logins"),
    ("worker/app.py", "scheduling.beat"),
    ("worker/app.py", "scheduling.beat.Beat"),
    ("worker/app.py", "scheduling.claims.claim"),
    ("worker/app.py", "scheduling.claims.finish"),
    ("worker/app.py", "scheduling.queues.get_consumed"),
    ("console/checks.py", "console.adoption"),
    ("console/checks.py", "console.migration_safety"),
    ("console/checks.py", "console.processes"),
    ("console/checks.py", "console.task_limits"),
    ("worker/app.py", "worker.delayed"),
    ("worker/app.py", "worker.pool"),
    ("worker/app.py", "worker.record"),
    ("worker/app.py", "worker.results.Result"),
    ("worker/app.py", "worker.results.make_reliable"),
    ("templatetags/operations.py", "console.operations.VIEW_PERMISSION"),
    ("templatetags/operations.py", "console.operations.get_summary"),
    ("worker/app.py", "celery.bin.base.CLIContext"),  # Web needs neither a command line
    ("worker/app.py", "celery.worker.state"),  # nor the parts of a worker.
    ("console/operations.py", "worker.failed"),
    ("web/flower.py", "celery.bin.celery.celery"),
    # Production needs nothing of development.
    ("apps.py", "development.imports"),
    ("apps.py", "development.templates"),
    ("templatetags/welcome.py", "development.welcome.get_context"),
    ("core/mistakes.py", "watchfiles"),
    ("management/commands/prodserver.py", "development.reloading.Supervisor"),
    # A project may not have these apps.
    ("console/forgetting.py", "django.contrib.admin.models.LogEntry"),
    ("console/forgetting.py", "django.contrib.sessions.models.Session"),
    ("worker/results.py", "django_celery_results.backends.database.trigger_callback"),
    ("worker/results.py", "django_celery_results.models.TaskResult"),
    ("apps.py", "core.sentry"),  # It is not needed without SENTRY_DSN.
    ("core/database.py", "psycopg"),  # SQLite does not need it.
    # Flower is optional.
    ("web/flower.py", "flower.views.monitor.Metrics"),
    ("web/flower.py", "tornado.web.authenticated"),
    ("core/locks.py", "fcntl"),  # Available only on Unix.
    # Production does not have drf-spectacular.
    ("management/commands/openapi.py", "api.openapi.generate_schema"),
    ("api/schema.py", "api.openapi.generate_schema"),
}

#: Answers as different as possible, to find what depends on them.
OTHER_ANSWERS = {
    "project_name": "Zeta's Café",
    "project_slug": "zeta",
    "description": "Another service.",
    "author_name": "Zoe",
    "author_email": "zoe@zeta.example.org",
    "domain_name": "zeta.example.org",
    "timezone": "Asia/Tokyo",
    "license": "MIT",
    "example": "none",
    "deploy": "dockerfile",
    "compose": True,
}

#: Answers that use each part of the library.
USES = [
    {},
    OTHER_ANSWERS,
    {
        "django_version": "5.2",
        "web_server": "uvicorn",
        "broker": "redis",
        "task_results": "database",
        "monitoring": "flower",
        "realtime": "channels",
        "lifecycle": "archive",
        "queues": "high",
    },
    {"web_server": "granian", "broker": "postgresql", "deploy": "systemd"},
]


@pytest.fixture(scope="session", params=["submissions", "none"])
def package(request, default_project, none_project):
    """The Python package of a service, with and without the example."""
    project = {"submissions": default_project, "none": none_project}[request.param]
    return project / project.name


def python_files(package):
    """Return the syntax tree of each file of the package, by its path in the package."""
    return {
        path.relative_to(package).as_posix(): ast.parse(path.read_text())
        for path in sorted(package.rglob("*.py"))
    }


def module_name(package, path):
    """Return the dotted name of the module in that file."""
    parts = [package.name, *path.removesuffix(".py").split("/")]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_names(package, path, node):
    """Return the absolute dotted names that an import statement refers to."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    base = node.module or ""
    if node.level:
        parts = module_name(package, path).split(".")
        depth = node.level - 1 if path.endswith("__init__.py") else node.level
        parts = parts[: len(parts) - depth]
        base = ".".join([*parts, base] if base else parts)
    return [f"{base}.{alias.name}" for alias in node.names]


def imports(tree):
    return [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]


def is_inside(name, package):
    """Return whether a dotted name is that package or something in it."""
    return name == package or name.startswith(f"{package}.")


# The library


def library_files(project):
    """Return the content of each file of the library of a service or of the template."""
    folder = project / LIBRARY
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.fixture(scope="session")
def library():
    """The content of each file of the library in the template."""
    found = library_files(get_template() / TEMPLATE.name)
    assert len(found) > 80
    return found


@pytest.mark.parametrize("answers", [*ANSWERS.values(), *USES[1:]], ids=str)
def test_the_library_is_the_same_in_every_service(bake, library, answers):
    project = bake(**answers)
    assert library_files(project) == library
    # Nothing else is in vendor.
    assert [path.name for path in (project / "vendor").iterdir()] == [LIBRARY.name]


def test_the_library_names_nothing_of_the_example(library):
    pattern = rf"(?<![a-z])({'|'.join(DOMAIN_WORDS)})"
    found = [
        (path, number, line)
        for path, content in library.items()
        if path not in UPGRADES
        for number, line in enumerate(content.decode().splitlines(), 1)
        if re.search(pattern, line, re.IGNORECASE)
    ]
    assert found == []


def test_the_library_has_no_jinja_and_no_conditional_names(library):
    for path, content in library.items():
        assert not re.search(r"[{}%]", path)
        # The templates of Django are files of their own.
        if not path.endswith((".html", ".txt")) and path != FROM_1:
            assert not re.search(r"\{\{|\{%", content.decode()), path


def test_the_library_has_no_tests(library):
    parts = {part for path in library for part in path.split("/")}
    assert not {part for part in parts if re.match(r"(test|conftest)", part)}


@parses_the_library
def test_the_library_imports_itself_by_relative_imports_alone(library):
    """A name that starts with that of a service's package could not be told from another one."""
    for path, content in library.items():
        if path.endswith(".py"):
            for node in imports(ast.parse(content)):
                if isinstance(node, ast.Import):
                    assert not any(is_inside(a.name, SOURCES.name) for a in node.names), path
                elif not node.level:
                    assert not is_inside(node.module, SOURCES.name), path


def service_files(project):
    """Return the syntax tree of each Python file of a service outside the library."""
    return {
        path: tree for path, tree in python_files(project).items() if not path.startswith("vendor/")
    }


def find_module(project, name):
    """Return the longest part of a dotted name that is a module of the library, and the rest."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        path = (project / SOURCES.parent).joinpath(*parts[:length])
        for file in (path.with_suffix(".py"), path / "__init__.py"):
            if file.exists():
                return file, parts[length:]
        if path.is_dir():  # Migrations are found in it by number.
            return None, []
    raise AssertionError(f"no module of the library: {name}")


def defines(file, name):
    """Return whether a module has a name, or a module in it has."""
    if (file.parent / f"{name}.py").exists() or (file.parent / name).is_dir():
        return True
    for node in ast.walk(ast.parse(file.read_text())):
        names = {getattr(node, "name", None), getattr(node, "id", None)}
        if isinstance(node, ast.alias):
            names = {node.asname or node.name}
        if name in names:
            return True
    return False


@parses_the_library
@pytest.mark.parametrize("answers", USES, ids=str)
def test_a_service_names_the_library_as_prodserver_ops_and_what_it_names_exists(bake, answers):
    """In imports and in strings, such as those in settings."""
    project = bake(**answers)
    found = set()
    for path, tree in service_files(project).items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = imported_names(project, path, node)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                names = re.findall(r"(?:ops|vendor|prodserver_ops)(?:\.\w+)+", node.value)
            else:
                continue
            roots = {name.split(".")[0] for name in names}
            # The label and the names of tasks are those of 1.x.
            if isinstance(node, ast.Constant):
                assert all(name.count(".") == 1 for name in names if name.startswith("ops."))
                roots -= {"ops"}
            assert not roots & {"ops", "vendor"}, path
            found |= {name for name in names if is_inside(name, SOURCES.name)}
    assert found
    for name in found:
        file, rest = find_module(project, name)
        if rest:
            assert defines(file, rest[0]), name


# Imports


def test_imports_of_the_package_form_no_circle(package):
    trees = python_files(package)
    modules = {module_name(package, path) for path in trees}
    graph = {}
    for path, tree in trees.items():
        importer = module_name(package, path)
        graph[importer] = set()
        for node in imports(tree):
            for name in imported_names(package, path, node):
                if not is_inside(name, package.name):
                    continue
                # ``from .tasks import a`` needs tasks; ``from . import tasks`` needs tasks too.
                imported = name if name in modules else name.rpartition(".")[0]
                assert imported in modules, (path, name)
                graph[importer].add(imported)
        graph[importer].discard(importer)
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail(f"modules that import each other: {' <- '.join(error.args[1])}")


def test_functions_of_a_service_import_nothing(package):
    """Imports are at the top of a module; the library has reasons for others."""
    found = {
        (path, name)
        for path, tree in python_files(package).items()
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        for node in imports(function)
        for name in imported_names(package, path, node)
    }
    assert found == set()


@parses_the_library
def test_functions_of_the_library_import_only_what_is_not_always_available():
    package = TEMPLATE / SOURCES
    found = {
        (path, name.removeprefix(f"{package.name}."))
        for path, tree in python_files(package).items()
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        for node in imports(function)
        for name in imported_names(package, path, node)
    }
    assert found == IMPORTS_IN_FUNCTIONS


def test_domain_imports_run_one_way(default_project):
    """Tasks may import digests and models, digests may import models, and never back."""
    package = default_project / default_project.name
    order = ["models.py", "digests.py", "tasks.py"]
    trees = python_files(package)
    for position, path in enumerate(order):
        later = {f"{package.name}.{name.removesuffix('.py')}" for name in order[position + 1 :]}
        found = {
            name
            for node in imports(trees[path])
            for name in imported_names(package, path, node)
            if any(is_inside(name, module) for module in later)
        }
        assert found == set(), path


# Settings


def test_settings_are_short(package):
    assert len((package / "settings.py").read_text().splitlines()) < 170


@pytest.mark.slow
def test_importing_the_settings_creates_no_files(bake, make_service):
    service = make_service(bake())
    service.install("--no-dev")

    def listing():
        return sorted(path for path in service.folder.rglob("*") if "__pycache__" not in path.parts)

    before = listing()
    module = f"{service.folder.name}.settings"
    output = service.run(shlex.join(["python", "-c", f"import {module} as s; print(s.BASE_DIR)"]))
    assert output.strip() == str(service.folder)
    assert listing() == before


# The template


def test_template_python_files_contain_no_jinja_statements():
    files = sorted(TEMPLATE.rglob("*.py"))
    assert [path.name for path in files if re.search(r"\{%", path.read_text())] == []


def test_tables_hold_data_and_neither_code_nor_prose():
    context = json.loads((ROOT / "cookiecutter.json").read_text())
    tables = {
        name: value
        for name, value in context.items()
        if name.startswith("_") and not name.startswith("__") and isinstance(value, dict)
    }
    assert tables

    def leaves(value):
        if isinstance(value, dict):
            # Times and arguments of schedules are values of any kind.
            value = [item for key, item in value.items() if key not in ("schedules", "titles")]
        return (
            [leaf for item in value for leaf in leaves(item)]
            if isinstance(value, list)
            else [value]
        )

    for name, table in tables.items():
        for leaf in leaves(table):
            # One word: a name, a version, a path or a requirement.
            assert re.fullmatch(r"[\w.,<>=\[\]/:@-]*", leaf), (name, leaf)
