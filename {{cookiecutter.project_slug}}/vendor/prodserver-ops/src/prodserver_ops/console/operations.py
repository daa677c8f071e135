"""The page *Operations* of the admin: schedules, failures, queues and processes."""

import json
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from typing import Any

from celery import current_app
from django.conf import settings
from django.contrib import messages
from django.contrib.admin.models import CHANGE, LogEntry
from django.core.exceptions import PermissionDenied
from django.core.paginator import Page, Paginator
from django.db.models import F, Window
from django.db.models.functions import RowNumber
from django.http import HttpRequest, HttpResponse
from django.shortcuts import get_object_or_404, redirect
from django.template.response import TemplateResponse
from django.urls import path
from django.utils import timezone
from django.views.decorators.http import require_POST
from django_celery_beat.models import PeriodicTask
from kombu.utils.json import loads

from .. import broker
from ..core import concurrently
from ..models import DelayedTask, Heartbeat, ResumableRun, TaskRun
from ..scheduling import heartbeats, queues, timing
from ..scheduling.claims import started_within_limit
from ..scheduling.restores import find_restore
from ..worker import continuations, delayed, record
from ..worker.app import get_failed_queue
from . import alerts, doctor, problems
from .large_tables import LargeTableAdmin

#: How long the page waits for the broker, in seconds.
TIMEOUT = 2

#: Maximum number of alerts, delayed tasks, runs and failures that the page shows.
SHOWN_ALERTS = 20
SHOWN_DELAYED = 10
SHOWN_RUNS = 5
SHOWN_FAILURES = 20
SHOWN_RUNNING = 20

#: How many schedules a page has.
PAGE_SIZE = 200

#: Maximum age of the heartbeats that the page shows, in seconds.
SHOWN_AGE = 3600

#: Maximum age of a recent failure.
RECENT = timedelta(days=1)

#: The permissions to view the page, and to use its buttons.
VIEW_PERMISSION = "ops.view_taskrun"
RUN_PERMISSION = "django_celery_beat.change_periodictask"


@dataclass
class Schedule:
    """A schedule as the page shows it."""

    row: PeriodicTask
    timing: str
    next_run: Any
    problem: str | None
    runs: list[TaskRun] = field(default_factory=list)


def get_schedules(page: Page[PeriodicTask]) -> list[Schedule]:
    """Return the schedules of a page with their latest runs, the newest first."""
    current_app.loader.import_default_modules()  # Registers all tasks.
    schedules, piles = {}, problems.find_pile_ups()
    for row in page:
        state = doctor.describe_schedule(row) if row.enabled else {}
        schedules[row.pk] = Schedule(
            row,
            describe_timing(row),
            state.get("next_run"),
            state.get("problem") or piles.get(row.pk),
        )
    number = Window(RowNumber(), partition_by="schedule_id", order_by=F("pk").desc())
    runs = TaskRun.objects.filter(schedule__in=list(schedules)).annotate(number=number)
    for run in runs.filter(number__lte=SHOWN_RUNS).order_by("-pk"):
        schedules[run.schedule_id or 0].runs.append(run)
    return list(schedules.values())


def describe_timing(row: PeriodicTask) -> str:
    """Describe in words when a schedule runs."""
    if row.crontab is not None:
        with suppress(Exception):  # It may be invalid in any way.
            return f"{row.crontab.human_readable}"
    return str(row.scheduler or "never")


def get_failures() -> list[TaskRun]:
    """Return the latest runs that failed."""
    return list(TaskRun.objects.filter(status="failed").order_by("-pk")[:SHOWN_FAILURES])


def get_running() -> list[TaskRun]:
    """Return running tasks; a run whose worker was killed counts until its time limit."""
    runs = TaskRun.objects.filter(started_within_limit("name"), status="running")
    return list(runs.order_by("-pk")[:SHOWN_RUNNING])


def get_resumable() -> list[ResumableRun]:
    """Return the resumable tasks that have not finished, the newest first."""
    rows = ResumableRun.objects.filter(status__in=["waiting", "running", "failed"])
    return list(rows.order_by("-pk")[:SHOWN_RUNNING])


def get_delayed() -> tuple[int, list[DelayedTask]]:
    """Return how many tasks are not due yet, and the next of them."""
    return delayed.WAITING.count(), list(delayed.WAITING.order_by("due_at")[:SHOWN_DELAYED])


def get_queues() -> tuple[dict[str, int], str]:
    """Return the number of messages by queue, and an error message or an empty string."""
    names = [*queues.get_known(), get_failed_queue()]
    count = partial(broker.count_messages, current_app, names, TIMEOUT)
    match concurrently.run({"": count}, TIMEOUT).get(""):
        case None:
            return {}, f"no result within {TIMEOUT} seconds"
        case Exception() as error:
            return {}, doctor.redact_error(error)
        case counts:
            return counts, ""


def get_heartbeats() -> list[Heartbeat]:
    """Return the heartbeats of the last hour, the newest of a process first."""
    return [row for row in heartbeats.get_heartbeats() if row.age < SHOWN_AGE]


def get_summary() -> dict[str, Any]:
    """Return the summary for the admin's index: schedules, recent failures and processes."""
    since = timezone.now() - RECENT
    failures = TaskRun.objects.filter(status="failed", started_at__gte=since, repeated_at=None)
    alive = heartbeats.get_alive()
    return {
        "schedules": PeriodicTask.objects.filter(enabled=True).count(),
        "failures": failures[:100].count(),
        "missing": [name for name in heartbeats.get_processes() if name not in alive],
    }


def run_task(name: str, args: Any, kwargs: Any, **options: Any) -> None:
    """Queue a task; raise ValueError if it does not exist."""
    current_app.loader.import_default_modules()
    if name not in current_app.tasks:
        raise ValueError(f"The task {name} does not exist.")
    current_app.tasks[name].apply_async(args, kwargs, **options)


class OperationsAdmin(LargeTableAdmin):
    """The page and its buttons, as URLs of a model's admin."""

    def get_urls(self) -> list[Any]:
        """Return the URLs of the page before those of the model."""
        wrap = self.admin_site.admin_view
        return [
            path("operations/", wrap(self.operations_view), name="ops_operations"),
            path("operations/run/<int:pk>/", wrap(require_POST(self.run_view)), name="ops_run"),
            path(
                "operations/repeat/<int:pk>/",
                wrap(require_POST(self.repeat_view)),
                name="ops_repeat",
            ),
            path(
                "operations/continue/<int:pk>/",
                wrap(require_POST(self.continue_view)),
                name="ops_continue",
            ),
            path(
                "operations/cancel/<int:pk>/",
                wrap(require_POST(self.cancel_view)),
                name="ops_cancel",
            ),
            *super().get_urls(),
        ]

    def operations_view(self, request: HttpRequest) -> HttpResponse:
        """Show the page."""
        require(request, VIEW_PERMISSION)
        counts, problem = get_queues()
        number_delayed, next_delayed = get_delayed()
        rows = PeriodicTask.objects.select_related(*timing.RELATIONS).order_by("name")
        page = Paginator(rows, PAGE_SIZE).get_page(request.GET.get("page"))
        context = {
            **self.admin_site.each_context(request),
            "title": "Operations",
            "alerts": [] if alerts.why_off() else alerts.get_open()[:SHOWN_ALERTS],
            "restore": find_restore(),
            "opts": self.opts,
            "schedules": get_schedules(page),
            "page": page,
            "failures": get_failures(),
            "running": get_running(),
            "resumable": get_resumable(),
            "queues": counts,
            "unconsumed": queues.describe_unconsumed(
                {name: count for name, count in counts.items() if name != get_failed_queue()}
            ),
            "queues_problem": problem,
            "number_delayed": number_delayed,
            "next_delayed": next_delayed,
            "heartbeats": get_heartbeats(),
            "template": doctor.check_template().message if doctor.get_record().exists() else "",
            "may_run": request.user.has_perm(RUN_PERMISSION),
        }
        return TemplateResponse(request, "admin/operations.html", context)

    def run_view(self, request: HttpRequest, pk: int) -> HttpResponse:
        """Queue a run of a schedule."""
        require(request, RUN_PERMISSION)
        row = get_object_or_404(PeriodicTask, pk=pk)
        options = {"queue": row.queue} if row.queue else {}
        headers = {"schedule": row.pk}
        if submit(request, row.task, row.args, row.kwargs, row.name, headers=headers, **options):
            LogEntry.objects.log_actions(request.user.pk or 0, [row], CHANGE, "Run now.")
        return redirect("admin:ops_operations")

    def repeat_view(self, request: HttpRequest, pk: int) -> HttpResponse:
        """Queue a failed task again."""
        require(request, RUN_PERMISSION)
        run = get_object_or_404(TaskRun, pk=pk)
        if not run.arguments:
            messages.error(request, f"Not queued: the arguments of {run.name} were not recorded.")
            return redirect("admin:ops_operations")
        failed = TaskRun.objects.filter(pk=pk, status="failed", repeated_at=None)
        if not failed.update(repeated_at=timezone.now()):
            messages.warning(request, f"Not queued: {run.name} has already been tried again.")
            return redirect("admin:ops_operations")
        resumable = ResumableRun.objects.filter(task_id=run.task_id, status="failed").first()
        if resumable is not None:
            if not resume(request, resumable):
                TaskRun.objects.filter(pk=pk).update(repeated_at=None)
            return redirect("admin:ops_operations")
        if run.error.startswith(record.GIVEN_UP):
            if not requeue(request, run):
                TaskRun.objects.filter(pk=pk).update(repeated_at=None)
            return redirect("admin:ops_operations")
        args, kwargs = json.loads(run.arguments)
        headers = {"schedule": run.schedule_id} if run.schedule_id else {}
        if not submit(
            request, run.name, json.dumps(args), json.dumps(kwargs), run.name, headers=headers
        ):
            TaskRun.objects.filter(pk=pk).update(repeated_at=None)
        return redirect("admin:ops_operations")

    def continue_view(self, request: HttpRequest, pk: int) -> HttpResponse:
        """Queue a resumable task again that has failed; it goes on at its cursor."""
        require(request, RUN_PERMISSION)
        row = get_object_or_404(ResumableRun, pk=pk)
        if row.status != ResumableRun.Status.FAILED:
            messages.warning(request, f"Not queued: {row.name} has already been tried again.")
        elif resume(request, row):
            failed = TaskRun.objects.filter(task_id=row.task_id, status="failed")
            failed.update(repeated_at=timezone.now())
        return redirect("admin:ops_operations")

    def cancel_view(self, request: HttpRequest, pk: int) -> HttpResponse:
        """Cancel a task that is not due."""
        require(request, RUN_PERMISSION)
        row = get_object_or_404(DelayedTask, pk=pk)
        if delayed.cancel(DelayedTask.objects.filter(pk=pk)):
            LogEntry.objects.log_actions(request.user.pk or 0, [row], CHANGE, "Cancelled.")
            messages.success(request, f"Cancelled: {row.name}.")
        else:
            messages.warning(request, f"Not cancelled: {row.name} has already been started.")
        return redirect("admin:ops_operations")


def require(request: HttpRequest, permission: str) -> None:
    """Raise PermissionDenied unless the user has the permission."""
    if not request.user.has_perm(permission):
        raise PermissionDenied


def submit(
    request: HttpRequest, name: str, args: str, kwargs: str, label: str, **options: Any
) -> bool:
    """Queue a task with arguments in JSON, and show a message; return whether it is queued."""
    try:
        run_task(name, loads(args), loads(kwargs), **options)
    except Exception as error:
        messages.error(request, f"Not queued: {label}: {doctor.redact_error(error)}")
        return False
    messages.success(request, f"Queued: {label}.")
    return True


def requeue(request: HttpRequest, run: TaskRun) -> bool:
    """Requeue the message of a run that was given up, and show a message; return whether it is queued."""
    from ..worker import failed  # Loads Celery's worker.

    try:
        count = failed.requeue(
            current_app, lambda message: record.clean_id(message.headers.get("id")) == run.task_id
        )
    except Exception as error:
        messages.error(request, f"Not queued: {run.name}: {doctor.redact_error(error)}")
        return False
    if not count:
        messages.error(request, f"Not queued: {run.name} is not in the queue of failed tasks.")
        return False
    messages.success(request, f"Queued: {run.name}.")
    return True


def resume(request: HttpRequest, row: ResumableRun) -> bool:
    """Queue a resumable task again, and show a message; return whether it is queued."""
    current_app.loader.import_default_modules()
    try:
        continuations.requeue(row)
    except Exception as error:
        messages.error(request, f"Not queued: {row.name}: {doctor.redact_error(error)}")
        return False
    messages.success(request, f"Queued: {row.name}. It goes on after step {row.steps}.")
    return True
