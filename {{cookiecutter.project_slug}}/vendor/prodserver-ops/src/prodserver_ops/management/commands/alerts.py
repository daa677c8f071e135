"""``python manage.py alerts``: list open alerts, or send a test alert."""

from argparse import ArgumentParser
from typing import Any

from django.core.management.base import BaseCommand, CommandError

from ...console import alerts
from ...console.problems import show


class Command(BaseCommand):
    """List the problems that administrators are told of, and whom they reach.

    ``--test`` sends a test alert. Exits with status 1 if alerts are off, or if the test fails.
    """

    help = "List open alerts; --test sends a test alert to the administrators."

    def add_arguments(self, parser: ArgumentParser) -> None:
        """Add ``--test``."""
        parser.add_argument("--test", action="store_true", help="Send a test alert.")

    def handle(self, *args: Any, **options: Any) -> None:
        """List alerts, or send one."""
        if reason := alerts.why_off():
            raise CommandError(f"Alerts are off: {reason}")
        if options["test"]:
            return self.send_test()
        for alert in alerts.get_open():
            self.stdout.write(f"{show(alert.since)}  {alert}")
        targets = [target for target, _ in alerts.get_channels().values()]
        self.stdout.write(f"Alerts go to {'; '.join(targets) or alerts.NOBODY}")

    def send_test(self) -> None:
        """Send a test alert, and say to whom."""
        errors = alerts.send_test()
        for target, error in errors.items():
            self.stdout.write(f"{target}: {alerts.describe(error) if error else 'sent'}")
        if any(errors.values()) or not errors:
            raise CommandError(f"Not sent{'' if errors else f', it goes to {alerts.NOBODY}'}")
