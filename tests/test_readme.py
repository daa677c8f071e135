"""README: its commands run as they stand, here and in the generated project."""

import os
import re
import shutil
import signal
import subprocess
import urllib.request

import pytest

from tests.conftest import ROOT, Process, clean_environment
from tests.servers import reachable, wait_for

pytestmark = pytest.mark.slow

ADDRESS = "http://127.0.0.1:8000/"


def commands(readme):
    """Return the command lines of the README's shell blocks."""
    return re.findall(r"^```sh\n(.*)\n```$", readme.read_text(), re.M)


@pytest.fixture
def environment(tmp_path, uv):
    """A machine on which nothing is prepared but the download caches and a git identity."""
    cache = subprocess.run([uv, "cache", "dir"], capture_output=True, text=True, check=True)
    environment = clean_environment(
        HOME=tmp_path / "home",
        PIP_CACHE_DIR=tmp_path / "pip",
        UV_CACHE_DIR=cache.stdout.strip(),
        GIT_AUTHOR_NAME="A",
        GIT_AUTHOR_EMAIL="a@example.com",
        GIT_COMMITTER_NAME="A",
        GIT_COMMITTER_EMAIL="a@example.com",
    )
    del environment["UV"]
    path = environment["PATH"].split(os.pathsep)
    environment["PATH"] = os.pathsep.join(
        folder for folder in path if not shutil.which("uv", path=folder) and ".venv" not in folder
    )
    return environment


@pytest.fixture
def clone(tmp_path):
    """A clone of this repository as it stands in the working tree."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).exists():
            (tmp_path / "clone" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, tmp_path / "clone" / name)
    return tmp_path / "clone"


def prove(command, folder, environment, log):
    """Run the command, see all three processes at work, and stop them with one Ctrl-C."""
    if reachable(8000):
        pytest.fail("port 8000 is in use on this machine; free it to run the README's commands")
    process = Process(["bash", "-c", command], folder, environment, log)
    try:
        process.wait_for_text(f"Open {ADDRESS}", seconds=180)
        process.wait_for_text(" ready.")
        process.wait_for_text("beat: Starting...")
        wait_for(lambda: reachable(8000), 30, process.text)
        for path in ("", "admin/login/", "health/ready"):
            with urllib.request.urlopen(f"{ADDRESS}{path}", timeout=10) as response:
                assert response.status == 200
        os.killpg(process.popen.pid, signal.SIGINT)
        process.popen.wait(timeout=15)
        wait_for(lambda: not reachable(8000), 10, process.text)
        stopped = set(re.findall(r"(\w+)\.1 +stopped|\b(\w+)\.1 stopped", process.text()))
        assert {name for names in stopped for name in names if name} == {"web", "worker", "beat"}
        assert "Traceback" not in process.text()
    finally:
        process.kill_all()


def test_the_commands_of_both_readmes(clone, environment, tmp_path):
    start, _, test = commands(clone / "README.md")
    prove(start, clone, environment, tmp_path / "start.log")

    project = clone / "prayer_room_api"
    said = subprocess.run(
        [".venv/bin/python", "manage.py", "shell", "-v0", "-c", SCHEDULES],
        cwd=project,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert said.stdout.split() == [
        "deliveries-resume",
        "moderator-digest-hourly",
        "user-digest-daily",
        "user-digest-weekly",
    ]
    develop, own_test = commands(project / "README.md")
    prove(develop, project, environment, tmp_path / "develop.log")
    run(own_test, project, environment)

    # One test stands for all: this one runs within the whole.
    one = {"PYTEST_ADDOPTS": "-k test_default_slug_is_derived_from_the_project_name"}
    assert " passed" in run(test, clone, environment | one)


SCHEDULES = """
from django_celery_beat.models import PeriodicTask
print(*PeriodicTask.objects.order_by("name").values_list("name", flat=True))
"""


def run(command, folder, environment):
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def test_continuous_integration_runs_the_same_command():
    _, _, test = commands(ROOT / "README.md")
    script = (ROOT / ".ci" / "run").read_text()
    (pattern,) = re.findall(r"grep -E '(.*)' README.md", script)
    assert re.findall(pattern, (ROOT / "README.md").read_text(), re.M) == [test]
    assert "--require-services" in script
