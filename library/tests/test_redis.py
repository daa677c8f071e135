"""Redis: a separate database, keys of its own, and every wait has a timeout."""

import shutil
import socket
import subprocess
import time
from contextlib import suppress
from threading import Thread
from types import SimpleNamespace
from unittest.mock import Mock
from uuid import uuid4

import pytest
import services
from celery import Celery
from django.conf import settings
from kombu import Connection, Exchange, Queue
from kombu.transport.redis import Channel
from redis import Redis
from redis.exceptions import OutOfMemoryError, RedisError

from prodserver_ops import broker
from prodserver_ops.broker import envelopes, redis, renewal
from prodserver_ops.console import checks
from prodserver_ops.web import health


def wait_for(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture
def full_redis(tmp_path):
    """A server of its own; ``fill()`` leaves it no memory."""
    if shutil.which("redis-server") is None:
        pytest.skip("redis-server is not installed")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    command = ["redis-server", "--port", str(port), "--bind", "127.0.0.1", "--save", ""]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL) as process:
        client = Redis(port=port)

        def is_up():
            with suppress(RedisError):
                return client.ping()

        wait_for(is_up)
        yield SimpleNamespace(
            url=f"redis://127.0.0.1:{port}/1",
            client=client,
            fill=lambda: client.config_set("maxmemory", 1),
        )
        client.close()
        process.kill()


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("redis://:secret@redis.example.com", "redis://:secret@redis.example.com/1"),
        ("redis://redis.example.com:6379/", "redis://redis.example.com:6379/1"),
        ("redis://redis.example.com/0", "redis://redis.example.com/0"),
        ("rediss://a.example.com", "rediss://a.example.com/1?ssl_cert_reqs=required"),
        (
            "rediss://a.example.com/2?ssl_ca_certs=ca.pem",
            "rediss://a.example.com/2?ssl_ca_certs=ca.pem&ssl_cert_reqs=required",
        ),
        (
            "rediss://a.example.com?ssl_cert_reqs=none",
            "rediss://a.example.com/1?ssl_cert_reqs=none",
        ),
    ],
)
def test_url_has_a_database_and_the_verification_of_tls(url, expected):
    assert redis.get_url(url) == expected


def test_messages_of_lost_workers_are_looked_for_every_10_seconds():
    throttle = redis.get_options(settings)["unacked_restore_throttle"]
    assert "unacked_restore_throttle" in Channel.from_transport_options
    assert throttle * Channel.unacked_restore_interval == 10


def test_server_that_is_out_of_reach_fails_soon(monkeypatch):
    monkeypatch.setattr("kombu.utils.functional.sleep", lambda seconds: None)
    options = redis.get_options(settings)
    connection = Connection("redis://127.0.0.1:1/1", transport_options=options)
    with pytest.raises(connection.connection_errors):
        connection.connect()


class TestHeldMessages:
    """What workers hold, in the keys of their service."""

    @pytest.fixture(autouse=True)
    def _no_thread(self, monkeypatch):
        monkeypatch.setattr(renewal, "watch", lambda qos: None)

    @pytest.fixture
    def connect(self, make_part):
        """A function that returns a channel of a service, which consumes its queue."""
        url = make_part(services.REDIS)
        connections = []

        def connect(package, **options):
            values = SimpleNamespace(PACKAGE=package)
            options = redis.get_options(values) | options
            connection = Connection(url, transport_options=options)
            connections.append(connection)
            channel = connection.channel()
            queue = Queue(package, Exchange(package), routing_key=package)(channel)
            queue.declare()
            channel.basic_consume(package, False, print, "tag")
            return channel

        yield connect
        for connection in connections:
            connection.default_channel.client.flushdb()
            connection.close()

    @pytest.fixture
    def client(self, make_part):
        """A client with a connection of its own."""
        with Redis.from_url(make_part(services.REDIS)) as client:
            yield client

    def publish(self, channel, package):
        channel.basic_publish(channel.prepare_message("{}"), package, package)

    def publish_to(self, channel, queue):
        channel.basic_publish(channel.prepare_message("{}"), "", queue)

    def age(self, client, key, seconds):
        """Let a message be as old as if nobody had renewed it for so long."""
        for tag, score in client.zrange(key, 0, -1, withscores=True):
            client.zadd(key, {tag: score - seconds})

    def test_services_on_one_database_do_not_meet(self, connect):
        one, two = (connect(f"sample_{uuid4().hex[:8]}") for _ in range(2))
        self.publish(one, one.qos.unacked_key.partition(".")[0])
        assert one.basic_get(one.qos.unacked_key.partition(".")[0])
        self.age(one.client, one.qos.unacked_index_key, 1000)
        two.qos.restore_visible(interval=1)
        assert one.client.hlen(one.qos.unacked_key) == 1
        one.qos.restore_visible(interval=1)
        assert one.client.hlen(one.qos.unacked_key) == 0

    @pytest.mark.parametrize("is_own", [True, False])
    def test_messages_that_release_2_0_held_come_back(self, connect, is_own):
        own, other = (f"sample_{uuid4().hex[:8]}" for _ in range(2))
        held = own if is_own else other
        earlier = {
            "unacked_key": "unacked",
            "unacked_index_key": "unacked_index",
            "unacked_mutex_key": "unacked_mutex",
        }
        old = connect(held, **earlier)
        self.publish(old, held)
        assert old.basic_get(held)
        channel = connect(own)
        limit = settings.CELERY_TASK_TIME_LIMIT + redis.EARLIER_MARGIN
        self.age(old.client, "unacked_index", limit - 10)
        channel.qos.restore_visible(interval=1)
        assert channel.basic_get(own) is None
        self.age(old.client, "unacked_index", 11)
        channel.qos.restore_visible(interval=1)
        assert (channel.basic_get(own) is not None) == is_own
        assert old.client.hlen("unacked") == (0 if is_own else 1)
        old.qos._delivered.clear()

    def test_message_is_held_before_the_worker_reads_it(self, connect, client):
        """A worker may end, or its connection, while the message is on its way."""
        package = f"sample_{uuid4().hex[:8]}"
        channel = connect(package)
        self.publish(channel, package)
        channel.connection.cycle.on_poll_start()
        wait_for(lambda: client.hlen(channel.unacked_key))
        assert client.llen(package) == 0
        channel.client.connection.disconnect()
        self.age(client, channel.unacked_index_key, renewal.VISIBILITY + 1)
        other = connect(package)
        other.qos.restore_visible(interval=1)
        message = other.basic_get(package)
        assert message.body == b"{}"
        message.ack()
        assert client.keys(f"{package}.unacked*") == []

    def test_waiting_worker_gets_a_message_at_once(self, connect, client):
        package = f"sample_{uuid4().hex[:8]}"
        channel, other = connect(package), connect(package)
        other.brpop_timeout = 30
        received = []
        other.connection._callbacks[package] = received.append

        def drain():
            with suppress(TimeoutError):
                other.connection.drain_events(other.connection, timeout=20)

        thread = Thread(target=drain)
        thread.start()
        wait_for(lambda: other.is_empty and other._in_poll)
        self.publish(channel, package)
        thread.join(10)
        assert len(received) == 1

    def test_message_without_a_bell_is_found(self, connect, client):
        package = f"sample_{uuid4().hex[:8]}"
        channel = connect(package)
        received = []
        channel.connection._callbacks[package] = received.append
        with pytest.raises(TimeoutError):
            channel.connection.drain_events(channel.connection, timeout=0.1)
        client.lpush(package, "not JSON")
        channel.connection.drain_events(channel.connection, timeout=10)
        assert envelopes.repair(received[0]) == received[0]

    def test_message_that_needs_no_acknowledgement_is_not_stored(self, connect, client):
        package = f"sample_{uuid4().hex[:8]}"
        channel = connect(package)
        received = []
        channel.basic_cancel("tag")
        channel.basic_consume(package, True, received.append, "other")
        self.publish(channel, package)
        channel.connection.drain_events(channel.connection, timeout=10)
        assert len(received) == 1
        assert not client.exists(channel.unacked_key)
        self.publish(channel, package)
        assert channel.basic_get(package, no_ack=True)
        assert not client.exists(channel.unacked_key)

    def test_bell_counts_no_more_than_it_must(self, connect, client):
        package = f"sample_{uuid4().hex[:8]}"
        channel = connect(package)
        for _ in range(redis.MAX_BELLS + 5):
            self.publish(channel, package)
        bell = channel.get_bell(package)
        assert client.llen(bell) == redis.MAX_BELLS
        assert 0 < client.ttl(bell) <= redis.BELL_TIMEOUT

    def test_full_server_gives_its_messages_away(self, full_redis):
        """Otherwise, its memory would never become free."""
        connection = Connection(full_redis.url, transport_options=redis.get_options(settings))
        channel = connection.channel()
        self.publish_to(channel, "queue")
        full_redis.fill()
        with pytest.raises(OutOfMemoryError):
            self.publish_to(channel, "queue")
        message = channel.basic_get("queue")
        message.ack()
        assert channel.basic_get("queue") is None
        connection.close()

    def test_loop_of_a_worker_checks_what_it_holds(self, connect):
        package = f"sample_{uuid4().hex[:8]}"
        channel = connect(package)
        self.publish(channel, package)
        assert channel.basic_get(package)
        loop = Mock()
        channel.connection.register_with_event_loop(channel.connection, loop)
        calls = [call.args[1:] for call in loop.call_repeatedly.call_args_list]
        ((check, *arguments),) = [call for call in calls if call[0] is renewal.check]
        check(*arguments)
        channel.qos.renewed_at -= renewal.LIMIT + 1
        with pytest.raises(renewal.NotRenewed):
            check(*arguments)

    @pytest.mark.parametrize("hours", [-3, 3])
    def test_clock_of_a_worker_may_be_wrong(self, connect, monkeypatch, hours):
        package = f"sample_{uuid4().hex[:8]}"
        one, two = connect(package), connect(package)
        self.publish(one, package)
        now = time.time
        with monkeypatch.context() as patch:
            for name in ("time.time", "kombu.transport.redis.time"):
                patch.setattr(name, lambda: now() + hours * 3600)
            message = one.basic_get(package)
        two.qos.restore_visible(interval=1)
        assert two.basic_get(package) is None
        for name in ("time.time", "kombu.transport.redis.time"):
            monkeypatch.setattr(name, lambda: now() + hours * 3600)
        two.qos.restore_visible(interval=1)
        assert two.basic_get(package) is None
        message.ack()


class TestMemory:
    @pytest.fixture
    def app(self, full_redis, monkeypatch):
        """An app on a server of its own, which is the default app of the checks."""
        app = Celery(set_as_current=False, broker=full_redis.url)
        app.conf.broker_transport_options = redis.get_options(settings)
        monkeypatch.setattr(checks, "current_app", app)
        return app

    def test_server_that_deletes_queues_is_an_error(self, app, full_redis):
        assert broker.find_problem(app, 5) is None
        full_redis.client.config_set("maxmemory", "100mb")
        for policy, is_error in (("volatile-lru", False), ("allkeys-lru", True)):
            full_redis.client.config_set("maxmemory-policy", policy)
            assert bool(checks.check_broker()) == is_error
            assert bool(broker.find_problem(app, 5)) == is_error
        assert "its maxmemory-policy is allkeys-lru" in checks.check_broker()[0].msg

    def test_server_that_is_full_is_a_problem_and_no_error(self, app, full_redis, monkeypatch):
        full_redis.fill()
        monkeypatch.setattr(health, "current_app", app)
        with pytest.raises(health.NotConsumed, match="no memory left"):
            health.check_queues()
        assert "Redis has no memory left for tasks" in broker.find_problem(app, 5)
        assert checks.check_broker() == []
