"""Beat: it stops between two passes of the scheduler.

Several beats may run at the same time, as at a deploy or on several hosts: see ``scheduler.py``.
Every way to start beat leads here: ``prodserver beat``, ``celery beat`` and
``celery worker --beat``.
"""

import atexit
import logging
import os
import signal
import sys
from typing import Any

import celery.beat
from celery.apps import beat

from . import heartbeats
from .scheduler import Scheduler

logger = logging.getLogger(__name__)

#: How long beat may take to stop, in seconds; after that it ends at once, with status 1.
STOP_TIMEOUT = 20


class Service(celery.beat.Service):
    """A service that stops between two passes of the scheduler.

    Celery's own service raises SystemExit wherever the signal interrupts it. In a query, the
    exception can get lost, and beat continues.
    """

    def request_stop(self, *args: Any) -> None:
        """Stop after the current pass; a signal handler."""
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
    """Prepare beat, however it was started; exit if its scheduler is another one."""
    if not isinstance(service.scheduler, Scheduler):
        name = type(service.scheduler).__name__
        logger.critical(
            "beat: %s would run schedules that another beat runs too; start beat without --scheduler",
            name,
        )
        sys.exit(1)
    atexit.register(heartbeats.forget)
