"""Tasks that deliver digests and notifications. Each may run twice without harm."""

import logging
from collections.abc import Callable
from datetime import datetime, timedelta
from itertools import islice
from typing import Any

from celery import shared_task
from django.utils import timezone
from django_celery_beat.models import PeriodicTask
from kombu.utils.json import loads

from . import deliveries
from .digests import get_digest, get_digests, get_notification, get_notifications
from .models import Attempt, DigestRun

logger = logging.getLogger(__name__)

#: Seconds to wait while another process is sending the same messages.
BUSY_SECONDS = 10

#: Time between two runs of ``resume_deliveries``, after which the next one queues again what
#: it queued, in seconds.
RESUME_SECONDS = 60

#: Age of a ``resume_deliveries`` at which a later one does its work.
RESUME_EXPIRES = timedelta(minutes=5)

#: Age at which an unfinished run is queued again.
STALE_AFTER = timedelta(minutes=10)

#: Age up to which interrupted deliveries are queued again.
RESUME_WINDOW = timedelta(days=3)

#: Notifications of one kind that are queued again at once.
RESUME_LIMIT = 500

#: The function that returns the digest's name, by the name of its task.
DIGEST_TASKS: dict[str, Callable[..., str]] = {}


def digest_task(function: Callable[..., str]) -> Any:
    """Decorator: turn a function that returns a digest's name into a task that sends it.

    A schedule can run the task, whose name is the function's dotted path. The task sends
    the digest for the last period before it was queued.
    """
    name = f"{function.__module__}.{function.__name__}"

    def run(self: Any, *args: Any, **kwargs: Any) -> None:
        start_digest(function(*args, **kwargs), self.queued_at)

    run.__doc__ = function.__doc__
    DIGEST_TASKS[name] = function
    return shared_task(bind=True, name=name)(run)


def start_digest(name: str, now: datetime) -> None:
    """Queue the digest for the last period before ``now``, unless that is done already.

    Raises ValueError for an unknown name.
    """
    period_start, period_end = get_digest(name).period(now)
    run, _ = DigestRun.objects.get_or_create(
        digest=name, period_start=period_start, defaults={"period_end": period_end}
    )
    if run.queued_at is None:
        queue_chunks(run)


def queue_chunks(run: DigestRun) -> None:
    """Queue a task for each chunk with remaining recipients; finish the run if there is none."""
    queued = 0
    for chunk in deliveries.remaining_chunks(run):
        # Another one is queued after this time as long as recipients are left.
        send_digest_chunk.apply_async((run.pk, chunk), expires=STALE_AFTER.total_seconds())
        queued += 1
    run.queued_at = timezone.now()
    run.finished_at = None if queued else run.queued_at
    run.save(update_fields=["queued_at", "finished_at"])
    logger.info("Digest %s: %d chunks queued", run, queued)


def notify_on_commit(name: str, pk: Any) -> None:
    """Queue the notification of that name about an object once the transaction commits."""
    task: Any = send_notification
    task.delay_on_commit(name, pk)


@shared_task(name="ops.send_digest_chunk", bind=True)
def send_digest_chunk(self: Any, run_pk: int, chunk: int) -> None:
    """Send a digest to the recipients of one chunk."""
    run = DigestRun.objects.get(pk=run_pk)
    try:
        complete = deliveries.send_chunk(run, chunk)
    except deliveries.Busy:
        requeue(self)
        return
    if not complete:
        send_digest_chunk.delay(run_pk, chunk)


@shared_task(name="ops.send_notification", bind=True)
def send_notification(self: Any, name: str, pk: Any) -> None:
    """Send the notification of that name about the object with that primary key."""
    try:
        deliveries.send_notification(get_notification(name), pk)
    except deliveries.Busy:
        requeue(self)


def requeue(task: Any) -> None:
    """Queue the running task again for later."""
    task.apply_async(task.request.args, task.request.kwargs, countdown=BUSY_SECONDS)


@shared_task(name="ops.resume_deliveries", bind=True)
def resume_deliveries(self: Any) -> None:
    """Queue again what a crash, a mail server or an unavailable broker interrupted."""
    now = timezone.now()
    if now - self.queued_at > RESUME_EXPIRES:
        return  # While no worker ran, others were queued.
    resume_schedules(now - RESUME_WINDOW)
    resume_runs(now - RESUME_WINDOW, now - STALE_AFTER)
    resume_notifications(now - RESUME_WINDOW, now - timedelta(minutes=1))
    # What became due so long ago is not resumed any more.
    Attempt.objects.filter(next_at__lt=now - RESUME_WINDOW).delete()


def resume_schedules(since: datetime) -> None:
    """Start the digests of schedules that were due since then.

    Beat stores when it ran a schedule even if the broker did not accept the task.
    """
    schedules = PeriodicTask.objects.filter(
        enabled=True, task__in=DIGEST_TASKS, last_run_at__gte=since
    )
    for schedule in schedules:
        try:
            args, kwargs = loads(schedule.args), loads(schedule.kwargs)
            start_digest(DIGEST_TASKS[schedule.task](*args, **kwargs), schedule.last_run_at)
        except (TypeError, ValueError) as error:
            # A mistake in one schedule must not stop the others.
            logger.error("Schedule %s cannot run: %s", schedule.name, error)


def resume_runs(since: datetime, queued_before: datetime) -> None:
    """Queue the chunks of unfinished runs again, or finish them.

    Chunks with an attempt that is due do not wait until the run was queued before that time.
    """
    runs = DigestRun.objects.filter(
        digest__in=get_digests(), finished_at=None, period_end__gte=since
    )
    for run in runs:
        if run.queued_at is None:
            continue  # Its schedule starts it.
        if run.queued_at < queued_before:
            queue_chunks(run)
        else:
            for chunk in deliveries.due_chunks(run):
                send_digest_chunk.apply_async((run.pk, chunk), expires=RESUME_SECONDS)


def resume_notifications(since: datetime, due_before: datetime) -> None:
    """Queue the notifications again that became due between these times."""
    for name, notification in get_notifications().items():
        field = notification.due_field
        due = {f"{field}__gte": since, f"{field}__lt": due_before}
        later = Attempt.objects.filter(
            message_id__startswith=f"{name}.", next_at__gt=timezone.now()
        )
        skipped = set(later.values_list("message_id", flat=True))
        keys = notification.waiting().filter(**due).values_list("pk", flat=True).iterator()
        for pk in islice((pk for pk in keys if f"{name}.{pk}" not in skipped), RESUME_LIMIT):
            send_notification.apply_async((name, pk), expires=RESUME_SECONDS)
