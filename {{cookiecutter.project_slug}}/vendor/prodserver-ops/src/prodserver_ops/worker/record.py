"""The record of task runs, which the page *Operations* shows.

A worker keeps notes of its runs in memory. Once a second, a thread writes the runs that have ended,
or have been running for more than a second, to the database. Tasks never wait for it. SIGKILL loses
the notes of the last second. While the database is unavailable, a process keeps its latest notes.
"""

import json
import logging
import os
import socket
import sys
import threading
import time
from collections import OrderedDict
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, cast

from billiard import common as billiard
from celery import signals
from celery.app.task import Context
from celery.exceptions import Ignore, Reject, TimeLimitExceeded, WorkerLostError
from celery.states import FAILURE, RETRY, SUCCESS
from django.conf import settings
from django.db import DatabaseError, InterfaceError, connection, transaction
from django.db.models import Max
from django.utils import timezone
from kombu.utils.json import dumps

from .. import broker
from ..core.database import TEMPORARY_ERRORS
from ..core.headers import get_integer, get_request_id, get_time
from ..core.logs import request_id
from ..core.redaction import redact
from ..core.signals import deferred_sigterm
from ..core.text import make_storable
from ..models import TaskRun

logger = logging.getLogger(__name__)

#: How often a process writes its notes, in seconds.
INTERVAL = 1

#: Maximum number of runs that a process writes at a time, apart from failed ones. Runs of schedules
#: come first; the others are not recorded.
MAX_RUNS = 50

#: Maximum number of notes that a process keeps in memory.
MAX_NOTES = 1000

#: Maximum number and age of rows.
KEEP_ROWS = 100_000

#: The states of Celery that are recorded, and their statuses.
STATUSES = {
    SUCCESS: TaskRun.Status.SUCCEEDED,
    FAILURE: TaskRun.Status.FAILED,
    RETRY: TaskRun.Status.RETRIED,
}

#: The error of a run that has lost its worker starts with this, and that of one that is given up.
LOST, GIVEN_UP = "WorkerLostError", "it has lost"

HOST = socket.gethostname()

MAX_ID = TaskRun._meta.get_field("task_id").max_length
MAX_NAME = TaskRun._meta.get_field("name").max_length
MAX_ARGUMENTS = TaskRun._meta.get_field("arguments").max_length or 0
MAX_ERROR = TaskRun._meta.get_field("error").max_length or 0


class GivenUp(Ignore):
    """The task that starts has lost too many workers; it is in the queue of failed tasks."""


class TaskExit(Exception):
    """A task raised SystemExit or KeyboardInterrupt."""


@dataclass(slots=True)
class Note:
    """A run in memory, which takes less time to create than a row."""

    task_id: str
    name: str
    args: Any
    kwargs: Any
    headers: dict[str, Any]
    queued_at: Any
    started_at: float
    start: float
    status: str = TaskRun.Status.RUNNING
    duration: float | None = None
    error: str = ""
    is_killed: bool = False
    row: TaskRun | None = None

    @property
    def schedule_id(self) -> int | None:
        """The schedule that the run belongs to."""
        return get_integer(self.headers, "schedule")

    @property
    def is_failed(self) -> bool:
        """Whether the run failed."""
        return self.status == TaskRun.Status.FAILED

    @property
    def is_stored(self) -> bool:
        """Whether the run already has a row."""
        return self.row is not None and self.row.pk is not None

    def make_row(self) -> TaskRun:
        """Return the row of the run, with its current state."""
        if self.row is None:
            self.row = TaskRun(
                task_id=clean_id(self.task_id),
                name=self.name[:MAX_NAME],
                arguments=dump(self.args, self.kwargs),
                schedule_id=self.schedule_id,
                request_id=get_request_id(self.headers) or "",
                queued_at=get_time(self.queued_at or self.headers.get("queued_at")),
                started_at=datetime.fromtimestamp(self.started_at, UTC),
                host=HOST,
            )
        self.row.status, self.row.duration, self.row.error = self.status, self.duration, self.error
        return self.row

    def save_killed(self) -> None:
        """Store the end of a run that its own process could not note."""
        rows = TaskRun.objects.filter(task_id=clean_id(self.task_id))
        end = {"status": self.status, "error": self.error}
        if rows.filter(status=TaskRun.Status.RUNNING).update(**end):
            return
        # The process may have noted that it was terminated.
        last = rows.order_by("-pk").first()
        if last is not None and (last.status, last.error) == (TaskRun.Status.RETRIED, ""):
            rows.filter(pk=last.pk).update(**end)
            return
        # Celery reports an exceeded time limit twice.
        if not rows.filter(status=self.status, error=self.error).exists():
            self.make_row().save()


class Recorder:
    """The notes of one process."""

    def __init__(self) -> None:
        self.pid = os.getpid()
        self.lock = threading.Lock()
        self.running: OrderedDict[str, Note] = OrderedDict()
        self.ended: list[Note] = []
        self.failures: dict[str, BaseException] = {}
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

    def store(self, task_id: str) -> None:
        """Write the note of a run that has just started."""
        with self.lock:
            note = self.running.get(task_id)
            # Otherwise the thread may be writing it.
            if note is not None and time.monotonic() - note.start < INTERVAL:
                self.save([note])

    def note_failure(self, task_id: str, error: BaseException) -> None:
        """Note why a run fails before its outcome is stored, which may raise another exception."""
        if task_id in self.running:
            self.failures[task_id] = error

    def end(self, task_id: str, state: str, result: Any) -> None:
        """Note that a run ended; ``result`` is the exception if it failed."""
        with self.lock:
            note = self.running.pop(task_id, None)
            failure = self.failures.pop(task_id, None)
            if note is None:
                return
            note.duration = round(time.monotonic() - note.start, 3)
            # A run that was rejected or ignored at once has no row. Another run of the task has one.
            if state not in STATUSES and note.duration < INTERVAL and not note.is_stored:
                return
            note.status = STATUSES.get(state, TaskRun.Status.RETRIED)
            if isinstance(result, GivenUp):
                note.status = TaskRun.Status.FAILED
            # The thread may be writing a row of a run that took longer.
            is_short = note.status == TaskRun.Status.SUCCEEDED and note.duration < INTERVAL
            if len(self.ended) >= MAX_RUNS and is_short and not note.schedule_id:
                return
            if isinstance(error := failure or result, BaseException):
                note.error = describe(error)
            elif not state and is_too_long(note.duration):
                note.error = f"{LOST}: it took longer than the consumer_timeout of RabbitMQ"
            self.add(note)
        if not self.wake.is_set():
            self.wake.set()

    def forget(self, task_id: str) -> None:
        """Forget a run whose end another process notes."""
        with self.lock:
            self.running.pop(task_id, None)

    def end_killed(
        self, task_id: str, name: str, args: Any, kwargs: Any, headers: Any, error: Exception
    ) -> None:
        """Note that a run failed because its process was killed; called in the main process."""
        now = time.time()
        note = Note(task_id, name, args, kwargs, headers, None, now, 0, error=describe(error))
        note.status, note.is_killed = TaskRun.Status.FAILED, True
        with self.lock:
            self.add(note)
        self.wake.set()

    def add(self, *notes: Note) -> None:
        """Keep notes for the thread; the oldest ones are dropped if there are too many."""
        self.ended.extend(notes)
        del self.ended[:-MAX_NOTES]

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
        running = [note for note in running if not note.is_stored][:MAX_RUNS]
        others = sorted(
            (note for note in ended if not note.is_stored and not note.is_failed),
            key=lambda note: not note.schedule_id,
        )
        notes = [note for note in ended if note.is_stored or note.is_failed]
        notes += others[:MAX_RUNS]
        try:
            connection.close_if_unusable_or_obsolete()
            self.save([*notes, *running])
        except TEMPORARY_ERRORS as error:
            logger.warning("Could not record task runs yet: %s", type(error).__name__)
            connection.close()
            with self.lock:
                self.ended, later = [], self.ended
                self.add(*notes, *later)
            self.wake.set()
        except Exception:
            for note in (*notes, *running):
                try:
                    self.save([note])
                except Exception as error:
                    logger.warning("Could not record a task run: %s", type(error).__name__)

    def save(self, notes: list[Note]) -> None:
        """Write notes in a transaction."""
        if not notes:
            return
        killed = [note for note in notes if note.is_killed and not note.is_stored]
        new = [note for note in notes if not note.is_killed and not note.is_stored]
        old = [note for note in notes if note.is_stored]
        try:
            with transaction.atomic():
                if old:
                    fields = ["status", "duration", "error"]
                    TaskRun.objects.bulk_update([note.make_row() for note in old], fields)
                for note in killed:
                    note.save_killed()
                TaskRun.objects.bulk_create([note.make_row() for note in new])
        except BaseException:
            for note in (*killed, *new):
                note.row = None
            raise


def describe(error: BaseException) -> str:
    """Return an exception as the text of a row."""
    is_message = isinstance(error, Reject | Ignore) and error.args
    try:
        text = str(error.args[0]) if is_message else f"{type(error).__name__}: {error}"
    except Exception:  # A fault in the class of the exception.
        text = type(error).__name__
    return make_storable(redact(text))[:MAX_ERROR]


def is_too_long(duration: float) -> bool:
    """Return whether RabbitMQ delivers a message again whose task takes so many seconds."""
    if broker.find(settings.CELERY_BROKER_URL).module != "rabbitmq":
        return False
    return duration >= float(settings.RABBITMQ_CONSUMER_TIMEOUT)


def clean_id(task_id: Any) -> str:
    """Return the id of a task as rows have it."""
    return make_storable(str(task_id))[:MAX_ID]


def dump(args: Any, kwargs: Any) -> str:
    """Return the arguments of a task as JSON, or an empty string if they are too long."""
    try:
        try:
            text = json.dumps([args, kwargs])
        except TypeError:  # Such as a date; this takes longer.
            text = dumps([args, kwargs])
    except (TypeError, ValueError, RecursionError):
        return ""
    return text if len(text) <= MAX_ARGUMENTS else ""


def start_again(task_id: str) -> int:
    """Record that a run starts whose message was delivered before; return how many were lost.

    Only runs that were started count: a worker that is lost also returns what it had just received.
    After a task was given up, they count anew. If the database is unavailable, returns 0.
    """
    rows = TaskRun.objects.filter(task_id=clean_id(task_id))
    lost = {"status": TaskRun.Status.RETRIED, "error": f"{LOST}: its worker was lost"}
    try:
        rows.filter(status=TaskRun.Status.RUNNING).update(**lost)
        get_recorder().store(task_id)
        given_up = rows.filter(error__startswith=GIVEN_UP).aggregate(last=Max("pk"))["last"]
        return rows.filter(error__startswith=LOST, pk__gt=given_up or 0).count()
    except (DatabaseError, InterfaceError) as error:
        logger.warning("Could not record the start of a task: %s", type(error).__name__)
        return 0


_recorder: Recorder | None = None
_creation = threading.Lock()


def get_recorder() -> Recorder:
    """Return the recorder of this process; create one after a fork."""
    global _recorder
    # Two threads of a worker may start their first tasks at the same time.
    with _creation:
        if _recorder is None or _recorder.pid != os.getpid():
            _recorder = Recorder()
        return _recorder


@signals.task_prerun.connect
def note_start(task_id: str, task: Any, args: Any, kwargs: Any, **others: Any) -> None:
    """Note the start of a run in a worker, and the request that it belongs to."""
    if not task.request.is_eager:
        request_id.set(get_request_id(task.request.headers))
        get_recorder().start(task_id, task.request, task.name, args, kwargs)


@signals.task_postrun.connect
def note_end(task_id: str, task: Any, retval: Any, state: str | None, **others: Any) -> None:
    """Note the end of a run in a worker.

    An exception is on its way if the outcome could not be stored, or the process ends.
    """
    if task.request.is_eager:
        return
    raised, process = sys.exception(), cast("Any", billiard)
    is_exit = isinstance(raised, SystemExit | KeyboardInterrupt)
    if is_exit and not process.terminate_handler_fired():
        # The task itself exits; the main process notes that.
        get_recorder().forget(task_id)
    elif isinstance(raised, Exception):
        state, retval = (RETRY if state == SUCCESS else FAILURE), raised
    get_recorder().end(task_id, state or "", retval)
    request_id.set(None)


@signals.task_failure.connect
def note_killed(sender: Any, task_id: str, exception: Any, **others: Any) -> None:
    """Note in a worker's main process that the process of a run was killed, or exited."""
    if isinstance(exception, TimeLimitExceeded | WorkerLostError | TaskExit):
        args, kwargs = others.get("args"), others.get("kwargs")
        headers = sender.request.headers or {}
        get_recorder().end_killed(task_id, sender.name, args, kwargs, headers, exception)


@signals.worker_process_shutdown.connect
@signals.worker_shutdown.connect
def write_rest(**others: Any) -> None:
    """Write the remaining notes when a worker process exits."""
    if _recorder is not None and _recorder.pid == os.getpid():
        _recorder.write()
