"""zizmor finds nothing in the workflows that is not accepted here."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

#: Findings of medium or high severity that are accepted: workflow, rule, and the reason.
ACCEPTED = {
    ("example.yml", "artipacked"): "It pushes the branch, and uploads nothing.",
    ("upgrade.yml", "artipacked"): "This job pushes the branch, and runs no code of the template.",
}


def find(folder):
    """Return the workflow and rule of each finding."""
    zizmor = Path(sys.executable).with_name("zizmor")
    command = [zizmor, "--offline", "--no-progress", "--no-exit-codes", "--format=json"]
    done = subprocess.run(
        [*command, "--min-severity=medium", folder / ".github"],
        capture_output=True,
        text=True,
        check=True,
    )
    return {
        (Path(location["symbolic"]["key"]["Local"]["verbatim_path"]).name, finding["ident"])
        for finding in json.loads(done.stdout)
        for location in finding["locations"]
    }


def test_this_repository():
    assert find(ROOT) <= ACCEPTED.keys()


@pytest.mark.parametrize(
    "answers", [{}, {"deploy": "dockerfile"}, {"deploy": "systemd", "compose": True}], ids=str
)
def test_generated_services(bake, answers):
    assert find(bake(**answers)) <= ACCEPTED.keys()
