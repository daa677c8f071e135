"""Messages that no worker could run, in a queue that no worker consumes.

They are tasks that killed worker after worker, and tasks that no worker knows, as after a
rollback. ``doctor`` reports them and ``python manage.py requeue`` runs them again. A worker that
knows a task returns its messages when it starts.
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

#: How long the message of an unknown task goes back to its queue, in seconds: while a deploy
#: replaces the workers, another one may know it.
UNKNOWN_SECONDS = 120

#: How long a worker keeps such a message before it goes back, in seconds.
HOLD_SECONDS = 0.5

#: The properties of a message that stay the same.
KEPT_PROPERTIES = ("correlation_id", "reply_to", "priority", "delivery_mode")


class Consumer(CeleryConsumer):
    """The part of a worker that receives messages; it discards none of an unknown task."""

    def on_unknown_task(self, body: Any, message: Message, exc: Exception) -> None:
        """Return the message for another worker; after ``UNKNOWN_SECONDS`` give it up."""
        name = message.headers.get("task")
        since = float(message.headers.get("unknown_since") or 0)
        if not since:
            logger.warning("%s is unknown to this worker; its message goes back", name)
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
            # It is delivered again when the worker ends or connects again.
            logger.warning("A message did not go back: %s", type(error).__name__)


def republish(
    app: Celery, message: Message, target: Queue | tuple[str, str], headers: dict[str, Any]
) -> None:
    """Publish a message as it is to a queue, or to an exchange with a routing key."""
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
    """Return failed tasks to their queues; return how many."""
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
    """Return the messages whose task this worker knows; another one gave them up."""

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
            logger.warning("Failed tasks were not looked at: %s", type(error).__name__)
        else:
            if count:
                logger.info("Tasks that were unknown before: %d returned", count)

    # A broker that hangs does not hold up the worker.
    threading.Thread(target=run, daemon=True).start()
