"""Beat with a standby: one beat dispatches, the others wait until it has ended.

During a deploy, the old and the new beat overlap. The beat that holds a lease dispatches. Another
beat takes over when the lease is released, or has not been renewed for ``LEASE_SECONDS`` because
its holder was killed, hangs, or is disconnected. All commands use the lease: ``prodserver beat``,
``celery beat`` with any scheduler, and ``celery worker --beat``.
"""

import atexit
import contextlib
import logging
import os
import signal
import sys
import threading
import time
from typing import Any, NoReturn

import celery.beat
from celery import signals
from celery.apps import beat
from django.db import DatabaseError, InterfaceError, close_old_connections, connections

from . import heartbeats
from .leases import LEASE_SECONDS, LostLease
from .scheduler import Scheduler, lease

logger = logging.getLogger(__name__)

#: Time between two attempts to take the lease or to reach the database, in seconds.
RETRY_INTERVAL = 1

#: How soon beat notices that it has to stop, in seconds.
STOP_INTERVAL = 0.2

#: How long beat may take to stop, in seconds; after that it ends at once, with status 1.
STOP_TIMEOUT = 20

#: When the last pass ended, on the clock of ``time.monotonic()``.
_passed_at: float = 0


class Service(celery.beat.Service):
    """A service that stops between two passes of the scheduler, never in the middle of one.

    Celery's own service raises SystemExit wherever the signal interrupts it. In a query, the
    exception can get lost, and beat continues.
    """

    stopping = False

    def get_scheduler(self, *args: Any, **kwargs: Any) -> Any:
        """Return the scheduler; each pass includes the wait for the next one."""
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
        # A server that does not respond may block the pass.
        signal.signal(signal.SIGALRM, lambda *_: os._exit(1))
        signal.alarm(STOP_TIMEOUT)


class Beat(beat.Beat):
    """Beat that waits for the lease before it starts."""

    Service = Service

    def install_sync_handler(self, service: Any) -> None:
        """Stop at SIGTERM and SIGINT."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, service.request_stop)

    def start_scheduler(self) -> None:  # type: ignore[override]
        """Log through Django's handlers, wait for the lease, then start to dispatch."""
        self.setup_logging()
        wait_for_lease()
        super().start_scheduler()


def lead(sender: Any) -> None:
    """Guard each pass of the scheduler, regardless of how beat was started."""
    if not lease.number:
        wait_for_lease()
        # It may have read the schedules before the wait.
        del sender.scheduler
    if not isinstance(sender.scheduler, Scheduler):
        signals.before_task_publish.connect(hold_back_without_lease)
    sender.scheduler.tick = guard(sender.scheduler.tick)
    atexit.register(release)
    global _passed_at
    _passed_at = time.monotonic()
    threading.Thread(target=watch, daemon=True).start()


def wait_for_lease() -> None:
    """Wait until the lease is held; exit with status 0 at SIGTERM or SIGINT."""
    handlers = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGINT):
            handlers[number] = signal.signal(number, lambda *_: sys.exit(0))
    logged = None
    while True:
        try:
            close_old_connections()
            heartbeats.record("beat")
            if lease.acquire():
                break
            reason = "another beat is running"
        except (DatabaseError, InterfaceError) as error:
            reason = f"the database does not respond ({type(error).__name__})"
            connections.close_all()
        if logged != reason:
            logger.warning("beat: Standing by: %s", reason)
            logged = reason
        time.sleep(RETRY_INTERVAL)
    for number, handler in handlers.items():
        signal.signal(number, handler)


def guard(tick: Any) -> Any:
    """Return a pass that renews the lease, and waits if the database is unavailable."""
    logged = None

    def guarded(*args: Any, **kwargs: Any) -> float:
        global _passed_at
        nonlocal logged
        try:
            close_old_connections()
            lease.renew()
            heartbeats.record("beat")
            wait: float = tick(*args, **kwargs)
        except LostLease:
            restart("another beat has taken over")
        except (DatabaseError, InterfaceError) as error:
            connections.close_all()
            problem = f"the database does not respond ({type(error).__name__})"
            if logged != problem:
                logger.warning("beat: Waiting: %s", problem)
            logged, wait = problem, RETRY_INTERVAL
        else:
            logged = None
        _passed_at = time.monotonic()
        return wait

    return guarded


def hold_back_without_lease(**kwargs: Any) -> None:
    """Restart the process instead of dispatching a task if another beat has taken over."""
    try:
        lease.renew()
    except LostLease:
        restart("another beat has taken over")
    except (DatabaseError, InterfaceError):
        restart("the database does not respond")


def watch() -> None:
    """Restart the process if a pass hangs: another beat may have taken over."""
    while True:
        time.sleep(1)
        if time.monotonic() - _passed_at > LEASE_SECONDS:
            restart(f"no pass ended for {LEASE_SECONDS} seconds")


def release() -> None:
    """Let another beat take over immediately; called when the process exits."""
    with contextlib.suppress(DatabaseError, InterfaceError):
        lease.release()
    heartbeats.forget()


def restart(reason: str) -> NoReturn:
    """Replace this process with a new one on standby, with the same process id."""
    logger.warning("beat: Restarting: %s", reason)
    logging.shutdown()
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
