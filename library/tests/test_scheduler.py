"""The scheduler: what is due is queued once, whatever fails in between."""

from contextlib import contextmanager
from datetime import UTC, datetime, timedelta

import pytest
import time_machine
from celery import current_app, shared_task
from django.db import InterfaceError, OperationalError
from django.db.models import F
from django.urls import reverse
from django.utils import timezone
from django_celery_beat.models import (
    ClockedSchedule,
    CrontabSchedule,
    IntervalSchedule,
    PeriodicTask,
)
from kombu.exceptions import OperationalError as BrokerError

from prodserver_ops.console import doctor
from prodserver_ops.mail import tasks
from prodserver_ops.models import Heartbeat, ScheduleRun
from prodserver_ops.scheduling import claims, timing
from prodserver_ops.scheduling import scheduler as module
from prodserver_ops.tasks import delete_records
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


@shared_task(name="ops-test.exclusive", without_overlapping=True)
def exclusive():
    pass


@shared_task(name="ops-test.waiting", without_overlapping="wait")
def waiting():
    pass


class Clock:
    """The clock of the database, as a pass sees it."""

    now = NOW


@pytest.fixture
def clock(monkeypatch):
    """Return a clock that a test can set; delete the schedules of the migrations."""
    PeriodicTask.objects.all().delete()
    clock = Clock()
    get_rows = module.Scheduler.get_rows

    def get_rows_now(self):
        rows = get_rows(self)
        for row in rows:
            row.now = clock.now
        return rows

    monkeypatch.setattr(module.Scheduler, "get_rows", get_rows_now)
    monkeypatch.setattr(module.heartbeats, "record", lambda process: None)
    return clock


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
def scheduler(clock, published):
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
        assert timing.get_due(row, NOW) == NOW - 5 * MINUTE
        assert timing.get_next(row, NOW) == NOW + 5 * MINUTE
        row.last_run_at = NOW - 10 * MINUTE
        assert timing.get_due(row, NOW) == NOW
        assert timing.get_due(row, NOW - timedelta(microseconds=1)) is None

    def test_change_counts_from_then_on(self):
        row = make(last_run_at=NOW - HOUR, changed=NOW - 5 * MINUTE)
        assert timing.get_due(row, NOW) is None
        assert timing.get_due(row, NOW + 5 * MINUTE) == NOW + 5 * MINUTE

    def test_interval_starts_at_its_start_time(self):
        row = make(start_time=NOW)
        assert timing.get_due(row, NOW - timedelta(microseconds=1)) is None
        assert timing.get_due(row, NOW) == NOW
        assert timing.get_next(row, NOW - HOUR) == NOW

    @pytest.mark.parametrize(
        ("minutes", "due"), [(-1, False), (0, True), (55, True), (60, True), (61, False)]
    )
    def test_crontab_is_made_up_for_within_an_hour(self, minutes, due):
        row = make(crontab=crontab(), changed=NOW - 5 * HOUR)
        assert timing.get_due(row, NOW + minutes * MINUTE) == (NOW if due else None)

    def test_crontab_without_a_deadline_is_made_up_for_at_any_time(self, monkeypatch):
        monkeypatch.setitem(current_app.conf, "beat_cron_starting_deadline", None)
        row = make(crontab=crontab(), changed=NOW - 50 * HOUR)
        assert timing.get_due(row, NOW + 20 * HOUR) == NOW

    def test_crontab_runs_once(self):
        row = make(crontab=crontab(), changed=NOW - 5 * HOUR, last_run_at=NOW)
        assert timing.get_due(row, NOW + MINUTE) is None
        assert timing.get_next(row, NOW + MINUTE) == NOW + 24 * HOUR
        assert timing.get_next(row, NOW + MINUTE, NOW + HOUR) is None

    def test_crontab_starts_at_its_start_time(self):
        row = make(crontab=crontab(), start_time=NOW)
        assert timing.get_due(row, NOW) == NOW
        row.start_time = NOW + MINUTE
        assert timing.get_due(row, NOW + MINUTE) is None

    def test_clocked_runs_once(self):
        clocked = ClockedSchedule.objects.create(clocked_time=NOW)
        row = make(clocked=clocked, one_off=True)
        assert timing.get_due(row, NOW - MINUTE) is None
        assert timing.get_due(row, NOW + 9 * HOUR) == NOW
        assert timing.get_next(row, NOW - HOUR) == NOW
        row.last_run_at = NOW
        assert timing.get_due(row, NOW + 9 * HOUR) is None

    def test_latest_ignores_whether_it_has_run(self):
        row = make(crontab=crontab(), changed=NOW - 5 * HOUR, last_run_at=NOW)
        assert timing.get_latest(row, NOW - HOUR, NOW + 9 * HOUR) == NOW
        assert timing.get_latest(row, NOW, NOW + 9 * HOUR) is None
        row.date_changed = NOW + MINUTE
        assert timing.get_latest(row, NOW - HOUR, NOW + 9 * HOUR) is None
        every = make(name="every", last_run_at=NOW)
        assert timing.get_latest(every, NOW - HOUR, NOW + HOUR) == NOW
        assert timing.get_latest(every, NOW + MINUTE, NOW + HOUR) is None


class TestPass:
    def test_queues_what_is_due_once(self, scheduler, published, clock):
        row = make(last_run_at=NOW - 10 * MINUTE)
        make(name="later", last_run_at=NOW - 5 * MINUTE)
        for _ in range(3):
            scheduler.run_pass()
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
        assert scheduler.run_pass() == pytest.approx(wait, abs=1)

    def test_disabled_and_expired_schedules_do_not_run(self, scheduler, published):
        make(enabled=False, last_run_at=NOW - HOUR)
        expired = make(name="expired", last_run_at=NOW - HOUR, expires=timezone.now() - HOUR)
        scheduler.run_pass()
        expired.refresh_from_db()
        assert (published, expired.enabled) == ([], False)

    def test_one_off_schedule_is_disabled(self, scheduler, published):
        row = make(last_run_at=NOW - HOUR, one_off=True)
        scheduler.run_pass()
        row.refresh_from_db()
        assert (len(published), row.enabled) == (1, False)

    def test_mistake_in_one_schedule_does_not_stop_others(self, scheduler, published, caplog):
        for name, fields in (("a", {"args": "["}), ("b", {"interval": None}), ("c", {})):
            row = make(name=name, last_run_at=NOW - HOUR)
            PeriodicTask.objects.filter(pk=row.pk).update(**fields)
        for _ in range(2):
            scheduler.run_pass()
        assert len(published) == 1
        errors = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
        first, second = errors
        assert first.startswith("Schedule a cannot run: ")
        assert second == "Schedule b cannot run: it has neither a crontab nor an interval"

    @pytest.mark.parametrize("change", [{"enabled": False}, {"date_changed": NOW}])
    def test_change_in_the_meantime_wins(self, scheduler, published, monkeypatch, change):
        row = make(last_run_at=NOW - HOUR)
        check = module.check_message

        def change_row(row):
            check(row)
            PeriodicTask.objects.filter(pk=row.pk).update(**change)

        monkeypatch.setattr(module, "check_message", change_row)
        scheduler.run_pass()
        row.refresh_from_db()
        assert (published, row.last_run_at) == ([], NOW - HOUR)

    def test_run_that_another_beat_stored_is_left_alone(self, scheduler, published):
        row = make(last_run_at=NOW - HOUR)
        runs = [(NOW, row)]
        assert len(scheduler.store_runs(runs, NOW)) == 1
        assert scheduler.store_runs(runs, NOW) == []
        assert ScheduleRun.objects.count() == 1
        row.refresh_from_db()
        assert row.total_run_count == 1

    def test_what_was_read_too_long_ago_is_read_again(self, scheduler, published, monkeypatch):
        """The process may have been paused."""
        make(last_run_at=NOW - HOUR)
        times = iter([0, *[module.MAX_AGE + 1] * 2])
        monkeypatch.setattr(module.time, "monotonic", lambda: next(times))
        assert scheduler.run_pass() == 0
        assert not ScheduleRun.objects.exists()

    def test_statements_do_not_grow_with_the_number_of_runs(
        self, scheduler, published, django_assert_max_num_queries
    ):
        for number in range(50):
            make(name=f"n{number}", last_run_at=NOW - 10 * MINUTE)
        scheduler.run_pass()
        PeriodicTask.objects.update(last_run_at=NOW - 10 * MINUTE)
        ScheduleRun.objects.all().delete()
        published.clear()
        with django_assert_max_num_queries(25):
            scheduler.run_pass()
        assert len(published) == 50

    def test_runs_are_queued_in_order_of_their_time(self, scheduler, published):
        for minutes in (12, 14, 11, 13):
            make(name=f"m{minutes}", last_run_at=NOW - minutes * MINUTE)
        scheduler.run_pass()
        assert [headers["periodic_task_name"] for _, headers in published] == [
            "m14",
            "m13",
            "m12",
            "m11",
        ]

    def test_database_error_ends_it(self, scheduler, monkeypatch):
        def fail(*args):
            raise OperationalError

        make(last_run_at=NOW - HOUR)
        monkeypatch.setattr(scheduler, "store_runs", fail)
        with pytest.raises(OperationalError):
            scheduler.run_pass()


def test_schedules_of_the_setting_are_created(scheduler, published, monkeypatch):
    entry = {"task": plain.name, "schedule": timedelta(seconds=30)}
    monkeypatch.setitem(current_app.conf, "beat_schedule", {"of the setting": entry})
    own = module.Scheduler(app=current_app)
    own.run_pass()
    row = PeriodicTask.objects.get(name="of the setting")
    assert (row.task, row.interval.every, own.max_interval) == (plain.name, 30, 5)


class TestFaultyRows:
    @pytest.mark.parametrize(
        "fields",
        [
            {"headers": "[]"},
            {"headers": '"x"'},
            {"headers": "["},
            {"headers": '{"a": NaN}'},
            {"headers": '{"id": "x"}'},
            {"priority": 300},
            {"args": "{}"},
            {"args": "1"},
            {"kwargs": "[1]"},
            {"kwargs": "null"},
            {"args": "[1, 2, 3]"},
            {"kwargs": '{"unknown": 1}'},
        ],
    )
    def test_are_logged_once_and_do_not_stop_others(self, scheduler, published, caplog, fields):
        row = make(name="faulty", last_run_at=NOW - HOUR)
        PeriodicTask.objects.filter(pk=row.pk).update(**fields)
        make(name="good", last_run_at=NOW - HOUR)
        for _ in range(3):
            scheduler.run_pass()
        assert [headers["periodic_task_name"] for _, headers in published] == ["good"]
        row.refresh_from_db()
        assert doctor.describe_schedule(row)["problem"]
        (record,) = (record for record in caplog.records if record.levelname == "ERROR")
        assert record.getMessage().startswith("Schedule faulty cannot run: ")
        assert record.exc_info is None

    def test_one_off_schedule_runs_when_it_is_mended(self, scheduler, published):
        row = make(last_run_at=NOW - HOUR, one_off=True, args="[1, 2, 3]")
        scheduler.run_pass()
        row.refresh_from_db()
        assert (published, row.enabled, row.total_run_count) == ([], True, 0)
        PeriodicTask.objects.filter(pk=row.pk).update(args="[]")
        scheduler.run_pass()
        row.refresh_from_db()
        assert (len(published), row.enabled) == (1, False)


class TestChanges:
    """Which changes of a schedule restart it."""

    @pytest.fixture
    def row(self, scheduler):
        """A schedule of every ten minutes that ran five minutes ago."""
        row = make(last_run_at=NOW - 5 * MINUTE)
        scheduler.run_pass()
        return row

    def find_due(self, scheduler, clock):
        """Return when the schedule runs after the next pass."""
        scheduler.run_pass()
        (row,) = scheduler.get_rows()
        return timing.get_next(row, clock.now)

    def test_saving_another_field_does_not(self, row, scheduler, clock):
        for _ in range(3):
            row.description += "."
            row.save()
            PeriodicTask.objects.update_or_create(name=row.name, defaults={"description": "x"})
        assert self.find_due(scheduler, clock) == NOW + 5 * MINUTE

    def test_new_interval_counts_from_the_change(self, row, scheduler, clock):
        row.interval = IntervalSchedule.objects.create(every=1, period="hours")
        row.save()
        PeriodicTask.objects.filter(pk=row.pk).update(date_changed=NOW - MINUTE)
        assert self.find_due(scheduler, clock) == NOW + 59 * MINUTE

    def test_change_without_a_save_counts_from_the_next_pass(self, row, scheduler, clock):
        hourly = IntervalSchedule.objects.create(every=1, period="hours")
        PeriodicTask.objects.filter(pk=row.pk).update(interval=hourly)
        assert self.find_due(scheduler, clock) == NOW + HOUR

    def test_change_of_a_shared_interval_counts(self, row, scheduler, clock):
        IntervalSchedule.objects.filter(pk=row.interval_id).update(every=20)
        assert self.find_due(scheduler, clock) == NOW + 20 * MINUTE

    @pytest.mark.parametrize("saves", [True, False])
    def test_schedule_that_is_enabled_again_does_not_run_at_once(
        self, row, scheduler, clock, published, saves
    ):
        """The form saves the row, the action of the list only updates it."""
        PeriodicTask.objects.filter(pk=row.pk).update(enabled=False)
        scheduler.run_pass()
        clock.now += 100 * HOUR
        if saves:
            row.enabled = True
            row.save()
            PeriodicTask.objects.filter(pk=row.pk).update(date_changed=clock.now)
        else:
            PeriodicTask.objects.filter(pk=row.pk).update(enabled=True)
        assert self.find_due(scheduler, clock) == clock.now + 10 * MINUTE
        assert published == []

    def test_crontab_that_was_missed_is_made_up_for_after_a_save(self, scheduler, clock, published):
        row = make(crontab=crontab(), changed=NOW - 5 * HOUR)
        clock.now = NOW - MINUTE
        scheduler.run_pass()
        row.description = "saved after it was due"
        row.save()
        PeriodicTask.objects.filter(pk=row.pk).update(date_changed=NOW + MINUTE)
        clock.now = NOW + 6 * MINUTE
        scheduler.run_pass()
        assert [headers["queued_at"] for _, headers in published] == [NOW.isoformat()]


class TestTableOfChanges:
    """The table in the README of a service says what each change does to the next run."""

    @pytest.fixture
    def row(self, scheduler):
        """A schedule of every ten minutes that ran five minutes ago."""
        row = make(last_run_at=NOW - 5 * MINUTE)
        scheduler.run_pass()
        return row

    @pytest.fixture
    def edit(self, clock, admin_client):
        """A function that changes a schedule in a way, at the time of the clock."""

        def post(row, fields):
            data = {
                **{name: getattr(row, name) for name in ("name", "args", "kwargs", "headers")},
                "regtask": row.task,
                "interval": row.interval_id,
                "enabled": row.enabled,
            }
            for name, value in fields.items():
                if name in ("start_time", "expires"):
                    local = timezone.localtime(value)
                    data |= {f"{name}_0": f"{local:%Y-%m-%d}", f"{name}_1": f"{local:%H:%M:%S}"}
                else:
                    data[name] = getattr(value, "pk", value)
            data = {name: value for name, value in data.items() if value is not False}
            url = reverse("admin:django_celery_beat_periodictask_change", args=[row.pk])
            response = admin_client.post(url, data)
            assert response.status_code == 302, response.context["adminform"].errors

        def save(row, fields):
            for name, value in fields.items():
                setattr(row, name, value)
            row.save()

        ways = {
            "form": post,
            "save": save,
            "update": lambda row, fields: PeriodicTask.objects.filter(pk=row.pk).update(**fields),
            "update_or_create": lambda row, fields: PeriodicTask.objects.update_or_create(
                name=row.name, defaults=fields
            ),
        }

        def edit(way, pk, **fields):
            row = PeriodicTask.objects.get(pk=pk)
            before = row.date_changed
            ways[way](row, fields)
            # Where the change has set the date, it is that of the clock.
            PeriodicTask.objects.filter(pk=pk).exclude(date_changed=before).update(
                date_changed=clock.now
            )

        return edit

    def find_next(self, scheduler, clock):
        scheduler.run_pass()
        return [timing.get_next(row, clock.now) for row in scheduler.get_rows()]

    @pytest.mark.parametrize("way", ["form", "save", "update", "update_or_create"])
    def test_says_what_happens(self, row, scheduler, clock, published, edit, way):
        kept = NOW + 5 * MINUTE
        for fields in (
            {"description": "x"},
            {"args": "[]", "kwargs": "{}", "headers": '{"a": 1}'},
            {"queue": "dummy"},
            {"priority": 5},
        ):
            edit(way, row.pk, **fields)
            assert self.find_next(scheduler, clock) == [kept]
        hourly = IntervalSchedule.objects.create(every=1, period="hours")
        edit(way, row.pk, interval=hourly)
        assert self.find_next(scheduler, clock) == [NOW + HOUR]
        clock.now += MINUTE
        edit(way, row.pk, one_off=True)
        assert self.find_next(scheduler, clock) == [clock.now + HOUR]
        edit(way, row.pk, start_time=NOW + 3 * HOUR)
        assert self.find_next(scheduler, clock) == [NOW + 3 * HOUR]
        edit(way, row.pk, start_time=NOW - 3 * HOUR)
        edit(way, row.pk, enabled=False)
        assert self.find_next(scheduler, clock) == []
        clock.now += 100 * HOUR
        edit(way, row.pk, enabled=True)
        assert self.find_next(scheduler, clock) == [clock.now + HOUR]
        # The form refuses an expiry in the past.
        edit("save" if way == "form" else way, row.pk, expires=timezone.now() - HOUR)
        assert self.find_next(scheduler, clock) == []
        assert published == []

    def test_actions_of_the_list_and_deletion(self, row, scheduler, clock, published, admin_client):
        def act(name):
            url = reverse("admin:django_celery_beat_periodictask_changelist")
            data = {"action": name, "_selected_action": [row.pk]}
            assert admin_client.post(url, data).status_code == 302

        act("disable_tasks")
        assert self.find_next(scheduler, clock) == []
        clock.now += 30 * 24 * HOUR
        act("enable_tasks")
        assert self.find_next(scheduler, clock) == [clock.now + 10 * MINUTE]
        PeriodicTask.objects.get().delete()
        assert self.find_next(scheduler, clock) == []
        assert published == []

    def test_two_administrators_at_once(self, row, scheduler, clock):
        """The form that is saved last wins, and counts as one change."""
        hourly = IntervalSchedule.objects.create(every=1, period="hours")
        first, second = (PeriodicTask.objects.get(pk=row.pk) for _ in range(2))
        first.interval = hourly
        first.save()
        second.description = "saved with the interval of before"
        second.save()
        assert self.find_next(scheduler, clock) == [NOW + 5 * MINUTE]


class TestPublishing:
    def test_run_is_published_when_the_broker_is_back(self, scheduler, published, clock):
        make(last_run_at=NOW - 10 * MINUTE)
        make(name="other", last_run_at=NOW - 10 * MINUTE)
        published.error = BrokerError("refused")
        assert scheduler.run_pass() == 1
        # The second run does not wait for the broker too.
        assert {run.claimed_at for run in ScheduleRun.objects.all()} == {None}
        published.error = None
        scheduler.run_pass()
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
        scheduler.run_pass()
        ((_, headers),) = published
        assert headers["periodic_task_name"] == "b"
        # It is given up.
        assert not ScheduleRun.objects.filter(published_at=None).exists()

    def test_only_the_last_run_is_published(self, scheduler, published, clock):
        make(last_run_at=NOW - 10 * MINUTE)
        published.error = BrokerError("refused")
        scheduler.run_pass()
        clock.now = NOW + 10 * MINUTE
        scheduler.run_pass()
        published.error = None
        scheduler.run_pass()
        ((_, headers),) = published
        assert headers["queued_at"] == clock.now.isoformat()

    def test_run_is_given_up_after_an_hour(self, scheduler, published, clock, caplog):
        row = make(crontab=crontab(), changed=NOW - HOUR)
        published.error = BrokerError("refused")
        scheduler.run_pass()
        ScheduleRun.objects.update(created_at=NOW)
        clock.now, published.error = NOW + 61 * MINUTE, None
        scheduler.run_pass()
        assert published == []
        assert f"The run {row.name} {NOW:%Y-%m-%d %H:%M:%S} was not queued" in caplog.text

    def test_beat_that_is_killed_in_between_publishes_again(self, scheduler, published):
        make(last_run_at=NOW - 10 * MINUTE)
        scheduler.run_pass()
        ScheduleRun.objects.update(published_at=None)
        scheduler.run_pass()
        first, second = (headers for _, headers in published)
        assert first["schedule_run"] == second["schedule_run"]
        assert claims.claim(second)
        assert not claims.claim(first)
        # Redelivered after its worker was lost
        assert claims.claim(second)

    def test_claim_of_a_beat_that_is_gone_expires(self, scheduler, published):
        make(last_run_at=NOW - 10 * MINUTE)
        (row,) = scheduler.get_rows()
        (run,) = scheduler.store_runs([(NOW, row)], timezone.now())
        # Another beat, at the same time and later
        assert scheduler.claim_runs(NOW) == []
        ScheduleRun.objects.update(claimed_at=F("claimed_at") - module.CLAIM)
        (same,) = scheduler.claim_runs(NOW)
        assert (same, same.attempts) == (run, 2)
        assert scheduler.publish_runs([same])
        assert scheduler.claim_runs(NOW) == []

    def test_beat_that_is_paused_after_its_claim_keeps_its_number(
        self, scheduler, published, monkeypatch
    ):
        """Otherwise its message would have the number of the beat that took over."""
        ScheduleRun.objects.create(schedule=make(), due_at=NOW)
        short_transaction = module.short_transaction

        @contextmanager
        def claim_by_another_beat():
            with short_transaction():
                yield
            ScheduleRun.objects.update(attempts=2)

        monkeypatch.setattr(module, "short_transaction", claim_by_another_beat)
        (run,) = scheduler.claim_runs(NOW)
        assert run.attempts == 1

    def test_run_that_the_broker_refuses_does_not_hold_up_others(
        self, scheduler, published, monkeypatch
    ):
        for name in ("a", "b", "c"):
            make(name=name, last_run_at=NOW - 10 * MINUTE)
        accept = Task.apply_async

        def break_connection(task, args=None, kwargs=None, headers=None, **options):
            if headers["periodic_task_name"] == "b":
                raise BrokerError("the broker closed the connection")
            accept(task, args, kwargs, headers, **options)

        monkeypatch.setattr(Task, "apply_async", break_connection)
        for _ in range(4):
            scheduler.run_pass()
        assert {headers["periodic_task_name"] for _, headers in published} == {"a", "c"}
        (refused,) = ScheduleRun.objects.filter(published_at=None)
        assert refused.schedule.name == "b"

    @pytest.mark.parametrize(
        ("fields", "days"),
        [
            ({"expires": NOW + timedelta(days=365)}, 49),
            ({"expires": NOW + timedelta(days=2)}, 2),
            ({"expire_seconds": 2**31 - 1}, 49),
            ({"expire_seconds": 24 * 3600}, 1),
        ],
    )
    def test_message_expires_when_rabbitmq_can_count_to(self, scheduler, fields, days):
        """It closes the connection otherwise, and no other run is published."""
        run = ScheduleRun(schedule=make(**fields), due_at=NOW)
        with time_machine.travel(NOW, tick=False):
            expires = scheduler.make_entry(run).options["expires"]
        if isinstance(expires, datetime):
            expires = (expires - NOW).total_seconds()
        assert expires == timedelta(days=days).total_seconds()

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
        scheduler.run_pass()
        assert len(published) == 1
        return ScheduleRun.objects.get()

    def tick_later(self, scheduler, clock, minutes):
        ScheduleRun.objects.update(published_at=F("published_at") - minutes * MINUTE)
        clock.now += 10 * MINUTE
        scheduler.run_pass()

    def test_run_is_left_out_while_another_waits(self, waiting, scheduler, clock, published):
        self.tick_later(scheduler, clock, 4)
        assert len(published) == 1

    def test_run_is_queued_after_the_other_was_started(self, waiting, scheduler, clock, published):
        claims.claim(published[0][1])
        self.tick_later(scheduler, clock, 0)
        assert len(published) == 2

    def test_message_that_was_lost_is_replaced(self, waiting, scheduler, clock, published):
        Heartbeat.objects.create(process="worker", host="a", pid=1, seen_at=timezone.now())
        self.tick_later(scheduler, clock, 6)
        assert len(published) == 2

    def test_nothing_piles_up_while_no_worker_runs(self, waiting, scheduler, clock, published):
        for _ in range(10):
            self.tick_later(scheduler, clock, 10)
        assert len(published) == 1

    def test_tasks_that_do_all_that_is_due_coalesce(self):
        assert isinstance(tasks.resume_deliveries._get_current_object(), CoalescingTask)
        assert isinstance(delete_records._get_current_object(), CoalescingTask)
        assert not isinstance(tasks.send_notification._get_current_object(), CoalescingTask)


class TestWithoutOverlapping:
    @pytest.fixture
    def running(self, scheduler, published):
        """The headers of a run that a worker has started."""
        make(task=exclusive.name, last_run_at=NOW - 10 * MINUTE)
        scheduler.run_pass()
        ((_, headers),) = published
        assert claims.claim(headers)
        return headers

    def tick_later(self, scheduler, clock):
        clock.now += 10 * MINUTE
        scheduler.run_pass()

    def test_run_is_left_out_while_the_last_one_is_at_work(
        self, running, scheduler, clock, published
    ):
        self.tick_later(scheduler, clock)
        assert len(published) == 1

    def test_run_is_queued_after_the_last_one_has_ended(self, running, scheduler, clock, published):
        exclusive.apply(headers=running)
        self.tick_later(scheduler, clock)
        assert len(published) == 2

    def test_run_of_a_worker_that_was_lost_ends_with_its_time_limit(
        self, running, scheduler, clock, published, settings
    ):
        ScheduleRun.objects.update(
            started_at=F("started_at") - timedelta(seconds=settings.CELERY_TASK_TIME_LIMIT)
        )
        self.tick_later(scheduler, clock)
        assert len(published) == 2

    def test_task_with_a_longer_limit_is_still_running(
        self, running, scheduler, clock, published, settings, monkeypatch
    ):
        monkeypatch.setattr(exclusive, "time_limit", 3600)
        monkeypatch.setattr(waiting, "time_limit", 3600)
        past = F("started_at") - timedelta(seconds=settings.CELERY_TASK_TIME_LIMIT)
        ScheduleRun.objects.update(started_at=past)
        self.tick_later(scheduler, clock)
        assert len(published) == 1


class TestWaiting(TestWithoutOverlapping):
    """The last run that was due meanwhile is queued when the running one has ended."""

    @pytest.fixture
    def running(self, scheduler, published):
        make(task=waiting.name, last_run_at=NOW - 10 * MINUTE)
        scheduler.run_pass()
        ((_, headers),) = published
        assert claims.claim(headers)
        return headers

    def test_run_is_queued_soon_after_the_last_one_has_ended(
        self, running, scheduler, clock, published
    ):
        for _ in range(3):
            self.tick_later(scheduler, clock)
        assert len(published) == 1
        waiting.apply(headers=running)
        clock.now += MINUTE
        for _ in range(2):
            assert scheduler.run_pass() <= scheduler.max_interval
        _, (_, headers) = published
        assert headers["queued_at"] == (NOW + 30 * MINUTE).isoformat()
        assert timing.get_next(scheduler.get_rows()[0], clock.now) == NOW + 40 * MINUTE


class TestRecords:
    def test_old_ones_are_deleted(self):
        row = make()
        for days in (6, 8):
            ScheduleRun.objects.create(schedule=row, due_at=NOW - timedelta(days=days))
            seen_at = NOW - timedelta(hours=4 * days - 6)
            Heartbeat.objects.create(process="beat", host="a", pid=days, seen_at=seen_at)
        with time_machine.travel(NOW):
            delete_records()
        assert [run.due_at for run in ScheduleRun.objects.all()] == [NOW - timedelta(days=6)]
        assert [row.pid for row in Heartbeat.objects.all()] == [6]
