"""``python manage.py add``: write the code of a new app, task, schedule, digest or process."""

from argparse import ArgumentParser
from typing import Any

from django.core.management import CommandError
from django.core.management.base import BaseCommand

from ...console import additions

#: What can be added, and what is written for it.
KINDS = {
    "app": "an app next to the package of the service, in INSTALLED_APPS",
    "task": "a task in tasks.py",
    "schedule": "a task in tasks.py, and a migration that runs it daily",
    "digest": "a weekly digest with its templates, its task and the migration of its schedule",
    "process": "a process that runs a new management command",
}


class Command(BaseCommand):
    """Write the code of a new part of the service, with a test that passes.

    Names are Python identifiers in lower case. Nothing is written if a file or name exists already,
    or if a file cannot be changed safely; the command then exits with status 1 and one line.
    """

    help = "Write the code of a new part of the service, with its test: " + "; ".join(
        f"{kind}: {text}" for kind, text in KINDS.items()
    )

    # The service may be incomplete while it is written.
    requires_system_checks = ()

    def add_arguments(self, parser: ArgumentParser) -> None:
        """Add the kind, the name and the options."""
        parser.add_argument("kind", choices=KINDS, metavar="KIND", help=", ".join(KINDS))
        parser.add_argument("name", metavar="NAME", help="Its name, such as clear_sessions.")
        parser.add_argument(
            "--app", metavar="LABEL", help="The app to add it to; default: that of the service."
        )
        parser.add_argument(
            "--crontab", metavar="FIELDS", help='When a schedule runs, such as "0 3 * * *".'
        )

    def handle(self, *args: Any, **options: Any) -> None:
        """Write the files, and print their names and the next command."""
        kind, name = options["kind"], options["name"]
        files = additions.Files()
        try:
            additions.check_name(name)
            self.collect(files, kind, name, options)
        except additions.Refused as error:
            raise CommandError(str(error)) from error
        for line in [*files.write(), *files.notes]:
            self.stdout.write(line)
        follow = "migrate && uv run manage.py ci" if kind in ("schedule", "digest") else "ci"
        self.stdout.write(f"Next: uv run manage.py {follow}")

    def collect(self, files: additions.Files, kind: str, name: str, options: Any) -> None:
        """Collect the files of the new part. Raises Refused if that is not possible."""
        label, crontab = options["app"], options["crontab"]
        if crontab and kind not in ("schedule", "digest"):
            raise additions.Refused("--crontab is only for a schedule or a digest")
        if kind == "app":
            if label:
                raise additions.Refused("--app is not for an app")
            additions.add_app(files, name)
            return
        app = additions.get_app(label)
        if kind == "task":
            additions.add_task(files, app, name)
        elif kind == "schedule":
            additions.add_schedule(files, app, name, crontab)
        elif kind == "digest":
            additions.add_digest(files, app, name, crontab)
        else:
            additions.add_process(files, app, name)
