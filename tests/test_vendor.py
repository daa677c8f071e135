"""The library in vendor/: however a service is generated it has it, and its tools leave it alone."""

import json
import re
import shlex
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from tests.conftest import GIT_IDENTITY, clean_environment
from tests.generate import LIBRARY, SOURCES, TEMPLATE
from tests.servers import free_port, wait_for
from tests.test_rooms import library_files


def git(folder, *arguments):
    environment = clean_environment(**GIT_IDENTITY)
    subprocess.run(["git", *arguments], cwd=folder, env=environment, check=True)


def commit_all(folder):
    git(folder, "init", "--quiet")
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "-m", "Template")


def generate_without_hooks(run, template, folder):
    return run("--no-input", "--accept-hooks", "no", environment={"TEMPLATE": str(template)})


def generate_without_setup(run, template, folder):
    return run("--no-input", "setup=no", environment={"TEMPLATE": str(template)})


def generate_by_replay(run, template, folder):
    environment = {"HOME": str(folder), "TEMPLATE": str(template)}
    run("--no-input", "setup=no", environment=environment)
    return run("--replay", environment=environment)


def generate_from_zip(run, template, folder):
    file = shutil.make_archive(folder / "template", "zip", template.parent, template.name)
    return run("--no-input", "setup=no", environment={"TEMPLATE": file})


def generate_from_clone(run, template, folder):
    commit_all(template)
    # The address of a repository has to end so.
    shutil.move(template, folder / "template.git")
    url = f"file://{folder}/template.git"
    return run("--no-input", "setup=no", environment={"TEMPLATE": url})


def generate_with_cruft(run, template, folder):
    commit_all(template)
    (folder / "out").mkdir()
    done = subprocess.run(
        ["cruft", "create", str(template), "-y", f"--extra-context={json.dumps({'setup': False})}"],
        cwd=folder / "out",
        env=clean_environment(HOME=folder),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    return folder / "out", done


@pytest.mark.slow
@pytest.mark.parametrize(
    "generate",
    [
        generate_without_setup,
        generate_without_hooks,
        generate_by_replay,
        generate_from_zip,
        generate_from_clone,
        generate_with_cruft,
    ],
)
def test_a_service_has_the_library_and_runs_with_it(
    run_cookiecutter, template_copy, tmp_path, make_service, generate
):
    library = library_files(template_copy / TEMPLATE.name)
    folder, done = generate(run_cookiecutter, template_copy, tmp_path)
    assert done.returncode == 0, done.stdout
    project = folder / "prayer_room_api"
    assert library_files(project) == library
    service = make_service(project)
    service.install()
    found = service.run("python -c 'import prodserver_ops; print(prodserver_ops.__file__)'")
    assert "site-packages" in found
    service.run("python manage.py check --fail-level WARNING")


def test_what_tools_left_in_a_clone_is_in_no_service(cookies, template_copy):
    """Tests of the library, Ruff and mypy leave folders in it."""
    library = template_copy / TEMPLATE.name / LIBRARY
    before = library_files(template_copy / TEMPLATE.name)
    for folder in (
        library / "src" / "prodserver_ops" / "core" / "__pycache__",
        *(library / name for name in ("__pycache__", ".mypy_cache", ".ruff_cache/0.1")),
    ):
        folder.mkdir(parents=True)
        (folder / "left").write_bytes(b"\xff")
    result = cookies.bake(extra_context={"setup": False}, template=str(template_copy))
    assert result.exception is None
    assert library_files(result.project_path) == before
    assert not [path for path in result.project_path.rglob("*") if path.name == "__pycache__"]


#: A module that no tool would pass: it has an unused import, a wrong type and no format.
BAD_MODULE = "import os\nnumber:int='text'\ndef test_bad( ):\n    assert False\n"


@pytest.fixture
def service(bake, make_service):
    """An installed service whose library has files that no tool would pass."""
    service = make_service(bake())
    service.install()
    for path in (LIBRARY / "test_bad.py", SOURCES / "test_bad.py", SOURCES / "core" / "bad.py"):
        (service.folder / path).write_text(BAD_MODULE)
    return service


@pytest.mark.slow
def test_tools_of_a_service_leave_the_library_alone(service):
    for command in ("ruff check", "ruff format --check", "mypy"):
        service.run(command)
    tests = service.run("pytest --collect-only -q")
    assert "tests/test_service.py::" in tests
    assert "vendor" not in tests
    # Editors and tools that search read it.
    assert "/vendor/" in (service.folder / ".ignore").read_text().splitlines()


@pytest.mark.slow
def test_reload_leaves_the_library_alone(service):
    service.run("python manage.py migrate")
    command = "python manage.py prodserver beat --reload"
    beat = service.spawn("beat", *shlex.split(command), PORT=str(free_port()))
    beat.wait_for_text("beat: Starting...")
    # A reload says which of the files it saw sorts first.
    for path in (SOURCES / "core" / "logs.py", Path("prayer_room_api", "models.py")):
        with (service.folder / path).open("a") as file:
            file.write("# changed\n")
        time.sleep(1)
    wait_for(lambda: beat.text().count("beat: Starting...") == 2, 30, beat.text)
    assert re.findall(r"(\S+) changed", beat.text()) == ["prayer_room_api/models.py"]
