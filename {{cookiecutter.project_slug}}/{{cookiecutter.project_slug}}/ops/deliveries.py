"""Send each message to each recipient once, whatever process crashes.

A digest's recipients are divided by primary key, an integer, into chunks, and each chunk is
a task. A chunk holds a lock, so that two workers never send it at the same time. It sends
one e-mail and then commits its delivery. If the process is killed in between, the next
attempt sends that one e-mail again, with the same Message-ID.
"""

import logging
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC
from itertools import batched
from typing import Any

from django.core import mail
from django.core.mail import EmailMessage
from django.db import connection
from django.db.models import BigIntegerField, Exists, ExpressionWrapper, F, OuterRef, QuerySet

from .digests import Notification, get_digest
from .locks import try_lock
from .messages import classify_smtp_error, compose, deferred_sigterm
from .models import DigestDelivery, DigestRun

logger = logging.getLogger(__name__)

#: Primary keys in a chunk, and therefore the maximum number of recipients in memory.
CHUNK = 500

#: E-mails that are composed at once.
BATCH = 100

#: Seconds after which a chunk stops, so that other tasks get their turn.
CHUNK_SECONDS = 120


class Busy(Exception):
    """Another process is sending the same messages."""


class TemporaryFailure(Exception):
    """The mail server rejected e-mail temporarily; try again later."""


# Digests


def remaining(run: DigestRun) -> QuerySet[Any]:
    """Return the recipients of the run who have no delivery yet."""
    delivered = DigestDelivery.objects.filter(
        digest=run.digest, period_start=run.period_start, recipient=OuterRef("pk")
    )
    return get_digest(run.digest).recipients(run).filter(~Exists(delivered))


def remaining_chunks(run: DigestRun) -> Iterable[int]:
    """Return the numbers of the chunks that have remaining recipients."""
    number = ExpressionWrapper(F("pk") / CHUNK, output_field=BigIntegerField())
    return remaining(run).order_by().values_list(number, flat=True).distinct().iterator()


def send_chunk(run: DigestRun, chunk: int, last_try: bool = False) -> bool:
    """Send the digest to the remaining recipients of a chunk; return whether all were sent.

    It stops after ``CHUNK_SECONDS``. Raises Busy if another process is sending the chunk,
    and TemporaryFailure if the server rejected e-mail temporarily; at the last try this
    is recorded as failed instead.
    """
    with try_lock(f"digest {run.pk} {chunk}") as acquired:
        if not acquired:
            raise Busy
        recipients = _recipients(run, chunk)
        if not recipients:
            return True
        with relaxed_commits(), mail.get_connection() as server:
            return _send(run, recipients, server, last_try)


def _recipients(run: DigestRun, chunk: int) -> list[Any]:
    first, end = chunk * CHUNK, (chunk + 1) * CHUNK
    # Two reads by key range are as fast at the end of a large run as at its start.
    delivered = set(
        DigestDelivery.objects.filter(
            digest=run.digest,
            period_start=run.period_start,
            recipient_id__gte=first,
            recipient_id__lt=end,
        ).values_list("recipient_id", flat=True)
    )
    digest = get_digest(run.digest)
    recipients = digest.recipients(run).filter(pk__gte=first, pk__lt=end)
    # only() without names would load the primary key alone.
    if digest.recipient_fields:
        recipients = recipients.only(*digest.recipient_fields)
    return [user for user in recipients.order_by("pk") if user.pk not in delivered]


def _send(run: DigestRun, recipients: Sequence[Any], server: Any, last_try: bool) -> bool:
    deadline = time.monotonic() + CHUNK_SECONDS
    rejected, complete = 0, True
    for recipient, email in _composed(run, recipients):
        if time.monotonic() > deadline:
            complete = False
            break
        with deferred_sigterm():
            try:
                server.send_messages([email])
            except Exception as error:
                permanent, reason = classify_smtp_error(error)
                if permanent or last_try:
                    record(run, recipient, DigestDelivery.Status.FAILED, reason)
                else:
                    rejected += 1
            else:
                record(run, recipient, DigestDelivery.Status.SENT)
    if rejected:
        raise TemporaryFailure(f"{rejected} recipients were rejected temporarily")
    return complete


def _composed(run: DigestRun, recipients: Sequence[Any]) -> Iterator[tuple[Any, EmailMessage]]:
    """Yield each recipient with the e-mail to send.

    Composing a batch at once is faster than one e-mail between two commits.
    """
    digest = get_digest(run.digest)
    contents = digest.contents(recipients, run)
    message_id = f"{run.digest}.{run.period_start.astimezone(UTC):%Y%m%dT%H%M}"
    for batch in batched(recipients, BATCH):
        yield from [
            (user, compose(digest, user, contents[user.pk], f"{message_id}.{user.pk}"))
            for user in batch
        ]


def record(run: DigestRun, recipient: Any, status: str, reason: str = "") -> None:
    """Commit the delivery of the digest to one recipient."""
    DigestDelivery.objects.create(
        digest=run.digest,
        recipient=recipient,
        period_start=run.period_start,
        status=status,
        reason=reason[:500],
    )
    if reason:
        logger.warning("Digest %s: user %s was rejected: %s", run, recipient.pk, reason)


@contextmanager
def relaxed_commits() -> Iterator[None]:
    """Let PostgreSQL confirm commits before they are on disk, which takes less time.

    Only a crash of PostgreSQL itself can lose them, not one of this process.
    https://www.postgresql.org/docs/current/wal-async-commit.html
    """
    if connection.vendor != "postgresql":
        yield
        return
    with connection.cursor() as cursor:
        cursor.execute("SET synchronous_commit TO off")
    try:
        yield
    finally:
        if connection.is_usable():
            with connection.cursor() as cursor:
                cursor.execute("RESET synchronous_commit")


# Notifications


def send_notification(notification: Notification, pk: Any, last_try: bool = False) -> None:
    """Send the notification about an object, unless it is sent already or not wanted.

    Raises Busy and TemporaryFailure as ``send_chunk`` does.
    """
    with try_lock(f"notification {notification.name} {pk}") as acquired:
        if not acquired:
            raise Busy
        obj = notification.waiting().filter(pk=pk).first()
        if obj is None:
            return
        recipient = notification.recipient(obj)
        email = compose(
            notification, recipient, notification.context(obj), f"{notification.name}.{obj.pk}"
        )
        with deferred_sigterm():
            try:
                email.send()
            except Exception as error:
                permanent, reason = classify_smtp_error(error)
                if not (permanent or last_try):
                    raise TemporaryFailure(reason) from error
                logger.warning(
                    "Notification %s: user %s was rejected: %s",
                    notification.name,
                    recipient.pk,
                    reason,
                )
            notification.mark_sent(obj)
