"""README: its commands work as documented, here and in the generated project."""

import os
import re
import shutil
import signal
import subprocess
import urllib.request

import pytest

from tests.conftest import GIT_IDENTITY, ROOT, SCHEDULES, Process, clean_environment, get_tracked
from tests.servers import PATIENCE, reachable, wait_for

pytestmark = pytest.mark.slow

ADDRESS = "http://127.0.0.1:8000/"

LIST_SCHEDULES = """
from django_celery_beat.models import PeriodicTask
print(*PeriodicTask.objects.order_by("name").values_list("name", flat=True))
"""


def shell_commands(readme):
    """Return the command lines of the README's shell blocks."""
    return re.findall(r"^```sh\n(.*)\n```$", readme.read_text(), re.M)


@pytest.fixture
def environment(tmp_path, uv_cache):
    """The environment of a new machine without uv, but with its cache and a git identity."""
    environment = clean_environment(
        HOME=tmp_path / "home",
        PIP_CACHE_DIR=tmp_path / "pip",
        UV_CACHE_DIR=uv_cache,
        **GIT_IDENTITY,
    )
    del environment["UV"]
    path = environment["PATH"].split(os.pathsep)
    environment["PATH"] = os.pathsep.join(
        folder for folder in path if not shutil.which("uv", path=folder) and ".venv" not in folder
    )
    return environment


@pytest.fixture
def clone(tmp_path):
    """A copy of this repository's working tree, without ignored files."""
    for path in get_tracked():
        copy = tmp_path / "clone" / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, copy)
    return tmp_path / "clone"


def check_processes(command, folder, environment, log):
    """Run the command, check all processes, and stop them with one Ctrl-C."""
    if reachable(8000):
        pytest.fail("port 8000 is in use; the README's commands need it")
    process = Process(["bash", "-c", command], folder, environment, log)
    try:
        process.wait_for_text("Sign in:", seconds=180)
        process.wait_for_text(" ready.")
        process.wait_for_text("beat: Starting...")
        wait_for(lambda: reachable(8000), 30, process.text)
        for path in ("", "admin/login/", "health/ready"):
            with urllib.request.urlopen(f"{ADDRESS}{path}", timeout=10) as response:
                assert response.status == 200
        os.killpg(process.popen.pid, signal.SIGINT)
        process.popen.wait(timeout=15 * PATIENCE)
        wait_for(lambda: not reachable(8000), 10, process.text)
        stopped = set(re.findall(r"(\w+)\.1 +stopped|\b(\w+)\.1 stopped", process.text()))
        assert {name for names in stopped for name in names if name} == {"web", "worker", "beat"}
        assert "Traceback" not in process.text()
    finally:
        process.kill_all()


def test_commands_of_both_readmes_work(clone, environment, tmp_path):
    start, *_, test = shell_commands(clone / "README.md")
    check_processes(start, clone, environment, tmp_path / "start.log")

    project = clone.parent / "prayer_room_api"
    done = subprocess.run(
        [".venv/bin/python", "manage.py", "shell", "-v0", "-c", LIST_SCHEDULES],
        cwd=project,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == SCHEDULES
    develop, generated_test, *_ = shell_commands(project / "README.md")
    check_processes(develop, project, environment, tmp_path / "develop.log")
    run(generated_test, project, environment)

    # Run only two tests, because this test is itself part of the test run.
    names = "test_no_file_has_a_conditional_name or test_default_slug_is_derived"
    output = run(test, clone, environment | {"PYTEST_ADDOPTS": f"-n0 -k '{names}'"})
    assert output.count(" passed") == 2


def run(command, folder, environment):
    """Run a shell command. Return its output, or fail the test."""
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


def test_ci_script_runs_the_test_command_of_the_readme():
    *_, test = shell_commands(ROOT / "README.md")
    script = (ROOT / ".ci" / "run").read_text()
    (pattern,) = re.findall(r"grep -E '(.*)' README.md", script)
    assert re.findall(pattern, (ROOT / "README.md").read_text(), re.M) == [test]
    assert "--require-services" in script
