"""What is wrong with a schedule: the admin's form refuses it, ``doctor`` and beat report it."""

from collections.abc import Iterator
from datetime import datetime, timedelta
from functools import cache
from inspect import signature
from typing import Any

from amqp import serialization
from celery import current_app
from django.conf import settings
from django.utils import timezone
from django_celery_beat.models import PeriodicTask
from kombu.utils.json import dumps, loads

from .queues import get_consumed
from .timing import KINDS, InvalidSchedule, get_due, get_next

#: The fields with JSON, the type of their values, and an example.
JSON_FIELDS = {"args": (list, '["daily"]'), "kwargs": (dict, "{}"), "headers": (dict, "{}")}

#: Their default values, which need no check.
EMPTY = {"args": "[]", "kwargs": "{}", "headers": "{}"}

#: The highest priority of a message.
MAX_PRIORITY = 255

#: The maximum length of the headers. RabbitMQ accepts those that fit into a frame of 128 KiB.
MAX_HEADERS = 10_000

#: The longest time after which a message may expire, in seconds: ten years.
MAX_EXPIRY = 10 * 366 * 24 * 3600


def find_problems(row: PeriodicTask) -> dict[str, str]:
    """Return why a schedule cannot run, by the name of the field; an empty dictionary if it can.

    The modules with tasks must be loaded.
    """
    return dict(_find_problems(row))


def check(row: PeriodicTask) -> None:
    """Raise InvalidSchedule with the first reason why a schedule cannot run."""
    _raise_first(_find_problems(row))


def check_message(row: PeriodicTask) -> None:
    """Raise InvalidSchedule if the message of a schedule cannot be published, or is read by nobody."""
    _raise_first(_find_json_problems(row))
    _raise_first(_find_argument_problem(row))
    _raise_first(_find_priority_problem(row))
    if row.queue or row.exchange or row.routing_key:
        _raise_first(_find_queue_problems(row))


def _raise_first(problems: Iterator[tuple[str, str]]) -> None:
    for field, problem in problems:
        raise InvalidSchedule(problem if problem.startswith("it") else f"its {field} {problem}")


def _find_problems(row: PeriodicTask) -> Iterator[tuple[str, str]]:
    if row.task not in current_app.tasks:
        yield "task", f"its task does not exist: {row.task}"
    json_problems = dict(_find_json_problems(row))
    yield from json_problems.items()
    if not json_problems.keys() & {"args", "kwargs"}:
        yield from _find_argument_problem(row)
    yield from _find_queue_problems(row)
    yield from _find_priority_problem(row)
    if row.expire_seconds is not None and row.expire_seconds > MAX_EXPIRY:
        yield "expire_seconds", f"must be at most {MAX_EXPIRY}"
    if problem := _find_timing_problem(row, timezone.now()):
        yield _get_timing_field(row), problem


def _find_json_problems(row: PeriodicTask) -> Iterator[tuple[str, str]]:
    for field, (kind, example) in JSON_FIELDS.items():
        text = getattr(row, field)
        if not text or text == EMPTY[field]:
            continue
        try:
            value = loads(text)
        except RecursionError:
            yield field, "has too many levels"
            continue
        except Exception as error:
            # JSON can also name a type of Python, with a value that does not fit.
            yield field, f"is not valid JSON: {type(error).__name__}"
            continue
        if not isinstance(value, kind):
            yield field, f"must be JSON such as {example}"
        elif field == "headers":
            yield from _find_header_problems(value, text)


@cache
def _get_own_headers() -> frozenset[str]:
    """Return the names of the headers that Celery sets."""
    return frozenset(current_app.amqp.as_task_v2("", "", (), {}).headers)


def _find_header_problems(headers: dict[str, Any], text: str) -> Iterator[tuple[str, str]]:
    """Find what would break a message, or the connection to RabbitMQ for all other messages."""
    if own := _get_own_headers() & headers.keys():
        yield "headers", f"must not contain what Celery sets: {', '.join(sorted(own))}"
    elif len(text) > MAX_HEADERS:
        yield "headers", f"must have at most {MAX_HEADERS} characters"
    elif problem := _find_unfit(headers):
        yield "headers", problem


def _find_unfit(headers: dict[str, Any]) -> str | None:
    """Return why RabbitMQ, whose format has the fewest values, cannot carry headers."""
    try:
        dumps(headers, allow_nan=False)
    except ValueError:
        return "must not contain NaN or Infinity"
    try:
        serialization.loads("F", serialization.dumps("F", (headers,)), 0)
    except RecursionError:
        return "has too many levels"
    except Exception:
        # An integer of more than 64 bits, for example, or a name of more than 255 bytes
        return "contains a name, a number or a type that a message cannot have"
    return None


def _find_argument_problem(row: PeriodicTask) -> Iterator[tuple[str, str]]:
    if row.task not in current_app.tasks:
        return
    args, kwargs = loads(row.args or "[]"), loads(row.kwargs or "{}")
    try:
        signature(current_app.tasks[row.task].run).bind(*args, **kwargs)
    except TypeError as error:
        field = "kwargs" if "keyword argument" in str(error) else "args"
        yield field, f"does not fit the task: {error}"


def _find_priority_problem(row: PeriodicTask) -> Iterator[tuple[str, str]]:
    if row.priority is not None and row.priority > MAX_PRIORITY:
        yield "priority", f"must be at most {MAX_PRIORITY}"


def _find_queue_problems(row: PeriodicTask) -> Iterator[tuple[str, str]]:
    """Compare with the queues that workers consume: a message for another one is lost."""
    names = get_consumed()
    if row.queue and row.queue not in names:
        yield "queue", f"is read by no worker; the queues are: {', '.join(names)}"
    queue = {queue.name: queue for queue in settings.CELERY_TASK_QUEUES}.get(row.queue)
    own = {"exchange": queue.exchange.name, "routing_key": queue.routing_key} if queue else {}
    for field in ("exchange", "routing_key"):
        value = getattr(row, field)
        if value and not row.queue:
            yield field, "needs the name of the queue"
        # A queue of a topic exchange can have a pattern.
        elif value and value != own.get(field, value) and not {"*", "#"} & set(own[field]):
            yield field, f"is not that of the queue: {own[field]}"


def _find_timing_problem(row: PeriodicTask, now: datetime) -> str:
    try:
        get_due(row, now)
        get_next(row, now, now + timedelta(days=1))
    except InvalidSchedule as error:
        return str(error)
    except Exception as error:
        # Any field may be out of range, and solar schedules need a package.
        return f"cannot be used: {str(error).partition('\n')[0]}"
    return ""


def _get_timing_field(row: PeriodicTask) -> str:
    return next((kind for kind in KINDS if getattr(row, kind) is not None), "crontab")
