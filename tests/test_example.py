"""The example: the branch has the files of a new default service."""

import subprocess
import sys

import yaml

from tests.conftest import ROOT
from tests.test_output import files


def write_example(folder):
    command = [sys.executable, "docs/example.py", str(folder)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_the_example_equals_a_new_service(default_project, tmp_path):
    done = write_example(tmp_path / "example")
    assert done.returncode == 0, done.stdout + done.stderr
    names = files(default_project)
    assert files(tmp_path / "example") == names
    for name in names:
        # The record contains the address of the template, and tests generate from a copy.
        if name != ".cruft.json":
            example = (tmp_path / "example" / name).read_bytes()
            assert example == (default_project / name).read_bytes(), name


def test_files_that_are_there_are_not_overwritten(tmp_path):
    (tmp_path / "mine").write_text("mine")
    done = write_example(tmp_path)
    assert (done.returncode, done.stderr) == (1, f"{tmp_path} is not empty\n")
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_the_workflow_pushes_to_the_branch_of_the_readme():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "example.yml").read_text())
    (job,) = workflow["jobs"].values()
    script = job["steps"][-1]["run"]
    assert "docs/example.py" in script
    assert script.splitlines()[-1] == 'git push origin "$commit:refs/heads/example"'
    assert "The branch `example` contains" in (ROOT / "README.md").read_text()
