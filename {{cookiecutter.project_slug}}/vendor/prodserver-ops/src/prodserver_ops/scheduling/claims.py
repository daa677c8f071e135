"""Runs of schedules: a worker runs the first message of a run that it gets, and notes its end."""

import logging
from collections import defaultdict
from datetime import timedelta
from typing import Any

from celery import current_app
from django.conf import settings
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


def started_within_limit(field: str) -> Q:
    """Return a filter of the runs whose task has not reached its time limit.

    ``field`` contains the name of the task. The run of a worker that was lost ends so.
    """
    usual: float = settings.CELERY_TASK_TIME_LIMIT
    names = defaultdict[float, list[str]](list)
    for name, task in current_app.tasks.items():
        if (limit := task.time_limit or usual) != usual:
            names[limit].append(name)
    found = ~Q((f"{field}__in", [name for group in names.values() for name in group]))
    found &= Q(started_at__gt=Now() - timedelta(seconds=usual))
    for limit, group in names.items():
        found |= Q((f"{field}__in", group), started_at__gt=Now() - timedelta(seconds=limit))
    return found
