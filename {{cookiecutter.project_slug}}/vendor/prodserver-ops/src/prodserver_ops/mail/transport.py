"""The mail server: what its errors say, and whether it can be used at all.

All processes find out together that it cannot: if it is out of reach, or treats several
e-mails in a row alike, e-mail pauses. After each pause one process tries; the others go on
once an e-mail was accepted. ``python manage.py doctor`` shows the reason.
"""

import re
import smtplib
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from enum import Enum
from itertools import islice
from queue import SimpleQueue
from typing import Any

from celery.exceptions import SoftTimeLimitExceeded
from django.conf import settings
from django.core import mail

from ..core.limits import cache
from ..core.locks import try_lock

#: How long no e-mail is sent after the server could not be used, in seconds.
PAUSE_SECONDS = 60

#: How long a failure counts, in seconds.
FAILURE_SECONDS = 24 * 3600

PAUSED, FAILURES = "mail-paused", "mail-failed"


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
    """What happened to one e-mail; ``stops`` if the next one would fail in the same way."""

    verdict: Verdict
    reason: str = ""
    stops: bool = False


class Server:
    """The mail server, with a connection for each e-mail that is sent at the same time."""

    def __init__(self, failures: Failures | None) -> None:
        self.failures = failures
        #: The recipients of the e-mails that are being sent.
        self.sending: dict[Future[Exception | None], Any] = {}
        # One until the server accepts e-mail.
        self._capacity = 1
        self._limit = settings.EMAIL_CONNECTIONS
        self._count = 0
        # A connection that is in use is not in the queue.
        self._free: SimpleQueue[Any] = SimpleQueue()
        self._threads = ThreadPoolExecutor(self._limit)

    def open(self) -> None:
        """Open one more connection."""
        connection = mail.get_connection()
        connection.open()
        self._free.put(connection)
        self._count += 1

    def close(self) -> None:
        """Close the connections that are not in use."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        while not self._free.empty():
            self._free.get().close()

    @property
    def room(self) -> int:
        """How many more e-mails can be sent now."""
        return self._capacity - len(self.sending)

    def send(self, email: Any) -> Outcome:
        """Send an e-mail; return what became of it."""
        return self._judge(self._try(email))

    def start(self, emails: Sequence[tuple[Any, Any]]) -> None:
        """Begin to send e-mails, each given with its recipient."""
        self._open_more(len(self.sending) + len(emails))
        for recipient, email in emails:
            self.sending[self._threads.submit(self._try, email)] = recipient

    def finish(self) -> list[tuple[Any, Outcome]]:
        """Wait for a quarter of the e-mails that are being sent; return recipients and outcomes."""
        time_limit = None
        quarter = (len(self.sending) + 3) // 4
        try:
            deque(islice(as_completed(self.sending), quarter), maxlen=0)
        except SoftTimeLimitExceeded as error:
            time_limit = error
        outcomes = []
        for each in list(self.sending):
            if each.done():
                outcomes.append((self.sending.pop(each), self._judge(each.result())))
            elif time_limit:
                outcomes.append((self.sending.pop(each), self._judge(time_limit)))
        accepted = all(outcome.verdict is Verdict.SENT for _, outcome in outcomes)
        self._capacity = self._limit if accepted else 1
        return outcomes

    def _open_more(self, wanted: int) -> None:
        """Open the connections that are missing, unless the server refuses some."""
        missing = min(wanted, self._limit) - self._count
        for opening in [self._threads.submit(self.open) for _ in range(missing)]:
            if opening.exception() is not None:
                self._limit = max(self._count, 1)

    def _try(self, email: Any) -> Exception | None:
        """Send an e-mail through a connection that is free; return the error if there is one."""
        connection = self._free.get()
        try:
            connection.send_messages([email])
        except Exception as error:
            # After a lost connection the backend opens another one.
            if classify_error(error)[0] is Verdict.UNKNOWN:
                connection.close()
            return error
        finally:
            self._free.put(connection)
        return None

    def _judge(self, error: Exception | None) -> Outcome:
        if error is None:
            if self.failures is not None:
                cache.delete(FAILURES)
                self.failures = None
            return Outcome(Verdict.SENT)
        if isinstance(error, SoftTimeLimitExceeded):
            return Outcome(Verdict.UNKNOWN, "the time limit of the task", stops=True)
        verdict, reason = classify_error(error)
        return Outcome(verdict, reason, self.count(verdict, reason))

    def count(self, verdict: Verdict, reason: str) -> bool:
        """Count an e-mail that failed; return whether it is a failure of the server."""
        if verdict not in MAX_IN_ROW:
            return False
        failures, before = Failures(verdict, reason), get_failures()
        if before is not None and before.is_like(failures):
            failures = replace(failures, count=before.count + 1)
        # Not the object: another version of the service may read it.
        values = verdict.name, reason, failures.count
        cache.set(FAILURES, values, FAILURE_SECONDS)
        self.failures = failures
        return failures.is_general


@contextmanager
def connect() -> Iterator[Server]:
    """Yield the mail server with an open connection.

    Raises Paused if e-mail pauses or another process tries whether the server can be used
    again. If it cannot, e-mail pauses and the error is raised.
    """
    state = cache.get_many([PAUSED, FAILURES])
    if PAUSED in state:
        raise Paused
    failures = _read(state.get(FAILURES))
    with ExitStack() as stack:
        general = failures is not None and failures.is_general
        if general and not stack.enter_context(try_lock("mail-server")):
            raise Paused
        server = Server(failures)
        stack.callback(server.close)
        try:
            server.open()
            yield server
        except (OSError, ServerFailed) as error:
            if not isinstance(error, ServerFailed):
                server.count(Verdict.UNUSABLE, f"{type(error).__name__}: {error}")
            cache.set(PAUSED, True, PAUSE_SECONDS)
            raise


def is_paused() -> bool:
    """Return whether the mail server could not be used a moment ago."""
    return cache.get(PAUSED) is not None


def get_failures() -> Failures | None:
    """Return the last e-mails that failed, unless one was accepted since."""
    return _read(cache.get(FAILURES))


def _read(values: tuple[str, str, int] | None) -> Failures | None:
    """Return the failures that an entry of the cache stands for."""
    if values is None:
        return None
    verdict, reason, count = values
    return Failures(Verdict[verdict], reason, count)


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
