"""Logs: one line for every event, which tells its process and its request or task.

The settings choose text, for people, or JSON, for machines. Whatever library writes an
event, no password, query string, unsubscribe token or e-mail address of it gets out.
"""

import json
import logging
import re
import sys
import time
import uuid
from contextvars import ContextVar
from datetime import UTC, datetime

from celery import current_task
from celery.utils.log import LoggingProxy
from django.conf import settings
from django.utils.encoding import escape_uri_path
from django.utils.log import configure_logging

logger = logging.getLogger(__name__)
access = logging.getLogger(f"{__package__}.access")

#: The request that is answered in this thread.
request_id = ContextVar("request_id", default=None)

#: What a request id of the proxy's may look like; any other is replaced.
SANE_ID = re.compile(r"[A-Za-z0-9_.:=-]{8,128}")

#: What is masked: account and password in a URL, query strings, tokens that unsubscribe,
#: e-mail addresses (the names of Celery's nodes are none), the addresses of clients, and
#: the values that PostgreSQL tells of a row which it refuses.
MASKS = [
    (re.compile(r"(?<=://)\S{0,300}@"), "***@"),
    (re.compile(r"(?<=[\w/])\?[^\s'\"]+"), "?***"),
    (re.compile(r"(?<=/unsubscribe/)[^\s/'\"]+"), "***"),
    (re.compile(r"\b(?!celery(?:beat)?@)[\w.+-]{1,64}(?:@|%40)[\w-]+(?:\.[\w-]+)+"), "***@***"),
    (re.compile(r"\bip=\S+"), "ip=***"),
    (re.compile(r"(?<=\)=)\(.*?\)|(?<=Failing row contains )\(.*\)"), "(***)"),
]

#: What code may give an event beside its message, by ``extra``, for JSON to show.
#: All else stays inside: Django hands whole requests over, and Celery arguments.
FIELDS = ("method", "path", "status", "duration_ms")

_process, _stream = "command", None


def start(process):
    """Log as the process of that name from now on, to stdout, also what is only printed."""
    global _process, _stream
    _process, _stream = process, sys.stdout
    configure_logging(settings.LOGGING_CONFIG, settings.LOGGING)
    logging.captureWarnings(True)
    if settings.LOG_FORMAT == "json":
        sys.excepthook = _log_crash
        sys.stdout = sys.__stdout__ = LoggingProxy(logging.getLogger("stdout"), logging.INFO)


def make_handler():
    """Return the handler of all events: a command writes them to stderr, and output to stdout."""
    return logging.StreamHandler(_stream)


def _log_crash(kind, error, traceback):
    logger.critical("The process crashed", exc_info=(kind, error, traceback))


def mask(text):
    """Return the text without what nobody may read in a log."""
    for pattern, instead in MASKS:
        text = pattern.sub(instead, text)
    return text


def context(record):
    """Return what an event belongs to: the process, and the request or the task."""
    found = {"process": _process}
    if request := request_id.get():
        found["request_id"] = request
    # The main process of a worker tells in "data" which task it speaks of.
    about = getattr(record, "data", None)
    if current_task:
        found["task_id"] = current_task.request.id
    elif isinstance(about, dict) and "id" in about:
        found["task_id"] = about["id"]
    return found


class TextFormatter(logging.Formatter):
    """Formats an event for people, a traceback below it."""

    default_time_format = "%H:%M:%S"
    default_msec_format = None

    def __init__(self):
        super().__init__("%(asctime)s %(levelname)s %(context)s %(name)s: %(message)s")

    def format(self, record):
        record.context = " ".join(filter(None, context(record).values()))
        return mask(super().format(record))


class JsonFormatter(logging.Formatter):
    """Formats an event as JSON in one line."""

    def format(self, record):
        event = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            **context(record),
            "logger": record.name,
            "message": mask(record.getMessage()),
        }
        for field in FIELDS:
            if hasattr(record, field):
                event[field] = getattr(record, field)
        if record.exc_info:
            event["exception"] = mask(self.formatException(record.exc_info))
        return json.dumps(event, default=str)


class RequestLogMiddleware:
    """Gives every request an id, and logs it, once it is answered, with status and duration.

    The id is that of the header X-Request-ID, where the proxy sends a sane one. The
    answer has it too.
    """

    def __init__(self, get_response):
        self.get_response = get_response

    def __call__(self, request):
        sent = request.headers.get("X-Request-ID", "")
        own_id = sent if SANE_ID.fullmatch(sent) else uuid.uuid4().hex
        token = request_id.set(own_id)
        start = time.perf_counter()
        try:
            response = self.get_response(request)
            self.log(request, response, round((time.perf_counter() - start) * 1000))
        finally:
            request_id.reset(token)
        response.headers["X-Request-ID"] = own_id
        return response

    def log(self, request, response, duration):
        path = mask(escape_uri_path(request.path))
        # Load balancers ask every few seconds.
        quiet = path.startswith("/health/") and response.status_code < 400
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
            },
        )
