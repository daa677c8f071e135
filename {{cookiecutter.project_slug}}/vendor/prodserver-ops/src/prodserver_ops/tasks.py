"""The tasks of the app ``ops``, which Celery finds here: maintenance and e-mail."""

from celery import current_app, shared_task
from django.conf import settings

from .console import retention
from .mail import tasks as mail_tasks  # noqa: F401
from .worker import continuations
from .worker.app import CoalescingTask

@shared_task(name="ops.delete_records", base=CoalescingTask)
def delete_records() -> None:
    """Delete what is no longer needed: runs, deliveries, sessions, results; see ``KEEP_DAYS``."""
    retention.delete_old()
    if settings.CELERY_RESULT_BACKEND:
        current_app.backend.cleanup()


@shared_task(name="ops.resume_tasks", base=CoalescingTask)
def resume_tasks() -> None:
    """Queue the resumable tasks again whose workers were lost."""
    continuations.requeue_lost()
