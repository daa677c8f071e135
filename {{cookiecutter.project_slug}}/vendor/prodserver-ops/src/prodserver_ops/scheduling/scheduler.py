"""The scheduler of beat: each run of a schedule is queued once, at its time.

Any number of beats may work at the same time. Each pass reads the schedules from the database, so
that a change takes effect in the next one. A run is a row, unique by schedule and due time. A beat
stores runs in batches, together with the schedules' new ``last_run_at``; it has claimed what it
stores, publishes it, and marks it as published. The claim of a beat that was killed, paused or cut
off expires, and another beat publishes these runs. A worker runs the first message of a run that
it gets, and ignores another one. Times are those of the database.
"""

import logging
import time
from collections import defaultdict
from collections.abc import Collection, Sequence
from datetime import datetime, timedelta
from itertools import batched
from typing import Any, Literal

from celery import beat, current_app
from django.conf import settings
from django.db import DatabaseError, InterfaceError, close_old_connections, connections
from django.db.models import Case, DateTimeField, F, Q, When
from django.db.models.functions import Least, Now
from django.utils import timezone
from django_celery_beat.models import PeriodicTask
from django_celery_beat.schedulers import DatabaseScheduler
from kombu.exceptions import OperationalError
from kombu.utils.json import loads

from .. import broker
from ..core.database import short_transaction
from ..models import ScheduleRun
from . import heartbeats
from .claims import started_within_limit
from .timing import RELATIONS, get_due, get_next, note_changes
from .validation import check_message

logger = logging.getLogger(__name__)

#: How long beat tries to publish a run.
MAX_DELAY = timedelta(hours=1)

#: How long a run of a task that coalesces may wait before another one is queued.
MAX_WAIT = timedelta(minutes=5)

#: When a message expires at the latest: RabbitMQ closes the connection for 2**32 milliseconds or more.
MAX_EXPIRY = timedelta(days=49)

#: How many runs are stored and published together, at most.
BATCH = 500

#: How long a beat may take to publish the runs that it has claimed.
CLAIM = timedelta(seconds=4)

#: The age of what a pass has read, in seconds, from which it starts again: it may be outdated.
MAX_AGE = 10

#: Time until the next pass while the database or the broker is unavailable, in seconds.
RETRY_INTERVAL = 1

#: How soon beat notices that it has to stop, in seconds.
STOP_INTERVAL = 0.2

#: The number of runs from which they are no longer counted: the database stores no larger one.
MAX_COUNT = 2**31 - 2

#: The fields of a schedule that are options of a message.
OPTIONS = ("queue", "exchange", "routing_key", "priority")


class Scheduler(beat.Scheduler):
    """A scheduler that keeps no schedules between two passes."""

    #: The longest time between two passes, in seconds; ``CELERY_BEAT_MAX_LOOP_INTERVAL`` wins.
    max_interval = 5

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.next_pass = 0.0
        self.batch = BATCH
        self.away: set[str] = set()
        self.logged: set[str] = set()
        super().__init__(*args, **kwargs)

    def setup_schedule(self) -> None:
        """Create schedules from ``CELERY_BEAT_SCHEDULE`` if there are any."""
        if self.app.conf.beat_schedule:
            DatabaseScheduler(app=self.app)

    def tick(self, *args: Any, **kwargs: Any) -> float:
        """Run a pass if it is time for it; return the seconds until the next call."""
        if time.monotonic() >= self.next_pass:
            try:
                close_old_connections()
                heartbeats.record_beat()
                wait = self.run_pass()
                self.away.discard("database")
            except (DatabaseError, InterfaceError) as error:
                connections.close_all()
                self.log_away("database", error)
                wait = RETRY_INTERVAL
            self.next_pass = time.monotonic() + wait
        return min(max(self.next_pass - time.monotonic(), 0), STOP_INTERVAL)

    def run_pass(self) -> float:
        """Queue what is due; return the seconds until the next pass."""
        start = time.monotonic()
        rows = self.get_rows()
        now: datetime = rows[0].now if rows else timezone.now()
        note_changes(rows, now)
        soonest = until = now + timedelta(seconds=self.max_interval)
        runs: list[tuple[datetime, PeriodicTask]] = []
        for row in rows:
            try:
                if due := get_due(row, now):
                    check_message(row)
                    runs.append((due, row))
                soonest = min(soonest, get_next(row, now, until) or until)
            except Exception as error:
                # A mistake in one schedule must not stop the others.
                self.log_once(row, error)
        runs.sort(key=lambda run: run[0])
        for batch in batched(runs, BATCH):
            age = time.monotonic() - start
            if age > MAX_AGE:
                soonest = now
                break
            if not self.publish_runs(self.store_runs(batch, now + timedelta(seconds=age))):
                return RETRY_INTERVAL
        wait = max((soonest - now).total_seconds() - (time.monotonic() - start), 0)
        return wait if self.publish_stored(now) else min(wait, RETRY_INTERVAL)

    def publish_stored(self, now: datetime) -> bool:
        """Publish what a beat has stored, but not published; return whether nothing is left."""
        while ScheduleRun.objects.filter(published_at=None).exists():
            claimed = self.claim_runs(now)
            if not claimed or not self.publish_runs(claimed):
                return False
        return True

    def get_rows(self) -> list[Any]:
        """Return the enabled schedules; disable those that have expired."""
        PeriodicTask.objects.filter(enabled=True, expires__lte=Now()).update(enabled=False)
        rows = PeriodicTask.objects.filter(enabled=True).order_by("pk").annotate(now=Now())
        return list(rows.select_related(*RELATIONS))

    # Storing and claiming

    def store_runs(
        self, runs: Collection[tuple[datetime, PeriodicTask]], now: datetime
    ) -> list[ScheduleRun]:
        """Store and claim runs, except those of schedules that have changed; return them."""
        read = {row.pk: row for _, row in runs}
        rows = PeriodicTask.objects.filter(pk__in=read, enabled=True)
        with short_transaction():
            # Another beat that stores the same runs skips these rows, or finds them changed.
            locked = rows.select_for_update(skip_locked=True)
            unchanged = {
                pk
                for pk, *values in locked.values_list("pk", "last_run_at", "date_changed")
                if values == [read[pk].last_run_at, read[pk].date_changed]
            }
            busy = self.find_busy([read[pk] for pk in unchanged])
            # What waits stays due.
            unchanged -= {pk for pk in busy if get_without_overlapping(read[pk]) == "wait"}
            by_due = defaultdict(list)
            for due, row in runs:
                if row.pk in unchanged:
                    by_due[due].append(row.pk)
            if not by_due:
                return []
            # An earlier run that could not be published is left out.
            earlier = ScheduleRun.objects.filter(schedule__in=unchanged - busy)
            earlier.filter(published_at=None, claimed_at=None).delete()
            stored = [
                ScheduleRun(schedule=row, due_at=due, claimed_at=now, attempts=1)
                for due, row in runs
                if row.pk in unchanged - busy
            ]
            ScheduleRun.objects.bulk_create(stored, ignore_conflicts=True)
            last_run = [When(pk__in=pks, then=due) for due, pks in by_due.items()]
            PeriodicTask.objects.filter(pk__in=unchanged).update(
                last_run_at=Case(*last_run, output_field=DateTimeField()),
                total_run_count=Least("total_run_count", MAX_COUNT) + 1,
                enabled=Case(When(one_off=True, then=False), default=True),
            )
            # Those that exist are not stored again.
            pks = dict(earlier.filter(claimed_at=now).values_list("schedule", "pk"))
            for run in stored:
                run.pk = pks.get(run.schedule_id)
        return [run for run in stored if run.pk]

    def find_busy(self, rows: Collection[PeriodicTask]) -> set[int]:
        """Return the keys of the schedules whose next run is left out, or waits.

        The last run of a task that coalesces still waits in the queue; that of a task that must
        not overlap waits or is running.
        """
        tasks = {row.pk: self.app.tasks.get(row.task) for row in rows}
        waits = {pk for pk, task in tasks.items() if getattr(task, "coalesces", False)}
        works = {row.pk for row in rows if get_without_overlapping(row)}
        if not waits | works:
            return set()
        published = ScheduleRun.objects.filter(
            schedule__in=waits | works, published_at__isnull=False, finished_at=None
        )
        waiting = Q(started_at=None)
        if heartbeats.get_alive() & set(heartbeats.get_workers()):
            # A message that waits for longer may be lost.
            waiting &= Q(published_at__gt=Now() - MAX_WAIT)
        at_work = Q(schedule__in=works) & started_within_limit("schedule__task")
        return set(published.filter(waiting | at_work).values_list("schedule", flat=True))

    def claim_runs(self, now: datetime) -> list[ScheduleRun]:
        """Claim runs that no beat has published, and return them; new ones first, by due time."""
        free = Q(claimed_at=None) | Q(claimed_at__lt=Now() - CLAIM)
        rows = ScheduleRun.objects.filter(free, published_at=None).order_by("attempts", "due_at")
        with short_transaction():
            relations = (f"schedule__{name}" for name in RELATIONS)
            locked = rows.select_for_update(skip_locked=True, of=("self",))
            claimed = list(locked.select_related(*relations)[: self.batch])
            late = [run for run in claimed if now - run.created_at > MAX_DELAY]
            delete(late)
            runs = [run for run in claimed if run not in late]
            update(runs, claimed_at=Now(), attempts=F("attempts") + 1)
        for run in runs:
            run.attempts += 1
        for run in late:
            logger.error("The run %s was not queued within %s", run, MAX_DELAY)
        return runs

    # Publishing

    def publish_runs(self, runs: Sequence[ScheduleRun]) -> bool:
        """Publish claimed runs together; return whether the broker has accepted them."""
        if not runs:
            return True
        heartbeats.record_beat()
        published, faulty = [], []
        try:
            with broker.open_batch(settings.CELERY_BROKER_URL, self.app) as producer:
                for run in runs:
                    try:
                        self.publish_run(run, producer)
                        published.append(run)
                    except OperationalError:
                        raise
                    except Exception as error:
                        self.log_once(run.schedule, error)
                        faulty.append(run)
        except (OperationalError, OSError) as error:
            self.log_away("broker", error)
            # If one of them is the reason, it must not hold up the others.
            self.batch = max(len(runs) // 8, 1)
            update(runs, claimed_at=None)
            return False
        self.away.discard("broker")
        self.batch = min(self.batch * 8, BATCH)
        update(published, published_at=Now(), claimed_at=None)
        delete(faulty)
        return True

    def publish_run(self, run: ScheduleRun, producer: Any) -> None:
        """Publish a run."""
        self.error: BaseException | None = None
        # Sentry replaces this method.
        self.apply_entry(self.make_entry(run), producer=producer)
        if self.error is not None:
            raise self.error

    def make_entry(self, run: ScheduleRun) -> beat.ScheduleEntry:
        """Return what Celery publishes for a run."""
        row = run.schedule
        options = {name: value for name in OPTIONS if (value := getattr(row, name)) is not None}
        if row.expires is not None:
            options["expires"] = min(row.expires, timezone.now() + MAX_EXPIRY)
        elif row.expire_seconds:
            options["expires"] = min(row.expire_seconds, MAX_EXPIRY.total_seconds())
        options["headers"] = loads(row.headers or "{}") | {
            "periodic_task_name": row.name,
            "schedule": row.pk,
            "schedule_run": run.pk,
            "schedule_attempt": run.attempts,
            "queued_at": run.due_at.isoformat(),
        }
        return beat.ScheduleEntry(
            name=row.name,
            task=row.task,
            last_run_at=run.due_at,
            args=loads(row.args or "[]"),
            kwargs=loads(row.kwargs or "{}"),
            options=options,
            # Only Sentry reads it, and it takes time to make.
            schedule=row.schedule if settings.SENTRY_DSN else None,
            app=self.app,
        )

    def apply_async(self, *args: Any, **kwargs: Any) -> Any:
        """Publish a message; keep the error if that fails. ``apply_entry`` would log a traceback."""
        try:
            return super().apply_async(*args, **kwargs)
        except beat.SchedulingError as error:
            self.error = error.__context__

    # The log

    def log_once(self, row: PeriodicTask, error: BaseException) -> None:
        """Log why a schedule cannot run, once."""
        if (message := f"Schedule {row.name} cannot run: {error}") not in self.logged:
            self.logged.add(message)
            logger.error("%s", message)

    def log_away(self, server: str, error: BaseException) -> None:
        """Log that beat waits for a server, once until it is available again."""
        if server not in self.away:
            self.away.add(server)
            logger.warning("beat: Waiting: the %s is unavailable (%s)", server, type(error).__name__)


def get_without_overlapping(row: PeriodicTask) -> bool | Literal["wait"]:
    """Return whether a run is left out, or waits, while an earlier one is running."""
    return getattr(current_app.tasks.get(row.task), "without_overlapping", False)


def update(runs: Collection[ScheduleRun], **values: Any) -> None:
    """Change fields of runs."""
    ScheduleRun.objects.filter(pk__in=[run.pk for run in runs]).update(**values)


def delete(runs: Collection[ScheduleRun]) -> None:
    """Delete runs that are given up."""
    ScheduleRun.objects.filter(pk__in=[run.pk for run in runs]).delete()
