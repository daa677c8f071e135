"""The transport for RabbitMQ, with a limit for every reply.

A node that has reached its memory or disk limit accepts connections and messages, and does
not reply until it has room again. A frozen one never does.
"""

from typing import Any

from amqp import RecoverableConnectionError
from kombu.exceptions import OperationalError
from kombu.transport import pyamqp

#: How long to wait for a reply, such as the confirmation of a message, in seconds.
REPLY_TIMEOUT = 5


class NoReply(RecoverableConnectionError):
    """RabbitMQ does not reply; the connection is closed."""


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
            raise NoReply(f"RabbitMQ did not reply within {REPLY_TIMEOUT} seconds") from error


class Channel(ReplyLimit, pyamqp.Channel):  # type: ignore[misc]
    """A channel with limited waits."""

    def basic_publish_confirm(self, *args: Any, **kwargs: Any) -> Any:
        """Publish a message; raise OperationalError without a confirmation.

        Celery repeats a message at connection errors, which would take several times as long.
        """
        try:
            return super().basic_publish_confirm(*args, **kwargs)
        except NoReply as error:
            raise OperationalError(str(error)) from error


class Connection(ReplyLimit, pyamqp.Connection):  # type: ignore[misc]
    """A connection with limited waits."""

    Channel = Channel


class Transport(pyamqp.Transport):
    """The transport of ``amqp://`` URLs."""

    Connection = Connection


class SSLTransport(pyamqp.SSLTransport):
    """The transport of ``amqps://`` URLs."""

    Connection = Connection
