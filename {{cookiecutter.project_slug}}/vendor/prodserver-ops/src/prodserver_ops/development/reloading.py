"""``prodserver PROCESS --reload``: restart a process when code changes that it imports.

Templates and static files need no restart. While a process cannot start, its error is shown by the
home page, and by the web server that takes the place of web.
"""

import errno
import logging
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from contextlib import suppress
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

from django.conf import settings
from django.core.management import CommandError
from django.db import connections
from django.utils.module_loading import import_string
from django_prodserver.backends.base import BaseWorkerBackend

from ..core.commands import get_line, get_script
from ..core.mistakes import get_family, serve
from ..web.servers import port_in_use
from . import imports, overview
from .imports import get_packages

try:
    import watchfiles
except ImportError:
    watchfiles = None  # type: ignore[assignment]

#: How long a process may take to stop before a reload kills it, in seconds.
STOP_TIMEOUT = 10

#: How often to check whether the parent process is running, in seconds.
PARENT_INTERVAL = 0.5

#: How often to check whether the process is running, in milliseconds.
CHILD_INTERVAL = 500

#: How much lower the priority of a process is than that of web, which a browser waits for.
NICENESS = 5

#: How often to look for unapplied migrations and for the other processes, in seconds.
INTERVAL = 1

#: How long to wait for the other processes before the addresses are printed, in seconds.
START_TIMEOUT = 30

#: After what time an incomplete line of the output is shown, in seconds.
PROMPT_DELAY = 0.3

#: How many lines of the output of a process are kept.
KEPT_LINES = 200

#: Where to connect to a server that listens on all addresses.
ANY_HOST = {"0.0.0.0": "127.0.0.1", "::": "::1"}


def find_files() -> set[str]:
    """Return the paths of all Python files of the service."""
    return {str(path) for folder in get_packages() for path in folder.rglob("*.py")}


def get_failure_path(name: str) -> Path:
    """Return the path of the file with the output of a process that could not start."""
    return Path(settings.VAR_DIR, "failures", f"{name}.txt")


def get_failure(name: str) -> str:
    """Return the traceback of a process that could not start, or an empty string."""
    try:
        return get_failure_path(name).read_text()
    except OSError:
        return ""


def find_traceback(lines: list[str]) -> str:
    """Return the lines from the first traceback on; all lines if there is none."""
    starts = [number for number, line in enumerate(lines) if "Traceback (most rec" in line]
    return "".join(lines[starts[0] if starts else 0 :])


def get_command(name: str) -> list[str]:
    """Return the command that runs a process without reloads."""
    return [sys.executable, get_script(), "prodserver", name]


class Child:
    """The process itself. Its output is printed at once, and the end of it is kept."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.files = find_files()
        self.imports = Path(settings.VAR_DIR, "imports", f"{name}-{os.getpid()}.txt")
        self.lines: deque[str] = deque(maxlen=KEPT_LINES)
        with suppress(OSError):
            self.imports.parent.mkdir(parents=True, exist_ok=True)
            self.imports.unlink(missing_ok=True)
        self.popen = subprocess.Popen(
            get_command(name),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONUNBUFFERED": "1", imports.VARIABLE: str(self.imports)},
        )
        if name != "web":
            priority = os.getpriority(os.PRIO_PROCESS, self.popen.pid) + NICENESS
            os.setpriority(os.PRIO_PROCESS, self.popen.pid, priority)
        assert self.popen.stdout is not None
        self.output = self.popen.stdout
        self.reader = threading.Thread(target=self.copy_output, daemon=True)
        self.reader.start()

    def copy_output(self) -> None:
        """Copy the output of the process to the terminal, until it ends."""
        rest = b""
        while True:
            # honcho shows only whole lines, but a debugger waits at its prompt.
            wait = PROMPT_DELAY if rest and not sys.stdout.isatty() else None
            is_ready = select.select([self.output], [], [], wait)[0]
            data = os.read(self.output.fileno(), 65536) if is_ready else b"\n"
            if not data:
                return
            sys.stdout.buffer.write(data)
            sys.stdout.buffer.flush()
            *lines, rest = (rest + data).split(b"\n")
            self.lines.extend(line.decode(errors="replace") + "\n" for line in lines)

    def may_use(self, path: str) -> bool:
        """Return whether the process may have imported the old code of a file, or look for a new one."""
        if self.has_ended() or path not in self.files or "migrations" in Path(path).parts:
            return True
        try:
            names = self.imports.read_text().splitlines()
        except OSError:
            return True  # It is starting.
        return imports.get_name(path) in names

    def has_ended(self) -> bool:
        """Return whether the process has ended by itself."""
        return self.popen.poll() is not None

    def get_output(self) -> str:
        """Return the traceback that the process has printed, after it has ended."""
        self.reader.join(INTERVAL)
        return find_traceback(list(self.lines))

    def stop(self, timeout: float) -> None:
        """Stop the process with SIGTERM, and with SIGKILL after the timeout in seconds."""
        self.popen.terminate()
        try:
            self.popen.wait(timeout)
        except subprocess.TimeoutExpired:
            self.popen.kill()
            self.popen.wait()
        self.imports.unlink(missing_ok=True)
        self.reader.join(INTERVAL)  # Its own children may keep the pipe open.
        if not self.reader.is_alive():
            self.output.close()


class Supervisor:
    """Runs a process, and restarts it when code changes that it imports; ``write`` prints a line."""

    def __init__(self, name: str, write: Any) -> None:
        if watchfiles is None:
            raise CommandError("--reload needs the package watchfiles, a development dependency")
        self.name, self.write = name, write
        process = settings.PRODUCTION_PROCESSES[name]
        backend = import_string(process["BACKEND"])
        self.address = get_address(process)
        check_port(self.address)
        # A worker completes its running tasks first. run_process() of watchfiles cannot
        # wait that long when it stops, sends SIGINT twice to a foreground process, and
        # ignores packages that are added later.
        self.is_worker = issubclass(backend, BaseWorkerBackend)
        self.timeout = STOP_TIMEOUT + (settings.CELERY_TASK_TIME_LIMIT if self.is_worker else 0)
        self.stopped = threading.Event()

    def run(self) -> None:
        """Run the process until SIGTERM, SIGINT or the end of the parent process."""
        logging.getLogger("watchfiles").setLevel(logging.WARNING)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, lambda *_: self.stopped.set())
        threading.Thread(target=wait_for_parent, args=[self.stopped], daemon=True).start()
        if self.name == "web":
            threading.Thread(target=self.announce, daemon=True).start()
        self.write(f"Loading {self.name}")
        changes = {"migrations/"}
        while not self.stopped.is_set():
            if any("migrations" in Path(path).parts for path in changes):
                self.wait_for_migrations()
            get_failure_path(self.name).unlink(missing_ok=True)
            child = Child(self.name)
            if changes := self.watch(child):
                path = os.path.relpath(min(changes), settings.BASE_DIR)
                self.write(f"{path} changed: restarting {self.name}")
            child.stop(self.timeout)
        get_failure_path(self.name).unlink(missing_ok=True)

    def watch(self, child: Child) -> set[str]:
        """Return the paths that make a restart necessary; an empty set if the process has to stop."""
        server = None
        try:
            for changes in watchfiles.watch(
                *get_packages(),
                watch_filter=watchfiles.PythonFilter(),
                stop_event=self.stopped,
                rust_timeout=CHILD_INTERVAL,
                yield_on_timeout=True,
            ):
                if paths := {path for _, path in changes if child.may_use(path)}:
                    return paths
                if server is None and child.has_ended() and not self.stopped.is_set():
                    server = self.report(child)
            return set()
        finally:
            if server is not None:
                server.shutdown()
                server.server_close()

    def report(self, child: Child) -> ThreadingHTTPServer | None:
        """Store the output of a process that has ended; return a server that shows it."""
        output = child.get_output()
        self.write(f"{self.name} has ended; it starts again when you save a Python file")
        path = get_failure_path(self.name)
        with suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(output)
        if self.address is None or not settings.DEBUG:
            return None
        return serve(self.address, self.name, output)

    def wait_for_migrations(self) -> None:
        """Say if migrations are not applied; a worker or beat waits until they are."""
        waits = False
        while not self.stopped.wait(INTERVAL if waits else 0):
            count = count_unapplied()
            if not count:
                return
            if not waits:
                then = f"; {self.name} starts after that" if self.is_worker else ""
                self.write(
                    f"You have {count} unapplied migration(s). Run: {get_line('migrate')}{then}"
                )
            if not self.is_worker:
                return
            waits = True

    def announce(self) -> None:
        """Print the addresses of the service as soon as all its processes run."""
        deadline = None
        while not self.stopped.wait(INTERVAL):
            with suppress(Exception):  # The database may lack tables, and code may be incomplete.
                missing = overview.get_missing()
                # The others do not start before there are tables.
                deadline = deadline or time.monotonic() + START_TIMEOUT
                late = time.monotonic() > deadline
                if (late or not missing) and accepts(self.address):
                    self.write("\n" + overview.describe(missing) + "\n")
                    return
            connections.close_all()


def count_unapplied() -> int:
    """Return the number of migrations that are not applied; 0 if that cannot be found out."""
    try:
        return overview.count_unapplied()
    except Exception:
        return 0  # The process reports what is wrong.
    finally:
        connections.close_all()


def wait_for_parent(stopped: threading.Event) -> None:
    """Set the event when the parent process ends, as honcho does with its terminal."""
    parent = os.getppid()
    while os.getppid() == parent and not stopped.wait(PARENT_INTERVAL):
        pass
    stopped.set()


# The port


def get_address(process: dict[str, Any]) -> tuple[str, int] | None:
    """Return host and port of a web process; None for another one."""
    backend = import_string(process["BACKEND"])
    if not hasattr(backend, "get_address"):
        return None
    address: tuple[str, int] | None = backend(**process).get_address()
    return address


def check_port(address: tuple[str, int] | None) -> None:
    """Raise CommandError if another process uses the port of a web process."""
    if address is None:
        return
    with socket.socket(get_family(address)) as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            server.bind(address)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise CommandError(f"cannot listen on port {address[1]}: {error}") from error
            raise port_in_use(address[1]) from error


def accepts(address: tuple[str, int] | None) -> bool:
    """Return whether a process listens on the port; True if the process needs none."""
    if address is None:
        return True
    host, port = address
    try:
        socket.create_connection((ANY_HOST.get(host, host), port), timeout=INTERVAL).close()
    except OSError:
        return False
    return True
