"""When schedules are due, and since when each has its present timing.

Only a change of the timing, of the start or of *enabled* restarts a schedule; django-celery-beat's
``date_changed`` also changes when another field is saved. Therefore beat stores a signature of
the timing of each schedule, and since when it applies.
"""

from collections.abc import Iterable
from datetime import datetime, timedelta
from hashlib import blake2b
from typing import Any, cast

from celery import current_app
from django.db.models import OuterRef, Subquery
from django.utils import timezone
from django_celery_beat.models import PeriodicTask

from ..core.database import short_transaction
from ..models import ScheduleTiming
from .crontabs import FIELDS, Crontab

#: The kinds of schedules, each a relation of a row.
KINDS = ("crontab", "interval", "solar", "clocked")

#: What a query for schedules must load with them.
RELATIONS = (*KINDS, "ops_timing")

#: The shortest interval of a schedule.
MIN_PERIOD = timedelta(seconds=1)


class InvalidSchedule(Exception):
    """A schedule that cannot run."""


def get_due(row: PeriodicTask, now: datetime) -> datetime | None:
    """Return the last time that a schedule was due and has not run, or None.

    Runs before the last change of its timing do not count, nor do those of a crontab that are
    more than ``CELERY_BEAT_CRON_STARTING_DEADLINE`` ago. Of several that were missed, only the
    last counts.
    """
    since = _get_start(row)
    if row.crontab is not None:
        deadline = current_app.conf.beat_cron_starting_deadline
        if deadline is not None:
            # Exactly that long ago still counts.
            since = max(since, now - timedelta(seconds=deadline, microseconds=1))
        return Crontab.from_row(row.crontab).get_latest(since, now)
    if row.interval is not None:
        period = _get_period(row)
        return since + (now - since) // period * period if now - since >= period else None
    if row.clocked is not None:
        time_of_run: datetime = row.clocked.clocked_time
        has_run = row.last_run_at is not None and row.last_run_at >= time_of_run
        return None if has_run or time_of_run > now else time_of_run
    return now if _get_schedule(row).is_due(since).is_due else None


def get_next(row: PeriodicTask, after: datetime, until: datetime | None = None) -> datetime | None:
    """Return when a schedule is due next after a time.

    For a crontab, return None if that is later than ``until``, or never.
    """
    since = max(_get_start(row), after)
    if row.crontab is not None:
        return Crontab.from_row(row.crontab).get_next(since, until)
    if row.interval is not None:
        start, period = _get_start(row), _get_period(row)
        return start + ((since - start) // period + 1) * period
    if row.clocked is not None:
        time_of_run: datetime = row.clocked.clocked_time
        return max(time_of_run, after)
    return after + timedelta(seconds=_get_schedule(row).is_due(after).next)


def get_latest(row: PeriodicTask, since: datetime, now: datetime) -> datetime | None:
    """Return the last time in a span that a schedule was due, whether it has run or not."""
    if row.crontab is not None:
        changed = get_since(row)
        since = max(since, changed, row.start_time or changed)
        return Crontab.from_row(row.crontab).get_latest(since, now)
    last_run: datetime | None = row.last_run_at
    return last_run if last_run is not None and last_run >= since else None


def _get_start(row: PeriodicTask) -> datetime:
    """Return the time after which a schedule is due: its last run, change or start."""
    start: datetime = max(filter(None, (row.last_run_at, get_since(row))))
    if row.start_time is not None:
        # The start itself counts.
        before = _get_period(row) if row.interval is not None else timedelta(microseconds=1)
        start = max(start, row.start_time - before)
    return start


def _get_period(row: PeriodicTask) -> timedelta:
    period = timedelta(**{row.interval.period: row.interval.every})
    if period < MIN_PERIOD:
        raise InvalidSchedule(f"its interval is shorter than {MIN_PERIOD.seconds} second")
    return period


def _get_schedule(row: PeriodicTask) -> Any:
    if row.scheduler is None:
        raise InvalidSchedule("it has neither a crontab nor an interval")
    return row.schedule


# Changes


def get_since(row: PeriodicTask) -> datetime:
    """Return since when a schedule has its present timing."""
    timing: ScheduleTiming | None = getattr(row, "ops_timing", None)
    # A new row has no date yet.
    since = timing.since if timing is not None else row.date_changed or timezone.now()
    return cast(datetime, since)


def get_signature(row: PeriodicTask) -> str:
    """Return a text that changes with the timing of an enabled schedule."""
    values: list[Any] = [row.start_time, row.one_off]
    if row.crontab is not None:
        values += [getattr(row.crontab, name) for name in FIELDS] + [row.crontab.timezone]
    if row.interval is not None:
        values += [row.interval.every, row.interval.period]
    if row.solar is not None:
        values += [row.solar.event, row.solar.latitude, row.solar.longitude]
    if row.clocked is not None:
        values += [row.clocked.clocked_time]
    return blake2b(repr(values).encode(), digest_size=16).hexdigest()


def note_changes(rows: Iterable[PeriodicTask], now: datetime) -> None:
    """Store since when each enabled schedule has its timing, where that has changed.

    A change that bumped ``date_changed`` applies since then, another one, such as that of
    ``queryset.update()``, since now.
    """
    changed = []
    for row in rows:
        signature = get_signature(row)
        known: ScheduleTiming | None = getattr(row, "ops_timing", None)
        since = row.date_changed
        if known is not None and signature == known.signature:
            if row.date_changed == known.date_changed:
                continue
            since = known.since
        elif known is not None and row.date_changed == known.date_changed:
            since = now
        row.ops_timing = ScheduleTiming(
            schedule=row, signature=signature, date_changed=row.date_changed, since=since
        )
        changed.append(row.ops_timing)
    if changed:
        with short_transaction():
            ScheduleTiming.objects.bulk_create(
                changed,
                batch_size=500,
                update_conflicts=True,
                unique_fields=["schedule"],
                update_fields=["signature", "date_changed", "since"],
            )
    # A schedule that is enabled again starts anew.
    schedules = PeriodicTask.objects.filter(pk=OuterRef("schedule"))
    ScheduleTiming.objects.filter(schedule__enabled=False).exclude(signature="").update(
        signature="", date_changed=Subquery(schedules.values("date_changed")[:1])
    )
