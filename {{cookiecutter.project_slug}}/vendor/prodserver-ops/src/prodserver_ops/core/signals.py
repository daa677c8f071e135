"""Signals of the operating system."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def deferred_sigterm() -> Iterator[None]:
    """Defer SIGTERM until the end of the block.

    Celery sends it to a running task when the connection to the broker is lost.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
