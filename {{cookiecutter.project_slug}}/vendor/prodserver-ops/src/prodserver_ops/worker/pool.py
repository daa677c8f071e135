"""The pool of processes of a worker whose broker has no event loop, such as PGMQ.

Its processes share a pipe for tasks. With Billiard, one of them holds the pipe's lock while it waits, and
a lock outlives a process that is killed: then no other process gets a task. Here they wait without
the lock, and the system releases the lock of a process that ends.
"""

import fcntl
import tempfile
from functools import partial
from typing import Any

from billiard import pool
from celery.concurrency import prefork


class ProcessLock:
    """A lock between processes that the system releases when the process that holds it ends.

    https://pubs.opengroup.org/onlinepubs/9799919799/functions/fcntl.html
    """

    def __init__(self) -> None:
        self.file = tempfile.TemporaryFile()

    def __enter__(self) -> None:
        self.acquire()

    def __exit__(self, *error: object) -> None:
        fcntl.lockf(self.file, fcntl.LOCK_UN)

    def acquire(self) -> None:
        """Wait until no other process holds the lock."""
        fcntl.lockf(self.file, fcntl.LOCK_EX)


class Pool(pool.Pool):
    """A pool whose processes may be killed while they wait for a task."""

    _inqueue: Any
    _outqueue: Any

    def _setup_queues(self) -> None:
        super()._setup_queues()  # type: ignore[misc]
        self._inqueue._rlock = ProcessLock()
        self._outqueue._wlock = ProcessLock()
        self._inqueue.get_payload = partial(read, self._inqueue)


def read(queue: Any) -> bytes:
    """Wait for the next message of a queue, and return it."""
    while True:
        queue._reader.poll(None)
        with queue._rlock:
            # Another process may have been faster.
            if queue._reader.poll(0):
                message: bytes = queue._reader.recv_bytes()
                return message


def install() -> None:
    """Let workers use this pool in place of Billiard's."""
    prefork.TaskPool.BlockingPool = Pool
