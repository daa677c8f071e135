"""Validate received messages, so that no message can end a worker.

Celery relies on the types of the headers and on the structure of the body. Any other message can raise
an exception in a worker's main process, and again in each worker that receives it after that.
https://docs.celeryq.dev/en/stable/internals/protocol.html
"""

from collections.abc import Callable
from datetime import UTC
from typing import Any

from celery.app.task import Context
from celery.canvas import Signature
from celery.utils.time import maybe_iso8601
from kombu.message import Message

#: Maximum length of an id, as in the tables of django-celery-results.
MAX_ID = 255

#: Maximum time limit in seconds, and number of retries.
MAX_NUMBER = 10**9


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_id(value: Any) -> bool:
    return isinstance(value, str) and 0 < len(value) <= MAX_ID and value.isprintable()


def _is_name(value: Any) -> bool:
    return value == "" or _is_id(value)


def _is_time(value: Any) -> bool:
    try:
        time = maybe_iso8601(value) if isinstance(value, str) else None
        return time is not None and time.astimezone(UTC) is not None
    except (ValueError, OverflowError):
        return False


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple)


def _is_object(value: Any) -> bool:
    return isinstance(value, dict)


def _is_number(value: Any) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and 0 <= value <= MAX_NUMBER


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and _is_number(value)


def _is_timelimit(value: Any) -> bool:
    return (
        _is_list(value)
        and len(value) == 2
        and all(item is None or _is_number(item) for item in value)
    )


def _is_list_of_texts(value: Any) -> bool:
    return _is_list(value) and all(map(_is_text, value))


def _is_signature(value: Any) -> bool:
    return (
        _is_object(value)
        and _is_text(value.get("task"))
        and _is_list(value.get("args") or [])
        and _is_object(value.get("kwargs") or {})
        and _is_object(value.get("options") or {})
        and value.get("subtask_type") in (None, *Signature.TYPES)
    )


def _is_list_of_signatures(value: Any) -> bool:
    return _is_list(value) and all(map(_is_signature, value))


Rules = dict[str, Callable[[Any], bool]]

#: The fields of what follows a task. They may also be missing or null.
FOLLOWING: Rules = {
    "callbacks": _is_list_of_signatures,
    "errbacks": _is_list_of_signatures,
    "chain": _is_list_of_signatures,
    "chord": _is_signature,
}

#: The fields of a task whose type Celery relies on.
FIELDS: Rules = {
    "task": _is_text,
    "id": _is_id,
    "root_id": _is_id,
    "parent_id": _is_id,
    "group": _is_id,
    "group_index": _is_integer,
    "shadow": _is_name,
    "origin": _is_text,
    "argsrepr": _is_text,
    "kwargsrepr": _is_text,
    "eta": _is_time,
    "expires": _is_time,
    "retries": _is_integer,
    "timelimit": _is_timelimit,
    "replaced_task_nesting": _is_integer,
    "stamped_headers": _is_list_of_texts,
    "stamps": _is_object,
    "headers": _is_object,
    **FOLLOWING,
    # Headers become attributes of the task's request, whose methods they would replace.
    **{name: lambda value: False for name in dir(Context) if callable(getattr(Context, name))},
}

#: The properties of a message whose type Celery relies on.
PROPERTIES: Rules = {
    "correlation_id": _is_text,
    "reply_to": _is_text,
    "priority": _is_integer,
}


def find_problem(message: Message) -> str:
    """Return why a message is not that of a task, or an empty string.

    Raises an exception if the body cannot be decoded.
    """
    headers, payload = message.headers, message.payload
    if not _is_object(headers):
        return "invalid headers"
    if _is_object(payload) and ("args" in payload or "task" not in headers):  # Protocol 1
        fields = payload | headers
        args, kwargs, following = payload.get("args", ()), payload.get("kwargs", {}), payload
    elif _is_list(payload) and len(payload) == 3:
        fields, (args, kwargs, following) = headers, payload
    else:
        return "invalid body"
    if not (_is_list(args) and _is_object(kwargs) and _is_object(following or {})):
        return "invalid arguments"
    if fields is headers and following and following.keys() - FOLLOWING.keys():
        return "invalid body"
    for name in ("task", "id"):
        if fields.get(name) is None:
            return f"no {name}"
    return (
        find_invalid(FIELDS, fields)
        or (find_invalid(FOLLOWING, following) if following else "")
        or find_invalid(PROPERTIES, message.properties)
    )


def find_invalid(rules: Rules, values: dict[str, Any]) -> str:
    """Return the name of the first value that is invalid, as an error message, or ""."""
    for name, value in values.items():
        if value is not None and name in rules and not rules[name](value):
            return f"invalid {name}"
        if name.startswith("_"):
            return "invalid name"
    return ""
