"""Push an upgrade to a branch, and open or update its pull request.

    python3 vendor/prodserver-ops/propose_upgrade.py FOLDER

The weekly workflow runs this in a job of its own, whose token can write and which runs no code of
the template. FOLDER contains the report and the commit that ``manage.py upgrade --bundle FOLDER``
has written.

A branch with commits of others is left alone, and its pull request says so. Only a token of the
team may push workflow files; ``CAN_PUSH_WORKFLOWS`` says whether there is one. Without it they are
left out, and the pull request lists them. Needs git, and ``gh`` with ``GH_TOKEN``.
"""

import base64
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

BRANCH = "upgrade-template"

WORKFLOWS = ".github/workflows"

EMAIL = "41898282+github-actions[bot]@users.noreply.github.com"

#: The author of the commits of this script.
IDENTITY = {
    f"GIT_{role}_{part}": value
    for role in ("AUTHOR", "COMMITTER")
    for part, value in (("NAME", "github-actions[bot]"), ("EMAIL", EMAIL))
}

#: The length of a description, in characters; GitHub refuses more than 65,536.
LONGEST = 60_000

LEFT_OUT = """\
## Workflow files

GitHub lets only a token of your own change workflow files. The changes to these files are not in this
branch:

{files}

This command adds them:

```sh
git fetch && git switch {branch} && uv run manage.py upgrade --workflows --no-tests && git commit -m "Workflows of the template" && git push
```

With the secret `UPGRADE_TOKEN` the next upgrade contains them; see `docs/upgrades.md`.
"""

OTHERS = """\
{title}: this branch has commits of others, so the weekly workflow does not change it: {commits}.
Merge this pull request, or close it; the next run of the workflow opens one for what is newer then.
"""

FORBIDDEN = (
    "GitHub Actions may not open pull requests in this repository. Allow it once: Settings > Actions > "
    'General > "Allow GitHub Actions to create and approve pull requests". The branch {branch} is '
    "pushed. See docs/upgrades.md"
)

NOT_PUSHED = (
    "the branch {branch} was not pushed: {reason}. The token needs write access to contents and pull "
    "requests, and the branch must not be protected. See docs/upgrades.md"
)


class Refused(Exception):
    """GitHub has refused something; the message says what to set."""


def execute(
    *command: str, env: Mapping[str, str] | None = None, text: str | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a command with more environment variables and an input."""
    return subprocess.run(
        command,
        env=os.environ | dict(env or {}),
        input=text or "",
        capture_output=True,
        text=True,
    )


def run(*command: str, env: Mapping[str, str] | None = None, text: str | None = None) -> str:
    """Run a command; return its output, or raise Refused with its error."""
    done = execute(*command, env=env, text=text)
    if done.returncode:
        raise Refused(f"{' '.join(command[:3])}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout.strip()


def get_credentials() -> dict[str, str]:
    """Return variables that let git use ``GH_TOKEN`` on GitHub; no file of the checkout has it."""
    token, server = os.environ.get("GH_TOKEN"), os.environ.get("GITHUB_SERVER_URL")
    if not token or not server:
        return {}
    login = base64.b64encode(f"x-access-token:{token}".encode()).decode()
    return {
        "GIT_CONFIG_COUNT": "1",
        "GIT_CONFIG_KEY_0": f"http.{server}/.extraheader",
        "GIT_CONFIG_VALUE_0": f"Authorization: Basic {login}",
    }


def make_commit(upgrade: str, title: str, *, with_workflows: bool) -> tuple[str, list[str]]:
    """Return a commit with the files of an upgrade, and the workflow files that it leaves out."""
    base = f"{upgrade}^"
    changed = run("git", "diff", "--name-only", base, upgrade, "--", f":/{WORKFLOWS}")
    left_out = [] if with_workflows else changed.splitlines()
    with tempfile.TemporaryDirectory() as folder:
        index = {"GIT_INDEX_FILE": str(Path(folder, "index"))}
        run("git", "read-tree", upgrade, env=index)
        if left_out:
            run("git", "rm", "-rfq", "--cached", "--ignore-unmatch", f":/{WORKFLOWS}", env=index)
            before = run("git", "ls-tree", "-r", "--full-tree", base, WORKFLOWS)
            run("git", "update-index", "--index-info", env=index, text=before + "\n")
        tree = run("git", "write-tree", env=index)
    parent = run("git", "rev-parse", base)
    return run("git", "commit-tree", "-p", parent, "-m", title, tree, env=IDENTITY), left_out


def get_contents(commit: str) -> str:
    """Return the tree and the parent of a commit, which are equal if nothing is new."""
    return run("git", "rev-parse", commit + "^{tree}", f"{commit}^")


def find_commits_of_others(tip: str) -> list[str]:
    """Return the commits of a branch that this script has not made, with their authors."""
    log = run("git", "log", "--format=%ae%x09%ce%x09%h by %an", f"HEAD..{tip}")
    lines = [line.split("\t") for line in log.splitlines()]
    return [shown for author, committer, shown in lines if {author, committer} != {EMAIL}]


def find_pull_request(branch: str) -> dict[str, Any] | None:
    """Return number and comments of a branch's open pull request."""
    command = ["gh", "pr", "list", "--head", branch, "--state", "open"]
    found: list[dict[str, Any]] = json.loads(run(*command, "--json", "number,comments") or "[]")
    return found[0] if found else None


def choose_branch(title: str) -> tuple[str, str] | None:
    """Return a branch that may be overwritten and its commit, or None if others work on one."""
    number = 1
    while True:
        branch = BRANCH if number == 1 else f"{BRANCH}-{number}"
        tip = run("git", "ls-remote", "origin", f"refs/heads/{branch}").partition("\t")[0]
        if not tip:
            return branch, ""
        run("git", "fetch", "--quiet", "origin", tip)
        others = find_commits_of_others(tip)
        if not others:
            return branch, tip
        if request := find_pull_request(branch):
            text = OTHERS.format(title=title, commits=", ".join(others))
            if not any(comment["body"].strip() == text.strip() for comment in request["comments"]):
                run("gh", "pr", "comment", str(request["number"]), "--body", text)
            print(f"::notice::{text}".replace("\n", " "))
            return None
        # Its pull request is merged or closed, but the branch is not deleted.
        number += 1


def propose(folder: Path) -> None:
    """Push the upgrade in a folder and describe it in a pull request, or raise Refused."""
    report = (folder / "report.md").read_text()
    title = report.splitlines()[0].removeprefix("# ")
    run("git", "fetch", "--quiet", str(folder / "upgrade.bundle"), BRANCH)
    upgrade = run("git", "rev-parse", "FETCH_HEAD")
    with_workflows = bool(os.environ.get("CAN_PUSH_WORKFLOWS"))
    commit, left_out = make_commit(upgrade, title, with_workflows=with_workflows)
    chosen = choose_branch(title)
    if chosen is None:
        return
    branch, tip = chosen
    if not tip or get_contents(tip) != get_contents(commit):
        lease = f"--force-with-lease=refs/heads/{branch}:{tip}"
        done = execute("git", "push", lease, "origin", f"{commit}:refs/heads/{branch}")
        if done.returncode:
            reason = " ".join(done.stderr.split())
            raise Refused(NOT_PUSHED.format(branch=branch, reason=reason))
    body = report.partition("\n")[2].strip()[:LONGEST]
    if left_out:
        files = "\n".join(f"- `{name}`" for name in left_out)
        body = f"{LEFT_OUT.format(files=files, branch=branch)}\n{body}"
        print(f"::notice::without the secret UPGRADE_TOKEN left out: {', '.join(left_out)}")
    (folder / "body.md").write_text(body)
    options = ["--title", title, "--body-file", str(folder / "body.md")]
    if request := find_pull_request(branch):
        run("gh", "pr", "edit", str(request["number"]), *options)
        return
    try:
        print(run("gh", "pr", "create", "--head", branch, *options))
    except Refused as error:
        if "not permitted to create" in str(error):
            raise Refused(FORBIDDEN.format(branch=branch)) from None
        raise


if __name__ == "__main__":
    os.environ.update(get_credentials())
    try:
        propose(Path(sys.argv[1]))
    except Refused as error:
        sys.exit(f"::error::{error}".replace("\n", " "))
