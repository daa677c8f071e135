"""Backends of ``prodserver`` beside those that django-prodserver brings."""

import logging
import os
import signal
import sys
import time

from celery.signals import before_task_publish
from django.db import DatabaseError, connection
from django_prodserver.backends.workers.celery import CeleryBeat

from . import locks

logger = logging.getLogger(__name__)

#: How often a beat that stands by tries to take over, in seconds.
INTERVAL = 1


class StandbyBeat(CeleryBeat):
    """Beat that waits until no other beat runs: at a deploy the old and the new one overlap.

    The beat that holds a lock dispatches; the others stand by and take over as soon as it
    is gone. The lock has a database connection of its own. Where that is lost another beat
    may have taken over, so this one dispatches nothing more: it starts afresh and stands by.
    """

    def start_server(self, *args):
        """Stand by, then run beat until SIGTERM."""
        lock = locks.lock("beat", connection.copy())
        stand_by(lock)

        def give_way(**kwargs):
            if not lock.is_held():
                start_afresh()

        before_task_publish.connect(give_way, weak=False)
        super().start_server(*args)


def stand_by(lock):
    """Wait until the lock is held; end with status 0 at SIGTERM or SIGINT."""
    before = {
        number: signal.signal(number, lambda *_: sys.exit(0))
        for number in (signal.SIGTERM, signal.SIGINT)
    }
    told = None
    while True:
        try:
            if lock.acquire():
                break
            waiting_for = "another beat runs"
        except DatabaseError as error:
            waiting_for = f"the database does not answer ({type(error).__name__})"
            lock.connection.close()
        if told != waiting_for:
            logger.warning("beat: Standing by: %s", waiting_for)
            told = waiting_for
        time.sleep(INTERVAL)
    for number, handler in before.items():
        signal.signal(number, handler)


def start_afresh():
    """Replace this process by a new one, which keeps its number and forgets what is due.

    An ordinary end would first note the schedule that was just held back as run.
    """
    logger.warning("beat: The connection that holds the lock is lost; starting afresh")
    logging.shutdown()
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
