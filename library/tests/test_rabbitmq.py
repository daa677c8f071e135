"""RabbitMQ: every wait has a timeout."""

import select
import socket
import ssl
import struct
import threading
import time
from contextlib import nullcontext, suppress
from functools import partial
from types import SimpleNamespace
from urllib.parse import urlsplit
from uuid import uuid4

import pytest
import services
from amqp import PreconditionFailed, RecoverableConnectionError
from celery import Celery
from kombu import Connection, Producer, Queue
from kombu.exceptions import OperationalError
from kombu.transport import pyamqp, resolve_transport

from prodserver_ops import broker
from prodserver_ops.broker import rabbitmq


@pytest.mark.parametrize(
    ("scheme", "name", "connection"),
    [("amqp", "Transport", "Connection"), ("amqps", "SSLTransport", "SSLConnection")],
)
def test_rabbitmq_has_limits(scheme, name, connection):
    assert broker.find(f"{scheme}://mq.example.com").queue_type == "quorum"
    assert resolve_transport(scheme) is getattr(rabbitmq, name)
    assert resolve_transport(scheme).Connection is getattr(rabbitmq, connection)
    assert resolve_transport(scheme).Connection.Channel is rabbitmq.Channel


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (True, {"cert_reqs": ssl.CERT_REQUIRED, "server_hostname": "mq.example.com"}),
        (
            {"ssl_ca_certs": "ca.pem"},
            {
                "ca_certs": "ca.pem",
                "cert_reqs": ssl.CERT_REQUIRED,
                "server_hostname": "mq.example.com",
            },
        ),
        ({"ssl_cert_reqs": ssl.CERT_NONE}, {"cert_reqs": ssl.CERT_NONE}),
    ],
)
def test_tls_verifies_the_certificate_and_the_name_of_the_server(options, expected):
    connection = rabbitmq.SSLConnection(host="mq.example.com:5671", ssl=options)
    assert connection.ssl == expected


class Silent:
    """Replaces py-amqp's part of a channel whose node does not reply."""

    def wait(self, method, callback=None, timeout=None):
        self.waited = timeout
        raise TimeoutError


class SilentChannel(rabbitmq.ReplyLimit, Silent):
    def __init__(self):
        self.closed = False
        self.connection = SimpleNamespace(collect=lambda: setattr(self, "closed", True))


def test_a_connection_without_a_reply_is_closed():
    channel = SilentChannel()
    with pytest.raises(RecoverableConnectionError, match="did not reply within 5 seconds"):
        channel.wait("method")
    assert (channel.waited, channel.closed) == (rabbitmq.REPLY_TIMEOUT, True)


def test_a_message_without_a_confirmation_is_not_repeated(monkeypatch):
    def fail(*args, **kwargs):
        raise rabbitmq.NoReply("no reply")

    monkeypatch.setattr(pyamqp.Channel, "basic_publish_confirm", fail)
    with pytest.raises(OperationalError, match="no reply"):
        rabbitmq.Channel.basic_publish_confirm(object.__new__(rabbitmq.Channel))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("delivery acknowledgement on channel 1 timed out", rabbitmq.TaskTooLong),
        ("inequivalent arg", PreconditionFailed),
    ],
)
def test_task_that_takes_too_long_is_a_lost_connection(monkeypatch, text, expected):
    def close(channel, code, text, *args):
        raise PreconditionFailed(text)

    monkeypatch.setattr(pyamqp.Channel, "_on_close", close)
    with pytest.raises(expected):
        object.__new__(rabbitmq.Channel)._on_close(406, text, 0, 0)
    assert issubclass(rabbitmq.TaskTooLong, RecoverableConnectionError)


class TestBatch:
    """A batch waits for the confirmations of many messages at once."""

    @pytest.fixture
    def channel(self):
        """A channel that has ``replies``, each a function to call."""
        channel = SimpleNamespace(events={"basic_ack": set(), "basic_nack": set()}, replies=[])

        def drain_events(timeout):
            if not channel.replies:
                raise TimeoutError
            channel.replies.pop(0)()

        channel.connection = SimpleNamespace(
            drain_events=drain_events, frame_max=4096, frame_writer=None
        )
        channel.connection.transport = SimpleNamespace(write=lambda data: None)
        channel.confirm_select = lambda: None
        return channel

    @pytest.fixture
    def batch(self, channel, monkeypatch):
        monkeypatch.setattr(Producer, "__init__", lambda *args: None)
        monkeypatch.setattr(Producer, "publish", lambda *args, **kwargs: None)
        batch = rabbitmq.BatchProducer(channel)
        for _ in range(5):
            batch.publish("body")
        return batch

    def test_ends_when_all_are_confirmed_in_any_order(self, batch, channel):
        (confirm,) = channel.events["basic_ack"]
        numbers = [(2, False), (3, True), (5, False), (4, False)]
        channel.replies += [partial(confirm, *each) for each in numbers]
        batch.wait()
        assert channel.replies == []

    def test_without_a_confirmation_fails(self, batch, channel):
        (confirm,) = channel.events["basic_ack"]
        channel.replies.append(partial(confirm, 4, True))
        with pytest.raises(OperationalError, match="did not reply within 5 seconds"):
            batch.wait()
        assert batch.unconfirmed == {5}

    def test_that_is_refused_fails(self, batch, channel):
        (refuse,) = channel.events["basic_nack"]
        channel.replies.append(partial(refuse, 1, False))
        with pytest.raises(OperationalError, match="refused"):
            batch.wait()

    def test_waits_before_too_many_are_open(self, batch, channel, monkeypatch):
        monkeypatch.setattr(rabbitmq.BatchProducer, "LIMIT", 6)
        (confirm,) = channel.events["basic_ack"]
        channel.replies.append(partial(confirm, 6, True))
        batch.publish("body")
        assert batch.unconfirmed == set()

    def test_fails_if_rabbitmq_is_unavailable(self, monkeypatch):
        # Celery prefers it to the argument.
        monkeypatch.delenv("CELERY_BROKER_URL", raising=False)
        monkeypatch.setattr("kombu.utils.functional.sleep", lambda seconds: None)
        app = Celery(broker="amqp://127.0.0.1:1", set_as_current=False)
        batch = rabbitmq.open_batch(app)
        with pytest.raises(OperationalError, match="refused"), batch:
            pytest.fail("a batch without RabbitMQ")

    def test_fails_if_the_connection_is_lost(self, batch, channel, monkeypatch):
        def lose():
            raise ConnectionResetError("lost")

        connection = SimpleNamespace(
            channel=lambda: channel, connection_errors=(OSError,), channel_errors=()
        )
        app = SimpleNamespace(connection_for_write=lambda **options: nullcontext(connection))
        monkeypatch.setattr(rabbitmq, "BatchProducer", lambda channel: batch)
        channel.replies.append(lose)
        with pytest.raises(OperationalError, match="lost"), rabbitmq.open_batch(app):
            pass

    def test_message_is_not_repeated_on_another_connection(self, batch, monkeypatch):
        options = {}
        monkeypatch.setattr(Producer, "publish", lambda *args, **kwargs: options.update(kwargs))
        batch.publish("body", retry=True)
        assert options == {"declare": [], "retry": False}


@pytest.fixture
def proxy(make_part):
    """A server between this process and RabbitMQ, which reads nothing after ``pause()``."""
    address = urlsplit(make_part(services.RABBITMQ))
    with Proxy((address.hostname, address.port)) as proxy:
        host, port = proxy.server.getsockname()
        netloc = f"{address.username}:{address.password}@{host}:{port}"
        proxy.url = address._replace(netloc=netloc).geturl()
        yield proxy


class Proxy:
    """Passes on what it reads, for one connection."""

    def __init__(self, target):
        self.server = socket.create_server(("127.0.0.1", 0))
        self.target = target
        self.sent = b""
        self.paused = False
        self.thread = threading.Thread(target=self.serve, daemon=True)

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *error):
        self.server.close()

    def pause(self):
        self.paused = True

    def serve(self):
        client, _ = self.server.accept()
        # Either side may reset its connection.
        with suppress(ConnectionError), client, socket.create_connection(self.target) as node:
            while not self.paused:
                for ready in select.select([client, node], [], [], 0.05)[0]:
                    if not (data := ready.recv(65536)):
                        return
                    self.sent += data if ready is client else b""
                    (node if ready is client else client).sendall(data)
            # Until the client ends the connection
            poll = select.poll()
            poll.register(client, select.POLLRDHUP)
            poll.poll(30_000)


class TestBatchOfAServer:
    """The same with RabbitMQ."""

    @pytest.fixture
    def app(self, proxy, monkeypatch):
        monkeypatch.delenv("CELERY_BROKER_URL", raising=False)
        return Celery(broker=proxy.url, set_as_current=False)

    @pytest.fixture
    def queue(self):
        return Queue(f"sample_{uuid4().hex[:8]}", auto_delete=True, durable=False)

    def test_messages_arrive_in_order(self, app, queue, proxy, make_part):
        with rabbitmq.open_batch(app) as batch:
            for number in range(50):
                batch.publish(f"message-{number}", routing_key=queue.name, declare=[queue])
            # The queue is declared, and only the first message is sent before all are.
            assert b"message-1" not in proxy.sent
        with Connection(make_part(services.RABBITMQ)) as connection:
            bound = queue(connection.channel())
            assert [bound.get(no_ack=True).payload for _ in range(50)] == [
                f"message-{number}" for number in range(50)
            ]
            bound.delete()

    def test_message_that_cannot_be_sent_does_not_stop_others(self, app, queue):
        with rabbitmq.open_batch(app) as batch:
            batch.publish("a", routing_key=queue.name, declare=[queue])
            with pytest.raises(struct.error):
                batch.publish("b", routing_key=queue.name, priority=300)
            batch.publish("c", routing_key=queue.name)
        assert not batch.unconfirmed

    def test_message_after_which_the_connection_is_closed_fails_all(self, app, queue):
        """The next one is not at fault, and a beat must not end."""
        with pytest.raises(OperationalError), rabbitmq.open_batch(app) as batch:
            nan = {"value": float("nan")}
            batch.publish("a", routing_key=queue.name, declare=[queue], headers=nan)
            for number in range(2):
                other = Queue(f"{queue.name}.{number}", auto_delete=True, durable=False)
                with pytest.raises(OperationalError, match="closed the connection"):
                    batch.publish("b", routing_key=queue.name, declare=[other])

    def test_node_that_reads_nothing_does_not_hold_up_the_process(
        self, app, queue, proxy, monkeypatch
    ):
        """One that has reached its limit of memory, for example."""
        monkeypatch.setattr(rabbitmq, "REPLY_TIMEOUT", 1)
        start = time.monotonic()
        with pytest.raises(OperationalError), rabbitmq.open_batch(app) as batch:
            proxy.pause()
            for _ in range(20):
                batch.publish("x" * 1_000_000, routing_key=queue.name)
        assert time.monotonic() - start < 10
