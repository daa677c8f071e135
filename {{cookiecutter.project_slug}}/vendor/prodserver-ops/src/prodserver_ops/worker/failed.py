"""Failed tasks: their messages are in a queue that no worker consumes.

These tasks have killed several workers, or are unknown to all workers, for example after a
rollback. ``doctor`` reports them, and ``python manage.py requeue`` runs them again. When a worker
starts, it also requeues the unknown tasks that it knows.
"""

import logging
import threading
import time
from collections.abc import Callable
from typing import Any

from celery import Celery, signals
from celery.worker.consumer import Consumer as CeleryConsumer
from kombu import Queue
from kombu.message import Message

from .app import make_failed_queue

logger = logging.getLogger(__name__)

#: How long the message of an unknown task returns to its queue, in seconds. During a deploy,
#: another worker may know the task.
UNKNOWN_SECONDS = 120

#: How long a worker holds such a message before returning it, in seconds.
HOLD_SECONDS = 0.5

#: The properties of a message that are preserved.
KEPT_PROPERTIES = ("correlation_id", "reply_to", "priority", "delivery_mode")


class Consumer(CeleryConsumer):
    """A worker's consumer. Unlike Celery's, it does not discard messages of unknown tasks."""

    def on_unknown_task(self, body: Any, message: Message, exc: Exception) -> None:
        """Return the message to its queue; after ``UNKNOWN_SECONDS``, give up."""
        name = message.headers.get("task")
        since = float(message.headers.get("unknown_since") or 0)
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
            message.ack()
        except Exception as error:
            # The broker redelivers it when the worker exits or reconnects.
            logger.warning("Could not return a message to its queue: %s", type(error).__name__)


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
    with app.producer_pool.acquire(block=True) as producer:
        producer.publish(
            message.body,
            content_type=message.content_type,
            content_encoding=message.content_encoding,
            headers=headers,
            **options,
        )


def requeue(app: Celery, is_wanted: Callable[[Message], bool]) -> int:
    """Return failed tasks to their queues; return their number."""
    queue, count = make_failed_queue(app), 0
    with app.connection_for_write() as connection, connection.channel() as channel:
        bound = queue(channel)
        bound.declare()
        kept = []
        while (message := bound.get(no_ack=False)) is not None:
            if not is_wanted(message):
                kept.append(message)
                continue
            headers = dict(message.headers)
            target = headers.pop("unknown_from", None)
            headers.pop("unknown_since", None)
            default: Queue = app.amqp.queues[app.conf.task_default_queue]
            republish(app, message, (target[0], target[1]) if target else default, headers)
            message.ack()
            count += 1
        for message in kept:
            message.requeue()
    return count


@signals.worker_ready.connect
def return_known_tasks(sender: Any, **kwargs: Any) -> None:
    """Requeue the unknown tasks that this worker knows."""

    def run() -> None:
        try:
            count = requeue(
                sender.app,
                lambda message: (
                    "unknown_since" in message.headers
                    and message.headers["task"] in sender.app.tasks
                ),
            )
        except Exception as error:
            logger.warning("Could not read the failed tasks: %s", type(error).__name__)
        else:
            if count:
                logger.info("Failed tasks that this worker knows: %d requeued", count)

    # In a thread, so that a broker that hangs does not block the worker.
    threading.Thread(target=run, daemon=True).start()
