"""Limits of the database, and poolers that do not keep sessions."""

import signal
import time
from types import SimpleNamespace

import psycopg
import pytest
from django.contrib.auth import get_user_model
from django.core.checks import run_checks
from django.core.management import CommandError
from django.db import OperationalError, ProgrammingError, connection, transaction
from psycopg.pq import TransactionStatus

from prodserver_ops.conf.defaults import limit_database
from prodserver_ops.console import checks
from prodserver_ops.core import database
from prodserver_ops.management.commands import prodserver

User = get_user_model()

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


class Interrupted(Exception):
    """As raised by a soft time limit: by the handler of a signal."""


@pytest.fixture
def interrupt():
    """A function that raises Interrupted in this thread after some seconds."""

    def handle(*args):
        raise Interrupted

    before = signal.signal(signal.SIGALRM, handle)
    yield lambda seconds: signal.setitimer(signal.ITIMER_REAL, seconds)
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


def sleep(seconds=60):
    with connection.cursor() as cursor:
        cursor.execute("SELECT pg_sleep(%s)", [seconds])


def ask():
    with connection.cursor() as cursor:
        cursor.execute("SELECT pg_backend_pid()")
        return cursor.fetchone()[0]


@postgresql
@pytest.mark.django_db(transaction=True, serialized_rollback=True)
class TestInterruptedQuery:
    def test_connection_can_be_used_again(self, interrupt):
        session = ask()
        interrupt(0.2)
        with pytest.raises(Interrupted):
            sleep()
        assert ask() == session

    def test_transaction_is_rolled_back(self, interrupt):
        session = ask()
        interrupt(0.2)
        with pytest.raises(Interrupted), transaction.atomic():
            User.objects.create(username="a")
            sleep()
        assert ask() == session
        assert not User.objects.exists()

    def test_server_runs_the_query_no_longer(self, interrupt):
        interrupt(0.2)
        with pytest.raises(Interrupted):
            sleep()
        with connection.cursor() as cursor:
            cursor.execute(
                "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() "
                "AND state = 'active' AND query LIKE 'SELECT pg_sleep%'"
            )
            assert cursor.fetchone() == (0,)

    @pytest.mark.parametrize("in_transaction", [False, True])
    def test_query_that_cannot_be_cancelled_closes_the_connection(
        self, interrupt, monkeypatch, in_transaction
    ):
        def fail(*args, **kwargs):
            raise psycopg.OperationalError("no more connections")

        session = ask()
        monkeypatch.setattr(psycopg.Connection, "cancel_safe", fail)
        monkeypatch.setattr(database, "GRACE", 0.1)
        interrupt(0.2)
        with pytest.raises(Interrupted):
            if in_transaction:
                with transaction.atomic():
                    sleep(1)
            else:
                sleep(1)
        assert ask() != session
        time.sleep(1)  # Until the server has noticed


@postgresql
@pytest.mark.django_db(transaction=True, serialized_rollback=True)
class TestTemporaryErrors:
    def test_read_only_server_is_temporary(self):
        with connection.cursor() as cursor:
            cursor.execute("SET default_transaction_read_only = on")
        with pytest.raises(database.TEMPORARY_ERRORS, match="read-only transaction"):
            User.objects.create(username="a")
        # The next task or request connects again, maybe to another server.
        connection.close_if_unusable_or_obsolete()
        User.objects.create(username="a")

    def test_session_that_the_server_has_ended_is_temporary(self):
        with pytest.raises(database.TEMPORARY_ERRORS), transaction.atomic():
            with connection.cursor() as cursor:
                cursor.execute("SET LOCAL idle_in_transaction_session_timeout = '50ms'")
            time.sleep(0.5)
            User.objects.exists()

    def test_mistake_is_not(self):
        with pytest.raises(ProgrammingError), connection.cursor() as cursor:
            cursor.execute("SELECT no_such_column")
        assert not issubclass(ProgrammingError, database.TEMPORARY_ERRORS)
