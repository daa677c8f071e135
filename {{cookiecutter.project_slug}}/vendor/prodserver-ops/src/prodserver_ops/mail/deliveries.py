"""Send each message to each recipient once, even if a process crashes.

The recipients of a digest are divided into chunks by their primary key, an integer, and each chunk
is a task. A chunk holds a lock, so that two workers never send it at the same time. It sends up to
``EMAIL_CONNECTIONS`` e-mails at the same time. A delivery is committed before its e-mail is sent,
and again afterwards: a single query commits which e-mails were sent, and which are sent next. If
the process is killed in between, the latter are sent again, with the same Message-ID.
"""

import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import partial
from itertools import batched, islice
from signal import SIGTERM, sigpending
from typing import Any

from django.conf import settings
from django.core.mail import EmailMessage
from django.db import connection, transaction
from django.db.models import BigIntegerField, Exists, ExpressionWrapper, F, OuterRef, QuerySet
from django.utils import timezone

from ..core.database import persist
from ..core.locks import try_lock
from ..core.signals import deferred_sigterm
from ..models import Attempt, DigestDelivery, DigestRun
from . import attempts
from .composing import compose
from .digests import Digest, Notification, get_digest
from .transport import Outcome, Paused, Server, ServerFailed, Verdict, connect, is_paused

#: Primary keys in a chunk, and therefore the maximum number of recipients in memory.
CHUNK = 500

#: Number of e-mails that are composed at once.
BATCH = 100

#: Seconds after which a chunk stops, so that other tasks can run.
CHUNK_SECONDS = 20

SENDING, SENT, FAILED = DigestDelivery.Status


#: The reason for giving up an e-mail of which no attempt ended.
EXHAUSTED = "the process was killed in each attempt"


class Busy(Exception):
    """Another process is sending the same messages."""


# Runs


def get_run(digest: Digest, due: datetime) -> DigestRun | None:
    """Return the run of a digest that is due at a time, or None if a later run exists.

    A new run covers the time since the previous run, at most the digest's ``max_age``. Earlier runs
    that nobody received are merged into it.
    """
    start, end = digest.period(due)
    with transaction.atomic():
        runs = DigestRun.objects.select_for_update().filter(
            digest=digest.name, period_end__gte=end - digest.max_age
        )
        newest_first = list(runs.order_by("-period_end"))
        if newest_first and newest_first[0].period_end > end:
            return None
        if newest_first and newest_first[0].period_end == end:
            return newest_first[0]
        for earlier in newest_first:
            if earlier.finished_at is not None or _is_begun(earlier):
                start = min(start, earlier.period_end)
                break
            start = min(start, earlier.period_start)
            _delete_run(earlier)
        run, _ = DigestRun.objects.get_or_create(
            digest=digest.name, period_end=end, defaults={"period_start": start}
        )
        return run


def _is_begun(run: DigestRun) -> bool:
    """Return whether anybody received the digest of a run, or may have received it."""
    rows = DigestDelivery.objects.filter(digest=run.digest, period_end=run.period_end)
    refused = Attempt.objects.filter(message_id__startswith=get_prefix(run), unknown=0)
    refused_keys = [int(row.message_id.rpartition(".")[2]) for row in refused]
    return rows.exclude(status=SENDING, recipient__in=refused_keys).exists()


def _delete_run(run: DigestRun) -> None:
    DigestDelivery.objects.filter(digest=run.digest, period_end=run.period_end).delete()
    Attempt.objects.filter(message_id__startswith=get_prefix(run)).delete()
    run.delete()


def remaining(run: DigestRun) -> QuerySet[Any]:
    """Return the recipients of the run who have no finished delivery yet."""
    finished = DigestDelivery.objects.exclude(status=SENDING).filter(
        digest=run.digest, period_end=run.period_end, recipient=OuterRef("pk")
    )
    return get_digest(run.digest).recipients(run).filter(~Exists(finished))


def remaining_chunks(run: DigestRun) -> Iterable[int]:
    """Return the numbers of the chunks that have remaining recipients."""
    number = ExpressionWrapper(F("pk") / CHUNK, output_field=BigIntegerField())
    return remaining(run).order_by().values_list(number, flat=True).distinct().iterator()


def due_chunks(run: DigestRun) -> set[int]:
    """Return the numbers of the chunks with an e-mail whose next attempt is due."""
    due = Attempt.objects.filter(
        message_id__startswith=get_prefix(run), next_at__lte=timezone.now()
    )
    keys = due.values_list("message_id", flat=True)
    return {int(message_id.rpartition(".")[2]) // CHUNK for message_id in keys}


# Chunks


def send_chunk(run: DigestRun, chunk: int) -> bool:
    """Send the digest to the due recipients of a chunk; return whether all were tried.

    Stops after ``CHUNK_SECONDS``. Raises Busy if another process is sending the chunk, Paused if
    e-mail is paused, and the error of the mail server if it is unusable.
    """
    if is_paused():
        raise Paused
    with try_lock(f"digest {run.pk} {chunk}") as acquired:
        if not acquired:
            raise Busy
        recipients, begun = _get_recipients(run, chunk)
        unfinished = attempts.get_attempts(_message_id(run, user) for user in recipients)
        later = {key for key, each in unfinished.items() if each.next_at > timezone.now()}
        due = [user for user in recipients if _message_id(run, user) not in later]
        for user in due:
            message_id = _message_id(run, user)
            if message_id in unfinished and attempts.is_exhausted(unfinished[message_id]):
                record(run, (user, FAILED, EXHAUSTED))
                attempts.finish(message_id)
                later.add(message_id)
        due = [user for user in due if _message_id(run, user) not in later]
        if not due:
            return True
        with relaxed_commits(), connect() as server:
            return _send(run, due, begun, unfinished, server)


def _get_recipients(run: DigestRun, chunk: int) -> tuple[list[Any], set[Any]]:
    """Return the recipients of a chunk without a finished delivery, and the keys of those tried.

    If an e-mail was tried without finishing its delivery, its process was killed, or it was not
    accepted.
    """
    first, end = chunk * CHUNK, (chunk + 1) * CHUNK
    # Two reads by key range are as fast at the end of a large run as at its start.
    deliveries = dict(
        DigestDelivery.objects.filter(
            digest=run.digest,
            period_end=run.period_end,
            recipient_id__gte=first,
            recipient_id__lt=end,
        ).values_list("recipient_id", "status")
    )
    digest = get_digest(run.digest)
    recipients = digest.recipients(run).filter(pk__gte=first, pk__lt=end)
    # only() without names would load the primary key alone.
    if digest.recipient_fields:
        recipients = recipients.only(*digest.recipient_fields)
    begun = {key for key, status in deliveries.items() if status == SENDING}
    return [
        user for user in recipients.order_by("pk") if user.pk not in deliveries or user.pk in begun
    ], begun


def _send(
    run: DigestRun,
    recipients: Sequence[Any],
    begun: set[Any],
    unfinished: dict[str, Attempt],
    server: Server,
) -> bool:
    deadline = time.monotonic() + CHUNK_SECONDS
    limit = settings.EMAIL_CONNECTIONS
    problem: Exception | None = None
    # Each of these e-mails may have killed its process.
    repeats = begun | {user.pk for user in recipients if _message_id(run, user) in unfinished}
    emails = _composed(run, recipients)
    upcoming = deque(islice(emails, limit))
    following = [upcoming.popleft()]
    with transaction.atomic():
        # A later run may have replaced this one, or it was marked as sent after a restore.
        runs = DigestRun.objects.select_for_update().filter(pk=run.pk, finished_at=None)
        if not runs.exists():
            return True
        record(run, (recipients[0], SENDING, ""))
    # It holds the lock of the chunk. If it is lost, another process may go on.
    session = connection.connection
    done: list[tuple[Any, str, str]] = []
    with deferred_sigterm():
        while following or server.sending:
            for recipient, _ in following:
                if recipient.pk in repeats:
                    key = _message_id(run, recipient)
                    persist(partial(attempts.begin, key, killed=key not in unfinished))
            server.start(following)
            try:
                upcoming.extend(islice(emails, limit - len(upcoming)))
            except Exception as error:
                # Raised below, so that the outcomes of the e-mails being sent are recorded first.
                problem = error
            rows = []
            for recipient, outcome in server.finish():
                key = _message_id(run, recipient)
                if outcome.verdict is Verdict.SENT:
                    rows.append((recipient, SENT, ""))
                    continue
                if recipient.pk not in repeats:
                    persist(partial(attempts.begin, key))
                if persist(partial(attempts.end, key, outcome)):
                    rows.append((recipient, FAILED, outcome.reason))
                if outcome.stops:
                    problem = unusable(outcome)
            stops = problem or time.monotonic() > deadline or SIGTERM in sigpending()
            following = [] if stops else _take_group(upcoming, server, repeats)
            done += rows
            begun_rows = [(recipient, SENDING, "") for recipient, _ in following]
            if not persist(partial(_record_all, run, rows, begun_rows, done, session)):
                following = []
            for recipient, status, _ in rows:
                if status == SENT and recipient.pk in repeats:
                    persist(partial(attempts.finish, _message_id(run, recipient)))
    if problem is not None:
        raise problem
    return not upcoming and connection.connection is session


def _record_all(
    run: DigestRun,
    rows: Sequence[tuple[Any, str, str]],
    begun: Sequence[tuple[Any, str, str]],
    done: Sequence[tuple[Any, str, str]],
    session: Any,
) -> bool:
    """Commit what is new and what is sent next; return whether that may be sent.

    It may not if the session is lost. Then all that was sent is committed again, because a server
    that crashed may have lost the last commits.
    """
    if connection.connection is session:
        record(run, *rows, *begun)
        return True
    record(run, *done)
    return False


def _take_group(
    upcoming: deque[tuple[Any, EmailMessage]], server: Server, repeats: set[Any]
) -> list[tuple[Any, EmailMessage]]:
    """Remove the e-mails to send next, at the same time, and return them.

    A repeated e-mail is sent alone, so that the others are not repeated if it kills the process
    again.
    """
    group: list[tuple[Any, EmailMessage]] = []
    while upcoming and len(group) < server.room:
        is_repeat = upcoming[0][0].pk in repeats
        if is_repeat and (group or server.sending):
            break
        group.append(upcoming.popleft())
        if is_repeat:
            break
    return group


def unusable(outcome: Outcome) -> ServerFailed:
    """Return the error for a mail server that is unusable."""
    return ServerFailed(f"the mail server is unusable: {outcome.reason}")


def _message_id(run: DigestRun, recipient: Any) -> str:
    return f"{get_prefix(run)}{recipient.pk}"


def get_prefix(run: DigestRun) -> str:
    """Return what the Message-IDs of a run start with; the recipient's key follows."""
    return f"{run.digest}.{run.period_end.astimezone(UTC):%Y%m%dT%H%M}."


def _composed(run: DigestRun, recipients: Sequence[Any]) -> Iterator[tuple[Any, EmailMessage]]:
    """Yield each recipient with the e-mail to send.

    Composing a batch at once is faster than composing one e-mail between two commits.
    """
    digest = get_digest(run.digest)
    contents = digest.contents(recipients, run)
    for batch in batched(recipients, BATCH):
        yield from [
            (user, compose(digest, user, contents[user.pk], _message_id(run, user)))
            for user in batch
        ]


#: Django's own upsert is a transaction, which takes three round trips to the database.
RECORD = """
INSERT INTO ops_digestdelivery (digest, period_end, recipient_id, status, reason, created_at)
VALUES {} ON CONFLICT (recipient_id, digest, period_end) DO UPDATE
SET status = EXCLUDED.status, reason = EXCLUDED.reason, created_at = EXCLUDED.created_at
"""


def record(run: DigestRun, *rows: tuple[Any, str, str]) -> None:
    """Commit deliveries of a run, given as recipient, status and reason."""
    if not rows:
        return
    adapt = connection.ops.adapt_datetimefield_value
    period_end, now = adapt(run.period_end), adapt(timezone.now())
    values: list[Any] = []
    for recipient, status, reason in rows:
        values += [run.digest, period_end, recipient.pk, status, reason[:500], now]
    places = ", ".join(["(%s, %s, %s, %s, %s, %s)"] * len(rows))
    with connection.cursor() as cursor:
        cursor.execute(RECORD.format(places), values)


@contextmanager
def relaxed_commits() -> Iterator[None]:
    """Let PostgreSQL confirm commits before they are on disk, which is faster.

    Only a crash of PostgreSQL can lose them; a crash of this process cannot.
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


def request_notification(name: str, pk: Any) -> None:
    """Store a request for the notification about an object."""
    attempts.request(f"{name}.{pk}")


def send_notification(notification: Notification, pk: Any) -> None:
    """Send the notification about an object if it is requested, due and still wanted.

    Raises Busy if another process is sending it, Paused if e-mail is paused, and the error of the
    mail server if it is unusable.
    """
    if is_paused():
        raise Paused
    message_id = f"{notification.name}.{pk}"
    with try_lock(f"notification {notification.name} {pk}") as acquired:
        if not acquired:
            raise Busy
        attempt = attempts.get_attempts([message_id]).get(message_id)
        if attempt is None or attempt.next_at > timezone.now():
            return
        obj = notification.waiting().filter(pk=pk).first()
        if obj is None:
            attempts.finish(message_id)
            return
        if attempts.is_exhausted(attempt):
            notification.mark_sent(obj)
            attempts.finish(message_id)
            return
        recipient = notification.recipient(obj)
        email = compose(notification, recipient, notification.context(obj), message_id)
        with connect() as server, deferred_sigterm():
            # Recorded before the attempt, in which the process may be killed.
            attempts.begin(message_id)
            outcome = server.send(email)
            if outcome.verdict is Verdict.SENT or persist(
                partial(attempts.end, message_id, outcome)
            ):
                persist(partial(notification.mark_sent, obj))
                persist(partial(attempts.finish, message_id))
            if outcome.stops:
                raise unusable(outcome)
