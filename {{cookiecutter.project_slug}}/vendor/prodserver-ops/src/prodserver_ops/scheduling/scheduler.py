"""The scheduler of beat: each run of a schedule is queued once, when it is due.

Each pass reads the schedules from the database, so that changes take effect immediately. A run is a
row. It is created together with the schedule's new ``last_run_at``, and only while this beat holds
the lease. Then it is published, and published again if that failed or beat was killed. A worker
runs the first message of a run that it receives, and ignores others. Times are those of the
database.
"""

import logging
import time
from datetime import datetime, timedelta
from typing import Any

from celery import current_app
from celery.beat import SchedulingError
from django.db import DatabaseError, InterfaceError, transaction
from django.db.models import F, QuerySet
from django.db.models.functions import Now
from django_celery_beat.models import PeriodicTask
from django_celery_beat.schedulers import DatabaseScheduler, ModelEntry
from kombu.exceptions import OperationalError
from kombu.utils.json import loads

from ..models import ScheduleRun
from . import heartbeats
from .crontabs import Crontab
from .leases import Lease, LostLease

logger = logging.getLogger(__name__)

#: How long beat keeps trying to publish a run.
MAX_DELAY = timedelta(hours=1)

#: How long a run of a task that coalesces may wait before another one is queued.
MAX_WAIT = timedelta(minutes=5)

#: The lease of the beat that dispatches.
lease = Lease("beat")


#: The kinds of schedules, which are relations of ``PeriodicTask``.
KINDS = ("crontab", "interval", "solar", "clocked")


class InvalidSchedule(Exception):
    """A schedule that cannot run."""


# When schedules are due


def get_due(row: PeriodicTask, now: datetime) -> datetime | None:
    """Return the last time that a schedule was due and has not run, or None.

    Due times before the last change of the schedule do not count, nor do due times of a crontab
    that are more than ``CELERY_BEAT_CRON_STARTING_DEADLINE`` ago. If several were missed, only the
    last one counts.
    """
    since = _get_start(row)
    if row.crontab is not None:
        deadline = current_app.conf.beat_cron_starting_deadline
        if deadline is not None:
            # A due time exactly at the deadline still counts.
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

    For a crontab, returns None if it is not due until ``until``.
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
    """Return the last time in a period at which a schedule was due, whether or not it has run."""
    if row.crontab is not None:
        since = max(since, row.date_changed, row.start_time or row.date_changed)
        return Crontab.from_row(row.crontab).get_latest(since, now)
    last_run: datetime | None = row.last_run_at
    return last_run if last_run is not None and last_run >= since else None


def _get_start(row: PeriodicTask) -> datetime:
    """Return the time after which a schedule is due: its last run, change or start."""
    start: datetime = max(filter(None, (row.last_run_at, row.date_changed)))
    if row.start_time is not None:
        # The start time itself counts.
        before = _get_period(row) if row.interval is not None else timedelta(microseconds=1)
        start = max(start, row.start_time - before)
    return start


def _get_period(row: PeriodicTask) -> timedelta:
    return timedelta(**{row.interval.period: row.interval.every})


def _get_schedule(row: PeriodicTask) -> Any:
    if row.scheduler is None:
        raise InvalidSchedule("it has neither a crontab nor an interval")
    return row.schedule


def check_arguments(row: PeriodicTask) -> None:
    """Raise ValueError if the arguments of a schedule are not valid JSON."""
    for text in (row.args or "[]", row.kwargs or "{}", row.headers or "{}"):
        loads(text)


# Dispatch


class Scheduler(DatabaseScheduler):  # type: ignore[misc]
    """A scheduler that keeps no schedules in memory between passes."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.logged: set[str] = set()
        super().__init__(*args, **kwargs)

    def setup_schedule(self) -> None:
        """Create schedules from ``CELERY_BEAT_SCHEDULE`` if there are any."""
        if self.app.conf.beat_schedule:
            super().setup_schedule()

    def all_as_schedule(self) -> dict[str, Any]:
        """Return nothing: each pass reads the database."""
        return {}

    def sync(self) -> None:
        """Do nothing: each run is stored before it is published."""

    def tick(self, *args: Any, **kwargs: Any) -> float:
        """Queue due schedules; return the seconds until the next pass.

        Raises LostLease if another beat has taken over.
        """
        start, now = time.monotonic(), lease.renew()
        until = now + timedelta(seconds=self.max_interval)
        soonest = until
        for row in self.get_rows():
            try:
                if due := get_due(row, now):
                    self.create_run(row, due)
                soonest = min(soonest, get_next(row, now, until) or until)
            except (DatabaseError, InterfaceError, LostLease):
                raise
            except Exception as error:
                # A mistake in one schedule must not stop the others.
                self.log_once(row, error)
        if not self.publish_runs(now):
            return 1
        elapsed = time.monotonic() - start
        return max((soonest - now).total_seconds() - elapsed, 0)

    def get_rows(self) -> QuerySet[PeriodicTask]:
        """Disable expired schedules, and return the enabled ones."""
        PeriodicTask.objects.filter(enabled=True, expires__lte=Now()).update(enabled=False)
        rows: QuerySet[PeriodicTask] = PeriodicTask.objects.filter(enabled=True).order_by("pk")
        return rows.select_related(*KINDS)

    def create_run(self, row: PeriodicTask, due: datetime) -> None:
        """Store a due run, if the schedule is unchanged and this beat still holds the lease."""
        check_arguments(row)
        values: dict[str, Any] = {"last_run_at": due, "total_run_count": F("total_run_count") + 1}
        if row.one_off:
            values["enabled"] = False
        unchanged = PeriodicTask.objects.filter(
            pk=row.pk, enabled=True, last_run_at=row.last_run_at, date_changed=row.date_changed
        )
        with transaction.atomic():
            lease.renew()
            if unchanged.update(**values) and not self.is_waiting(row):
                # Skip an earlier run that could not be published.
                ScheduleRun.objects.filter(schedule=row, published_at=None).delete()
                ScheduleRun.objects.get_or_create(schedule=row, due_at=due)

    def is_waiting(self, row: PeriodicTask) -> bool:
        """Return whether a coalescing task is still waiting in the queue."""
        if not getattr(self.app.tasks.get(row.task), "coalesces", False):
            return False
        waiting = ScheduleRun.objects.filter(
            schedule=row, published_at__isnull=False, started_at=None
        )
        lately = waiting.filter(published_at__gt=Now() - MAX_WAIT)
        if lately.exists():
            return True
        return waiting.exists() and not heartbeats.get_alive() & set(heartbeats.get_workers())

    def publish_runs(self, now: datetime) -> bool:
        """Publish all unpublished runs; return whether the broker is available."""
        runs = ScheduleRun.objects.filter(published_at=None).order_by("due_at")
        for run in runs.select_related(*(f"schedule__{kind}" for kind in KINDS)):
            if now - run.created_at > MAX_DELAY:
                logger.error("The run %s was not queued within %s", run, MAX_DELAY)
                run.delete()
            elif isinstance(self.publish_run(run), OperationalError):
                return False
        return True

    def publish_run(self, run: ScheduleRun) -> BaseException | None:
        """Publish a run; return the error, if any."""
        run.attempts += 1
        run.save(update_fields=["attempts"])
        entry = ModelEntry(run.schedule, app=self.app)
        entry.options["headers"] |= {
            "schedule": run.schedule_id,
            "schedule_run": run.pk,
            "schedule_attempt": run.attempts,
            "queued_at": run.due_at.isoformat(),
        }
        # Sentry replaces this method, which logs errors instead of raising them.
        self.error: BaseException | None = None
        self.apply_entry(entry, producer=self.producer)
        if self.error is None:
            ScheduleRun.objects.filter(pk=run.pk).update(published_at=Now())
        return self.error

    def apply_async(self, *args: Any, **kwargs: Any) -> Any:
        """Publish a message; store the error, if any."""
        try:
            return super().apply_async(*args, **kwargs)
        except SchedulingError as error:
            self.error = error.__context__
            raise

    def log_once(self, row: PeriodicTask, error: Exception) -> None:
        """Log once why a schedule cannot run."""
        message = f"Schedule {row.name} cannot run: {error}"
        if message not in self.logged:
            self.logged.add(message)
            logger.error("%s", message)
