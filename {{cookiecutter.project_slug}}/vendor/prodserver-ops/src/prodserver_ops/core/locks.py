"""Locks between processes, released automatically when their holder dies."""

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from django.conf import settings
from django.db import connection as default_connection
from django.db.backends.base.base import BaseDatabaseWrapper


class AdvisoryLock:
    """A PostgreSQL advisory lock: released as soon as the session ends.

    https://www.postgresql.org/docs/current/explicit-locking.html#ADVISORY-LOCKS
    """

    def __init__(self, name: str, connection: BaseDatabaseWrapper) -> None:
        digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
        self.key = int.from_bytes(digest, signed=True)
        self.connection = connection

    def acquire(self) -> bool:
        """Try to take the lock without waiting; return whether it is held now."""
        return self._query("SELECT pg_try_advisory_lock(%s)", self.key)

    def is_held(self) -> bool:
        """Return whether the session that took the lock still exists."""
        return self.connection.is_usable()

    def release(self) -> None:
        """Release the lock, unless its session has already ended."""
        if self.connection.is_usable():
            self._query("SELECT pg_advisory_unlock(%s)", self.key)

    def _query(self, sql: str, *params: Any) -> bool:
        with self.connection.cursor() as cursor:
            cursor.execute(sql, params)
            return bool(cursor.fetchone()[0])


class FileLock:
    """A lock on a file in ``LOCK_DIR``: the operating system releases it with the process."""

    def __init__(self, name: str, connection: BaseDatabaseWrapper) -> None:
        self.path = Path(settings.LOCK_DIR) / name.replace(" ", "-")
        self.connection = connection
        self.file: IO[str] | None = None

    def acquire(self) -> bool:
        """Try to take the lock without waiting; return whether it is held now."""
        import fcntl  # Available only on Unix, like everything that uses this lock.

        self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        # The file is neither emptied nor found through a link, which another user may have made.
        number = os.open(self.path, os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW, 0o600)
        self.file = os.fdopen(number, "w")
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.release()
        return self.is_held()

    def is_held(self) -> bool:
        """Return whether this object still holds the lock."""
        return self.file is not None

    def release(self) -> None:
        """Release the lock."""
        if self.file is not None:
            self.file.close()
        self.file = None


def get_lock(name: str, connection: Any = default_connection) -> AdvisoryLock | FileLock:
    """Return the lock with a name, without acquiring it."""
    lock_class = AdvisoryLock if connection.vendor == "postgresql" else FileLock
    return lock_class(name, connection)


@contextmanager
def try_lock(name: str) -> Iterator[bool]:
    """Try to hold the lock with a name during the block; yield whether it is held."""
    lock = get_lock(name)
    acquired = lock.acquire()
    try:
        yield acquired
    finally:
        if acquired:
            lock.release()
