"""RabbitMQ: every wait has a timeout."""

import ssl
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import pytest
from amqp import RecoverableConnectionError
from celery import Celery
from kombu import Producer
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

        channel.connection = SimpleNamespace(drain_events=drain_events)
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
        assert options == {"retry": False}
