"""``python manage.py prodserver PROCESS``: run one process of the service."""

import errno
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
from argparse import ArgumentParser
from pathlib import Path
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
from ...core.commands import get_script
from ...core.database import find_pooler
from ...scheduling import heartbeats
from ...web.servers import port_in_use

try:
    import watchfiles
except ImportError:
    watchfiles = None  # type: ignore[assignment]

#: How long a process may take to stop before a reload kills it, in seconds.
STOP_TIMEOUT = 10

#: How often to check whether the parent process is running, in seconds.
PARENT_INTERVAL = 0.5

#: The commands for one kind of process, each with the base class of its backends.
COMMANDS = {"server": BaseServerBackend, "worker": BaseWorkerBackend}


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
            self.run_with_reload(process_name)
            return
        verify_module()
        if pooler := find_pooler():
            raise CommandError(pooler)
        # Some servers also read the command line, and would fail on Django's options.
        sys.argv[1:] = ["prodserver", process_name]
        logs.configure(process_name)
        self.stdout = OutputWrapper(sys.stdout)
        if process_name == "web" and settings.DEBUG:
            self.stdout.write(f"Open http://127.0.0.1:{settings.PORT}/")
        if process_name in heartbeats.get_others():
            heartbeats.start_heartbeat(process_name)
            if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
                signal.signal(signal.SIGTERM, lambda *_: sys.exit())
        super().start_process(process_name, **options)

    def run_with_reload(self, name: str) -> None:
        """Run the process, and restart it when a file in a Python package changes."""
        if watchfiles is None:
            raise CommandError("--reload needs the package watchfiles, a development dependency")
        process = settings.PRODUCTION_PROCESSES[name]
        check_port(process)
        # A worker completes its running tasks first. run_process() of watchfiles cannot
        # wait that long when it stops, sends SIGINT twice to a foreground process, and
        # ignores packages that are added later.
        is_worker = issubclass(import_string(process["BACKEND"]), BaseWorkerBackend)
        timeout = STOP_TIMEOUT + (settings.CELERY_TASK_TIME_LIMIT if is_worker else 0)
        logging.getLogger("watchfiles").setLevel(logging.WARNING)
        stopped = threading.Event()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, lambda *_: stopped.set())
        threading.Thread(target=wait_for_parent, args=[stopped], daemon=True).start()
        while not stopped.is_set():
            command = [sys.executable, get_script(), "prodserver", name]
            child = subprocess.Popen(command)
            changes = next(watchfiles.watch(*get_packages(), stop_event=stopped), set())
            if changes:
                path = os.path.relpath(min(path for _, path in changes), settings.BASE_DIR)
                self.stdout.write(f"{path} changed: restarting {name}")
                self.stdout.flush()
            stop(child, timeout)


def get_packages() -> list[Path]:
    """Return the folders of the Python packages next to ``manage.py``."""
    return [path.parent for path in Path(settings.BASE_DIR).glob("*/__init__.py")]


def wait_for_parent(stopped: threading.Event) -> None:
    """Set the event when the parent process ends, as honcho does with its terminal."""
    parent = os.getppid()
    while os.getppid() == parent and not stopped.wait(PARENT_INTERVAL):
        pass
    stopped.set()


def stop(child: subprocess.Popen[bytes], timeout: float) -> None:
    """Stop a process with SIGTERM, and with SIGKILL after the timeout in seconds."""
    child.terminate()
    try:
        child.wait(timeout)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()


def check_port(process: dict[str, Any]) -> None:
    """Raise CommandError if another process uses the port of a web process."""
    backend = import_string(process["BACKEND"])
    address = backend(**process).get_address() if hasattr(backend, "get_address") else None
    if address is None:
        return
    family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
    with socket.socket(family) as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            server.bind(address)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise CommandError(f"cannot listen on port {address[1]}: {error}") from error
            raise port_in_use(address[1]) from error
