"""What may have been sent between a backup and its restore, and what becomes of it."""

import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import batched

from celery import current_app
from django.contrib.auth import get_user_model
from django.db import transaction
from django.db.models import QuerySet
from django.utils import timezone

from ..models import Attempt, DelayedTask, DigestRun
from ..scheduling.restores import Restore
from ..worker import delayed
from . import attempts, deliveries
from .digests import Notification, get_digests, get_notifications
from .tasks import get_due_digests

#: A Message-ID of ``deliveries.py`` in a log: the name, the end of a period, and a primary key.
MESSAGE_ID = re.compile(r"\b([a-z0-9_-]{1,50})\.(?:(\d{8}T\d{4})\.)?(\w[\w-]*)@")


@dataclass(frozen=True)
class Due:
    """What was due, and the function that marks it as done."""

    text: str
    mark: Callable[[], None]


def find_due(restore: Restore) -> list[Due]:
    """Return what may have been sent, and would be sent again."""
    current_app.loader.import_default_modules()  # Registers all tasks of digests.
    found = []
    due_at = get_due_digests(restore.end)
    for name in get_digests():
        if text := _describe_digest(name, due_at.get(name)):
            found.append(Due(text, lambda name=name: _mark_digest(name, due_at.get(name))))  # type: ignore[misc]
    for name, notification in get_notifications().items():
        rows = Attempt.objects.filter(
            message_id__startswith=f"{name}.", next_at__lte=restore.end
        )
        if count := rows.count():
            text = f"{name}: {count} notifications"
            found.append(Due(text, lambda n=notification, rows=rows: _mark_notifications(n, rows)))  # type: ignore[misc]
    tasks = delayed.WAITING.filter(restore.held)
    for name in tasks.order_by("name").values_list("name", flat=True).distinct():
        rows_of = tasks.filter(name=name)
        found.append(
            Due(
                f"{name}: {rows_of.count()} delayed tasks",
                lambda rows=rows_of: _mark_tasks(rows),  # type: ignore[misc]
            )
        )
    return found


# Digests


def _get_unfinished(name: str, due: datetime | None) -> list[DigestRun]:
    """Return the runs that are not finished, after creating the one that is due."""
    digest = get_digests()[name]
    if due is not None:
        deliveries.get_run(digest, due)
    runs = DigestRun.objects.filter(digest=name, finished_at=None).order_by("period_end")
    return list(runs.filter(period_end__gte=timezone.now() - digest.max_age))


def _describe_digest(name: str, due: datetime | None) -> str:
    """Return which digests would be sent to how many, or an empty text."""
    parts = []
    with transaction.atomic():
        for run in _get_unfinished(name, due):
            if count := deliveries.remaining(run).count():
                parts.append(f"{run}, {count} recipients")
        transaction.set_rollback(True)
    return "; ".join(parts)


def _mark_digest(name: str, due: datetime | None) -> None:
    with transaction.atomic():
        keys = [run.pk for run in _get_unfinished(name, due)]
        now = timezone.now()
        DigestRun.objects.filter(pk__in=keys).update(queued_at=now, finished_at=now)
        Attempt.objects.filter(message_id__startswith=f"{name}.").delete()


# Others


def _mark_notifications(notification: Notification, rows: QuerySet[Attempt]) -> None:
    for key in list(rows.values_list("message_id", flat=True)):
        _mark_notification(notification, key.partition(".")[2])


def _mark_notification(notification: Notification, pk: str) -> None:
    if (obj := notification.waiting().filter(pk=pk).first()) is not None:
        notification.mark_sent(obj)
    attempts.finish(f"{notification.name}.{pk}")


def _mark_tasks(rows: QuerySet[DelayedTask]) -> None:
    delayed.cancel(rows)


# Logs


def mark_logged(lines: Iterable[str]) -> int:
    """Mark the e-mails as sent whose Message-IDs are in a log; return how many these are."""
    digests, notifications = get_digests(), get_notifications()
    sent: dict[tuple[str, str], set[int]] = defaultdict(set)
    notified: set[tuple[str, str]] = set()
    for line in lines:
        for name, end, key in MESSAGE_ID.findall(line):
            if name in digests and end and key.isdecimal():
                sent[name, end].add(int(key))
            elif name in notifications and not end:
                notified.add((name, key))
    for name, key in notified:
        _mark_notification(notifications[name], key)
    return len(notified) + sum(
        _mark_logged_run(name, datetime.strptime(end, "%Y%m%dT%H%M").replace(tzinfo=UTC), keys)
        for (name, end), keys in sorted(sent.items())
    )


def _mark_logged_run(name: str, end: datetime, keys: set[int]) -> int:
    run, _ = DigestRun.objects.get_or_create(
        digest=name,
        period_end=end,
        defaults={"period_start": get_digests()[name].period(end)[0]},
    )
    users = get_user_model()._default_manager
    count = 0
    for batch in batched(sorted(keys), deliveries.CHUNK):
        recipients = list(users.filter(pk__in=batch))
        deliveries.record(run, *((user, deliveries.SENT, "") for user in recipients))
        count += len(recipients)
    return count
