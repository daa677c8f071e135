"""The scheduler of beat: each run of a schedule is queued once, at its time.

Any number of beats may work at the same time. Each pass reads the schedules from the database, so
that a change takes effect in the next one. A run is a row, unique by schedule and due time, which
is stored together with the schedule's new ``last_run_at``. Then a beat claims rows in batches,
publishes them and marks them as published. The claim of a beat that was killed, paused or cut off
expires, and another beat publishes these runs. A worker runs the first message of a run that it
gets, and ignores another one. Times are those of the database.
"""

import logging
import time
from collections import defaultdict
from collections.abc import Collection, Sequence
from datetime import datetime, timedelta
from itertools import batched
from typing import Any

from celery.beat import ScheduleEntry, SchedulingError
from django.conf import settings
from django.db.models import Case, DateTimeField, F, Q, When
from django.db.models.functions import Now
from django.utils import timezone
from django_celery_beat.models import PeriodicTask
from django_celery_beat.schedulers import DatabaseScheduler
from kombu.exceptions import OperationalError
from kombu.utils.json import loads

from .. import broker
from ..core.database import short_transaction
from ..models import ScheduleRun
from . import heartbeats
from .timing import RELATIONS, get_due, get_next, note_changes
from .validation import check_arguments

logger = logging.getLogger(__name__)

#: How long beat tries to publish a run.
MAX_DELAY = timedelta(hours=1)

#: How long a run of a task that coalesces may wait before another one is queued.
MAX_WAIT = timedelta(minutes=5)

#: How many runs are stored, and how many are claimed, in one transaction.
STORED, CLAIMED = 500, 100

#: The fields of a schedule that are options of a message.
OPTIONS = ("queue", "exchange", "routing_key", "priority")

#: How long a beat may take to publish the runs that it has claimed.
CLAIM = timedelta(seconds=4)

#: The age of what a pass has read, in seconds, from which it starts again: it may be outdated.
MAX_AGE = 10


class Scheduler(DatabaseScheduler):  # type: ignore[misc]
    """A scheduler that keeps nothing between two passes."""

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
        """Queue what is due; return the seconds until the next pass."""
        start = time.monotonic()
        rows = self.get_rows()
        now: datetime = rows[0].now if rows else timezone.now()
        note_changes(rows, now)
        until = now + timedelta(seconds=self.max_interval)
        soonest = until
        runs: list[tuple[datetime, PeriodicTask]] = []
        for row in rows:
            try:
                if due := get_due(row, now):
                    check_arguments(row)
                    runs.append((due, row))
                soonest = min(soonest, get_next(row, now, until) or until)
            except Exception as error:
                # A mistake in one schedule must not stop the others.
                self.log_once(row, error)
        runs.sort(key=lambda run: run[0])
        for batch in batched(runs, STORED):
            if time.monotonic() - start > MAX_AGE:
                return 0
            self.store_runs(batch)
            if not self.publish_runs(now):
                return 1
        if not self.publish_runs(now):
            return 1
        elapsed = time.monotonic() - start
        return max((soonest - now).total_seconds() - elapsed, 0)

    def get_rows(self) -> list[Any]:
        """Return the enabled schedules; disable those that have expired."""
        PeriodicTask.objects.filter(enabled=True, expires__lte=Now()).update(enabled=False)
        rows = PeriodicTask.objects.filter(enabled=True).order_by("pk").annotate(now=Now())
        return list(rows.select_related(*RELATIONS))

    # Storing

    def store_runs(self, runs: Collection[tuple[datetime, PeriodicTask]]) -> None:
        """Store runs, but those of schedules that have changed, or that another beat has stored."""
        read = {row.pk: (row.last_run_at, row.date_changed) for _, row in runs}
        rows = PeriodicTask.objects.filter(pk__in=read, enabled=True)
        with short_transaction():
            # Another beat that stores the same runs skips these rows, or finds them changed.
            locked = rows.select_for_update(skip_locked=True)
            unchanged = {
                pk
                for pk, *values in locked.values_list("pk", "last_run_at", "date_changed")
                if tuple(values) == read[pk]
            }
            stored = [(due, row) for due, row in runs if row.pk in unchanged]
            if not stored:
                return
            busy = self.find_busy([row for _, row in stored])
            # An earlier run that could not be published is left out.
            earlier = ScheduleRun.objects.filter(schedule__in=unchanged - busy)
            earlier.filter(published_at=None, claimed_at=None).delete()
            ScheduleRun.objects.bulk_create(
                [
                    ScheduleRun(schedule=row, due_at=due)
                    for due, row in stored
                    if row.pk not in busy
                ],
                ignore_conflicts=True,
            )
            by_due = defaultdict(list)
            for due, row in stored:
                by_due[due].append(row.pk)
            last_run = [When(pk__in=pks, then=due) for due, pks in by_due.items()]
            PeriodicTask.objects.filter(pk__in=unchanged).update(
                last_run_at=Case(*last_run, output_field=DateTimeField()),
                total_run_count=F("total_run_count") + 1,
                enabled=Case(When(one_off=True, then=False), default=True),
            )

    def find_busy(self, rows: Collection[PeriodicTask]) -> set[int]:
        """Return the keys of the schedules whose next run is left out.

        The last run of a task that coalesces still waits in the queue; that of a task that must
        not overlap waits, or is at work.
        """
        tasks = {row.pk: self.app.tasks.get(row.task) for row in rows}
        waits = {pk for pk, task in tasks.items() if getattr(task, "coalesces", False)}
        works = {pk for pk, task in tasks.items() if getattr(task, "without_overlapping", False)}
        if not waits | works:
            return set()
        published = ScheduleRun.objects.filter(
            schedule__in=waits | works, published_at__isnull=False, finished_at=None
        )
        waiting = Q(started_at=None)
        if heartbeats.get_alive() & set(heartbeats.get_workers()):
            # A message that waits for longer may be lost.
            waiting &= Q(published_at__gt=Now() - MAX_WAIT)
        # The task of a worker that was lost ends with its time limit.
        limit = timedelta(seconds=settings.CELERY_TASK_TIME_LIMIT)
        at_work = Q(schedule__in=works, started_at__gt=Now() - limit)
        return set(published.filter(waiting | at_work).values_list("schedule", flat=True))

    # Publishing

    def publish_runs(self, now: datetime) -> bool:
        """Publish what is not published yet; return whether the broker is available."""
        while runs := self.claim_runs():
            heartbeats.record("beat")
            late = [run for run in runs if now - run.created_at > MAX_DELAY]
            for run in late:
                logger.error("The run %s was not queued within %s", run, MAX_DELAY)
            self.delete_runs(late)
            runs = [run for run in runs if run not in late]
            # A run that failed before may fail again: it must not hold up others.
            alone = any(run.attempts > 1 for run in runs)
            failed: list[int] = []
            for batch in batched(runs, 1 if alone else CLAIMED):
                # After two failures the others are not tried.
                if len(failed) > 1 or not self.publish_batch(batch):
                    failed += [run.pk for run in batch]
            if failed:
                ScheduleRun.objects.filter(pk__in=failed).update(claimed_at=None)
                return False
        return True

    def claim_runs(self) -> list[ScheduleRun]:
        """Claim runs that are not published, and return them; new ones first, in order of time."""
        free = Q(claimed_at=None) | Q(claimed_at__lt=Now() - CLAIM)
        rows = ScheduleRun.objects.filter(free, published_at=None).order_by("attempts", "due_at")
        with short_transaction():
            locked = rows.select_for_update(skip_locked=True).values_list("pk", "attempts")
            attempts = dict(locked[:CLAIMED])
            if not attempts:
                return []
            claimed = ScheduleRun.objects.filter(pk__in=attempts)
            claimed.update(claimed_at=Now(), attempts=F("attempts") + 1)
        runs = claimed.order_by("due_at").select_related(
            *(f"schedule__{name}" for name in RELATIONS)
        )
        for run in runs:
            # Another beat may have claimed the run since, if this process was paused.
            run.attempts = attempts[run.pk] + 1
        return list(runs)

    def publish_batch(self, runs: Sequence[ScheduleRun]) -> bool:
        """Publish runs together; return whether the broker is available."""
        published, faulty = [], []
        try:
            with broker.open_batch(settings.CELERY_BROKER_URL, self.app) as producer:
                for run in runs:
                    error = self.publish_run(run, producer)
                    if isinstance(error, OperationalError):
                        raise error
                    if error is None:
                        published.append(run.pk)
                    else:
                        self.log_once(run.schedule, error)
                        faulty.append(run)
        except (OperationalError, OSError) as error:
            logger.warning("beat: The broker does not take messages: %s", type(error).__name__)
            return False
        ScheduleRun.objects.filter(pk__in=published).update(published_at=Now(), claimed_at=None)
        self.delete_runs(faulty)
        return True

    def publish_run(self, run: ScheduleRun, producer: Any) -> BaseException | None:
        """Publish a run; return the error if that failed."""
        self.error: BaseException | None = None
        try:
            # Sentry replaces this method.
            self.apply_entry(self.make_entry(run), producer=producer)
        except Exception as error:
            return error
        return self.error

    def make_entry(self, run: ScheduleRun) -> ScheduleEntry:
        """Return what Celery publishes for a run."""
        row = run.schedule
        options = {name: value for name in OPTIONS if (value := getattr(row, name)) is not None}
        if row.expires_:
            options["expires"] = row.expires_
        options["headers"] = loads(row.headers or "{}") | {
            "periodic_task_name": row.name,
            "schedule": row.pk,
            "schedule_run": run.pk,
            "schedule_attempt": run.attempts,
            "queued_at": run.due_at.isoformat(),
        }
        return ScheduleEntry(
            name=row.name,
            task=row.task,
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
        except SchedulingError as error:
            self.error = error.__context__

    def delete_runs(self, runs: Collection[ScheduleRun]) -> None:
        """Delete runs that are given up."""
        if runs:
            ScheduleRun.objects.filter(pk__in=[run.pk for run in runs]).delete()

    def log_once(self, row: PeriodicTask, error: BaseException) -> None:
        """Log why a schedule cannot run, once."""
        message = f"Schedule {row.name} cannot run: {error}"
        if message not in self.logged:
            self.logged.add(message)
            logger.error("%s", message)
