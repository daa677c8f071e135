"""Set-up: a generated service is ready to run, or says in one line what is not."""

import contextlib
import os
import shutil
import sqlite3
import subprocess

import pytest

from tests.conftest import clean_environment

pytestmark = pytest.mark.slow

IDENTITY = {
    "GIT_AUTHOR_NAME": "A",
    "GIT_AUTHOR_EMAIL": "a@example.com",
    "GIT_COMMITTER_NAME": "A",
    "GIT_COMMITTER_EMAIL": "a@example.com",
    "GIT_CONFIG_GLOBAL": os.devnull,
}
COMMIT = "git add . && git commit -m 'Start from cookiecutter-prodserver'"


@pytest.fixture(scope="session")
def uv_cache(uv):
    """Where uv keeps its packages, for runs that have a home of their own."""
    found = subprocess.run([uv, "cache", "dir"], capture_output=True, text=True, check=True)
    return found.stdout.strip()


@pytest.fixture
def generate(run_cookiecutter, uv, uv_cache):
    """Generate the default service with set-up on; return its folder and the lines printed."""

    def generate(**environment):
        tools = {"UV": uv, "UV_CACHE_DIR": uv_cache}
        folder, done = run_cookiecutter("--no-input", environment=IDENTITY | tools | environment)
        assert done.returncode == 0, done.stdout
        return folder / "prayer_room_api", done.stdout.splitlines()

    return generate


@pytest.fixture
def path_without(tmp_path):
    """Make a PATH of the tools that set-up uses, without the one named."""

    def make(*missing):
        tools = tmp_path / "tools"
        tools.mkdir()
        for tool in {"git", "sh"} - set(missing):
            (tools / tool).symlink_to(shutil.which(tool))
        return str(tools)

    return make


def git(project, *arguments):
    done = subprocess.run(
        ["git", *arguments],
        cwd=project,
        env=clean_environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout


def test_leaves_a_service_that_is_ready(generate):
    project, lines = generate()
    assert [line.replace(".", "") for line in lines[:3]] == [
        "Install and migrate: done",
        "First commit: done",
        "",
    ]
    assert lines[3] == "  cd prayer_room_api"
    assert lines[4].endswith("uv run manage.py createsuperuser")
    assert lines[5].endswith("uv run honcho start -f Procfile.dev -p 8000")
    assert len(lines) == 6

    assert (project / ".venv" / "bin" / "honcho").exists()
    with contextlib.closing(sqlite3.connect(project / "var" / "db.sqlite3")) as database:
        rows = database.execute("SELECT name FROM django_celery_beat_periodictask").fetchall()
    assert sorted(name for (name,) in rows) == [
        "deliveries-resume",
        "moderator-digest-hourly",
        "user-digest-daily",
        "user-digest-weekly",
    ]

    assert git(project, "status", "--porcelain") == ""
    assert git(project, "log", "--format=%s %D") == (
        "Start from cookiecutter-prodserver HEAD -> main\n"
    )
    committed = git(project, "ls-files").split()
    assert "uv.lock" in committed
    assert not [path for path in committed if path.startswith((".venv", "var"))]


def test_works_on_the_new_folder_alone(generate):
    """A database that the shell is set up for is not migrated."""
    project, lines = generate(
        DATABASE_URL="postgres://nobody@127.0.0.1:1/nothing", DJANGO_MODE="prod"
    )
    assert lines[0].endswith("done")
    assert (project / "var" / "db.sqlite3").exists()


def test_without_uv(generate, path_without):
    _, lines = generate(UV="", PATH=path_without("uv"))
    assert lines[0] == (
        "Install and migrate: not done: uv was not found. To do it: "
        "python3 -m pip install uv && uv sync && uv run manage.py migrate"
    )
    assert lines[1].endswith("done")


def test_without_network(generate, tmp_path):
    _, lines = generate(UV_OFFLINE="1", UV_CACHE_DIR=tmp_path / "empty")
    assert " not done: " in lines[0]
    assert lines[0].endswith("uv run manage.py migrate")
    assert lines[1].endswith("done")
    assert len(lines) == 6


def test_with_a_uv_that_does_not_start(generate, path_without):
    _, lines = generate(UV="no/such/uv", PATH=path_without("uv"))
    assert lines[0] == (
        "Install and migrate: not done: [Errno 2] No such file or directory: 'no/such/uv'. "
        "To do it: no/such/uv sync && no/such/uv run manage.py migrate"
    )


def test_without_git(generate, path_without):
    _, lines = generate(PATH=path_without("git"))
    assert lines[-5] == (
        "First commit: not done: git was not found. To do it: install git, then "
        f"git init -b main && {COMMIT}"
    )


def test_without_a_git_identity(generate):
    project, lines = generate(
        GIT_AUTHOR_EMAIL="", GIT_AUTHOR_NAME="", GIT_COMMITTER_EMAIL="", GIT_COMMITTER_NAME=""
    )
    assert lines[1].startswith("First commit: not done: fatal: ")
    assert lines[1].endswith(
        "To do it: git config user.name YOU && git config user.email YOU@EXAMPLE.COM && "
        f"git init -b main && {COMMIT}"
    )
    assert git(project, "status", "--porcelain").startswith("A ")


def test_switched_off_does_none_of_it(run_cookiecutter):
    folder, done = run_cookiecutter("--no-input", "setup=no")
    project = folder / "prayer_room_api"
    assert done.returncode == 0
    blank, change, migrate, start = done.stdout.splitlines()
    assert (blank, change) == ("", "  cd prayer_room_api")
    assert migrate.endswith("uv run manage.py migrate")
    assert start.endswith("uv run honcho start -f Procfile.dev -p 8000")
    assert not any((project / name).exists() for name in (".git", ".venv", "uv.lock", "var"))
