"""Beat with a standby: one beat dispatches, the others wait until it is gone.

At a deploy the old and the new beat overlap. The beat that holds a lock dispatches; the
others wait for the lock. Every way to start beat takes it: ``prodserver beat``,
``celery beat`` with any scheduler, and ``celery worker --beat``.
"""

import logging
import os
import signal
import sys
import threading
import time
from typing import Any

import celery.beat
from celery import signals
from celery.apps import beat
from django.db import DatabaseError, connection

from .locks import Lock, get_lock

logger = logging.getLogger(__name__)

#: Time between two attempts to take the lock, in seconds.
RETRY_INTERVAL = 1

#: How soon beat notices that it has to stop, in seconds.
STOP_INTERVAL = 0.2

#: How long beat may take to stop, in seconds; after that it ends at once, with status 1.
STOP_TIMEOUT = 20

_lock: Lock | None = None


class Service(celery.beat.Service):
    """A service that stops between two passes of the scheduler, never in the middle of one.

    Celery's own raises SystemExit wherever a signal finds it. Raised in a query, that can get
    lost, and beat continues.
    """

    stopping = False

    def get_scheduler(self, *args: Any, **kwargs: Any) -> Any:
        """Return the scheduler; each of its passes ends with the wait until the next."""
        scheduler: Any = super().get_scheduler(*args, **kwargs)
        tick = scheduler.tick

        def tick_and_wait(*args: Any, **kwargs: Any) -> float:
            due = time.monotonic() + (tick(*args, **kwargs) or 0)
            while not self.stopping and (left := due - time.monotonic()) > 0:
                time.sleep(min(left, STOP_INTERVAL))
            return 0

        scheduler.tick = tick_and_wait
        return scheduler

    def request_stop(self, *args: Any) -> None:
        """Stop after the current pass; a signal handler."""
        self.stopping = True
        self._is_shutdown.set()  # type: ignore[attr-defined]
        # A server that does not respond may hold up the pass.
        signal.signal(signal.SIGALRM, lambda *_: os._exit(1))
        signal.alarm(STOP_TIMEOUT)


class Beat(beat.Beat):
    """Beat that waits for the lock before it reads the schedules."""

    Service = Service

    def install_sync_handler(self, service: Any) -> None:
        """Stop at SIGTERM and SIGINT."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, service.request_stop)

    def start_scheduler(self) -> None:  # type: ignore[override]
        """Log through Django's handlers, wait for the lock, then start to dispatch."""
        self.setup_logging()
        become_leader()
        super().start_scheduler()


@signals.beat_init.connect
def become_leader_late(sender: Any, **kwargs: Any) -> None:
    """Wait for the lock where beat was started in another way, such as inside a worker."""
    if _lock is None:
        become_leader()
        # It has read the schedules before the wait.
        del sender.scheduler


def become_leader() -> None:
    """Wait for the lock; from then on hold back every dispatch if the lock is lost.

    The lock has a database connection of its own. If that is lost, another beat may have
    taken over, so this process restarts and waits for the lock again.
    """
    global _lock
    lock = get_lock("beat", connection.copy())
    wait_for(lock)
    _lock = lock
    signals.before_task_publish.connect(hold_back_without_lock)


def hold_back_without_lock(**kwargs: Any) -> None:
    """Restart the process instead of dispatching a task if the lock is lost."""
    if _lock is not None and not _lock.is_held():
        restart()


def wait_for(lock: Lock) -> None:
    """Wait until the lock is held; exit with status 0 at SIGTERM or SIGINT."""
    handlers = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGINT):
            handlers[number] = signal.signal(number, lambda *_: sys.exit(0))
    logged = None
    while True:
        try:
            if lock.acquire():
                break
            reason = "another beat is running"
        except DatabaseError as error:
            reason = f"the database does not respond ({type(error).__name__})"
            lock.connection.close()
        if logged != reason:
            logger.warning("beat: Standing by: %s", reason)
            logged = reason
        time.sleep(RETRY_INTERVAL)
    for number, handler in handlers.items():
        signal.signal(number, handler)


def restart() -> None:
    """Replace this process with a new one that has the same process id.

    A normal exit would first record the schedule that was held back as run.
    """
    logger.warning("beat: Lost the connection that holds the lock; restarting")
    logging.shutdown()
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
