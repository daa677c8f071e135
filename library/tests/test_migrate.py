"""``migrate`` runs once at a time: two deploys would create the same tables."""

import io
import threading

import pytest
from django.core.management import CommandError, call_command
from django.db import OperationalError, connection, transaction

from prodserver_ops.core.locks import get_lock
from prodserver_ops.management.commands import migrate

pytestmark = [
    pytest.mark.django_db(transaction=True, serialized_rollback=True),
    pytest.mark.skipif("connection.vendor != 'postgresql'"),
]


@pytest.fixture
def other(monkeypatch):
    """The lock of another process."""
    monkeypatch.setattr(migrate, "INTERVAL", 0.01)
    session = connection.copy()
    session.inc_thread_sharing()
    lock = get_lock("migrate", session)
    assert lock.acquire()
    yield lock
    session.close()


class Output(io.StringIO):
    """Calls a function when something is written for the first time."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def write(self, text):
        if not self.getvalue():
            self.function()
        return super().write(text)


def test_waits_for_another_process(other):
    output = Output(lambda: threading.Timer(0.2, other.release).start())
    call_command("migrate", stdout=output)
    assert output.getvalue().startswith("Another process is migrating: waiting for it.\n")
    assert "No migrations to apply" in output.getvalue()
    # The lock is free again.
    assert other.acquire()


def test_gives_up_after_some_time(other, monkeypatch):
    monkeypatch.setattr(migrate, "WAIT_SECONDS", 0)
    with pytest.raises(CommandError, match="migrating for too long"):
        call_command("migrate", stdout=io.StringIO())


def test_a_plan_waits_for_nobody(other):
    call_command("migrate", plan=True, stdout=io.StringIO())


@pytest.fixture
def backup(monkeypatch):
    """A session that reads a table, which a migration wants to lock, for some time."""
    monkeypatch.setattr(migrate, "LOCK_INTERVAL", 0.01)
    session = connection.copy()
    with session.cursor() as cursor:
        cursor.execute("BEGIN; LOCK TABLE django_migrations IN ACCESS SHARE MODE")

    def handle(command, *args, **options):
        with transaction.atomic(), connection.cursor() as cursor:
            cursor.execute("SET LOCAL lock_timeout = 10; LOCK TABLE django_migrations")

    monkeypatch.setattr("django.core.management.commands.migrate.Command.handle", handle)
    yield session
    session.close()


def test_table_that_a_backup_reads_is_tried_again(backup):
    output = Output(backup.close)
    call_command("migrate", stdout=output)
    assert "locked by another transaction, such as a backup" in output.getvalue()


def test_locked_table_is_an_error_after_some_time(backup, monkeypatch):
    monkeypatch.setattr(migrate, "WAIT_SECONDS", 0)
    with pytest.raises(OperationalError, match="lock timeout"):
        call_command("migrate", stdout=io.StringIO())
