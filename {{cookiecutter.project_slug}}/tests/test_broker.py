"""The broker: a task that is queued is run by a worker, over whatever broker is set."""

import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import timedelta
from multiprocessing import get_context
from queue import Empty, Queue
from threading import Barrier

import pytest
from celery.contrib.testing.worker import start_worker
from django.utils import timezone
from kombu import Connection

from {{ cookiecutter.project_slug }} import celery_app


@pytest.mark.django_db(transaction=True, serialized_rollback=True)
def test_a_queued_task_is_run():
    done = Queue()

    @celery_app.task(name="tests.note", bind=True, shared=False)
    def note(self, text):
        done.put((text, self.queued_at))

    with start_worker(celery_app, perform_ping_check=False, shutdown_timeout=30):
        now = timezone.now()
        note.delay("run")
        note.delay("and done")
        found = dict([done.get(timeout=30), done.get(timeout=30)])
    assert set(found) == {"run", "and done"}
    assert all(abs(queued_at - now) < timedelta(seconds=30) for queued_at in found.values())


NUMBERS = range(1500)


def connect(folder):
    """Open a channel of the embedded broker on a folder."""
    options = dict.fromkeys(("data_folder_in", "data_folder_out", "control_folder"), str(folder))
    return Connection("filesystem://", transport_options=options).channel()


def write(folder):
    channel = connect(folder)
    for number in NUMBERS:
        channel._put("queue", number)
        time.sleep(0.001)  # A reader that is behind never meets a writer.


class TestTheEmbeddedBroker:
    def test_shows_a_message_when_it_is_whole(self, tmp_path):
        found = []
        writer = get_context("spawn").Process(target=write, args=[tmp_path])
        writer.start()
        channel = connect(tmp_path)
        while writer.is_alive() or channel._size("queue"):
            with suppress(Empty):
                found.append(channel._get("queue"))
        assert sorted(found) == list(NUMBERS)

    def test_keeps_the_queues_of_processes_that_start_at_once(self, tmp_path):
        together = Barrier(8)

        def bind(number):
            together.wait()
            connect(tmp_path)._queue_bind(exchange, "", "", f"queue {number}")

        with ThreadPoolExecutor(8) as pool:
            for exchange in map(str, range(100)):
                list(pool.map(bind, range(8)))
                assert len(connect(tmp_path).get_table(exchange)) == 8
