"""The checks of ``python manage.py doctor``, and the command to run next for each failure.

A check returns a Result or raises an exception. Checks have a time limit and do not leak secrets.
"""

import json
import shlex
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from celery import current_app
from django.conf import settings
from django.core import checks, mail
from django.db import connection
from django.db.migrations.executor import MigrationExecutor
from django.db.models import QuerySet
from django.template.defaultfilters import filesizeformat
from django.utils import timezone
from django_celery_beat.models import PeriodicTask

from .. import broker
from ..core import concurrently
from ..core.database import find_pooler
from ..core.redaction import redact
from ..mail import transport
from ..models import HEARTBEAT_AGE, Attempt
from ..scheduling import heartbeats, queues, timing, validation
from ..scheduling.restores import find_restore
from ..scheduling.timing import InvalidSchedule
from ..web import health
from ..worker import delayed
from ..worker.app import get_failed_queue
from . import problems, retention, upgrades

#: Time limit of the checks that run at the same time, in seconds.
CHECK_TIMEOUT = 6

#: Time limit of the system checks, which wait for no server but for a busy machine, in seconds.
SETTINGS_TIMEOUT = 60

#: Time limit for the reply of the broker or the SMTP server, in seconds.
REPLY_TIMEOUT = 4

#: From when a delayed task that is not queued is a problem.
OVERDUE = timedelta(minutes=1)

#: After how long a clone has to look for a release of its template.
CHECK_AGE = timedelta(days=30)

OK, ERROR, SKIPPED = "ok", "error", "skipped"


@dataclass
class Result:
    """The result of a check; ``next`` is the command to run if it failed."""

    message: str
    status: str = OK
    next: str | None = None
    schedules: list[dict[str, Any]] = field(default_factory=list)


# Checks


def check_settings() -> Result:
    """Run Django's system checks; in production also those of ``check --deploy``."""
    messages = [
        message
        for message in checks.run_checks(include_deployment_checks=not settings.DEBUG)
        if message.is_serious(checks.WARNING) and not message.is_silenced()
    ]
    if not messages:
        return Result("no problems")
    first = redact_text(f"{messages[0].msg} ({messages[0].id})")
    more = f", and {len(messages) - 1} more" if messages[1:] else ""
    return failed("settings", f"{first}{more}")


def check_database() -> Result:
    """Query the database."""
    health.check_database()
    if problem := find_pooler():
        return failed("settings", problem)
    if connection.vendor == "sqlite":
        return Result(f"SQLite in {connection.settings_dict['NAME']}")
    host, port = get_database_address()
    return Result(f"{connection.display_name} on {host}:{port}")


def check_migrations() -> Result:
    """Look for migrations that are not applied."""
    executor = MigrationExecutor(connection)
    plan = executor.migration_plan(executor.loader.graph.leaf_nodes())
    if not plan:
        return Result("all applied")
    migration, _ = plan[0]
    return failed("migrations", f"{len(plan)} not applied, first: {migration}")


def check_broker() -> Result:
    """Connect to the broker."""
    health.check_broker()
    if problem := broker.find_problem(current_app, REPLY_TIMEOUT):
        return Result(problem, ERROR)
    scheme, host, port = get_broker_address()
    return Result(f"{scheme} on {host}:{port}" if port else scheme)


def check_queue() -> Result:
    """Count the failed tasks, and the messages that no process consumes."""
    name = get_failed_queue()
    counts = broker.count_messages(current_app, [*queues.get_known(), name], REPLY_TIMEOUT)
    if count := counts.pop(name):
        return failed(
            "queue",
            f"{count} tasks were given up: they killed workers, or no worker knows them; they are "
            f"in the queue {name}",
        )
    if problem := "; ".join(queues.describe_unconsumed(counts).values()):
        return Result(problem, ERROR, get_next_command("settings"))
    waiting = sum(counts.values())
    return Result(f"no task was given up, and each queue is consumed; {waiting} messages wait")


def check_delayed() -> Result:
    """Look for tasks that are due, but that no worker queues."""
    count = delayed.WAITING.count()
    row = delayed.WAITING.order_by("due_at").first()
    if row is None:
        return Result("no task waits for its time")
    due = timezone.localtime(row.due_at).replace(microsecond=0)
    text = f"{count} tasks wait for their time, the next is {row.name} at {due.isoformat()}"
    if timezone.now() - row.due_at > OVERDUE:
        return failed("delayed", f"{text}; no worker queues it")
    return Result(text)


def check_heartbeat(process: str) -> Result:
    """Look for processes that recorded a heartbeat within the last minute."""
    ages = heartbeats.get_ages(process)
    alive = [age for age in ages if age < HEARTBEAT_AGE]
    if not ages:
        return failed(process, "no heartbeat")
    if not alive:
        return failed(process, f"the last heartbeat was {ages[0]} seconds ago")
    return Result(f"{len(alive)} running, the last heartbeat was {ages[0]} seconds ago")


def check_schedules() -> Result:
    """Compute the next run of each enabled schedule."""
    current_app.loader.import_default_modules()
    rows = PeriodicTask.objects.order_by("name")
    rows = rows.select_related(*timing.RELATIONS)
    schedules = [describe_schedule(row) for row in rows.filter(enabled=True)]
    disabled = rows.filter(enabled=False).count()
    note = "" if heartbeats.get_beats() else "; PRODUCTION_PROCESSES has no beat, which runs them"
    if others := find_other_zones(rows.filter(enabled=True)):
        shown = ", ".join(f"{name} ({zone})" for name, zone in others)
        note += f"; a schedule keeps the zone that it was created in: {shown}"
    return Result(
        f"{len(schedules)} enabled, {disabled} disabled; times in {settings.TIME_ZONE}{note}",
        ERROR if any(schedule["problem"] for schedule in schedules) else OK,
        schedules=schedules,
    )


def check_pile_ups() -> Result:
    """Look for schedules whose runs start more often than they end."""
    piles = problems.find_pile_ups()
    if not piles:
        return Result("no runs of a schedule pile up")
    rows = PeriodicTask.objects.filter(pk__in=piles).order_by("name")
    first, *rest = [f"{row.name}: {piles[row.pk]}" for row in rows] or ["a deleted schedule"]
    return failed("pile-ups", f"{first}{f', and {len(rest)} more' if rest else ''}")


def find_other_zones(rows: QuerySet[PeriodicTask]) -> list[tuple[str, str]]:
    """Return the names and time zones of schedules that are not in that of the service."""
    zones = [(row.name, str(row.crontab.timezone)) for row in rows if row.crontab is not None]
    return [(name, zone) for name, zone in zones if zone != settings.TIME_ZONE]


def check_email() -> Result:
    """Connect and log in to the mail server."""
    backend = settings.EMAIL_BACKEND.split(".")[-2]
    if api := getattr(settings, "EMAIL_API", None):
        with mail.get_connection():
            return Result(f"the API of {api[0]}; only its settings are checked")
    if not any(map(settings.is_overridden, ("EMAIL_BACKEND", "EMAIL_HOST", "EMAIL_PORT"))):
        return Result("not configured")
    if backend != "smtp":
        return Result(f"no server; messages go to Django's {backend} backend")
    with mail.get_connection(timeout=REPLY_TIMEOUT):
        return Result(f"SMTP on {settings.EMAIL_HOST}:{settings.EMAIL_PORT}")


def check_deliveries() -> Result:
    """Look for e-mail that waits after a restore, or that the mail server did not accept."""
    if restore := find_restore():
        return failed("restored", f"e-mail waits: {restore}")
    if (failures := transport.get_failures()) and failures.is_general:
        return failed("deliveries", f"no e-mail is accepted: {redact_text(failures.reason)}")
    return Result(f"e-mails that wait for another attempt: {Attempt.objects.count()}")


def check_tables() -> Result:
    """Return the size and growth of the library's tables, and how long their rows are kept."""
    sizes = retention.get_sizes()
    growth = retention.get_growth(sizes)
    largest = [
        f"{name} {filesizeformat(size)}"
        + (f" (+{filesizeformat(growth[name])} a day)" if name in growth else "")
        for name, size in list(sizes.items())[:3]
    ]
    size = f"{filesizeformat(sum(sizes.values()))}; {', '.join(largest)}; " if sizes else ""
    days = [f"{name} {days or 'forever'}" for name, days in retention.get_days().items()]
    return Result(f"{size}kept for days: {', '.join(days)}".replace("\xa0", " "))


def get_record() -> Path:
    """Return the path of the file in which a generated service records its template."""
    return Path(settings.BASE_DIR, ".cruft.json")


def check_template() -> Result:
    """Read the version of the template that the service was generated from."""
    path = get_record()
    try:
        state = json.loads(path.read_text())
    except OSError:
        return Result(f"unknown: there is no {path.name}")
    version = state["context"]["cookiecutter"]["_version"]
    text = f"{version}, commit {(state['commit'] or 'unknown')[:12]}"
    # A path, or the address of a zip, cannot be cloned elsewhere.
    if not state["commit"] or state["template"].startswith(("/", ".", "~")):
        text += "; record its repository: manage.py upgrade --template URL"
    if checked := upgrades.get_last_check():
        text += f"; newer releases were looked for on {checked:%Y-%m-%d}"
        if timezone.now() - checked > CHECK_AGE:
            text += f", over {CHECK_AGE.days} days ago: uv run manage.py upgrade"
    return Result(text)


def get_checks() -> dict[str, Callable[[], Result]]:
    """Return all checks by name."""
    return {
        "settings": check_settings,
        "database": check_database,
        "migrations": check_migrations,
        "broker": check_broker,
        "queue": check_queue,
        "delayed": check_delayed,
        **{name: partial(check_heartbeat, name) for name in heartbeats.get_processes()},
        "schedules": check_schedules,
        "pile-ups": check_pile_ups,
        "e-mail": check_email,
        "deliveries": check_deliveries,
        "tables": check_tables,
        **({"template": check_template} if get_record().exists() else {}),
    }


def get_requirements() -> dict[str, str]:
    """Return checks that depend on another check; they are skipped if it fails."""
    return {
        "migrations": "database",
        "schedules": "database",
        "pile-ups": "database",
        "queue": "broker",
        "delayed": "database",
        **dict.fromkeys(heartbeats.get_processes(), "database"),
        "deliveries": "database",
        "tables": "database",
    }


# Schedules


def describe_schedule(row: PeriodicTask) -> dict[str, Any]:
    """Return a schedule's next run, or its problem and the command that disables it."""
    schedule = {"name": row.name, "task": row.task, "next_run": None, "problem": None, "next": None}
    try:
        schedule["next_run"] = get_next_run(row)
    except Exception as error:
        invalid = isinstance(error, InvalidSchedule)
        schedule["problem"] = str(error) if invalid else redact_error(error)
        disable = f"s = PeriodicTask.objects.get(pk={row.pk}); s.enabled = False; s.save()"
        schedule["next"] = f"python manage.py shell --command {shlex.quote(disable)}"
    return schedule


def get_next_run(row: PeriodicTask) -> datetime:
    """Return when a schedule is due; raise an exception if beat cannot run it."""
    validation.check(row)
    now = timezone.now()
    next_run = now if timing.get_due(row, now) else timing.get_next(row, now)
    assert next_run is not None
    return timezone.localtime(next_run).replace(microsecond=0)


# Failures


def failed(name: str, message: str) -> Result:
    """Return the result of a check that failed."""
    return Result(message, ERROR, get_next_command(name))


def get_next_command(name: str) -> str | None:
    """Return the command that fixes a failure, or that shows more about it."""
    match name:
        case "settings":
            return "python manage.py check" + ("" if settings.DEBUG else " --deploy")
        case "database" if connection.vendor == "postgresql":
            return "pg_isready --host={} --port={}".format(*get_database_address())
        case "database" | "migrations" | "schedules":
            return "python manage.py migrate"
        case "broker":
            return "nc -zv {1} {2}".format(*get_broker_address())
        case "queue":
            return "python manage.py requeue"
        case "delayed":
            return f"python manage.py prodserver {heartbeats.get_workers()[0]}"
        case "pile-ups":
            return "python manage.py schedules --simulate 7"
        case _ if name in heartbeats.get_processes():
            return f"python manage.py prodserver {name}"
        case "e-mail" | "deliveries":
            return "python manage.py sendtestemail ADDRESS"
        case "restored":
            return "python manage.py restored"
        case _:
            return None


def get_database_address() -> tuple[str, int | str]:
    """Return host and port of PostgreSQL."""
    database = connection.settings_dict
    return database["HOST"] or "localhost", database["PORT"] or 5432


def get_broker_address() -> tuple[str, str, int | None]:
    """Return scheme, host and port of the broker; the port is None without a server."""
    url = urlsplit(settings.CELERY_BROKER_URL)
    port = url.port or broker.find(settings.CELERY_BROKER_URL).ports.get(url.scheme)
    return url.scheme, url.hostname or "localhost", port


def redact_error(error: BaseException) -> str:
    """Return an error as one line of at most 200 characters without secrets."""
    return redact_text(f"{type(error).__name__}: {error}")


def redact_text(text: str) -> str:
    """Return the text as one line of at most 200 characters without secrets."""
    text = redact(" ".join(text.split()))
    secrets = (
        settings.SECRET_KEY,
        *settings.SECRET_KEY_FALLBACKS,
        settings.EMAIL_HOST_PASSWORD,
        *getattr(settings, "ANYMAIL", {}).values(),
        settings.DATABASES["default"].get("PASSWORD"),
        urlsplit(settings.CELERY_BROKER_URL).password,
    )
    for secret in filter(None, secrets):
        text = text.replace(secret, "***")
    return text[:200]


# All checks


def run_all() -> dict[str, Result]:
    """Run all checks; return their results by name."""
    checks, requirements = get_checks(), get_requirements()
    results = run({"settings": checks["settings"]}, SETTINGS_TIMEOUT)
    others = checks.keys() - requirements.keys() - results.keys()
    results |= run({name: checks[name] for name in others})
    passed = {name for name, result in results.items() if result.status == OK}
    results |= run({name: checks[name] for name, other in requirements.items() if other in passed})
    for name, other in requirements.items():
        results.setdefault(name, Result(f"skipped because the {other} check failed", SKIPPED))
    return {name: results[name] for name in checks}


def run(checks: dict[str, Callable[[], Result]], timeout: float | None = None) -> dict[str, Result]:
    """Run checks at the same time, with a time limit; return their results by name."""
    timeout = timeout or CHECK_TIMEOUT
    results: dict[str, Result] = {}
    done = concurrently.run(checks, timeout)
    for name in checks:
        match done.get(name):
            case None:
                # A repair would be a guess. These two commands only look.
                look = name == "broker" or (name == "database" and connection.vendor == "postgresql")
                text = f"no result within {timeout} seconds"
                results[name] = failed(name, text) if look else Result(text, ERROR)
            case Exception() as error:
                results[name] = failed(name, redact_error(error))
            case result:
                results[name] = result
    return results
