"""Heartbeats: web, worker and beat record in the database that they are at work.

They work with every broker, and tell a process that hangs from one that works: a worker's
come from the loop that receives tasks, those of beat from each pass over the schedules. A
web process whose threads are all busy still records them; ``/health/ready`` tells that.
"""

import atexit
import contextlib
import logging
import os
import socket
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from celery import signals
from django.conf import settings
from django.db import DatabaseError, InterfaceError, connections
from django.db.models import ExpressionWrapper, F, fields
from django.db.models.functions import Now
from django.utils.module_loading import import_string
from django_prodserver.backends.workers.celery import CeleryBeat, CeleryWorker

from . import logs
from .models import Heartbeat

logger = logging.getLogger(__name__)

#: Time between two heartbeats of a process, in seconds.
INTERVAL = 10

#: Age at which a heartbeat means nothing any more, in seconds.
MAX_AGE = 60

#: How old the last sign of a worker's loop may be, in seconds; it gives one every two.
LOOP_AGE = 20

_recorded_at: float | None = None
_loop_at: float = 0


def get_workers() -> list[str]:
    """Return the names of the processes in ``PRODUCTION_PROCESSES`` that are workers."""
    return [name for name, process in settings.PRODUCTION_PROCESSES.items() if is_worker(process)]


def get_processes() -> list[str]:
    """Return the names of the processes that are to be at work, besides web: workers and beat."""
    return [*get_workers(), "beat"]


def is_worker(process: dict[str, Any]) -> bool:
    """Return whether a process is a worker. An invalid one, which ``check`` reports, is none."""
    # Only those of Celery have an app; the others need not be imported.
    if "APP" not in process:
        return False
    try:
        backend = import_string(process["BACKEND"])
        return issubclass(backend, CeleryWorker) and not issubclass(backend, CeleryBeat)
    except (KeyError, ImportError, TypeError):
        return False


def record(process: str) -> None:
    """Record that this process is at work, every ``INTERVAL`` at most."""
    global _recorded_at
    if _recorded_at is not None and time.monotonic() - _recorded_at < INTERVAL:
        return
    Heartbeat.objects.update_or_create(
        process=process, host=socket.gethostname(), pid=os.getpid(), defaults={"seen_at": Now()}
    )
    _recorded_at = time.monotonic()


def forget() -> None:
    """Delete the heartbeat of this process, which ends."""
    with contextlib.suppress(DatabaseError, InterfaceError):
        Heartbeat.objects.filter(host=socket.gethostname(), pid=os.getpid()).delete()


def get_ages(process: str, host: str | None = None) -> list[timedelta]:
    """Return the ages of the heartbeats of one kind of process, on one host or all, newest first."""
    age = ExpressionWrapper(Now() - F("seen_at"), output_field=fields.DurationField())
    rows = Heartbeat.objects.filter(process=process)
    if host is not None:
        rows = rows.filter(host=host)
    return sorted(rows.annotate(age=age).values_list("age", flat=True))


def is_alive(process: str, host: str | None = None) -> bool:
    """Return whether a process of that kind is at work, on one host or any."""
    ages = get_ages(process, host)
    return bool(ages) and ages[0].total_seconds() < MAX_AGE


def record_forever(process: str, works: Callable[[], bool]) -> None:
    """Record heartbeats while ``works`` says so; the connection is closed after each."""
    while True:
        if works():
            try:
                record(process)
            except (DatabaseError, InterfaceError) as error:
                logger.warning("No heartbeat is recorded: %s", type(error).__name__)
            finally:
                connections.close_all()
        time.sleep(INTERVAL / 2)


# Web


def start_web_heartbeat() -> None:
    """Start the thread that records a web process's heartbeats; they are deleted when it ends."""
    threading.Thread(target=record_forever, args=["web", lambda: True], daemon=True).start()
    atexit.register(forget)


# Workers


@signals.heartbeat_sent.connect
def note_loop(**kwargs: Any) -> None:
    """Note that the worker's loop runs."""
    global _loop_at
    _loop_at = time.monotonic()


@signals.worker_ready.connect
def start_worker_heartbeat(**kwargs: Any) -> None:
    """Start the thread that records a worker's heartbeats: the database may hold it up."""
    # Celery's own command has no name of a process.
    name = logs.get_process() if logs.get_process() in get_workers() else "worker"
    threading.Thread(target=record_forever, args=[name, loop_runs], daemon=True).start()


def loop_runs() -> bool:
    """Return whether the worker's loop gave a sign lately."""
    return time.monotonic() - _loop_at < LOOP_AGE


@signals.worker_shutdown.connect
def forget_worker(**kwargs: Any) -> None:
    """Delete the heartbeat of a worker that ends."""
    forget()
