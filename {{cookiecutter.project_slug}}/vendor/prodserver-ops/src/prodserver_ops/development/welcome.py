"""The part of the home page for developers: what runs, what was done, and what to do next.

The template tag ``welcome`` shows it while ``DEBUG`` is on, and a service includes the URLs of this
module. A file ``try.html`` among the templates of the service is shown with it.
"""

from contextlib import suppress
from pathlib import Path
from typing import Any

from celery import current_app
from django.conf import settings
from django.db import DatabaseError
from django.http import Http404, HttpRequest, HttpResponse
from django.shortcuts import render
from django.template import TemplateDoesNotExist
from django.template.loader import get_template
from django.urls import path
from django_celery_beat.models import PeriodicTask

from ..console import doctor
from ..core.commands import get_line
from ..mail import console
from ..models import TaskRun
from ..scheduling import heartbeats, timing
from . import overview, reloading

#: How many runs, schedules and e-mails are shown.
SHOWN = 5

#: Tasks that run every minute.
HIDDEN_TASKS = ("ops.resume_deliveries", "ops.resume_tasks")

#: What to type next: the command by what it is for. Those of ``manage.py`` have no prefix.
COMMANDS = {
    "Create an administrator": "createsuperuser",
    "Check the service": "doctor",
    "List the schedules": "schedules",
    "Send a test e-mail": "sendtestemail you@example.com",
}


def get_processes() -> list[dict[str, str]]:
    """Return the processes with their states, and the error of one that cannot start."""
    missing = overview.get_missing()
    processes = []
    for name in ["web", *heartbeats.get_processes()]:
        lines = reloading.get_failure(name).strip().splitlines()
        state = "not running" if lines or name in missing else "running"
        start = get_line(f"prodserver {name} --reload")
        processes.append(
            {"name": name, "state": state, "error": lines[-1] if lines else "", "start": start}
        )
    return processes


def get_next_runs() -> list[dict[str, Any]]:
    """Return the next runs of the schedules, those that are due first at the top."""
    current_app.loader.import_default_modules()
    rows = PeriodicTask.objects.filter(enabled=True).exclude(task__in=HIDDEN_TASKS)
    schedules = [doctor.describe_schedule(row) for row in rows.select_related(*timing.RELATIONS)]
    due = [schedule for schedule in schedules if schedule["next_run"]]
    return sorted(due, key=lambda schedule: schedule["next_run"])[:SHOWN]


def get_state() -> dict[str, Any]:
    """Return what changes while the page is open."""
    try:
        return {
            "processes": get_processes(),
            "next_runs": get_next_runs(),
            "last_runs": TaskRun.objects.exclude(name__in=HIDDEN_TASKS).order_by("-pk")[:SHOWN],
            "sent": console.get_latest(SHOWN),
            "has_server": not settings.EMAIL_BACKEND.endswith("console.EmailBackend"),
        }
    except DatabaseError:
        return {"problem": "The database has no tables yet. Run", "command": get_line("migrate")}


def get_context(request: HttpRequest) -> dict[str, Any]:
    """Return the context of the whole part."""
    count = reloading.count_unapplied()
    administrator = None
    with suppress(DatabaseError):
        administrator = overview.get_administrator()
    commands = {label: get_line(command) for label, command in COMMANDS.items()}
    if administrator is not None:
        del commands["Create an administrator"]
    return {
        **({"unapplied": count, "migrate": get_line("migrate")} if count else get_state()),
        "pages": {label: url for label, url in overview.get_pages().items() if label != "Home"},
        "documents": get_documents(),
        "commands": commands | {"Run the tests": get_line("").replace("manage.py", "pytest").strip()},
        "administrator": administrator,
        "site_url": settings.SITE_URL,
        "try_template": find_template("try.html"),
        "request": request,
        "user": getattr(request, "user", None),
    }


def find_template(name: str) -> Any:
    """Return a template of the service, or None."""
    try:
        return get_template(name).template  # type: ignore[attr-defined]
    except TemplateDoesNotExist:
        return None


def get_documents() -> list[str]:
    """Return the names of the Markdown files of the service, such as ``docs/tasks.md``."""
    base = Path(settings.BASE_DIR)
    paths = [*base.glob("README.md"), *sorted(base.glob("docs/*.md"))]
    return [str(each.relative_to(base)) for each in paths]


def show_state(request: HttpRequest) -> HttpResponse:
    """Show what changes while the page is open; without a line in the log."""
    if not settings.DEBUG:
        raise Http404
    response = render(request, "ops/welcome_state.html", get_state())
    response.is_frequent = True  # type: ignore[attr-defined]
    return response


def show_document(request: HttpRequest, name: str) -> HttpResponse:
    """Show a Markdown file of the service as text."""
    if not settings.DEBUG or name not in get_documents():
        raise Http404
    text = Path(settings.BASE_DIR, name).read_text(encoding="utf-8")
    return HttpResponse(text, content_type="text/plain; charset=utf-8")


urlpatterns = [
    path("state/", show_state, name="welcome_state"),
    path("<path:name>", show_document, name="document"),
]
