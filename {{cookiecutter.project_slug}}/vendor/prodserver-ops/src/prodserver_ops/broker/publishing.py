"""Publish messages, with a time limit in requests.

A thread of the web process publishes the messages. A request waits for it at most
``REQUEST_TIMEOUT`` in total, even if the broker does not respond. Store data that must not be lost
in the database, where a schedule can find it again.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import AbstractContextManager, contextmanager
from contextvars import copy_context
from functools import partial
from queue import Full, Queue
from typing import Any

from celery import Celery
from kombu import Producer
from kombu.exceptions import OperationalError

logger = logging.getLogger(__name__)

#: How long a request waits until its messages are published, in seconds.
REQUEST_TIMEOUT = 1

#: Maximum number of messages that wait for the thread.
MAX_WAITING = 1000

#: How long an exiting process waits until its messages are published, in seconds.
EXIT_TIMEOUT = 2


class Request(threading.local):
    """The request of the current thread.

    ``left`` is how long it may still wait, or None. ``is_separate`` is whether messages are
    published at once, even if the broker is the database of the current transaction.
    """

    left: float | None = None
    is_separate = False


request = Request()


def start_request(**kwargs: Any) -> None:
    """Start counting the time; a receiver of ``request_started``."""
    request.left = REQUEST_TIMEOUT


def finish_request(**kwargs: Any) -> None:
    """Stop counting; a receiver of ``request_finished``."""
    request.left = None


@contextmanager
def separately() -> Iterator[None]:
    """Publish messages at once during the block, whatever happens to the current transaction."""
    request.is_separate, before = True, request.is_separate
    try:
        yield
    finally:
        request.is_separate = before


class Publisher:
    """A thread that runs functions one after another; it starts with the first one."""

    def __init__(self) -> None:
        self.items: Queue[tuple[Callable[[], Any], Future[Any]]] = Queue(MAX_WAITING)
        self.lock = threading.Lock()
        self.thread: threading.Thread | None = None

    def submit(self, function: Callable[[], Any]) -> "Future[Any]":
        """Queue a function for the thread; raise OperationalError if too many are waiting."""
        future: Future[Any] = Future()
        with self.lock:
            if self.thread is None:
                # A daemon thread does not keep the process alive.
                self.thread = threading.Thread(target=self._run, daemon=True)
                self.thread.start()
        try:
            self.items.put_nowait((function, future))
        except Full as error:
            raise OperationalError(f"{MAX_WAITING} messages are already waiting") from error
        return future

    def flush(self, seconds: float) -> None:
        """Wait until all functions have run, or the time is up."""
        deadline = time.monotonic() + seconds
        while self.items.unfinished_tasks and time.monotonic() < deadline:
            time.sleep(0.05)

    def _run(self) -> None:
        while True:
            function, future = self.items.get()
            try:
                future.set_result(function())
            except Exception as error:
                future.set_exception(error)
            finally:
                self.items.task_done()


publisher = Publisher()


def publish(function: Callable[[], Any]) -> Any:
    """Run a function that publishes a message, and return its result.

    In a request, raises OperationalError when its time is up; the message may still be published
    later.
    """
    if request.left is None:
        return function()
    start = time.monotonic()
    # With the id of the request
    future = publisher.submit(partial(copy_context().run, function))
    try:
        return future.result(max(0, request.left))
    except TimeoutError as error:
        if future.done():
            raise
        raise OperationalError("the broker does not respond") from error
    finally:
        request.left = max(0, request.left - (time.monotonic() - start))


def open_batch(app: Celery) -> AbstractContextManager[Producer]:
    """Return the context manager of a producer for many messages."""
    producer: AbstractContextManager[Producer] = app.producer_pool.acquire(block=True)
    return producer


def try_to_publish(name: str, function: Callable[[], Any]) -> None:
    """Run a function that publishes a message; if it fails, log the name and the error.

    In a request, returns when its time is up; the message may still be published later.
    """

    def run() -> None:
        try:
            function()
        except Exception as error:
            logger.error("%s is not queued: %s", name, error)

    try:
        publish(run)
    except OperationalError as error:
        logger.warning("%s is not queued yet: %s", name, error)
