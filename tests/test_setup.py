"""Setup: a generated service is ready to run, or one line says what is missing."""

import contextlib
import os
import re
import shutil
import sqlite3
import subprocess
from pathlib import Path

import pytest

from tests.conftest import GIT_IDENTITY, clean_environment
from tests.generate import SOURCES

pytestmark = pytest.mark.slow

PACKAGE = "{{cookiecutter.project_slug}}"

COMMIT = "git add . && git commit -m 'Start from cookiecutter-prodserver'"


#: A uv that finds the Pythons in FOUND, and installs nothing.
FAKE_UV = """#!/bin/sh
for version; do :; done
case "$1 $2" in
    "python find") case " $FOUND " in *" $version "*) exit 0 ;; esac ;;
esac
echo "error: installs nothing"
exit 1
"""


@pytest.fixture
def generate(run_cookiecutter, uv, uv_cache):
    """Generate the default service with setup; return its folder and the lines without dots."""

    def generate(*arguments, status=0, **environment):
        defaults = {"UV": uv, "UV_CACHE_DIR": uv_cache, "GIT_CONFIG_GLOBAL": os.devnull}
        environment = GIT_IDENTITY | defaults | environment
        folder, done = run_cookiecutter("--no-input", *arguments, environment=environment)
        assert done.returncode == status, done.stdout
        return folder / "prayer_room_api", re.sub(r":\.+ ", ": ", done.stdout).splitlines()

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


@pytest.fixture
def generate_uninstalled(generate, path_without):
    """As ``generate``, but the installation fails at once, for what comes after it."""

    def generate_uninstalled(*arguments, missing=(), **environment):
        tools = path_without(*missing)
        fake = Path(tools, "uv")
        fake.write_text(FAKE_UV)
        fake.chmod(0o755)
        project, lines = generate(*arguments, PATH=tools, **environment)
        assert lines[0] == "Install: failed: error: installs nothing"
        return project, lines

    return generate_uninstalled


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


def get_titles(lines):
    """Return the results of the steps, without seconds and figures."""
    return [re.sub(r"[\d.]+( s(econds)?\b)?", "", line).strip() for line in lines]


def test_setup_installs_migrates_proves_and_commits(generate):
    """It does so whatever database the environment names."""
    project, lines = generate(
        DATABASE_URL="postgres://nobody@127.0.0.1:1/nothing", DJANGO_MODE="prod"
    )
    assert get_titles(lines[:5]) == [
        "Install: done",
        "Migrate:",
        "Start and stop: web, worker, beat: ready, and a schedule was run, after ; "
        "stopped after  more",
        "First commit: done",
        "",
    ]
    assert lines[5] == "  cd prayer_room_api"
    assert lines[6].endswith("uv run manage.py createsuperuser")
    assert lines[7].endswith("uv run honcho start -f Procfile.dev")
    assert len(lines) == 8

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


NEXT_STEPS = ["uv sync", "uv run manage.py migrate", "uv run manage.py createsuperuser"]


def test_missing_uv_skips_the_installation_with_instructions(generate, path_without):
    _, lines = generate(UV="", PATH=path_without("uv"))
    assert lines[0] == "Install: skipped: uv not found. Run: python3 -m pip install uv"
    assert lines[1].endswith("done")
    assert [line.strip() for line in lines[4:7]] == NEXT_STEPS


def test_missing_network_fails_the_installation_with_instructions(generate, tmp_path):
    _, lines = generate(UV_OFFLINE="1", UV_CACHE_DIR=tmp_path / "empty")
    assert lines[0].startswith("Install: failed: ")
    assert lines[1].endswith("done")
    assert [line.strip().partition("uv ")[2] for line in lines[4:7]] == [
        step.partition("uv ")[2] for step in NEXT_STEPS
    ]


def test_uv_that_does_not_start_fails_the_installation(generate, path_without):
    _, lines = generate(UV="no/such/uv", PATH=path_without("uv"))
    assert lines[0] == "Install: failed: [Errno 2] No such file or directory: 'no/such/uv'"


def test_missing_git_skips_the_commit_with_instructions(generate_uninstalled):
    _, lines = generate_uninstalled(missing=["git"])
    assert (
        f"First commit: skipped: git not found. Install git, then run: git init -b main && {COMMIT}"
    ) in lines


def test_missing_git_identity_fails_the_commit_with_instructions(generate_uninstalled):
    project, lines = generate_uninstalled(
        GIT_AUTHOR_EMAIL="", GIT_AUTHOR_NAME="", GIT_COMMITTER_EMAIL="", GIT_COMMITTER_NAME=""
    )
    assert lines[1].startswith("First commit: failed: fatal: ")
    assert lines[1].endswith(
        "Run: git config user.name YOU && git config user.email YOU@EXAMPLE.COM && "
        f"git init -b main && {COMMIT}"
    )
    assert git(project, "status", "--porcelain").startswith("A ")


def test_no_repository_is_made_in_another_one(generate, generate_uninstalled):
    folder, _ = generate("setup=no")
    git(folder.parent, "init", "--quiet")
    _, lines = generate_uninstalled("project_slug=second", "--output-dir", str(folder.parent))
    assert lines[1] == (
        f"First commit: skipped: this folder is in the repository {folder.parent}. Commit it there."
    )
    assert not (folder.parent / "second" / ".git").exists()


def test_a_repository_is_made_in_a_folder_that_the_outer_one_ignores(
    generate, generate_uninstalled
):
    folder, _ = generate("setup=no")
    git(folder.parent, "init", "--quiet")
    (folder.parent / ".gitignore").write_text("/second/\n")
    _, lines = generate_uninstalled("project_slug=second", "--output-dir", str(folder.parent))
    assert lines[1] == "First commit: done"
    assert git(folder.parent / "second", "status", "--porcelain") == ""


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ("3.12 3.13 3.14", "3.14"),
        ("3.12 3.13", "3.13"),
        ("3.12", "3.12"),
        ("3.11", "3.13"),
    ],
)
def test_service_runs_on_the_newest_python_that_is_found(generate_uninstalled, found, expected):
    """Without one of them the service keeps what the template names, which uv then loads."""
    project, _ = generate_uninstalled("compose=yes", FOUND=found)
    assert (project / ".python-version").read_text() == f"{expected}\n"
    for name in ("Dockerfile", "compose.dev.yaml"):
        images = re.findall(r"FROM (python\S*)", (project / name).read_text())
        assert set(images) == {f"python:{expected}-slim"}, name


@pytest.mark.parametrize(
    ("file", "old", "new", "step", "shown"),
    [
        (
            f"{PACKAGE}/settings.py",
            "    # Language,",
            "    X = UNKNOWN\n    # Language,",
            "Migrate",
            "NameError",
        ),
        (
            SOURCES / "migrations" / "0002_seed_schedules.py",
            "interval=timedelta(hours=1)",
            'crontab="0 25 * * *"',
            "Migrate",
            "crontab",
        ),
        (
            f"{PACKAGE}/settings.py",
            '"beat": processes.beat(self),',
            '"beat": processes.beat(self, pidfile="/no/such/folder/beat.pid"),',
            "Start and stop",
            "beat: ended with status",
        ),
    ],
    ids=["NameError", "crontab", "beat ends"],
)
def test_service_that_fails_ends_with_status_1_and_the_reason(
    generate, template_copy, file, old, new, step, shown
):
    path = template_copy / PACKAGE / file
    text = path.read_text()
    assert text.count(old) >= 1
    path.write_text(text.replace(old, new))
    project, lines = generate(status=1, TEMPLATE=str(template_copy))
    assert any(line.startswith(f"{step}:") and line.endswith(" failed") for line in lines)
    assert shown in "\n".join(lines)
    assert not project.exists()


def test_disabled_setup_does_nothing_and_prints_the_next_steps(run_cookiecutter):
    folder, done = run_cookiecutter("--no-input", "setup=no")
    project = folder / "prayer_room_api"
    assert done.returncode == 0
    blank, change, *steps = done.stdout.splitlines()
    assert (blank, change) == ("", "  cd prayer_room_api")
    commands = [*NEXT_STEPS, "uv run honcho start -f Procfile.dev"]
    assert all(step.endswith(command) for step, command in zip(steps, commands, strict=True))
    assert not any((project / name).exists() for name in (".git", ".venv", "uv.lock", "var"))
