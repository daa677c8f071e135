"""The mail server: what its errors say, and whether it can be used at all.

All processes find out together that it cannot: if it is out of reach, or treats several
e-mails in a row alike, e-mail pauses. After each pause one process tries; the others go on
once an e-mail was accepted. ``python manage.py doctor`` shows the reason.
"""

import re
import smtplib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

from celery.exceptions import SoftTimeLimitExceeded
from django.core import mail
from django.core.cache import caches

from .locks import try_lock

#: How long no e-mail is sent after the server could not be used, in seconds.
PAUSE_SECONDS = 60

#: How long a failure counts, in seconds.
FAILURE_SECONDS = 24 * 3600

PAUSED, FAILURES = "mail-paused", "mail-failures"


class Verdict(Enum):
    """What a mail server's reply, or an error of a mail backend, says about one e-mail."""

    SENT = "accepted"
    INVALID = "never sent: it cannot be sent as it is"
    REJECTED = "rejected for good"
    REFUSED = "refused for now"
    UNKNOWN = "no reply: the server may have accepted it"
    UNUSABLE = "not sent: the server cannot be used"


#: How many e-mails in a row that fail in the same way are a failure of the server.
MAX_IN_ROW = {Verdict.REJECTED: 5, Verdict.UNKNOWN: 3, Verdict.UNUSABLE: 1}


class Paused(Exception):
    """No e-mail is sent at the moment."""


class ServerFailed(Exception):
    """The mail server treats every e-mail in the same way."""


@dataclass(frozen=True)
class Failures:
    """E-mails in a row that failed in the same way."""

    verdict: Verdict
    reason: str
    count: int = 1

    @property
    def is_general(self) -> bool:
        """Whether they are a failure of the server."""
        return self.count >= MAX_IN_ROW[self.verdict]

    def is_like(self, other: "Failures") -> bool:
        """Return whether another e-mail failed in the same way, whoever received it."""
        return self.verdict is other.verdict and _get_kind(self.reason) == _get_kind(other.reason)


def _get_kind(reason: str) -> str:
    """Return a reason without the words that name recipients or messages."""
    code, *words = reason.split() or [""]
    return " ".join([code, *(word for word in words if not re.search(r"[\d<>@]", word))])


@dataclass(frozen=True)
class Outcome:
    """What became of one e-mail; ``stops`` if the next one would fare no better."""

    verdict: Verdict
    reason: str = ""
    stops: bool = False


class Server:
    """An open connection to the mail server."""

    def __init__(self, connection: Any, failures: Failures | None) -> None:
        self.connection = connection
        self.failures = failures

    def send(self, email: Any) -> Outcome:
        """Send an e-mail; return what became of it."""
        try:
            self.connection.send_messages([email])
        except SoftTimeLimitExceeded:
            self.connection.close()
            return Outcome(Verdict.UNKNOWN, "the time limit of the task", stops=True)
        except Exception as error:
            verdict, reason = classify_error(error)
            if verdict is Verdict.UNKNOWN:
                self.connection.close()
            return Outcome(verdict, reason, self.count(verdict, reason))
        if self.failures is not None:
            caches["limits"].delete(FAILURES)
            self.failures = None
        return Outcome(Verdict.SENT)

    def count(self, verdict: Verdict, reason: str) -> bool:
        """Count an e-mail that failed; return whether it is a failure of the server."""
        if verdict not in MAX_IN_ROW:
            return False
        failures, before = Failures(verdict, reason), get_failures()
        if before is not None and before.is_like(failures):
            failures = replace(failures, count=before.count + 1)
        caches["limits"].set(FAILURES, failures, FAILURE_SECONDS)
        self.failures = failures
        return failures.is_general


@contextmanager
def connect() -> Iterator[Server]:
    """Yield an open connection to the mail server.

    Raises Paused if e-mail pauses or another process tries whether the server can be used
    again. If it cannot, e-mail pauses and the error is raised.
    """
    state = caches["limits"].get_many([PAUSED, FAILURES])
    failures = state.get(FAILURES)
    if PAUSED in state:
        raise Paused
    with ExitStack() as stack:
        general = failures is not None and failures.is_general
        if general and not stack.enter_context(try_lock("mail-server")):
            raise Paused
        connection = mail.get_connection()
        server = Server(connection, failures)
        try:
            connection.open()
            stack.callback(connection.close)
            yield server
        except (OSError, ServerFailed) as error:
            if not isinstance(error, ServerFailed):
                server.count(Verdict.UNUSABLE, f"{type(error).__name__}: {error}")
            caches["limits"].set(PAUSED, True, PAUSE_SECONDS)
            raise


def is_paused() -> bool:
    """Return whether the mail server could not be used a moment ago."""
    return caches["limits"].get(PAUSED) is not None


def get_failures() -> Failures | None:
    """Return the last e-mails that failed, unless one was accepted since."""
    failures: Failures | None = caches["limits"].get(FAILURES)
    return failures


def classify_error(error: Exception) -> tuple[Verdict, str]:
    """Return what an error of a mail backend says about one e-mail, and the reason.

    Replies 5xx of an SMTP server are permanent, replies 4xx are temporary (RFC 5321, section
    4.2.1); 421 ends the connection. A failed login or a refused sender concerns every e-mail.
    Errors of HTTP APIs have a ``status_code``. An error without a reply is unknown: a lost
    connection, a server that takes too long, an exception of another backend.
    """
    text: str | bytes
    match error:
        case smtplib.SMTPRecipientsRefused():
            code, text = next(iter(error.recipients.values()))
        case smtplib.SMTPSenderRefused() if error.smtp_code < 500 and error.smtp_code != 421:
            code, text = error.smtp_code, error.smtp_error
        case smtplib.SMTPDataError():
            code, text = error.smtp_code, error.smtp_error
        case smtplib.SMTPNotSupportedError() | ValueError() | TypeError():
            return Verdict.INVALID, f"{type(error).__name__}: {error}"
        case (
            smtplib.SMTPAuthenticationError()
            | smtplib.SMTPSenderRefused()
            | smtplib.SMTPConnectError()
            | smtplib.SMTPHeloError()
            | ConnectionRefusedError()
        ):
            return Verdict.UNUSABLE, f"{type(error).__name__}: {error}"
        case _:
            reason = f"{type(error).__name__}: {error}"
            return _classify_status(getattr(error, "status_code", None)), reason
    text = text.decode(errors="replace") if isinstance(text, bytes) else text
    if code == 421:
        return Verdict.UNUSABLE, f"{code} {text}"
    return Verdict.REJECTED if code >= 500 else Verdict.REFUSED, f"{code} {text}"


def _classify_status(status: Any) -> Verdict:
    """Return what the status of an HTTP API says; an error on the way to it has none."""
    match status:
        case 401 | 402 | 403:
            return Verdict.UNUSABLE
        case 408 | 409 | 425 | 429:
            return Verdict.REFUSED
        case int() if 400 <= status < 500:
            return Verdict.REJECTED
        case _:
            return Verdict.UNKNOWN
