"""PostgreSQL as the broker: names, addresses, and a worker that ends."""

import threading
import time
from functools import partial
from types import SimpleNamespace
from unittest.mock import Mock
from urllib.parse import urlsplit
from uuid import uuid4

import psycopg
import pytest
import services
from django.conf import settings
from django.db import connection
from kombu import Connection, Queue
from kombu.transport import pgmq, resolve_transport
from psycopg.conninfo import conninfo_to_dict
from psycopg.errors import DuplicateObject

from prodserver_ops.broker import postgresql


@pytest.mark.parametrize("scheme", ["postgres", "postgresql", "pgmq"])
def test_url_of_the_database_is_that_of_the_broker(scheme):
    url = f"{scheme}://user:secret@db.example.com:5433/name?sslmode=require"
    assert postgresql.get_url(url) == "pgmq://user:secret@db.example.com:5433/name"


class FakePool:
    """A pool that does not connect."""

    def __init__(self, conninfo, **options):
        self.conninfo = conninfo


def test_tls_is_that_of_the_database(monkeypatch):
    tls = {"sslmode": "verify-full", "sslrootcert": "/etc/ca.pem"}
    monkeypatch.setitem(connection.settings_dict, "OPTIONS", {"timeout": 20, **tls})
    monkeypatch.setattr(postgresql, "ConnectionPool", FakePool)
    url = "pgmq://user:a%20b%27@db.example.com:5433/name"
    transport = Connection(url, transport_options=postgresql.get_options(settings)).transport
    for conninfo in (
        transport._get_pgmq_client().pool.conninfo,
        transport._get_notify_waiter()._dsn,
    ):
        address = conninfo_to_dict(conninfo)
        assert address.items() > {"host": "db.example.com", "password": "a b'", **tls}.items()
        assert "timeout" not in address


def test_names_of_queues_are_valid_short_and_unique():
    channel = object.__new__(postgresql.Channel)
    short = channel.entity_name("service.mail")
    assert short == "service_mail"
    names = {channel.entity_name(f"{'long.' * 20}{number}") for number in range(3)}
    assert len(names) == 3
    assert all(len(name) <= postgresql.NAME_LENGTH for name in names)


def test_scheme_has_its_transport():
    assert resolve_transport("pgmq") is postgresql.Transport


@pytest.mark.django_db
def test_schema_is_installed_once():
    if connection.vendor != "postgresql":
        pytest.skip("PGMQ needs PostgreSQL; set DATABASE_URL")
    for _ in range(2):
        postgresql.install()
    with connection.cursor() as cursor:
        cursor.execute("SELECT count(*) FROM pgmq.list_queues()")
        assert cursor.fetchone() == (0,)


def test_trigger_that_another_process_creates_at_the_same_time_is_no_error(monkeypatch):
    errors = [DuplicateObject("trigger already exists")]

    def enable(channel, queue, name):
        if errors:
            raise errors.pop()

    monkeypatch.setattr(pgmq.Channel, "_maybe_enable_notify", enable)
    monkeypatch.setattr(postgresql.Channel, "_has_trigger", lambda channel, name: False)
    channel = object.__new__(postgresql.Channel)
    channel._maybe_enable_notify("mail", "mail")
    assert errors == []


@pytest.fixture
def broker_url(request):
    """The URL of an empty database with PGMQ."""
    try:
        url = services.create(services.POSTGRESQL, f"read_only_{uuid4().hex[:8]}")
    except services.Unavailable as error:
        if request.config.getoption("--require-services"):
            pytest.fail(str(error))
        pytest.skip(str(error))
    yield url
    services.delete(services.POSTGRESQL, url)


def test_next_message_is_taken_as_soon_as_one_is_acknowledged(broker_url, monkeypatch):
    """Otherwise a worker gets a few in a second of those that wait already."""
    monkeypatch.setattr(postgresql.Transport, "polling_interval", 20)
    got = []
    options = postgresql.get_options(settings)
    with Connection(postgresql.get_url(broker_url), transport_options=options) as connection:
        consumer = connection.Consumer(
            [Queue("sample")], on_message=got.append, prefetch_count=1, accept=["json"]
        )
        with consumer, connection.Producer() as producer:
            for number in range(3):
                producer.publish(number, routing_key="sample", declare=consumer.queues)
            start = time.monotonic()
            connection.drain_events(timeout=20)
            for end in ("ack", "reject"):
                threading.Timer(0.5, getattr(got[-1], end)).start()
                connection.drain_events(timeout=20)
            assert len(got) == 3
            assert time.monotonic() - start < 15
            # Without a message, it waits, and a new one ends the wait.
            got[-1].ack()
            publish = partial(producer.publish, 4, routing_key="sample")
            threading.Timer(0.5, publish).start()
            connection.drain_events(timeout=20)
            assert len(got) == 4
            got[-1].ack()
            with pytest.raises(TimeoutError):
                connection.drain_events(timeout=1)
            assert time.monotonic() - start < 18


def test_server_that_is_read_only_counts_as_one_that_is_away(broker_url, monkeypatch):
    """Celery's worker connects again after these errors; others would end it."""
    monkeypatch.setattr(postgresql, "TIMEOUT", 1)
    options = postgresql.get_options(settings)
    queue = Queue("read_only")

    def connect():
        return Connection(postgresql.get_url(broker_url), transport_options=options)

    def set_read_only(value):
        with psycopg.connect(services.URLS[services.POSTGRESQL], autocommit=True) as server:
            name = urlsplit(broker_url).path[1:]
            server.execute(f"ALTER DATABASE {name} SET default_transaction_read_only = {value}")

    with connect() as opened:
        queue(opened.default_channel).declare()
        with opened.transport._get_pgmq_client().pool.connection() as raw:
            raw.execute("SET default_transaction_read_only = on")
        with pytest.raises(opened.connection_errors):
            queue(opened.default_channel).get()
    set_read_only("on")
    with connect() as refused, pytest.raises(refused.connection_errors):
        refused.connect()
    set_read_only("off")
    with connect() as opened:
        assert queue(opened.default_channel).get() is None


@pytest.mark.parametrize(("deliveries", "delay"), [(1, 2), (3, 6), (15, 20)])
def test_message_that_a_worker_returns_comes_after_others(monkeypatch, deliveries, delay):
    client, info = Mock(), {"pgmq_queue": "shop", "pgmq_msg_id": 7}
    monkeypatch.setattr(postgresql.Channel, "pgmq", client)
    channel = postgresql.Channel.__new__(postgresql.Channel)
    channel.connection, channel._qos = Mock(_notify_waiter=None), Mock()
    info["pgmq_message"] = {"read_ct": deliveries}
    channel._qos.get.return_value.delivery_info = info
    channel.basic_reject("tag", requeue=True)
    client.set_vt.assert_called_once_with("shop", 7, delay)
    channel._qos.reject.assert_called_once_with("tag")


def test_message_is_acknowledged_over_a_new_connection(monkeypatch):
    acknowledge = Mock(side_effect=[psycopg.OperationalError, None])
    monkeypatch.setattr(postgresql.pgmq.Channel, "basic_ack", acknowledge)
    channel = postgresql.Channel.__new__(postgresql.Channel)
    channel.connection = Mock(_notify_waiter=None)
    channel.basic_ack("tag")
    assert acknowledge.call_count == 2


def test_channel_that_is_closed_delivers_no_more():
    channel = object.__new__(postgresql.Channel)
    channel.closed, channel._noack_queues = False, {"commands"}
    messages = [SimpleNamespace(message={"number": number}) for number in range(3)]
    delivered = []
    for message in channel._pgmq_messages_to_python(messages, "commands"):
        delivered.append(message["number"])
        channel.closed = message["number"] == 1
    assert delivered == [0, 1]
