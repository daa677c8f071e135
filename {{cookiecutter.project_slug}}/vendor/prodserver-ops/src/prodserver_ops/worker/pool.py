"""The pool of processes of a worker whose broker has no event loop, such as PGMQ.

Its processes share a pipe for tasks. With Billiard, one of them holds the pipe's lock while it waits, and
a lock outlives a process that is killed: then no other process gets a task. Here they wait without
the lock, and the system releases the lock of a process that ends. A job that a process had read, but
not accepted, when it was killed is queued again; Billiard would wait for it for ever.
"""

import fcntl
import tempfile
import time
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
    """A pool whose processes may be killed while they wait for a task, or read it."""

    _inqueue: Any
    _outqueue: Any
    _taskqueue: Any
    _cache: dict[int, Any]
    lost_worker_timeout: float
    #: When each job was first seen that a process has read, but not accepted.
    read_at: dict[Any, float]

    def _setup_queues(self) -> None:
        super()._setup_queues()  # type: ignore[misc]
        self._inqueue._rlock = ProcessLock()
        self._outqueue._wlock = ProcessLock()
        self._inqueue.get_payload = partial(read, self._inqueue)
        self.read_at = {}

    def apply_async(
        self, func: Any, args: Any = (), kwds: Any = None, *others: Any, **options: Any
    ) -> Any:
        """Queue a job, and keep what it needs to be queued again."""
        job: Any = super().apply_async(func, args, kwds or {}, *others, **options)
        if job is not None:
            job.call = func, args, kwds or {}
        return job

    def _maintain_pool(self) -> None:
        super()._maintain_pool()  # type: ignore[misc]
        self.queue_lost()

    def queue_lost(self) -> None:
        """Queue jobs again whose process was lost after it had read them."""
        if not self._taskqueue.empty() or self._inqueue._reader.poll(0):
            self.read_at.clear()  # They may be in the pipe.
            return
        now = time.monotonic()
        jobs = [job for job in list(self._cache.values()) if hasattr(job, "call")]
        read = [job for job in jobs if not (job.accepted() or job.ready())]
        self.read_at = {job: self.read_at.get(job, now) for job in read}
        for job, since in self.read_at.items():
            if now - since > self.lost_worker_timeout:
                self._taskqueue.put(([(pool.TASK, (job._job, None, *job.call))], None))


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
