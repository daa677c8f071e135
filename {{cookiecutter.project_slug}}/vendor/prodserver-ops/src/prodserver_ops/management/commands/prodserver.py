"""``python manage.py prodserver PROCESS``: run one process of the service."""

import os
import signal
import sys
import tempfile
from argparse import ArgumentParser
from contextlib import suppress
from typing import Any

from django.conf import settings
from django.core.management import CommandError
from django.core.management.base import OutputWrapper
from django.utils.module_loading import import_string
from django_prodserver.backends.base import (
    BaseProcessBackend,
    BaseServerBackend,
    BaseWorkerBackend,
)
from django_prodserver.management.base import BaseProcessCommand

from ...conf.verification import verify_module
from ...core import logs
from ...core.database import find_pooler
from ...heartbeat import MEMORY
from ...scheduling import heartbeats
from ...web.servers import warn_about_static_files

#: The commands for one kind of process, each with the base class of its backends.
COMMANDS = {"server": BaseServerBackend, "worker": BaseWorkerBackend}


class Output(OutputWrapper):
    """The output of a process, which starts also if the disk of its log is full."""

    def write(self, *args: Any, **kwargs: Any) -> None:  # type: ignore[override]
        """Write, if possible."""
        with suppress(OSError):
            super().write(*args, **kwargs)


class Command(BaseProcessCommand):
    """Run the web, worker or beat process in the foreground, until SIGTERM.

    The setting ``PRODUCTION_PROCESSES`` defines the processes. Exits with status 1 if the name is
    missing or unknown. The commands ``server`` and ``worker`` run only processes whose backend is
    a subclass of ``backend_base_class``.
    """

    help = "Run one process of the service in the foreground, until SIGTERM."

    def add_arguments(self, parser: ArgumentParser) -> None:
        """Add the name of the process, ``--reload`` and ``--list``."""
        processes = ", ".join(self.get_process_names())
        parser.add_argument(
            "process_name", metavar="process", nargs="?", help=f"One of: {processes}."
        )
        parser.add_argument(
            "--reload", action="store_true", help="Restart when code changes, for development."
        )
        parser.add_argument("--list", action="store_true", help="List the processes, and exit.")

    def list_process_names(self) -> None:
        """Print the names of the processes, one on each line."""
        for name in self.get_process_names():
            self.stdout.write(name)

    def get_process_names(self) -> list[str]:
        """Return the names of the processes that this command runs."""
        processes = settings.PRODUCTION_PROCESSES.items()
        return [name for name, process in processes if self.find_other_command(process) is None]

    def find_other_command(self, process: dict[str, Any]) -> str | None:
        """Return the command that runs this kind of process, or None if this command does."""
        if self.backend_base_class is BaseProcessBackend:
            return None
        try:
            backend = import_string(process["BACKEND"])
            return next(
                command
                for command, base in COMMANDS.items()
                if issubclass(backend, base) and base is not self.backend_base_class
            )
        except (KeyError, ImportError, TypeError, StopIteration):
            # ``check`` reports an invalid backend.
            return None

    def start_process(self, process_name: str, *args: Any, **options: Any) -> None:
        """Run the process; raise CommandError if it cannot start."""
        if process_name not in settings.PRODUCTION_PROCESSES:
            processes = ", ".join(self.get_process_names())
            problem = f"unknown process {process_name!r}" if process_name else "no process name"
            raise CommandError(f"{problem}; the processes are: {processes}")
        if other := self.find_other_command(settings.PRODUCTION_PROCESSES[process_name]):
            raise CommandError(
                f"{process_name!r} is not a {self.process_label} process; "
                f"run: python manage.py {other} {process_name}"
            )
        if options.get("reload"):
            from ...development.reloading import Supervisor

            Supervisor(process_name, self.print_line).run()
            return
        verify_module()
        use_memory()
        if pooler := find_pooler():
            raise CommandError(pooler)
        # Some servers also read the command line, and would fail on Django's options.
        sys.argv[1:] = ["prodserver", process_name]
        logs.configure(process_name)
        self.stdout = Output(sys.stdout)
        if process_name == "web":
            warn_about_static_files()
        if process_name in heartbeats.get_others():
            heartbeats.start_heartbeat(process_name)
            if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
                signal.signal(signal.SIGTERM, lambda *_: sys.exit())
        super().start_process(process_name, **options)

    def print_line(self, text: str) -> None:
        """Print a line, also if the output is a pipe."""
        self.stdout.write(text)
        self.stdout.flush()


def use_memory() -> None:
    """Keep temporary files in memory if no disk can be written: servers need some to start."""
    try:
        tempfile.gettempdir()
    except FileNotFoundError:
        os.environ["TMPDIR"] = MEMORY
