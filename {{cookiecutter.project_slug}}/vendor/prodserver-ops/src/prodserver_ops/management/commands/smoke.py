"""``python manage.py smoke``: start all processes of the service, and check that they work."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from argparse import ArgumentParser
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import IO, Any

from django.conf import settings
from django.core.management import CommandError
from django.core.management.base import BaseCommand
from django.utils.module_loading import import_string
from django_celery_beat.models import IntervalSchedule, PeriodicTask
from django_prodserver.backends.base import BaseWorkerBackend as Worker

from ...core.commands import get_script
from ...models import Heartbeat, ScheduleRun
from ...scheduling import heartbeats

#: The lines of a process's output that are shown if it fails.
SHOWN_LINES = 20


class Command(BaseCommand):
    """Start all processes of ``PRODUCTION_PROCESSES`` and stop them again.

    In between, web must become ready, the others must record heartbeats, and a temporary schedule
    must be dispatched and run, if there are a worker and beat. If this takes too long or a process fails, prints the
    output of that process, and exits with status 1.
    """

    help = "Start all processes, wait until a worker has run a schedule, and stop them."

    def add_arguments(self, parser: ArgumentParser) -> None:
        """Add the time limit."""
        parser.add_argument(
            "--timeout",
            type=int,
            default=60,
            metavar="SECONDS",
            help="Time limit for the processes to be ready, and then to stop; 60 by default.",
        )

    def handle(self, *args: Any, **options: Any) -> None:
        """Run the processes; raise CommandError if one does not work."""
        start, timeout = time.monotonic(), options["timeout"]
        # SIGTERM ends this command as Ctrl-C does, with its processes.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        # Without these, nothing runs a schedule.
        runs = heartbeats.get_beats() and heartbeats.get_workers()
        create = temporary_schedule if runs else nullcontext
        with tempfile.TemporaryDirectory() as folder, create() as schedule:
            processes = Processes(folder)
            try:
                processes.wait_until_ready(schedule, start + timeout)
                ready = time.monotonic() - start
                processes.stop(timeout)
            finally:
                processes.kill()
        names = ", ".join(settings.PRODUCTION_PROCESSES)
        self.stdout.write(
            f"{names}: ready{', and a schedule was run,' if runs else ''} after {ready:.1f} seconds;"
            f" stopped after {time.monotonic() - start - ready:.1f} more"
        )


@contextmanager
def temporary_schedule() -> Any:
    """Yield a schedule that is due every second, and delete it afterwards."""
    interval, _ = IntervalSchedule.objects.get_or_create(every=1, period="seconds")
    schedule = PeriodicTask.objects.create(
        name=f"smoke-{os.getpid()}", task="ops.delete_records", interval=interval
    )
    try:
        yield schedule
    finally:
        schedule.delete()


def find_free_port() -> int:
    """Return a port that no process uses."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


class Processes:
    """The processes, with their output in files."""

    def __init__(self, folder: str) -> None:
        self.urls: dict[str, str] = {}
        environment = os.environ | {"PYTHONUNBUFFERED": "1"}
        for name, process in settings.PRODUCTION_PROCESSES.items():
            backend = import_string(process["BACKEND"])
            if not issubclass(backend, Worker):
                port = find_free_port()
                path = getattr(backend, "HEALTH_PATH", "/health/ready")
                self.urls[name] = f"http://127.0.0.1:{port}{path}"
                environment[getattr(backend, "PORT_VARIABLE", "PORT")] = str(port)
        self.running: dict[str, tuple[subprocess.Popen[bytes], IO[bytes]]] = {}
        for name in settings.PRODUCTION_PROCESSES:
            output = open(os.path.join(folder, name), "w+b")  # noqa: SIM115
            script = get_script()
            command = [sys.executable, script, "prodserver", name]
            process = subprocess.Popen(
                command,
                cwd=os.path.dirname(script),
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                # Ctrl-C reaches this command alone.
                start_new_session=True,
            )
            self.running[name] = process, output

    def wait_until_ready(self, schedule: PeriodicTask | None, deadline: float) -> None:
        """Wait until all processes work; raise CommandError after the deadline."""
        waiting: dict[str, Callable[[], bool]]
        waiting = {name: partial(self.is_ready, name) for name in self.running}
        if schedule is not None:
            runs = ScheduleRun.objects.filter(schedule=schedule).exclude(started_at=None)
            waiting["the run of a schedule"] = runs.exists
        while waiting:
            waiting = {name: check for name, check in waiting.items() if not check()}
            for name, (process, _) in self.running.items():
                if process.poll() is not None:
                    raise self.get_error(name, f"ended with status {process.returncode}")
            if waiting and time.monotonic() > deadline:
                shown = next(iter([*waiting.keys() & self.running.keys(), *self.running]))
                raise self.get_error(shown, f"still waiting for {', '.join(waiting)}")
            time.sleep(0.1)

    def is_ready(self, name: str) -> bool:
        """Return whether a worker or beat recorded a heartbeat, or a server is ready."""
        if name not in self.urls:
            pid = self.running[name][0].pid
            return Heartbeat.objects.filter(host=socket.gethostname(), pid=pid).exists()
        try:
            with urllib.request.urlopen(self.urls[name], timeout=10):
                return True
        except OSError:
            return False

    def stop(self, timeout: int) -> None:
        """Stop all processes; raise CommandError if one does not stop or ends with an error."""
        for process, _ in self.running.values():
            process.terminate()
        for name, (process, _) in self.running.items():
            try:
                status = process.wait(timeout)
            except subprocess.TimeoutExpired:
                raise self.get_error(name, f"did not stop in {timeout} seconds") from None
            if status:
                raise self.get_error(name, f"ended with status {status} when it was stopped")

    def kill(self) -> None:
        """Kill the processes that are still running, with their child processes."""
        for process, output in self.running.values():
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            output.close()

    def get_error(self, name: str, problem: str) -> CommandError:
        """Return an error with the last lines of a process's output."""
        output = self.running[name][1]
        output.seek(0)
        lines = output.read().decode(errors="replace").splitlines()[-SHOWN_LINES:]
        return CommandError("\n  ".join([f"{name}: {problem}", *lines]))
