"""Upgrade a fleet of aged services week by week, by their own weekly workflows.

    uv run trials/fleet.py [--count 20] [--seed 1] [--first 1]

Each service is generated at a random version of 1.0 or later with random answers, aged as a team
would (a field, settings, other packages, a renamed package, a deleted file, a conflict, a lock file
of old packages, a folder of a larger repository, another broker, a token of the team or none), and
pushed to a repository that refuses what GitHub refuses. Then each later version comes, and the
workflow in the repository runs with its own steps. The team merges a pull request; it resolves
conflicts, and runs the commands that the description names: ``upgrade --workflows``, and for 2.0
``upgrade_from_1.py``. What else stops a service has to be in the pull request or in the log.

No commit of anybody may be lost, a service that is at the newest version must pass its checks and
its tests, and a pull request of this version or a later one has the results of tests and checks.
Prints a table, and exits with status 1 if one of them is not so.
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

from tests.generate import get_releases
from tests.github import GitHub
from trials.time_travel import VENDOR, Failed, Template, run

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

#: A test that replaces those of the service, without a database: the fleet would need hours for all
#: of them. Migrations are verified at the end.
TEST = '''"""The service starts."""

from django.core.management import call_command


def test_checks():
    call_command("check")
'''

#: What a pull request shows, unless there are conflicts.
SECTIONS = ["## Tests", "## Checks of production"]


class Service:
    """A service with its repository and its team."""

    def __init__(self, folder, template, chance, uv):
        self.chance, self.uv = chance, uv
        self.answers = {name: chance.choice(values) for name, values in ANSWERS.items()}
        self.root = folder / "team"
        self.github = GitHub(folder / "github", uv)
        self.variables = {"UV": uv, "UV_PROJECT_ENVIRONMENT": self.github.folder / "environment"}
        self.commits, self.notes, self.problems, self.handled = [], [], [], 0
        #: What the last run of the workflow, or its pull request, says about what stops the service
        self.reason = ""
        self.place = "services/rooms" if chance.random() < 0.25 else "."
        self.folder = self.root / self.place
        extra = json.dumps(self.answers | {"setup": False})
        options = ["--extra-context", extra, "--output-dir", str(folder), "-y"]
        run(["cruft", "create", str(template.folder), *options], folder, UV=uv, PWD=folder)
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        (folder / "prayer_room_api").rename(self.folder)
        self.package = "prayer_room_api"
        self.replace_tests()
        run([uv, "lock", "--quiet"], self.folder)
        run(["git", "init", "--quiet", "--initial-branch=main"], self.root)
        run(["git", "remote", "add", "origin", str(self.github.origin)], self.root)
        self.copy_workflows(self.root)
        self.commit("First commit")
        possible = [
            self.rename_package,
            self.add_lines,
            self.conflict,
            self.delete,
            self.add_module,
            self.add_model,
            self.lock_old_packages,
        ]
        changes = [change for change in possible if chance.random() < 0.4]
        for change in changes:
            change()
            self.commit(change.__name__)
        self.changes = [change.__name__ for change in changes] + ["monorepo"] * (self.place != ".")
        #: The answer that changes once the command for it is there
        self.broker = chance.choice(ANSWERS["broker"]) if chance.random() < 0.4 else ""
        self.has_token = chance.random() < 0.3
        if self.has_token:
            self.github.give_token()
        run(["git", "push", "--quiet", "origin", "main"], self.root)

    def commit(self, message, folder=None):
        """Commit all changes of the team, and remember the commit."""
        folder = folder or self.root
        run(["git", "add", "--all"], folder)
        run(["git", "commit", "--quiet", "--allow-empty", "-m", message], folder)
        self.commits.append(run(["git", "rev-parse", "HEAD"], folder).strip())

    def replace_tests(self):
        """Have one test."""
        shutil.rmtree(self.folder / "tests")
        (self.folder / "tests").mkdir()
        (self.folder / "tests" / "test_service.py").write_text(TEST)

    def copy_workflows(self, root):
        """Copy the workflows to the root of a larger repository, as docs/upgrades.md says."""
        if self.place == ".":
            return
        target = root / ".github" / "workflows"
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir(parents=True)
        start = f"    defaults:\n      run:\n        working-directory: {self.place}\n"
        for path in (root / self.place / ".github" / "workflows").iterdir():
            text = re.sub(r"^    (?=runs-on:)", f"{start}    ", path.read_text(), flags=re.M)
            (target / path.name).write_text(text)

    def rename_package(self):
        """Give the package another name."""
        run(["git", "mv", self.package, "rooms"], self.folder)
        pattern = ["git", "grep", "-lIw", self.package, "--", ".", ":!.cruft.json", ":!uv.lock"]
        for path in map(self.folder.joinpath, run(pattern, self.folder).splitlines()):
            path.write_text(re.sub(rf"\b{self.package}\b", "rooms", path.read_text()))
        self.package = "rooms"

    def add_lines(self):
        """Add a setting, a section of the README and a package."""
        settings = self.folder / self.package / "settings.py"
        text = settings.read_text()
        settings.write_text(
            text.replace("    USE_TZ = True\n", '    USE_TZ = True\n    OUR = "x"\n')
        )
        with (self.folder / "README.md").open("a") as readme:
            readme.write("\n## Our rooms\n\nThey are in the attic.\n")
        toml = self.folder / "pyproject.toml"
        line = '    "psycopg[', '    "markdown>=3.8,<4",\n    "psycopg['
        toml.write_text(toml.read_text().replace(*line))
        run([self.uv, "lock", "--quiet"], self.folder)

    def conflict(self):
        """Change a line that a later version changes too."""
        procfile = self.folder / "Procfile"
        text = procfile.read_text().replace("migrate --noinput", "migrate --noinput --traceback")
        procfile.write_text(text)

    def delete(self):
        """Delete files that the team does not need."""
        for name in ("SECURITY.md", ".pre-commit-config.yaml"):
            (self.folder / name).unlink(missing_ok=True)

    def add_module(self):
        """Add a module of the team's own."""
        (self.folder / self.package / "reports.py").write_text('"""Reports."""\n\nDAYS = 7\n')

    def add_model(self):
        """Add a model and its migration."""
        models = self.folder / self.package / "models.py"
        models.write_text(
            "from django.db import models\n" * ("import models" not in models.read_text())
            + models.read_text().rstrip()
            + '\n\n\nclass Room(models.Model):\n    """A place to meet."""\n\n'
            "    name = models.CharField(max_length=50)\n"
        )
        command = ["manage.py", "makemigrations", self.package]
        run([self.uv, "run", "--quiet", *command], self.folder, **self.variables)

    def lock_old_packages(self):
        """Have a lock file of the oldest packages that the ranges allow."""
        run([self.uv, "lock", "--quiet", "--resolution=lowest-direct"], self.folder)
        lock = self.folder / "uv.lock"
        lock.write_text(re.sub(r"^\[options\]\n(.+\n)+\n?", "", lock.read_text(), flags=re.M))

    def run_week(self, *, is_released):
        """Run the workflow, and do what the team does with its pull request.

        ``is_released`` says whether the version of the template is a release, which cannot keep
        the weekly workflow of that time from deleting commits.
        """
        status, log = self.github.run_workflow()
        self.reason = ""
        if status:
            lines = [line for line in log.splitlines() if line.strip()] or ["no output"]
            known = "refusing", "has commits of others", "workflow is that"
            named = [line for line in lines if any(text in line for text in known)]
            self.reason = f"log: {[*named, lines[-1]][0].strip()[:90]}"
            self.notes.append(self.reason)
        for pull in self.github.pulls():
            if pull["open"]:
                self.handle(pull, is_released)
        if self.broker:
            self.change_broker()

    def clone(self, branch):
        """Return a new clone of a branch."""
        work = self.root.with_name("work")
        shutil.rmtree(work, ignore_errors=True)
        origin = str(self.github.origin)
        run(["git", "clone", "--quiet", "--branch", branch, origin, str(work)], work.parent)
        return work

    def push(self, work):
        """Push as a person, who may push workflow files."""
        (self.github.folder / "token-of-the-team").touch()
        run(["git", "push", "--quiet"], work)
        if not self.has_token:
            (self.github.folder / "token-of-the-team").unlink()

    def manage(self, work, *command, ok=0):
        """Run a command of the service in a clone; return its output."""
        command = [self.uv, "run", "--quiet", *command]
        return run(command, work / self.place, ok=ok, **self.variables)

    def handle(self, pull, is_released):
        """Resolve conflicts in favour of the team, run the commands that it names, and merge."""
        body, work = " ".join(pull["body"].split()), self.clone(pull["head"])
        self.handled += 1
        stops = re.findall(
            r"^## ((?:.+\n\nFailed:)|Conflicts|Changes to missing.+)", pull["body"], re.M
        )
        self.reason = "; ".join(" ".join(stop.split()) for stop in stops)
        # Earlier releases report the tests alone.
        expected = SECTIONS if "upgrade --bundle" in self.read_workflow() else SECTIONS[:1]
        missing = [title for title in expected if title not in pull["body"]]
        if missing and "onflicts" not in body and "upgrade_from_1.py" not in body:
            self.problems.append(f"{pull['title']} does not show {', '.join(missing)}")
        if is_from_1 := "upgrade_from_1.py" in body:
            self.run_script(work)
        marked = run(["git", "grep", "-l", "^<<<<<<< "], work, ok=1).splitlines()
        pattern = r"^<<<<<<<.*?\n(.*?)^=======\n.*?^>>>>>>>.*?\n"
        for path in map(work.joinpath, marked):
            path.write_text(re.sub(pattern, r"\1", path.read_text(), flags=re.M | re.S))
        if is_from_1:
            self.come_from_1(work)
        if marked:
            self.notes.append(f"conflicts: {', '.join(marked)}")
            self.commit("Resolve", work)
            self.push(work)
            # A run of the workflow in between leaves the team's commit alone.
            if not is_released and "commits of others" not in self.github.run_workflow()[1]:
                self.problems.append("the commits on the branch were not respected")
        if "upgrade --workflows" in body and (work / self.place / VENDOR).exists():
            self.manage(work, "manage.py", "upgrade", "--workflows", "--no-tests", ok=1)
            self.copy_workflows(work)
            self.commit("Workflows", work)
            self.push(work)
        for title in ("Changes to missing files", "Files that the template deleted"):
            if f"## {title}" in pull["body"]:
                self.notes.append(title.lower())
        self.github.merge(pull["head"])

    def read_workflow(self):
        """Return the weekly workflow of main."""
        command = ["show", "main:.github/workflows/upgrade.yml"]
        return self.github.git(*command, folder=self.github.origin)

    def run_script(self, work):
        """Run the script that the changelog of 2.0 names; return its output."""
        run(["git", "add", "--all"], work)
        script = [sys.executable, "-I", f"{VENDOR}/upgrade_from_1.py"]
        return run(script, work / self.place, ok=1, UV=self.uv)

    def come_from_1(self, work):
        """Do the rest of what the changelog of 2.0 says."""
        output = self.run_script(work)
        self.notes += [f"upgrade_from_1.py: {line}" for line in re.findall(r"^\d+ left.*", output)]
        run([self.uv, "sync", "--quiet"], work / self.place, **self.variables)
        for command in ("ruff check --fix --quiet", "ruff format --quiet", "manage.py openapi"):
            self.manage(work, *command.split(), ok=1)
        self.commit("2.0", work)
        self.push(work)

    def change_broker(self):
        """Change an answer on main, once the command is there."""
        work = self.clone("main")
        record = json.loads((work / self.place / ".cruft.json").read_text())
        if not (work / self.place / VENDOR / "propose_upgrade.py").exists():
            return
        if record["context"]["cookiecutter"]["broker"] != self.broker:
            self.manage(work, "manage.py", "change", f"broker={self.broker}", "--no-tests", ok=1)
            conflicts = run(["git", "grep", "-l", "^<<<<<<< "], work, ok=1).splitlines()
            self.notes.append(f"conflicts of the broker: {', '.join(conflicts) or 'none'}")
            run(["git", "checkout", "--theirs", "--", *conflicts], work) if conflicts else None
            self.commit("Another broker", work)
            run(["git", "push", "--quiet"], work)
            self.changes.append("broker")
        self.broker = ""

    def find_lost(self):
        """Return the commits of the team that no branch has."""
        kept = self.github.git("log", "--all", "--format=%H", folder=self.github.origin).split()
        return [commit for commit in self.commits if commit not in kept]

    def verify(self, newest):
        """Return whether main is at a version; raise Failed if it does not work there."""
        work = self.clone("main")
        record = json.loads((work / self.place / ".cruft.json").read_text())
        if record["commit"] != newest:
            return False
        run([self.uv, "sync", "--quiet", "--locked"], work / self.place, **self.variables)
        migrations = ["manage.py", "makemigrations", "--check", "--dry-run"]
        for command in (["manage.py", "migrate", "-v0"], migrations, ["pytest", "-q"]):
            self.manage(work, *command)
        return True


def main(numbers, seed):
    """Play the fleet; return whether no commit was lost and no success was false."""
    uv = os.environ.get("UV") or shutil.which("uv")
    problems, printed, arrived = [], 0, 0
    print(
        "| service | from | changes | token | arrived | notes | time |\n|---|---|---|---|---|---|---|"
    )
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        folder = Path(name)
        template = Template(folder / "template")
        starts = list(template.versions)
        for number in numbers:
            chance, begin = random.Random(f"{seed}-{number}"), time.monotonic()
            place = folder / str(number)
            place.mkdir()
            start = chance.choice(starts[:-1])
            template.check_out(start)
            service, ended = None, "no"
            try:
                service = Service(place, template, chance, uv)
                for version in starts[starts.index(start) + 1 :]:
                    template.check_out(version)
                    service.run_week(is_released=version in get_releases())
                problems += [f"{number}: {problem}" for problem in service.problems]
                if lost := service.find_lost():
                    problems.append(f"{number}: lost {lost}")
                if service.verify(template.versions[starts[-1]]):
                    ended, arrived = "yes", arrived + 1
                elif service.reason:
                    service.notes.append(f"did not arrive: {service.reason}")
                else:
                    problems.append(f"{number}: it did not arrive, and nothing says why")
            except Failed as error:
                problems.append(f"{number}: {error}")
            for problem in problems[printed:]:
                print(f"\n{problem}\n", flush=True)
            printed = len(problems)
            if service:
                changes = ", ".join(service.changes) or "none"
                notes = "; ".join(dict.fromkeys(service.notes)) or "none"
                seconds = time.monotonic() - begin
                print(
                    f"| {number} | {start} | {changes} | {'yes' if service.has_token else 'no'} |"
                    f" {ended} | {notes} | {seconds:.0f} s |",
                    flush=True,
                )
            shutil.rmtree(place, ignore_errors=True)
    print(f"\n{arrived} of {len(numbers)} services are at the newest version")
    print(f"{len(problems)} problems; commits lost: {sum('lost [' in each for each in problems)}")
    return not problems


if __name__ == "__main__":
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--first", type=int, default=1, help="the first of them")
    options = parser.parse_args()
    numbers = range(options.first, options.count + 1)
    sys.exit(0 if main(numbers, options.seed) else 1)
