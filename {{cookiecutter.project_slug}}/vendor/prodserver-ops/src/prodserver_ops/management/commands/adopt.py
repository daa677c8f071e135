"""``python manage.py adopt``: take over the database of an earlier service."""

from typing import Any

from django.core.management import call_command
from django.core.management.base import BaseCommand
from django.db import connection

from ...console import adoption


class Command(BaseCommand):
    """Apply all migrations to a database whose recorded migrations are another service's.

    A table that exists is kept with its rows, and gets the columns that it lacks; the earlier
    service can still use it. Does nothing if the database is this service's already.
    docs/move.md leads through a move. Make a backup first.
    """

    help = "Take over the database of an earlier service; see docs/move.md."
    requires_system_checks = ()

    def handle(self, *args: Any, **options: Any) -> None:
        """Adopt the database."""
        problem = adoption.find_foreign_history(connection)
        if problem is None:
            self.stdout.write("Nothing to adopt: the migrations are those of this service")
            return
        self.stdout.write(adoption.PROBLEM.format(problem))
        for line in adoption.adopt(connection):
            self.stdout.write(line)
        # What is left to do after migrations, such as content types and permissions.
        call_command("migrate", verbosity=0, interactive=False)
        self.stdout.write(f"permissions copied: {adoption.copy_permissions()}")
