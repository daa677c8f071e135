"""How e-mail is delivered: every message once, whatever crashes on the way.

A run says that a digest is due for a period. Its recipients are split into chunks by
key, and each chunk is a task. A chunk holds a lock, so that no two workers send it at
once; it sends a message, and then commits the delivery. A process that is killed
between the two has sent one message that its successor sends again, with the same
Message-ID. Whatever is left undone, ``resume`` queues again.
"""

import logging
import signal
import smtplib
import time
from contextlib import contextmanager
from datetime import UTC, timedelta
from email.utils import parseaddr
from functools import cache
from itertools import batched

import psycopg
from django.conf import settings
from django.core import mail
from django.db import connection
from django.db.models import BigIntegerField, Exists, ExpressionWrapper, F, OuterRef
from django.template.loader import get_template
from django.utils import timezone
from django_celery_beat.models import PeriodicTask
from kombu.utils.json import loads

from . import locks, tasks, unsubscribe
from .digests import DIGESTS, RECIPIENT_FIELDS
from .models import DigestDelivery, DigestRun, Submission

logger = logging.getLogger(__name__)

#: How many keys a chunk spans, and so how many recipients are in memory at most.
CHUNK = 500

#: How many messages are composed at once.
BATCH = 100

#: How long a chunk may send before it makes way for other tasks, in seconds.
CHUNK_SECONDS = 120

#: How long a run may lie still before its chunks are queued again.
PATIENCE = timedelta(minutes=10)

#: For how long what is left undone is queued again.
HOPE = timedelta(days=3)


class Busy(Exception):
    """Another process sends the same now."""


class Refused(Exception):
    """The server refused messages for now; they are worth another try."""


# Messages


def compose(recipient, template, subject, context, message_id, kind=None):
    """Return an e-mail in text and HTML.

    ``message_id`` is the left part of its Message-ID, the same at every try. ``kind``
    is what the recipient can unsubscribe from with one click (RFC 8058), or None.
    """
    headers = {"Message-ID": f"<{message_id}@{_domain(settings.DEFAULT_FROM_EMAIL)}>"}
    context = {"site_name": settings.SITE_NAME, "recipient": recipient, **context}
    if kind:
        context["unsubscribe_url"] = unsubscribe.link(recipient, kind)
        headers["List-Unsubscribe"] = f"<{context['unsubscribe_url']}>"
        headers["List-Unsubscribe-Post"] = "List-Unsubscribe=One-Click"
    message = mail.EmailMultiAlternatives(
        f"{settings.SITE_NAME}: {subject}",
        _template(f"email/{template}.txt").render(context),
        to=[recipient.email],
        headers=headers,
    )
    message.attach_alternative(_template(f"email/{template}.html").render(context), "text/html")
    return message


@cache
def _template(name):
    return get_template(name)


@cache
def _domain(address):
    return parseaddr(address)[1].rpartition("@")[2]


def refusal(error):
    """Return whether the refusal of one message is final, and its reason.

    Replies of the 5xx series are final, those of the 4xx series are not (RFC 5321,
    section 4.2.1). An error that says nothing of this one message, such as a lost
    connection, a refused login or the end of the task's time, is raised again.
    """
    match error:
        case smtplib.SMTPRecipientsRefused():
            code, text = next(iter(error.recipients.values()))
        case smtplib.SMTPDataError():
            code, text = error.smtp_code, error.smtp_error
        case smtplib.SMTPNotSupportedError() | ValueError():
            return True, str(error)
        case _:
            raise error
    text = text.decode(errors="replace") if isinstance(text, bytes) else text
    return code >= 500, f"{code} {text}"


@contextmanager
def uninterrupted():
    """Put off SIGTERM, with which Celery ends a task whose broker is gone, until after this."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


# Digests


def start(name, now):
    """Queue the digest of that name for the last period before ``now``, unless that was done.

    Raises ValueError for a name that no digest has.
    """
    if name not in DIGESTS:
        raise ValueError(f"no digest {name!r}; the digests are: {', '.join(DIGESTS)}")
    period_start, period_end = DIGESTS[name].period(now)
    run, _ = DigestRun.objects.get_or_create(
        digest=name, period_start=period_start, defaults={"period_end": period_end}
    )
    if run.queued_at is None:
        queue(run)


def queue(run):
    """Queue a task for each chunk with recipients left; where none has, the run is finished."""
    number = ExpressionWrapper(F("pk") / CHUNK, output_field=BigIntegerField())
    chunks = remaining(run).order_by().values_list(number, flat=True).distinct()
    queued = 0
    for chunk in chunks.iterator():
        tasks.send_digest_chunk.delay(run.pk, chunk)
        queued += 1
    run.queued_at = timezone.now()
    run.finished_at = None if queued else run.queued_at
    run.save(update_fields=["queued_at", "finished_at"])
    logger.info("Digest %s: %d chunks queued", run, queued)


def remaining(run):
    """Return the recipients of the run who have no delivery yet."""
    delivered = DigestDelivery.objects.filter(
        digest=run.digest, period_start=run.period_start, recipient=OuterRef("pk")
    )
    return DIGESTS[run.digest].recipients(run).filter(~Exists(delivered))


def send_chunk(run, chunk, last_try=False):
    """Send the digest to the recipients of one chunk who have not got it.

    Raises Busy where another process sends the chunk, and Refused where the server
    refused messages for now; at the last try those are recorded as failed.
    """
    with locks.hold(f"digest {run.pk} {chunk}") as held:
        if not held:
            raise Busy
        first, end = chunk * CHUNK, (chunk + 1) * CHUNK
        # Two reads by ranges of keys take as long at the end of a large run as at its start.
        delivered = set(
            DigestDelivery.objects.filter(
                digest=run.digest,
                period_start=run.period_start,
                recipient_id__gte=first,
                recipient_id__lt=end,
            ).values_list("recipient_id", flat=True)
        )
        everybody = DIGESTS[run.digest].recipients(run).filter(pk__gte=first, pk__lt=end)
        everybody = everybody.only(*RECIPIENT_FIELDS).order_by("pk")
        recipients = [user for user in everybody if user.pk not in delivered]
        if recipients:
            with fast_cursor() as cursor, mail.get_connection() as smtp:
                _send(run, recipients, cursor, smtp, last_try)


def _send(run, recipients, cursor, smtp, last_try):
    deadline = time.monotonic() + CHUNK_SECONDS
    refused = 0
    for recipient, message in _composed(run, recipients):
        if time.monotonic() > deadline:
            tasks.send_digest_chunk.delay(run.pk, recipient.pk // CHUNK)
            break
        with uninterrupted():
            try:
                smtp.send_messages([message])
            except Exception as error:
                final, reason = refusal(error)
                if final or last_try:
                    record(cursor, run, recipient, DigestDelivery.Status.FAILED, reason)
                else:
                    refused += 1
            else:
                record(cursor, run, recipient, DigestDelivery.Status.SENT)
    if refused:
        raise Refused(f"{refused} recipients were refused for now")


def _composed(run, recipients):
    """Yield each recipient with the message to them.

    A batch is composed at once, which takes less time than one message between two commits.
    """
    digest = DIGESTS[run.digest]
    contents = digest.contents(recipients, run)
    message_id = f"{run.digest}.{run.period_start.astimezone(UTC):%Y%m%dT%H%M}"
    for batch in batched(recipients, BATCH):
        yield from [
            (
                recipient,
                compose(
                    recipient,
                    digest.template,
                    digest.subject,
                    contents[recipient.pk],
                    f"{message_id}.{recipient.pk}",
                    digest.unsubscribe,
                ),
            )
            for recipient in batch
        ]


def record(cursor, run, recipient, status, reason=""):
    """Commit the delivery to one recipient, in plain SQL: the ORM would take longer."""
    period_start = connection.ops.adapt_datetimefield_value(run.period_start)
    now = connection.ops.adapt_datetimefield_value(timezone.now())
    cursor.execute(
        f"INSERT INTO {DigestDelivery._meta.db_table}"
        " (digest, recipient_id, period_start, status, reason, created_at)"
        " VALUES (%s, %s, %s, %s, %s, %s)",
        [run.digest, recipient.pk, period_start, status, reason[:500], now],
    )
    if reason:
        logger.warning("Digest %s: user %s was refused: %s", run, recipient.pk, reason)


@contextmanager
def fast_cursor():
    """Yield a cursor whose commits return before they are on disk.

    A crash of this process cannot undo them, only one of PostgreSQL itself.
    https://www.postgresql.org/docs/current/wal-async-commit.html
    """
    with connection.cursor() as cursor:
        if connection.vendor != "postgresql":
            yield cursor
            return
        cursor.execute("SET synchronous_commit TO off")
        try:
            with preparing_cursor(cursor.connection) as preparing:
                yield preparing
        finally:
            if connection.is_usable():
                cursor.execute("RESET synchronous_commit")


def preparing_cursor(session):
    """Return a cursor that has PostgreSQL plan a statement once, and not each time.

    https://www.psycopg.org/psycopg3/docs/advanced/prepare.html
    """
    # The threshold stays: ordinary cursors bind on the client, and so prepare nothing.
    ordinary = session.cursor_factory
    session.cursor_factory, session.prepare_threshold = psycopg.Cursor, 0
    try:
        return connection.cursor()
    finally:
        session.cursor_factory = ordinary


# Notifications


def notify(submission_pk, last_try=False):
    """Tell the author of an answer, unless that was done or is not wanted.

    Raises Busy and Refused as ``send_chunk`` does.
    """
    with locks.hold(f"notification {submission_pk}") as held:
        if not held:
            raise Busy
        submission = unnotified().filter(pk=submission_pk).first()
        if submission is None:
            return
        message = compose(
            submission.author,
            "notification",
            "your submission was answered",
            {"submission": submission},
            f"notification.{submission.pk}",
            "notification",
        )
        with uninterrupted():
            try:
                message.send()
            except Exception as error:
                final, reason = refusal(error)
                if not (final or last_try):
                    raise Refused(reason) from error
                logger.warning("User %s was refused: %s", submission.author_id, reason)
            Submission.objects.filter(pk=submission.pk).update(notified_at=timezone.now())


def unnotified():
    """Return the answered submissions whose authors want to be told and were not."""
    answered = Submission.objects.answered().filter(notified_at__isnull=True)
    wanted = answered.filter(author__notify_on_response=True, author__is_active=True)
    return wanted.exclude(author__email="").select_related("author")


# What is left undone


def resume():
    """Queue again what was lost: schedules, chunks of digests, notifications.

    Beat notes when it ran a schedule also where the broker did not take the task.
    """
    now = timezone.now()
    since = now - HOPE
    schedules = PeriodicTask.objects.filter(
        enabled=True, task__in=tasks.DIGEST_TASKS, last_run_at__gte=since
    )
    for schedule in schedules:
        try:
            args, kwargs = loads(schedule.args), loads(schedule.kwargs)
            start(tasks.DIGEST_TASKS[schedule.task](*args, **kwargs), schedule.last_run_at)
        except (TypeError, ValueError) as error:
            # An administrator's slip in one schedule must not stop the others.
            logger.error("Schedule %s cannot run: %s", schedule.name, error)
    runs = DigestRun.objects.filter(finished_at=None, period_end__gte=since)
    for run in runs.filter(queued_at__lt=now - PATIENCE):
        queue(run)
    forgotten = unnotified().filter(
        answered_at__gte=since, answered_at__lt=now - timedelta(minutes=1)
    )
    for pk in forgotten.values_list("pk", flat=True)[:CHUNK]:
        tasks.notify_author.delay(pk)
