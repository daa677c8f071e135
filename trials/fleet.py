"""Upgrade a fleet of aged services week by week, by their own weekly workflows.

    uv run trials/fleet.py [--count 20] [--seed 1]

Each service is generated at a random version with random answers, aged as a team would (a field, an
app, settings, other packages, a renamed package, a deleted file, a conflict, commits on the branch
of the pull request, a token of the team or none), and pushed to a repository that refuses what
GitHub refuses. Then each later version comes, and the workflow in the repository runs with its own
steps. The team merges a pull request; it resolves conflicts, and adds workflow files with the
command in its description. What else stops a service has to be in the pull request or in the log.

No commit of anybody may be lost, and a service that is at the newest version must pass its checks
and its tests. Prints a table, and exits with status 1 if one of the two is not so.
"""

import json
import os
import random
import re
import shutil
import sys
import tempfile
import time
from argparse import ArgumentParser
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.github import GitHub
from trials.time_travel import Failed, Template, run

BRANCH = "upgrade-template"

ANSWERS = {
    "example": ["submissions", "none"],
    "broker": ["rabbitmq", "redis", "postgresql"],
    "deploy": ["buildpack", "dockerfile", "systemd"],
    "django_version": ["6.0", "5.2"],
    "web_server": ["gunicorn", "uvicorn"],
    "queues": ["default", "high"],
    "compose": [False, True],
}

#: A test that replaces those of the service: the fleet would need hours for all of them.
TEST = '''"""The service starts."""

import pytest
from django.core.management import call_command


@pytest.mark.django_db
def test_checks_and_migrations():
    call_command("check")
    call_command("makemigrations", check=True, dry_run=True)
'''

CI = ".github/workflows/ci.yml"


class Service:
    """A service with its repository and its team."""

    def __init__(self, folder, template, chance, uv, start):
        self.chance, self.uv, self.start = chance, uv, start
        self.answers = {name: chance.choice(values) for name, values in ANSWERS.items()}
        self.folder = folder / "team"
        self.github = GitHub(folder / "github", uv)
        self.commits = []
        self.notes = []
        extra = json.dumps(self.answers | {"setup": False})
        options = ["--extra-context", extra, "--output-dir", str(folder), "-y"]
        run(["cruft", "create", str(template.folder), *options], folder, UV=uv, PWD=folder)
        (folder / "prayer_room_api").rename(self.folder)
        self.package = "prayer_room_api"
        shutil.rmtree(self.folder / "tests")
        (self.folder / "tests").mkdir()
        (self.folder / "tests" / "test_service.py").write_text(TEST)
        run([uv, "lock", "--quiet"], self.folder)
        run(["git", "init", "--quiet", "--initial-branch=main"], self.folder)
        run(["git", "remote", "add", "origin", str(self.github.origin)], self.folder)
        self.commit("First commit")
        changes = [self.rename_package, self.add_lines, self.conflict, self.delete, self.add_app]
        self.changes = [change for change in changes if chance.random() < 0.5]
        for change in self.changes:
            change()
            self.commit(change.__name__)
        self.has_token = chance.random() < 0.3
        if self.has_token:
            self.github.give_token()
        run(["git", "push", "--quiet", "origin", "main"], self.folder)

    def commit(self, message):
        """Commit all changes of the team, and remember the commit."""
        run(["git", "add", "--all"], self.folder)
        run(["git", "commit", "--quiet", "--allow-empty", "-m", message], self.folder)
        self.commits.append(run(["git", "rev-parse", "HEAD"], self.folder).strip())

    def rename_package(self):
        """Give the package another name."""
        run(["git", "mv", self.package, "rooms"], self.folder)
        pattern = ["git", "grep", "-lIw", self.package, "--", ".", ":!.cruft.json", ":!uv.lock"]
        for path in map(self.folder.joinpath, run(pattern, self.folder).splitlines()):
            path.write_text(re.sub(rf"\b{self.package}\b", "rooms", path.read_text()))
        self.package = "rooms"

    def add_lines(self):
        """Add a setting, a section of the README and a pinned action."""
        settings = self.folder / self.package / "settings.py"
        text = settings.read_text()
        settings.write_text(
            text.replace("    USE_TZ = True\n", '    USE_TZ = True\n    OUR = "x"\n')
        )
        with (self.folder / "README.md").open("a") as readme:
            readme.write("\n## Our rooms\n\nThey are in the attic.\n")

    def conflict(self):
        """Change a line that a later version changes too."""
        procfile = self.folder / "Procfile"
        text = procfile.read_text().replace("migrate --noinput", "migrate --noinput --traceback")
        procfile.write_text(text)

    def delete(self):
        """Delete files that the team does not need."""
        for name in ("SECURITY.md", ".pre-commit-config.yaml"):
            (self.folder / name).unlink()

    def add_app(self):
        """Add a module of the team's own."""
        (self.folder / self.package / "reports.py").write_text('"""Reports."""\n\nDAYS = 7\n')

    def run_week(self):
        """Run the workflow, and do what the team does with its pull request."""
        status, log = self.github.run_workflow()
        if status:
            lines = [line for line in log.splitlines() if line.strip()] or ["no output"]
            reason = next((line for line in lines if "refusing" in line), lines[-1])
            self.notes.append(f"log: {reason[:150]}")
            return
        for pull in self.github.pulls():
            if pull["open"]:
                self.handle(pull)

    def handle(self, pull):
        """Resolve conflicts in favour of the team, add workflow files, and merge."""
        work = self.folder.with_name("work")
        shutil.rmtree(work, ignore_errors=True)
        origin = str(self.github.origin)
        run(["git", "clone", "--quiet", "--branch", pull["head"], origin, str(work)], work.parent)
        variables = {"UV": self.uv, "UV_PROJECT_ENVIRONMENT": self.github.folder / "environment"}
        marked = run(["git", "grep", "-l", "^<<<<<<< "], work, ok=1).splitlines()
        pattern = r"^<<<<<<<.*?\n(.*?)^=======\n.*?^>>>>>>>.*?\n"
        for path in map(work.joinpath, marked):
            path.write_text(re.sub(pattern, r"\1", path.read_text(), flags=re.M | re.S))
        if marked:
            self.notes.append(f"conflicts: {', '.join(marked)}")
            run(["git", "commit", "--quiet", "--all", "-m", "Resolve"], work)
            self.commits.append(run(["git", "rev-parse", "HEAD"], work).strip())
            run(["git", "push", "--quiet"], work)
            # A run of the workflow in between leaves the team's commit alone.
            status, log = self.github.run_workflow()
            if status or "commits of others" not in log:
                raise Failed(f"the commit on the branch was not respected: {log[-500:]}")
        if "upgrade --workflows" in pull["body"]:
            command = ["manage.py", "upgrade", "--workflows", "--no-tests"]
            run([self.uv, "run", "--quiet", *command], work, ok=1, **variables)
            run(["git", "add", "--all"], work)
            run(["git", "commit", "--quiet", "-m", "Workflows"], work)
            self.commits.append(run(["git", "rev-parse", "HEAD"], work).strip())
            # A person may push workflow files.
            (self.github.folder / "token-of-the-team").touch()
            run(["git", "push", "--quiet"], work)
            if not self.has_token:
                (self.github.folder / "token-of-the-team").unlink()
        for title in ("Changes to missing files", "Files that the template deleted"):
            if f"## {title}" in pull["body"]:
                self.notes.append(title.lower())
        self.github.merge(pull["head"])

    def find_lost(self):
        """Return the commits of the team that no branch has."""
        kept = self.github.git("log", "--all", "--format=%H", folder=self.github.origin).split()
        return [commit for commit in self.commits if commit not in kept]

    def verify(self, newest):
        """Return whether main is at a version; raise Failed if it does not work there."""
        run(["git", "fetch", "--quiet", "origin"], self.folder)
        run(["git", "reset", "--quiet", "--hard", "origin/main"], self.folder)
        record = json.loads((self.folder / ".cruft.json").read_text())
        if record["commit"] != newest:
            return False
        variables = {"UV": self.uv, "UV_PROJECT_ENVIRONMENT": self.github.folder / "environment"}
        run([self.uv, "sync", "--quiet"], self.folder, **variables)
        for command in (["manage.py", "check"], ["manage.py", "migrate", "-v0"], ["pytest", "-q"]):
            run([self.uv, "run", "--quiet", *command], self.folder, **variables)
        return True


def main(count, seed):
    """Play the fleet; return whether no commit was lost and no success was false."""
    uv = os.environ.get("UV") or shutil.which("uv")
    problems, arrived = [], 0
    print(
        "| service | from | changes | token | arrived | notes | time |\n|---|---|---|---|---|---|---|"
    )
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        folder = Path(name)
        template = Template(folder / "template")
        # The workflow of earlier releases cannot push changes of workflow files.
        starts = [version for version in template.versions if version not in template.old]
        for number in range(1, count + 1):
            chance, begin = random.Random(f"{seed}-{number}"), time.monotonic()
            place = folder / str(number)
            place.mkdir()
            start = chance.choice(starts[:-1])
            template.check_out(start)
            service, ended = None, "no"
            try:
                service = Service(place, template, chance, uv, start)
                for version in starts[starts.index(start) + 1 :]:
                    template.check_out(version)
                    service.run_week()
                if lost := service.find_lost():
                    problems.append(f"{number}: lost {lost}")
                if service.verify(template.versions[starts[-1]]):
                    ended, arrived = "yes", arrived + 1
                elif not service.notes:
                    problems.append(f"{number}: it did not arrive, and nothing says why")
            except Failed as error:
                problems.append(f"{number}: {error}")
            if service:
                changes = ", ".join(change.__name__ for change in service.changes) or "none"
                notes = "; ".join(dict.fromkeys(service.notes)) or "none"
                seconds = time.monotonic() - begin
                print(
                    f"| {number} | {start} | {changes} | {'yes' if service.has_token else 'no'} |"
                    f" {ended} | {notes} | {seconds:.0f} s |",
                    flush=True,
                )
            shutil.rmtree(place, ignore_errors=True)
    print(f"\n{arrived} of {count} services are at the newest version")
    for problem in problems:
        print(f"\n{problem}")
    return not problems


if __name__ == "__main__":
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    sys.exit(0 if main(options.count, options.seed) else 1)
