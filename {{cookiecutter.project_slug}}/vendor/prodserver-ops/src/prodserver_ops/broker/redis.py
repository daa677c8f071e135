"""Redis: a transport that reads whatever a queue contains, with a timeout for every reply."""

from typing import Any

from kombu.transport import redis

from . import envelopes, get_visibility_timeout

#: The default database. Caches and channels use database 0.
DATABASE = 1

#: How long to wait for a connection or a reply, in seconds.
TIMEOUT = 5


class Channel(redis.Channel):
    """A channel with messages of any structure."""

    Message = envelopes.Message


class Transport(redis.Transport):
    """The transport of ``redis://`` and ``rediss://`` URLs."""

    Channel = Channel


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
        "visibility_timeout": get_visibility_timeout(settings),
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
