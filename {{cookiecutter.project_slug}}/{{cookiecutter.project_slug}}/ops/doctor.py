"""What ``python manage.py doctor`` looks at: whether each part is well, and what to run if not.

A check returns a Finding or raises an exception. All end in time, and tell no secret.
"""

import math
import shlex
import threading
import time
from dataclasses import dataclass, field
from datetime import timedelta
from urllib.parse import urlsplit

from django.conf import settings
from django.core import mail
from django.db import connection, connections
from django.db.migrations.executor import MigrationExecutor
from django.utils import timezone
from django_celery_beat.models import PeriodicTask
from kombu.utils.json import loads

from . import health
from .celery import app
from .logs import mask

#: How long a round of checks may take, in seconds.
LIMIT = 6

#: How long a worker, beat or the SMTP server has to answer, in seconds.
PATIENCE = 4

OK, BROKEN, UNKNOWN = "ok", "broken", "unknown"


@dataclass
class Finding:
    """What a check found; ``next`` is the command to run where it is not well."""

    message: str
    status: str = OK
    next: str | None = None
    schedules: list = field(default_factory=list)


# Checks


def check_database():
    health.check_database()
    if connection.vendor == "sqlite":
        return Finding(f"SQLite in {connection.settings_dict['NAME']}")
    host, port = database_address()
    return Finding(f"{connection.display_name} on {host}:{port}")


def check_migrations():
    executor = MigrationExecutor(connection)
    plan = executor.migration_plan(executor.loader.graph.leaf_nodes())
    if not plan:
        return Finding("all applied")
    migration, _ = plan[0]
    return broken("migrations", f"{len(plan)} to apply: first {migration}")


def check_broker():
    health.check_broker()
    scheme, host, port = broker_address()
    return Finding(f"{scheme} on {host}:{port}" if port else scheme)


def check_worker():
    return check_node("worker", "celery@*")


def check_beat():
    return check_node("beat", "celerybeat@*")


def check_node(process, pattern):
    """Find whether a node with such a name answers to Celery's remote control."""
    replies = app.control.broadcast(
        "ping", reply=True, limit=1, timeout=PATIENCE, pattern=pattern, matcher="glob"
    )
    if not replies:
        return broken(process, "none answers")
    return Finding(f"{next(iter(replies[0]))} answers")


def check_schedules():
    app.loader.import_default_modules()
    rows = PeriodicTask.objects.order_by("name")
    rows = rows.select_related("crontab", "interval", "solar", "clocked")
    schedules = [describe(row) for row in rows.filter(enabled=True)]
    off = rows.filter(enabled=False).count()
    return Finding(
        f"{len(schedules)} on, {off} off; times in {settings.TIME_ZONE}",
        BROKEN if any(schedule["problem"] for schedule in schedules) else OK,
        schedules=schedules,
    )


def check_email():
    backend = settings.EMAIL_BACKEND.split(".")[-2]
    if backend != "smtp":
        return Finding(f"no server; messages go to Django's {backend} backend")
    with mail.get_connection(timeout=PATIENCE):
        return Finding(f"SMTP on {settings.EMAIL_HOST}:{settings.EMAIL_PORT}")


CHECKS = {
    "database": check_database,
    "migrations": check_migrations,
    "broker": check_broker,
    "worker": check_worker,
    "beat": check_beat,
    "schedules": check_schedules,
    "e-mail": check_email,
}

#: What a check needs to be well before it can look.
NEEDS = {
    "migrations": "database",
    "schedules": "database",
    "worker": "broker",
    "beat": "broker",
}


# Schedules


def describe(row):
    """Return a schedule's name, task and next run, or its problem and what to run."""
    found = {"name": row.name, "task": row.task, "next_run": None, "problem": None, "next": None}
    try:
        found["next_run"] = next_run(row)
    except Exception as error:
        found["problem"] = str(error) if isinstance(error, Unfit) else told(error)
        stop = f"s = PeriodicTask.objects.get(pk={row.pk}); s.enabled = False; s.save()"
        found["next"] = f"python manage.py shell --command {shlex.quote(stop)}"
    return found


class Unfit(Exception):
    """Beat cannot run a schedule."""


def next_run(row):
    """Return when the schedule is due, in the service's time zone, or raise an exception."""
    if row.task not in app.tasks:
        raise Unfit(f"its task does not exist: {row.task}")
    if row.scheduler is None:
        raise Unfit("it has neither a crontab nor an interval")
    loads(row.args or "[]")
    loads(row.kwargs or "{}")
    now = timezone.now()
    if row.start_time and row.start_time > now:
        return timezone.localtime(row.start_time)
    last_run = row.last_run_at or row.date_changed
    is_due, seconds = row.schedule.is_due(last_run.astimezone(app.timezone))
    # What passed since "now" would show a full minute as the second before.
    moment = now if is_due else now + timedelta(seconds=math.ceil(seconds))
    return timezone.localtime(moment).replace(microsecond=0)


# What comes next


def next_command(name):
    """Return the command that mends what is broken, or tells more about it."""
    match name:
        case "database" if connection.vendor == "postgresql":
            return "pg_isready --host={} --port={}".format(*database_address())
        case "database" | "migrations" | "schedules":
            return "python manage.py migrate"
        case "broker":
            return "nc -zv {1} {2}".format(*broker_address())
        case "worker" | "beat":
            return f"python manage.py prodserver {name}"
        case "e-mail":
            return "python manage.py sendtestemail ADDRESS"


def database_address():
    database = connection.settings_dict
    return database["HOST"] or "localhost", database["PORT"] or 5432


def broker_address():
    """Return scheme, host and port of the broker; no port where it is no server."""
    url = urlsplit(settings.CELERY_BROKER_URL)
    ports = {"amqp": 5672, "amqps": 5671}
    return url.scheme, url.hostname or "localhost", url.port or ports.get(url.scheme)


def told(error):
    """Return an error in one line, without the secrets that the settings hold."""
    text = mask(" ".join(f"{type(error).__name__}: {error}".split()))
    secrets = (
        settings.SECRET_KEY,
        settings.EMAIL_HOST_PASSWORD,
        settings.DATABASES["default"].get("PASSWORD"),
        urlsplit(settings.CELERY_BROKER_URL).password,
    )
    for secret in filter(None, secrets):
        text = text.replace(secret, "***")
    return text[:200]


def broken(name, message):
    return Finding(message, BROKEN, next_command(name))


# All together


def examine():
    """Return what the checks found, by their names."""
    found = run({name: check for name, check in CHECKS.items() if name not in NEEDS})
    well = {name for name, finding in found.items() if finding.status == OK}
    found |= run({name: CHECKS[name] for name, needed in NEEDS.items() if needed in well})
    for name, needed in NEEDS.items():
        found.setdefault(name, Finding(f"not looked at: the {needed} is broken", UNKNOWN))
    return {name: found[name] for name in CHECKS}


def run(checks):
    """Run checks side by side; return what they found by the time that is up."""
    found = {name: broken(name, f"no answer within {LIMIT} seconds") for name in checks}

    def look(name, check):
        try:
            found[name] = check()
        except Exception as error:
            found[name] = broken(name, told(error))
        finally:
            connections.close_all()

    # Daemons: one that hangs does not keep the process alive.
    threads = [threading.Thread(target=look, args=item, daemon=True) for item in checks.items()]
    deadline = time.monotonic() + LIMIT
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0, deadline - time.monotonic()))
    return dict(found)
