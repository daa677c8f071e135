"""Beat: it waits for a database that is away, and stops between two passes."""

import pytest
from celery import current_app, signals
from django.db import InterfaceError, OperationalError
from django_celery_beat.schedulers import DatabaseScheduler

from prodserver_ops.scheduling import beat
from prodserver_ops.scheduling.scheduler import Scheduler as OwnScheduler


@pytest.fixture(autouse=True)
def _no_database(monkeypatch):
    monkeypatch.setattr(beat.heartbeats, "record", lambda process: None)
    monkeypatch.setattr(beat, "close_old_connections", lambda: None)
    monkeypatch.setattr(beat.connections, "close_all", lambda: None)


@pytest.mark.parametrize("error", [OperationalError, InterfaceError])
def test_pass_waits_for_a_database_that_is_away(caplog, error):
    results = iter([error("password=hunter2"), error(), 3, error()])

    def tick():
        result = next(results)
        if isinstance(result, Exception):
            raise result
        return result

    guarded = beat.guard(tick)
    assert [guarded() for _ in range(4)] == [1, 1, 3, 1]
    message = f"beat: Waiting: the database does not respond ({error.__name__})"
    assert [record.getMessage() for record in caplog.records] == [message] * 2


class Sender:
    """A service of beat."""

    def __init__(self, scheduler_class):
        self.scheduler = scheduler_class(app=current_app)


def test_another_scheduler_is_refused(monkeypatch, caplog):
    """It would dispatch what the beat beside it dispatches too."""
    monkeypatch.setattr(DatabaseScheduler, "setup_schedule", lambda self: None)
    with pytest.raises(SystemExit) as exit:
        beat.prepare(Sender(DatabaseScheduler))
    assert exit.value.code == 1
    assert "start beat without --scheduler" in caplog.text


def test_each_pass_is_guarded(monkeypatch):
    monkeypatch.setattr(beat.atexit, "register", lambda function: None)

    def fail(self, *args, **kwargs):
        raise OperationalError

    monkeypatch.setattr(OwnScheduler, "tick", fail)
    sender = Sender(OwnScheduler)
    beat.prepare(sender)
    assert sender.scheduler.tick() == beat.RETRY_INTERVAL


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


@pytest.fixture
def service(monkeypatch):
    """A beat service."""
    monkeypatch.setattr(beat.signal, "alarm", lambda seconds: None)
    monkeypatch.setattr(signals.beat_init, "receivers", [])
    return beat.Service(current_app, scheduler_cls=Scheduler)


def test_a_signal_ends_beat_between_two_passes(monkeypatch, service):
    monkeypatch.setattr(beat.time, "sleep", lambda seconds: service.request_stop())
    service.start()
    assert (service.scheduler.passes, service.scheduler.closed) == (1, True)


def test_a_signal_does_not_interrupt_a_pass(monkeypatch, service):
    after = []

    def tick(self):
        service.request_stop()
        after.append("completed")

    monkeypatch.setattr(Scheduler, "tick", tick)
    service.start()
    assert after == ["completed"]


def test_celery_app_uses_its_scheduler_and_beat():
    assert current_app.conf.beat_scheduler == "prodserver_ops.scheduling.scheduler:Scheduler"
    assert issubclass(current_app.Beat, beat.Beat)
