"""Runs of schedules: a worker runs the first message of a run that it gets."""

from typing import Any

from django.db.models import Q
from django.db.models.functions import Now

from .models import ScheduleRun


def start_run(headers: dict[str, Any]) -> bool:
    """Record that a worker runs a message; return whether it may.

    It may not if another message of the same run was started. The same message may start
    again, when the first worker was lost.
    """
    pk, attempt = headers.get("schedule_run"), headers.get("schedule_attempt")
    if pk is None:
        return True
    started = Q(started_by=None) | Q(started_by=attempt)
    return bool(
        ScheduleRun.objects.filter(started, pk=pk).update(started_by=attempt, started_at=Now())
    )
