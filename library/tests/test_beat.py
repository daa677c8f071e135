"""Beat: one process dispatches; a process that hangs or has lost its lease restarts."""

import pytest
from celery import current_app
from django.db import InterfaceError, OperationalError

from prodserver_ops.scheduling import beat
from prodserver_ops.scheduling.leases import LostLease


class Restarted(BaseException):
    """The process was replaced."""


@pytest.fixture(autouse=True)
def restarts(monkeypatch):
    """Collect the reasons for restarts instead of restarting."""
    reasons = []

    def restart(reason):
        reasons.append(reason)
        raise Restarted

    monkeypatch.setattr(beat, "restart", restart)
    return reasons


class FakeLease:
    """A lease with these results of ``acquire()``, or of ``renew()``."""

    number = 1

    def __init__(self, *results):
        self.results = iter(results)

    def acquire(self):
        result = next(self.results)
        if isinstance(result, Exception):
            raise result
        return result

    renew = acquire


@pytest.fixture
def set_lease(monkeypatch):
    """Return a function that replaces the lease of beat."""
    monkeypatch.setattr(beat.heartbeats, "record", lambda process: None)
    monkeypatch.setattr(beat, "close_old_connections", lambda: None)
    monkeypatch.setattr(beat.connections, "close_all", lambda: None)
    return lambda *results: monkeypatch.setattr(beat, "lease", FakeLease(*results))


def test_standby_waits_for_the_lease_and_logs_each_reason_once(monkeypatch, caplog, set_lease):
    unavailable = OperationalError("password=hunter2")
    set_lease(False, unavailable, unavailable, False, True)
    waits = []
    monkeypatch.setattr(beat.time, "sleep", waits.append)
    beat.wait_for_lease()
    assert waits == [1, 1, 1, 1]
    assert [record.getMessage() for record in caplog.records] == [
        "beat: Standing by: another beat is running",
        "beat: Standing by: the database does not respond (OperationalError)",
        "beat: Standing by: another beat is running",
    ]


class TestPass:
    def test_renews_the_lease_and_runs(self, set_lease):
        set_lease(True)
        assert beat.guard(lambda: 3)() == 3

    def test_restarts_when_the_lease_is_lost(self, set_lease, restarts):
        set_lease(LostLease())
        with pytest.raises(Restarted):
            beat.guard(lambda: pytest.fail("ran"))()
        assert restarts == ["another beat has taken over"]

    @pytest.mark.parametrize("error", [OperationalError, InterfaceError])
    def test_waits_for_an_unavailable_database(self, set_lease, caplog, error):
        set_lease(error(), error(), True, error())
        guarded = beat.guard(lambda: 3)
        assert [guarded() for _ in range(4)] == [1, 1, 3, 1]
        message = f"beat: Waiting: the database does not respond ({error.__name__})"
        assert [record.getMessage() for record in caplog.records] == [message] * 2

    def test_pass_that_hangs_restarts_the_process(self, monkeypatch, restarts):
        times = iter([0, 30, 60, 61])
        monkeypatch.setattr(beat, "_passed_at", 0)
        monkeypatch.setattr(beat.time, "monotonic", lambda: next(times))
        monkeypatch.setattr(beat.time, "sleep", lambda seconds: None)
        with pytest.raises(Restarted):
            beat.watch()
        assert restarts == ["no pass ended for 60 seconds"]
        assert list(times) == []


class TestDispatchOfAnotherScheduler:
    def test_is_held_back_without_the_lease(self, set_lease, restarts):
        set_lease(LostLease(), OperationalError())
        for _ in range(2):
            with pytest.raises(Restarted):
                beat.hold_back_without_lease()
        assert restarts == ["another beat has taken over", "the database does not respond"]

    def test_goes_on_with_it(self, set_lease, restarts):
        set_lease(True)
        beat.hold_back_without_lease()
        assert restarts == []


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
    """A beat service that has the lease."""
    monkeypatch.setattr(beat.signal, "alarm", lambda seconds: None)
    monkeypatch.setattr(beat, "lead", lambda sender, **kwargs: None)
    monkeypatch.setattr(beat.signals.beat_init, "receivers", [])
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


def test_celery_app_uses_its_scheduler_and_the_standby_beat():
    assert current_app.conf.beat_scheduler.endswith(".scheduling.scheduler:Scheduler")
    assert issubclass(current_app.Beat, beat.Beat)
