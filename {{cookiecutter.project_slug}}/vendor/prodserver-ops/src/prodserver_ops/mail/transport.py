"""The mail server: the meaning of its errors, and whether it is usable.

All processes share this state. If the server is unreachable, or several e-mails in a row fail in
the same way, e-mail is paused. After each pause, one process tries to send an e-mail; the others
continue when it is accepted. ``python manage.py doctor`` shows the reason.
"""

import re
import smtplib
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from enum import Enum
from functools import partial
from itertools import islice
from queue import SimpleQueue
from typing import Any

from celery.exceptions import SoftTimeLimitExceeded
from django.conf import settings
from django.core import mail

from ..core.database import persist
from ..core.limits import entries
from ..core.locks import try_lock
from ..scheduling.restores import find_restore

#: How long e-mail is paused after the server was unusable, in seconds.
PAUSE_SECONDS = 60

#: How long a failure counts, in seconds.
FAILURE_SECONDS = 24 * 3600

PAUSED, FAILURES = "mail-paused", "mail-failed"


class Verdict(Enum):
    """The result of sending one e-mail, from the server's reply or the mail backend's error."""

    SENT = "accepted"
    INVALID = "not sent: the e-mail is invalid"
    REJECTED = "rejected permanently"
    REFUSED = "refused temporarily"
    UNKNOWN = "no reply: the server may have accepted it"
    UNUSABLE = "not sent: the server is unusable"


#: How many e-mails in a row must fail in the same way to count as a failure of the server.
MAX_IN_ROW = {Verdict.REJECTED: 5, Verdict.UNKNOWN: 3, Verdict.UNUSABLE: 1}


class Paused(Exception):
    """E-mail is paused."""


class ServerFailed(Exception):
    """The mail server would fail for every e-mail."""


@dataclass(frozen=True)
class Failures:
    """E-mails in a row that failed in the same way."""

    verdict: Verdict
    reason: str
    count: int = 1

    @property
    def is_general(self) -> bool:
        """Whether they count as a failure of the server."""
        return self.count >= MAX_IN_ROW[self.verdict]

    def is_like(self, other: "Failures") -> bool:
        """Return whether another e-mail failed in the same way, regardless of its recipient."""
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
    """The mail server, with several connections to send e-mails at the same time."""

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
        """Send an e-mail; return the outcome."""
        return self._judge(self._try(email))

    def start(self, emails: Sequence[tuple[Any, Any]]) -> None:
        """Start to send e-mails, given as pairs of recipient and e-mail."""
        self._open_more(len(self.sending) + len(emails))
        for recipient, email in emails:
            self.sending[self._threads.submit(self._try, email)] = recipient

    def finish(self) -> list[tuple[Any, Outcome]]:
        """Wait until a quarter of the e-mails is sent; return recipients and outcomes."""
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
        """Open missing connections; if the server refuses some, use fewer."""
        missing = min(wanted, self._limit) - self._count
        for opening in [self._threads.submit(self.open) for _ in range(missing)]:
            if opening.exception() is not None:
                self._limit = max(self._count, 1)

    def _try(self, email: Any) -> Exception | None:
        """Send an e-mail over a free connection; return the error, if any."""
        connection = self._free.get()
        try:
            connection.send_messages([email])
        except Exception as error:
            # The backend opens a new connection after a lost one.
            if classify_error(error)[0] is Verdict.UNKNOWN:
                connection.close()
            return error
        finally:
            self._free.put(connection)
        return None

    def _judge(self, error: Exception | None) -> Outcome:
        if error is None:
            if self.failures is not None:
                persist(partial(entries.delete, FAILURES))
                self.failures = None
            return Outcome(Verdict.SENT)
        if isinstance(error, SoftTimeLimitExceeded):
            return Outcome(Verdict.UNKNOWN, "the task exceeded its time limit", stops=True)
        verdict, reason = classify_error(error)
        return Outcome(verdict, reason, persist(partial(self.count, verdict, reason)))

    def count(self, verdict: Verdict, reason: str) -> bool:
        """Count a failed e-mail; return whether the server itself has failed."""
        if verdict not in MAX_IN_ROW:
            return False
        failures, before = Failures(verdict, reason), get_failures()
        if before is not None and before.is_like(failures):
            failures = replace(failures, count=before.count + 1)
        # A tuple, because another version of the service may read it.
        values = verdict.name, reason, failures.count
        entries.set(FAILURES, values, FAILURE_SECONDS)
        self.failures = failures
        return failures.is_general


@contextmanager
def connect() -> Iterator[Server]:
    """Yield the mail server with an open connection.

    Raises Paused if e-mail is paused, or another process is trying the server after a pause. If the
    server is unusable, pauses e-mail and raises the error.
    """
    state = entries.get_many([PAUSED, FAILURES])
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
            entries.set(PAUSED, True, PAUSE_SECONDS)
            raise


def is_paused() -> bool:
    """Return whether e-mail is paused, also because the database was restored."""
    return entries.get(PAUSED) is not None or find_restore() is not None


def get_failures() -> Failures | None:
    """Return the latest failures, unless an e-mail has been accepted since then."""
    return _read(entries.get(FAILURES))


def _read(values: tuple[str, str, int] | None) -> Failures | None:
    """Return the failures that a cache entry contains."""
    if values is None:
        return None
    verdict, reason, count = values
    return Failures(Verdict[verdict], reason, count)


def classify_error(error: Exception) -> tuple[Verdict, str]:
    """Return what an error of a mail backend says about one e-mail, and the reason.

    Replies 5xx of an SMTP server are permanent, replies 4xx are temporary (RFC 5321, section
    4.2.1); 421 ends the connection. A failed login or a refused sender affects every e-mail.
    Errors of HTTP APIs have a ``status_code``. The verdict on an error without a reply is
    ``UNKNOWN``: a lost connection, a timeout, or an exception of another backend.
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
    """Return the verdict for the status code of an HTTP API; network errors have none."""
    match status:
        case 401 | 402 | 403:
            return Verdict.UNUSABLE
        case 408 | 409 | 425 | 429:
            return Verdict.REFUSED
        case int() if 400 <= status < 500:
            return Verdict.REJECTED
        case _:
            return Verdict.UNKNOWN
