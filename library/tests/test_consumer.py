"""What a worker's consumer does with a message before its task runs."""

import time
from queue import Empty, Queue
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
from amqp import PreconditionFailed
from celery import current_app
from celery.exceptions import WorkerShutdown

from prodserver_ops import broker
from prodserver_ops.worker import consumer, failed
from prodserver_ops.worker.app import get_failed_queue, make_failed_queue
from prodserver_ops.worker.consumer import MAX_DELIVERIES, Consumer

CLASSIC = PreconditionFailed(
    "PRECONDITION_FAILED - inequivalent arg 'x-queue-type' for queue 'shop' in vhost 'web': "
    "received 'quorum' but current is 'classic'"
)


@pytest.fixture
def done():
    """The queue of the arguments that the task ``tests.poison`` ran with."""
    done = Queue()

    @current_app.task(name="tests.poison", shared=False)
    def poison(value):
        done.put(value)

    empty_failed_queue()
    yield done
    del current_app.tasks["tests.poison"]
    empty_failed_queue()


def empty_failed_queue():
    with current_app.connection_for_write() as connection:
        bound = make_failed_queue(current_app)(connection.default_channel)
        bound.declare()
        bound.purge()


def count_failed():
    return broker.count_messages(current_app, [get_failed_queue()], 5)[get_failed_queue()]


@pytest.mark.django_db(transaction=True, serialized_rollback=True)
class TestPoison:
    """A task that kills each worker is delivered again and again."""

    @pytest.mark.parametrize("count", [None, 0, "x", MAX_DELIVERIES - 1])
    def test_runs_as_long_as_it_is_not_delivered_too_often(self, done, run_worker, count):
        current_app.send_task("tests.poison", [1], headers={"x-delivery-count": count})
        with run_worker():
            assert done.get(timeout=20) == 1
        assert count_failed() == 0

    def test_is_given_up_and_kept_until_somebody_returns_it(self, done, run_worker, caplog):
        current_app.send_task("tests.poison", [1], headers={"x-delivery-count": MAX_DELIVERIES})
        with run_worker():
            deadline = time.monotonic() + 20
            while not count_failed():
                assert time.monotonic() < deadline
                time.sleep(0.02)
        with pytest.raises(Empty):
            done.get_nowait()
        assert f"tests.poison was delivered {MAX_DELIVERIES} times" in caplog.text
        # A worker that starts leaves it; the command runs it again.
        assert failed.requeue(current_app, lambda message: "unknown_since" in message.headers) == 0
        assert failed.requeue(current_app, lambda message: True) == 1
        with run_worker():
            assert done.get(timeout=20) == 1

    def test_stays_in_its_queue_if_it_cannot_be_moved(self, monkeypatch, caplog):
        def refuse(*args):
            raise ConnectionError

        monkeypatch.setattr(failed, "republish", refuse)
        info = {"exchange": "", "routing_key": "shop"}
        message = SimpleNamespace(headers={"task": "tests.poison"}, delivery_info=info)
        consumer.Consumer.give_up_task(SimpleNamespace(app=current_app), message)
        assert "Could not move a message: ConnectionError" in caplog.text


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (CLASSIC, "The queue shop of RabbitMQ is not a quorum queue. Let the service that made it"),
        (
            PreconditionFailed("inequivalent arg 'type' for exchange 'shop' in vhost '/'"),
            "The exchange shop of RabbitMQ exists with another type; rename or delete it",
        ),
    ],
)
def test_worker_whose_queue_exists_with_another_type_ends_with_one_line(
    monkeypatch, caplog, error, line
):
    def start(consumer):
        raise error

    monkeypatch.setattr(failed.Consumer, "start", start)
    conf = SimpleNamespace(broker_url="amqp://")
    monkeypatch.setattr(consumer.delayed, "Keeper", Mock())
    stopped = Consumer.__new__(Consumer)
    stopped.app, stopped.channel_errors = SimpleNamespace(conf=conf), (PreconditionFailed,)
    with pytest.raises(WorkerShutdown):
        stopped.start()
    (record,) = [record for record in caplog.records if record.levelname == "CRITICAL"]
    assert record.message.startswith(line)


def test_other_errors_end_a_worker_as_before(monkeypatch):
    def start(consumer):
        raise PreconditionFailed("something else")

    monkeypatch.setattr(failed.Consumer, "start", start)
    monkeypatch.setattr(consumer.delayed, "Keeper", Mock())
    for url in ("amqp://", "memory://"):
        conf = SimpleNamespace(broker_url=url)
        stopped = Consumer.__new__(Consumer)
        stopped.app, stopped.channel_errors = SimpleNamespace(conf=conf), (PreconditionFailed,)
        with pytest.raises(PreconditionFailed):
            stopped.start()
