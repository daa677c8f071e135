"""Unfinished e-mails: each has a row with the time of the next attempt.

If the server refuses an e-mail temporarily, it is tried again after increasing waits. A rejected
e-mail is tried once more, in case the server had a problem. If the server may have accepted an
e-mail without a reply, it is sent again after a day, at most twice.
"""

import logging
from collections.abc import Iterable
from datetime import timedelta

from django.utils import timezone

from ..models import Attempt
from .transport import Outcome, Verdict

logger = logging.getLogger(__name__)

#: The waits between attempts after temporary refusals, and the wait before the last attempt after
#: a rejection: nine attempts in about four hours.
LADDER = [timedelta(minutes=minutes) for minutes in (1, 2, 4, 8, 16, 32, 64)]
LAST_WAIT = timedelta(hours=2)

#: How often an e-mail that may have been accepted is sent again, and after how long.
MAX_REPEATS = 2
REPEAT_AFTER = timedelta(days=1)

#: How long after its start an attempt is first repeated, if its process was killed.
KILLED_AFTER = timedelta(minutes=10)


def get_attempts(message_ids: Iterable[str]) -> dict[str, Attempt]:
    """Return the unfinished e-mails among these by message id."""
    rows = Attempt.objects.filter(message_id__in=list(message_ids))
    return {row.message_id: row for row in rows}


def request(message_id: str) -> None:
    """Store a request to send an e-mail."""
    Attempt.objects.get_or_create(message_id=message_id, defaults={"next_at": timezone.now()})


def begin(message_id: str, *, killed: bool = False) -> None:
    """Record the start of an attempt, in case the process is killed before it ends.

    ``killed`` is whether an earlier attempt was not recorded because its process was killed.
    """
    attempt = Attempt.objects.filter(message_id=message_id).first() or Attempt(
        message_id=message_id
    )
    attempt.unknown += 2 if killed else 1
    attempt.next_at = timezone.now() + (KILLED_AFTER if attempt.unknown == 1 else REPEAT_AFTER)
    attempt.save()


def is_exhausted(attempt: Attempt) -> bool:
    """Return whether an e-mail may have been accepted too often to be sent again.

    Each attempt may have killed its process.
    """
    return attempt.unknown > MAX_REPEATS


def end(message_id: str, outcome: Outcome) -> bool:
    """Record the outcome of an e-mail that was not sent; return whether it is given up.

    An e-mail is never given up because of a failure of the server.
    """
    attempt = Attempt.objects.filter(message_id=message_id).first()
    if attempt is None:
        return True  # It was given up just now, but the database did not reply.
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
