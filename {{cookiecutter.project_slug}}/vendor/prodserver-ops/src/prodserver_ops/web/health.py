"""Health checks for load balancers and deploys.

``GET /health/live`` returns 200 while the process responds. ``GET /health/ready`` returns
200 if the database and the broker are available, otherwise 503, and the result of each check in
JSON. ``GET /health/ready?deep`` also requires that the database can be written, recent heartbeats
of each worker and of beat, and that no messages wait in a queue that no process consumes. It is also 503
if all threads of this process have been busy with the same requests for ``STUCK``, so that no other
request gets through. A check takes at most about ``READY_TIMEOUT``, even if a server does not respond. All methods get the same response. Requests at the same time
share one check, and those within a second its results, so that nobody can overload it.
"""

import logging
import math
import time
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from threading import Lock, Thread, local
from typing import Any

# The service's app: creating it with Django settings makes it the default in all threads.
from celery import current_app
from django.conf import settings
from django.core.handlers.wsgi import WSGIRequest
from django.core.signals import request_finished
from django.db import connection, transaction
from django.db.models import F
from django.http import HttpRequest, HttpResponse, JsonResponse

from ..broker import count_messages, find_refusal
from ..core import concurrently
from ..core.urls import get_path
from ..models import Origin
from ..scheduling import heartbeats, queues

logger = logging.getLogger(__name__)

#: Time limit to connect to the broker, in seconds.
BROKER_TIMEOUT = 3

#: Time limit of all checks together, in seconds.
READY_TIMEOUT = 4

#: How long all threads may be busy with the same requests, in seconds.
STUCK = 30


def check_database() -> None:
    """Raise an exception if the database does not respond to a query."""
    with connection.cursor() as cursor:
        cursor.execute("SELECT 1")


def check_writes() -> None:
    """Raise an exception if the database cannot be written, like a standby; change nothing."""
    with transaction.atomic():
        Origin.objects.update(restored_at=F("restored_at"))
        transaction.set_rollback(True)


def check_broker() -> None:
    """Raise an exception if the broker does not accept a connection."""
    with current_app.connection_for_write(connect_timeout=BROKER_TIMEOUT) as broker:
        broker.ensure_connection(max_retries=1, timeout=BROKER_TIMEOUT)


def check_heartbeat(process: str) -> None:
    """Raise an exception if no process with this name has recorded a heartbeat recently."""
    if not heartbeats.is_alive(process):
        raise NoHeartbeat


def check_queues() -> None:
    """Raise NotConsumed if messages wait in a queue that no process consumes, or none can be queued."""
    if problem := find_refusal(current_app, BROKER_TIMEOUT):
        raise NotConsumed(problem)
    counts = count_messages(current_app, queues.get_known(), BROKER_TIMEOUT)
    if problem := "; ".join(queues.describe_unconsumed(counts).values()):
        raise NotConsumed(problem)


class NotConsumed(Exception):
    """Messages are not taken by the broker or by a process. The text contains no secret."""


class NoHeartbeat(Exception):
    """A process hangs or is not running."""


CHECKS: dict[str, Callable[[], None]] = {"database": check_database, "broker": check_broker}


def get_deep_checks() -> dict[str, Callable[[], None]]:
    """Return the checks of ``/health/ready?deep`` by name."""
    processes = heartbeats.get_processes()
    beats = {name: partial(check_heartbeat, name) for name in processes}
    return {**CHECKS, "writes": check_writes, **beats, "queues": check_queues}


#: How long the results of checks are used again, in seconds.
MAX_AGE = 1


class SharedChecks:
    """Checks that run at most once at a time and once in ``MAX_AGE``, however many callers ask."""

    def __init__(self, get_checks: Callable[[], dict[str, Callable[[], None]]]) -> None:
        self.get_checks = get_checks
        self.lock = Lock()
        self.results: Future[dict[str, str]] | None = None
        self.expires = 0.0
        #: The threads of running checks, by name. A check that hangs is not started again.
        self.running: dict[str, Thread] = {}
        #: What failed in the last run, by name.
        self.problems: dict[str, Exception] = {}

    def get_results(self) -> dict[str, str]:
        """Return ``ok`` or ``unavailable`` by name: of the run that is in progress, or a recent one."""
        with self.lock:
            mine = self.results is None or time.monotonic() >= self.expires
            if mine:
                self.results, self.expires = Future(), math.inf
            results = self.results
        assert results is not None
        if mine:
            try:
                results.set_result(self.run())
            except BaseException as error:
                results.set_exception(error)
            self.expires = time.monotonic() + MAX_AGE
        return results.result()

    def run(self) -> dict[str, str]:
        """Run the checks at the same time; log what has changed, and return the results."""
        checks = self.get_checks()
        timeout = TimeoutError(f"no response within {READY_TIMEOUT} seconds")
        results = concurrently.run(checks, READY_TIMEOUT, self.running)
        problems = {name: error for name in checks if (error := results.get(name, timeout))}
        if requests.are_stuck():
            problems["requests"] = Stuck(f"none has started or ended for {STUCK} seconds")
        for name in problems.keys() - self.problems.keys():
            # The message of another error may contain a password.
            error = problems[name]
            safe = error is timeout or isinstance(error, (NotConsumed, Stuck))
            logger.error("%s is unavailable: %s", name, error if safe else type(error).__name__)
        for name in self.problems.keys() - problems.keys():
            logger.info("%s is available again", name)
        self.problems = problems
        return dict.fromkeys(checks, "ok") | dict.fromkeys(problems, "unavailable")


class Stuck(Exception):
    """All threads are busy with the same requests."""


class Requests:
    """The requests that the threads of this process are busy with, except health checks."""

    def __init__(self) -> None:
        self.lock, self.thread = Lock(), local()
        self.count, self.changed_at = 0, time.monotonic()
        request_finished.connect(self.end)

    def start(self) -> None:
        """Note that this thread has a request."""
        self.thread.is_busy = True
        self._add(1)

    def end(self, **kwargs: Any) -> None:
        """Note that this thread has sent its response, if it had a request."""
        if getattr(self.thread, "is_busy", False):
            self.thread.is_busy = False
            self._add(-1)

    def _add(self, number: int) -> None:
        with self.lock:
            self.count += number
            self.changed_at = time.monotonic()

    def are_stuck(self) -> bool:
        """Return whether no other request can have got through for ``STUCK``."""
        return self.count >= settings.WEB_THREADS and time.monotonic() - self.changed_at > STUCK


requests = Requests()


class HealthMiddleware:
    """Responds to health checks before other middleware checks hosts, HTTPS or sessions."""

    def __init__(self, get_response: Callable[[HttpRequest], HttpResponse]) -> None:
        self.get_response = get_response
        self.checks = SharedChecks(lambda: CHECKS)
        self.deep_checks = SharedChecks(get_deep_checks)

    def __call__(self, request: HttpRequest) -> HttpResponse:
        """Respond to a health check, or pass the request on."""
        path = get_path(request.path_info)
        if path == "/health/live":
            return JsonResponse({"status": "ok"})
        if path == "/health/ready":
            checks = self.deep_checks if "deep" in request.GET else self.checks
            results = checks.get_results()
            ready = set(results.values()) == {"ok"}
            response = JsonResponse(
                {"status": "ok" if ready else "unavailable", "checks": results},
                status=200 if ready else 503,
            )
            # What failed is logged once. Django would log an error for each request.
            response._has_been_logged = True  # type: ignore[attr-defined]
            return response
        requests.start()
        try:
            return self.get_response(request)
        finally:
            # A thread also sends the response, except that the loop of an ASGI server does.
            if not isinstance(request, WSGIRequest):
                requests.end()
