"""Messages of brokers that store JSON: whatever a queue contains becomes a message.

kombu relies on the structure of the JSON. Anything else would end a worker before its consumer can give
the message up, and PGMQ would deliver it to each worker again.
"""

import base64
from typing import Any
from uuid import uuid4

from kombu.transport import virtual
from kombu.utils import json


class Message(virtual.Message):
    """A message from JSON of any structure."""

    def __init__(self, payload: Any, channel: Any = None, **kwargs: Any) -> None:
        payload = repair(payload)
        try:
            super().__init__(payload, channel=channel, **kwargs)
        except ValueError:  # The body is not base64.
            other = wrap(payload)
            other["properties"]["delivery_info"] |= payload["properties"]["delivery_info"]
            super().__init__(other, channel=channel, **kwargs)


def loads(text: Any) -> Any:
    """Return the content of a queue; text that is not JSON is returned as a string."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return str(text)


def repair(payload: Any) -> dict[str, Any]:
    """Return a payload that kombu can read: the payload itself, or a message that contains it."""
    match payload:
        case {"properties": {"delivery_tag": str(), "delivery_info": dict()} as properties} if (
            properties.get("body_encoding") in (None, "base64", "utf-8")
            and isinstance(payload.get("headers"), dict | None)
            and all(
                isinstance(payload.get(name), str | None)
                for name in ("body", "content-type", "content-encoding")
            )
        ):
            return payload  # type: ignore[no-any-return]
    return wrap(payload)


def wrap(payload: Any) -> dict[str, Any]:
    """Return a message whose body is the payload as text, which no worker takes for a task."""
    return {
        "body": base64.b64encode(ascii(payload).encode()).decode(),
        "content-type": "application/data",
        "content-encoding": "binary",
        "headers": {},
        "properties": {
            "body_encoding": "base64",
            "delivery_tag": str(uuid4()),
            "delivery_info": {"exchange": "", "routing_key": ""},
        },
    }
