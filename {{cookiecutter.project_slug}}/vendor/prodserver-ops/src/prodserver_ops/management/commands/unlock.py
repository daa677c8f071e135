"""``python manage.py unlock``: allow logins again after too many failures."""

from argparse import ArgumentParser
from typing import Any

from django.core.management.base import BaseCommand

from ...web import logins


class Command(BaseCommand):
    """Forget the failed logins of user names and addresses."""

    help = "Forget failed logins, so that these user names and addresses can log in again."

    def add_arguments(self, parser: ArgumentParser) -> None:
        """Add the names and addresses."""
        parser.add_argument(
            "names", metavar="NAME", nargs="+", help="A user name or an IP address."
        )

    def handle(self, *args: Any, **options: Any) -> None:
        """Forget the failures, and print how many there were."""
        for name in options["names"]:
            count = logins.unlock(name)
            self.stdout.write(f"{name}: {count} failed logins forgotten")
