"""Limits that all processes share, in a database table.

A limit has slots. An event takes a slot for some time; if no slot is free, the limit is reached.
Two processes never take the same slot, because the database takes it in one statement. The names of
slots are hashes, so the table does not contain user names or addresses. The table is none of
``CACHES``, which belong to the project.
"""

import base64
import pickle
import random
import time
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from django.core.cache.backends.locmem import LocMemCache
from django.db import DEFAULT_DB_ALIAS, connection, connections
from django.utils import timezone
from django.utils.crypto import salted_hmac

#: The maximum number of entries, and at which part of the writes the table is cleaned.
MAX_ENTRIES, CLEANED = 100_000, 0.01

#: What throttles of the API count in this process. Tests clear it.
counts = LocMemCache("throttles", {"OPTIONS": {"MAX_ENTRIES": 10_000}})

#: What release 1.x, where this was one of ``CACHES``, prepended to the names of entries.
PREFIX = ":1:"


class Entries:
    """Values by name that expire, in the table that ``createcachetable limits`` created in 1.x."""

    def get_many(self, names: Iterable[str]) -> dict[str, Any]:
        """Return the values of the entries that exist and have not expired."""
        keys = [f"{PREFIX}{name}" for name in names]
        with connection.cursor() as cursor:
            cursor.execute(
                "SELECT cache_key, value FROM limits WHERE cache_key IN "
                f"({', '.join(['%s'] * len(keys))}) AND expires > %s",
                [*keys, to_parameter(timezone.now())],
            )
            rows = cursor.fetchall()
        return {key.removeprefix(PREFIX): pickle.loads(base64.b64decode(v)) for key, v in rows}

    def get(self, name: str, default: Any = None) -> Any:
        """Return the value of an entry."""
        return self.get_many([name]).get(name, default)

    def add(self, name: str, value: Any, seconds: float) -> bool:
        """Create an entry, unless it exists and has not expired; return whether it was created."""
        return self._write(name, value, seconds, "limits.expires <= %s")

    def set(self, name: str, value: Any, seconds: float) -> None:
        """Create or replace an entry."""
        self._write(name, value, seconds, "%s IS NOT NULL")

    def _write(self, name: str, value: Any, seconds: float, condition: str) -> bool:
        if random.random() < CLEANED:
            self.clean()
        now = timezone.now()
        text = base64.b64encode(pickle.dumps(value)).decode()
        expires = to_parameter(now + timedelta(seconds=seconds))
        with connection.cursor() as cursor:
            # One statement: between two, another process could take an entry that has expired.
            cursor.execute(
                "INSERT INTO limits (cache_key, value, expires) VALUES (%s, %s, %s) "
                "ON CONFLICT (cache_key) DO UPDATE "
                f"SET value = excluded.value, expires = excluded.expires WHERE {condition}",
                [f"{PREFIX}{name}", text, expires, to_parameter(now)],
            )
            return bool(cursor.rowcount)

    def delete(self, *names: str) -> None:
        """Delete entries."""
        with connection.cursor() as cursor:
            cursor.executemany(
                "DELETE FROM limits WHERE cache_key = %s", [[f"{PREFIX}{name}"] for name in names]
            )

    def delete_all(self, prefix: str) -> int:
        """Delete the entries whose names start like this; return their number."""
        with connection.cursor() as cursor:
            cursor.execute("DELETE FROM limits WHERE cache_key LIKE %s", [f"{PREFIX}{prefix}%"])
            return int(cursor.rowcount)

    def clean(self) -> None:
        """Delete expired entries, and of too many the third that expires first."""
        with connection.cursor() as cursor:
            cursor.execute("DELETE FROM limits WHERE expires <= %s", [to_parameter(timezone.now())])
            cursor.execute("SELECT count(*) FROM limits")
            if cursor.fetchone()[0] > MAX_ENTRIES:
                cursor.execute(
                    "DELETE FROM limits WHERE cache_key IN "
                    "(SELECT cache_key FROM limits ORDER BY expires LIMIT %s)",
                    [MAX_ENTRIES // 3],
                )


entries = Entries()


def to_parameter(moment: datetime) -> Any:
    """Return a time as a parameter of a statement, without a fraction of a second."""
    return connection.ops.adapt_datetimefield_value(moment.replace(microsecond=0))


def create_table(using: str, **kwargs: Any) -> None:
    """Create the table, which has no migration; a receiver of ``post_migrate``."""
    if using == DEFAULT_DB_ALIAS:
        types = connections[using].data_types
        with connections[using].cursor() as cursor:
            cursor.execute(
                "CREATE TABLE IF NOT EXISTS limits (cache_key varchar(255) NOT NULL PRIMARY KEY, "
                f"value text NOT NULL, expires {types['DateTimeField']} NOT NULL)"
            )
            cursor.execute("CREATE INDEX IF NOT EXISTS limits_expires ON limits (expires)")


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
            entries.add(slot, time.time(), self.seconds)
            for slot in self._get_slots(value)
            if slot not in taken
        )

    def count(self, value: str) -> int:
        """Return how many slots are taken."""
        return len(self.get_taken(value))

    def get_taken(self, value: str) -> dict[str, float]:
        """Return when each slot that is not free was taken, in seconds since the epoch."""
        return entries.get_many(self._get_slots(value))

    def clear(self, value: str) -> None:
        """Free all slots."""
        entries.delete(*self._get_slots(value))

    def _get_slots(self, value: str) -> list[str]:
        key = get_key(self.name, value)
        return [f"{key}.{number}" for number in range(self.slots)]
