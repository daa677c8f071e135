"""Failed tasks: no message of an unknown task is lost, and each can run again."""

import threading
import time
from contextlib import suppress
from queue import Empty, Queue
from types import SimpleNamespace

import pytest
from celery import current_app
from django.core.management import call_command
from django.utils import timezone

from prodserver_ops.models import TaskRun
from prodserver_ops.worker import failed
from prodserver_ops.worker.app import get_failed_queue, make_failed_queue

NAME = "ops-test.new"

pytestmark = pytest.mark.django_db(transaction=True, serialized_rollback=True)


@pytest.fixture(autouse=True)
def short_times(monkeypatch):
    monkeypatch.setattr(failed, "UNKNOWN_SECONDS", 0.5)
    monkeypatch.setattr(failed, "HOLD_SECONDS", 0.1)
    # As with brokers that are servers, a stopping worker returns unacknowledged messages.
    monkeypatch.setattr("kombu.transport.memory.Channel.do_restore", True)


@pytest.fixture(autouse=True)
def no_other_tasks():
    """Empty the queues before and after each test."""

    def purge():
        own = current_app.amqp.queues[current_app.conf.task_default_queue]
        with current_app.connection_for_write() as connection:
            for queue in (own, make_failed_queue(current_app)):
                bound = queue(connection.default_channel)
                bound.declare()
                bound.purge()

    purge()
    yield
    purge()


@pytest.fixture
def learn():
    """A function that registers the task, and returns the queue of its arguments."""
    done = Queue()

    def learn():
        @current_app.task(name=NAME, shared=False)
        def new(number):
            done.put(number)

        return done

    yield learn
    current_app.tasks.pop(NAME, None)


def count_failed():
    with current_app.connection_for_read() as connection:
        channel = connection.default_channel
        with suppress(*connection.channel_errors):
            return channel.queue_declare(get_failed_queue(), passive=True).message_count
        return 0


def wait_for_failed(number):
    deadline = time.monotonic() + 20
    while count_failed() != number:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def give_up(numbers):
    """Add unknown tasks to the failed tasks, as a worker does."""
    queue = make_failed_queue(current_app)
    own = current_app.amqp.queues[current_app.conf.task_default_queue]
    source = [own.exchange.name, own.routing_key]
    for number in numbers:
        headers = {"unknown_since": 1, "unknown_from": source}
        current_app.send_task(NAME, [number], queue=queue, headers=headers)
    wait_for_failed(len(numbers))


def return_known_tasks():
    """Requeue failed tasks as a starting worker does, and wait for its thread."""
    failed.return_known_tasks(SimpleNamespace(app=current_app))
    for thread in threading.enumerate():
        if thread.name == "failed tasks":
            thread.join(timeout=20)


def get_all(done, count):
    return sorted(done.get(timeout=20) for _ in range(count))


def test_message_goes_back_until_a_worker_knows_its_task(learn, run_worker, monkeypatch):
    monkeypatch.setattr(failed, "UNKNOWN_SECONDS", 1000)
    for number in range(3):
        current_app.send_task(NAME, [number])
    returned = Queue()
    republish = failed.republish

    def note_and_republish(*args):
        republish(*args)
        returned.put(args)

    monkeypatch.setattr(failed, "republish", note_and_republish)
    with run_worker():
        for _ in range(4):
            returned.get(timeout=20)
    done = learn()
    with run_worker():
        assert get_all(done, 3) == [0, 1, 2]
    assert count_failed() == 0


def test_unknown_task_is_given_up_and_kept(run_worker, caplog):
    for number in range(2):
        current_app.send_task(NAME, [number])
    with run_worker():
        wait_for_failed(2)
    assert f"{NAME} is unknown to all workers and is given up" in caplog.text


def test_worker_that_knows_the_task_returns_it_when_it_starts(learn, run_worker):
    give_up([1, 2])
    done = learn()
    return_known_tasks()
    with run_worker():
        assert get_all(done, 2) == [1, 2]
    assert count_failed() == 0


def test_worker_that_does_not_know_the_task_leaves_it():
    give_up([1])
    return_known_tasks()
    assert count_failed() == 1


def test_requeue_runs_all_or_some_again(learn, run_worker, capsys):
    give_up([1, 2])
    call_command("requeue", "another.task")
    assert "0 tasks queued again" in capsys.readouterr().out
    assert count_failed() == 2
    call_command("requeue")
    assert "2 tasks queued again" in capsys.readouterr().out
    assert count_failed() == 0
    done = learn()
    with run_worker():
        assert get_all(done, 2) == [1, 2]
    with pytest.raises(Empty):
        done.get_nowait()


def test_runs_of_requeued_tasks_count_as_tried_again():
    given_up = {"status": "failed", "error": "it has lost 15 workers", "started_at": timezone.now()}
    task_id = current_app.send_task(NAME, [1], queue=make_failed_queue(current_app)).id
    for name in (task_id, "another"):
        TaskRun.objects.create(task_id=name, **given_up)
    call_command("requeue")
    repeated = TaskRun.objects.exclude(repeated_at=None)
    assert list(repeated.values_list("task_id", flat=True)) == [task_id]


def test_task_that_was_given_up_for_another_reason_is_returned_by_command_alone(learn):
    learn()
    queue = make_failed_queue(current_app)
    current_app.tasks[NAME].apply_async([7], queue=queue)
    return_known_tasks()
    assert count_failed() == 1
    assert failed.requeue(current_app, lambda message: True) == 1
    assert count_failed() == 0
