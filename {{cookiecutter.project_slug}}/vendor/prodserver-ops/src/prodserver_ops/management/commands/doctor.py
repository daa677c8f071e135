"""``python manage.py doctor``: check each part of the service."""

import json
import logging
import sys
from datetime import datetime
from typing import Any

from django.core.management import BaseCommand, CommandParser

from ...console.doctor import OK, Result, run_all


class Command(BaseCommand):
    """Check settings, database, migrations, broker, worker, beat, schedules and e-mail.

    Prints a line for each part, the next run of each schedule, and the next command for
    each problem. Exits with status 1 if there is a problem. It changes nothing.
    """

    help = "Check each part of the service, and show the next command for each problem."
    requires_system_checks = ()

    def add_arguments(self, parser: CommandParser) -> None:
        """Add ``--json``."""
        parser.add_argument("--json", action="store_true", help="Print the report as JSON.")

    def handle(self, *args: Any, **options: Any) -> None:
        """Run the checks and print their results."""
        logging.disable()
        try:
            results = run_all()
        finally:
            logging.disable(logging.NOTSET)
        passed = all(result.status == OK for result in results.values())
        if options["json"]:
            self.write_json(results, passed)
        else:
            for name, result in results.items():
                self.write_lines(name, result)
        if not passed:
            sys.exit(1)

    def write_json(self, results: dict[str, Result], passed: bool) -> None:
        """Print all results as JSON."""
        report = {
            "ok": passed,
            "checks": {
                name: {"status": result.status, "message": result.message, "next": result.next}
                for name, result in results.items()
            },
            "schedules": results["schedules"].schedules,
        }
        self.stdout.write(json.dumps(report, indent=2, default=datetime.isoformat))

    def write_lines(self, name: str, result: Result) -> None:
        """Print a result as text."""
        style = self.style.SUCCESS if result.status == OK else self.style.ERROR
        self.stdout.write(f"{name:11} {style(f'{result.status:8}')} {result.message}")
        for schedule in result.schedules:
            when = schedule["problem"] or f"{schedule['next_run']:%a %d %b %H:%M:%S}"
            self.stdout.write(f"{'':20} {schedule['name']}: {when}")
            self.write_next(schedule["next"])
        self.write_next(result.next)

    def write_next(self, command: str | None) -> None:
        """Print the command to run next, if there is one."""
        if command:
            self.stdout.write(f"{'':11} {'run':8} {command}")
