"""Redis: a transport that loses no message, and reads whatever a queue contains.

kombu's own transport removes a message from its queue with BRPOP, and stores it as unacknowledged
afterwards; a message is lost if the worker or the connection ends in between. Here a script does
both at once. BRPOP only waits for the bell of a queue, which each published message rings.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from queue import Empty
from typing import Any
from uuid import uuid4

from django.conf import settings
from kombu.transport import redis, virtual
from kombu.utils.encoding import bytes_to_str
from kombu.utils.json import loads

from . import envelopes, renewal

#: The default database. Caches and channels use database 0.
DATABASE = 1

#: How long to wait for a connection or a reply, in seconds.
TIMEOUT = 5

#: From which part of its maxmemory on a server is full.
FULL = 0.95

#: How long a worker that is killed may keep others from looking for messages, in seconds.
MUTEX_TIMEOUT = 20

#: How many messages the bell of a queue announces at most, and for how long, in seconds. Without a
#: bell, a worker finds a message within a second.
MAX_BELLS, BELL_TIMEOUT = 100, 60

#: Take the oldest message of the first queue that has one, and store it as unacknowledged.
#:
#: The keys are those of unacknowledged messages and their index, and one for each queue and
#: priority. The arguments are the new delivery tag, and the name of the queue of each key, or "" if
#: its messages need no acknowledgement. Returns the number of the key and the message, or nothing if
#: all queues are empty. A server without free memory stores nothing, and its queues still empty.
TAKE = """
for number = 3, #KEYS do
  local message = redis.call("LINDEX", KEYS[number], -1)
  if message then
    local queue = ARGV[number - 1]
    if queue ~= "" then
      local now = redis.call("TIME")
      redis.pcall("ZADD", KEYS[2], now[1] + now[2] / 1000000, ARGV[1])
      redis.pcall("HSET", KEYS[1], ARGV[1], cjson.encode({message, "", queue}))
    end
    redis.call("RPOP", KEYS[number])
    return {number - 3, message}
  end
end
"""

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
        """Hold a message that the channel has taken."""
        virtual.QoS.append(self, message, delivery_tag)
        renewal.watch(self)

    @contextmanager
    def pipe_or_acquire(self, pipe: Any = None, client: Any = None) -> Iterator[Any]:
        """Return a pipeline without a transaction: a server without free memory refuses those."""
        if pipe:
            yield pipe
            return
        with self.channel.conn_or_acquire(client) as client:
            yield client.pipeline(transaction=False)

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

    #: The types of kombu do not have these.
    _queue_cycle: Any
    connection_errors: tuple[type[Exception], ...]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.unacknowledged: set[str] = set()
        #: The delivery tag and the queues of the script that runs; none while BRPOP waits.
        self.taking: tuple[str, list[str]] | None = None
        self.is_empty = False

    def basic_consume(  # type: ignore[override]
        self, queue: str, no_ack: bool, *args: Any, **kwargs: Any
    ) -> None:
        """Consume a queue; without acknowledgements, its messages are not stored."""
        (self.unacknowledged.add if no_ack else self.unacknowledged.discard)(queue)
        super().basic_consume(queue, no_ack, *args, **kwargs)

    def basic_get(self, queue: str, no_ack: bool = False, **kwargs: Any) -> Any:
        """Return a message of a queue, or None."""
        if no_ack:
            return super().basic_get(queue, no_ack=True, **kwargs)
        tag, queues, arguments = self.get_arguments([queue])
        with self.conn_or_acquire() as client:
            taken = client.execute_command("EVAL", TAKE, *arguments)
        if taken is None:
            return None
        _, payload = self.read_taken(taken, tag, queues)
        message = self.Message(payload, channel=self)
        self.qos.append(message, tag)
        return message

    def get_arguments(self, queues: list[str]) -> tuple[str, list[str], list[Any]]:
        """Return a new delivery tag, the queue of each key, and the arguments of the script."""
        tag, prefix = uuid4().hex, self.global_keyprefix
        places = [
            (f"{prefix}{self._q_for_pri(queue, priority)}", queue)  # type: ignore[attr-defined]
            for priority in self.priority_steps
            for queue in queues
        ]
        keys = [f"{prefix}{self.unacked_key}", f"{prefix}{self.unacked_index_key}"]
        keys += [key for key, _ in places]
        names = ["" if queue in self.unacknowledged else queue for _, queue in places]
        return tag, [queue for _, queue in places], [len(keys), *keys, tag, *names]

    def read_taken(self, taken: Any, tag: str, queues: list[str]) -> tuple[str, dict[str, Any]]:
        """Return the queue and the content of a message that the script has taken."""
        number, text = taken
        payload = envelopes.repair(envelopes.loads(bytes_to_str(text)))
        payload["properties"]["delivery_tag"] = tag
        return queues[number], payload

    def _brpop_start(self, timeout: float | None = None) -> None:
        """Ask for a message; wait for the bell of a queue if all were empty."""
        queues = self._queue_cycle.consume(len(self.active_queues))
        if not queues:
            return
        if self.is_empty:
            self.taking = None
            bells = [f"{self.global_keyprefix}{self.get_bell(queue)}" for queue in queues]
            command = ["BRPOP", *bells, timeout or self.brpop_timeout or 0]
        else:
            tag, names, arguments = self.get_arguments(queues)
            self.taking = tag, names
            command = ["EVAL", TAKE, *arguments]
        self._in_poll = self.client.connection
        self._brpop_sent_at = time.monotonic()
        self.client.connection.send_command(*command)

    def _brpop_read(self, **options: Any) -> bool:
        """Deliver the message that was taken; raise Empty if there is none."""
        connection, taking = self.client.connection, self.taking
        try:
            try:
                name = "EVAL" if taking else "BRPOP"
                reply = self.client.parse_response(connection, name, **options)
            except self.connection_errors:
                self.is_empty = False
                connection.disconnect()
                raise
            self.is_empty = taking is not None and reply is None
            if taking is None or reply is None:
                raise Empty
            queue, payload = self.read_taken(reply, *taking)
            self._queue_cycle.rotate(queue)
            self.connection._deliver(payload, queue)
            return True
        finally:
            self._in_poll = None
            self._flush_brpop_reauth()  # type: ignore[attr-defined]

    def get_bell(self, queue: str) -> str:
        """Return the key of the list that wakes the workers of a queue."""
        return f"{queue}{self.sep}bell"

    def _put(self, queue: str, message: Any, **kwargs: Any) -> None:
        """Publish a message, and ring the bell of its queue."""
        bell = self.get_bell(queue)
        ringing: list[Any] = [
            ("lpush", bell, 1),
            ("ltrim", bell, 0, MAX_BELLS - 1),
            ("expire", bell, BELL_TIMEOUT),
        ]
        super()._put(queue, message, **kwargs)
        if (batch := kwargs.get("_publish_batch")) is not None:
            for command in ringing:
                batch.add(*command)
            return
        with self.conn_or_acquire() as client, client.pipeline(transaction=False) as pipe:
            for name, *arguments in ringing:
                getattr(pipe, name)(*arguments)
            pipe.execute()

    def _do_restore_message(self, payload: Any, *args: Any, **kwargs: Any) -> None:
        """Return a message to its queue; what the script has stored is text."""
        if isinstance(payload, str):
            payload = envelopes.repair(envelopes.loads(payload))
        super()._do_restore_message(payload, *args, **kwargs)  # type: ignore[misc]


class Transport(redis.Transport):
    """The transport of ``redis://`` and ``rediss://`` URLs."""

    Channel = Channel

    def register_with_event_loop(self, connection: Any, loop: Any) -> None:
        """Let the loop of a worker check what the worker holds."""
        super().register_with_event_loop(connection, loop)
        loop.call_repeatedly(renewal.CHECK_INTERVAL, renewal.check, self.channels)


# A message to all workers may be any text.
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


def find_eviction(channel: Channel) -> str | None:
    """Return what to do about a server that deletes queues when its memory is full, or None."""
    with channel.conn_or_acquire() as client:
        memory = client.info("memory")
    policy = memory.get("maxmemory_policy", "noeviction")
    if not memory.get("maxmemory") or not policy.startswith("allkeys-"):
        return None
    return (
        f"Redis deletes queued tasks when its memory is full: its maxmemory-policy is {policy}; "
        "set it to noeviction"
    )


def find_full_memory(channel: Channel) -> str | None:
    """Return what to do about a server without memory for more messages, or None."""
    with channel.conn_or_acquire() as client:
        memory = client.info("memory")
    used, limit = memory["used_memory"], memory.get("maxmemory", 0)
    if not limit or used <= limit * FULL:
        return None
    return (
        f"Redis has no memory left for tasks: {used // 2**20} of {limit // 2**20} MB are used; "
        "raise its maxmemory, or delete other keys"
    )
