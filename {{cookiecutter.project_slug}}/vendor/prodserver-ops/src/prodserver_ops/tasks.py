"""The tasks of the app ``ops``, which Celery finds here: maintenance and e-mail."""

from datetime import timedelta

from celery import current_app, shared_task
from django.conf import settings
from django.utils import timezone

from .mail import tasks as mail_tasks  # noqa: F401
from .models import DelayedTask, Heartbeat, ResumableRun, ScheduleRun
from .worker import continuations, record
from .worker.app import CoalescingTask

#: How long the records of runs and heartbeats are kept.
KEEP_RUNS = timedelta(days=7)
KEEP_HEARTBEATS = timedelta(days=1)
KEEP_DELAYED = timedelta(days=1)


@shared_task(name="ops.delete_records", base=CoalescingTask)
def delete_records() -> None:
    """Delete records that are no longer needed: runs, heartbeats, tasks and their results."""
    ScheduleRun.objects.filter(due_at__lt=timezone.now() - KEEP_RUNS).delete()
    Heartbeat.objects.filter(seen_at__lt=timezone.now() - KEEP_HEARTBEATS).delete()
    ResumableRun.objects.filter(
        status__in=["failed", "finished"], updated_at__lt=timezone.now() - KEEP_RUNS
    ).delete()
    DelayedTask.objects.filter(published_at__lt=timezone.now() - KEEP_DELAYED).delete()
    record.delete_old_runs()
    if settings.CELERY_RESULT_BACKEND:
        current_app.backend.cleanup()


@shared_task(name="ops.resume_tasks", base=CoalescingTask)
def resume_tasks() -> None:
    """Queue the resumable tasks again whose workers were lost."""
    continuations.requeue_lost()
