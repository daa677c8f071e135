"""``python manage.py prodserver PROCESS``: run one process of the service."""

import sys

from django.conf import settings
from django.core.management import CommandError
from django.core.management.base import OutputWrapper
from django_prodserver.management.base import BaseProcessCommand

from ... import logs


class Command(BaseProcessCommand):
    """Run the web, worker or beat process in the foreground, until SIGTERM.

    The processes are those of the setting ``PRODUCTION_PROCESSES``. A missing or
    unknown name ends with exit status 1.
    """

    help = "Run one process of the service in the foreground, until SIGTERM."

    def add_arguments(self, parser):
        processes = ", ".join(settings.PRODUCTION_PROCESSES)
        parser.add_argument(
            "process_name", metavar="process", nargs="?", help=f"One of: {processes}."
        )
        parser.add_argument("--list", action="store_true", help="List the processes, and exit.")

    def list_process_names(self):
        for name in settings.PRODUCTION_PROCESSES:
            self.stdout.write(name)

    def start_process(self, process_name, **options):
        if process_name not in settings.PRODUCTION_PROCESSES:
            processes = ", ".join(settings.PRODUCTION_PROCESSES)
            problem = f"unknown process {process_name!r}" if process_name else "no process named"
            raise CommandError(f"{problem}; the processes are: {processes}")
        # gunicorn reads the command line too: leave no option of Django's on it.
        sys.argv[1:] = ["prodserver", process_name]
        logs.start(process_name)
        self.stdout = OutputWrapper(sys.stdout)
        if process_name == "web" and settings.DEBUG:
            self.stdout.write(f"Open http://127.0.0.1:{settings.PORT}/")
        super().start_process(process_name, **options)
