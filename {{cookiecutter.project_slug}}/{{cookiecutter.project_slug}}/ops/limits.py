"""Limits that all processes count together, in a table of the database.

A limit has slots. An event takes one slot for some time; if none is free, the limit is
reached. Two processes never take the same slot, because adding a cache entry is atomic.
The names of slots are hashes, so that the table tells nothing about who took them.
"""

import time
from dataclasses import dataclass

from django.core.cache import caches
from django.utils.crypto import salted_hmac


def get_key(*parts: str) -> str:
    """Return the name of a cache entry: a hash of the parts."""
    return salted_hmac("limits", "\n".join(parts), algorithm="sha256").hexdigest()


@dataclass(frozen=True)
class Limit:
    """At most ``slots`` events in ``seconds``, for each value."""

    name: str
    slots: int
    seconds: float

    def take(self, value: str) -> bool:
        """Take a slot; return whether one was free."""
        taken = self.get_taken(value)
        # Another process may take a slot first; then take the next one.
        return any(
            caches["limits"].add(slot, time.time(), self.seconds)
            for slot in self._get_slots(value)
            if slot not in taken
        )

    def count(self, value: str) -> int:
        """Return how many slots are taken."""
        return len(self.get_taken(value))

    def get_taken(self, value: str) -> dict[str, float]:
        """Return when each slot that is not free was taken, in seconds since the epoch."""
        return caches["limits"].get_many(self._get_slots(value))

    def clear(self, value: str) -> None:
        """Free all slots."""
        caches["limits"].delete_many(self._get_slots(value))

    def _get_slots(self, value: str) -> list[str]:
        key = get_key(self.name, value)
        return [f"{key}.{number}" for number in range(self.slots)]
