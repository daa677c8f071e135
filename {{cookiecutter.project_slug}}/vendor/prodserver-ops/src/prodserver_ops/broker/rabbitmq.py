"""RabbitMQ: a transport with a timeout for every reply.

A node that has reached its memory or disk limit accepts connections and messages, but does not
reply until resources are free again. A node that hangs never replies.
"""

import re
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from typing import Any

from amqp import PreconditionFailed, RecoverableConnectionError, basic_message, method_framing
from celery import Celery
from kombu import Producer
from kombu.exceptions import OperationalError
from kombu.transport import pyamqp

#: How long to wait for a reply, such as the confirmation of a message, in seconds.
REPLY_TIMEOUT = 5

NO_REPLY = f"RabbitMQ did not reply within {REPLY_TIMEOUT} seconds"


class NoReply(RecoverableConnectionError):
    """RabbitMQ does not reply; the connection is closed."""


class TaskTooLong(RecoverableConnectionError):
    """RabbitMQ has closed a channel, because a message was not acknowledged in time."""


class Message(basic_message.Message):
    """A received message. py-amqp cannot read all headers that RabbitMQ accepts.

    Deeply nested tables, timestamps after the year 9999 and names that are not UTF-8 raise an exception
    for the connection. Such a message has no headers, so that it is not taken for a task.
    """

    def _load_properties(self, class_id: int, buf: bytes, offset: int) -> Any:
        try:
            return super()._load_properties(class_id, buf, offset)  # type: ignore[misc]
        except Exception:
            self.properties = {}
            return offset


method_framing.Message = Message  # type: ignore[misc]


class ReplyLimit:
    """Limits how long a connection or a channel waits for a reply."""

    def wait(self, method: Any, callback: Any = None, timeout: Any = None, **kwargs: Any) -> Any:
        """Wait for a method; raise NoReply after the limit."""
        connection = self.connection  # type: ignore[attr-defined]
        try:
            return super().wait(  # type: ignore[misc]
                method, callback, timeout or REPLY_TIMEOUT, **kwargs
            )
        except TimeoutError as error:
            # A late reply would be taken for that of the next request.
            connection.collect()
            raise NoReply(NO_REPLY) from error


class Channel(ReplyLimit, pyamqp.Channel):  # type: ignore[misc]
    """A channel with limited waits, and an error that does not end a worker."""

    def _on_close(self, reply_code: int, reply_text: str, *args: Any) -> None:
        try:
            super()._on_close(reply_code, reply_text, *args)  # type: ignore[misc]
        except PreconditionFailed as error:
            if "delivery acknowledgement" not in reply_text:
                raise
            raise TaskTooLong(
                "A task took longer than the consumer_timeout of RabbitMQ, 30 minutes by default"
            ) from error

    def basic_publish_confirm(self, *args: Any, **kwargs: Any) -> Any:
        """Publish a message; raise OperationalError if it is not confirmed.

        Celery retries after connection errors, which would take several times as long.
        """
        try:
            return super().basic_publish_confirm(*args, **kwargs)
        except NoReply as error:
            raise OperationalError(str(error)) from error


class Connection(ReplyLimit, pyamqp.Connection):  # type: ignore[misc]
    """A connection with limited waits."""

    Channel = Channel


class SSLConnection(Connection):
    """A connection that verifies the server's certificate and its name.

    By default, py-amqp accepts any name. A URL may end with ``?ssl_ca_certs=FILE``, for the
    certificates of a private CA, or with ``?ssl_cert_reqs=none`` to verify nothing.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        tls = self.ssl if isinstance(self.ssl, dict) else {}
        tls = {name.removeprefix("ssl_"): value for name, value in tls.items()}
        if tls.setdefault("cert_reqs", ssl.CERT_REQUIRED) != ssl.CERT_NONE:
            tls.setdefault("server_hostname", self.host.rpartition(":")[0].strip("[]"))
        self.ssl = tls


class Transport(pyamqp.Transport):
    """The transport of ``amqp://`` URLs."""

    Connection = Connection


class SSLTransport(pyamqp.SSLTransport):
    """The transport of ``amqps://`` URLs."""

    Connection = SSLConnection


def explain(error: BaseException) -> str | None:
    """Return what to do about a queue that exists with another type."""
    match = re.search(
        r"inequivalent arg '(.+?)' for (queue|exchange) '(.+?)' in vhost '(.+?)'", str(error)
    )
    if match is None:
        return None
    argument, kind, name, virtual_host = match.groups()
    if argument != "x-queue-type":
        return f"The {kind} {name} of RabbitMQ exists with another {argument}; rename or delete it"
    return (
        f"The queue {name} of RabbitMQ is not a quorum queue. Let the service that made it run its "
        f"tasks, then delete it: rabbitmqctl --vhost={virtual_host} delete_queue {name}"
    )


def get_options(settings: Any) -> dict[str, Any]:
    """Return the options of the transport."""
    return {"confirm_publish": True}


def get_priority(priority: int) -> int:
    """Return the priority of a message, for one between -100 and 100.

    Since RabbitMQ 4, quorum queues have two: above 4, and the others.
    """
    return 4 + (priority + 19) // 20 if priority > 0 else 0


class BatchProducer(Producer):
    """A producer that sends many messages, and waits for their confirmations, at once."""

    #: Maximum number of unconfirmed messages.
    LIMIT = 1000

    def __init__(self, channel: Any) -> None:
        super().__init__(channel)
        self.channel: Any = channel
        self.number = 0
        self.unconfirmed: set[int] = set()
        self.declared: set[str] = set()
        self.buffer = BytesIO()
        self.write_frame = method_framing.frame_writer(channel.connection, self.buffer)
        channel.confirm_select()
        channel.events["basic_ack"].add(self.confirm)
        channel.events["basic_nack"].add(self.refuse)

    def publish(self, *args: Any, declare: Any = (), **kwargs: Any) -> Any:
        """Publish a message; RabbitMQ numbers them from 1."""
        connection, write_frame = self.get_connection(), self.write_frame
        if declare := [entity for entity in declare or () if entity.name not in self.declared]:
            # RabbitMQ replies to a declaration.
            self.flush()
            write_frame = connection.frame_writer
        connection.frame_writer, keep = write_frame, connection.frame_writer
        try:
            # A new connection does not confirm the messages of an earlier one.
            result = super().publish(*args, **kwargs | {"declare": declare, "retry": False})
        except Exception:
            self.get_connection()
            raise  # This message cannot be serialized.
        finally:
            connection.frame_writer = keep
        # A message that cannot be serialized has no number.
        self.declared |= {entity.name for entity in declare}
        self.number += 1
        self.unconfirmed.add(self.number)
        if len(self.unconfirmed) >= self.LIMIT:
            self.wait()
        return result

    def get_connection(self) -> Any:
        """Return the connection; raise OperationalError if RabbitMQ has closed it."""
        if self.channel.connection is None:
            raise OperationalError("RabbitMQ closed the connection")
        return self.channel.connection

    def flush(self) -> None:
        """Send what is in the buffer."""
        self.get_connection().transport.write(self.buffer.getvalue())
        self.buffer.seek(0)
        self.buffer.truncate()

    def confirm(self, number: int, multiple: bool) -> None:
        """Record the confirmation of a message, or of all messages up to it."""
        done = {other for other in self.unconfirmed if other <= number} if multiple else {number}
        self.unconfirmed -= done

    def refuse(self, *args: Any) -> None:
        """Raise OperationalError, because RabbitMQ has refused a message."""
        raise OperationalError("RabbitMQ refused a message")

    def wait(self) -> None:
        """Wait until all messages are confirmed; raise OperationalError if there is no reply."""
        self.flush()
        try:
            while self.unconfirmed:
                self.channel.connection.drain_events(timeout=REPLY_TIMEOUT)
        except TimeoutError as error:
            raise OperationalError(NO_REPLY) from error


@contextmanager
def open_batch(app: Celery) -> Iterator[Producer]:
    """Yield a producer for many messages, which are confirmed when the block ends.

    Raises OperationalError if RabbitMQ is unavailable or does not confirm them.
    """
    # A node that has reached its limit reads nothing. Without this capability, the library does not
    # look for a notification of that before each message.
    options = {
        "confirm_publish": False,
        "write_timeout": REPLY_TIMEOUT,
        "client_properties": {"capabilities": {}},
    }
    with app.connection_for_write(transport_options=options) as connection:
        try:
            producer = BatchProducer(connection.channel())
            yield producer
            producer.wait()
        except (*connection.connection_errors, *connection.channel_errors) as error:
            raise OperationalError(str(error)) from error
