"""The tasks of the app ``ops``, which Celery finds here: maintenance and e-mail."""

import subprocess
import sys

from celery import current_app, shared_task
from django.conf import settings

from .console import retention
from .core.commands import get_script
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


class DrillFailedError(Exception):
    """The newest backup would not bring the service back."""


@shared_task(name="ops.drill", soft_time_limit=1500, time_limit=1600)
def drill() -> str:
    """Try the newest backup of ``BACKUP_PATH``; raise DrillFailedError with what it lacks."""
    command = [sys.executable, get_script(), "drill"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        try:
            output = process.communicate()[0].decode(errors="replace")
        finally:
            process.terminate()
    if process.returncode:
        raise DrillFailedError(output[-400:])  # The problems and the verdict
    return output
