"""The example: the branch has the files of a new default service."""

import os
import shutil
import subprocess
import sys

import yaml

from tests.conftest import GIT_IDENTITY, ROOT
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


def run_step(job, folder, **variables):
    """Run the script of a job in a clone, as GitHub's shell does."""
    (script,) = [
        step for step in job["steps"] if "docs/example" in str(step) or "push" in str(step)
    ]
    environment = os.environ | GIT_IDENTITY | {"RUNNER_TEMP": folder.parent} | variables
    command = ["bash", "-e", "-c", script["run"]]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_workflow_pushes_to_the_branch_of_the_readme(tmp_path):
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "example.yml").read_text())
    jobs = workflow["jobs"]
    # The job that runs code of others cannot write.
    assert [*jobs] == ["service", "push"] and "permissions" not in jobs["service"]
    assert not any(
        "setup-python" in str(step) or "uv" in str(step) for step in jobs["push"]["steps"]
    )
    assert "The branch `example` contains" in (ROOT / "README.md").read_text()

    def git(*arguments, folder=tmp_path):
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, check=True)
        return done.stdout.decode().strip()

    git("clone", "--quiet", "--bare", "--no-local", "--depth", "1", str(ROOT), "origin.git")
    for program, text in {
        "uv": f'shift; exec {sys.executable} "$@"',
        "gh": 'test "$*" = "auth setup-git"',
    }.items():
        (tmp_path / program).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / program).chmod(0o755)
    variables = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    (tmp_path / "1").mkdir()
    git("clone", "--quiet", str(tmp_path / "origin.git"), "1/work")
    run_step(jobs["service"], tmp_path / "1" / "work", **variables)
    commits = []
    for number in ("1", "2"):
        folder = tmp_path / number
        if number == "2":
            folder.mkdir()
            git("clone", "--quiet", str(tmp_path / "origin.git"), "2/work")
            (tmp_path / "1" / "example.tar").rename(folder / "example.tar")
        else:
            shutil.rmtree(folder / "example")  # It was on another machine.
        run_step(jobs["push"], folder / "work", **variables)
        commits.append(git("rev-parse", "example", folder=tmp_path / "origin.git"))
    # The second time nothing has changed.
    assert commits[0] == commits[1]
    listed = git("ls-tree", "-r", "example", folder=tmp_path / "origin.git")
    assert "100755" in next(line for line in listed.splitlines() if line.endswith("manage.py"))
    assert ".gitignore" in listed and ".github/workflows" not in listed
