"""The scheduler: what is due is queued once, whatever fails in between."""

from datetime import UTC, timedelta

import pytest
import time_machine
from celery import current_app, shared_task
from django.db import InterfaceError, OperationalError
from django.db.models import F
from django.utils import timezone
from django_celery_beat.models import (
    ClockedSchedule,
    CrontabSchedule,
    IntervalSchedule,
    PeriodicTask,
)
from kombu.exceptions import OperationalError as BrokerError

from prodserver_ops import tasks as ops_tasks
from prodserver_ops.mail import tasks
from prodserver_ops.models import Heartbeat, ScheduleRun
from prodserver_ops.scheduling import claims
from prodserver_ops.scheduling import scheduler as module
from prodserver_ops.scheduling.leases import LostLease
from prodserver_ops.worker.app import CoalescingTask, Task

pytestmark = pytest.mark.django_db

NOW = timezone.now().astimezone(UTC).replace(minute=0, second=0, microsecond=0)
MINUTE, HOUR = timedelta(minutes=1), timedelta(hours=1)


@shared_task(name="ops-test.plain")
def plain():
    pass


@shared_task(name="ops-test.coalescing", base=CoalescingTask)
def coalescing():
    pass


class FakeLease:
    """A lease that this process holds until ``lost``, with a clock of its own."""

    now = NOW
    lost = False

    def renew(self):
        if self.lost:
            raise LostLease
        return self.now


@pytest.fixture
def lease(monkeypatch):
    PeriodicTask.objects.all().delete()
    monkeypatch.setattr(module, "lease", FakeLease())
    return module.lease


@pytest.fixture
def published(monkeypatch):
    """The headers of the messages that were published, or an error to raise instead."""

    class Published(list):
        error = None

    published = Published()

    def apply_async(task, args=None, kwargs=None, headers=None, **options):
        if published.error:
            raise published.error
        published.append((task.name, headers))

    monkeypatch.setattr(Task, "apply_async", apply_async)
    return published


@pytest.fixture
def scheduler(lease, published):
    return module.Scheduler(app=current_app, max_interval=5)


def make(name="sample", changed=NOW - HOUR, **fields):
    """Create a schedule that was changed at a time."""
    if not {"crontab", "clocked"} & fields.keys():
        fields["interval"], _ = IntervalSchedule.objects.get_or_create(every=10, period="minutes")
    row = PeriodicTask.objects.create(name=name, task=fields.pop("task", plain.name), **fields)
    PeriodicTask.objects.filter(pk=row.pk).update(date_changed=changed)
    row.refresh_from_db()
    return row


def crontab():
    """Create the crontab of every day at ``NOW``."""
    return CrontabSchedule.objects.create(minute="0", hour=str(NOW.hour), timezone="UTC")


class TestDue:
    def test_interval_keeps_its_beat(self):
        row = make(last_run_at=NOW - 25 * MINUTE)
        assert module.get_due(row, NOW) == NOW - 5 * MINUTE
        assert module.get_next(row, NOW) == NOW + 5 * MINUTE
        row.last_run_at = NOW - 10 * MINUTE
        assert module.get_due(row, NOW) == NOW
        assert module.get_due(row, NOW - timedelta(microseconds=1)) is None

    def test_change_counts_from_then_on(self):
        row = make(last_run_at=NOW - HOUR, changed=NOW - 5 * MINUTE)
        assert module.get_due(row, NOW) is None
        assert module.get_due(row, NOW + 5 * MINUTE) == NOW + 5 * MINUTE

    def test_interval_starts_at_its_start_time(self):
        row = make(start_time=NOW)
        assert module.get_due(row, NOW - timedelta(microseconds=1)) is None
        assert module.get_due(row, NOW) == NOW
        assert module.get_next(row, NOW - HOUR) == NOW

    @pytest.mark.parametrize(
        ("minutes", "due"), [(-1, False), (0, True), (55, True), (60, True), (61, False)]
    )
    def test_crontab_is_made_up_for_within_an_hour(self, minutes, due):
        row = make(crontab=crontab(), changed=NOW - 5 * HOUR)
        assert module.get_due(row, NOW + minutes * MINUTE) == (NOW if due else None)

    def test_crontab_without_a_deadline_is_made_up_for_at_any_time(self, monkeypatch):
        monkeypatch.setitem(current_app.conf, "beat_cron_starting_deadline", None)
        row = make(crontab=crontab(), changed=NOW - 50 * HOUR)
        assert module.get_due(row, NOW + 20 * HOUR) == NOW

    def test_crontab_runs_once(self):
        row = make(crontab=crontab(), changed=NOW - 5 * HOUR, last_run_at=NOW)
        assert module.get_due(row, NOW + MINUTE) is None
        assert module.get_next(row, NOW + MINUTE) == NOW + 24 * HOUR
        assert module.get_next(row, NOW + MINUTE, NOW + HOUR) is None

    def test_crontab_starts_at_its_start_time(self):
        row = make(crontab=crontab(), start_time=NOW)
        assert module.get_due(row, NOW) == NOW
        row.start_time = NOW + MINUTE
        assert module.get_due(row, NOW + MINUTE) is None

    def test_clocked_runs_once(self):
        clocked = ClockedSchedule.objects.create(clocked_time=NOW)
        row = make(clocked=clocked, one_off=True)
        assert module.get_due(row, NOW - MINUTE) is None
        assert module.get_due(row, NOW + 9 * HOUR) == NOW
        assert module.get_next(row, NOW - HOUR) == NOW
        row.last_run_at = NOW
        assert module.get_due(row, NOW + 9 * HOUR) is None

    def test_latest_ignores_whether_it_has_run(self):
        row = make(crontab=crontab(), changed=NOW - 5 * HOUR, last_run_at=NOW)
        assert module.get_latest(row, NOW - HOUR, NOW + 9 * HOUR) == NOW
        assert module.get_latest(row, NOW, NOW + 9 * HOUR) is None
        row.date_changed = NOW + MINUTE
        assert module.get_latest(row, NOW - HOUR, NOW + 9 * HOUR) is None
        every = make(name="every", last_run_at=NOW)
        assert module.get_latest(every, NOW - HOUR, NOW + HOUR) == NOW
        assert module.get_latest(every, NOW + MINUTE, NOW + HOUR) is None


class TestPass:
    def test_queues_what_is_due_once(self, scheduler, published, lease):
        row = make(last_run_at=NOW - 10 * MINUTE)
        make(name="later", last_run_at=NOW - 5 * MINUTE)
        for _ in range(3):
            scheduler.tick()
        ((name, headers),) = published
        run = ScheduleRun.objects.get()
        assert (run.schedule, run.due_at) == (row, NOW)
        assert run.published_at
        assert name == plain.name
        assert headers["schedule_run"] == run.pk
        assert headers["queued_at"] == NOW.isoformat()
        assert headers["periodic_task_name"] == "sample"
        row.refresh_from_db()
        assert (row.last_run_at, row.total_run_count) == (NOW, 1)
        assert row.date_changed == NOW - HOUR

    @pytest.mark.parametrize(("seconds", "wait"), [(3, 3), (60, 5)])
    def test_returns_the_wait_until_the_next(self, scheduler, seconds, wait):
        make(last_run_at=NOW - 10 * MINUTE + timedelta(seconds=seconds))
        assert scheduler.tick() == pytest.approx(wait, abs=1)

    def test_disabled_and_expired_schedules_do_not_run(self, scheduler, published):
        make(enabled=False, last_run_at=NOW - HOUR)
        expired = make(name="expired", last_run_at=NOW - HOUR, expires=timezone.now() - HOUR)
        scheduler.tick()
        expired.refresh_from_db()
        assert (published, expired.enabled) == ([], False)

    def test_one_off_schedule_is_disabled(self, scheduler, published):
        row = make(last_run_at=NOW - HOUR, one_off=True)
        scheduler.tick()
        row.refresh_from_db()
        assert (len(published), row.enabled) == (1, False)

    def test_mistake_in_one_schedule_does_not_stop_others(self, scheduler, published, caplog):
        for name, fields in (("a", {"args": "["}), ("b", {"interval": None}), ("c", {})):
            row = make(name=name, last_run_at=NOW - HOUR)
            PeriodicTask.objects.filter(pk=row.pk).update(**fields)
        for _ in range(2):
            scheduler.tick()
        assert len(published) == 1
        errors = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
        first, second = errors
        assert first.startswith("Schedule a cannot run: ")
        assert second == "Schedule b cannot run: it has neither a crontab nor an interval"

    def test_change_in_the_meantime_wins(self, scheduler, published, monkeypatch):
        row = make(last_run_at=NOW - HOUR)
        check = module.check_arguments

        def disable(row):
            check(row)
            PeriodicTask.objects.filter(pk=row.pk).update(enabled=False)

        monkeypatch.setattr(module, "check_arguments", disable)
        scheduler.tick()
        row.refresh_from_db()
        assert (published, row.last_run_at) == ([], NOW - HOUR)

    def test_lost_lease_ends_it(self, scheduler, published, lease, monkeypatch):
        make(last_run_at=NOW - HOUR)
        check = module.check_arguments

        def lose(row):
            check(row)
            lease.lost = True

        monkeypatch.setattr(module, "check_arguments", lose)
        with pytest.raises(LostLease):
            scheduler.tick()
        assert published == []
        assert not ScheduleRun.objects.exists()

    def test_database_error_ends_it(self, scheduler, monkeypatch):
        def fail(row):
            raise OperationalError

        make(last_run_at=NOW - HOUR)
        monkeypatch.setattr(module, "check_arguments", fail)
        with pytest.raises(OperationalError):
            scheduler.tick()


class TestPublishing:
    def test_run_is_published_when_the_broker_is_back(self, scheduler, published, lease):
        make(last_run_at=NOW - 10 * MINUTE)
        make(name="other", last_run_at=NOW - 10 * MINUTE)
        published.error = BrokerError("refused")
        assert scheduler.tick() == 1
        # The second run does not wait for the broker too.
        assert sorted(run.attempts for run in ScheduleRun.objects.all()) == [0, 1]
        published.error = None
        scheduler.tick()
        assert len(published) == 2

    def test_error_of_one_run_does_not_stop_others(self, scheduler, published, monkeypatch):
        for name in ("a", "b"):
            make(name=name, last_run_at=NOW - 10 * MINUTE)
        accept = Task.apply_async

        def reject_one(task, args=None, kwargs=None, headers=None, **options):
            if headers["periodic_task_name"] == "a":
                raise ValueError("this message cannot be published")
            accept(task, args, kwargs, headers, **options)

        monkeypatch.setattr(Task, "apply_async", reject_one)
        scheduler.tick()
        ((_, headers),) = published
        assert headers["periodic_task_name"] == "b"
        assert ScheduleRun.objects.get(published_at=None).schedule.name == "a"

    def test_only_the_last_run_is_published(self, scheduler, published, lease):
        make(last_run_at=NOW - 10 * MINUTE)
        published.error = BrokerError("refused")
        scheduler.tick()
        lease.now = NOW + 10 * MINUTE
        scheduler.tick()
        published.error = None
        scheduler.tick()
        ((_, headers),) = published
        assert headers["queued_at"] == lease.now.isoformat()

    def test_run_is_given_up_after_an_hour(self, scheduler, published, lease, caplog):
        row = make(crontab=crontab(), changed=NOW - HOUR)
        published.error = BrokerError("refused")
        scheduler.tick()
        ScheduleRun.objects.update(created_at=NOW)
        lease.now, published.error = NOW + 61 * MINUTE, None
        scheduler.tick()
        assert published == []
        assert f"The run {row.name} {NOW:%Y-%m-%d %H:%M:%S} was not queued" in caplog.text

    def test_beat_that_is_killed_in_between_publishes_again(self, scheduler, published):
        make(last_run_at=NOW - 10 * MINUTE)
        scheduler.tick()
        ScheduleRun.objects.update(published_at=None)
        scheduler.tick()
        first, second = (headers for _, headers in published)
        assert first["schedule_run"] == second["schedule_run"]
        assert claims.claim(second)
        assert not claims.claim(first)
        # Redelivered after its worker was lost
        assert claims.claim(second)

    def test_message_of_no_schedule_runs(self):
        assert claims.claim({})

    @pytest.mark.parametrize("error", [OperationalError, InterfaceError])
    def test_message_runs_while_the_database_is_away(self, monkeypatch, caplog, error):
        def fail(*args, **kwargs):
            raise error("password=hunter2")

        monkeypatch.setattr(ScheduleRun.objects, "filter", fail)
        assert claims.claim({"schedule_run": 1, "schedule_attempt": 1})
        message = f"Could not record the start of a run: {error.__name__}"
        assert [record.getMessage() for record in caplog.records] == [message]

    def test_worker_ignores_a_second_message(self, caplog):
        row = make()
        run = ScheduleRun.objects.create(schedule=row, due_at=NOW)
        done = []
        for attempt in (1, 2, 1):
            plain.run, headers = (
                lambda: done.append(True),
                {"schedule_run": run.pk, "schedule_attempt": attempt},
            )
            plain.apply(headers=headers)
        assert len(done) == 2
        assert "ops-test.plain ignored: the same run has already been started" in caplog.text


class TestCoalescing:
    @pytest.fixture
    def waiting(self, scheduler, published):
        """A run that no worker has started."""
        make(task=coalescing.name, last_run_at=NOW - 10 * MINUTE)
        scheduler.tick()
        assert len(published) == 1
        return ScheduleRun.objects.get()

    def tick_later(self, scheduler, lease, minutes):
        ScheduleRun.objects.update(published_at=F("published_at") - minutes * MINUTE)
        lease.now += 10 * MINUTE
        scheduler.tick()

    def test_run_is_left_out_while_another_waits(self, waiting, scheduler, lease, published):
        self.tick_later(scheduler, lease, 4)
        assert len(published) == 1

    def test_run_is_queued_after_the_other_was_started(self, waiting, scheduler, lease, published):
        claims.claim(published[0][1])
        self.tick_later(scheduler, lease, 0)
        assert len(published) == 2

    def test_message_that_was_lost_is_replaced(self, waiting, scheduler, lease, published):
        Heartbeat.objects.create(process="worker", host="a", pid=1, seen_at=timezone.now())
        self.tick_later(scheduler, lease, 6)
        assert len(published) == 2

    def test_nothing_piles_up_while_no_worker_runs(self, waiting, scheduler, lease, published):
        for _ in range(10):
            self.tick_later(scheduler, lease, 10)
        assert len(published) == 1

    def test_tasks_that_do_all_that_is_due_coalesce(self):
        assert isinstance(tasks.resume_deliveries._get_current_object(), CoalescingTask)
        assert isinstance(ops_tasks.delete_records._get_current_object(), CoalescingTask)
        assert not isinstance(tasks.send_notification._get_current_object(), CoalescingTask)


class TestRecords:
    def test_old_ones_are_deleted(self):
        row = make()
        for days in (6, 8):
            ScheduleRun.objects.create(schedule=row, due_at=NOW - timedelta(days=days))
            seen_at = NOW - timedelta(hours=4 * days - 6)
            Heartbeat.objects.create(process="beat", host="a", pid=days, seen_at=seen_at)
        with time_machine.travel(NOW):
            ops_tasks.delete_records()
        assert [run.due_at for run in ScheduleRun.objects.all()] == [NOW - timedelta(days=6)]
        assert [row.pid for row in Heartbeat.objects.all()] == [6]
