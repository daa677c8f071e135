"""Rooms: ops/ is independent of the service, imports run one way, and choices are data."""

import ast
import graphlib
import json
import re
import shlex

import pytest

from tests.conftest import ROOT

TEMPLATE = ROOT / "{{cookiecutter.project_slug}}"

#: Words of the example, which is the team's to replace. A word counts wherever it starts.
DOMAIN_WORDS = ("submission", "moderator", "author", "answer", "approve", "flagged", "archive")

#: Imports inside functions, by file, with the reason for each.
IMPORTS_IN_FUNCTIONS = {
    # They need loaded models.
    ("ops/apps.py", "adoption"),
    ("ops/apps.py", "checks"),
    ("ops/apps.py", "overlaps"),
    ("ops/apps.py", "heartbeats"),
    ("ops/celery.py", "beat"),
    ("ops/celery.py", "beat.Beat"),
    ("ops/celery.py", "celery.bin.base.CLIContext"),  # Web needs neither a command line
    ("ops/celery.py", "celery.worker.state"),  # nor the parts of a worker.
    ("ops/checks.py", "processes"),  # So do the command lines that it parses.
    ("ops/apps.py", "sentry"),  # It is not needed without SENTRY_DSN.
    ("ops/celery.py", "runs.start_run"),
    ("ops/database.py", "psycopg"),  # SQLite does not need it.
    ("ops/locks.py", "fcntl"),  # Available only on Unix.
    # Production does not have drf-spectacular.
    ("ops/management/commands/openapi.py", "openapi.generate_schema"),
    ("ops/schema.py", "openapi.generate_schema"),
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


def text_of(paths):
    return "\n".join(path.read_text() for path in paths)


# ops/ on its own


def test_ops_imports_nothing_from_the_rest_of_the_service(package):
    slug = package.name
    leaving = [
        (path, name)
        for path, tree in python_files(package).items()
        if path.startswith("ops/")
        for node in imports(tree)
        for name in imported_names(package, path, node)
        if is_inside(name, slug) and not is_inside(name, f"{slug}.ops")
    ]
    assert leaving == []


def test_ops_refers_to_no_module_of_the_rest_by_a_string(package):
    """``f"{PACKAGE}.models"`` would; ``f"{PACKAGE}.ops.logs"`` refers to a module of ops."""
    leaving = [
        (path, ast.unparse(node))
        for path, tree in python_files(package / "ops").items()
        for node in ast.walk(tree)
        if isinstance(node, ast.JoinedStr)
        for text in [ast.unparse(node)]
        if re.search(r"\{PACKAGE\}\.(?!ops\.)", text)
    ]
    assert leaving == []


def test_tests_of_ops_import_nothing_from_the_rest_of_the_service(default_project):
    slug = default_project.name
    folder = default_project / "tests" / "ops"
    leaving = [
        (path, name)
        for path, tree in python_files(folder).items()
        for node in imports(tree)
        for name in imported_names(folder, path, node)
        if is_inside(name, slug) and not is_inside(name, f"{slug}.ops")
    ]
    assert python_files(folder)
    assert leaving == []


def find_words(folder, *words):
    """Return path, number and text of the lines in which a word starts with one of these."""
    pattern = rf"(?<![a-z])({'|'.join(words)})"
    return [
        (path.relative_to(folder).as_posix(), number, line.strip())
        for path in sorted(folder.rglob("*"))
        if path.is_file()
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if re.search(pattern, line, re.IGNORECASE)
    ]


def test_ops_names_nothing_of_the_example(default_project):
    slug = default_project.name
    assert find_words(default_project / slug / "ops", slug, *DOMAIN_WORDS) == []


def test_tests_of_ops_name_no_model_of_the_example(default_project):
    assert find_words(default_project / "tests" / "ops", "submission", "moderator") == []


def ops_files(project):
    folder = project / project.name / "ops"
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_ops_is_the_same_in_every_service(default_project, bake):
    expected = ops_files(default_project)
    assert len(expected) > 20
    assert ops_files(bake(**OTHER_ANSWERS)) == expected
    lts = ops_files(bake(django_version="5.2", project_slug="lts"))
    changed = {path for path in expected.keys() | lts.keys() if expected.get(path) != lts.get(path)}
    assert changed <= {"csp.py"}


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


def test_functions_import_only_what_is_not_always_available(package):
    found = {
        (path, name.removeprefix(f"{package.name}.ops."))
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
    assert len((package / "settings.py").read_text().splitlines()) < 200


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
    ops = [path for path in files if "ops" in path.relative_to(TEMPLATE).parts[1:-1]]
    in_package = [path for path in ops if not path.is_relative_to(TEMPLATE / "tests")]
    assert in_package
    assert [path.name for path in in_package if "{{" in path.read_text()] == []


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
