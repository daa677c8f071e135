"""The record of task runs, which the page *Operations* shows.

A worker keeps notes of its runs in memory. Once a second, a thread writes the runs that have ended,
or have been running for more than a second, to the database. Tasks never wait for it. SIGKILL loses
the notes of the last second, and notes are also lost while the database is unavailable.
"""

import json
import logging
import os
import socket
import threading
import time
from collections import OrderedDict
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from celery import signals
from celery.app.task import Context
from django.db import DatabaseError, InterfaceError, connection
from django.utils import timezone
from django.utils.dateparse import parse_datetime

from ..core.logs import redact
from ..core.signals import deferred_sigterm
from ..models import TaskRun

logger = logging.getLogger(__name__)

#: How often a process writes its notes, in seconds.
INTERVAL = 1

#: Maximum number of runs that a process writes at a time. Failed runs come first, then runs of
#: schedules; the others are not recorded.
MAX_RUNS = 50

#: Maximum number of notes that a process keeps in memory.
MAX_NOTES = 1000

#: Maximum number and age of rows.
KEEP_ROWS = 100_000
KEEP_DAYS = timedelta(days=7)

#: The states of Celery that are recorded, and their statuses.
STATUSES = {
    "SUCCESS": TaskRun.Status.SUCCEEDED,
    "FAILURE": TaskRun.Status.FAILED,
    "RETRY": TaskRun.Status.RETRIED,
}

HOST = socket.gethostname()

MAX_ARGUMENTS = TaskRun._meta.get_field("arguments").max_length or 0
MAX_ERROR = TaskRun._meta.get_field("error").max_length or 0


@dataclass(slots=True)
class Note:
    """A run in memory, which takes less time to create than a row."""

    task_id: str
    name: str
    args: Any
    kwargs: Any
    headers: dict[str, Any]
    queued_at: str | None
    started_at: float
    start: float
    status: str = TaskRun.Status.RUNNING
    duration: float | None = None
    error: str = ""
    row: TaskRun | None = None

    @property
    def schedule_id(self) -> int | None:
        """The schedule that the run belongs to."""
        return self.headers.get("schedule")

    @property
    def is_stored(self) -> bool:
        """Whether the run already has a row."""
        return self.row is not None and self.row.pk is not None

    def make_row(self) -> TaskRun:
        """Return the row of the run, with its current state."""
        if self.row is None:
            self.row = TaskRun(
                task_id=self.task_id,
                name=self.name,
                arguments=dump(self.args, self.kwargs),
                schedule_id=self.schedule_id,
                queued_at=parse_datetime(self.queued_at or self.headers.get("queued_at") or ""),
                started_at=datetime.fromtimestamp(self.started_at, UTC),
                host=HOST,
            )
        self.row.status, self.row.duration, self.row.error = self.status, self.duration, self.error
        return self.row


class Recorder:
    """The notes of one process."""

    def __init__(self) -> None:
        self.pid = os.getpid()
        self.lock = threading.Lock()
        self.running: OrderedDict[str, Note] = OrderedDict()
        self.ended: list[Note] = []
        self.wake = threading.Event()
        # Block SIGTERM, so that the thread does not receive a signal that the main thread defers.
        with deferred_sigterm():
            threading.Thread(target=self.write_forever, daemon=True).start()

    def start(self, task_id: str, request: Context, name: str, args: Any, kwargs: Any) -> None:
        """Note that a run starts."""
        headers, queued_at = request.headers or {}, request.get("queued_at")
        note = Note(task_id, name, args, kwargs, headers, queued_at, time.time(), time.monotonic())
        with self.lock:
            self.running[task_id] = note
        if not self.wake.is_set():
            self.wake.set()

    def end(self, task_id: str, state: str, result: Any) -> None:
        """Note that a run ended; ``result`` is the exception if it failed."""
        with self.lock:
            note = self.running.pop(task_id, None)
            if note is None or state not in STATUSES:
                return
            note.status = STATUSES[state]
            note.duration = time.monotonic() - note.start
            # The thread may be writing a row of a run that took longer.
            is_short = note.status == TaskRun.Status.SUCCEEDED and note.duration < INTERVAL
            if len(self.ended) >= MAX_RUNS and is_short and not note.schedule_id:
                return
            if isinstance(result, BaseException):
                error = redact(f"{type(result).__name__}: {result}")[:MAX_ERROR]
                # PostgreSQL cannot store NUL characters, and UTF-8 cannot encode surrogates.
                note.error = error.replace("\0", "").encode(errors="replace").decode()
            self.ended.append(note)
            del self.ended[:-MAX_NOTES]
        if not self.wake.is_set():
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
            # A busy worker keeps the connection.
            if not self.wake.is_set():
                connection.close()

    def write(self) -> None:
        """Write the notes."""
        with self.lock:
            ended, self.ended = self.ended, []
            limit = time.monotonic() - INTERVAL
            running = [note for note in self.running.values() if note.start < limit]
        try:
            connection.close_if_unusable_or_obsolete()
            written = [note for note in ended if note.is_stored]
            ended.sort(
                key=lambda note: (note.status != TaskRun.Status.FAILED, not note.schedule_id)
            )
            new = [note for note in ended if not note.is_stored][:MAX_RUNS]
            if written:
                fields = ["status", "duration", "error"]
                TaskRun.objects.bulk_update([note.make_row() for note in written], fields)
            TaskRun.objects.bulk_create([note.make_row() for note in new])
            for note in [note for note in running if not note.is_stored][:MAX_RUNS]:
                note.make_row().save()
        except (DatabaseError, InterfaceError, ValueError) as error:
            logger.warning("Could not record task runs: %s", type(error).__name__)
            connection.close()


def dump(args: Any, kwargs: Any) -> str:
    """Return the arguments of a task as JSON, or an empty string if they are too long."""
    try:
        text = json.dumps([args, kwargs])
    except (TypeError, ValueError, RecursionError):
        return ""
    return text if len(text) <= MAX_ARGUMENTS else ""


_recorder: Recorder | None = None


def get_recorder() -> Recorder:
    """Return the recorder of this process; create one after a fork."""
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
    """Write the remaining notes when a worker process exits."""
    if _recorder is not None and _recorder.pid == os.getpid():
        _recorder.write()


def delete_old_runs() -> None:
    """Delete the rows that exceed the maximum age or number."""
    TaskRun.objects.filter(started_at__lt=timezone.now() - KEEP_DAYS).delete()
    newest = TaskRun.objects.order_by("-pk").values_list("pk", flat=True).first()
    if newest is not None:
        TaskRun.objects.filter(pk__lte=newest - KEEP_ROWS).delete()
