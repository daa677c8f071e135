"""Heartbeats: all processes record in the database, and in a file, that they are running.

Heartbeats work with every broker, and show whether a process hangs: a worker sends them from the
loop that receives tasks, and beat from each pass over the schedules. A web process sends them even
if all its threads are busy; use ``/health/ready`` to find that. Ages are measured by the database's
clock. ``prodserver_ops.heartbeat`` reads the files.
"""

import atexit
import contextlib
import logging
import os
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

from celery import signals
from django.conf import settings
from django.db import DatabaseError, InterfaceError, connections
from django.db.models import ExpressionWrapper, F, fields
from django.db.models.functions import Now
from django.utils.module_loading import import_string
from django_prodserver.backends.base import BaseWorkerBackend
from django_prodserver.backends.workers.celery import CeleryBeat, CeleryWorker

from .. import heartbeat
from ..core import logs
from ..models import Heartbeat

logger = logging.getLogger(__name__)

#: Time between two heartbeats of a process, in seconds.
INTERVAL = 10

#: How long a worker's loop may be silent, in seconds. It sends an event every two seconds.
LOOP_AGE = 20

#: The modules with the backends of servers.
SERVERS = ("prodserver_ops.web.", "django_prodserver.backends.servers.")

_recorded_at: float | None = None
_loop_at: float = 0


def get_workers() -> list[str]:
    """Return the names of the workers in ``PRODUCTION_PROCESSES``."""
    return _get_names(lambda backend: _is_worker(backend) and not _is_beat(backend))


def get_beats() -> list[str]:
    """Return the names of the processes in ``PRODUCTION_PROCESSES`` that are beat."""
    return _get_names(_is_beat)


def get_others() -> list[str]:
    """Return the names of the processes that are neither web servers nor Celery's."""
    return _get_names(lambda backend: not _is_worker(backend))


def get_processes() -> list[str]:
    """Return the names of the processes whose heartbeats are checked: all but web servers."""
    return [*get_workers(), *get_beats(), *get_others()]


def _get_names(matches: Callable[[type], bool]) -> list[str]:
    processes = settings.PRODUCTION_PROCESSES.items()
    backends = {name: _find_backend(process) for name, process in processes}
    return [name for name, backend in backends.items() if backend and matches(backend)]


def _find_backend(process: dict[str, Any]) -> type | None:
    """Return the backend; None for that of a server, and an invalid one, which ``check`` reports."""
    path = str(process.get("BACKEND"))
    if path.startswith(SERVERS):
        return None  # Importing it would load the server.
    try:
        backend: type = import_string(path)
        return backend if issubclass(backend, BaseWorkerBackend) else None
    except (ImportError, TypeError):
        return None


def _is_worker(backend: type) -> bool:
    return issubclass(backend, CeleryWorker)


def _is_beat(backend: type) -> bool:
    return issubclass(backend, CeleryBeat)


def record(process: str) -> None:
    """Record that this process is running, at most once in ``INTERVAL``."""
    global _recorded_at
    if _recorded_at is not None and time.monotonic() - _recorded_at < INTERVAL:
        return
    with contextlib.suppress(OSError):  # The check says that there is no file.
        heartbeat.touch(process, settings.BASE_DIR)
    Heartbeat.objects.update_or_create(
        process=process, host=socket.gethostname(), pid=os.getpid(), defaults={"seen_at": Now()}
    )
    _recorded_at = time.monotonic()


def record_beat() -> None:
    """Record that this beat is running, under the name of its process."""
    name = logs.get_process()  # Celery's own command does not set it.
    record(name if name in get_beats() else "beat")


def forget() -> None:
    """Delete the heartbeat of this process when it exits."""
    heartbeat.remove_all(settings.BASE_DIR)
    with contextlib.suppress(DatabaseError, InterfaceError):
        Heartbeat.objects.filter(host=socket.gethostname(), pid=os.getpid()).delete()


def get_heartbeats() -> list[Heartbeat]:
    """Return all heartbeats, each with its ``age`` in seconds, the newest of a process first."""
    age = ExpressionWrapper(Now() - F("seen_at"), output_field=fields.DurationField())
    rows = Heartbeat.objects.annotate(interval=age).order_by("process", "interval")
    for row in rows:
        row.age = row.interval.total_seconds()
    return [*rows]


def get_ages(process: str, host: str | None = None) -> list[int]:
    """Return the ages of the heartbeats of a process in seconds, the newest first.

    ``host`` limits them to one host.
    """
    return [
        int(row.age)
        for row in get_heartbeats()
        if row.process == process and host in (None, row.host)
    ]


def get_alive() -> set[str]:
    """Return the names of the running processes."""
    return {row.process for row in get_heartbeats() if row.is_alive}


def is_alive(process: str) -> bool:
    """Return whether a process with this name is running."""
    return process in get_alive()


def record_forever(process: str, works: Callable[[], bool]) -> None:
    """Record heartbeats while ``works`` returns True; close the connection after each."""
    while True:
        if works():
            try:
                record(process)
            except (DatabaseError, InterfaceError) as error:
                logger.warning("Could not record a heartbeat: %s", type(error).__name__)
            finally:
                connections.close_all()
        time.sleep(INTERVAL / 2)


# Web


def start_web_heartbeat() -> None:
    """Start the thread that records a web process's heartbeats; they are deleted when it ends."""
    threading.Thread(target=record_forever, args=["web", lambda: True], daemon=True).start()
    atexit.register(forget)


# Other processes


def start_heartbeat(process: str) -> None:
    """Start the thread that records the heartbeats of a process that is not Celery's.

    They show that it is running. If it also calls ``note_loop()``, they show that it does so at
    least every ``LOOP_AGE`` seconds.
    """
    works = lambda: not _loop_at or loop_runs()  # noqa: E731
    threading.Thread(target=record_forever, args=[process, works], daemon=True).start()
    atexit.register(forget)


# Workers


@signals.heartbeat_sent.connect
def note_loop(**kwargs: Any) -> None:
    """Note that the loop of this process is running."""
    global _loop_at
    _loop_at = time.monotonic()


@signals.worker_ready.connect
def start_worker_heartbeat(**kwargs: Any) -> None:
    """Start the thread that records a worker's heartbeats; a slow database may block it."""
    # Celery's own command does not set the name of the process.
    name = logs.get_process() if logs.get_process() in get_workers() else "worker"
    threading.Thread(target=record_forever, args=[name, loop_runs], daemon=True).start()


def loop_runs() -> bool:
    """Return whether the worker's loop sent an event within ``LOOP_AGE``."""
    return time.monotonic() - _loop_at < LOOP_AGE


@signals.worker_shutdown.connect
def forget_worker(**kwargs: Any) -> None:
    """Delete the heartbeat when the worker exits."""
    forget()
