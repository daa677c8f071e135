"""The consumer of a worker: what happens to a message before its task runs."""

import logging
from collections.abc import Callable
from typing import Any

from celery.exceptions import WorkerShutdown
from kombu.message import Message

from .. import broker
from ..core.headers import get_integer
from . import failed
from .app import MAX_DELIVERIES, make_failed_queue

logger = logging.getLogger(__name__)


class Consumer(failed.Consumer):
    """A consumer that gives up a message whose task may be killing its workers."""

    channel_errors: tuple[type[Exception], ...]

    def start(self) -> None:
        """Consume until the worker stops; exit with one line if a queue cannot be used."""
        try:
            super().start()
        except self.channel_errors as error:
            problem = broker.explain(self.app, error)
            if problem is None:
                raise
            logger.critical("%s", problem)
            raise WorkerShutdown(1) from error

    def create_task_handler(self, *args: Any, **kwargs: Any) -> Callable[[Message], Any]:
        """Return the function that is called for each message."""
        handle = super().create_task_handler(*args, **kwargs)

        def on_task_received(message: Message) -> None:
            if get_deliveries(message) >= MAX_DELIVERIES:
                self.give_up_task(message)
            else:
                handle(message)

        return on_task_received

    def give_up_task(self, message: Message) -> None:
        """Move a message that was delivered too often to the queue of failed tasks.

        Each return counts as a delivery, and RabbitMQ may delete the message after the next one.
        A task that counts its attempts itself gets a new message in the same queue.
        """
        name = str(message.headers.get("task"))
        target: Any = message.delivery_info["exchange"], message.delivery_info["routing_key"]
        headers = message.headers
        task = self.app.tasks.get(name)
        if getattr(task, "max_deliveries", MAX_DELIVERIES) is not None:
            logger.error("%s was delivered %d times and is given up", name, MAX_DELIVERIES)
            target, headers = make_failed_queue(self.app), headers | {"unknown_from": target}
        try:
            failed.republish(self.app, message, target, headers)
            message.ack()
        except Exception as error:
            # The broker delivers it again when the worker exits or reconnects.
            logger.warning("Could not move a message: %s", type(error).__name__)


def get_deliveries(message: Message) -> int:
    """Return how often the message was delivered before, or 0 if the broker does not count."""
    return get_integer(message.headers or {}, "x-delivery-count") or 0
