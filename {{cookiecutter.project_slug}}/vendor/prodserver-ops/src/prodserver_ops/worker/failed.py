"""Failed tasks: their messages are in a queue that no worker consumes.

These tasks have killed several workers, or are unknown to all workers, for example after a
rollback. Messages that are not those of a task are there too, with the reason in the header
``problem``. ``doctor`` reports them, and ``python manage.py requeue`` runs them again. When a worker
starts, it also requeues the unknown tasks that it knows.
"""

import logging
import threading
import time
from collections.abc import Callable
from typing import Any, TypeGuard

from celery import Celery, signals
from celery.worker.consumer import Consumer as CeleryConsumer
from django.utils import timezone
from kombu import Queue
from kombu.exceptions import OperationalError
from kombu.message import Message

from ..core.headers import get_request_id
from ..core.logs import request_id
from ..core.text import make_storable, shorten
from ..models import TaskRun
from . import record
from .app import make_failed_queue
from .messages import find_problem

logger = logging.getLogger(__name__)

#: How long the message of an unknown task returns to its queue, in seconds. During a deploy,
#: another worker may know the task.
UNKNOWN_SECONDS = 120

#: How long a worker holds such a message before returning it, in seconds.
HOLD_SECONDS = 0.5

#: When a worker tries again to publish what it has received, in seconds.
AGAIN_SECONDS = 2

#: Maximum length of the reason why a message is given up, in characters.
MAX_PROBLEM = 300

#: The properties of a message that are preserved.
KEPT_PROPERTIES = ("correlation_id", "reply_to", "priority", "delivery_mode")

#: The headers with which RabbitMQ counts deliveries; they would count for the new message too.
COUNTERS = ("x-delivery-count", "x-acquired-count")


class Consumer(CeleryConsumer):
    """A worker's consumer. Unlike Celery's, it discards no message, and no message ends it."""

    connection_errors: tuple[type[Exception], ...]
    channel_errors: tuple[type[Exception], ...]

    def create_task_handler(self, *args: Any, **kwargs: Any) -> Callable[[Message], None]:
        """Return the function that receives a message."""
        handle = super().create_task_handler(*args, **kwargs)
        broker_errors = (*self.connection_errors, *self.channel_errors)

        def on_task_received(message: Message) -> None:
            token = request_id.set(get_request_id(message.headers))
            try:
                if problem := find_problem(message):
                    self.give_up(message, problem)
                elif not self.divert(message):
                    handle(message)
            except broker_errors:
                raise
            except Exception as error:
                self.give_up(message, f"{type(error).__name__}: {error}")
            finally:
                request_id.reset(token)

        return on_task_received

    def divert(self, message: Message) -> bool:
        """Return whether a valid message is not for Celery; a subclass may take it."""
        return False

    def on_decode_error(self, message: Message, exc: Exception) -> None:
        """Give up a message whose body cannot be decompressed or decoded."""
        self.give_up(message, f"{type(exc).__name__}: {exc}")

    def on_invalid_task(self, body: Any, message: Message, exc: Exception) -> None:
        """Give up a message whose ETA or time of expiry is invalid, for example."""
        self.give_up(message, f"{type(exc).__name__}: {exc}")

    def on_unknown_message(self, body: Any, message: Message) -> None:
        """Give up a message that is not that of a task."""
        self.give_up(message, "invalid body")

    def give_up(self, message: Message, problem: str) -> None:
        """Move a message that is not that of a task to the queue of failed tasks."""
        problem = make_storable(shorten(problem, MAX_PROBLEM))
        logger.error("A message is given up, because it is not that of a task: %s", problem)
        if message.acknowledged:
            return
        queue = make_failed_queue(self.app)
        broker_errors: tuple[type[Exception], ...]
        broker_errors = (OperationalError, *self.connection_errors, *self.channel_errors)
        # Not every header can be published again, and ``requeue()`` cannot read a body that is not
        # compressed as the header says.
        plain = {"original_headers": ascii(message.headers)[:MAX_PROBLEM]}
        for headers in (plain,) if message.errors else (message.headers, plain):
            try:
                republish(self.app, message, queue, headers | {"problem": problem})
                break
            except broker_errors as error:
                logger.warning("Could not move the message: %s", type(error).__name__)
                self.try_again(self.give_up, message, problem)
                return
            except Exception as error:
                logger.warning("Could not keep all of the message: %s", type(error).__name__)
                message.properties.clear()
        message.ack()

    def on_unknown_task(self, body: Any, message: Message, exc: Exception) -> None:
        """Return the message to its queue; after ``UNKNOWN_SECONDS``, give up."""
        name = message.headers.get("task") or message.payload["task"]
        since = get_unknown_since(message.headers)
        if not since:
            logger.warning("%s is unknown to this worker; its message returns to the queue", name)
            since = time.time()
        is_given_up = time.time() - since >= UNKNOWN_SECONDS
        if is_given_up:
            logger.error("%s is unknown to all workers and is given up", name)
        self.timer.call_after(HOLD_SECONDS, self.move, (message, since, is_given_up))

    def move(self, message: Message, since: float, is_given_up: bool) -> None:
        """Publish a message again, and acknowledge it."""
        source = message.delivery_info["exchange"], message.delivery_info["routing_key"]
        headers = message.headers | {"unknown_since": since, "unknown_from": source}
        try:
            if is_given_up:
                republish(self.app, message, make_failed_queue(self.app), headers)
            else:
                republish(self.app, message, source, headers)
        except Exception as error:
            logger.warning("Could not return a message to its queue: %s", type(error).__name__)
            self.try_again(self.move, message, since, is_given_up)
        else:
            acknowledge(message)

    def try_again(self, function: Callable[..., None], *args: Any) -> None:
        """Call a function soon: a worker that holds a few messages receives no others.

        When the worker reconnects, Celery clears the timer, and the broker delivers the messages again.
        """
        self.timer.call_after(AGAIN_SECONDS, function, args)


def acknowledge(message: Message) -> None:
    """Acknowledge a message that was stored or published again."""
    try:
        message.ack()
    except Exception as error:
        # The broker delivers it again when the worker exits or reconnects.
        logger.warning("Could not acknowledge a message: %s", type(error).__name__)


def get_unknown_since(headers: dict[str, Any]) -> float:
    """Return since when a task is unknown, as a timestamp; 0 if it is not or the header is forged."""
    since = headers.get("unknown_since")
    return since if isinstance(since, int | float) and 0 < since <= time.time() else 0


def republish(
    app: Celery, message: Message, target: Queue | tuple[str, str], headers: dict[str, Any]
) -> None:
    """Publish a message unchanged to a queue, or to an exchange with a routing key."""
    options: dict[str, Any] = {
        name: message.properties[name]
        for name in KEPT_PROPERTIES
        if message.properties.get(name) is not None
    }
    if isinstance(target, Queue):
        options |= {"exchange": target.exchange, "routing_key": target.routing_key}
        options["declare"] = [target]
    else:
        options |= {"exchange": target[0], "routing_key": target[1]}
    # kombu has decompressed the body.
    dropped = {"compression", *COUNTERS}
    headers = {name: value for name, value in headers.items() if name not in dropped}
    with app.producer_pool.acquire(block=True) as producer:
        producer.publish(
            message.body or b"",
            content_type=message.content_type or "application/data",
            content_encoding=message.content_encoding or "binary",
            headers=headers,
            # The connection may have been lost since it was last used.
            retry=True,
            retry_policy={"max_retries": 1, "interval_start": 0},
            **options,
        )


def requeue(app: Celery, is_wanted: Callable[[Message], bool]) -> int:
    """Return failed tasks to their queues; return their number."""

    def act(message: Message) -> None:
        headers = dict(message.headers)
        target = headers.pop("unknown_from", None)
        for name in ("unknown_since", "problem"):
            headers.pop(name, None)
        default: Queue = app.amqp.queues[app.conf.task_default_queue]
        republish(app, message, target if is_target(target) else default, headers)

    return take(app, is_wanted, act)


def repeat(app: Celery, is_wanted: Callable[[Message], bool]) -> int:
    """Return failed tasks to their queues because a person wants it; return their number.

    Their runs count as tried again.
    """
    ids = []

    def note(message: Message) -> bool:
        if wanted := is_wanted(message):
            ids.append(record.clean_id(message.headers.get("id")))
        return wanted

    try:
        return requeue(app, note)
    finally:
        runs = TaskRun.objects.filter(task_id__in=ids, error__startswith=record.GIVEN_UP)
        runs.filter(repeated_at=None).update(repeated_at=timezone.now())


def take(
    app: Celery,
    is_wanted: Callable[[Message], bool],
    act: Callable[[Message], None] = lambda message: None,
) -> int:
    """Remove messages from the queue of failed tasks after calling ``act``; return their number.

    The others go to the end of the queue as new messages: RabbitMQ 4 deletes a message that was
    returned 20 times.
    """
    queue, count = make_failed_queue(app), 0
    with app.connection_for_write() as connection, connection.channel() as channel:
        bound: Any = queue(channel)
        bound.declare()
        # With Redis, an empty queue does not exist.
        for _ in range(bound.queue_declare().message_count):
            if (message := bound.get(no_ack=False)) is None:
                break  # Another worker reads them too.
            if not is_wanted(message):
                republish(app, message, queue, dict(message.headers))
                message.ack()
                continue
            act(message)
            message.ack()
            count += 1
    return count


def is_target(value: Any) -> TypeGuard[tuple[str, str]]:
    """Return whether a header contains an exchange and a routing key."""
    match value:
        case [str(), str()]:
            return True
    return False


@signals.worker_ready.connect
def return_known_tasks(sender: Any, **kwargs: Any) -> None:
    """Requeue the unknown tasks that this worker knows."""

    def run() -> None:
        try:
            count = requeue(
                sender.app,
                lambda message: (
                    "problem" not in message.headers
                    and get_unknown_since(message.headers) > 0
                    and message.headers.get("task") in sender.app.tasks
                ),
            )
        except Exception as error:
            logger.warning("Could not read the failed tasks: %s", type(error).__name__)
        else:
            if count:
                logger.info("Failed tasks that this worker knows: %d requeued", count)

    # In a thread, so that a broker that hangs does not block the worker.
    threading.Thread(target=run, name="failed tasks", daemon=True).start()
