"""Beat: one process dispatches, and a missed run is made up for within an hour."""

from datetime import datetime, timedelta
from types import SimpleNamespace

import pytest
import time_machine
from celery import current_app
from django.db import OperationalError
from django.utils import timezone
from django_celery_beat.models import CrontabSchedule, PeriodicTask
from django_celery_beat.schedulers import ModelEntry

from {{ cookiecutter.project_slug }}.ops import beat

#: When the schedule of these tests is due.
DUE = datetime(2026, 11, 22, 3, tzinfo=timezone.get_default_timezone())


@pytest.mark.django_db
@pytest.mark.parametrize(
    ("beat_starts", "due"),
    [
        (DUE - timedelta(hours=2), False),
        (DUE, True),
        (DUE + timedelta(minutes=55), True),
        (DUE + timedelta(minutes=65), False),
        (DUE + timedelta(hours=22), False),
        (DUE + timedelta(hours=24), True),
    ],
)
def test_missed_run_is_made_up_for_within_an_hour(beat_starts, due):
    crontab = CrontabSchedule.objects.create(minute="0", hour="3", timezone=str(DUE.tzinfo))
    schedule = PeriodicTask(
        name="nightly", task="x", crontab=crontab, last_run_at=DUE - timedelta(days=1)
    )
    with time_machine.travel(beat_starts, tick=False):
        assert ModelEntry(schedule, app=current_app).is_due().is_due is due


@pytest.fixture
def make_lock():
    """Return a function that creates a lock with these results of ``acquire()``."""

    def make(*results):
        results = iter(results)

        def acquire():
            result = next(results)
            if isinstance(result, Exception):
                raise result
            return result

        return SimpleNamespace(acquire=acquire, connection=SimpleNamespace(close=lambda: None))

    return make


def test_standby_waits_for_the_lock_and_logs_each_reason_once(monkeypatch, caplog, make_lock):
    unavailable = OperationalError("password=hunter2")
    lock = make_lock(False, unavailable, unavailable, False, True)
    waits = []
    monkeypatch.setattr(beat.time, "sleep", waits.append)
    beat.wait_for(lock)
    assert waits == [beat.RETRY_INTERVAL] * 4
    assert [record.getMessage() for record in caplog.records] == [
        "beat: Standing by: another beat is running",
        "beat: Standing by: the database does not respond (OperationalError)",
        "beat: Standing by: another beat is running",
    ]


@pytest.mark.parametrize("held", [True, False])
def test_dispatch_without_the_lock_restarts_the_process(monkeypatch, held):
    restarts = []
    monkeypatch.setattr(beat, "_lock", SimpleNamespace(is_held=lambda: held))
    monkeypatch.setattr(beat, "restart", lambda: restarts.append(True))
    beat.hold_back_without_lock()
    assert restarts == ([] if held else [True])


class Scheduler:
    """A scheduler whose next schedule is due in an hour."""

    def __init__(self, **options):
        self.max_interval = 5
        self.passes = 0
        self.closed = False

    def tick(self):
        self.passes += 1
        return 3600

    def close(self):
        self.closed = True


def test_a_signal_ends_beat_between_two_passes(monkeypatch):
    monkeypatch.setattr(beat.signal, "alarm", lambda seconds: None)
    service = beat.Service(current_app, scheduler_cls=Scheduler, remote_control=False)
    monkeypatch.setattr(beat, "_lock", object())
    monkeypatch.setattr(beat.time, "sleep", lambda seconds: service.request_stop())
    service.start()
    assert (service.scheduler.passes, service.scheduler.closed) == (1, True)


def test_a_signal_does_not_interrupt_a_pass(monkeypatch):
    monkeypatch.setattr(beat.signal, "alarm", lambda seconds: None)
    service = beat.Service(current_app, scheduler_cls=Scheduler, remote_control=False)
    monkeypatch.setattr(beat, "_lock", object())
    after = []

    def tick(self):
        service.request_stop()
        after.append("completed")

    monkeypatch.setattr(Scheduler, "tick", tick)
    service.start()
    assert after == ["completed"]


def test_celery_app_uses_the_database_scheduler_and_the_standby_beat():
    assert current_app.conf.beat_scheduler == "django_celery_beat.schedulers:DatabaseScheduler"
    assert issubclass(current_app.Beat, beat.Beat)
