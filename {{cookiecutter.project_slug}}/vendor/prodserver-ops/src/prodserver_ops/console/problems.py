"""The problems that ``alerts.py`` looks for once a minute.

A function for each kind returns messages by name. It gets the open alerts of its kind, by name
too, and returns their messages again where it cannot know whether the problem is over.
"""

import time
from collections import defaultdict
from collections.abc import Callable
from datetime import datetime, timedelta
from functools import partial
from itertools import pairwise
from threading import Thread

from celery import current_app
from django.conf import settings
from django.db.models import Count, Exists, F, Min, OuterRef, Q, Subquery
from django.db.models.functions import Now
from django.utils import timezone
from django_celery_beat.models import PeriodicTask

from .. import broker
from ..core import concurrently
from ..core.limits import entries, get_key
from ..mail import transport
from ..models import Alert, ScheduleRun, TaskRun
from ..scheduling import heartbeats, queues, validation
from ..scheduling.claims import started_within_limit
from ..scheduling.restores import find_restore
from ..scheduling.timing import RELATIONS
from ..worker.app import get_failed_queue

#: The age from which an unpublished run is late, and one that no worker has started.
UNPUBLISHED, UNSTARTED = timedelta(minutes=5), timedelta(minutes=10)

#: A queue keeps growing if it has more messages than the first number, and had more than before in
#: the second number of checks.
QUEUE_LENGTH, GROWING = 1000, 3

#: How long the numbers of messages are kept for the next check, in seconds.
KEEP_LENGTHS = 600

#: About how many schedules a check validates. If there are more, each check takes the next part.
VALIDATED = 1000

#: How long several runs of a schedule may wait or run, and the age of the runs that are considered.
PILE_UP, PILE_UP_AGE = timedelta(minutes=1), timedelta(days=1)

#: How long the broker may take, in seconds.
TIMEOUT = 10

#: Schedules in use. Beat disables one that runs once when it queues the run.
IN_USE = PeriodicTask.objects.filter(Q(enabled=True) | Q(one_off=True))

FINISHED = TaskRun.objects.filter(status__in=[TaskRun.Status.SUCCEEDED, TaskRun.Status.FAILED])

type Known = dict[str, Alert]
type Found = dict[str, str]

#: The thread that counts messages: one that hangs is not started again.
_running: dict[str, Thread] = {}


def find_missing(known: Known) -> Found:
    """Return the names of the processes that are not running."""
    missing = set(heartbeats.get_processes()) - heartbeats.get_alive()
    return {name: f"No {name} is running: there is no recent heartbeat" for name in missing}


def find_queues(known: Known) -> Found:
    """Return the queues that keep growing, that no process consumes, or with tasks that were given up.

    The name of an unavailable broker is an empty string.
    """
    names, failed = queues.get_known(), get_failed_queue()
    count = partial(broker.count_messages, current_app, [*names, failed], TIMEOUT)
    counts = concurrently.run({"": count}, TIMEOUT, _running).get("", TimeoutError())
    if isinstance(counts, Exception):
        kept = {name: alert.message for name, alert in known.items()}
        return kept | {"": f"The broker is unavailable: {type(counts).__name__}"}
    found = {}
    if counts[failed]:
        found[failed] = f"Tasks were given up; they are in the queue {failed}: {counts[failed]}"
    unconsumed = queues.describe_unconsumed({name: counts[name] for name in names})
    for name in names:
        if name in unconsumed:
            found[name] = f"Messages are not consumed: {unconsumed[name]}"
        elif counts[name] > QUEUE_LENGTH:
            key = get_key("queue-lengths", name)
            lengths = [*entries.get(key, []), counts[name]][-GROWING - 1 :]
            entries.set(key, lengths, KEEP_LENGTHS)
            grows = len(lengths) > GROWING and all(a < b for a, b in pairwise(lengths))
            if grows or name in known:
                found[name] = f"The queue {name} keeps growing, and has more than {QUEUE_LENGTH} messages"
    return found


def find_email(known: Known) -> Found:
    """Return why e-mail waits or is paused."""
    if restore := find_restore():
        return {"": f"E-mail waits: {restore}; run python manage.py restored"}
    if (failures := transport.get_failures()) and failures.is_general:
        return {"": f"E-mail is paused, because the mail server accepts none: {failures.reason}"}
    return {}


def find_faulty(known: Known) -> Found:
    """Return the schedules that cannot run."""
    rows = PeriodicTask.objects.filter(enabled=True).select_related(*RELATIONS)
    parts = rows.count() // VALIDATED + 1
    part = int(time.time() / 60) % parts
    found = {
        name: alert.message
        for name, alert in known.items()
        if int(name) % parts != part and not alert.misses
    }
    for row in rows.annotate(part=F("pk") % parts).filter(part=part):
        try:
            validation.check(row)
        except Exception as error:
            found[str(row.pk)] = f"Schedule {row.name} cannot run: {error}"
    return found


def find_late(known: Known) -> Found:
    """Return the schedules with a run that is not queued, or that no worker has started."""
    runs = ScheduleRun.objects.order_by("-due_at")
    started = runs.filter(started_at__isnull=False)
    # An equation would let PostgreSQL look for a schedule without runs in those of all schedules.
    one = Q(schedule__gte=OuterRef("pk"), schedule__lte=OuterRef("pk"))
    before = runs.filter(one, due_at__lt=Now() - UNSTARTED).order_by("-schedule_id", "-due_at")
    last = IN_USE.annotate(last=Subquery(before.values("pk")[:1])).values("last")
    # Each has an index of its own, which PostgreSQL does not use for both at once.
    unpublished = Q(published_at=None, created_at__lt=Now() - UNPUBLISHED)
    unstarted = Q(pk__in=last, started_at=None, published_at__lt=Now() - UNSTARTED)
    later = started.filter(schedule=OuterRef("schedule"), due_at__gt=OuterRef("due_at"))
    rows = runs.filter(~Exists(later), schedule__in=IN_USE).select_related("schedule")
    late = sorted([*rows.filter(unpublished), *rows.filter(unstarted)], key=lambda run: run.due_at)
    found = {
        str(run.schedule_id): f"Schedule {run.schedule.name} is late: its run due at "
        f"{show(run.due_at)} has not been {'started' if run.published_at else 'queued'}"
        for run in reversed(late)
    }
    # Beat deletes a run that it cannot queue. The schedule recovers when its next run starts.
    latest = started.filter(schedule=OuterRef("pk")).values("started_at")[:1]
    rest = PeriodicTask.objects.filter(pk__in=known.keys() - found.keys(), enabled=True)
    for row in rest.annotate(last=Subquery(latest)):
        if row.last is None or row.last < known[str(row.pk)].since:
            found[str(row.pk)] = known[str(row.pk)].message
    return found


def find_failed(known: Known) -> Found:
    """Return the schedules whose last run failed."""
    finished = FINISHED.filter(schedule=OuterRef("pk")).order_by("-pk")
    last = IN_USE.annotate(last=Subquery(finished.values("pk")[:1])).values("last")
    runs = TaskRun.objects.filter(pk__in=last, status=TaskRun.Status.FAILED)
    found = {
        str(run.schedule_id): f"Schedule {run.schedule and run.schedule.name} failed, {show(run.started_at)}: {run.error}"
        for run in runs.select_related("schedule")
    }
    # The record has only the last days. A schedule without a run in it may not have recovered.
    rest = PeriodicTask.objects.filter(pk__in=known.keys() - found.keys(), enabled=True)
    for row in rest.filter(~Exists(finished)):
        found[str(row.pk)] = known[str(row.pk)].message
    return found


def find_pile_ups() -> dict[int, str]:
    """Return the schedules with several runs that have been waiting or running for a minute."""
    now = timezone.now()
    runs = ScheduleRun.objects.filter(due_at__gt=now - PILE_UP_AGE).order_by()
    # A message from before the last run that was started may be lost, and others may expire.
    later = runs.filter(
        schedule=OuterRef("schedule"), due_at__gt=OuterRef("due_at"), started_at__isnull=False
    )
    waiting = runs.filter(published_at__isnull=False, started_at=None)
    waiting = waiting.filter(~Exists(later), schedule__expire_seconds=None)
    at_work = TaskRun.objects.filter(
        started_within_limit("name"), schedule__isnull=False, status=TaskRun.Status.RUNNING
    )
    counts: dict[int, list[tuple[int, str, datetime]]] = defaultdict(list)
    for query, field, text in (
        (waiting, "published_at", "waiting"),
        (at_work, "started_at", "running"),
    ):
        for pk, number, since in query.values_list("schedule").annotate(Count("pk"), Min(field)):
            counts[pk].append((number, text, since))
    return {
        pk: "its runs pile up: " + ", ".join(f"{number} {text}" for number, text, _ in parts)
        for pk, parts in counts.items()
        if sum(number for number, _, _ in parts) > 1
        and min(since for _, _, since in parts) < now - PILE_UP
    }


FINDERS: dict[str, Callable[[Known], Found]] = {
    "process": find_missing,
    "queue": find_queues,
    "email": find_email,
    "faulty": find_faulty,
    "late": find_late,
    "failed": find_failed,
}


def show(moment: datetime) -> str:
    """Return a time in the service's time zone."""
    return f"{timezone.localtime(moment):%Y-%m-%d %H:%M %Z}"
