"""Delete old rows, in batches that hold no lock for long.

``KEEP_DAYS`` says how many days the rows of each kind are kept. A delivery is kept for at least as
long as its digest can be sent, and its run is finished before it is deleted, so that no e-mail is
sent again.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import datetime, timedelta
from functools import partial
from typing import Any

from django.apps import apps
from django.conf import settings
from django.db import connection
from django.db.models import Max, Model, QuerySet
from django.utils import timezone

from ..mail.digests import get_digests
from ..models import DelayedTask, DigestDelivery, DigestRun, Heartbeat, ResumableRun, ScheduleRun
from ..models import TaskRun
from ..worker.record import KEEP_ROWS

#: The default of ``KEEP_DAYS``; None keeps rows forever.
DEFAULTS: dict[str, int | None] = {
    "deliveries": 90,
    "runs": 7,
    "delayed": 1,
    "heartbeats": 1,
    "admin_log": None,
}

#: When the rows of a table were written, in the order of their keys.
TIMES = {
    DigestDelivery: "created_at",
    DigestRun: "period_end",
    ScheduleRun: "due_at",
    TaskRun: "started_at",
    ResumableRun: "created_at",
}

DAY = timedelta(days=1)

#: Rows in a transaction.
BATCH = 2000

#: How long one call may delete, in seconds. The schedule calls it every hour.
SECONDS = 100


def get_days() -> dict[str, int | None]:
    """Return how many days the rows of each kind are kept."""
    return {**DEFAULTS, **settings.KEEP_DAYS}


def find_problems() -> list[str]:
    """Return what is wrong with ``KEEP_DAYS``."""
    problems = [f"{name!r} is unknown" for name in settings.KEEP_DAYS.keys() - DEFAULTS.keys()]
    for name, days in settings.KEEP_DAYS.items():
        if days is not None and (type(days) is not int or days < 1):
            problems.append(f"{name!r} is {days!r}, but must be None or at least 1")
    return sorted(problems)


def delete_old() -> None:
    """Delete the old rows of all kinds, for at most about ``SECONDS``."""
    until = time.monotonic() + SECONDS
    now = timezone.now()
    for batches in get_batches(now):
        for _ in batches:
            if time.monotonic() > until:
                return


def get_batches(now: datetime) -> list[Iterator[int]]:
    """Return an iterator for each kind of rows, which deletes a batch at each step."""
    found: list[Iterator[int]] = []

    def add(kind: str, get: Callable[[datetime], Iterator[int]]) -> None:
        if (days := get_days()[kind]) is not None:
            found.append(get(now - timedelta(days=days)))

    add("heartbeats", lambda end: by_time(Heartbeat.objects, "seen_at", end))
    add("delayed", lambda end: by_time(DelayedTask.objects, "published_at", end))
    add("runs", lambda end: by_time(ScheduleRun.objects, "due_at", end))
    add("runs", lambda end: by_time(TaskRun.objects, "started_at", end))
    ended = ResumableRun.objects.filter(status__in=["failed", "finished"])
    add("runs", lambda end: by_time(ended, "updated_at", end))
    newest = TaskRun.objects.aggregate(newest=Max("pk"))["newest"] or 0
    found.append(by_key(TaskRun, lambda row: bool(row.pk <= newest - KEEP_ROWS)))
    add("deliveries", delete_deliveries)
    if apps.is_installed("django.contrib.sessions"):
        sessions = apps.get_model("sessions", "Session")._default_manager
        found.append(by_time(sessions, "expire_date", now))
    if apps.is_installed("django.contrib.admin"):
        log = apps.get_model("admin", "LogEntry")
        add("admin_log", lambda end: by_key(log, lambda row: bool(row.action_time < end)))
    return found


def by_time(rows: Any, field: str, end: datetime) -> Iterator[int]:
    """Delete the rows whose time is before ``end``; the field has an index, or few rows."""
    old: QuerySet[Any] = rows.filter(**{f"{field}__lt": end}).order_by(field)
    while keys := list(old.values_list("pk", flat=True)[:BATCH]):
        yield delete(old.model, keys)


def by_key(model: type[Model], is_old: Callable[[Any], bool]) -> Iterator[int]:
    """Delete old rows of a table in the order of their keys, until a batch has none."""
    last: Any = 0
    while rows := list(model._default_manager.filter(pk__gt=last).order_by("pk")[:BATCH]):
        last = rows[-1].pk
        keys = [row.pk for row in rows if is_old(row)]
        if not keys:
            return
        yield delete(model, keys)


def delete(model: type[Model], keys: list[Any]) -> int:
    """Delete rows by key; return their number."""
    count, _ = model._default_manager.filter(pk__in=keys).delete()
    return count


def delete_deliveries(end: datetime) -> Iterator[int]:
    """Delete the deliveries of runs for periods before ``end``, and then the runs.

    The last run of each digest is kept: the next one starts where it ended.
    """
    ages = [digest.max_age for digest in get_digests().values()]
    end = min(end, timezone.now() - max(ages, default=timedelta(0)) - timedelta(days=1))
    old = DigestRun.objects.filter(period_end__lt=end)
    # A message of such a run that is still in the broker must not send it.
    old.filter(finished_at=None).update(queued_at=timezone.now(), finished_at=timezone.now())
    yield from by_key(DigestDelivery, lambda row: bool(row.period_end < end))
    newest = DigestRun.objects.values("digest").annotate(last=Max("period_end"))
    for row in newest:
        runs = old.filter(digest=row["digest"], period_end__lt=row["last"])
        yield from by_time(runs, "period_end", end)


# Sizes


def get_sizes() -> dict[str, int]:
    """Return the size of each table of the library in bytes, the largest first; PostgreSQL only."""
    if connection.vendor != "postgresql":
        return {}
    tables = [model._meta.db_table for model in apps.get_app_config("ops").get_models()]
    for label in ("sessions.Session", "admin.LogEntry", "django_celery_results.TaskResult"):
        with suppress(LookupError):
            tables.append(apps.get_model(label)._meta.db_table)
    with connection.cursor() as cursor:
        cursor.execute(
            "SELECT relname, pg_total_relation_size(oid) FROM pg_class "
            "WHERE relname = ANY(%s) AND relkind = 'r' ORDER BY 2 DESC",
            [tables],
        )
        return dict(cursor.fetchall())


def get_growth(sizes: dict[str, int]) -> dict[str, int]:
    """Return how many bytes a day tables have grown since their oldest row, of those with a time."""
    fields: dict[type[Model], str] = dict(TIMES)
    with suppress(LookupError):
        fields[apps.get_model("admin", "LogEntry")] = "action_time"
    growth = {}
    for model, field in fields.items():
        table = model._meta.db_table
        first = model._default_manager.order_by("pk").values_list(field, flat=True).first()
        if first is not None and table in sizes:
            growth[table] = round(sizes[table] / max((timezone.now() - first) / DAY, 1))
    return growth
