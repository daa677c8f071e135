"""Health checks for load balancers and deploys.

``GET /health/live`` says that the process answers. ``GET /health/ready`` says
that the database and the broker do too: 200, or 503 and JSON that names what
failed.
"""

import logging

from django.db import connection
from django.http import JsonResponse

from .celery import app

logger = logging.getLogger(__name__)

#: How long the broker may take to answer, in seconds.
BROKER_TIMEOUT = 3


def check_database():
    """Raise an exception if the database does not answer a query."""
    with connection.cursor() as cursor:
        cursor.execute("SELECT 1")


def check_broker():
    """Raise an exception if the broker accepts no connection."""
    with app.connection_for_write(connect_timeout=BROKER_TIMEOUT) as broker:
        broker.ensure_connection(max_retries=1, timeout=BROKER_TIMEOUT)


CHECKS = {"database": check_database, "broker": check_broker}


def readiness():
    """Return what each check found, by its name: ``ok`` or ``unavailable``."""
    found = {}
    for name, check in CHECKS.items():
        try:
            check()
        except Exception as error:
            # The message may hold a password, so only the kind of error is told.
            logger.warning("%s is unavailable: %s", name, type(error).__name__)
            found[name] = "unavailable"
        else:
            found[name] = "ok"
    return found


class HealthMiddleware:
    """Answer the health checks before any rule about hosts, HTTPS or sessions."""

    def __init__(self, get_response):
        self.get_response = get_response

    def __call__(self, request):
        if request.path == "/health/live":
            return JsonResponse({"status": "ok"})
        if request.path == "/health/ready":
            checks = readiness()
            healthy = set(checks.values()) == {"ok"}
            status = "ok" if healthy else "unavailable"
            return JsonResponse(
                {"status": status, "checks": checks}, status=200 if healthy else 503
            )
        return self.get_response(request)
