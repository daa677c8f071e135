"""``python manage.py migrate``: Django's command, for one process at a time."""

import time
from typing import Any

from django.core.management import CommandError
from django.core.management.commands import migrate
from django.db import OperationalError, connections

from ...core.locks import get_lock

#: How long to wait for another process, and the time between two attempts, in seconds.
WAIT_SECONDS, INTERVAL = 900, 0.5

#: The time between two attempts to lock a table, in seconds. Queries wait behind each attempt.
LOCK_INTERVAL = 20

#: The SQLSTATE of a lock that was not available within the lock timeout.
LOCK_NOT_AVAILABLE = "55P03"


class Command(migrate.Command):
    """Apply migrations; wait while another process does so.

    Two deploys at once would both create the same tables, and one of them would fail.
    """

    def handle(self, *args: Any, **options: Any) -> None:
        """Wait for the lock, and run Django's command."""
        connection = connections[options["database"]]
        if connection.vendor != "postgresql" or options["plan"] or options["check_unapplied"]:
            super().handle(*args, **options)
            return
        # Migrations may close their connection, and the lock must outlive that.
        session = connection.copy()
        lock = get_lock("migrate", session)
        try:
            if not lock.acquire():
                self.stdout.write("Another process is migrating: waiting for it.")
                self.stdout.flush()
                deadline = time.monotonic() + WAIT_SECONDS
                while not lock.acquire():
                    if time.monotonic() > deadline:
                        raise CommandError("another process has been migrating for too long")
                    time.sleep(INTERVAL)
            self.migrate(*args, **options)
        finally:
            lock.release()  # Before the session, which the server ends a little later.
            session.close()

    def migrate(self, *args: Any, **options: Any) -> None:
        """Run Django's command; again while a table is locked, such as by a backup.

        A migration is one transaction, so nothing of one that failed is left.
        """
        deadline = time.monotonic() + WAIT_SECONDS
        while True:
            try:
                super().handle(*args, **options)
                return
            except OperationalError as error:
                state = getattr(error.__cause__, "sqlstate", None)
                if state != LOCK_NOT_AVAILABLE or time.monotonic() > deadline:
                    raise
                self.stdout.write(
                    "\nA table is locked by another transaction, such as a backup: trying again."
                )
                self.stdout.flush()
            time.sleep(LOCK_INTERVAL)
