"""The record of task runs, which the page *Operations* shows.

A worker notes each run in memory, and a thread writes what ended, and what has run for longer
than a second, to the database once a second. A task never waits for that. SIGKILL loses the
notes of the last second; a database that is unavailable loses those of that time.
"""

import json
import logging
import os
import socket
import threading
import time
from collections import OrderedDict
from datetime import timedelta
from typing import Any

from celery import signals
from celery.app.task import Context
from django.db import DatabaseError, InterfaceError, connection
from django.utils import timezone
from django.utils.dateparse import parse_datetime

from .logs import redact
from .messages import deferred_sigterm
from .models import TaskRun

logger = logging.getLogger(__name__)

#: How often a process writes its notes, in seconds.
INTERVAL = 1

#: How many runs a process writes each time, failed ones first, then those of schedules; the
#: others are left out.
MAX_RUNS = 100

#: How many notes a process keeps while the database is unavailable.
MAX_NOTES = 1000

#: How many rows are kept, and for how long.
KEEP_ROWS = 100_000
KEEP_DAYS = timedelta(days=7)

#: The states of Celery, as the record names them; others are left out.
STATUSES = {
    "SUCCESS": TaskRun.Status.SUCCEEDED,
    "FAILURE": TaskRun.Status.FAILED,
    "RETRY": TaskRun.Status.RETRIED,
}

MAX_ARGUMENTS = TaskRun._meta.get_field("arguments").max_length or 0
MAX_ERROR = TaskRun._meta.get_field("error").max_length or 0


class Recorder:
    """The notes of one process."""

    def __init__(self) -> None:
        self.pid = os.getpid()
        self.host = socket.gethostname()
        self.lock = threading.Lock()
        self.running: OrderedDict[str, tuple[TaskRun, float]] = OrderedDict()
        self.ended: list[TaskRun] = []
        self.wake = threading.Event()
        # The thread must not get a SIGTERM that the main thread defers: it would take effect.
        with deferred_sigterm():
            threading.Thread(target=self.write_forever, daemon=True).start()

    def start(self, task_id: str, request: Context, name: str, args: Any, kwargs: Any) -> None:
        """Note that a run starts."""
        headers = request.headers or {}
        run = TaskRun(
            task_id=task_id,
            name=name,
            arguments=dump(args, kwargs),
            schedule_id=headers.get("schedule"),
            queued_at=parse_datetime(request.get("queued_at") or headers.get("queued_at") or ""),
            started_at=timezone.now(),
            host=self.host,
        )
        with self.lock:
            self.running[task_id] = run, time.monotonic()
        self.wake.set()

    def end(self, task_id: str, state: str, result: Any) -> None:
        """Note that a run ended; ``result`` is the exception if it failed."""
        with self.lock:
            run, start = self.running.pop(task_id, (None, 0.0))
            if run is None or state not in STATUSES:
                return
            run.status = STATUSES[state]
            run.duration = time.monotonic() - start
            if isinstance(result, BaseException):
                run.error = redact(f"{type(result).__name__}: {result}")[:MAX_ERROR]
            self.ended.append(run)
            del self.ended[:-MAX_NOTES]
        self.wake.set()

    def write_forever(self) -> None:
        """Write the notes while there are any."""
        while True:
            self.wake.wait()
            time.sleep(INTERVAL)
            with self.lock:
                if not self.running:
                    self.wake.clear()
            self.write()

    def write(self) -> None:
        """Write the notes; close the connection, which this thread alone uses."""
        with self.lock:
            ended, self.ended = self.ended, []
            limit = time.monotonic() - INTERVAL
            running = [run for run, start in self.running.values() if start < limit and not run.pk]
        try:
            written = [run for run in ended if run.pk]
            ended.sort(key=lambda run: (run.status != TaskRun.Status.FAILED, not run.schedule_id))
            new = [run for run in ended if not run.pk][:MAX_RUNS]
            if written:
                TaskRun.objects.bulk_update(written, ["status", "duration", "error"])
            TaskRun.objects.bulk_create(new)
            for run in running[:MAX_RUNS]:
                run.save()
        except (DatabaseError, InterfaceError) as error:
            logger.warning("Runs of tasks are not recorded: %s", type(error).__name__)
        finally:
            connection.close()


def dump(args: Any, kwargs: Any) -> str:
    """Return the arguments of a task as JSON, or an empty text if they are too long."""
    try:
        text = json.dumps([args, kwargs])
    except (TypeError, ValueError):
        return ""
    return text if len(text) <= MAX_ARGUMENTS else ""


_recorder: Recorder | None = None


def get_recorder() -> Recorder:
    """Return the recorder of this process; a worker forks."""
    global _recorder
    if _recorder is None or _recorder.pid != os.getpid():
        _recorder = Recorder()
    return _recorder


@signals.task_prerun.connect
def note_start(task_id: str, task: Any, args: Any, kwargs: Any, **others: Any) -> None:
    """Note the start of a run in a worker."""
    if not task.request.is_eager:
        get_recorder().start(task_id, task.request, task.name, args, kwargs)


@signals.task_postrun.connect
def note_end(task_id: str, task: Any, retval: Any, state: str | None, **others: Any) -> None:
    """Note the end of a run in a worker."""
    if not task.request.is_eager:
        get_recorder().end(task_id, state or "", retval)


@signals.worker_process_shutdown.connect
@signals.worker_shutdown.connect
def write_rest(**others: Any) -> None:
    """Write what is left when a process of a worker ends."""
    if _recorder is not None and _recorder.pid == os.getpid():
        _recorder.write()


def delete_old_runs() -> None:
    """Delete the rows that are too old or too many."""
    TaskRun.objects.filter(started_at__lt=timezone.now() - KEEP_DAYS).delete()
    newest = TaskRun.objects.order_by("-pk").values_list("pk", flat=True).first()
    if newest is not None:
        TaskRun.objects.filter(pk__lte=newest - KEEP_ROWS).delete()
