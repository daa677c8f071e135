"""Limits that all processes share, in a database table.

A limit has slots. An event takes a slot for some time; if no slot is free, the limit is reached.
Two processes never take the same slot, because adding a cache entry is atomic. The names of slots
are hashes, so the table does not contain user names or addresses. The cache is not in ``CACHES``,
which belongs to the project.
"""

import time
from dataclasses import dataclass
from typing import Any

from django.core.cache.backends.db import DatabaseCache
from django.core.management import call_command
from django.utils.crypto import salted_hmac

#: The cache. In release 1.x it was in ``CACHES``, with the same name and entries.
cache = DatabaseCache("limits", {"OPTIONS": {"MAX_ENTRIES": 100_000}})


def create_table(using: str, **kwargs: Any) -> None:
    """Create the table of the cache, which has no migration; a receiver of ``post_migrate``."""
    call_command("createcachetable", "limits", database=using, verbosity=0)


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
            cache.add(slot, time.time(), self.seconds)
            for slot in self._get_slots(value)
            if slot not in taken
        )

    def count(self, value: str) -> int:
        """Return how many slots are taken."""
        return len(self.get_taken(value))

    def get_taken(self, value: str) -> dict[str, float]:
        """Return when each slot that is not free was taken, in seconds since the epoch."""
        return cache.get_many(self._get_slots(value))

    def clear(self, value: str) -> None:
        """Free all slots."""
        cache.delete_many(self._get_slots(value))

    def _get_slots(self, value: str) -> list[str]:
        key = get_key(self.name, value)
        return [f"{key}.{number}" for number in range(self.slots)]
