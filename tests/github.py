"""A repository that refuses what GitHub refuses, its runner for a workflow, and a ``gh``."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import yaml

from tests.conftest import GIT_IDENTITY, clean_environment

#: GitHub's token may not push changes to workflow files; a token of the team may.
HOOK = """\
#!/bin/sh
while read old new ref; do
  test -e "$GIT_DIR/../token-of-the-team" && continue
  if test -n "$(git diff --name-only main "$new" -- .github/workflows 2>/dev/null)"; then
    test "$ref" = refs/heads/main && continue
    echo "refusing to allow a GitHub App to create or update workflow without workflows permission"
    exit 1
  fi
done
"""

#: Stores pull requests in a file, and appends each command to another.
GH = """\
#!{python}
import json, pathlib, subprocess, sys
folder = pathlib.Path({folder!r})
arguments = sys.argv[1:]
with (folder / "gh.log").open("a") as log:
    log.write(" ".join(arguments[:3]) + "\\n")
state = folder / "pulls.json"
pulls = json.loads(state.read_text()) if state.exists() else []
option = lambda name: arguments[arguments.index(name) + 1] if name in arguments else None
body = pathlib.Path(option("--body-file")).read_text() if option("--body-file") else ""
if len(body) > 65536:
    sys.exit("GraphQL: Body is too long (maximum is 65536 characters)")
if arguments[1] == "create":
    branch = ["git", "branch", "--show-current"]
    head = option("--head") or subprocess.check_output(branch, text=True).strip()
    if any(pull["head"] == head and pull["open"] for pull in pulls):
        sys.exit(f"a pull request for branch {{head}} already exists")
match arguments[1]:
    case "list":
        found = [pull for pull in pulls if pull["head"] == option("--head") and pull["open"]]
        print(json.dumps(found))
    case "create":
        if (folder / "forbidden").exists():
            sys.exit("pull request create failed: GraphQL: GitHub Actions is not permitted to "
                     "create or approve pull requests (createPullRequest)")
        pulls.append(dict(number=len(pulls) + 1, head=head, open=True, comments=[]))
    case "comment":
        pulls[int(arguments[2]) - 1]["comments"].append(dict(body=option("--body")))
if arguments[1] in ("create", "edit"):
    named = [pull for pull in pulls if arguments[2] in (str(pull["number"]), pull["head"])]
    pull = pulls[-1] if arguments[1] == "create" else named[-1]
    pull |= dict(title=option("--title"), body=body)
state.write_text(json.dumps(pulls))
"""


class GitHub:
    """A bare repository, its pull requests, and a runner for its weekly workflow."""

    def __init__(self, folder, uv):
        self.folder = folder
        self.uv = uv
        self.origin = folder / "origin.git"
        self.secrets, self.variables = {}, {}
        folder.mkdir()
        self.git("init", "--quiet", "--bare", "--initial-branch=main", str(self.origin))
        hook = self.origin / "hooks" / "pre-receive"
        hook.write_text(HOOK)
        hook.chmod(0o755)
        (folder / "bin").mkdir()
        gh = folder / "bin" / "gh"
        gh.write_text(GH.format(python=sys.executable, folder=str(folder)))
        gh.chmod(0o755)

    def git(self, *arguments, folder=None):
        """Run git; return its output."""
        done = subprocess.run(
            ["git", *arguments],
            cwd=folder or self.folder,
            env=clean_environment(**GIT_IDENTITY),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert done.returncode == 0, done.stdout
        return done.stdout.strip()

    def give_token(self):
        """Add a token of the team, which may push workflow files."""
        self.secrets["UPGRADE_TOKEN"] = "secret"
        (self.folder / "token-of-the-team").touch()

    def pulls(self):
        """Return the pull requests."""
        state = self.folder / "pulls.json"
        return json.loads(state.read_text()) if state.exists() else []

    def close(self, branch):
        """Close the pull request of a branch."""
        pulls = self.pulls()
        for pull in pulls:
            pull["open"] &= pull["head"] != branch
        (self.folder / "pulls.json").write_text(json.dumps(pulls))

    def merge(self, branch):
        """Merge a branch into main, and delete it."""
        work = self.folder / "merge"
        self.git("clone", "--quiet", str(self.origin), str(work))
        self.git("merge", "--quiet", "--no-ff", "--no-edit", f"origin/{branch}", folder=work)
        self.git("push", "--quiet", "origin", "main", f":{branch}", folder=work)
        shutil.rmtree(work)
        self.close(branch)

    def run_workflow(self, name="upgrade.yml", job=None, **variables):
        """Run the steps of a workflow of main, job after job; return status and log.

        ``job`` is one job that runs again, with what the jobs before it have made.
        """
        workflow = yaml.safe_load(
            self.git("show", f"main:.github/workflows/{name}", folder=self.origin)
        )
        artifacts = self.folder / "artifacts"
        outputs, log, only = {}, "", job
        if only is None:
            shutil.rmtree(artifacts, ignore_errors=True)
        for job_name, job in workflow["jobs"].items():
            is_skipped = "needs" in job and not outputs.get(job["needs"], {}).get("found")
            if job_name != only if only else is_skipped:
                continue
            runner = self.folder / f"runner-{job_name}"
            shutil.rmtree(runner, ignore_errors=True)
            (runner / "temp").mkdir(parents=True)
            (runner / "output").touch()
            work = runner / "work"
            place = job.get("defaults", {"run": {}})["run"].get("working-directory", ".")
            for step in job["steps"]:
                found = read_output(runner)
                if "if" in step and not found.get(step["if"].rpartition(".")[2]):
                    continue
                action = step.get("uses", "run").split("@")[0]
                if action == "actions/checkout":
                    self.git("clone", "--quiet", str(self.origin), str(work))
                elif action == "actions/upload-artifact":
                    shutil.copytree(runner / "temp" / step["with"]["name"], artifacts)
                elif action == "actions/download-artifact":
                    shutil.copytree(artifacts, runner / "temp" / step["with"]["name"])
                elif action == "run":
                    values = {
                        key: self.evaluate(value) for key, value in step.get("env", {}).items()
                    }
                    done = subprocess.run(
                        ["bash", "-e", "-c", step["run"]],
                        cwd=work / place,
                        env=self.get_environment(runner)
                        | {"GITHUB_WORKFLOW": workflow["name"]}
                        | values
                        | variables,
                        stdout=subprocess.PIPE,
                        stderr=subprocess.STDOUT,
                        stdin=subprocess.DEVNULL,
                        text=True,
                    )
                    log += done.stdout
                    if done.returncode:
                        return done.returncode, log
            outputs[job_name] = read_output(runner)
        return 0, log

    def get_environment(self, runner):
        """Return the environment of a step. A runner has no git identity."""
        return clean_environment(
            CI="true",
            GIT_CONFIG_GLOBAL=os.devnull,
            GITHUB_OUTPUT=runner / "output",
            GITHUB_WORKSPACE=runner / "work",
            RUNNER_TEMP=runner / "temp",
            UV=self.uv,
            UV_PROJECT_ENVIRONMENT=self.folder / "environment",
            PATH=os.pathsep.join(
                [str(self.folder / "bin"), str(Path(self.uv).parent), os.environ["PATH"]]
            ),
        )

    def evaluate(self, text):
        """Return the value of a variable of a step, which names secrets and variables."""
        if text == "${{ github.token }}":
            return "token of GitHub"
        if text.startswith("${{ vars."):
            return self.variables.get(text.split()[1].removeprefix("vars."), "")
        match = re.fullmatch(
            r"\$\{\{ secrets\.(\w+)(?: (&&|\|\|) ('yes'|github\.token))? \}\}", text
        )
        assert match, text
        name, operator, value = match.groups()
        secret = self.secrets.get(name, "")
        if operator == "&&":
            return value.strip("'") if secret else ""
        return secret or ("token of GitHub" if operator else "")


def read_output(runner):
    """Return the outputs of a job."""
    return dict(line.split("=", 1) for line in (runner / "output").read_text().splitlines())
