"""Beat: it waits for an unavailable database, and stops between two passes."""

import pytest
from celery import current_app, signals
from django.db import InterfaceError, OperationalError
from django_celery_beat.schedulers import DatabaseScheduler

from prodserver_ops.scheduling import beat, scheduler
from prodserver_ops.scheduling.scheduler import Scheduler


@pytest.fixture(autouse=True)
def _no_database(monkeypatch):
    monkeypatch.setattr(scheduler.heartbeats, "record", lambda process: None)
    monkeypatch.setattr(scheduler, "close_old_connections", lambda: None)
    monkeypatch.setattr(scheduler.connections, "close_all", lambda: None)
    monkeypatch.setattr(beat.atexit, "register", lambda function: None)


class Clock:
    """A clock that stands still between two calls of the scheduler."""

    now = 1000.0

    def monotonic(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(scheduler, "time", clock)
    monkeypatch.setattr("celery.beat.time", clock)
    return clock


def make_scheduler(*results):
    """Return a scheduler whose passes have these results: a wait, an error or a function."""
    own = Scheduler(app=current_app, max_interval=5)
    iterator = iter(results)

    def run_pass():
        result = next(iterator)
        if isinstance(result, Exception):
            raise result
        return result() if callable(result) else result

    own.run_pass = run_pass
    return own


@pytest.mark.parametrize("error", [OperationalError, InterfaceError])
def test_pass_waits_for_a_database_that_is_away(caplog, clock, error):
    own = make_scheduler(error("password=hunter2"), error(), 3, error())
    waits = []
    for _ in range(4):
        own.tick()
        waits.append(own.next_pass - clock.now)
        clock.now = own.next_pass
    assert waits == [1, 1, 3, 1]
    message = f"beat: Waiting: the database is unavailable ({error.__name__})"
    assert [record.getMessage() for record in caplog.records] == [message] * 2


def test_pass_starts_at_its_time_and_not_before(clock):
    own = make_scheduler(0.5, 0)
    assert own.tick() == scheduler.STOP_INTERVAL
    clock.now += 0.4
    assert own.tick() == pytest.approx(0.1)
    clock.now = own.next_pass
    assert own.tick() == 0
    with pytest.raises(StopIteration):
        own.tick()


class Sender:
    """A service of beat."""

    def __init__(self, scheduler_class):
        self.scheduler = scheduler_class(app=current_app)


def test_another_scheduler_is_refused(monkeypatch, caplog):
    """It would dispatch what the beat beside it dispatches too."""
    beat.prepare(Sender(Scheduler))
    monkeypatch.setattr(DatabaseScheduler, "setup_schedule", lambda self: None)
    with pytest.raises(SystemExit) as exit:
        beat.prepare(Sender(DatabaseScheduler))
    assert exit.value.code == 1
    assert "start beat without --scheduler" in caplog.text


@pytest.fixture
def service(monkeypatch):
    """A beat service."""
    monkeypatch.setattr(beat.signal, "alarm", lambda seconds: None)
    monkeypatch.setattr(signals.beat_init, "receivers", [])
    return beat.Service(current_app)


def test_a_signal_ends_beat_between_two_passes(clock, service, monkeypatch):
    service.scheduler = make_scheduler(3600)
    monkeypatch.setattr(clock, "sleep", lambda seconds: service.request_stop())
    service.start()
    assert service._is_stopped.is_set()


def test_a_signal_does_not_interrupt_a_pass(clock, service):
    after = []

    def run_pass():
        service.request_stop()
        after.append("completed")
        return 0

    service.scheduler = make_scheduler(run_pass)
    service.start()
    assert after == ["completed"]


def test_beat_notices_a_signal_soon(clock, service, monkeypatch):
    """It does not sleep until the next pass."""
    service.scheduler = make_scheduler(3600)
    slept = []

    def sleep(seconds):
        slept.append(seconds)
        if len(slept) == 3:
            service.request_stop()

    monkeypatch.setattr(clock, "sleep", sleep)
    service.start()
    assert slept == [scheduler.STOP_INTERVAL] * 3


def test_celery_app_uses_its_scheduler_and_beat():
    assert current_app.conf.beat_scheduler == "prodserver_ops.scheduling.scheduler:Scheduler"
    assert issubclass(current_app.Beat, beat.Beat)
