"""``python manage.py adopt``: take over the database of an earlier service."""

from typing import Any

from django.core.management import call_command
from django.core.management.base import BaseCommand
from django.db import connection

from ...console import adoption


class Command(BaseCommand):
    """Apply all migrations to a database with the migration history of another service.

    Existing tables keep their rows, and get missing columns; the earlier service can still use
    them. Does nothing if the database already belongs to this service. docs/move.md describes how
    to move a service. Make a backup first.
    """

    help = "Take over the database of an earlier service; see docs/move.md."
    requires_system_checks = ()

    def handle(self, *args: Any, **options: Any) -> None:
        """Adopt the database."""
        problem = adoption.find_foreign_history(connection)
        if problem is None:
            self.stdout.write("Nothing to adopt: the database already belongs to this service")
            return
        self.stdout.write(adoption.PROBLEM.format(problem))
        for line in adoption.adopt(connection):
            self.stdout.write(line)
        # The handlers of post_migrate create content types and permissions.
        call_command("migrate", verbosity=0, interactive=False)
        self.stdout.write(f"permissions copied: {adoption.copy_permissions()}")
