"""The thread that renews what a worker holds; test_brokers.py tests it with servers."""

import time

import pytest

from prodserver_ops.broker import renewal


class Store:
    """The part of kombu's QoS that is used."""

    def __init__(self):
        self._delivered, self._dirty = {}, set()

    def append(self, message, tag):
        self._delivered[tag] = message


class QoS(renewal.RenewedQoS, Store):
    """A QoS that notes what it renews."""

    def __init__(self):
        super().__init__()
        self.renewed = []

    def renew(self, tags):
        self.renewed.append(tags)


@pytest.fixture
def qos(monkeypatch):
    monkeypatch.setattr(renewal, "watch", lambda qos: None)
    qos = QoS()
    for tag in "abc":
        qos.append("message", tag)
    qos._dirty.add("b")
    return qos


def pause(qos, seconds):
    qos.renewed_at -= seconds


def test_what_is_neither_acknowledged_nor_rejected_is_renewed(qos):
    qos.renew_held()
    qos.check()
    assert qos.renewed == [["a", "c"]]


def test_message_is_renewed_several_times_before_others_get_it():
    assert renewal.INTERVAL * 3 < renewal.LIMIT < renewal.VISIBILITY


def test_lost_message_is_back_within_a_minute():
    # Workers look for messages every 10 seconds.
    assert renewal.VISIBILITY + 10 < 60


@pytest.mark.parametrize("thread_is_first", [True, False])
def test_paused_worker_gives_up_what_it_held(qos, thread_is_first):
    pause(qos, renewal.LIMIT + 1)
    if thread_is_first:
        qos.renew_held()
        assert qos.renewed == []
    with pytest.raises(renewal.NotRenewed, match="30 seconds"):
        qos.check()
    assert qos.get_held() == []
    assert issubclass(renewal.NotRenewed, OSError)


def test_thread_that_hangs_is_noticed(qos, monkeypatch):
    qos.renew_held()
    qos.check()
    now = time.monotonic() + renewal.LIMIT + 1
    monkeypatch.setattr(renewal.time, "monotonic", lambda: now)
    with pytest.raises(renewal.NotRenewed):
        qos.check()


def test_idle_worker_has_nothing_to_renew(qos):
    qos._delivered.clear()
    pause(qos, 1000)
    qos.check()
    qos.renew_held()
    qos.append("message", "d")
    qos.check()
    assert qos.renewed == []


def test_failed_renewal_is_tried_again(qos, monkeypatch, caplog):
    passes = iter(range(3))

    def sleep(seconds):
        if next(passes, None) is None:
            raise SystemExit

    renew = qos.renew

    def fail_once(tags):
        monkeypatch.setattr(qos, "renew", renew)
        raise ConnectionError

    monkeypatch.setattr(qos, "renew", fail_once)
    monkeypatch.setattr(renewal, "_watched", [qos])
    monkeypatch.setattr(renewal.time, "sleep", sleep)
    with pytest.raises(SystemExit):
        renewal.renew_forever()
    assert len(qos.renewed) == 2
    assert "Could not renew the running tasks: ConnectionError" in caplog.text


def test_message_after_a_long_rest_is_held():
    """The first message may come when the worker has waited for longer than the limit."""
    qos = QoS()
    qos.renewed_at -= renewal.LIMIT + 1
    qos.append("message", "first")
    qos.renew_held()
    qos.check()
    assert qos.renewed == [["first"]]
