"""``python manage.py heartbeat PROCESS``: report whether a worker or beat runs on this host."""

import socket
import sys
from argparse import ArgumentParser
from typing import Any

from django.core.management.base import BaseCommand

from ...models import HEARTBEAT_AGE
from ...scheduling import heartbeats


class Command(BaseCommand):
    """Exit with status 0 if a process on this host has a recent heartbeat, otherwise with 1.

    Use it as the health check of a container.
    """

    help = "Exit with status 0 if a worker or beat is running on this host, otherwise with 1."
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
