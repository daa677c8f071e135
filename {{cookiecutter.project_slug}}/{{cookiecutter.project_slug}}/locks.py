"""Locks that processes hold against each other, and lose when they die."""

import hashlib
from contextlib import contextmanager

from django.conf import settings
from django.db import connection


class AdvisoryLock:
    """A lock of a PostgreSQL session: free as soon as the process or its connection is gone.

    https://www.postgresql.org/docs/current/explicit-locking.html#ADVISORY-LOCKS
    """

    def __init__(self, name, connection):
        digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
        self.key = int.from_bytes(digest, signed=True)
        self.connection = connection

    def acquire(self):
        """Try to take the lock; return whether it is held now."""
        return self._ask("SELECT pg_try_advisory_lock(%s)", self.key)

    def is_held(self):
        """Return whether the session that took the lock is still there."""
        return self.connection.is_usable()

    def release(self):
        """Let others have the lock."""
        if self.connection.is_usable():
            self._ask("SELECT pg_advisory_unlock(%s)", self.key)

    def _ask(self, question, *values):
        with self.connection.cursor() as cursor:
            cursor.execute(question, values)
            return cursor.fetchone()[0]


class FileLock:
    """A lock on a file in ``var/``: the operating system frees it when the process is gone."""

    def __init__(self, name, connection):
        self.path = settings.BASE_DIR / "var" / "locks" / name.replace(" ", "-")
        self.file = None

    def acquire(self):
        """Try to take the lock; return whether it is held now."""
        import fcntl  # Only on Unix, as is everything that holds a lock on SQLite.

        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.file = self.path.open("w")
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.release()
        return self.is_held()

    def is_held(self):
        """Return whether the lock is held."""
        return self.file is not None

    def release(self):
        """Let others have the lock."""
        if self.file is not None:
            self.file.close()
        self.file = None


def lock(name, connection=connection):
    """Return the lock of that name, free or held by anyone; ``connection`` is what holds it."""
    kind = AdvisoryLock if connection.vendor == "postgresql" else FileLock
    return kind(name, connection)


@contextmanager
def hold(name):
    """Try to hold the lock of that name, and yield whether it is held."""
    this = lock(name)
    held = this.acquire()
    try:
        yield held
    finally:
        if held:
            this.release()
