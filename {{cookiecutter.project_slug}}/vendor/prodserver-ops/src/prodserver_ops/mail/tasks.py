"""Tasks that deliver digests and notifications. They are idempotent."""

import logging
from collections.abc import Callable
from datetime import datetime, timedelta
from inspect import signature
from typing import Any

from celery import shared_task
from django.utils import timezone
from django_celery_beat.models import PeriodicTask
from kombu.utils.json import loads

from ..models import Attempt, DigestRun
from ..scheduling.restores import find_restore, note_origin
from ..scheduling.timing import RELATIONS, get_latest
from ..worker.app import CoalescingTask
from . import deliveries, transport
from .digests import get_digest, get_digests, get_notification, get_notifications

logger = logging.getLogger(__name__)

#: Seconds to wait while another process is sending the same messages.
BUSY_SECONDS = 10

#: Time between two runs of ``resume_deliveries``, in seconds. The tasks that it queues expire after
#: this time, because the next run queues them again.
RESUME_SECONDS = 60

#: Age at which an unfinished run is queued again.
STALE_AFTER = timedelta(minutes=10)

#: Age at which a notification that was requested is queued again.
NOTIFICATION_GRACE = timedelta(minutes=1)

#: How long after its due time an attempt may still be made.
ATTEMPT_AGE = timedelta(days=8)

#: Maximum number of notifications of one kind that are queued again at once.
RESUME_LIMIT = 500

#: The function that returns the digest's name, by the name of its task.
DIGEST_TASKS: dict[str, Callable[..., str]] = {}


def digest_task(function: Callable[..., str]) -> Any:
    """Decorator: turn a function that returns the name of a digest into a task that sends it.

    A schedule can run the task; its name is the function's dotted path. The task sends the digest
    for the last period before its due time. If it was due several times, only the last one counts.
    """
    name = f"{function.__module__}.{function.__name__}"

    def run(*args: Any, **kwargs: Any) -> None:
        digest = function(*args, **kwargs)
        due = get_due_digests(timezone.now()).get(digest, task.queued_at)
        start_digest(digest, max(due, task.queued_at))

    run.__doc__ = function.__doc__
    # Celery compares the arguments of a message with the signature.
    run.__signature__ = signature(function)  # type: ignore[attr-defined]
    DIGEST_TASKS[name] = function
    task: Any = shared_task(name=name)(run)
    return task


def get_due_digests(now: datetime) -> dict[str, datetime]:
    """Return the last due time of each digest's schedule, by the digest's name.

    Due times that are longer ago than the digest's ``max_age`` are excluded.
    """
    due: dict[str, datetime] = {}
    schedules = PeriodicTask.objects.filter(enabled=True, task__in=DIGEST_TASKS)
    for schedule in schedules.select_related(*RELATIONS):
        try:
            args, kwargs = loads(schedule.args), loads(schedule.kwargs)
            name = DIGEST_TASKS[schedule.task](*args, **kwargs)
            latest = get_latest(schedule, now - get_digest(name).max_age, now)
        except (TypeError, ValueError) as error:
            # A mistake in one schedule must not stop the others.
            logger.error("Schedule %s cannot run: %s", schedule.name, error)
        else:
            if latest is not None:
                due[name] = max(latest, due.get(name, latest))
    return due


def start_digest(name: str, due: datetime) -> None:
    """Queue the digest for the last period before ``due``, unless it is already queued.

    Raises ValueError for an unknown name.
    """
    digest = get_digest(name)
    if find_restore() is not None:
        return  # ``resume_deliveries`` starts it later.
    run = deliveries.get_run(digest, due)
    if run is not None and run.queued_at is None:
        queue_chunks(run)


def queue_chunks(run: DigestRun) -> None:
    """Queue a task for each chunk with remaining recipients; finish the run if there is none."""
    task: Any = send_digest_chunk
    chunks = list(deliveries.remaining_chunks(run))
    # After this time, new tasks are queued as long as recipients remain.
    task.apply_many([(run.pk, chunk) for chunk in chunks], expires=STALE_AFTER.total_seconds())
    run.queued_at = timezone.now()
    run.finished_at = None if chunks else run.queued_at
    run.save(update_fields=["queued_at", "finished_at"])
    logger.info("Digest %s: chunks queued: %d", run, len(chunks))


def notify_on_commit(name: str, pk: Any) -> None:
    """Request the notification with this name about an object.

    The request is stored in the current transaction, and the task is queued when it commits.
    """
    deliveries.request_notification(name, pk)
    task: Any = send_notification
    task.delay_on_commit(name, pk)


@shared_task(name="ops.send_digest_chunk", bind=True)
def send_digest_chunk(self: Any, run_pk: int, chunk: int) -> None:
    """Send a digest to the recipients of one chunk."""
    run = DigestRun.objects.filter(pk=run_pk).first()
    if run is None:
        return  # It was merged into a later run.
    try:
        complete = deliveries.send_chunk(run, chunk)
    except deliveries.Busy:
        queue_later(self, BUSY_SECONDS)
    except transport.Paused:
        queue_later(self, transport.PAUSE_SECONDS)
    except (OSError, transport.ServerFailed):
        queue_later(self, transport.PAUSE_SECONDS)
        raise
    else:
        if not complete:
            queue_later(self, 0)


@shared_task(name="ops.send_notification", bind=True)
def send_notification(self: Any, name: str, pk: Any) -> None:
    """Send the notification with this name about the object with this primary key."""
    try:
        deliveries.send_notification(get_notification(name), pk)
    except deliveries.Busy:
        queue_later(self, BUSY_SECONDS)
    except transport.Paused:
        pass  # ``resume_deliveries`` queues it again.


def queue_later(task: Any, seconds: float) -> None:
    """Queue the running task again for later, with the same expiry."""
    expires = task.request.expires and datetime.fromisoformat(task.request.expires)
    task.apply_async(task.request.args, task.request.kwargs, countdown=seconds, expires=expires)


@shared_task(name="ops.resume_deliveries", base=CoalescingTask)
def resume_deliveries() -> None:
    """Queue digests that beat did not queue, and deliveries that were interrupted."""
    now = timezone.now()
    if restore := find_restore():
        logger.warning("E-mail waits: %s; run python manage.py restored", restore)
        return
    note_origin()
    for name, due in get_due_digests(now).items():
        start_digest(name, due)
    if transport.is_paused():
        return
    resume_runs(now)
    resume_notifications(now)
    given_up, _ = Attempt.objects.filter(next_at__lt=now - ATTEMPT_AGE).delete()
    if given_up:
        logger.error("E-mails given up after %s: %d", ATTEMPT_AGE, given_up)


def resume_runs(now: datetime) -> None:
    """Queue the chunks of unfinished runs again, or finish them.

    Chunks with a due attempt are queued even if the run is not stale.
    """
    for name, digest in get_digests().items():
        runs = DigestRun.objects.filter(
            digest=name, finished_at=None, period_end__gte=now - digest.max_age
        )
        for run in runs:
            if run.queued_at is None or run.queued_at < now - STALE_AFTER:
                queue_chunks(run)
                continue
            task: Any = send_digest_chunk
            task.apply_many(
                [(run.pk, chunk) for chunk in deliveries.due_chunks(run)], expires=RESUME_SECONDS
            )


def resume_notifications(now: datetime) -> None:
    """Queue the notifications again whose next attempt is due."""
    for name in get_notifications():
        due = Attempt.objects.filter(
            message_id__startswith=f"{name}.", next_at__lt=now - NOTIFICATION_GRACE
        )
        message_ids = due.order_by("next_at").values_list("message_id", flat=True)
        task: Any = send_notification
        task.apply_many(
            [(name, key.partition(".")[2]) for key in message_ids[:RESUME_LIMIT]],
            expires=RESUME_SECONDS,
        )
