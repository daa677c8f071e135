"""``python manage.py adopt``: take over the database of an earlier service."""

from contextlib import nullcontext
from typing import Any

from django.core.management import CommandError, call_command
from django.core.management.base import BaseCommand
from django.db import DatabaseError, NotSupportedError, connection, transaction

from ...console import adoption


class Command(BaseCommand):
    """Apply all migrations to a database with the migration history of another service.

    Existing tables keep their rows, and get missing columns; the earlier service can still use
    them. Migrations that are recorded as applied are not repeated. All of it is one transaction: if
    something fails, the database is as it was. Does nothing if the database already belongs to this
    service. Lists code that imports ``auth.User`` although users are of another
    model, and schedules whose queue no worker consumes. docs/move.md
    describes how to move a service. Make a backup first.
    """

    help = "Take over the database of an earlier service; see docs/move.md."
    requires_system_checks = ()

    def handle(self, *args: Any, **options: Any) -> None:
        """Adopt the database."""
        for line in adoption.find_user_imports():
            self.stdout.write(f"warning: {line}")
        problem = adoption.find_foreign_history(connection)
        if problem is None:
            self.stdout.write("Nothing to adopt: the database already belongs to this service")
            return
        self.stdout.write(adoption.PROBLEM.format(problem))
        try:
            # SQLite does not change tables in a transaction. If it fails there, run it again.
            with transaction.atomic() if connection.vendor == "postgresql" else nullcontext():
                for line in adoption.adopt(connection):
                    self.stdout.write(line)
                # The handlers of post_migrate create content types and permissions.
                call_command("migrate", verbosity=0, interactive=False)
                self.stdout.write(f"permissions copied: {adoption.copy_permissions()}")
        except (DatabaseError, NotSupportedError, ValueError, LookupError) as error:
            raise CommandError(
                f"{type(error).__name__}: {str(error).strip()}\nNothing is adopted: PostgreSQL has "
                "undone all changes. Repair the migration, and run adopt again"
            ) from error
        if problem := adoption.find_foreign_history(connection):
            raise CommandError(adoption.PROBLEM.format(problem))
        for line in adoption.find_unconsumed_schedules():
            self.stdout.write(f"warning: {line}")
