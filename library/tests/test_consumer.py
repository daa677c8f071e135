"""What a worker's consumer does with a message before its task runs."""

from datetime import datetime
from queue import Empty, Queue
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
from amqp import PreconditionFailed
from celery import current_app
from celery.exceptions import WorkerShutdown
from django.utils import timezone
from kombu.utils.limits import TokenBucket

from prodserver_ops import broker
from prodserver_ops.worker import consumer, failed
from prodserver_ops.worker.app import get_failed_queue, make_failed_queue
from prodserver_ops.worker.consumer import MAX_DELIVERIES, Consumer

CLASSIC = PreconditionFailed(
    "PRECONDITION_FAILED - inequivalent arg 'x-queue-type' for queue 'shop' in vhost 'web': "
    "received 'quorum' but current is 'classic'"
)

#: What a method of the consumer needs.
CONSUMER = Consumer.__new__(Consumer)
CONSUMER.app, CONSUMER.task_buckets = current_app, {}


@pytest.fixture
def done():
    """The queue of the arguments that the task ``tests.often`` ran with."""
    done = Queue()

    @current_app.task(name="tests.often", shared=False)
    def often(value):
        done.put(value)

    empty_failed_queue()
    yield done
    del current_app.tasks["tests.often"]
    empty_failed_queue()


def empty_failed_queue():
    with current_app.connection_for_write() as connection:
        bound = make_failed_queue(current_app)(connection.default_channel)
        bound.declare()
        bound.purge()


def count_failed():
    return broker.count_messages(current_app, [get_failed_queue()], 5)[get_failed_queue()]


@pytest.mark.django_db(transaction=True, serialized_rollback=True)
class TestOftenDelivered:
    """A message is delivered again and again; its task may never have been started."""

    @pytest.mark.parametrize("count", [None, 0, "x", MAX_DELIVERIES - 1, MAX_DELIVERIES, 100])
    def test_runs_however_often_it_was_delivered(self, done, run_worker, count):
        current_app.send_task("tests.often", [1], headers={"x-delivery-count": count})
        with run_worker():
            assert done.get(timeout=20) == 1
        with pytest.raises(Empty):
            done.get_nowait()
        assert count_failed() == 0

    def test_is_a_new_message_before_the_broker_deletes_it(self, monkeypatch):
        published = []
        monkeypatch.setattr(failed, "republish", lambda *args: published.append(args))
        info = {"exchange": "a", "routing_key": "b"}
        for count in (MAX_DELIVERIES - 1, MAX_DELIVERIES):
            message = Mock(headers={"x-delivery-count": count}, delivery_info=info)
            message.decode.return_value = {}
            is_taken = Consumer.divert(CONSUMER, message)
            assert is_taken == message.ack.called == (count == MAX_DELIVERIES)
        assert published == [(current_app, message, ("a", "b"), message.headers)]

    def test_is_replaced_soon_if_that_is_not_possible_at_once(self, monkeypatch, caplog):
        monkeypatch.setattr(failed, "republish", Mock(side_effect=[ConnectionError, None]))
        message = Mock(delivery_info={"exchange": "", "routing_key": "shop"})
        consumer = Consumer.__new__(Consumer)
        consumer.app, consumer.timer = CONSUMER.app, Mock()
        consumer.replace(message, {})
        assert "Could not replace a message: ConnectionError" in caplog.text
        assert not message.ack.called
        ((_, function, args),) = [call.args for call in consumer.timer.call_after.mock_calls]
        function(*args)
        assert message.ack.called


def test_task_that_was_postponed_runs_when_its_rate_limit_allows_it(monkeypatch):
    published = []
    monkeypatch.setattr(failed, "republish", lambda *args: published.append(args[3]))
    limited = Consumer.__new__(Consumer)
    limited.app, limited.next_starts = current_app, {}
    limited.task_buckets = {"tests.limited": TokenBucket(1 / 60)}

    def receive(**headers):
        info = {"exchange": "", "routing_key": "dummy"}
        message = Mock(headers={"task": "tests.limited", **headers}, delivery_info=info)
        return limited.postpone(message)

    assert not limited.postpone(Mock(headers={"task": "another"}))
    # Due at once, and after one and two minutes.
    assert [receive() for _ in range(3)] == [False, True, True]
    assert not receive(postponed=True)
    # Another worker, or a restart, has delayed others until the same time.
    limited.task_buckets["tests.limited"].can_consume()
    assert receive(postponed=True)
    assert [headers["postponed"] for headers in published] == [True] * 3
    etas = [datetime.fromisoformat(headers["eta"]) for headers in published]
    waits = [(eta - timezone.now()).total_seconds() for eta in etas]
    assert waits == [pytest.approx(seconds, abs=10) for seconds in (60, 120, 180)]


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
