"""Setup: a generated service is ready to run, or one line says what is missing."""

import contextlib
import os
import pty
import re
import select
import shutil
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import GIT_IDENTITY, SCHEDULES, clean_environment
from tests.generate import SOURCES, get_template

pytestmark = pytest.mark.slow

PACKAGE = "{{cookiecutter.project_slug}}"

START = "honcho start -f Procfile.dev"

COMMIT = "git add . && git commit -m 'Start from cookiecutter-prodserver'"


#: A uv that finds the Pythons in FOUND, installs nothing, and runs no command.
FAKE_UV = """#!/bin/sh
for version; do :; done
case "$1 $2" in
    "python find") case " $FOUND " in *" $version "*) exit 0 ;; esac; exit 1 ;;
esac
echo "did $1"
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
def write_uv(path_without):
    """Return a function that makes a PATH with a script as uv, without the tools named."""

    def write(script, *missing):
        tools = path_without(*missing)
        fake = Path(tools, "uv")
        fake.write_text(script)
        fake.chmod(0o755)
        return tools

    return write


@pytest.fixture
def start_cookiecutter(tmp_path):
    """A function that starts cookiecutter in an empty folder and a process group of its own."""
    started = []

    def start(*arguments, environment):
        process = subprocess.Popen(
            [sys.executable, "-m", "cookiecutter", str(get_template()), *arguments],
            cwd=tmp_path,
            env=clean_environment(HOME=tmp_path, PWD=tmp_path) | environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        started.append(process)
        return tmp_path, process

    yield start
    for process in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()


@pytest.fixture
def generate_uninstalled(generate, write_uv):
    """As ``generate``, but nothing is installed or run, for what comes after it."""

    def generate_uninstalled(*arguments, missing=(), **environment):
        tools = write_uv(FAKE_UV, *missing)
        project, lines = generate(*arguments, PATH=tools, **environment)
        assert lines[1:4] == ["did sync", "Migrate: 0.0 s", "Start and stop: did run"], lines
        return project, lines[4:]

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


def test_setup_installs_migrates_proves_and_commits(generate, uv):
    """It does so whatever database the environment names."""
    project, lines = generate(
        DATABASE_URL="postgres://nobody@127.0.0.1:1/nothing", DJANGO_MODE="prod"
    )
    version = (project / ".python-version").read_text().strip()
    assert lines[0] == f"Install: packages for Python {version}"
    assert "Creating virtual environment at: .venv" in lines
    assert get_titles(lines[-7:]) == [
        "Migrate:",
        "Start and stop: web, worker, beat: ready, and a schedule was run, after ; "
        "stopped after  more",
        "First commit: done",
        "",
        "cd prayer_room_api",
        *get_titles(f"{uv} run {command}" for command in ("manage.py createsuperuser", START)),
    ]

    assert (project / ".venv" / "bin" / "honcho").exists()
    with contextlib.closing(sqlite3.connect(project / "var" / "db.sqlite3")) as database:
        rows = database.execute("SELECT name FROM django_celery_beat_periodictask").fetchall()
    assert sorted(name for (name,) in rows) == SCHEDULES

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


def assert_nothing_generated(project, lines, reason):
    assert any(
        line.startswith(f"Install failed: {reason}. No service was generated. Run the same command")
        for line in lines
    ), lines
    assert not project.exists()


def test_installation_fails_without_network(generate, tmp_path):
    project, lines = generate(status=1, UV_OFFLINE="1", UV_CACHE_DIR=tmp_path / "empty")
    assert any("network" in line for line in lines), "uv's reason is not shown"
    assert_nothing_generated(project, lines, "see above")


def test_installation_fails_without_python(generate, write_uv):
    project, lines = generate(
        status=1, PATH=write_uv(FAKE_UV.replace('"did $1"', "no Python; exit 2")), FOUND="3.11"
    )
    assert lines[0] == (
        "Install: packages for Python 3.13, which uv downloads: 3.12, 3.13 or 3.14 is not installed"
    )
    assert_nothing_generated(
        project,
        lines,
        "see above. Connect to the network, so that uv can download Python 3.13, or install "
        "Python 3.12, 3.13 or 3.14",
    )


def test_installation_fails_if_uv_does_not_start(generate, path_without):
    project, lines = generate(status=1, UV="no/such/uv", PATH=path_without("uv"))
    assert_nothing_generated(project, lines, "[Errno 2] No such file or directory: 'no/such/uv'")


def test_ctrl_c_ends_without_a_commit_and_with_the_commands_that_continue(
    start_cookiecutter, write_uv
):
    tools = write_uv(
        FAKE_UV.replace('echo "did $1"', f"echo syncing; exec {shutil.which('sleep')} 600")
    )
    folder, process = start_cookiecutter("--no-input", environment={"PATH": tools})
    lines = iter(process.stdout.readline, "")
    assert any(line == "syncing\n" for line in lines)
    os.killpg(process.pid, signal.SIGINT)
    output = process.stdout.read()
    assert process.wait() != 0
    assert (
        "Interrupted, without a commit. Continue with: cd prayer_room_api && uv sync && "
        "uv run manage.py migrate && uv run manage.py createsuperuser && "
        "uv run honcho start -f Procfile.dev\n"
    ) in output
    assert not (folder / "prayer_room_api" / ".git").exists()


def test_setup_offers_an_administrator_to_a_person(tmp_path, write_uv):
    tools = write_uv(FAKE_UV.replace('echo "did $1"', 'for last; do :; done; echo "did $last"'))
    environment = clean_environment(HOME=tmp_path, PWD=tmp_path) | {"PATH": tools}
    process, terminal = pty.fork()
    if process == 0:
        os.chdir(tmp_path)
        command = [sys.executable, "-m", "cookiecutter", str(get_template())]
        os.execve(sys.executable, command, environment)
    os.write(terminal, b"\n" * 40)  # More than there are questions.
    output = b""
    with contextlib.suppress(OSError):  # The terminal is closed.
        while select.select([terminal], [], [], 60)[0]:
            output += os.read(terminal, 4096)
    os.close(terminal)
    assert os.waitpid(process, 0)[1] == 0, output
    assert b"for development? [Y/n] did createsuperuser" in output
    assert b"uv run manage.py createsuperuser" not in output
    assert b"uv run honcho start" in output


def test_no_administrator_is_offered_without_questions(generate_uninstalled):
    _, lines = generate_uninstalled()
    assert "administrator" not in "".join(lines)


def test_missing_git_skips_the_commit_with_instructions(generate_uninstalled):
    _, lines = generate_uninstalled(missing=["git"])
    assert (
        f"First commit: skipped: git not found. Install git, then run: git init -b main && {COMMIT}"
    ) in lines


def test_missing_git_identity_fails_the_commit_with_instructions(generate_uninstalled):
    project, lines = generate_uninstalled(
        GIT_AUTHOR_EMAIL="", GIT_AUTHOR_NAME="", GIT_COMMITTER_EMAIL="", GIT_COMMITTER_NAME=""
    )
    assert lines[0].startswith("First commit: failed: fatal: ")
    assert lines[0].endswith(
        "Run: git config user.name YOU && git config user.email YOU@EXAMPLE.COM && "
        f"git init -b main && {COMMIT}"
    )
    assert git(project, "status", "--porcelain").startswith("A ")


def test_no_repository_is_made_in_another_one(generate, generate_uninstalled):
    folder, _ = generate("setup=no")
    git(folder.parent, "init", "--quiet")
    _, lines = generate_uninstalled("project_slug=second", "--output-dir", str(folder.parent))
    assert lines[0] == (
        f"First commit: skipped: this folder is in the repository {folder.parent}. Commit it there. "
        "For a repository of its own, generate the service outside, with "
        f"--output-dir {folder.parent.parent}"
    )
    assert not (folder.parent / "second" / ".git").exists()


def test_a_repository_is_made_in_a_folder_that_the_outer_one_ignores(
    generate, generate_uninstalled
):
    folder, _ = generate("setup=no")
    git(folder.parent, "init", "--quiet")
    (folder.parent / ".gitignore").write_text("/second/\n")
    _, lines = generate_uninstalled("project_slug=second", "--output-dir", str(folder.parent))
    assert lines[0] == "First commit: done"
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
    assert any(line.startswith(f"{step} failed: see above. No service was") for line in lines)
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
