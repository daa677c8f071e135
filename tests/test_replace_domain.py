"""Replacing the example: delete what the README says, write another domain, change little."""

import re
import subprocess

import pytest

from tests.conftest import GIT_IDENTITY
from tests.servers import wait_for

pytestmark = pytest.mark.slow

SLUG = "helpdesk"

#: The paths in the package that the README tells a team to delete; it deletes tests too.
DELETED = [
    "digests.py",
    "openapi.py",
    "migrations/0*.py",
    "templates/answer.html",
    "templates/moderate.html",
    "templates/try.html",
    "templates/email/",
]

#: Files that the README tells a team to change.
CHANGED = {f"{SLUG}/{name}.py" for name in ("admin", "api", "models", "tasks")}

#: The new domain: support tickets, closed by a schedule.
NEW_FILES = {
    f"{SLUG}/models.py": '''\
"""Users and their tickets."""

from django.conf import settings
from django.contrib.auth.models import AbstractUser
from django.db import models


class User(AbstractUser):
    """A user of the service."""


class Ticket(models.Model):
    """A request for help."""

    owner = models.ForeignKey(
        settings.AUTH_USER_MODEL, on_delete=models.CASCADE, related_name="tickets"
    )
    title = models.CharField(max_length=200)
    opened_at = models.DateTimeField(auto_now_add=True)
    closed_at = models.DateTimeField(null=True, blank=True)

    class Meta:
        ordering = ["-opened_at"]

    def __str__(self):
        return self.title
''',
    f"{SLUG}/admin.py": """\
from django.contrib import admin
from django.contrib.auth.admin import UserAdmin

from .models import Ticket, User

admin.site.register(User, UserAdmin)


@admin.register(Ticket)
class TicketAdmin(admin.ModelAdmin):
    list_display = ["title", "owner", "opened_at", "closed_at"]
""",
    f"{SLUG}/api.py": """\
from rest_framework import permissions, routers, serializers, viewsets

from .models import Ticket


class TicketSerializer(serializers.ModelSerializer):
    class Meta:
        model = Ticket
        fields = ["id", "title", "opened_at", "closed_at"]
        read_only_fields = ["opened_at", "closed_at"]


class TicketViewSet(viewsets.ModelViewSet):
    queryset = Ticket.objects.none()
    serializer_class = TicketSerializer
    permission_classes = [permissions.IsAuthenticated]

    def get_queryset(self):
        return Ticket.objects.filter(owner=self.request.user.pk)

    def perform_create(self, serializer):
        serializer.save(owner=self.request.user)


router = routers.DefaultRouter()
router.register("tickets", TicketViewSet)
""",
    f"{SLUG}/tasks.py": '''\
"""Tasks of the service."""

from celery import shared_task
from django.utils import timezone

from .models import Ticket


@shared_task
def close_tickets():
    """Close every open ticket."""
    Ticket.objects.filter(closed_at=None).update(closed_at=timezone.now())
''',
    "tests/test_tickets.py": """\
import pytest
from django.contrib.auth import get_user_model
from django.urls import reverse

from helpdesk.models import Ticket

pytestmark = pytest.mark.django_db


def test_user_opens_a_ticket_and_an_administrator_finds_it(client):
    user = get_user_model().objects.create_superuser("anna", "anna@example.com", "secret")
    client.force_login(user)
    response = client.post("/api/tickets/", {"title": "Help"}, content_type="application/json")
    assert response.status_code == 201
    assert Ticket.objects.get().owner == user
    assert b"Help" in client.get(reverse("admin:helpdesk_ticket_changelist")).content
""",
}

#: The schedule's migration in the form that the README shows.
MIGRATION = """\
from datetime import timedelta

from django.db import migrations
from prodserver_ops.scheduling.operations import CreateSchedule


class Migration(migrations.Migration):
    dependencies = [
        ("helpdesk", "0001_initial"),
        ("django_celery_beat", "0019_alter_periodictasks_options"),
    ]

    operations = [
        CreateSchedule(
            "tickets-close", task="helpdesk.tasks.close_tickets", interval=timedelta(seconds=2)
        ),
    ]
"""

SCHEDULES = """
from django_celery_beat.models import PeriodicTask
print(sorted(PeriodicTask.objects.values_list("name", flat=True)))
"""


def git(folder, *arguments):
    done = subprocess.run(
        ["git", *arguments],
        cwd=folder,
        env=GIT_IDENTITY,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout


def files_to_delete(project):
    """Return the files that the README tells a team to delete, and the patterns it names."""
    readme = " ".join((project / "README.md").read_text().split())
    sentence, kept = re.search(r"1\. Delete (.*?), and the tests except `(.*?)`", readme).groups()
    patterns = re.findall(r"`([^`]+)`", sentence)
    found = [path for path in project.glob("tests/*.py") if path != project / kept]
    for pattern in patterns:
        base = project / project.name
        matches = list(base.glob(f"{pattern}**/*" if pattern.endswith("/") else pattern))
        assert matches, pattern
        found += [path for path in matches if path.is_file()]
    return found, patterns


def test_another_domain_replaces_the_example_as_the_readme_says(bake, make_service):
    service = make_service(bake(project_slug=SLUG))
    project = service.folder
    git(project, "init", "--quiet")
    git(project, "add", "--all")
    git(project, "commit", "--quiet", "--message", "Generated")
    service.install()

    deleted, patterns = files_to_delete(project)
    assert patterns == DELETED
    for path in deleted:
        path.unlink()
    for name, text in NEW_FILES.items():
        (project / name).write_text(text)
    service.run(f"python manage.py makemigrations {SLUG}")
    (project / SLUG / "migrations" / "0002_close_tickets.py").write_text(MIGRATION)

    git(project, "add", "--all", "--", ".", ":!.venv")
    lines = git(project, "diff", "--cached", "--no-renames", "--name-status", "HEAD").splitlines()
    changes = {path: status for status, path in (line.split("\t") for line in lines)}
    # A new migration may have the name of a deleted one.
    deleted = {path.relative_to(project).as_posix() for path in deleted}
    changed = {path for path, status in changes.items() if status == "M"} - deleted
    assert changed == CHANGED
    assert len(changed) <= 4
    assert {path for path, status in changes.items() if status == "D"} <= deleted

    service.run("python manage.py openapi")
    # Only the new migration needs it, because Django formats migrations in another style.
    service.run("ruff format")
    service.run("ruff check")
    service.run("mypy")
    service.run("python manage.py check --fail-level WARNING")
    service.run("python manage.py makemigrations --check --dry-run")
    assert " passed" in service.run("pytest -q tests/test_service.py")
    assert " passed" in service.run("pytest -q tests/test_tickets.py")

    service.run(service.procfile()["release"])
    schedules = "['deliveries-resume', 'records-delete', 'tasks-resume', 'tickets-close']"
    assert service.shell(SCHEDULES).strip() == schedules
    web, worker, beat = (service.start(name) for name in ("web", "worker", "beat"))
    web.wait_for_text("Listening at")
    worker.wait_for_text(" ready.", seconds=60)
    beat.wait_for_text("Sending due task tickets-close")
    wait_for(lambda: service.get("/health/ready")[0] == 200, 20, web.text)
    service.shell(
        'u = User.objects.create_user("anna"); Ticket.objects.create(owner=u, title="Help")'
    )
    is_closed = "print(Ticket.objects.get().closed_at is not None)"
    wait_for(lambda: service.shell(is_closed).strip() == "True", 30, worker.text)
    for path in ("/", "/admin/login/", "/api/docs/", "/api/schema/"):
        assert service.get(path)[0] == 200
    service.run("python manage.py doctor")
    assert [process.stop() for process in (beat, web, worker)] == [0, 0, 0]
