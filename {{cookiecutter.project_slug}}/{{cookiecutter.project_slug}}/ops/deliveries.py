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
from datetime import UTC, timedelta
from itertools import batched
from typing import Any

from celery.exceptions import SoftTimeLimitExceeded
from django.core import mail
from django.core.cache import caches
from django.core.mail import EmailMessage
from django.db import connection
from django.db.models import BigIntegerField, Exists, ExpressionWrapper, F, OuterRef, QuerySet
from django.utils import timezone

from .digests import Notification, get_digest
from .locks import try_lock
from .messages import Verdict, classify_error, compose, deferred_sigterm
from .models import Attempt, DigestDelivery, DigestRun

logger = logging.getLogger(__name__)

#: Primary keys in a chunk, and therefore the maximum number of recipients in memory.
CHUNK = 500

#: E-mails that are composed at once.
BATCH = 100

#: Seconds after which a chunk stops, so that other tasks get their turn.
CHUNK_SECONDS = 120

#: Waits between the attempts of an e-mail that the server refuses for now: nine attempts in
#: about four hours, then it has failed.
LADDER = [timedelta(minutes=minutes) for minutes in (1, 2, 4, 8, 16, 32, 64, 120)]

#: An e-mail that may have been sent is sent again at most this often, after this time each.
MAX_REPEATS = 2
REPEAT_AFTER = timedelta(days=1)

#: E-mails without a reply, one after the other, after which a chunk stops for later.
MAX_UNKNOWN = 3

#: How long no e-mail is sent after the mail server could not be used, in seconds.
PAUSE_SECONDS = 60


class Busy(Exception):
    """Another process is sending the same messages."""


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


def send_chunk(run: DigestRun, chunk: int) -> bool:
    """Send the digest to the recipients of a chunk who are due; return whether all were tried.

    It stops after ``CHUNK_SECONDS``, and raises Busy if another process is sending the chunk.
    It raises the error if the server cannot be used, or does not reply to ``MAX_UNKNOWN``
    e-mails one after the other.
    """
    if is_paused():
        return True
    with try_lock(f"digest {run.pk} {chunk}") as acquired:
        if not acquired:
            raise Busy
        recipients = _recipients(run, chunk)
        attempts = get_attempts(_message_id(run, recipient) for recipient in recipients)
        later = {key for key, attempt in attempts.items() if attempt.next_at > timezone.now()}
        due = [user for user in recipients if _message_id(run, user) not in later]
        if not due:
            return True
        with relaxed_commits(), connect() as server:
            return _send(run, due, attempts, server)


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


def due_chunks(run: DigestRun) -> set[int]:
    """Return the numbers of the chunks with an e-mail whose next attempt is due."""
    due = Attempt.objects.filter(message_id__startswith=_prefix(run), next_at__lte=timezone.now())
    keys = due.values_list("message_id", flat=True)
    return {int(message_id.rpartition(".")[2]) // CHUNK for message_id in keys}


def _send(
    run: DigestRun, recipients: Sequence[Any], attempts: dict[str, Attempt], server: Any
) -> bool:
    deadline = time.monotonic() + CHUNK_SECONDS
    unknown = 0
    for recipient, email in _composed(run, recipients):
        if time.monotonic() > deadline:
            return False
        message_id = _message_id(run, recipient)
        is_repeat = message_id in attempts
        with deferred_sigterm():
            if is_repeat:
                # Recorded before it is made: the process may be killed in it.
                begin_attempt(message_id)
            try:
                server.send_messages([email])
            except Exception as error:
                if not is_repeat:
                    begin_attempt(message_id)
                verdict, reason = classify_error(error)
                if end_attempt(message_id, verdict, reason):
                    record(run, recipient, DigestDelivery.Status.FAILED, reason)
                unknown = unknown + 1 if verdict is Verdict.UNKNOWN else 0
                # The time limit of the task may be what ended the attempt.
                stops = verdict is Verdict.UNUSABLE or isinstance(error, SoftTimeLimitExceeded)
                if stops or unknown == MAX_UNKNOWN:
                    raise
                if unknown:
                    server.close()
                    server.open()
            else:
                unknown = 0
                record(run, recipient, DigestDelivery.Status.SENT)
                if is_repeat:
                    Attempt.objects.filter(message_id=message_id).delete()
    return True


def _message_id(run: DigestRun, recipient: Any) -> str:
    return f"{_prefix(run)}{recipient.pk}"


def _prefix(run: DigestRun) -> str:
    return f"{run.digest}.{run.period_start.astimezone(UTC):%Y%m%dT%H%M}."


def _composed(run: DigestRun, recipients: Sequence[Any]) -> Iterator[tuple[Any, EmailMessage]]:
    """Yield each recipient with the e-mail to send.

    Composing a batch at once is faster than one e-mail between two commits.
    """
    digest = get_digest(run.digest)
    contents = digest.contents(recipients, run)
    for batch in batched(recipients, BATCH):
        yield from [
            (user, compose(digest, user, contents[user.pk], _message_id(run, user)))
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


# Attempts


def get_attempts(message_ids: Iterable[str]) -> dict[str, Attempt]:
    """Return the unfinished e-mails among these by message id."""
    rows = Attempt.objects.filter(message_id__in=list(message_ids))
    return {row.message_id: row for row in rows}


def begin_attempt(message_id: str) -> None:
    """Record that an e-mail may be sent from now on, in case nothing more is heard of it."""
    attempt = Attempt.objects.filter(message_id=message_id).first() or Attempt(
        message_id=message_id
    )
    attempt.unknown += 1
    attempt.next_at = timezone.now() + REPEAT_AFTER
    attempt.save()


def end_attempt(message_id: str, verdict: Verdict, reason: str) -> bool:
    """Record how an attempt failed; return whether the e-mail is not tried again."""
    attempt = Attempt.objects.get(message_id=message_id)
    if verdict is not Verdict.UNKNOWN:
        attempt.unknown -= 1
    if verdict is Verdict.UNUSABLE:
        attempt.next_at = timezone.now()
    elif verdict is Verdict.REFUSED and attempt.refusals < len(LADDER):
        attempt.next_at = timezone.now() + LADDER[attempt.refusals]
        attempt.refusals += 1
    elif verdict is not Verdict.UNKNOWN or attempt.unknown > MAX_REPEATS:
        attempt.delete()
        return True
    attempt.reason = reason[:500]
    attempt.save()
    return False


@contextmanager
def connect() -> Iterator[Any]:
    """Yield an open connection to the mail server.

    If it cannot be used, e-mail pauses for ``PAUSE_SECONDS`` and the error is raised, so that
    waiting for it does not hold up the tasks of others. An exception in code is no reason.
    """
    try:
        with mail.get_connection() as server:
            yield server
    except OSError:  # Errors of sockets and of smtplib
        caches["limits"].set("mail-paused", True, PAUSE_SECONDS)
        raise


def is_paused() -> bool:
    """Return whether the mail server could not be used a moment ago."""
    return caches["limits"].get("mail-paused") is not None


# Notifications


def send_notification(notification: Notification, pk: Any) -> None:
    """Send the notification about an object, unless it is sent already, not wanted or not due.

    Raises Busy if another process is sending it.
    """
    if is_paused():
        return
    with try_lock(f"notification {notification.name} {pk}") as acquired:
        if not acquired:
            raise Busy
        obj = notification.waiting().filter(pk=pk).first()
        if obj is None:
            return
        message_id = f"{notification.name}.{obj.pk}"
        attempt = get_attempts([message_id]).get(message_id)
        if attempt is not None and attempt.next_at > timezone.now():
            return
        recipient = notification.recipient(obj)
        email = compose(notification, recipient, notification.context(obj), message_id)
        with connect() as server, deferred_sigterm():
            # Recorded before it is made: the process may be killed in it.
            begin_attempt(message_id)
            try:
                server.send_messages([email])
            except Exception as error:
                verdict, reason = classify_error(error)
                final = end_attempt(message_id, verdict, reason)
                if verdict is Verdict.UNUSABLE:
                    raise
                if not final:
                    return
                logger.warning(
                    "Notification %s: user %s was rejected: %s",
                    notification.name,
                    recipient.pk,
                    reason,
                )
            notification.mark_sent(obj)
            Attempt.objects.filter(message_id=message_id).delete()
