"""The brokers that are servers: a worker runs what was queued, on each of them."""

import json
import sys
import time
from contextlib import suppress
from datetime import timedelta
from itertools import pairwise
from queue import Empty, Queue
from types import SimpleNamespace
from uuid import uuid4

import amqp
import malformed
import pytest
import services
from celery import current_app
from celery.exceptions import Reject
from django.conf import settings
from django.db import OperationalError
from django.utils import timezone, translation
from dummy.settings import TestSettings
from kombu import Exchange
from kombu import Queue as KombuQueue
from kombu.transport import native_delayed_delivery as native
from kombu.transport import resolve_transport

from prodserver_ops import broker
from prodserver_ops.broker import postgresql, publishing, renewal
from prodserver_ops.conf.environment import evaluate
from prodserver_ops.core.logs import request_id
from prodserver_ops.models import DelayedTask
from prodserver_ops.web import health
from prodserver_ops.worker import delayed, failed, record
from prodserver_ops.worker.app import CeleryApp, get_failed_queue, make_failed_queue

pytestmark = pytest.mark.django_db(transaction=True, serialized_rollback=True)


@pytest.fixture(params=list(services.URLS))
def app(request, make_part, settings, monkeypatch):
    """The Celery app of a service that uses this broker, with queues of its own."""
    monkeypatch.setenv("CELERY_BROKER_URL", make_part(request.param))
    package = {"PACKAGE": f"sample_{uuid4().hex[:8]}"}
    values = evaluate(type("BrokerSettings", (TestSettings,), package)())
    for name, value in values.items():
        if name.startswith("CELERY_"):
            setattr(settings, name, value)
    monkeypatch.setattr(postgresql, "RETURN_DELAY", 0)
    before = current_app._get_current_object()
    app = CeleryApp(package["PACKAGE"], set_as_current=False)
    app.config_from_object(SimpleNamespace(**values), namespace="CELERY")
    assert broker.find(app.conf.broker_url).module == request.param
    yield app
    if request.param == services.RABBITMQ:
        delete_all(app)
    app.close()
    # A worker makes its app the default one.
    before.set_current()
    before.set_default()


def delete_all(app):
    """Delete the queues and exchanges of a service."""
    name = app.conf.task_default_queue
    with app.connection_for_write() as connection:
        channel = connection.default_channel
        for queue in (name, f"{name}.mail", f"{name}.failed"):
            channel.queue_delete(queue)
        for exchange in (name, f"{name}.failed", f"{name}.pidbox", f"reply.{name}.pidbox"):
            channel.exchange_delete(exchange)


@pytest.fixture
def note(app):
    """A task that notes its argument; ``note.done`` is the queue of the arguments."""

    @app.task(name="sample.note", bind=True, shared=False)
    def note(self, value):
        note.done.put(value)

    note.done = Queue()
    return note


def get_all(done, count):
    values = sorted(done.get(timeout=30) for _ in range(count))
    with pytest.raises(Empty):
        done.get_nowait()
    return values


def wait_for(condition):
    deadline = time.monotonic() + 30
    while True:
        # A table of SQLite in memory is locked while another thread writes to it.
        with suppress(OperationalError):
            if condition():
                return
        assert time.monotonic() < deadline
        time.sleep(0.05)


def count(app, *names):
    return list(broker.count_messages(app, names, 5).values())


def test_worker_runs_each_task_once(app, note, run_worker):
    note.delay(0)
    note.apply_many((number,) for number in range(1, 50))
    with run_worker(app):
        assert get_all(note.done, 50) == list(range(50))
    assert count(app, app.conf.task_default_queue) == [0]


def test_arguments_may_contain_any_text(app, note, run_worker):
    note.delay("a\0b\ud800")
    note.apply_async(["x"], headers={"origin": "\0"}, kwargs={})
    with run_worker(app):
        assert get_all(note.done, 2) == ["a\0b\ud800", "x"]


@pytest.mark.parametrize("app", [services.REDIS, services.POSTGRESQL], indirect=True)
def test_queue_may_contain_any_json(app, note, run_worker):
    queue = app.amqp.queues[app.conf.task_default_queue]
    with app.connection_for_write() as connection:
        channel = connection.default_channel
        queue(channel).declare()
        for envelope in malformed.ENVELOPES.values():
            if app.conf.broker_url.startswith("redis"):
                channel.client.lpush(queue.name, json.dumps(envelope))
            else:
                channel.pgmq.send(channel._queue_name(queue.name), envelope)
        if app.conf.broker_url.startswith("redis"):
            channel.client.lpush(queue.name, "no JSON")
    note.delay(1)
    with run_worker(app):
        assert note.done.get(timeout=30) == 1
        deadline = time.monotonic() + 30
        while count(app, queue.name) != [0]:
            assert time.monotonic() < deadline
            time.sleep(0.05)
    assert count(app, get_failed_queue()) >= [len(malformed.ENVELOPES)]


@pytest.mark.parametrize("app", [services.RABBITMQ], indirect=True)
def test_headers_that_the_client_cannot_read_end_no_worker(app, note, run_worker):
    queue = app.amqp.queues[app.conf.task_default_queue]
    deep = {}
    for _ in range(2000):
        deep = {"a": deep}
    limit = sys.getrecursionlimit()
    with app.connection_for_write() as connection:
        channel = connection.default_channel
        queue(channel).declare()
        for properties in (
            {"application_headers": {"task": note.name, "id": "deep", "deep": deep}},
            {"content_type": b"\xff"},
        ):
            message = amqp.Message(b"[[5], {}, {}]", **properties)
            sys.setrecursionlimit(100_000)
            try:
                channel.basic_publish(message, queue.exchange.name, queue.routing_key)
            finally:
                sys.setrecursionlimit(limit)
    note.delay(1)
    with run_worker(app):
        assert get_all(note.done, 1) == [1]
    assert count(app, queue.name, get_failed_queue()) == [0, 2]


def test_task_belongs_to_the_request_of_the_task_that_queued_it(app, run_worker):
    done = Queue()

    @app.task(name="sample.inner", bind=True, shared=False)
    def inner(self):
        done.put((request_id.get(), self.request.headers["request_id"]))

    @app.task(name="sample.outer", shared=False)
    def outer():
        inner.delay()
        app.send_task("sample.inner")

    token = request_id.set("request-1")
    publishing.start_request()
    try:
        outer.delay()
    finally:
        publishing.finish_request()
        request_id.reset(token)
    with run_worker(app):
        assert get_all(done, 2) == [("request-1", "request-1")] * 2


def test_task_may_be_delayed(app, note, run_worker):
    with run_worker(app):
        note.apply_async([1], countdown=1)
        with pytest.raises(Empty):
            note.done.get(timeout=0.5)
        assert get_all(note.done, 1) == [1]


@pytest.fixture
def short_delays(monkeypatch):
    """Store what is due in half a second or later."""
    monkeypatch.setattr(delayed, "HOLD", 0.5)
    monkeypatch.setattr(delayed, "INTERVAL", 0.5)


@pytest.mark.usefixtures("short_delays")
def test_task_that_is_not_due_is_stored(app, note, run_worker):
    # No worker has declared anything yet, and more tasks wait than a worker may hold.
    for number in range(20):
        note.apply_async([number], countdown=3600)
    note.delay(-1)
    with run_worker(app):
        assert get_all(note.done, 1) == [-1]
        wait_for(lambda: DelayedTask.objects.count() == 20)
        wait_for(lambda: count(app, app.conf.task_default_queue) == [0])
        note.apply_async([20], countdown=2)
        assert get_all(note.done, 1) == [20]
    assert DelayedTask.objects.filter(published_at=None).count() == 20
    assert DelayedTask.objects.count() == 21


@pytest.mark.usefixtures("short_delays")
def test_queue_of_an_earlier_service_does_not_block_a_worker(app, note, run_worker):
    name = f"{app.conf.task_default_queue}.old"
    old = KombuQueue(name, Exchange(f"{name}.exchange"), routing_key=f"{name}.key")
    with app.connection_for_write() as connection:
        old(connection.default_channel).declare()
        app.amqp.queues.select_add(KombuQueue(name, routing_key=name, no_declare=True))
        try:
            with run_worker(app):
                for number in range(5):
                    note.apply_async([number], countdown=4, queue=old)
                wait_for(lambda: DelayedTask.objects.filter(queue=name).count() == 5)
                note.delay(-1)
                assert get_all(note.done, 1) == [-1]
                assert get_all(note.done, 5) == [0, 1, 2, 3, 4]
        finally:
            connection.default_channel.queue_delete(name)
            if broker.find(app.conf.broker_url).module == services.RABBITMQ:
                connection.default_channel.exchange_delete(f"{name}.exchange")


def test_messages_that_rabbitmq_delays_for_earlier_releases_arrive(app, note, run_worker):
    if broker.find(app.conf.broker_url).module != services.RABBITMQ:
        pytest.skip("only RabbitMQ delayed messages")
    queue, prefix = app.amqp.queues[app.conf.task_default_queue], app.main
    with app.connection_for_write() as connection:
        queue(connection.default_channel).declare()
        native.declare_native_delayed_delivery_exchanges_and_queues(connection, "quorum", prefix)
        native.bind_queue_to_native_delayed_delivery_exchange(connection, queue, prefix)
        delayed_exchange = Exchange(native.level_name(native.MAX_LEVEL, prefix), type="topic")
        try:
            note.apply_async(
                [1],
                exchange=delayed_exchange,
                routing_key=native.calculate_routing_key(2, queue.routing_key),
                headers={"eta": (timezone.now() + timedelta(seconds=2)).isoformat()},
            )
            with run_worker(app):
                assert get_all(note.done, 1) == [1]
        finally:
            channel = connection.default_channel
            for level in range(native.MAX_LEVEL + 1):
                channel.queue_delete(native.level_name(level, prefix))
                channel.exchange_delete(native.level_name(level, prefix))
            channel.exchange_delete(f"{prefix}_{native.CELERY_DELAYED_DELIVERY_EXCHANGE}")
    assert not DelayedTask.objects.exists()


def test_rejected_message_is_delivered_again(app, run_worker):
    done, numbers = Queue(), iter(range(3))

    @app.task(name="sample.reject", shared=False)
    def reject():
        number = next(numbers)
        done.put(number)
        if number < 2:
            raise Reject("try again", requeue=True)

    reject.delay()
    with run_worker(app):
        assert get_all(done, 3) == [0, 1, 2]
    assert count(app, app.conf.task_default_queue) == [0]


def test_reply_to_a_process_that_has_ended_is_dropped(app):
    with app.connection() as connection:
        mailbox = app.control.mailbox(connection)
        mailbox._publish_reply({}, mailbox.reply_exchange.name, str(uuid4()), str(uuid4()))


def test_messages_of_each_queue_are_counted(app, note):
    names = [app.conf.task_default_queue, f"{app.conf.task_default_queue}.mail", "no.such.queue"]
    for _ in range(2):
        note.delay(1)
    note.apply_async([1], queue=names[1])
    assert count(app, *names) == [2, 1, 0]


def test_failed_task_runs_again(app, note, run_worker):
    assert failed.requeue(app, lambda message: True) == 0
    note.apply_async([7], queue=make_failed_queue(app))
    assert count(app, get_failed_queue()) == [1]
    assert failed.requeue(app, lambda message: False) == 0
    assert failed.requeue(app, lambda message: True) == 1
    assert count(app, get_failed_queue()) == [0]
    with run_worker(app):
        assert get_all(note.done, 1) == [7]


def test_task_that_loses_each_worker_is_given_up(app, run_worker, monkeypatch):
    starts = []

    @app.task(name="sample.poison", shared=False, max_losses=3)
    def poison(value):
        starts.append(value)
        # The broker delivers the message again, and the record of the run has no end.
        raise Reject("lost", requeue=True)

    monkeypatch.setattr(record.Recorder, "end", lambda *args: None)
    poison.delay(1)
    with run_worker(app):
        wait_for(lambda: count(app, get_failed_queue()) == [1])
    # The first start of each message is none after a loss.
    assert 3 < len(starts) < 7
    assert failed.requeue(app, lambda message: True) == 1
    assert count(app, app.conf.task_default_queue) == [1]


def test_task_that_raises_memory_error_fails_and_its_worker_goes_on(app, note, run_worker):
    @app.task(name="sample.memory", shared=False)
    def use_memory():
        raise MemoryError("too large")

    use_memory.delay()
    note.delay(1)
    with run_worker(app):
        assert get_all(note.done, 1) == [1]
    assert count(app, app.conf.task_default_queue) == [0]


def test_tasks_over_their_rate_limit_do_not_hold_up_others(app, note, run_worker):
    limited, done = Queue(), note.done

    @app.task(name="sample.limited", shared=False, rate_limit="1/m")
    def limit(value):
        limited.put(value)

    for number in range(5):
        limit.delay(number)
    note.delay(1)
    with run_worker(app):
        assert get_all(done, 1) == [1]
        assert get_all(limited, 1) == [0]
        wait_for(lambda: DelayedTask.objects.count() == 4)
    times = sorted(row.due_at for row in DelayedTask.objects.all())
    assert all(58 < (b - a).total_seconds() < 90 for a, b in pairwise(times))
    assert count(app, app.conf.task_default_queue) == [0]


def test_task_inherits_no_language_or_time_zone(app, run_worker):
    done = Queue()

    @app.task(name="sample.activate", shared=False)
    def activate():
        done.put((translation.get_language(), timezone.get_current_timezone_name()))
        translation.activate("fr")
        timezone.activate("Asia/Tokyo")

    activate.delay()
    activate.delay()
    with run_worker(app):
        assert get_all(done, 2) == [(settings.LANGUAGE_CODE, settings.TIME_ZONE)] * 2


def test_failed_tasks_may_be_read_any_number_of_times(app, note):
    note.apply_async([7], queue=make_failed_queue(app))
    for _ in range(4):
        assert failed.requeue(app, lambda message: False) == 0
    with app.connection_for_read() as connection:
        message = make_failed_queue(app)(connection.default_channel).get()
        # RabbitMQ 4 deletes a message that was returned 20 times.
        assert not message.headers.get("x-delivery-count")
        assert not message.delivery_info.get("redelivered")
        message.ack()
    assert count(app, get_failed_queue()) == [0]


def test_queue_of_another_type_is_found(app, monkeypatch):
    monkeypatch.setattr(health, "current_app", app)
    assert broker.find_problem(app, 5) is None
    if broker.find(app.conf.broker_url).module != services.RABBITMQ:
        return
    name = app.conf.task_default_queue
    with app.connection_for_write() as connection:
        channel = connection.default_channel
        channel.queue_delete(name)
        channel.queue_declare(name, durable=True, auto_delete=False)
        problem = broker.find_problem(app, 5)
        with pytest.raises(health.NotConsumed, match="is not a quorum queue"):
            health.check_queues()
        channel.queue_delete(name)
    assert problem.startswith(f"The queue {name} of RabbitMQ is not a quorum queue.")
    assert problem.endswith(f"delete_queue {name}")


def test_connection_has_the_options_of_its_module(app):
    url = broker.get_url(app.conf.broker_url)
    with app.connection_for_write() as connection:
        assert isinstance(connection.transport, resolve_transport(broker.get_scheme(url)))
        package = SimpleNamespace(PACKAGE=app.main, CELERY_TASK_TIME_LIMIT=300)
        options = broker.get_options(url, package)
        assert options
        assert connection.transport_options.items() >= options.items()


class TestRenewal:
    """Redis and PGMQ deliver a message again only when its worker is gone."""

    @pytest.fixture(autouse=True)
    def _times(self, app, monkeypatch):
        if broker.find(app.conf.broker_url).module == services.RABBITMQ:
            pytest.skip("RabbitMQ knows which connections are lost")
        monkeypatch.setattr(renewal, "VISIBILITY", 2)
        monkeypatch.setattr(renewal, "LIMIT", 1)
        options = dict(app.conf.broker_transport_options)
        if "visibility_timeout" in options:
            options["visibility_timeout"] = renewal.VISIBILITY
        app.conf.broker_transport_options = options

    @pytest.fixture
    def other(self, app):
        """The channel of another worker, which looks for messages of lost workers."""
        with app.connection_for_read() as connection:
            channel = connection.channel()
            app.amqp.queues[app.conf.task_default_queue](channel).declare()
            channel.basic_consume(app.conf.task_default_queue, False, print, "other")
            yield channel

    def receive(self, channel, queue, seconds):
        """Return the message that another worker gets within the seconds, or None."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            channel.qos.restore_visible(interval=1)
            if message := channel.basic_get(queue):
                return message
            time.sleep(0.1)
        return None

    def test_message_of_a_living_worker_is_not_delivered_again(self, app, note, other, monkeypatch):
        monkeypatch.setattr(renewal, "INTERVAL", 0.3)
        monkeypatch.setattr(renewal, "_pid", None)  # A thread with this interval
        queue = app.conf.task_default_queue
        note.delay(1)
        with app.connection_for_read() as connection:
            message = connection.channel().basic_get(queue)
            assert self.receive(other, queue, 5) is None
            renewal.check(connection.transport.channels)
            message.ack()
        assert self.receive(other, queue, 3) is None

    def test_message_of_a_lost_worker_comes_back(self, app, note, other, monkeypatch):
        monkeypatch.setattr(renewal, "watch", lambda qos: None)
        queue = app.conf.task_default_queue
        note.delay(1)
        with app.connection_for_read() as connection:
            channel = connection.channel()
            assert channel.basic_get(queue)
            start = time.monotonic()
            message = self.receive(other, queue, 10)
            assert message
            assert time.monotonic() - start > 1
            message.ack()
            channel.qos._delivered.clear()

    def test_paused_worker_gives_up_what_it_held(self, app, note, other, monkeypatch):
        monkeypatch.setattr(renewal, "watch", lambda qos: None)
        queue = app.conf.task_default_queue
        note.delay(1)
        with app.connection_for_read() as connection:
            channel = connection.channel()
            assert channel.basic_get(queue)
            time.sleep(1.1)
            channel.qos.renew_held()  # It is too late, if others took the message before.
            with pytest.raises(renewal.NotRenewed):
                renewal.check(connection.transport.channels)
        # The worker did not return the message when its connection was closed.
        assert self.receive(other, queue, 0.1) is None
        message = self.receive(other, queue, 10)
        assert message
        message.ack()
