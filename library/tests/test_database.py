"""Limits of the database, and poolers that do not keep sessions."""

from types import SimpleNamespace

import psycopg
import pytest
from django.core.checks import run_checks
from django.core.management import CommandError
from django.db import OperationalError, connection
from psycopg.pq import TransactionStatus

from prodserver_ops.conf.defaults import limit_database
from prodserver_ops.console import checks
from prodserver_ops.core import database
from prodserver_ops.management.commands import prodserver

postgresql = pytest.mark.skipif("connection.vendor != 'postgresql'", reason="needs PostgreSQL")


def test_options_are_those_of_the_backend_and_the_url_can_change_them():
    other = {"ENGINE": "django.db.backends.mysql"}
    assert limit_database(other) is other
    sqlite = {"ENGINE": "django.db.backends.sqlite3", "OPTIONS": {"timeout": 3}}
    assert limit_database(sqlite)["OPTIONS"]["timeout"] == 3
    url = {"ENGINE": "django.db.backends.postgresql", "OPTIONS": {"connect_timeout": "9"}}
    options = limit_database(url)["OPTIONS"]
    assert options == database.CONNECT_OPTIONS | {"connect_timeout": "9"}


@pytest.fixture
def raw():
    """A connection whose server does not respond."""

    class Connection:
        closed = False
        info = SimpleNamespace(transaction_status=TransactionStatus.ACTIVE)

        def __init__(self):
            self.pgconn = SimpleNamespace(finish=lambda: setattr(self, "closed", True))

        def wait(self, generator, interval=0, timeout=None):
            raise psycopg.OperationalError(f"timeout of {timeout}")

    return Connection()


def test_a_connection_without_a_response_is_closed(raw):
    database.limit_wait(raw, 35)
    with pytest.raises(psycopg.OperationalError, match="does not respond") as caught:
        raw.wait(None)
    assert str(caught.value.__cause__) == "timeout of 35"
    assert raw.closed


def test_another_error_keeps_its_message(raw):
    raw.info.transaction_status = TransactionStatus.UNKNOWN
    database.limit_wait(raw, 35)
    with pytest.raises(psycopg.OperationalError, match="timeout of 2"):
        raw.wait(None, timeout=2)
    assert not raw.closed


@pytest.fixture
def pooler(monkeypatch):
    """Return a function that puts a pooler with these sessions before the database."""

    class Connection:
        info = SimpleNamespace(backend_pid=1)

        def __init__(self, sessions):
            self.sessions = sessions

        def __enter__(self):
            return self

        def __exit__(self, *args):
            pass

    def use(first, second=()):
        clients = [Connection(iter(first)), Connection(iter(second))]
        monkeypatch.setattr(
            database, "connections", {"default": SimpleNamespace(vendor="postgresql")}
        )
        monkeypatch.setattr(database, "_connect", lambda alias: clients.pop(0))
        monkeypatch.setattr(database, "_get_session", lambda client: next(client.sessions))

    return use


def test_a_direct_connection_is_accepted(pooler):
    pooler([1])
    assert database.find_pooler() is None


def test_a_pooler_that_keeps_sessions_is_accepted(pooler):
    pooler([7, 7, 7, 7], [8, 8, 8])
    assert database.find_pooler() is None


@pytest.mark.parametrize(("first", "second"), [([7], [7]), ([7, 7, 9], [8, 8]), ([7, 9], [8])])
def test_a_pooler_that_shares_sessions_is_refused(pooler, monkeypatch, first, second):
    pooler(first, second)
    problem = database.find_pooler()
    assert "pool_mode = transaction" in problem
    monkeypatch.setattr(checks, "find_pooler", lambda: problem)
    assert [message.id for message in run_checks() if message.msg == problem] == ["database.E001"]
    monkeypatch.setattr(prodserver, "find_pooler", lambda: problem)
    with pytest.raises(CommandError, match="pool_mode"):
        prodserver.Command().start_process("beat")


def test_a_database_that_does_not_respond_is_not_reported_as_a_pooler(pooler, monkeypatch):
    def fail(alias):
        raise psycopg.OperationalError

    pooler([])
    monkeypatch.setattr(database, "_connect", fail)
    assert database.find_pooler() is None


@postgresql
@pytest.mark.django_db
def test_a_statement_is_limited():
    database.set_limits(connection, 1)
    with (
        pytest.raises(OperationalError, match="statement timeout"),
        connection.cursor() as cursor,
    ):
        cursor.execute("SELECT pg_sleep(20)")


@postgresql
@pytest.mark.django_db
def test_migrations_are_not_limited(settings):
    database.lift_limit("default")
    with connection.cursor() as cursor:
        cursor.execute(
            "SELECT current_setting('statement_timeout'), current_setting('lock_timeout')"
        )
        assert cursor.fetchone() == ("0", "10s")
