"""Runs of schedules: a worker runs the first message of a run that it gets, and notes its end."""

import logging
from typing import Any

from django.db import DatabaseError, InterfaceError
from django.db.models import Q
from django.db.models.functions import Now

from ..core.headers import get_integer
from ..models import ScheduleRun

logger = logging.getLogger(__name__)


def claim(headers: dict[str, Any]) -> bool:
    """Record that a worker runs a message; return whether it may.

    It may not if another message of the same run has been started. The same message may start
    again if its worker was lost. While the database is unavailable, every message may run,
    because a repeated run is less harmful than a missing one.
    """
    pk, attempt = (get_integer(headers, name) for name in ("schedule_run", "schedule_attempt"))
    if pk is None:
        return True
    started = Q(started_by=None) | Q(started_by=attempt)
    try:
        rows = ScheduleRun.objects.filter(started, pk=pk)
        return bool(rows.update(started_by=attempt, started_at=Now()))
    except (DatabaseError, InterfaceError) as error:
        logger.warning("Could not record the start of a run: %s", type(error).__name__)
        return True


def finish(headers: dict[str, Any]) -> None:
    """Record that the task of a message has ended, so that the next run may start."""
    pk, attempt = (get_integer(headers, name) for name in ("schedule_run", "schedule_attempt"))
    if pk is None:
        return
    try:
        ScheduleRun.objects.filter(pk=pk, started_by=attempt).update(finished_at=Now())
    except (DatabaseError, InterfaceError) as error:
        logger.warning("The end of a run is not recorded: %s", type(error).__name__)
