"""Tasks that may take hours: they are run in steps, and go on where they were.

A resumable task is a generator. It yields a cursor, such as the key of the last row, after each
step. About once a second the cursor is stored, in the same transaction as what the steps have
changed, so a task that was interrupted repeats at most one second, and only what is outside of the
database. A message runs the task for ``SLICE`` and then queues it again, at once if the worker has
to stop. So no time limit, deploy or broker has to wait for it.

A lock of the database session prevents two messages from running a task at the same time. Changes are
made in that session, so a process that has lost the lock cannot commit any. ``requeue_lost()``
queues the tasks of lost workers again.
"""

import hashlib
import logging
import mmap
import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import partial
from inspect import isgeneratorfunction, signature
from typing import Any

from celery import current_app, shared_task, signals
from celery.exceptions import Reject, Retry, SoftTimeLimitExceeded, TimeLimitExceeded
from django.db import DatabaseError, InterfaceError, connection, transaction
from django.db.models import Q, QuerySet
from django.db.models.functions import Now
from kombu.utils.json import dumps, loads

from ..core.headers import get_integer
from ..core.locks import try_lock
from ..core.redaction import redact
from ..models import ResumableRun
from .app import MAX_LOSSES, Task

logger = logging.getLogger(__name__)

#: How often the cursor is stored by default, in seconds. SQLite has one writer at a time.
INTERVAL, SQLITE_INTERVAL = 1.0, 0.1

#: How long a message runs a task, in seconds.
SLICE = 120

#: The longest step, in seconds: the database ends a session that is idle in a transaction.
MAX_STEP = 60

#: How long a message waits for the end of the one before, in seconds.
LOCK_TIMEOUT = 5

#: When a task without a worker, or one without a message, is queued again.
LOST, FORGOTTEN = timedelta(seconds=30), timedelta(minutes=10)

MAX_ERROR = ResumableRun._meta.get_field("error").max_length or 0

Status = ResumableRun.Status

#: Whether the worker has to stop: memory that it shares with its child processes.
_stopping = mmap.mmap(-1, 1)


class _Current(threading.local):
    """The run of the current thread."""

    run: "Run | None" = None


_current = _Current()


@signals.worker_init.connect
@signals.worker_shutting_down.connect
def note_shutdown(signal: Any, **kwargs: Any) -> None:
    """Note whether the worker has to stop."""
    _stopping[0] = signal is signals.worker_shutting_down


# For tasks


class ResumableTask(Task):
    """The base class of resumable tasks; use ``@resumable_task``."""

    autoretry_for = (*Task.autoretry_for, SoftTimeLimitExceeded)
    dont_autoretry_for = (Reject,)
    # Those without progress are counted in the row.
    max_losses = None

    def on_failure(self, exc: Any, task_id: str, args: Any, kwargs: Any, einfo: Any) -> None:
        """Store why the task has failed."""
        error = redact(f"{type(exc).__name__}: {exc}")[:MAX_ERROR].replace("\0", "")
        rows = ResumableRun.objects.filter(task_id=task_id).exclude(status=Status.FINISHED)
        if isinstance(exc, TimeLimitExceeded):
            # A run that has just stored its cursor goes on: in another worker, or after it was lost.
            rows = rows.filter(updated_at__lt=Now() - LOST)
        with suppress(DatabaseError, InterfaceError):
            rows.update(status=Status.FAILED, error=error.encode(errors="replace").decode())


def resumable_task(
    function: Callable[..., Generator[Any, None, Any]] | None = None,
    *,
    interval: float = INTERVAL,
    **options: Any,
) -> Any:
    """Decorator: turn a generator function into a task that goes on where it was.

    Its first argument is the cursor: None at first, then what it yielded last. Callers do not pass
    it. A cursor is any value that can be an argument of a task, except None. ``interval`` is how often
    the cursor is stored, in seconds; 0 means after each step, for steps that change something outside
    of the database. The other options are those of ``@shared_task``::

        @resumable_task
        def import_rows(cursor, path):
            for number, row in read(path, after=cursor or 0):
                Row.objects.create(**row)
                yield number
    """
    if function is None:
        return partial(resumable_task, interval=interval, **options)
    if not isgeneratorfunction(function):
        raise TypeError(f"{function.__name__} does not yield a cursor.")
    name = options.pop("name", f"{function.__module__}.{function.__name__}")

    def run(*args: Any, **kwargs: Any) -> Any:
        if not task.request.id or task.request.is_eager:
            return exhaust(function(None, *args, **kwargs))
        return Run(task, function, interval).resume(args, kwargs)

    run.__name__, run.__doc__ = function.__name__, function.__doc__
    run.__module__ = function.__module__
    given = signature(function)
    run.__signature__ = given.replace(  # type: ignore[attr-defined]
        parameters=list(given.parameters.values())[1:]
    )
    decorate: Any = shared_task(name=name, base=ResumableTask, **options)
    task = decorate(run)
    return task


def set_total(total: int) -> None:
    """Set how many steps the running task has in all, for the page *Operations*."""
    if _current.run is not None:
        _current.run.total = total


def rows_after(queryset: QuerySet[Any], cursor: Any, size: int = 1000) -> Iterator[Any]:
    """Yield the rows with a primary key after the cursor, in its order; read ``size`` at a time.

    A cursor of None means all rows.
    """
    rows = queryset.order_by("pk")
    while True:
        chunk = list((rows if cursor is None else rows.filter(pk__gt=cursor))[:size])
        yield from chunk
        if len(chunk) < size:
            return
        cursor = chunk[-1].pk


def exhaust(generator: Generator[Any, None, Any]) -> Any:
    """Run all steps; return what the generator returns."""
    while True:
        try:
            next(generator)
        except StopIteration as end:
            return end.value


# The run of a message


class Run:
    """The run of a resumable task by a message, until its slice ends."""

    def __init__(
        self, task: Any, function: Callable[..., Generator[Any, None, Any]], interval: float
    ) -> None:
        self.task = task
        self.function = function
        self.interval = min(interval, SQLITE_INTERVAL) if is_sqlite() else interval
        self.until = time.monotonic() + SLICE
        self.total: int | None = None
        self.steps = 0
        self.has_progressed = False

    def resume(self, args: Any, kwargs: Any) -> Any:
        """Run the task from its cursor; return its result if it ends."""
        with lock(self.task.request.id) as is_held:
            if not is_held:
                raise self.ignore("it is being run by another message")
            row = self.row = self.claim(args, kwargs)
            if row.status == Status.FINISHED:
                # The worker was lost before it could acknowledge the message.
                return loads(row.result)
            self.steps, self.total = row.steps, row.total
            _current.run = self
            try:
                with client_side_cursors():
                    generator = self.function(loads(row.cursor), *args, **kwargs)
                    while not self.run_steps(generator):
                        if _stopping[0] or time.monotonic() >= self.until:
                            self.queue_next()
                return loads(row.result)
            except (Retry, Reject):
                raise
            except Exception:
                if self.has_progressed:
                    self.task.request.retries = 0
                with suppress(DatabaseError, InterfaceError):
                    self.update(status=Status.WAITING)
                raise
            finally:
                _current.run = None

    def claim(self, args: Any, kwargs: Any) -> ResumableRun:
        """Note that this message runs the task; raise Reject if it may not."""
        request = self.task.request
        number = get_number(request.headers)
        defaults = {
            "name": self.task.name,
            "arguments": dumps([args, kwargs]),
            "options": dumps(get_options(self.task)),
        }
        row, _ = ResumableRun.objects.get_or_create(task_id=request.id, defaults=defaults)
        if number < row.number or (row.status == Status.FAILED and number == row.number):
            raise self.ignore("a later message runs it")
        if row.status == Status.FINISHED:
            return row
        row.claim, row.attempts, row.number = row.claim + 1, row.attempts + 1, number
        ResumableRun.objects.filter(pk=row.pk, claim=row.claim - 1).update(
            claim=row.claim,
            attempts=row.attempts,
            number=number,
            status=Status.RUNNING,
            error="",
            updated_at=Now(),
        )
        if row.attempts > MAX_LOSSES:
            raise RuntimeError(f"interrupted {MAX_LOSSES} times without completing a step")
        return row

    def run_steps(self, generator: Generator[Any, None, Any]) -> bool:
        """Run steps and store the cursor, in one transaction; return whether the task has ended."""
        steps, values = 0, {}
        with transaction.atomic():
            limit_idle()
            depth = len(connection.savepoint_ids)
            until = time.monotonic() + self.interval
            try:
                while True:
                    cursor = next(generator)
                    steps += 1
                    if time.monotonic() >= until or _stopping[0]:
                        break
            except StopIteration as end:
                values = {"status": Status.FINISHED, "result": dumps(end.value)}
                self.row.result = values["result"]
            else:
                if cursor is None or len(connection.savepoint_ids) != depth:
                    raise TypeError(
                        f"{self.task.name} must yield a cursor, outside of transaction.atomic()."
                    )
                values = {"cursor": dumps(cursor)}
            self.steps += steps
            self.update(**values, steps=self.steps, total=self.total, attempts=0)
        self.has_progressed = True
        if is_sqlite():
            time.sleep(0.01)  # Let others write.
        return "status" in values

    def update(self, **values: Any) -> None:
        """Update the row; raise Reject if another message has claimed it since."""
        rows = ResumableRun.objects.filter(pk=self.row.pk, claim=self.row.claim)
        if not rows.update(**values, updated_at=Now()):
            raise self.ignore("another message has taken it over")

    def queue_next(self) -> None:
        """Queue the task again, and raise Retry.

        If the broker is unavailable, raises Reject: the same message is delivered again.
        """
        request, number = self.task.request, self.row.number
        request.headers = {**(request.headers or {}), "slice": number + 1}
        request.retries = -1
        try:
            self.task.retry(countdown=0)
        except Retry:
            number += 1
            # Without the error of a retry, the log has one line.
            raise Retry("it goes on with the next message") from None
        finally:
            self.update(status=Status.WAITING, number=number)

    def ignore(self, reason: str) -> Reject:
        """Return the exception that discards a message; log the reason."""
        logger.info("%s is ignored: %s", self.task.name, reason)
        return Reject(reason, requeue=False)


@contextmanager
def lock(task_id: str) -> Iterator[bool]:
    """Hold the lock of a task during the block; yield whether it is held."""
    until = time.monotonic() + LOCK_TIMEOUT
    while True:
        with try_lock(get_lock_name(task_id)) as is_held:
            if is_held or time.monotonic() >= until:
                yield is_held
                return
        time.sleep(0.1)


def get_lock_name(task_id: str) -> str:
    """Return the name of a task's lock, which is a file name with SQLite."""
    return f"resumable task {hashlib.blake2b(task_id.encode(), digest_size=16).hexdigest()}"


@contextmanager
def client_side_cursors() -> Iterator[None]:
    """Let ``iterator()`` read all rows at once: a server's cursor ends with its transaction."""
    before = connection.settings_dict
    connection.settings_dict = {**before, "DISABLE_SERVER_SIDE_CURSORS": True}
    try:
        yield
    finally:
        connection.settings_dict = before


def limit_idle() -> None:
    """End the session of a process that hangs in a step, so that its lock is released."""
    if connection.vendor == "postgresql":
        with connection.cursor() as cursor:
            cursor.execute(f"SET LOCAL idle_in_transaction_session_timeout = '{MAX_STEP}s'")


def is_sqlite() -> bool:
    """Return whether the database is SQLite."""
    return connection.vendor == "sqlite"


def get_number(headers: dict[str, Any] | None) -> int:
    """Return the number of a task's message: each slice has the next one."""
    return get_integer(headers or {}, "slice") or 0


def get_options(task: Any) -> dict[str, Any]:
    """Return the options of the running message, to queue the task again."""
    options = dict(task.signature_from_request().options)
    return {name: value for name, value in options.items() if name not in ("countdown", "eta")}


# Tasks without a message


def requeue(row: ResumableRun) -> None:
    """Queue an unfinished task again, which goes on at its cursor.

    Raises an exception if the broker is unavailable, or if the task no longer exists.
    """
    options = loads(row.options)
    args, kwargs = loads(row.arguments)
    task: Any = current_app.tasks[row.name]
    # A message of a run that has failed is ignored, unless it has a higher number.
    number = row.number + 1 if row.status == Status.FAILED else row.number
    headers = {**(options.get("headers") or {}), "slice": number}
    options |= {"task_id": row.task_id, "headers": headers, "retries": 0}
    rows = ResumableRun.objects.filter(pk=row.pk, number=row.number, status=row.status)
    attempts = 0 if row.status == Status.FAILED else row.attempts
    with transaction.atomic():
        if rows.update(status=Status.WAITING, number=number, attempts=attempts, updated_at=Now()):
            task.apply_async(args, kwargs, **options)


def requeue_lost() -> None:
    """Queue the tasks again whose workers or messages were lost."""
    lost = Q(status=Status.RUNNING, updated_at__lt=Now() - LOST)
    forgotten = Q(status=Status.WAITING, updated_at__lt=Now() - FORGOTTEN)
    for row in ResumableRun.objects.filter(lost | forgotten).order_by("updated_at"):
        with try_lock(get_lock_name(row.task_id)) as is_free:
            if not is_free:
                continue
        try:
            requeue(row)
        except Exception as error:
            logger.warning("%s is not queued again: %s", row.name, type(error).__name__)
        else:
            logger.info("%s is queued again: its worker or its message was lost", row.name)
