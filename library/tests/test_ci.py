"""The command ``ci``, with the steps of a folder of its own."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from django.core.management import CommandError, call_command

STEPS = """
[tool.prodserver-ops.ci]
"1" = "echo one >> order"
"2" = "echo two >> order; exit 3"
"3" = "echo three >> order"
"""


@pytest.fixture
def folder(settings, tmp_path):
    """The folder of the service, with three steps of which the second fails."""
    settings.BASE_DIR = tmp_path
    (tmp_path / "pyproject.toml").write_text(STEPS)
    return tmp_path


def read_order(folder):
    path = folder / "order"
    return path.read_text().split() if path.exists() else []


def test_all_steps_run_in_their_order_and_a_failed_one_decides_the_status(folder, capfd):
    with pytest.raises(SystemExit) as raised:
        call_command("ci")
    assert raised.value.code == 1
    assert read_order(folder) == ["one", "two", "three"]
    lines = capfd.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines[-4:-1]] == [
        ["1", "passed"],
        ["2", "failed"],
        ["3", "passed"],
    ]
    assert "exit status 3" in lines[-3]
    assert lines[-1].endswith(" ci 2")


def test_named_steps_alone_pass(folder, capfd):
    call_command("ci", "3", "1")
    assert read_order(folder) == ["one", "three"]
    assert capfd.readouterr().out.splitlines()[-1].startswith("Passed in ")


def test_fail_fast_leaves_the_rest_out(folder, capfd):
    with pytest.raises(SystemExit):
        call_command("ci", fail_fast=True)
    assert read_order(folder) == ["one", "two"]
    assert "3  not run" in capfd.readouterr().out


def test_list_runs_nothing(folder, capfd):
    call_command("ci", list=True)
    assert capfd.readouterr().out.splitlines()[0] == "1  echo one >> order"
    assert read_order(folder) == []


def test_an_unknown_step_is_refused(folder):
    with pytest.raises(CommandError, match=r"^unknown step '4'; the steps are 1, 2, 3$"):
        call_command("ci", "1", "4")
    assert read_order(folder) == []


@pytest.mark.parametrize(
    "text", ["", "[tool.prodserver-ops.ci]\n", "[tool.prodserver-ops.ci]\na = 1\n", "tool = 1\n"]
)
def test_missing_steps_are_refused_with_an_example(folder, text):
    (folder / "pyproject.toml").write_text(text)
    with pytest.raises(CommandError, match=r"write the steps in \[tool\.prodserver-ops\.ci\]"):
        call_command("ci")


def test_steps_find_the_uv_that_runs_the_command(folder, monkeypatch):
    (folder / "bin").mkdir()
    uv = folder / "bin" / "uv"
    uv.write_text("#!/bin/sh\necho found > found\n")
    uv.chmod(0o755)
    monkeypatch.setenv("UV", str(uv))
    monkeypatch.setenv("PATH", os.defpath)
    (folder / "pyproject.toml").write_text('[tool.prodserver-ops.ci]\na = "uv"\n')
    call_command("ci")
    assert (folder / "found").exists()


def test_interrupted_step_ends_the_command(folder):
    (folder / "pyproject.toml").write_text(
        '[tool.prodserver-ops.ci]\na = "touch started; sleep 60"\nb = "touch later"\n'
    )
    code = (
        "import sys; from pathlib import Path; from django.conf import settings;"
        f"settings.configure(BASE_DIR=Path({str(folder)!r}), INSTALLED_APPS=[]);"
        "from django.core.management import call_command;"
        "from prodserver_ops.management.commands.ci import Command; call_command(Command())"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    while not Path(folder, "started").exists():
        assert process.poll() is None
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "Interrupted in the step a." in output
    assert not (folder / "later").exists()
