"""``python manage.py doctor``: whether each part of the service is well, and what to run if not."""

import json
import logging
import sys
from datetime import datetime

from django.core.management import BaseCommand

from ...doctor import OK, examine


class Command(BaseCommand):
    """Look at database, migrations, broker, worker, beat, schedules and e-mail.

    Prints a line for each, the next run of each schedule, and the command to run next
    for what is not well; ends with exit status 1 if anything is not. It changes nothing.
    """

    help = "Tell whether each part of the service is well, and what to run if not."
    requires_system_checks = ()

    def add_arguments(self, parser):
        parser.add_argument("--json", action="store_true", help="Print the same as JSON.")

    def handle(self, *args, **options):
        logging.disable()
        try:
            found = examine()
        finally:
            logging.disable(logging.NOTSET)
        well = all(finding.status == OK for finding in found.values())
        if options["json"]:
            self.write_json(found, well)
        else:
            for name, finding in found.items():
                self.write_lines(name, finding)
        if not well:
            sys.exit(1)

    def write_json(self, found, well):
        report = {
            "ok": well,
            "checks": {
                name: {"status": each.status, "message": each.message, "next": each.next}
                for name, each in found.items()
            },
            "schedules": found["schedules"].schedules,
        }
        self.stdout.write(json.dumps(report, indent=2, default=datetime.isoformat))

    def write_lines(self, name, finding):
        style = self.style.SUCCESS if finding.status == OK else self.style.ERROR
        self.stdout.write(f"{name:11} {style(f'{finding.status:8}')} {finding.message}")
        for schedule in finding.schedules:
            when = schedule["problem"] or f"{schedule['next_run']:%a %d %b %H:%M:%S}"
            self.stdout.write(f"{'':20} {schedule['name']}: {when}")
            self.write_next(schedule["next"])
        self.write_next(finding.next)

    def write_next(self, command):
        if command:
            self.stdout.write(f"{'':11} {'run':8} {command}")
