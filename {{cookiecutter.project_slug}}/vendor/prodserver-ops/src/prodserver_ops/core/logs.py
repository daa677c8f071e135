"""Logs: one line for each event, with its process and its request or task.

``LOG_FORMAT`` selects text, for people, or JSON, for machines. Secrets and personal data are
redacted in every event, whichever library logs it; see ``redaction.py``.
"""

import json
import logging
import os
import re
import secrets
import select
import socket
import stat
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from contextvars import ContextVar
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from io import TextIOWrapper
from itertools import islice
from types import TracebackType
from typing import Any, TextIO
from uuid import UUID

from celery import current_task
from celery.utils.log import LoggingProxy
from django.conf import settings
from django.http import HttpRequest, HttpResponse
from django.utils.encoding import escape_uri_path
from django.utils.log import configure_logging

from .clients import current_request, get_address
from .redaction import SECRET_NAME, redact
from .text import fit, make_storable, shorten
from .urls import get_path

logger = logging.getLogger(__name__)
access = logging.getLogger(f"{__package__}.access")

#: The id of the request that the current thread handles.
request_id: ContextVar[str | None] = ContextVar("request_id", default=None)

#: Pattern of a valid X-Request-ID header; a request with an invalid header gets a new id.
VALID_REQUEST_ID = re.compile(r"[A-Za-z0-9_.:=-]{8,128}")

#: Maximum length of an event, in bytes. Longer ones lose the middle of their message and traceback.
MAX_EVENT = 16_000

#: Maximum number of fields of an event that were passed with ``extra``.
MAX_FIELDS = 100

#: How long an event waits for a reader that does not read, in seconds.
PATIENCE = 1

#: The attributes of every event. Others were passed with ``extra``.
STANDARD = {*vars(logging.makeLogRecord({})), "message", "asctime", "context"}

#: Loggers whose ``extra`` is not shown, such as SQL and colors of a terminal.
NO_FIELDS = re.compile(r"(django|celery|kombu|uvicorn|granian|_granian|gunicorn)(\.|$)")

#: Types of fields that are shown. Libraries pass whole requests and task arguments in others.
JSON_TYPES = (int, float, bool, type(None))
TEXT_TYPES = (str, Decimal, UUID, date, timedelta)

#: Returns an object as JSON.
encode = json.JSONEncoder(default=str).encode

_process = "command"
_stream: TextIO | None = None


def configure(process: str) -> None:
    """Send all logs and prints of this process to stdout, under the given process name."""
    global _process, _stream
    _process = process
    # A forked process of a web server inherits the proxy that is set below. If the project's
    # LOGGING uses sys.stdout, the proxy would write to itself.
    if isinstance(sys.stdout, LoggingProxy) and _stream is not None:
        sys.stdout = sys.__stdout__ = _stream  # type: ignore[assignment, misc]
    _stream = sys.stdout
    if isinstance(_stream, TextIOWrapper):
        # An encoding such as ASCII must not make events and prints fail.
        _stream.reconfigure(errors="backslashreplace")
    configure_logging(settings.LOGGING_CONFIG, settings.LOGGING)
    logging.captureWarnings(True)
    # No formatter uses these: https://docs.python.org/3/howto/logging.html#optimization
    logging.logThreads = logging.logProcesses = False
    logging.logMultiprocessing = False
    logging.logAsyncioTasks = False  # type: ignore[attr-defined]
    logging._srcfile = None
    if settings.LOG_FORMAT == "json":
        sys.excepthook = _log_crash
        stdout: Any = LoggingProxy(logging.getLogger("stdout"), logging.INFO)
        sys.stdout = sys.__stdout__ = stdout  # type: ignore[misc]


def get_process() -> str:
    """Return the name that ``configure()`` was given, or ``command``."""
    return _process


def make_handler() -> logging.Handler:
    """Return the handler of all events: stdout for a process, stderr for a command."""
    return logging.StreamHandler() if _stream is None else PatientHandler(_stream)


class PatientHandler(logging.StreamHandler[TextIO]):
    """Writes events, and drops those that a reader does not take within ``PATIENCE``.

    A reader that hangs, or a full disk, must not stop requests, tasks or the end of the process. After the first
    event that was dropped, others are not waited for. Once the reader is back, a line says how many
    were lost.
    """

    def __init__(self, stream: TextIO) -> None:
        super().__init__(stream)
        self.lost, self.lost_at, self.is_cut = 0, 0.0, False
        self._fd = -1
        self._socket: socket.socket | None = None
        try:
            fd = stream.fileno()
            mode = os.fstat(fd).st_mode
        except (OSError, AttributeError, ValueError):
            return  # It is not a file.
        if stat.S_ISSOCK(mode):
            self._socket = socket.socket(fileno=os.dup(fd))
        elif stat.S_ISFIFO(mode):
            try:
                # Opened again, because other processes share the flags of stdout.
                self._fd = os.open(f"/proc/self/fd/{fd}", os.O_WRONLY | os.O_NONBLOCK)
            except OSError:
                self._fd = os.dup(fd)  # It belongs to another user, for example.
        elif stat.S_ISREG(mode):
            self._fd = os.dup(fd)  # Its disk may be full.

    def emit(self, record: logging.LogRecord) -> None:
        """Write an event, after the number of those that were lost before it."""
        if self._fd < 0 and self._socket is None:
            super().emit(record)
            return
        try:
            text = self.format(record)
        except Exception:
            self.handleError(record)
            return
        if self.lost:
            seconds = round(time.monotonic() - self.lost_at)
            note = f"{self.lost} log events were lost: they could not be written for {seconds} seconds"
            lost = logger.makeRecord(logger.name, logging.WARNING, "", 0, note, (), None)
            text = f"{self.format(lost)}{self.terminator}{text}"
        if self.write(text, 0 if self.lost else PATIENCE):
            self.lost = 0
            return
        self.lost_at = self.lost_at if self.lost else time.monotonic()
        self.lost += 1

    def write(self, text: str, seconds: float) -> bool:
        """Write a line within so many seconds; return whether all of it is written."""
        encoding = self.stream.encoding or "utf-8"
        data = f"{text}{self.terminator}".encode(encoding, errors="backslashreplace")
        if self.is_cut:
            data = b"\n" + data
        deadline = time.monotonic() + seconds
        written = 0
        poll = select.poll()
        poll.register(self._fd if self._socket is None else self._socket, select.POLLOUT)
        try:
            while written < len(data):
                wait = max(0.0, deadline - time.monotonic())
                if not poll.poll(wait * 1000):
                    break
                with suppress(BlockingIOError):
                    written += self._write(data[written : written + select.PIPE_BUF])
        except OSError:
            pass  # The reader is gone.
        if written:
            self.is_cut = written < len(data)
        return written == len(data)

    def _write(self, data: bytes) -> int:
        if self._socket is not None:
            return self._socket.send(data, socket.MSG_DONTWAIT)
        return os.write(self._fd, data)

    def close(self) -> None:
        """Close what was opened; stdout stays open."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        if self._socket is not None:
            self._socket.close()
            self._socket = None
        super().close()


def _log_crash(
    kind: type[BaseException], error: BaseException, traceback: TracebackType | None
) -> None:
    logger.critical("The process crashed", exc_info=(kind, error, traceback))


def get_context(record: logging.LogRecord) -> dict[str, str | None]:
    """Return the process of an event, and the id of its request or task."""
    context: dict[str, str | None] = {"process": _process}
    if request := request_id.get():
        context["request_id"] = request
    # A worker's main process passes the task that the event is about in "data".
    data = getattr(record, "data", None)
    if current_task:
        context["task_id"] = current_task.request.id
    elif isinstance(data, dict) and "id" in data:
        context["task_id"] = data["id"]
    return context


def get_fields(record: logging.LogRecord) -> dict[str, Any]:
    """Return the first ``MAX_FIELDS`` simple values that were passed with ``extra``, redacted."""
    if NO_FIELDS.match(record.name):
        return {}
    fields = (
        (name, value)
        for name, value in vars(record).items()
        if name not in STANDARD and isinstance(value, JSON_TYPES + TEXT_TYPES)
    )
    return {
        name: (
            "***"
            if SECRET_NAME.search(name)
            else value
            if isinstance(value, JSON_TYPES)
            else redact(str(value))
        )
        for name, value in islice(fields, MAX_FIELDS)
    }


class TextFormatter(logging.Formatter):
    """Formats an event for people, with any traceback on the lines below it."""

    default_time_format = "%H:%M:%S"
    default_msec_format = None

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(context)s %(name)s: %(message)s")

    def format(self, record: logging.LogRecord) -> str:
        """Return the event as text."""
        record.context = " ".join(filter(None, get_context(record).values()))
        record.exc_text = None  # Another formatter may have set it.
        return super().format(record)

    def formatMessage(self, record: logging.LogRecord) -> str:
        """Return the line of the event, with the fields that its message does not contain."""
        fields = {} if record.name == access.name else get_fields(record)
        shown = "".join(f" {name}={value}" for name, value in fields.items())
        return self.limit(super().formatMessage(record) + shown)

    def formatException(self, ei: Any) -> str:
        """Return the lines of the traceback."""
        return self.limit(super().formatException(ei))

    def formatStack(self, stack_info: str) -> str:
        """Return the lines of a stack."""
        return self.limit(super().formatStack(stack_info))

    def limit(self, text: str) -> str:
        """Return the redacted text, with at most half of the maximum length."""
        text = make_storable(redact(text))
        return fit(MAX_EVENT // 2, lambda length: shorten(text, length))


class JsonFormatter(logging.Formatter):
    """Formats an event as one line of JSON."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the event as JSON."""
        time = datetime.fromtimestamp(record.created, UTC)
        event = {
            "time": time.isoformat(timespec="milliseconds"),
            "level": record.levelname,
            **get_context(record),
            "logger": record.name,
            "message": redact(record.getMessage()),
        }
        event |= {name: value for name, value in get_fields(record).items() if name not in event}
        if record.exc_info:
            event["exception"] = redact(self.formatException(record.exc_info))
        return fit(
            MAX_EVENT,
            lambda length: encode(
                {
                    name: shorten(value, length) if isinstance(value, str) else value
                    for name, value in event.items()
                }
            ),
        )


class RejectedRequestFilter(logging.Filter):
    """Logs a request that Django rejects as one line at WARNING.

    It is not an error of the service. By default, Django would log a traceback, and Sentry would
    report it.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        """Change the level of the event, remove its traceback and keep it."""
        record.levelno, record.levelname = logging.WARNING, "WARNING"
        record.exc_info = record.exc_text = None
        return True


class RequestLogMiddleware:
    """Gives each request an id, and logs its status and duration.

    The id comes from the proxy's X-Request-ID header if that is valid. The response has
    the same header.
    """

    def __init__(self, get_response: Callable[[HttpRequest], HttpResponse]) -> None:
        self.get_response = get_response

    def __call__(self, request: HttpRequest) -> HttpResponse:
        """Handle the request and log it."""
        sent_id = request.META.get("HTTP_X_REQUEST_ID", "")
        current_id = sent_id if VALID_REQUEST_ID.fullmatch(sent_id) else secrets.token_hex(16)
        token, request_token = request_id.set(current_id), current_request.set(request)
        start = time.perf_counter()
        try:
            response = self.get_response(request)
            if response.streaming:
                self.log_at_close(request, response, start, current_id)
            else:
                self.log(request, response, start)
        finally:
            request_id.reset(token)
            current_request.reset(request_token)
        response.headers["X-Request-ID"] = current_id
        return response

    def log_at_close(
        self, request: HttpRequest, response: HttpResponse, start: float, id_: str
    ) -> None:
        """Log a request when its stream ends, or when the client leaves."""
        close, closed = response.close, False

        def close_and_log() -> None:
            nonlocal closed
            # The response may be closed again, also while it closes its parts.
            was_closed, closed = closed, True
            token = request_id.set(id_)
            try:
                close()
            finally:
                if not was_closed:
                    self.log(request, response, start)
                request_id.reset(token)

        response.close = close_and_log  # type: ignore[method-assign]

    def log(self, request: HttpRequest, response: HttpResponse, start: float) -> None:
        """Log a request that was received at ``start``, and how long it took since then."""
        duration = round((time.perf_counter() - start) * 1000)
        path = redact(escape_uri_path(request.path))
        # Load balancers and the home page in development ask every few seconds.
        frequent = getattr(response, "is_frequent", False)
        frequent = frequent or get_path(request.path_info).startswith("/health/")
        quiet = frequent and response.status_code < 400
        access.log(
            logging.DEBUG if quiet else logging.INFO,
            "%s %s %s %s ms",
            request.method,
            path,
            response.status_code,
            duration,
            extra={
                "method": request.method,
                "path": path,
                "status": response.status_code,
                "duration_ms": duration,
                "client": get_address(request),
            },
        )
