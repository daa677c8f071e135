"""The headers that this library adds to the messages of tasks.

Anyone with access to the broker can forge them: an invalid value is the same as none.
"""

from datetime import datetime
from typing import Any

from django.utils import timezone
from django.utils.dateparse import parse_datetime

from .logs import VALID_REQUEST_ID


def get_integer(headers: dict[str, Any], name: str) -> int | None:
    """Return a header that is a primary key or a number of attempts, or None."""
    value = headers.get(name)
    if not isinstance(value, int) or isinstance(value, bool):
        return None
    return value if 0 < value < 2**31 else None


def get_time(value: Any) -> datetime | None:
    """Return the time of a header in ISO format, with a UTC offset, or None."""
    try:
        time = parse_datetime(value)
    except (TypeError, ValueError):
        return None
    return time if time and timezone.is_aware(time) else None


def get_request_id(headers: Any) -> str | None:
    """Return the id of the request that a task belongs to, or None."""
    value = headers.get("request_id") if isinstance(headers, dict) else None
    return value if isinstance(value, str) and VALID_REQUEST_ID.fullmatch(value) else None
