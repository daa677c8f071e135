"""Beat: stops between two passes of the scheduler, and waits for a database that is away.

Several beats may run at the same time, as at a deploy or on several hosts: see ``scheduler.py``.
Every way to start beat leads here: ``prodserver beat``, ``celery beat`` and
``celery worker --beat``.
"""

import atexit
import logging
import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

import celery.beat
from celery.apps import beat
from django.db import DatabaseError, InterfaceError, close_old_connections, connections

from . import heartbeats
from .scheduler import Scheduler

logger = logging.getLogger(__name__)

#: Time between two attempts to reach the database, in seconds.
RETRY_INTERVAL = 1

#: How soon beat notices that it has to stop, in seconds.
STOP_INTERVAL = 0.2

#: How long beat may take to stop, in seconds; after that it ends at once, with status 1.
STOP_TIMEOUT = 20


class Service(celery.beat.Service):
    """A service that stops between two passes of the scheduler.

    Celery's own service raises SystemExit wherever the signal interrupts it. In a query, the
    exception can get lost, and beat continues.
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
    """Beat that logs through Django's handlers."""

    Service = Service

    def install_sync_handler(self, service: Any) -> None:
        """Stop at SIGTERM and SIGINT."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, service.request_stop)

    def start_scheduler(self) -> None:  # type: ignore[override]
        """Set up the logs, then start to dispatch."""
        self.setup_logging()
        super().start_scheduler()


def prepare(service: Any) -> None:
    """Guard each pass of the scheduler, however beat was started; exit if it is another one."""
    if not isinstance(service.scheduler, Scheduler):
        name = type(service.scheduler).__name__
        logger.critical(
            "beat: %s would run schedules that another beat runs too; start beat without --scheduler",
            name,
        )
        sys.exit(1)
    scheduler: Any = service.scheduler
    scheduler.tick = guard(scheduler.tick)
    atexit.register(heartbeats.forget)


def guard(tick: Callable[..., float]) -> Callable[..., float]:
    """Return a pass that records a heartbeat, and that waits for a database that is away."""
    logged = None

    def guarded(*args: Any, **kwargs: Any) -> float:
        nonlocal logged
        try:
            close_old_connections()
            heartbeats.record("beat")
            wait = tick(*args, **kwargs)
        except (DatabaseError, InterfaceError) as error:
            connections.close_all()
            problem = f"the database does not respond ({type(error).__name__})"
            if logged != problem:
                logger.warning("beat: Waiting: %s", problem)
            logged = problem
            return RETRY_INTERVAL
        logged = None
        return wait

    return guarded
