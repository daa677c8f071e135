"""The documentation site: it builds without warnings, and names what exists."""

import re
import subprocess

import pytest

from tests.conftest import ROOT
from tests.generate import SOURCES, TEMPLATE

SITE = ROOT / "docs" / "site"


@pytest.mark.slow
def test_the_site_is_built_without_warnings(uv, tmp_path):
    command = "run --isolated --only-group docs sphinx-build -W --keep-going -q docs/site".split()
    done = subprocess.run(
        [uv, *command, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    commands = (tmp_path / "generated" / "commands.html").read_text()
    for path in (TEMPLATE / SOURCES / "management" / "commands").glob("[a-z]*.py"):
        assert f'id="{path.stem}"' in commands
    checks = (tmp_path / "generated" / "checks.html").read_text()
    assert {"schedules.E001", "processes.E005"} <= set(re.findall(r"\w+\.[EW]\d{3}", checks))


def test_each_guarantee_names_what_proves_it():
    table = (SITE / "guarantees.md").read_text().split("|---|---|\n")[1]
    for line in table.splitlines():
        names = re.findall(r"`([\w/]+\.py)`", line.split("|")[2])
        assert names, line
        assert all((ROOT / name).is_file() for name in names), line


def test_the_tutorial_has_the_first_command_of_the_readme():
    commands = [
        re.search(r"^```sh\n(.*)\n```$", path.read_text(), re.M)[1]
        for path in (ROOT / "README.md", SITE / "tutorial.md")
    ]
    assert commands[0] == commands[1]
