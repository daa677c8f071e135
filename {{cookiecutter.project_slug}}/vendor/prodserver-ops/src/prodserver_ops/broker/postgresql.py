"""PostgreSQL as the broker: PGMQ's tables and functions in the database of the service.

A message that is published in a transaction of this database belongs to it: it is delivered if and
only if the transaction is committed.

They are plain SQL and need no server extension. This module fixes defects of kombu's transport:
``celery inspect`` finds no workers, the address can come from the environment and has no TLS, and
the connection pool keeps workers from stopping.
https://docs.celeryq.dev/projects/kombu/en/stable/reference/kombu.transport.pgmq.html
"""

import hashlib
import logging
import os
import select
import warnings
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import takewhile
from typing import Any

from django.db import connection, transaction
from kombu.transport import pgmq, virtual
from kombu.utils.url import parse_url
from pgmq import PGMQueue
from pgmq.install import get_embedded_install_sql
from psycopg import DatabaseError, OperationalError
from psycopg.conninfo import make_conninfo
from psycopg.errors import ReadOnlySqlTransaction, UndefinedTable
from psycopg_pool import ConnectionPool

from ..core.database import CONNECT_OPTIONS
from ..core.text import make_storable, map_strings
from . import envelopes, publishing, renewal

#: The maximum length of a queue name in PGMQ.
NAME_LENGTH = 47

#: Timeout for a connection from the pool, in seconds.
TIMEOUT = 5

#: How much later a message is delivered each time that a worker returns it, in seconds, and up to
#: how many times.
RETURN_DELAY, MAX_RETURNS = 2, 10

#: The port of PostgreSQL.
DEFAULT_PORT = 5432

#: The trigger that notifies workers.
TRIGGER = "trigger_notify_queue_insert_listeners"

HAS_TRIGGER = """
    SELECT 1 FROM pg_trigger WHERE tgname = %s
    AND tgrelid = to_regclass(format('pgmq.%%I', pgmq.format_table_name(%s, 'q')))
"""


# The pool warns about each thread that it does not wait for.
logging.getLogger("psycopg.pool").setLevel(logging.ERROR)

# This warning concerns other users of pgmq.
warnings.filterwarnings("ignore", "list_queues", UserWarning)


class QoS(renewal.RenewedQoS, virtual.QoS):
    """What a channel holds."""

    channel: "Channel"
    _delivered: dict[Any, Any]  # type: ignore[assignment]

    def renew(self, tags: list[Any]) -> None:
        """Renew messages."""
        numbers = defaultdict(list)
        for tag in tags:
            # Another thread may have acknowledged it.
            if (message := self._delivered.get(tag)) is not None:
                info = message.delivery_info
                numbers[info["pgmq_queue"]].append(info["pgmq_msg_id"])
        for queue, ids in numbers.items():
            self.channel.pgmq.set_vt(queue, ids, renewal.VISIBILITY)


class NotifyWaiter(pgmq._NotifyWaiter):
    """Waits for a message, or until the worker may take another one.

    kombu's own waits for its whole time while the tasks end that a worker holds: of messages that wait
    already, a worker got a few in a second.
    """

    def __init__(self, dsn: str) -> None:
        super().__init__(dsn)
        self.reader, self.writer = os.pipe()
        os.set_blocking(self.reader, False)
        os.set_blocking(self.writer, False)

    def wake(self) -> None:
        """End the wait; another thread may call this."""
        with suppress(OSError):  # It is full, or closed.
            os.write(self.writer, b".")

    def wait(self, timeout: float | None) -> bool:
        """Return whether there is a new message."""
        wait: Any = super().wait
        if wait(0) or self._conn is None:
            return self._conn is not None
        with suppress(OSError, OperationalError):  # The connection was closed.
            poll = select.poll()
            poll.register(self.reader, select.POLLIN)
            poll.register(self._conn, select.POLLIN)
            ready = dict(poll.poll(None if timeout is None else timeout * 1000))
            if self.reader in ready:
                os.read(self.reader, 4096)
        return bool(wait(0))

    def close(self) -> None:
        """Close the connection and the pipe."""
        close: Any = super().close
        close()
        for file in (self.reader, self.writer):
            with suppress(OSError):
                os.close(file)


class Channel(pgmq.Channel):
    """A channel that renews its messages, and returns them when it closes; with short names."""

    QoS = QoS

    Message = envelopes.Message

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)  # type: ignore[no-untyped-call]
        # Otherwise another worker gets the unprocessed messages of this one only minutes later.
        self.qos.restore_at_shutdown = True

    def entity_name(self, name: Any, *args: Any) -> str:
        """Return a valid queue name; replace the end of a long name with a hash."""
        valid: str = super().entity_name(name, *args)
        if len(valid) <= NAME_LENGTH:
            return valid
        digest = hashlib.sha256(valid.encode()).hexdigest()[:16]
        return f"{valid[: NAME_LENGTH - 17]}_{digest}"

    def _lookup(self, exchange: str, routing_key: str, default: str | None = None) -> list[str]:
        # Only the process that waits for a reply knows how its queue is bound.
        if exchange.startswith("reply."):
            return [f"{routing_key}.{exchange}"]
        return list(super()._lookup(exchange, routing_key, default))

    def _new_queue(self, queue: str, **kwargs: Any) -> None:
        # The statements would wait for each transaction that has queued a task.
        has_queue: Any = self._has_queue
        if has_queue(queue):
            self._maybe_enable_notify(queue)
        else:
            super()._new_queue(queue, **kwargs)  # type: ignore[no-untyped-call]

    def _maybe_enable_notify(self, queue: str, queue_name: str | None = None) -> None:
        name = queue_name or self._queue_name(queue)
        if self._has_trigger(name):
            transport: Any = self.connection
            transport._register_notify_queue(name)
            return
        enable: Any = super()._maybe_enable_notify
        try:
            enable(queue, queue_name)
        except DatabaseError:
            # If two processes create the trigger at the same time, one of them fails.
            enable(queue, queue_name)

    def _has_trigger(self, name: str) -> bool:
        pool: Any = self.pgmq.pool
        with pool.connection() as raw:
            return raw.execute(HAS_TRIGGER, [TRIGGER, name]).fetchone() is not None

    def _put(self, queue: str, message: Any, **kwargs: Any) -> None:
        try:
            with self._join() as raw:
                self.pgmq.send(
                    self._queue_name(queue), message, **self._pgmq_send_kwargs(message), conn=raw
                )
        except UndefinedTable:
            # The process that waited for a reply has ended.
            if ".reply." not in queue:
                raise

    def _pgmq_messages_to_python(  # type: ignore[override]
        self, messages: Any, queue: str
    ) -> Iterator[Any]:
        messages = super()._pgmq_messages_to_python(messages, queue)
        # A worker closes the channel of a control command that fails.
        yield from takewhile(lambda message: not self.closed, messages)

    def _put_topic(self, exchange: str, message: Any, routing_key: str, **kwargs: Any) -> None:
        key = self._topic_key(exchange, routing_key)
        with self._join() as raw:
            self.pgmq.send_topic(key, message, **self._pgmq_send_kwargs(message), conn=raw)

    def basic_ack(self, *args: Any, **kwargs: Any) -> None:
        """Acknowledge a message, and let the worker take the next one at once."""
        try:
            super().basic_ack(*args, **kwargs)  # type: ignore[no-untyped-call]
        except OperationalError:
            # The connection of the pool was lost; the worker would hold the message until it exits.
            super().basic_ack(*args, **kwargs)  # type: ignore[no-untyped-call]
        self._wake()

    def basic_reject(self, delivery_tag: Any, requeue: bool = False) -> None:
        """Reject a message, and let the worker take the next one at once.

        A message that returns is the oldest one: tasks that kill their process would keep others
        waiting, so it returns later each time.
        """
        try:
            info = self.qos.get(delivery_tag).delivery_info if requeue else {}
        except KeyError:
            info = {}
        if "pgmq_msg_id" in info:
            delay = RETURN_DELAY * min(info["pgmq_message"]["read_ct"], MAX_RETURNS)
            self.pgmq.set_vt(info["pgmq_queue"], info["pgmq_msg_id"], delay)
            self.qos.reject(delivery_tag)
        else:
            super().basic_reject(delivery_tag, requeue)  # type: ignore[no-untyped-call]
        self._wake()

    def _wake(self) -> None:
        transport: Any = self.connection
        if transport._notify_waiter is not None:
            transport._notify_waiter.wake()

    @contextmanager
    def _join(self) -> Iterator[Any]:
        """Yield the connection of the transaction that the message belongs to, or None."""
        client: Any = self.connection.client
        if not is_joined(client.hostname, client.port, client.userid, client.virtual_host):
            yield None
            return
        # An error of this statement must not end the transaction.
        with transaction.atomic():
            with connection.cursor() as cursor:
                # Other transactions that queue a task would wait for the end of this one.
                cursor.execute(f"SET CONSTRAINTS pgmq.{TRIGGER} DEFERRED")
            yield connection.connection

    def prepare_message(self, body: Any, *args: Any, **kwargs: Any) -> Any:
        """Return a message whose headers and properties PostgreSQL can store."""
        message = super().prepare_message(body, *args, **kwargs)
        parts = {name: part for name, part in message.items() if name != "body"}
        return {"body": message["body"], **map_strings(make_storable, parts)}

    def _pgmq_message_to_python(self, pgmq_message: Any, queue: str) -> Any:
        if queue not in self._noack_queues:
            pgmq_message.message = envelopes.repair(pgmq_message.message)
            info = pgmq_message.message["properties"]["delivery_info"]
            info["redelivered"] = pgmq_message.read_ct > 1
        return super()._pgmq_message_to_python(pgmq_message, queue)

    def _pgmq_send_kwargs(self, message: Any) -> dict[str, Any]:
        # PGMQ 1.13 has no send_topic() with headers and without a delay.
        options: dict[str, Any] = {"delay": 0}
        return options | super()._pgmq_send_kwargs(message)


class Transport(pgmq.Transport):
    """The transport of ``pgmq://`` URLs."""

    Channel = Channel
    #: A server that becomes read-only, for example in a failover, is tried again like one that is away.
    connection_errors = (
        *pgmq.Transport.connection_errors,
        ReadOnlySqlTransaction,
        renewal.NotRenewed,
    )

    #: How often an idle worker looks for messages without a notification, in seconds.
    polling_interval = 1

    def drain_events(self, *args: Any, **kwargs: Any) -> None:
        """Process messages; raise NotRenewed if others may get what the worker holds."""
        renewal.check(self.channels)
        super().drain_events(*args, **kwargs)  # type: ignore[no-untyped-call]

    def get_address(self) -> str:
        """Return the connection string. kombu's own has no TLS, and does not quote values."""
        client: Any = self.client
        options: dict[str, Any] = connection.settings_dict["OPTIONS"]
        tls = {name: value for name, value in options.items() if name.startswith("ssl")}
        return make_conninfo(
            host=client.hostname,
            port=client.port,
            dbname=(client.virtual_host or "").strip("/"),
            user=client.userid,
            password=client.password,
            # Even taking a message writes. A server that is read-only counts as unavailable.
            target_session_attrs="read-write",
            **(CONNECT_OPTIONS | tls),
        )

    def _create_pgmq_client(self) -> Any:
        client: Any = self.client
        options = client.transport_options
        pool = ConnectionPool(
            self.get_address(),
            min_size=1,
            max_size=options["pool_size"],
            timeout=options["pool_timeout"],
            open=True,
        )
        return PGMQueue(
            conn_string=None, pool=pool, vt=options["visibility_timeout"], init_extension=False
        )

    def _get_notify_waiter(self) -> Any:
        if self._notify_waiter is None:
            self._notify_waiter = NotifyWaiter(self.get_address())
        return self._notify_waiter

    def close_connection(self, connection: Any) -> None:
        """Close the connection, without waiting for the threads of its pool."""
        client, self._pgmq_client = self._pgmq_client, None
        super().close_connection(connection)
        if client is not None and client.pool is not None:
            client.pool.close(timeout=0)


def joins_transaction(url: str) -> bool:
    """Return whether a message that is published now belongs to the current transaction.

    It does if the broker is the database of the transaction. Then it is delivered after the
    commit, and a rollback deletes it.
    """
    if not connection.in_atomic_block:
        return False
    parts = parse_url(url)
    return is_joined(parts["hostname"], parts["port"], parts["userid"], parts["virtual_host"])


def is_joined(host: str | None, port: int | None, user: str | None, name: str | None) -> bool:
    """Return whether the current transaction is one of this database."""
    if not connection.in_atomic_block or connection.vendor != "postgresql":
        return False
    if publishing.request.is_separate:
        return False
    settings = connection.settings_dict
    broker = host or "", int(port or DEFAULT_PORT), user or "", (name or "").strip("/")
    own = settings["HOST"], int(settings["PORT"] or DEFAULT_PORT), settings["USER"]
    return broker == (*own, settings["NAME"])


def get_url(url: str) -> str:
    """Convert the URL of a database to the URL of a broker, without its query string.

    TLS options, such as ``sslmode``, are read from ``DATABASE_URL``.
    """
    return f"pgmq://{url.partition('://')[2].partition('?')[0]}"


def get_options(settings: Any) -> dict[str, Any]:
    """Return the options of the transport."""
    return {
        "init_extension": False,
        "use_notify": True,
        "wait_time_seconds": 0,
        "pool_size": 4,
        "pool_timeout": TIMEOUT,
        "visibility_timeout": renewal.VISIBILITY,
    }


def install() -> None:
    """Create PGMQ's schema in the database if it does not exist; runs after migrations."""
    if connection.vendor != "postgresql":
        return
    with transaction.atomic(), connection.cursor() as cursor:
        # Two deploys at the same time must not both create it.
        cursor.execute("SELECT pg_advisory_xact_lock(hashtext('pgmq'))")
        cursor.execute("SELECT 1 FROM pg_namespace WHERE nspname = 'pgmq'")
        if cursor.fetchone() is None:
            cursor.execute(get_embedded_install_sql())
