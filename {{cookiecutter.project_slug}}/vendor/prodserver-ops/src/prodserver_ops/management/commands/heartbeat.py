"""``python manage.py heartbeat PROCESS``: report whether a worker or beat of this host works."""

import socket
import sys
from argparse import ArgumentParser
from typing import Any

from django.core.management.base import BaseCommand

from ...models import HEARTBEAT_AGE
from ...scheduling import heartbeats


class Command(BaseCommand):
    """Exit with status 0 if a process of this host recorded a heartbeat lately, else with 1.

    Health checks of containers run it.
    """

    help = "Exit with status 0 if a worker or beat of this host is at work, otherwise with 1."
    requires_system_checks = ()

    def add_arguments(self, parser: ArgumentParser) -> None:
        """Add the name of the process."""
        parser.add_argument("process", choices=heartbeats.get_processes())

    def handle(self, *args: Any, **options: Any) -> None:
        """Print the age of the newest heartbeat, and exit."""
        process, host = options["process"], socket.gethostname()
        ages = heartbeats.get_ages(process, host)
        if not ages:
            self.stdout.write(f"{process} on {host}: no heartbeat")
            sys.exit(1)
        self.stdout.write(f"{process} on {host}: heartbeat {ages[0]} seconds ago")
        if ages[0] >= HEARTBEAT_AGE:
            sys.exit(1)
