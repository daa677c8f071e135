"""Update services of every release to a later version of the template, as teams do.

    uv run trials/time_travel.py [--short] [RELEASE ...]

A service is generated from each release in the history, from the template as it is now, and from
a later version that this program makes from it. A team's edits age it: a field, an edited and a
deleted schedule, changed settings, README and Procfile, imports of all kinds from ``ops`` and an
edit of it, another domain in the example's place, another name of the package, or a folder of a
larger repository. Its PostgreSQL database has rows.

A service of 1.x comes to 2.0 with its own upgrade command and ``upgrade_from_1.py``; later
versions come with ``cruft update``, in one step or version by version. The service must migrate,
start, run a schedule and pass its tests, without a lost row or edit. A service that nobody edited
must equal a new one.

The later versions add a question with a check, change a table, two filters, settings and a line
of the Procfile, add a migration to the library, and rename a module. Needs PostgreSQL. Prints a
table, and exits with status 1 if anything is wrong.
"""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import uuid
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psycopg

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.conftest import GIT_IDENTITY, clean_environment
from tests.generate import ROOT, copy_template, get_releases
from tests.test_replace_domain import CHANGED, NEW_FILES, files_to_delete

PACKAGE = "{{cookiecutter.project_slug}}"
VENDOR = "vendor/prodserver-ops"
LIBRARY = f"{VENDOR}/src/prodserver_ops"
SERVER = "postgres://postgres@127.0.0.1:5432"

#: Files of the example that a release added: the changelog tells teams with another domain to
#: delete them.
ADDED_EXAMPLE_FILES = ["tests/test_schedules.py", "helpdesk/openapi.py"]


#: What a new service does not have yet
EXCLUDED = (".git", ".cruft.json", ".venv", "uv.lock")


@dataclass(frozen=True)
class Case:
    """A service and what its team did with it."""

    answers: dict = field(default_factory=dict)
    replaces_domain: bool = False
    #: The name that the team gave to the package
    package: str = ""
    #: The folder of the repository that the service is in
    folder: str = ""


CASES = {
    "default": Case(),
    "another domain": Case({"project_slug": "helpdesk"}, replaces_domain=True),
    "other choices": Case(
        {"example": "none", "django_version": "5.2", "deploy": "dockerfile", "compose": "yes"}
    ),
    "renamed": Case(package="rooms"),
    "sub-folder": Case(folder="services"),
}

#: Cases that only the way from 1.x has: later upgrades list what they cannot place.
ONLY_FROM_1 = {"renamed", "sub-folder"}

#: A team's module of 1.x, with each kind of import from ``ops``.
TEAM_MODULE = """\
\"\"\"What our team calculates.\"\"\"

from . import models  # noqa: F401
from .ops import (
    logs as our_logs,
    mailer,  # ours
)
from .ops import digests, health
from .ops.runs import start_run  # noqa: F401
from {package}.ops.crontabs import (  # noqa: F401
    # Times
    get_times,
)
from {package}.ops.logs import JsonFormatter, RequestLogMiddleware

import {package}.ops.scheduler

FORMATTER = "{package}.ops.logs.JsonFormatter"
SCHEDULER = {package}.ops.scheduler.Scheduler


def describe():
    from .ops.models import Heartbeat

    return [Heartbeat, mailer, our_logs, digests, health, JsonFormatter, RequestLogMiddleware]
"""

#: A test of it.
TEAM_TEST = """\
from importlib import import_module

from django.utils.module_loading import import_string

from {package} import reports
from {package}.ops import mailer as ours


def test_names():
    assert reports.mailer is ours
    assert import_string(reports.FORMATTER) is reports.JsonFormatter
    assert reports.SCHEDULER.__name__ == "Scheduler"
    assert len(reports.describe()) == 7
    assert import_module("{package}.ops.tokens").TokenAuthentication
"""

#: A migration of the team.
TEAM_MIGRATION = """\
from django.db import migrations

from ..ops.schedules import CreateSchedule


class Migration(migrations.Migration):
    dependencies = [
        ("{package}", "{latest}"),
        ("django_celery_beat", "0019_alter_periodictasks_options"),
    ]

    operations = [
        CreateSchedule(
            "rooms-clean", task="ops.delete_records", crontab="0 4 * * *", timezone="UTC"
        ),
    ]
"""

#: Prints all rows, without what processes write while they run.
SNAPSHOT = """
import json
from django.apps import apps
rows = {}
ignored = {"contenttypes.ContentType", "auth.Permission", "ops.Lease", "ops.Heartbeat",
    "ops.ScheduleRun", "ops.TaskRun", "django_celery_beat.PeriodicTasks"}
for model in apps.get_models():
    if model._meta.label not in ignored:
        rows[model._meta.label] = list(model._default_manager.order_by("pk").values())
from django.conf import settings
rows["queues"] = [{"name": queue.name} for queue in settings.CELERY_TASK_QUEUES]
print("SNAPSHOT" + json.dumps(rows, default=str))
"""

#: Rows that a service has after some time.
ROWS = """
import datetime
from django.apps import apps
from django.contrib.auth import get_user_model
from django_celery_beat.models import IntervalSchedule, PeriodicTask
user = get_user_model().objects.create_superuser("anna", "anna@example.com", "secret")
task = PeriodicTask.objects.get(name="deliveries-resume")
task.interval = IntervalSchedule.objects.get_or_create(every=7, period="minutes")[0]
task.save()
PeriodicTask.objects.get(name="records-delete").delete()
for model in apps.get_models():
    if model.__name__ == "Submission":
        model.objects.create(author=user, body="A post")
    if model.__name__ == "Ticket":
        model.objects.create(owner=user, title="A ticket")
DigestDelivery = apps.get_model("ops", "DigestDelivery")
DigestRun = apps.get_model("ops", "DigestRun")
end = datetime.datetime(2026, 11, 1, tzinfo=datetime.UTC)
start = end - datetime.timedelta(days=1)
DigestRun.objects.create(digest="sample", period_start=start, period_end=end)
DigestDelivery.objects.create(digest="sample", period_end=end, recipient=user, status="sent")
"""


def run(command, folder, *, ok=0, **variables):
    """Run a command; return its output, or raise Failed with its last lines.

    ``ok`` is another status that is no failure.
    """
    done = subprocess.run(
        command,
        cwd=folder,
        env=clean_environment(**GIT_IDENTITY, **variables),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode not in (0, ok):
        last = "\n".join(done.stdout.splitlines()[-30:])
        raise Failed(f"{' '.join(command)}: status {done.returncode}\n{last}")
    return done.stdout


class Failed(Exception):
    """Something did not work."""


def replace(path, old, new):
    """Replace a text that a file has."""
    text = path.read_text()
    if old not in text:
        raise Failed(f"{path.name} has no {old!r}")
    path.write_text(text.replace(old, new))


# The template and its versions


class Template:
    """A repository with the releases so far, the template as it is now, and later versions."""

    def __init__(self, folder):
        self.folder = folder
        run(["git", "clone", "--quiet", str(ROOT), str(folder)], ROOT)
        releases = get_releases()
        self.versions = dict(releases)
        for name in run(["git", "ls-files", "-z"], folder).split("\0"):
            if name:
                (folder / name).unlink()
        copy_template(folder)
        latest = [*self.versions][-1]
        released = run(["git", "rev-parse", f"{self.versions[latest]}^{{tree}}"], folder)
        self.commit("now")
        if run(["git", "rev-parse", "HEAD^{tree}"], folder) == released:
            del self.versions[latest]  # Cruft has nothing to do between equal versions.
        #: The versions before the library
        self.old = {
            name
            for name, commit in self.versions.items()
            if not run(["git", "ls-tree", commit, f"{PACKAGE}/{VENDOR}/"], folder)
        }
        self.add_first_version()
        self.commit("now + 1")
        self.add_second_version()
        self.commit("newest")

    def commit(self, name):
        """Commit the files as a version."""
        run(["git", "add", "--all"], self.folder)
        run(["git", "commit", "--quiet", "--allow-empty", "-m", name], self.folder)
        self.versions[name] = run(["git", "rev-parse", "HEAD"], self.folder).strip()

    def check_out(self, name):
        """Let the default branch end at a version."""
        run(["git", "reset", "--quiet", "--hard", self.versions[name]], self.folder)

    def add_first_version(self):
        """Add a question with a check and a migration; change tables, a filter and settings."""
        folder, package = self.folder, self.folder / PACKAGE / PACKAGE
        questions = folder / "cookiecutter.json"
        check = "\"{{ cookiecutter.city | check('city') }}\""
        replace(
            questions,
            '  "license": [',
            f'  "city": "Berlin",\n  "__check_city": {check},\n  "license": [',
        )
        replace(questions, "django>=6.0.10,<6.1", "django>=6.0.10,<6.1,!=6.0.99")
        replace(questions, "django>=5.2.19,<5.3", "django>=5.2.19,<5.3,!=5.2.99")
        extension = folder / "local_extensions.py"
        replace(extension, "CHECKS = {\n", 'CHECKS = {\n    "city": text_check(20),\n')
        replace(extension, 'return " ".join(text.split())', 'return " ".join([*text.split(), "1"])')
        library = folder / PACKAGE / LIBRARY
        for path in (library / "api" / "views.py", folder / PACKAGE / "openapi.yaml"):
            replace(path, "A token of the HTTP", "A later token of the HTTP")
        settings = package / "settings.py"
        replace(
            settings,
            "    USE_TZ = True\n",
            '    USE_TZ = True\n    CITY = "{{ cookiecutter.city }}"\n',
        )
        models = library / "models.py"
        before, name, after = models.read_text().partition("class Heartbeat(")
        field = "    seen_at = models.DateTimeField("
        note = "    note = models.TextField(null=True)\n"
        models.write_text(before + name + after.replace(field, note + field, 1))
        latest = sorted((library / "migrations").glob("0*.py"))[-1].stem
        (library / "migrations" / f"{int(latest[:4]) + 1:04}_note.py").write_text(
            "from django.db import migrations, models\n\n\n"
            "class Migration(migrations.Migration):\n"
            f'    dependencies = [("ops", "{latest}")]\n\n'
            "    operations = [\n"
            '        migrations.AddField("heartbeat", "note", models.TextField(null=True)),\n'
            "    ]\n"
        )

    def add_second_version(self):
        """Rename a module; change a filter, a workflow and a line of the Procfile."""
        service = self.folder / PACKAGE
        library = service / LIBRARY
        # No service names this module in its settings.
        (library / "core" / "headers.py").rename(library / "core" / "metadata.py")
        for path in library.rglob("*.py"):
            path.write_text(re.sub(r"\bcore\.headers\b", "core.metadata", path.read_text()))
        replace(service / "Procfile", "release: ./manage.py", "release: python manage.py")
        (workflow,) = service.glob("*.folder*/workflows/*github*ci.yml*")
        replace(workflow, "timeout-minutes: 15", "timeout-minutes: 16")
        replace(self.folder / "local_extensions.py", '[*text.split(), "1"]', '[*text.split(), "2"]')
        version = json.loads((self.folder / "cookiecutter.json").read_text())["_version"]
        replace(self.folder / "cookiecutter.json", f'"{version}"', '"99.0.0"')
        replace(
            self.folder / "CHANGELOG.md",
            "## [Unreleased]\n",
            "## [Unreleased]\n\n## [99.0.0] - 2099-01-01\n\nTake the new settings.\n",
        )
        replace(
            library / "conf" / "defaults.py",
            "    TIME_ZONE: str",
            '    NEW_VARIABLE = env("")\n    TIME_ZONE: str',
        )


# A service and its team


@dataclass
class Result:
    """What came of an update."""

    start: str
    case: str
    path: str
    conflicts: list[str] = field(default_factory=list)
    seconds: float = 0
    problem: str = ""


def find_example(project):
    """Return the files of the example, as the README of 1.x tells a team to delete them."""
    readme = " ".join((project / "README.md").read_text().split())
    sentence = re.search(r"To make it yours, delete the example: (.*?)\. Keep", readme)[1]
    found = []
    for pattern in re.findall(r"`([^`]+)`", sentence):
        base = project if pattern.startswith("tests/") else project / project.name
        found += base.glob(f"{pattern}**/*" if pattern.endswith("/") else pattern)
    return [path for path in found if path.is_file()]


class Service:
    """A generated service with its environment and a database."""

    def __init__(self, folder, template, case, database):
        self.template = template
        options = [f"--extra-context={json.dumps(case.answers | {'setup': False})}", "-y"]
        home = {"HOME": str(folder)}
        parent = folder / case.folder
        parent.mkdir(exist_ok=True)
        run(["cruft", "create", str(template.folder), *options], parent, **home)
        (self.folder,) = (path.parent for path in parent.glob("*/manage.py"))
        self.slug = self.package = self.folder.name
        run(["git", "init", "--quiet", "--initial-branch=main"], self.root(case))
        self.commit("Generated")
        self.variables = {"DATABASE_URL": database, "HOME": str(folder)}
        if "UV_CACHE_DIR" not in os.environ:  # Not that of the other home folder
            cache = run([os.environ.get("UV", "uv"), "cache", "dir"], folder)
            self.variables["UV_CACHE_DIR"] = cache.strip()
        if case.package:
            self.rename(case.package)

    def root(self, case):
        """The folder of the repository."""
        return self.folder.parent if case.folder else self.folder

    def rename(self, package):
        """Give the package another name, with search and replace."""
        run(["git", "mv", self.slug, package], self.folder)
        names = run(["git", "grep", "-lIw", self.slug, "--", ".", ":!.cruft.json"], self.folder)
        for path in map(self.folder.joinpath, names.splitlines()):
            path.write_text(re.sub(rf"\b{self.slug}\b", package, path.read_text()))
        self.package = package
        self.commit("Another name")

    def run(self, *command):
        """Run a command in the service's environment."""
        return run(
            [os.environ.get("UV", "uv"), "run", "--quiet", *command], self.folder, **self.variables
        )

    def manage(self, *arguments):
        """Run a management command."""
        return self.run("python", "manage.py", *arguments)

    def commit(self, message):
        """Commit all files."""
        run(["git", "add", "--all"], self.folder)
        run(["git", "commit", "--quiet", "--allow-empty", "-m", message], self.folder)

    def age(self, replaces_domain, *, old):
        """Do what a team does in the first months, with imports of ``ops`` if it is old."""
        package = self.folder / self.package
        if replaces_domain:
            for path in find_example(self.folder) if old else files_to_delete(self.folder)[0]:
                path.unlink()
            for name, text in NEW_FILES.items():
                if old:
                    text = text.replace(
                        "from prodserver_ops.scheduling.operations", "\nfrom ..ops.schedules"
                    )
                (self.folder / name).write_text(text)
        else:
            models = package / "models.py"
            models.write_text(
                "from django.db import models\n" * ("import models" not in models.read_text())
                + models.read_text().rstrip()
                + '\n\n\nclass Room(models.Model):\n    """A place to meet."""\n\n'
                "    name = models.CharField(max_length=50)\n"
            )
        self.manage("makemigrations", self.package)
        if old:
            self.use_ops()
        replace(package / "settings.py", '"anon": "60/min"', '"anon": "7/min"')
        with (self.folder / "README.md").open("a") as readme:
            readme.write("\n## Our rooms\n\nThey are in the attic.\n")
        procfile = self.folder / "Procfile"
        replace(procfile, "migrate --noinput", "migrate --noinput --traceback")
        procfile.write_text(procfile.read_text() + "reports: python manage.py prodserver worker\n")
        self.run("python", "-c", "")  # The dependencies change the lock file.
        self.commit("Our own")
        self.manage("migrate", "--verbosity=0")
        self.manage("shell", "-v0", "-c", ROWS.replace("{slug}", self.package))

    def use_ops(self):
        """Import ``ops`` in each way, in code, a test and a migration, and edit it."""
        package = self.folder / self.package
        latest = sorted((package / "migrations").glob("0*.py"))[-1].stem
        names = {"{package}": self.package, "{latest}": latest}
        files = {
            package / "reports.py": TEAM_MODULE,
            self.folder / "tests" / "test_reports.py": TEAM_TEST,
            package / "migrations" / f"{int(latest[:4]) + 1:04}_clean.py": TEAM_MIGRATION,
        }
        for path, text in files.items():
            for name, value in names.items():
                text = text.replace(name, value)
            path.write_text(text)
        with (package / "ops" / "mailer.py").open("a") as mailer:
            mailer.write("\nOUR_LIMIT = 5\n")
        with (self.folder / "pyproject.toml").open() as project:
            text = project.read()
        text = text.replace('    "psycopg[', '    "markdown>=3.8,<4",\n    "psycopg[')
        (self.folder / "pyproject.toml").write_text(text)

    def snapshot(self):
        """Return all rows by model."""
        output = self.manage("shell", "-v0", "-c", SNAPSHOT)
        return json.loads(output.partition("SNAPSHOT")[2])

    def update(self):
        """Update to the template's version; return the files with conflicts, now resolved."""
        home = {"HOME": self.variables["HOME"]}
        output = run(["cruft", "update", "-y"], self.folder, **home)
        if "Good work" not in output:
            raise Failed(output)
        if rejected := [str(path) for path in self.folder.rglob("*.rej")]:
            raise Failed(f"rejected: {rejected}\n{output}")
        conflicts = self.resolve()
        self.run("python", "-c", "")  # The dependencies change the lock file.
        self.commit("Update")
        return conflicts

    def resolve(self):
        """Keep the team's side of all conflicts; return the files."""
        conflicts = []
        for name in run(["git", "ls-files", "-z", "--unmerged"], self.folder).split("\0"):
            name = name.partition("\t")[2]
            if name and name not in conflicts:
                conflicts.append(name)
        for path in map(self.folder.joinpath, run(["git", "ls-files"], self.folder).splitlines()):
            if not path.is_file() or b"\n<<<<<<< " not in b"\n" + path.read_bytes():
                continue
            name = path.relative_to(self.folder).as_posix()
            if name not in conflicts:
                conflicts.append(name)
            path.write_text(
                re.sub(
                    r"^<<<<<<<.*?\n(.*?)^=======\n.*?^>>>>>>>.*?\n",
                    r"\1",
                    path.read_text(),
                    flags=re.M | re.S,
                )
            )
        return conflicts

    def come_from_1(self, unwanted):
        """Come to 2.0 with the upgrade command of 1.x and the script; return the conflicts.

        ``unwanted`` are files of the example, which the team deletes.
        """
        uv = os.environ.get("UV", "uv")
        environment = clean_environment(**GIT_IDENTITY, **self.variables, UV=uv)
        done = subprocess.run(
            [uv, "run", "--quiet", "manage.py", "upgrade", "--no-tests"],
            cwd=self.folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        if "# Template " not in done.stdout or "upgrade_from_1.py" not in done.stdout:
            raise Failed(f"upgrade: status {done.returncode}\n{done.stdout[-4000:]}")
        script = self.script(expected=1)
        edits = self.folder / "ops-1x-edits"
        if "+OUR_LIMIT = 5" not in script or "mailer.py.1x:1" not in script:
            raise Failed(f"the edit of ops is not in the report:\n{script}")
        shutil.rmtree(edits)
        conflicts = self.resolve()
        for path in self.folder.rglob("*.rej"):
            raise Failed(f"{path}\n{script}")
        run(["git", "add", "--all"], self.folder)
        self.script(expected=0)
        if "Nothing to do" not in self.script(expected=0):
            raise Failed("the script is not idempotent")
        for name in (f"{self.package}/ops", "tests/ops", self.slug):
            if (self.folder / name).exists() and name != self.package:
                raise Failed(f"{name} is still there")
        given = run(["git", "grep", "-nw", f"{self.package}.ops", "--", "*.py"], self.folder, ok=1)
        if given:
            raise Failed(given)
        self.delete(unwanted)
        run([uv, "sync", "--quiet"], self.folder, **self.variables)
        self.run("ruff", "check", "--select=I", "--fix", "--quiet")
        self.run("ruff", "format", "--quiet")
        self.manage("openapi")
        self.commit("2.0")
        return conflicts

    def script(self, expected):
        """Run the script that brings services of 1.x to 2.0; return its report."""
        done = subprocess.run(
            [sys.executable, "-I", f"{VENDOR}/upgrade_from_1.py"],
            cwd=self.folder,
            env=clean_environment(**GIT_IDENTITY, UV=os.environ.get("UV", "uv")),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        if done.returncode != expected:
            raise Failed(f"upgrade_from_1.py: status {done.returncode}\n{done.stdout}")
        return done.stdout

    def delete(self, paths):
        """Delete files of the example that an update added."""
        found = [path for path in paths if (self.folder / path).exists()]
        if found:
            run(["git", "rm", "--quiet", "--force", *found], self.folder)
            self.commit("Not our domain")

    def write_schema(self):
        """Write the schema of an API that is not the example's, as the upgrade command does."""
        if (self.folder / "openapi.yaml").exists():
            self.run("python", "manage.py", "openapi")
            self.commit("Our schema")

    def check(self, before, *, with_tests, newest=True):
        """Raise Failed unless the service works and has what it had before."""
        self.manage("migrate", "--verbosity=0")
        after = self.snapshot()
        for label, rows in before.items():
            for row in rows:
                if not any(row.items() <= other.items() for other in after[label]):
                    raise Failed(f"lost: {label} {row}")
        names = {row["name"] for row in after["django_celery_beat.PeriodicTask"]}
        if "records-delete" in names:
            raise Failed("a deleted schedule is back")
        self.manage("check")
        self.manage("makemigrations", "--check", "--dry-run")
        self.manage("smoke")
        settings = (self.folder / self.package / "settings.py").read_text()
        for text in ('"anon": "7/min"', *(['CITY = "Berlin"', '2"\n    DOMAIN'] if newest else [])):
            if text not in settings:
                raise Failed(f"settings.py has no {text!r}")
        if with_tests:
            self.run("pytest", "-q", "-x")


@contextmanager
def database():
    """Yield the URL of a new database."""
    name = f"travel_{uuid.uuid4().hex[:12]}"
    with psycopg.connect(f"{SERVER}/postgres", autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")
        try:
            yield f"{SERVER}/{name}"
        finally:
            connection.execute(f"DROP DATABASE {name} WITH (FORCE)")


def travel(template, start, case, path, *, with_tests):
    """Update a service from a version along a path of versions; return the result."""
    result = Result(start, case, " → ".join(path))
    played = CASES[case]
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder, database() as url:
        try:
            template.check_out(start)
            service = Service(Path(folder), template, played, url)
            at = start
            service.age(played.replaces_domain, old=start in template.old)
            before = service.snapshot()
            for version in path:
                template.check_out(version)
                if at in template.old and version not in template.old:
                    unwanted = ADDED_EXAMPLE_FILES if played.replaces_domain else []
                    result.conflicts += service.come_from_1(unwanted)
                else:
                    result.conflicts += service.update()
                at = version
                if played.replaces_domain:
                    service.delete(ADDED_EXAMPLE_FILES)
                    service.write_schema()
            # A team keeps its version of the files that it replaced, and its end of the README.
            expected = {"Procfile", "README.md"}
            if played.replaces_domain:
                expected |= CHANGED | {"openapi.yaml"}
            unexpected = set(result.conflicts) - expected
            if unexpected:
                raise Failed(f"conflicts in {unexpected}")
            service.check(before, with_tests=with_tests, newest=path[-1] == "newest")
        except Failed as error:
            result.problem = str(error)
    result.seconds = time.monotonic() - begin
    return result


def compare_unedited(template, start, case, end="newest"):
    """Update a service that nobody edited; it must equal a new one."""
    result = Result(start, case, f"{end}, unedited")
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        try:
            template.check_out(start)
            service = Service(Path(folder), template, CASES[case], "")
            template.check_out(end)
            if start in template.old:
                run(["cruft", "update", "-y"], service.folder, HOME=folder)
                service.script(expected=0)
                service.commit("2.0")
            else:
                result.conflicts = service.update()
            for command in (["cruft", "diff"], ["cruft", "check"]):
                output = run(command, service.folder, HOME=folder)
                if command[1] == "diff" and output.strip() and not CASES[case].package:
                    raise Failed(output)
            other = Path(folder, "new")
            other.mkdir()
            # A new question or another default is no difference.
            record = json.loads((service.folder / ".cruft.json").read_text())
            recorded = record["context"]["cookiecutter"].items()
            answers = {name: value for name, value in recorded if name[0] != "_"}
            fresh = Service(other, template, dataclasses.replace(CASES[case], answers=answers), "")
            exclude = [option for name in EXCLUDED for option in ("-x", name)]
            run(["diff", "-r", *exclude, str(service.folder), str(fresh.folder)], folder)
        except Failed as error:
            result.problem = str(error)
    result.seconds = time.monotonic() - begin
    return result


def main(releases=(), *, short=False):
    """Play all updates, those from some releases, or one of each kind; return success."""
    results = []

    def show(result):
        results.append(result)
        end = "FAILED" if result.problem else "ok"
        conflicts = ", ".join(result.conflicts) or "none"
        print(
            f"| {result.start} | {result.case} | {result.path} | {conflicts} |"
            f" {end} | {result.seconds:.0f} s |",
            flush=True,
        )

    with tempfile.TemporaryDirectory() as folder:
        template = Template(Path(folder, "template"))
        *starts, _ = template.versions
        print("| from | case | path | conflicts | result | time |")
        print("|---|---|---|---|---|---|")
        if short:
            # tests/test_upgrades.py brings services of 1.4.0 to 2.0.
            show(travel(template, "now", "default", ["newest"], with_tests=False))
            show(compare_unedited(template, starts[0], "other choices"))
            starts = []
        for start in starts:
            if releases and start not in releases:
                continue
            for case in CASES:
                if start in template.old:
                    show(travel(template, start, case, ["now"], with_tests=True))
                    if not CASES[case].replaces_domain:
                        show(compare_unedited(template, start, case, "now"))
                elif case not in ONLY_FROM_1:
                    show(travel(template, start, case, ["newest"], with_tests=True))
                    show(compare_unedited(template, start, case))
            later = [*starts[starts.index(start) + 1 :], "newest"]
            show(travel(template, start, "default", later, with_tests=False))
    for result in results:
        if result.problem:
            print(f"\n{result.start}, {result.case}, {result.path}:\n{result.problem}")
    return not any(result.problem for result in results)


if __name__ == "__main__":
    chosen = [argument for argument in sys.argv[1:] if argument[0] != "-"]
    sys.exit(0 if main(chosen, short="--short" in sys.argv) else 1)
