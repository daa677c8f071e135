"""E-mails that are not finished: each is a row that says when to try it next.

An e-mail that the server refuses for now follows a ladder. One that it rejects is tried once
more, in case the fault was the server's. One that may have been accepted without a reply is
sent again after a day, twice at most.
"""

import logging
from collections.abc import Iterable
from datetime import timedelta

from django.utils import timezone

from ..models import Attempt
from .transport import Outcome, Verdict

logger = logging.getLogger(__name__)

#: Waits between the attempts of an e-mail that the server refuses for now, and the wait before
#: the last attempt of one that it rejects: nine attempts in about four hours.
LADDER = [timedelta(minutes=minutes) for minutes in (1, 2, 4, 8, 16, 32, 64)]
LAST_WAIT = timedelta(hours=2)

#: An e-mail that may have been accepted is sent again at most this often, after this time each.
MAX_REPEATS = 2
REPEAT_AFTER = timedelta(days=1)

#: When an attempt that left no trace is repeated for the first time: its process was killed.
KILLED_AFTER = timedelta(minutes=10)


def get_attempts(message_ids: Iterable[str]) -> dict[str, Attempt]:
    """Return the unfinished e-mails among these by message id."""
    rows = Attempt.objects.filter(message_id__in=list(message_ids))
    return {row.message_id: row for row in rows}


def request(message_id: str) -> None:
    """Store that an e-mail is wanted."""
    Attempt.objects.get_or_create(message_id=message_id, defaults={"next_at": timezone.now()})


def begin(message_id: str, *, killed: bool = False) -> None:
    """Record that an e-mail may be sent from now on, in case nothing more is heard of it.

    ``killed`` if an earlier attempt was not recorded because its process was killed.
    """
    attempt = Attempt.objects.filter(message_id=message_id).first() or Attempt(
        message_id=message_id
    )
    attempt.unknown += 2 if killed else 1
    attempt.next_at = timezone.now() + (KILLED_AFTER if attempt.unknown == 1 else REPEAT_AFTER)
    attempt.save()


def is_exhausted(attempt: Attempt) -> bool:
    """Return whether an e-mail may have been accepted so often that it is given up.

    Each attempt may have ended with its process.
    """
    return attempt.unknown > MAX_REPEATS


def end(message_id: str, outcome: Outcome) -> bool:
    """Record what became of an e-mail that was not sent; return whether it is given up.

    A failure of the server is no reason to give an e-mail up.
    """
    attempt = Attempt.objects.get(message_id=message_id)
    now = timezone.now()
    if outcome.verdict is not Verdict.UNKNOWN:
        attempt.unknown -= 1
    match outcome.verdict:
        case Verdict.UNUSABLE:
            attempt.next_at = now
        case Verdict.UNKNOWN if attempt.unknown <= MAX_REPEATS:
            attempt.next_at = now + REPEAT_AFTER
        case Verdict.REFUSED if attempt.refusals < len(LADDER):
            attempt.next_at = now + LADDER[attempt.refusals]
            attempt.refusals += 1
        case Verdict.REFUSED | Verdict.REJECTED if outcome.stops or not attempt.rejected:
            attempt.next_at = now + LAST_WAIT
            attempt.rejected = attempt.rejected or not outcome.stops
        case _:
            attempt.delete()
            logger.warning("E-mail %s is given up: %s", message_id, outcome.reason)
            return True
    attempt.reason = outcome.reason[:500]
    attempt.save()
    logger.warning(
        "E-mail %s was not accepted, next attempt %s: %s",
        message_id,
        timezone.localtime(attempt.next_at).strftime("%Y-%m-%d %H:%M"),
        outcome.reason,
    )
    return False


def finish(message_id: str) -> None:
    """Record that an e-mail needs no more attempts."""
    Attempt.objects.filter(message_id=message_id).delete()
