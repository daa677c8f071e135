"""Redis: a transport that renews what a worker holds, and reads whatever a queue contains."""

import time
from typing import Any

from django.conf import settings
from kombu.transport import redis, virtual
from kombu.utils.encoding import bytes_to_str
from kombu.utils.json import dumps, loads

from . import envelopes, renewal

#: The default database. Caches and channels use database 0.
DATABASE = 1

#: How long to wait for a connection or a reply, in seconds.
TIMEOUT = 5

#: How long a worker that is killed may keep others from looking for messages, in seconds.
MUTEX_TIMEOUT = 20

#: How long after their time limit workers of release 2.0 and earlier returned tasks, in seconds.
EARLIER_MARGIN = 60


class EarlierQoS(redis.QoS):
    """The messages that a worker of release 2.0 or earlier held.

    All applications on a database of Redis shared these keys.
    """

    channel: "Channel"

    unacked_key, unacked_index_key, unacked_mutex_key = "unacked", "unacked_index", "unacked_mutex"

    @property
    def visibility_timeout(self) -> int:
        """The seconds after which a message of a lost worker returns."""
        limit: int = settings.CELERY_TASK_TIME_LIMIT
        return limit + EARLIER_MARGIN

    def restore_by_tag(self, tag: Any, client: Any = None, leftmost: bool = False) -> None:
        """Return a message to its queue, if this worker consumes the queue."""
        if (held := client.hget(self.unacked_key, tag)) is None:
            return
        _, exchange, routing_key = loads(bytes_to_str(held))
        queues = self.channel._lookup(exchange, routing_key)
        if set(queues) & set(self.channel.active_queues):
            super().restore_by_tag(tag, client, leftmost)


class QoS(renewal.RenewedQoS, redis.QoS):
    """What a channel holds; the score of a message in the index is when it was last renewed.

    All processes use the clock of the server, because their own clocks may differ or change.
    """

    channel: "Channel"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.earlier = EarlierQoS(*args, **kwargs)
        self.offset: float | None = None

    def get_time(self) -> float:
        """Return the time of the server, in seconds."""
        if self.offset is None:
            with self.channel.conn_or_acquire() as client:
                self.read_clock(client)
        return time.monotonic() + (self.offset or 0)

    def read_clock(self, client: Any) -> None:
        """Compare the clock of the server with the one of this process, which never jumps."""
        seconds, microseconds = client.time()
        self.offset = seconds + microseconds / 1e6 - time.monotonic()

    @property
    def visibility_timeout(self) -> float:  # type: ignore[override]
        """What kombu subtracts from the time of this process to get the oldest valid score."""
        return time.time() - self.get_time() + renewal.VISIBILITY

    def append(self, message: Any, delivery_tag: Any) -> None:
        """Hold a message."""
        delivery = message.delivery_info
        held = dumps([message._raw, delivery["exchange"], delivery["routing_key"]])
        with self.pipe_or_acquire() as pipe:
            pipe.zadd(self.unacked_index_key, {delivery_tag: self.get_time()})
            pipe.hset(self.unacked_key, delivery_tag, held).execute()
        virtual.QoS.append(self, message, delivery_tag)
        renewal.watch(self)

    def renew(self, tags: list[Any]) -> None:
        """Renew messages that are still in the index."""
        with self.channel.conn_or_acquire() as client:
            self.read_clock(client)
            client.zadd(self.unacked_index_key, dict.fromkeys(tags, self.get_time()), xx=True)

    def restore_visible(self, *args: Any, **kwargs: Any) -> None:
        """Return the messages of lost workers to their queues."""
        super().restore_visible(*args, **kwargs)
        self.earlier.restore_visible(*args, **kwargs)


class Channel(redis.Channel):
    """A channel with this QoS, and with messages of any structure."""

    QoS = QoS
    Message = envelopes.Message


class Transport(redis.Transport):
    """The transport of ``redis://`` and ``rediss://`` URLs."""

    Channel = Channel

    def register_with_event_loop(self, connection: Any, loop: Any) -> None:
        """Let the loop of a worker check what the worker holds."""
        super().register_with_event_loop(connection, loop)
        loop.call_repeatedly(renewal.CHECK_INTERVAL, renewal.check, self.channels)


# The transport removes a message from its queue before it reads the JSON.
redis.loads = envelopes.loads  # type: ignore[attr-defined]


def get_url(url: str) -> str:
    """Return the URL for Celery, with the number of the database.

    Without ``ssl_cert_reqs`` in the query string, Celery does not verify the server. A URL may
    end with ``?ssl_ca_certs=FILE``, for the certificates of a private CA, or with
    ``?ssl_cert_reqs=none`` to verify nothing.
    """
    base, _, query = url.rstrip("/").partition("?")
    path = base.partition("://")[2].partition("/")[2]
    if base.startswith("rediss:") and "ssl_cert_reqs=" not in query:
        query = f"{query}{'&' if query else ''}ssl_cert_reqs=required"
    return f"{base if path else f'{base}/{DATABASE}'}{'?' if query else ''}{query}"


def get_options(settings: Any) -> dict[str, Any]:
    """Return the options of the transport."""
    return {
        # Other applications may use the same database. Queues have names of their own.
        "unacked_key": f"{settings.PACKAGE}.unacked",
        "unacked_index_key": f"{settings.PACKAGE}.unacked_index",
        "unacked_mutex_key": f"{settings.PACKAGE}.unacked_mutex",
        "unacked_mutex_expire": MUTEX_TIMEOUT,
        # Look for messages of lost workers every 10 seconds; kombu's default is 100 seconds.
        "unacked_restore_throttle": 1,
        "socket_connect_timeout": TIMEOUT,
        "socket_timeout": TIMEOUT,
        "socket_keepalive": True,
        "health_check_interval": 25,
    }


def get_priority(priority: int) -> int:
    """Return the priority of a message, for one between -100 and 100.

    0 is the highest, and that of messages without one. The others are 3, 6 and 9, the lowest.
    """
    return 3 + (-priority - 1) * 7 // 100 if priority < 0 else 0
