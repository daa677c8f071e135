"""Timeouts and errors of PostgreSQL, and a check for poolers that do not keep sessions.

By default, neither Django nor PostgreSQL limits how long a client waits for a server that hangs or
is unreachable.
"""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from django.conf import settings
from django.db import (
    DEFAULT_DB_ALIAS,
    InterfaceError,
    OperationalError,
    connection,
    connections,
    transaction,
)
from django.db.backends.base.base import BaseDatabaseWrapper

if TYPE_CHECKING:
    import psycopg

logger = logging.getLogger(__name__)

#: Options of each connection. The timeout for connecting is 5 seconds. A connection is lost if the
#: server acknowledges nothing for 25 seconds, whether or not the client has sent data.
#: https://www.postgresql.org/docs/current/libpq-connect.html#LIBPQ-PARAMKEYWORDS
CONNECT_OPTIONS = {
    "connect_timeout": 5,
    "tcp_user_timeout": 25_000,
    "keepalives": 1,
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
}

#: Parameters of each session, except the statement timeout. The server ends the session of an
#: unreachable client, and releases its locks, after the same time as the client.
#: https://www.postgresql.org/docs/current/runtime-config.html
SESSION_PARAMETERS = {
    "lock_timeout": "10s",
    "idle_in_transaction_session_timeout": "5min",
    "tcp_user_timeout": "25s",
    "tcp_keepalives_idle": "10",
    "tcp_keepalives_interval": "5",
    "tcp_keepalives_count": "3",
}

#: Django's errors after which the same work may succeed later, for example after a failover.
TEMPORARY_ERRORS = (OperationalError, InterfaceError)

#: The SQLSTATEs of temporary errors for which psycopg has another class. ``limit_connection()`` makes
#: them an OperationalError: the server is read-only, or it has ended an idle or long transaction.
TEMPORARY_STATES = {"25006", "25P03", "25P04"}

#: How long ``persist()`` tries, and the time between two attempts, in seconds.
PERSIST_SECONDS, PERSIST_INTERVAL = 180, 0.5

#: How long the client waits for a result beyond the statement timeout, in seconds.
GRACE = 5

#: How long the check for a pooler waits for a response, in seconds.
CHECK_TIMEOUT = 5


def get_sqlite(path: str | Path) -> dict[str, Any]:
    """Return an entry of ``DATABASES`` for an SQLite database that several processes write to."""
    return {
        "ENGINE": "django.db.backends.sqlite3",
        "NAME": path,
        "OPTIONS": {
            "timeout": 20,
            "transaction_mode": "IMMEDIATE",
            "init_command": "PRAGMA journal_mode=WAL; PRAGMA synchronous=NORMAL;",
        },
    }


# Limits


def limit_connection(connection: BaseDatabaseWrapper, **kwargs: Any) -> None:
    """Limit a new connection to PostgreSQL; a receiver of ``connection_created``."""
    if connection.vendor == "postgresql":
        set_limits(connection, settings.DATABASE_STATEMENT_TIMEOUT)


def lift_limit(using: str, **kwargs: Any) -> None:
    """Let migrations take as long as they need; a receiver of ``pre_migrate``.

    The lock timeout still applies, because queries of other processes wait behind a migration that
    waits for a lock.
    """
    connection = connections[using]
    if connection.vendor == "postgresql":
        connection.ensure_connection()
        set_limits(connection, 0)


def set_limits(connection: BaseDatabaseWrapper, seconds: int) -> None:
    """Set the statement timeout in seconds; 0 means no limit."""
    raw: Any = connection.connection
    limit_wait(raw, seconds + GRACE if seconds else None, connection)
    with raw.cursor() as cursor:
        parameters = SESSION_PARAMETERS | {"statement_timeout": f"{seconds}s"}
        cursor.execute(";".join(f"SET {name} = '{value}'" for name, value in parameters.items()))


@contextmanager
def shorter_timeout(seconds: int) -> Iterator[None]:
    """Limit each statement of the default connection in the block to ``seconds``, if that is less."""
    if connection.vendor != "postgresql" or seconds >= settings.DATABASE_STATEMENT_TIMEOUT:
        yield
        return
    import psycopg

    connection.ensure_connection()
    set_limits(connection, seconds)
    try:
        yield
    finally:
        # The rollback of a failed transaction also restores it.
        if connection.connection is not None:
            with suppress(psycopg.Error):
                set_limits(connection, settings.DATABASE_STATEMENT_TIMEOUT)


def is_timeout(error: Exception) -> bool:
    """Return whether a statement was canceled because it took too long."""
    return getattr(error.__cause__, "sqlstate", None) == "57014"


def limit_wait(
    raw: "psycopg.Connection[Any]",
    seconds: float | None,
    connection: BaseDatabaseWrapper | None = None,
) -> None:
    """Limit how long a connection waits for a result, in case the server hangs.

    An exception that interrupts a query, such as a soft time limit, cancels it. If that fails, the
    connection is closed, and Django's ``connection`` connects again after the transaction.
    """
    raw.wait = partial(_wait, raw, seconds, connection)  # type: ignore[method-assign]


def _wait(
    raw: "psycopg.Connection[Any]",
    seconds: float | None,
    connection: BaseDatabaseWrapper | None,
    generator: Any,
    **kwargs: Any,
) -> Any:
    import psycopg

    kwargs.setdefault("timeout", seconds)
    try:
        return type(raw).wait(raw, generator, **kwargs)
    except psycopg.OperationalError as error:
        if not _is_active(raw):
            raise
        # The result may still arrive, and be taken for that of the next statement.
        _close(raw, connection)
        raise psycopg.OperationalError("the server does not respond") from error
    except psycopg.Error as error:
        if error.sqlstate not in TEMPORARY_STATES:
            raise
        if connection is not None:
            # Another server may be the primary one now: connect again for the next task or request.
            connection.close_at = time.monotonic()
        raise psycopg.OperationalError(*error.args) from error
    except BaseException:
        if _is_active(raw):
            with suppress(psycopg.Error):
                raw.cancel_safe(timeout=GRACE)
                type(raw).wait(raw, generator, timeout=GRACE)
            if _is_active(raw):
                _close(raw, connection)
        raise


def _is_active(raw: "psycopg.Connection[Any]") -> bool:
    return raw.info.transaction_status.name == "ACTIVE"


def _close(raw: "psycopg.Connection[Any]", connection: BaseDatabaseWrapper | None) -> None:
    raw.pgconn.finish()
    if connection is not None and not connection.in_atomic_block:
        connection.close()


def persist[T](function: Callable[[], T]) -> T:
    """Return the result of a function that stores what only this process knows.

    While the database is unavailable, locked or read-only, the function is called again, for
    ``PERSIST_SECONDS``; then the error is raised.
    """
    deadline = time.monotonic() + PERSIST_SECONDS
    while True:
        try:
            return function()
        except TEMPORARY_ERRORS as error:
            if time.monotonic() > deadline:
                raise
            logger.warning("The database is unavailable, trying again: %s", type(error).__name__)
        time.sleep(PERSIST_INTERVAL)
        connection.close_if_unusable_or_obsolete()


@contextmanager
def short_transaction() -> Iterator[None]:
    """Open a transaction whose locks end within seconds, even if the process is paused in it."""
    with transaction.atomic():
        if connection.vendor == "postgresql":
            with connection.cursor() as cursor:
                cursor.execute("SET LOCAL idle_in_transaction_session_timeout = '2s'")
        yield


# Poolers


def find_pooler(alias: str = DEFAULT_DB_ALIAS) -> str | None:
    """Return an error message if a pooler does not keep sessions, otherwise None.

    PostgreSQL sends each client the process id of its session. A pooler sends a different id, and
    in transaction mode two clients can share a session. Also returns None if the database does not
    respond.
    """
    if connections[alias].vendor != "postgresql":
        return None
    import psycopg

    try:
        with _connect(alias) as first:
            session = _get_session(first)
            if session == first.info.backend_pid:
                return None
            with _connect(alias) as second:
                for _ in range(3):
                    if _get_session(second) == session or _get_session(first) != session:
                        return (
                            "A pooler does not keep sessions between transactions, like PgBouncer "
                            "with pool_mode = transaction. Use pool_mode = session, or connect "
                            "directly to PostgreSQL: locks and cursors need a session."
                        )
    except psycopg.Error:
        pass
    return None


def _connect(alias: str) -> "psycopg.Connection[Any]":
    import psycopg

    params: dict[str, Any] = connections[alias].get_connection_params()
    raw = psycopg.connect(**params | {"autocommit": True})
    limit_wait(raw, CHECK_TIMEOUT)
    return raw


def _get_session(raw: "psycopg.Connection[Any]") -> int:
    row = raw.execute("SELECT pg_backend_pid()").fetchone()
    assert row is not None
    return int(row[0])
