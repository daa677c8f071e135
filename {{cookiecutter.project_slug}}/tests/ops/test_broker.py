"""The broker: a worker runs queued tasks, whichever broker is configured."""

import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import timedelta
from multiprocessing import get_context
from queue import Empty, Queue
from threading import Barrier

import pytest
from celery import current_app
from celery.contrib.testing.worker import start_worker
from django.utils import timezone
from kombu import Connection
from kombu.transport import resolve_transport

from {{ cookiecutter.project_slug }}.ops.broker import Transport


@pytest.mark.django_db(transaction=True, serialized_rollback=True)
def test_worker_runs_queued_tasks_and_tells_when_they_were_queued():
    done = Queue()

    @current_app.task(name="tests.note", bind=True, shared=False)
    def note(self, text):
        done.put((text, self.queued_at))

    with start_worker(current_app, perform_ping_check=False, shutdown_timeout=30):
        now = timezone.now()
        note.delay("first")
        note.delay("second")
        results = dict([done.get(timeout=30), done.get(timeout=30)])
    assert set(results) == {"first", "second"}
    assert all(abs(queued_at - now) < timedelta(seconds=30) for queued_at in results.values())


NUMBERS = range(1500)


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
