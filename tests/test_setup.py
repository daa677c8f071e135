"""Setup: a generated service is ready to run, or one line says what is missing."""

import contextlib
import os
import shutil
import sqlite3
import subprocess

import pytest

from tests.conftest import GIT_IDENTITY, clean_environment

pytestmark = pytest.mark.slow

COMMIT = "git add . && git commit -m 'Start from cookiecutter-prodserver'"


@pytest.fixture
def generate(run_cookiecutter, uv, uv_cache):
    """Generate the default service with setup; return its folder and the printed lines."""

    def generate(**environment):
        defaults = {"UV": uv, "UV_CACHE_DIR": uv_cache, "GIT_CONFIG_GLOBAL": os.devnull}
        environment = GIT_IDENTITY | defaults | environment
        folder, done = run_cookiecutter("--no-input", environment=environment)
        assert done.returncode == 0, done.stdout
        return folder / "prayer_room_api", done.stdout.splitlines()

    return generate


@pytest.fixture
def path_without(tmp_path):
    """Return a function that makes a PATH with the tools of setup, except those named."""

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


def test_setup_installs_migrates_and_commits(generate):
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
        "records-delete",
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


def test_setup_ignores_the_database_of_the_environment(generate):
    project, lines = generate(
        DATABASE_URL="postgres://nobody@127.0.0.1:1/nothing", DJANGO_MODE="prod"
    )
    assert lines[0].endswith("done")
    assert (project / "var" / "db.sqlite3").exists()


def test_missing_uv_skips_the_installation_with_instructions(generate, path_without):
    _, lines = generate(UV="", PATH=path_without("uv"))
    assert lines[0] == (
        "Install and migrate: skipped: uv not found. "
        "Run: python3 -m pip install uv && uv sync && uv run manage.py migrate"
    )
    assert lines[1].endswith("done")


def test_missing_network_fails_the_installation_with_instructions(generate, tmp_path):
    _, lines = generate(UV_OFFLINE="1", UV_CACHE_DIR=tmp_path / "empty")
    assert " failed: " in lines[0]
    assert lines[0].endswith("uv run manage.py migrate")
    assert lines[1].endswith("done")
    assert len(lines) == 6


def test_uv_that_does_not_start_fails_the_installation_with_instructions(generate, path_without):
    _, lines = generate(UV="no/such/uv", PATH=path_without("uv"))
    assert lines[0] == (
        "Install and migrate: failed: [Errno 2] No such file or directory: 'no/such/uv'. "
        "Run: no/such/uv sync && no/such/uv run manage.py migrate"
    )


def test_missing_git_skips_the_commit_with_instructions(generate, path_without):
    _, lines = generate(PATH=path_without("git"))
    assert lines[-5] == (
        f"First commit: skipped: git not found. Install git, then run: git init -b main && {COMMIT}"
    )


def test_missing_git_identity_fails_the_commit_with_instructions(generate):
    project, lines = generate(
        GIT_AUTHOR_EMAIL="", GIT_AUTHOR_NAME="", GIT_COMMITTER_EMAIL="", GIT_COMMITTER_NAME=""
    )
    assert lines[1].startswith("First commit: failed: fatal: ")
    assert lines[1].endswith(
        "Run: git config user.name YOU && git config user.email YOU@EXAMPLE.COM && "
        f"git init -b main && {COMMIT}"
    )
    assert git(project, "status", "--porcelain").startswith("A ")


def test_disabled_setup_does_nothing_and_prints_the_next_steps(run_cookiecutter):
    folder, done = run_cookiecutter("--no-input", "setup=no")
    project = folder / "prayer_room_api"
    assert done.returncode == 0
    blank, change, migrate, start = done.stdout.splitlines()
    assert (blank, change) == ("", "  cd prayer_room_api")
    assert migrate.endswith("uv run manage.py migrate")
    assert start.endswith("uv run honcho start -f Procfile.dev -p 8000")
    assert not any((project / name).exists() for name in (".git", ".venv", "uv.lock", "var"))
