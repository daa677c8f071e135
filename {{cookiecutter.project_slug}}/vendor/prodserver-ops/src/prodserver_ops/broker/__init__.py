"""Brokers: the scheme of the broker's URL selects a module of this package.

A module defines the following functions; all but the first are optional. It can also define a kombu
transport that replaces kombu's own for its scheme:

``get_options(settings)``
    The options of the transport.
``get_url(url)``
    The URL for Celery.
``open_batch(app)``
    The context manager of a producer for many messages.
``install()``
    Prepare the broker after migrations.
``get_priority(priority)``
    The priority of a message.
``joins_transaction(url)``
    Whether a message that is published now belongs to the current transaction.
``explain(error)``
    What to do about an error of a channel that would end a worker, or None.
"""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from celery import Celery
from kombu import Producer
from kombu.transport import TRANSPORT_ALIASES

from . import publishing


@dataclass(frozen=True)
class Broker:
    """A broker, and the data that is needed before its module is imported.

    ``ports`` contains the default port of each URL scheme, and ``transports`` the transport class
    of each scheme whose transport this package replaces. ``package`` is the required package, and
    ``extra`` the extra of this distribution that installs it.
    """

    module: str
    ports: dict[str, int] = field(default_factory=dict)
    transports: dict[str, str] = field(default_factory=dict)
    queue_type: str = "classic"
    exchange_type: str = "direct"
    package: str = ""
    extra: str = ""

    def load(self) -> Any:
        """Return the module."""
        return import_module(f"{__name__}.{self.module}")


EMBEDDED = Broker("embedded", transports={"filesystem": "Transport"})

BROKERS = (
    # Delayed messages need a topic exchange for quorum queues.
    # https://docs.celeryq.dev/en/stable/getting-started/backends-and-brokers/rabbitmq.html
    Broker(
        "rabbitmq",
        {"amqp": 5672, "amqps": 5671},
        {"amqp": "Transport", "amqps": "SSLTransport"},
        queue_type="quorum",
        exchange_type="topic",
    ),
    Broker(
        "redis",
        {"redis": 6379, "rediss": 6379},
        {"redis": "Transport", "rediss": "Transport"},
        package="redis",
        extra="redis",
    ),
    Broker(
        "postgresql",
        {"pgmq": 5432, "postgres": 5432, "postgresql": 5432},
        {"pgmq": "Transport"},
        package="pgmq",
        extra="postgresql",
    ),
)

#: The brokers that are servers, by URL scheme.
BY_SCHEME = {scheme: broker for broker in BROKERS for scheme in broker.ports}

#: The schemes of brokers that need no server: folders, and the memory of one process.
EMBEDDED_SCHEMES = ("filesystem", "memory")


def register_transports() -> None:
    """Make kombu use the transports of this package."""
    for broker in (EMBEDDED, *BROKERS):
        for scheme, name in broker.transports.items():
            TRANSPORT_ALIASES[scheme] = f"{__name__}.{broker.module}:{name}"


def get_scheme(url: str) -> str:
    """Return the scheme of a URL."""
    return url.partition(":")[0]


def find(url: str) -> Broker:
    """Return the broker of a URL; the embedded broker if the scheme is not that of a server."""
    return BY_SCHEME.get(get_scheme(url), EMBEDDED)


def find_missing_extra(url: str) -> str:
    """Return the extra that a URL requires if its package is not installed, otherwise ""."""
    broker = find(url)
    return broker.extra if broker.package and find_spec(broker.package) is None else ""


def get_url(url: str) -> str:
    """Return the URL for Celery."""
    if get_scheme(url) not in BY_SCHEME:
        return url
    convert: Callable[[str], str] = getattr(find(url).load(), "get_url", str)
    return convert(url)


def get_options(url: str, settings: Any) -> dict[str, Any]:
    """Return the options of the transport."""
    options: dict[str, Any] = find(url).load().get_options(settings)
    return options


def open_batch(url: str, app: Celery) -> AbstractContextManager[Producer]:
    """Return the context manager of a producer for many messages."""
    module = find(url).load()
    producer: AbstractContextManager[Producer]
    producer = getattr(module, "open_batch", publishing.open_batch)(app)
    return producer


def install(url: str) -> None:
    """Prepare the broker after migrations."""
    getattr(find(url).load(), "install", lambda: None)()


def joins_transaction(url: str) -> bool:
    """Return whether a message that is published now belongs to the current transaction.

    Then it is delivered if and only if the transaction is committed.
    """
    joins: Callable[[str], bool]
    joins = getattr(find(url).load(), "joins_transaction", lambda url: False)
    return joins(url)


def get_priority(url: str, priority: int) -> int:
    """Return the priority of a message, for one between -100 and 100; 0 if there is only one."""
    convert: Callable[[int], int] = getattr(find(url).load(), "get_priority", lambda priority: 0)
    return convert(priority)


def explain(app: Celery, error: BaseException) -> str | None:
    """Return what to do about an error that would end a worker, or None if it is unknown."""
    explain: Callable[[BaseException], str | None]
    explain = getattr(find(app.conf.broker_url).load(), "explain", lambda error: None)
    return explain(error)


def find_problem(app: Celery, timeout: float) -> str | None:
    """Return what to do about a broker that would lose messages or cannot be used, or None.

    ``timeout`` limits the time to connect, in seconds. Raises other errors of the broker.
    """
    return find_eviction(app, timeout) or find_refusal(app, timeout)


def find_refusal(app: Celery, timeout: float) -> str | None:
    """Declare the queues of workers; return what to do if the broker takes no messages, or None.

    ``timeout`` limits the time to connect, in seconds. Raises other errors of the broker, such as
    one about a permission.
    """
    if problem := call(app, "find_full_memory", timeout):
        return problem
    if not hasattr(find(app.conf.broker_url).load(), "explain"):
        return None
    with app.connection_for_write(connect_timeout=timeout) as connection:
        for queue in app.amqp.queues.values():
            try:
                queue(connection.channel()).declare()
            except connection.channel_errors as error:
                if problem := explain(app, error):
                    return problem
                raise
    return None


def find_eviction(app: Celery, timeout: float) -> str | None:
    """Return what to do about a server that deletes messages when it is full, or None.

    ``timeout`` limits the time to connect, in seconds. Raises an exception if the broker is
    unavailable.
    """
    return call(app, "find_eviction", timeout)


def call(app: Celery, name: str, timeout: float) -> str | None:
    """Call a function of the broker's module with a channel, if the module has it."""
    module = find(app.conf.broker_url).load()
    if not hasattr(module, name):
        return None
    function: Callable[[Any], str | None] = getattr(module, name)
    with app.connection_for_write(connect_timeout=timeout) as connection:
        return function(connection.channel())


def count_messages(app: Celery, names: Iterable[str], timeout: float) -> dict[str, int]:
    """Return the number of waiting messages by queue; 0 for a queue that does not exist.

    ``timeout`` limits the time to connect, in seconds. Raises an exception if the broker is
    unavailable.
    """
    counts: dict[str, int] = {}
    with app.connection_for_read(connect_timeout=timeout) as connection:
        for name in names:
            try:
                channel: Any = connection.channel()
                counts[name] = channel.queue_declare(name, passive=True).message_count
            except connection.channel_errors:
                counts[name] = 0
    return counts
