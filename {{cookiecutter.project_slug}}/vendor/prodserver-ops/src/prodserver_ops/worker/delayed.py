"""Tasks that are not due: rows of the database, instead of messages that workers hold.

A worker stores a message whose ETA is more than a few seconds away, and acknowledges it. When the
task is due, a worker publishes the message to the queue that it came from. That works for each
broker, any delay and messages of any producer, and the task survives the broker. A row stays for a
day: if a message is delivered or published a second time, it is recognized by the row.
"""

import hashlib
import logging
import threading
from collections.abc import Callable, Collection, Iterable, Sequence
from datetime import datetime, timedelta
from itertools import batched
from queue import Empty, SimpleQueue
from typing import Any

from celery import Celery
from celery.app.task import Context
from celery.worker import state
from django.conf import settings
from django.db import DatabaseError, InterfaceError, close_old_connections, connections
from django.db.models import F, Min, Q, QuerySet
from django.db.models.functions import Now
from django.utils import timezone
from kombu.message import Message
from kombu.utils.json import dumps, loads

from .. import broker
from ..core.database import short_transaction
from ..models import DelayedTask
from ..scheduling.restores import find_restore

logger = logging.getLogger(__name__)

#: The delay from which a task is stored, in seconds. Celery holds the others.
HOLD = 5

#: How long before it is due a task is published, in seconds.
AHEAD = 1

#: Maximum number of rows in a transaction.
BATCH = 100

#: How long a worker may take to publish what it has claimed.
CLAIM = timedelta(seconds=4)

#: Maximum time between two looks at the table, in seconds. A worker knows when the tasks that it
#: has stored are due; those of another worker wait so long if that worker is lost.
INTERVAL = 5

#: Minimum time between two looks at the table, unless there is something to store, in seconds.
MIN_INTERVAL = 0.1

#: Time between two attempts to reach the database or the broker, in seconds.
RETRY_INTERVAL = 1

#: The header with the key and the attempt of a published message.
HEADER = "delayed"

#: The largest number that every database can store in the column.
MAX_ATTEMPTS = 2**31 - 1

#: The properties of a message that are stored.
PROPERTIES = ("correlation_id", "reply_to", "priority", "delivery_mode")

WAITING = DelayedTask.objects.filter(published_at=None)


# Rows


def get_key(task_id: Any, eta: Any) -> str:
    """Return what identifies a message: a retry has the same id, and another ETA."""
    return hashlib.sha256(dumps([task_id, eta]).encode()).hexdigest()


def get_due(headers: dict[str, Any]) -> datetime | None:
    """Return when a task is due, or None if it has no valid ETA."""
    try:
        due = datetime.fromisoformat(headers["eta"])
        return due if timezone.is_aware(due) else timezone.make_aware(due)
    except (KeyError, TypeError, ValueError, OverflowError):
        return None


def make_row(message: Message, headers: dict[str, Any], due: datetime, queue: str) -> DelayedTask:
    """Return the row of a message; raise TypeError or ValueError if it cannot be stored."""
    content = {
        "body": message.body,
        "content_type": message.content_type,
        "content_encoding": message.content_encoding,
        "headers": message.headers,
        "properties": {
            name: message.properties[name]
            for name in PROPERTIES
            if message.properties.get(name) is not None
        },
    }
    return DelayedTask(
        key=get_key(headers.get("id"), headers["eta"]),
        task_id=clean(headers.get("id"), 64),
        name=clean(headers.get("task"), 200),
        queue=queue,
        message=dumps(content),
        due_at=due,
    )


def clean(text: Any, length: int) -> str:
    """Return a text that every database can store."""
    return str(text).replace("\0", "").encode(errors="replace").decode()[:length]


def get_attempt(key: str, headers: dict[str, Any]) -> int:
    """Return the attempt at which a worker published a message; 0 if none did.

    A retry inherits the header of its first message, with another key.
    """
    match headers.get(HEADER):
        case [published, int(attempt)] if published == key and 0 < attempt <= MAX_ATTEMPTS:
            return attempt
    return DelayedTask.DELIVERED


def claim(request: Context) -> bool:
    """Record that a worker runs a delayed task; return whether it may.

    It may not if the task was cancelled, or if another message of the same task has been started.
    While the database is unavailable, every message may run.
    """
    headers = request.headers or {}
    match headers.get(HEADER):
        case [str(published), _] if not request.eta:
            key = published
        case _ if request.eta:
            key = get_key(request.id, request.eta)
        case _:
            return True
    attempt = get_attempt(key, headers)
    rows = DelayedTask.objects.filter(key=key)
    try:
        startable = rows.filter(Q(started_by=None) | Q(started_by=attempt))
        return bool(startable.update(started_by=attempt)) or not rows.exists()
    except (DatabaseError, InterfaceError) as error:
        logger.warning("Could not record the start of a task: %s", type(error).__name__)
        return True


def cancel(rows: QuerySet[DelayedTask]) -> int:
    """Cancel tasks that are not started; return their number."""
    return rows.filter(started_by=None).update(
        started_by=DelayedTask.CANCELLED, published_at=Now(), claimed_at=None
    )


def revoke(task_ids: Collection[str]) -> int:
    """Cancel the tasks with these ids that are not started; return their number."""
    ids = {clean(task_id, 64) for task_id in task_ids}
    return cancel(DelayedTask.objects.filter(task_id__in=ids)) if ids else 0


def revoke_later(task_ids: Iterable[str]) -> None:
    """Cancel tasks whose messages no worker has received yet, when one stores them.

    A row without a message notes the id.
    """
    ids = {clean(task_id, 64) for task_id in task_ids}
    now = timezone.now()
    fields = {"name": "revoked", "started_by": DelayedTask.CANCELLED, "published_at": now}
    rows = [
        DelayedTask(key=get_key(task_id, None), task_id=task_id, due_at=now, **fields)
        for task_id in ids
    ]
    DelayedTask.objects.bulk_create(rows, ignore_conflicts=True)


def revoke_noted(rows: Iterable[DelayedTask]) -> None:
    """Cancel stored tasks that were revoked before."""
    keys = {get_key(row.task_id, None) for row in rows}
    noted = DelayedTask.objects.filter(key__in=keys).values_list("task_id", flat=True)
    revoke(list(noted))


# Publishing


def publish_due(app: Celery) -> None:
    """Publish the tasks that are due; raise an exception if a server is unavailable."""
    while rows := claim_rows():
        # A message that could not be published must not hold up others.
        alone = any(row.attempts > 1 for row in rows)
        failed = 0
        for batch in batched(rows, 1 if alone else BATCH):
            try:
                publish_batch(app, batch)
            except Exception as error:
                failed += 1
                if not alone or failed > 1:
                    raise
                logger.warning("%s is not queued: %s", batch[0], type(error).__name__)


def publish_batch(app: Celery, rows: Sequence[DelayedTask]) -> None:
    """Publish tasks together."""
    with broker.open_batch(settings.CELERY_BROKER_URL, app) as producer:
        for row in rows:
            publish(app, producer, row)
    keys = [row.pk for row in rows]
    DelayedTask.objects.filter(pk__in=keys).update(published_at=Now(), claimed_at=None)


def claim_rows() -> Sequence[DelayedTask]:
    """Claim tasks that are due, and return them."""
    free = Q(claimed_at=None) | Q(claimed_at__lt=Now() - CLAIM)
    due = Q(due_at__lte=Now() + timedelta(seconds=AHEAD))
    restore = find_restore()
    held = restore.held if restore else Q(pk__in=[])
    with short_transaction():
        # A task may be running already: the broker delivered its message a second time.
        WAITING.filter(due, started_by__isnull=False).update(published_at=Now())
        waiting = WAITING.filter(free & due & ~held).order_by("attempts", "due_at")
        rows = list(waiting.select_for_update(skip_locked=True)[:BATCH])
        claimed = DelayedTask.objects.filter(pk__in=[row.pk for row in rows])
        claimed.update(claimed_at=Now(), attempts=F("attempts") + 1)
    for row in rows:
        row.attempts += 1
    return rows


def publish(app: Celery, producer: Any, row: DelayedTask) -> None:
    """Publish the message of a task to its queue; to the default queue, if that is gone."""
    queues, content = app.amqp.queues, loads(row.message)
    queue = queues[row.queue if row.queue in queues else app.conf.task_default_queue]
    producer.publish(
        content["body"],
        content_type=content["content_type"],
        content_encoding=content["content_encoding"],
        headers=content["headers"] | {HEADER: [row.key, row.attempts]},
        # The default exchange leads to the queue, however it is bound.
        exchange="",
        routing_key=queue.name,
        declare=[queue],
        **content["properties"],
    )


# The thread of a worker


class Keeper:
    """A thread that stores tasks that are not due, and publishes those that are."""

    def __init__(self, app: Celery) -> None:
        self.app = app
        self.entries: SimpleQueue[tuple[DelayedTask, Callable[[bool], None]]] = SimpleQueue()
        self.wake, self.stopped = threading.Event(), threading.Event()
        self.revoked: set[str] = set()
        self.next_due: datetime | None = None
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.thread.start()

    def add(self, row: DelayedTask, done: Callable[[bool], None]) -> None:
        """Store a row soon; then call the function with whether it is stored, from the thread."""
        self.entries.put((row, done))
        self.wake.set()

    def stop(self) -> None:
        """Let the thread end."""
        self.stopped.set()
        self.wake.set()
        self.thread.join(RETRY_INTERVAL)

    def run(self) -> None:
        """Store and publish until the worker stops."""
        logged = ""
        try:
            while not self.stopped.is_set():
                close_old_connections()
                try:
                    self.store_entries()
                    self.revoke_new()
                    publish_due(self.app)
                    self.next_due = WAITING.aggregate(due=Min("due_at"))["due"]
                    logged = ""
                except Exception as error:
                    name = type(error).__name__
                    if logged != name:
                        logger.warning("Delayed tasks wait: %s", name)
                    logged = name
                    connections.close_all()
                    self.stopped.wait(RETRY_INTERVAL)
                self.wait()
        finally:
            connections.close_all()

    def wait(self) -> None:
        """Wait until there is something to do."""
        wait: float = INTERVAL
        if self.next_due is not None:
            until = (self.next_due - timezone.now()).total_seconds() - AHEAD
            # The clock of the database may be late.
            wait = min(max(until, MIN_INTERVAL), INTERVAL)
        if self.wake.wait(wait):
            self.wake.clear()

    def store_entries(self) -> None:
        """Store the rows that were added."""
        entries: list[tuple[DelayedTask, Callable[[bool], None]]] = []
        try:
            while len(entries) < BATCH:
                entries.append(self.entries.get_nowait())
        except Empty:
            pass
        if not entries:
            return
        rows = [row for row, _ in entries]
        try:
            DelayedTask.objects.bulk_create(rows, ignore_conflicts=True)
            revoke_noted(rows)
        except Exception:
            for _, done in entries:
                done(False)
            raise
        # They may have been revoked while their messages waited.
        self.revoked.difference_update(row.task_id for row in rows)
        if len(entries) == BATCH:
            self.wake.set()
        for _, done in entries:
            done(True)

    def revoke_new(self) -> None:
        """Cancel tasks that the command ``revoke`` of Celery named, if it or they are new."""
        revoked = set(iterate(state.revoked))
        if new := revoked - self.revoked:
            revoke(new)
        self.revoked = revoked


def iterate(ids: Iterable[Any]) -> list[str]:
    """Return the ids of a set that the main thread may change."""
    while True:
        try:
            return [str(task_id) for task_id in ids]
        except RuntimeError:
            continue
