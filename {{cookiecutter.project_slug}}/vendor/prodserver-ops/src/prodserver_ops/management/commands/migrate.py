"""``python manage.py migrate``: Django's command, for one process at a time."""

import time
from typing import Any

from django.core.management import CommandError
from django.core.management.commands import migrate
from django.db import connections

from ...core.locks import get_lock

#: How long to wait for another process, and the time between two attempts, in seconds.
WAIT_SECONDS, INTERVAL = 900, 0.5


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
            super().handle(*args, **options)
        finally:
            lock.release()  # Before the session, which the server ends a little later.
            session.close()
