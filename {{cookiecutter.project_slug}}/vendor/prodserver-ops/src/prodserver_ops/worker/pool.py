"""The pools of processes of a worker.

That of a worker whose broker has no event loop, such as PGMQ, is ``Pool``. Its processes share a pipe
for tasks. With Billiard, one of them holds the pipe's lock while it waits, and a lock outlives a
process that is killed: then no other process gets a task. Here they wait without the lock, and the
system releases the lock of a process that ends. A job that a process had read, but not accepted, when
it was killed is queued again; Billiard would wait for it for ever.

The job of a process that was killed is lost when all that the process has written is read; Billiard
waits ten seconds for its result. As many of these jobs as processes would make the worker deaf.
"""

import fcntl
import tempfile
import threading
import time
from functools import partial
from typing import Any

from billiard import pool
from celery.concurrency import asynpool, prefork

#: The state of a job whose process was lost.
LOST = "lost"

#: After how many seconds a job is queued again that a process has read, but not accepted.
READ_TIMEOUT = 10


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
    _result_handler: Any
    read_timeout: float = READ_TIMEOUT
    #: When each job was first seen that a process has read, but not accepted.
    read_at: dict[Any, float]

    def _setup_queues(self) -> None:
        super()._setup_queues()  # type: ignore[misc]
        self._inqueue._rlock = ProcessLock()
        self._outqueue._wlock = ProcessLock()
        self._inqueue.get_payload = partial(read, self._inqueue)
        self.read_at = {}

    def create_result_handler(self, **options: Any) -> Any:
        """Return the thread that reads the results, and what follows them."""
        handler: Any = super().create_result_handler(**options)
        handler.state_handlers[LOST] = self.end_lost
        return handler

    def on_job_process_lost(self, job: Any, pid: int, exitcode: int) -> None:
        """Note behind all that a lost process has written that its job is lost."""
        if threading.current_thread() is self._result_handler:
            # The worker stops; this thread would wait for itself.
            super().on_job_process_lost(job, pid, exitcode)
        else:
            self._outqueue.put((LOST, (job._job, exitcode)))

    def end_lost(self, number: int, exitcode: int) -> None:
        """End a job whose process was lost, unless its result has been read."""
        job = self._cache.get(number)
        if job is not None and not job.ready():
            self.mark_as_worker_lost(job, exitcode)

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
        pipes = self._inqueue, self._outqueue
        if not self._taskqueue.empty() or any(pipe._reader.poll(0) for pipe in pipes):
            self.read_at.clear()  # They may be in a pipe, or have been accepted.
            return
        now = time.monotonic()
        jobs = [job for job in list(self._cache.values()) if hasattr(job, "call")]
        read = [job for job in jobs if not (job.accepted() or job.ready())]
        self.read_at = {job: self.read_at.get(job, now) for job in read}
        for job, since in self.read_at.items():
            if now - since > self.read_timeout:
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


class EventPool(asynpool.AsynPool):
    """The pool of a worker whose broker has an event loop."""

    def _track_child_process(self, process: Any, hub: Any) -> None:
        """Watch a process, also one that has ended while the connection was lost."""
        if vars(process).get("_sentinel_poll", 0) is None:
            # Celery would end the worker: "file descriptor is None".
            vars(process).pop("_sentinel_poll")
        super()._track_child_process(process, hub)  # type: ignore[misc]


def install() -> None:
    """Let workers use these pools."""
    prefork.TaskPool.Pool = EventPool
    prefork.TaskPool.BlockingPool = Pool
