"""First week: the edits that a team makes first leave the generated tests and checks green."""

import ast
import json
import re

import pytest

from tests.generate import LIBRARY, SOURCES, replace
from tests.servers import wait_for

SLUG = "weekly"

#: The README's e-mail as the team would write it.
TEMPLATES = {
    "news.txt": "News since {{ since }}.\n",
    "news.html": "<p>News since {{ since }}.</p>\n",
}

#: Another app, with a model, a test and a schedule of its own.
APP = {
    "models.py": '''\
from django.db import models


class Room(models.Model):
    """A place to meet."""

    name = models.CharField(max_length=50)

    def __str__(self):
        return self.name
''',
    "tasks.py": '''\
from celery import shared_task


@shared_task
def clean_rooms():
    """Clean all rooms."""
''',
    "tests.py": """\
import pytest

from .models import Room


@pytest.mark.django_db
def test_room_is_stored():
    Room.objects.create(name="Attic")
    assert str(Room.objects.get()) == "Attic"
""",
}

APP_SCHEDULE = """\
from datetime import timedelta

from django.db import migrations
from prodserver_ops.scheduling.operations import CreateSchedule


class Migration(migrations.Migration):
    dependencies = [
        ("rooms", "0001_initial"),{dependency}
    ]

    operations = [
        CreateSchedule(
            "rooms-clean", task="rooms.tasks.clean_rooms", interval=timedelta(seconds=1)
        ),
    ]
"""

DEPENDENCY = '\n        ("django_celery_beat", "0019_alter_periodictasks_options"),'

SECOND_WORKER = """\
            "reports": processes.worker(self, concurrency=1, queues="reports"),
"""

RUN_EVERY_SECOND = """
from django_celery_beat.models import IntervalSchedule, PeriodicTask
task = PeriodicTask.objects.get(name="clear-sessions")
task.interval = IntervalSchedule.objects.get_or_create(every=1, period="seconds")[0]
task.save()
User.objects.create_user("anna", "anna@example.com")
"""


def python_blocks(project):
    """Return the Python code blocks of the documents, exactly as they stand there."""
    names = ("schedules.md", "email.md")
    text = "".join((project / "docs" / name).read_text() for name in names)
    return re.findall(r"^```python\n(.*?)^```$", text, re.M | re.S)


def migration_path(project):
    """Return the path that docs/schedules.md gives its migration."""
    document = (project / "docs" / "schedules.md").read_text()
    pattern = rf"`({project.name}/migrations/\d{{4}}_\w+\.py)`:\n\n```python"
    (name,) = re.findall(pattern, document)
    return project / name


def append(path, snippet):
    """Paste a snippet below the code of a file."""
    path.write_text(f"{path.read_text().rstrip()}\n\n\n{snippet}")


def move_imports_up(path):
    """Merge the imports that were pasted in below other code into those at the top."""
    lines = path.read_text().splitlines(keepends=True)
    nodes = [
        node
        for node in ast.parse("".join(lines)).body
        if isinstance(node, ast.Import | ast.ImportFrom)
    ]
    imported, kept, moved = set(), set(), set()
    for node in nodes:
        numbers = set(range(node.lineno - 1, node.end_lineno))
        names = {alias.name for alias in node.names}
        moved |= numbers
        if not names <= imported:
            kept |= numbers
        imported |= names
    first = min(moved)
    imports = [lines[number] for number in sorted(kept)]
    rest = [line for number, line in enumerate(lines) if number not in moved and number >= first]
    path.write_text("".join([*lines[:first], *imports, *rest]))


def add_what_the_readme_shows(service):
    """Add the documents' schedule and digest: the snippets exactly as they stand there."""
    package = service.folder / service.folder.name
    task, migration, digest, digest_task = python_blocks(service.folder)
    append(package / "tasks.py", task)
    migration_path(service.folder).write_text(migration)
    append(package / "digests.py", digest)
    append(package / "tasks.py", digest_task)
    names = re.search(r"# templates/email/(\w+\.txt) and (\w+\.html)", digest).groups()
    assert sorted(names) == sorted(TEMPLATES)
    for name, text in TEMPLATES.items():
        (package / "templates" / "email" / name).write_text(text)


def change_settings(service):
    """Change what a team changes first: time zone, throttle rate, a second worker."""
    settings = service.folder / service.folder.name / "settings.py"
    replace(settings, 'TIME_ZONE = "UTC"', 'TIME_ZONE = "Europe/Berlin"')
    replace(settings, '"anon": "60/min", "user": "120/min"', '"anon": "7/min", "user": "9/min"')
    beat = '            "beat": processes.beat(self),\n'
    replace(settings, beat, SECOND_WORKER + beat)
    start_in_each_deployment(service, "reports")

    # A typing error would end the process at its start; check finds it.
    replace(settings, 'queues="reports"', 'queue="reports"')
    output = service.run("python manage.py check", status=1)
    assert "Traceback" not in output
    assert "System check identified 1 issue " in output
    assert "Process 'reports': ARGS: No such option" in output
    replace(settings, 'queue="reports"', 'queues="reports"')


def start_in_each_deployment(service, name):
    """Add a process to the files that start the processes, as check asks for."""
    for procfile in ("Procfile", "Procfile.dev"):
        with (service.folder / procfile).open("a") as file:
            file.write(f"{name}: python manage.py prodserver {name}\n")
    path = service.folder / "app.json"
    app = json.loads(path.read_text())
    app["formation"][name] = {"quantity": 1}
    command = ["python", "-m", "prodserver_ops.heartbeat", name]
    check = {"type": "startup", "name": f"{name} runs", "command": command, "attempts": 5}
    app["healthchecks"][name] = [check]
    path.write_text(json.dumps(app, indent=2) + "\n")


def add_an_app(service):
    """Add another app, at first with a schedule whose migration lacks a dependency."""
    service.run("python manage.py startapp rooms")
    folder = service.folder / "rooms"
    for name, text in APP.items():
        (folder / name).write_text(text)
    slug = service.folder.name
    name = f'        "{slug}",\n'
    replace(service.folder / slug / "settings.py", name, f'{name}        "rooms",\n')
    service.run("python manage.py makemigrations rooms")

    migration = folder / "migrations" / "0002_clean_rooms.py"
    migration.write_text(APP_SCHEDULE.format(dependency=""))
    output = service.run("python manage.py check", status=1)
    assert "Traceback" not in output
    assert "System check identified 1 issue " in output
    assert "rooms.0002_clean_rooms" in output
    assert DEPENDENCY.strip(" \n,") in output
    migration.write_text(APP_SCHEDULE.format(dependency=DEPENDENCY))


def add_a_field(service):
    """Add a field to a model."""
    slug = service.folder.name
    replace(
        service.folder / slug / "models.py",
        "    body = models.TextField(max_length=5000)\n",
        "    body = models.TextField(max_length=5000)\n"
        "    category = models.CharField(max_length=40, blank=True)\n",
    )
    service.run(f"python manage.py makemigrations {slug}")


@pytest.fixture
def service(bake, make_service):
    service = make_service(bake(project_slug=SLUG))
    service.install()
    return service


@pytest.mark.slow
def test_first_edits_leave_tests_and_checks_green(service):
    package = service.folder / SLUG
    add_what_the_readme_shows(service)
    change_settings(service)
    add_an_app(service)
    add_a_field(service)
    assert len(list((package / "migrations").glob("0005_*category*.py"))) == 1

    service.run("python manage.py makemigrations --check --dry-run")
    service.run("python manage.py check --fail-level WARNING")
    # The database is empty.
    service.run(service.procfile()["release"])
    check_processes(service)

    for module in ("tasks.py", "digests.py"):
        move_imports_up(package / module)
    # The README's commands that lint and format; then the workflow's, and its type check.
    for command in ("ruff check --fix", "ruff format", "ruff check", "ruff format --check"):
        service.run(command)
    service.run("mypy")
    output = service.run("pytest -rA")
    assert "rooms/tests.py::test_room_is_stored" in output
    assert " passed" in output


def check_processes(service):
    """Check that beat and worker run the new schedules, and deliver the new digest."""
    service.shell(RUN_EVERY_SECOND)
    worker, reports, beat = (service.start(name) for name in ("worker", "reports", "beat"))
    worker.wait_for_text(" ready.", seconds=60)
    reports.wait_for_text(" ready.", seconds=60)
    beat.wait_for_text("Sending due task clear-sessions")
    beat.wait_for_text("Sending due task rooms-clean")
    for task in (f"{SLUG}.tasks.clear_sessions", "rooms.tasks.clean_rooms"):
        succeeded = rf"Task {re.escape(task)}\[\S+\] succeeded"
        wait_for(lambda found=succeeded: re.search(found, worker.text()), 20, worker.text)
    service.shell(f"from {SLUG}.tasks import send_news; send_news.delay()")
    worker.wait_for_text("Subject: Prayer Room API: news of the week")
    worker.wait_for_text("News since")
    assert [process.stop() for process in (beat, worker, reports)] == [0, 0, 0]
    assert "Traceback" not in worker.text() + beat.text()


def docker_ignores(patterns, path):
    """Return whether Docker leaves the file out, after the rules of .dockerignore.

    https://docs.docker.com/build/concepts/context/#dockerignore-files
    """
    expressions = {"**/": "(.*/)?", "**": ".*", "*": "[^/]*"}
    ignored = False
    for pattern in patterns:
        exception, name = pattern.startswith("!"), pattern.removeprefix("!").strip("/")
        parts = re.split(r"(\*\*/|\*\*|\*)", name)
        expression = "".join(expressions.get(part, re.escape(part)) for part in parts)
        # A pattern that matches a folder applies to all that is in it.
        if re.fullmatch(rf"{expression}(/.*)?", path):
            ignored = not exception
    return ignored


@pytest.mark.parametrize("answers", [{"deploy": "dockerfile"}, {"compose": True}], ids=str)
def test_image_contains_another_app_and_no_secrets(bake, answers):
    project = bake(**answers)
    lines = (project / ".dockerignore").read_text().splitlines()
    patterns = [line for line in lines if line and not line.startswith("#")]
    package = project.name
    for path in (
        "manage.py",
        "pyproject.toml",
        f"{package}/settings.py",
        f"{SOURCES}/core/locks.py",
        "rooms/models.py",
        "rooms/migrations/0001_initial.py",
        "rooms/templates/rooms/room.html",
        "rooms/static/rooms/room.css",
        "rooms/locale/de/LC_MESSAGES/django.mo",
        f"{package}/templates/base.html",
        f"{LIBRARY}/pyproject.toml",
        ".python-version",
        "uv.lock",
    ):
        assert not docker_ignores(patterns, path), path
    for path in (
        ".env",
        ".git/config",
        ".venv/bin/python",
        "dump.sql",
        "backups/x.dump",
        "backups/restore.py",
        "terraform/terraform.tfstate",
        "terraform.tfstate",
        "media/photo.jpg",
        "media/upload.py",
        "db.sqlite3",
        "certificates/key.pem",
        f"{package}/.env",
        f"{package}/db.sqlite3",
        f"{package}/key.pem",
        f"{package}/templates/.env",
        "rooms/.git/config.py",
        "staticfiles/site.css",
        "tests/test_pages.py",
        "var/db.sqlite3",
        "rooms/__pycache__/models.pyc",
    ):
        assert docker_ignores(patterns, path), path
    dockerfile = (project / "Dockerfile").read_text()
    assert "\nCOPY . .\n" in dockerfile
