"""The broker: a worker runs queued tasks, whichever broker is configured."""

import os
import resource
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import timedelta
from multiprocessing import get_context
from queue import Empty, Queue
from threading import Barrier, Event
from unittest.mock import Mock

import pytest
from celery import current_app
from celery.bin.worker import worker as command
from celery.worker import state
from django.db import InterfaceError, OperationalError
from django.utils import timezone
from kombu import Connection
from kombu.exceptions import OperationalError as BrokerError
from kombu.transport import resolve_transport

from prodserver_ops import broker
from prodserver_ops.broker.embedded import Transport
from prodserver_ops.worker import app


def test_broker_of_these_tests_is_the_chosen_one(request):
    chosen = request.config.getoption("--broker") or "embedded"
    assert broker.find(current_app.conf.broker_url).module == chosen


@pytest.mark.django_db(transaction=True, serialized_rollback=True)
def test_worker_runs_queued_tasks_and_knows_when_they_were_queued(run_worker):
    done = Queue()

    @current_app.task(name="tests.note", bind=True, shared=False)
    def note(self, text):
        done.put((text, self.queued_at))

    with run_worker():
        now = timezone.now()
        note.delay("first")
        note.delay("second")
        results = dict([done.get(timeout=30), done.get(timeout=30)])
    assert set(results) == {"first", "second"}
    assert all(abs(queued_at - now) < timedelta(seconds=30) for queued_at in results.values())


@pytest.mark.django_db(transaction=True, serialized_rollback=True)
def test_worker_runs_many_tasks_that_were_queued_together(run_worker):
    done = Queue()

    @current_app.task(name="tests.note_number", bind=True, shared=False)
    def note(self, number):
        done.put((number, self.queued_at, self.request.expires))

    with run_worker():
        now = timezone.now()
        note.apply_many([])
        note.apply_many(((number,) for number in range(100)), expires=600)
        results = [done.get(timeout=30) for _ in range(100)]
    assert sorted(number for number, _, _ in results) == list(range(100))
    assert all(abs(queued_at - now) < timedelta(seconds=30) for _, queued_at, _ in results)
    assert all(expires for _, _, expires in results)


@pytest.mark.parametrize("error", [InterfaceError, OperationalError])
def test_task_is_tried_again_if_the_database_is_unavailable(error):
    attempts = []

    def query():
        attempts.append(1)
        raise error("the connection is closed")

    name = f"tests.query_{error.__name__}"
    task = current_app.task(query, name=name, shared=False)
    assert (task.apply().state, len(attempts)) == ("FAILURE", 4)
    attempts.clear()
    task = current_app.task(query, name=f"{name}_once", shared=False, autoretry_for=())
    assert (task.apply().state, len(attempts)) == ("FAILURE", 1)


@pytest.mark.django_db(transaction=True, serialized_rollback=True)
def test_message_stays_if_neither_database_nor_broker_is_available(run_worker, monkeypatch):
    attempts = Queue()

    @current_app.task(name="tests.cut_off", shared=False)
    def cut_off():
        attempts.put(1)
        if not apply_async.called:
            raise OperationalError("the connection is closed")

    cut_off.delay()
    apply_async = Mock(side_effect=BrokerError("the broker does not respond"))
    monkeypatch.setattr(app.Task, "apply_async", apply_async)
    with run_worker():
        for _ in range(2):
            attempts.get(timeout=30)
    assert apply_async.call_count == 1


NUMBERS = range(500)


def connect(folder):
    """Open a channel of the embedded broker on a folder."""
    options = dict.fromkeys(("data_folder_in", "data_folder_out", "control_folder"), str(folder))
    return Connection(transport=Transport, transport_options=options).channel()


def write(folder):
    channel = connect(folder)
    for number in NUMBERS:
        channel._put("queue", number)
        time.sleep(0.001)  # Slower than the reader, so that both meet.


class TestEmbeddedBroker:
    def test_is_the_transport_of_filesystem_urls(self):
        assert resolve_transport("filesystem") is Transport

    def test_messages_never_leave_the_folder(self, tmp_path, monkeypatch):
        # No file can be moved to another file system, or written to it.
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "does" / "not" / "exist"))
        channel = connect(tmp_path)
        for number in range(3):
            channel._put("queue", number)
        channel._put("queue.other", 9)
        assert sorted(channel._get("queue") for _ in range(3)) == [0, 1, 2]
        with pytest.raises(Empty):
            channel._get("queue")
        assert channel._get("queue.other") == 9

    def test_nothing_is_left_of_a_message_that_does_not_fit_on_the_disk(self, tmp_path):
        channel = connect(tmp_path)
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10, limits[1]))
        try:
            with pytest.raises(BrokerError):
                channel._put("queue", "x" * 100)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert list(tmp_path.iterdir()) == []

    def test_message_is_visible_only_when_it_is_complete(self, tmp_path):
        received = []
        writer = get_context("spawn").Process(target=write, args=[tmp_path])
        writer.start()
        channel = connect(tmp_path)
        while writer.is_alive() or channel._size("queue"):
            with suppress(Empty):
                received.append(channel._get("queue"))
        assert sorted(received) == list(NUMBERS)

    def test_queues_of_processes_that_start_together_are_all_kept(self, tmp_path):
        barrier = Barrier(8)

        def bind(number):
            barrier.wait()
            connect(tmp_path)._queue_bind(exchange, "", "", f"queue {number}")

        with ThreadPoolExecutor(8) as pool:
            for exchange in map(str, range(100)):
                list(pool.map(bind, range(8)))
                assert len(connect(tmp_path).get_table(exchange)) == 8


@pytest.mark.parametrize("status", [0, 1])
def test_a_worker_that_fails_exits_with_its_status(monkeypatch, status):
    monkeypatch.setattr(type(command), "main", lambda *args, **kwargs: status)
    if status:
        with pytest.raises(SystemExit, match="1"):
            current_app.start(["worker"])
    else:
        current_app.start(["worker"])


@pytest.mark.parametrize("is_lost", [False, True])
def test_a_worker_that_has_to_stop_ends_without_the_broker_or_lost_tasks(
    monkeypatch, caplog, is_lost
):
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    lost = [Mock(worker_pid=process.pid)] if is_lost else []
    waits = iter([[Mock(worker_pid=None)], [Mock(worker_pid=os.getpid())], lost])
    ended = []
    monkeypatch.setattr(app, "STOP_TIMEOUT", 0.2)
    monkeypatch.setattr(app.time, "sleep", lambda seconds: Event().wait(0.15))
    monkeypatch.setattr(state, "active_requests", Tasks(lambda: next(waits, lost)))
    monkeypatch.setattr(app.os, "_exit", ended.append)
    monkeypatch.setattr(app.logging, "shutdown", lambda: None)
    app.end_when_idle()
    assert (ended, next(waits, None)) == ([1], None)
    assert "lost (get_place in app.py:" in caplog.text


class Tasks:
    """A collection that changes."""

    def __init__(self, get):
        self.get = get

    def __iter__(self):
        return iter(self.get())
