"""The consumer of a worker: what happens to a message before its task runs."""

import logging
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from celery.exceptions import WorkerShutdown
from celery.worker.consumer.consumer import Consumer as CeleryConsumer
from django.utils import timezone
from kombu.message import Message

from .. import broker
from ..core.headers import get_integer
from . import delayed, failed

logger = logging.getLogger(__name__)

#: After how many deliveries a message is replaced by a new one: RabbitMQ 4 deletes it after 20.
MAX_DELIVERIES = 10

#: How long storing a task that is not due may take, in seconds.
STORE_TIMEOUT = 5

#: The header of a task that its rate limit has delayed.
POSTPONED = "postponed"


class Consumer(failed.Consumer):
    """A consumer that holds nothing that is not due, and loses nothing that is delivered often."""

    channel_errors: tuple[type[Exception], ...]
    qos: Any
    task_consumer: Any
    call_soon_ack: Callable[..., Any]
    keeper: delayed.Keeper
    task_buckets: dict[str, Any]
    #: When the next task of a name with a rate limit may start, by the clock of ``time.monotonic()``.
    next_starts: dict[str, float]

    class Blueprint(CeleryConsumer.Blueprint):  # type: ignore[misc, valid-type]
        """The parts of Celery's consumer, without delays in RabbitMQ."""

        default_steps = [
            step
            for step in CeleryConsumer.Blueprint.default_steps
            if not step.endswith(":DelayedDelivery")
        ]

    def start(self) -> None:
        """Consume until the worker stops; exit with one line if a queue cannot be used."""
        self.keeper, self.next_starts = delayed.Keeper(self.app), {}
        try:
            super().start()
        except self.channel_errors as error:
            problem = broker.explain(self.app, error)
            if problem is None:
                raise
            logger.critical("%s", problem)
            raise WorkerShutdown(1) from error
        finally:
            self.keeper.stop()

    def divert(self, message: Message) -> bool:
        """Take a message that was delivered often, or whose task is not due."""
        if get_deliveries(message) >= MAX_DELIVERIES:
            self.replace(message, message.headers)
            return True
        return self.store(message) or self.postpone(message)

    # Tasks that are not due

    def store(self, message: Message) -> bool:
        """Store a message whose task is not due; return whether it is, or will be."""
        try:
            headers = message.headers if "task" in message.headers else message.decode()
            if not headers.get("eta"):
                return False
            due = delayed.get_due(headers)
            if due is None or due < timezone.now() + timedelta(seconds=delayed.HOLD):
                return False
            if headers["task"] not in self.app.tasks:
                return False
            row = delayed.make_row(message, headers, due, self.find_queue(message))
            if delayed.get_attempt(row.key, message.headers):
                # It was published because it is due; the clock of this worker is late, and Celery
                # would hold it. claim() finds the row by the other header.
                del message.headers["eta"]
                return False
        except Exception:
            # Celery logs what is wrong with the message.
            return False
        entry = Entry(message, is_extra=self.keeper.entries.qsize() < delayed.BATCH)
        if entry.is_extra:
            # Receive others meanwhile, if the broker allows it.
            self.qos.increment_eventually()
        entry.timer = self.timer.call_after(STORE_TIMEOUT, self.end_storing, (entry, False))
        self.keeper.add(row, lambda stored: self.call_soon_ack(self.end_storing, entry, stored))
        return True

    def end_storing(self, entry: "Entry", stored: bool) -> None:
        """Acknowledge a message; first return it to its queue if it could not be stored."""
        try:
            # The timer and the thread may both call this.
            message = entry.messages.pop()
        except IndexError:
            return
        entry.timer.cancel()
        if entry.is_extra:
            self.qos.decrement_eventually()
        if stored:
            failed.acknowledge(message)
        else:
            self.replace(message, message.headers)

    def find_queue(self, message: Message) -> str:
        """Return the name of the queue that a message came from."""
        info = message.delivery_info
        exchange, routing_key = info.get("exchange"), info.get("routing_key")
        for name, tag in self.task_consumer._active_tags.items():
            if tag == info.get("consumer_tag"):
                return str(name)
        for name, queue in self.app.amqp.queues.consume_from.items():
            if routing_key == name or (exchange, routing_key) == (
                queue.exchange.name,
                queue.routing_key,
            ):
                return str(name)
        return str(self.app.conf.task_default_queue)

    # Tasks with a rate limit

    def postpone(self, message: Message) -> bool:
        """Delay a task whose rate limit is reached; return whether it is delayed.

        Celery would hold the message, and a worker that holds a few of them receives no others.
        """
        name = str(message.headers.get("task"))
        if (bucket := self.task_buckets.get(name)) is None:
            return False
        if POSTPONED in message.headers:
            # It is due, unless another one has been faster.
            if bucket.expected_time(len(bucket.contents) + 1) < delayed.HOLD:
                return False
        now = time.monotonic()
        start = max(self.next_starts.get(name, now), now)
        self.next_starts[name] = start + 1 / bucket.fill_rate
        if start - now < delayed.HOLD:
            return False
        eta = timezone.now() + timedelta(seconds=start - now)
        self.replace(message, message.headers | {"eta": eta.isoformat(), POSTPONED: True})
        return True

    # Messages that are delivered often

    def replace(self, message: Message, headers: dict[str, Any]) -> None:
        """Put a new message into the same queue.

        Each return counts as a delivery, also of a task that was never started.
        """
        info = message.delivery_info
        try:
            failed.republish(
                self.app, message, (info["exchange"], info["routing_key"]), headers
            )
        except Exception as error:
            logger.warning("Could not replace a message: %s", type(error).__name__)
            self.try_again(self.replace, message, headers)
        else:
            failed.acknowledge(message)


class Entry:
    """A message that is being stored; ``messages`` is empty when that has ended."""

    timer: Any

    def __init__(self, message: Message, is_extra: bool) -> None:
        self.messages = [message]
        self.is_extra = is_extra


def get_deliveries(message: Message) -> int:
    """Return how often the message was delivered before, or 0 if the broker does not count."""
    return get_integer(message.headers or {}, "x-delivery-count") or 0
