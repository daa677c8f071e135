"""Recognize that the database was restored from a backup.

The backup does not know what was sent since it was made. Therefore e-mail waits after a restore,
and so do the delayed tasks that may have run, until ``python manage.py restored`` is told what to
do with them.

A row contains the identity of its database: its oid, and the transaction that recorded a migration.
Restoring a dump inserts all rows again, in other transactions. A recovery to a point in time
keeps them, but starts another timeline, as does the promotion of a standby. That is a restore if the
row is old. Any other restore, such as that of a disk or of SQLite, has to be announced with
``restored --to``.
"""

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from django.db import DEFAULT_DB_ALIAS, DatabaseError, connection
from django.db.models import Q
from django.utils import timezone

from ..models import Origin

#: A standby that is promoted within this time after the last note is not a restore.
FAILOVER = timedelta(minutes=5)

#: The xmin of a row is that of the transaction which inserted it, also after VACUUM and pg_upgrade.
IDENTITY = """
SELECT d.oid || '.' || m.xmin FROM pg_database d, django_migrations m
WHERE d.datname = current_database() AND m.app = 'ops' AND m.name = '0010_origin'
ORDER BY m.id LIMIT 1
"""

TIMELINE = """
SELECT CASE WHEN pg_is_in_recovery() THEN ''
ELSE left(pg_walfile_name(pg_current_wal_lsn()), 8) END
"""


@dataclass(frozen=True)
class Restore:
    """A restore that is not dealt with yet: the time of the backup, and of the restore."""

    start: datetime
    end: datetime

    def __str__(self) -> str:
        start, end = (f"{timezone.localtime(time):%Y-%m-%d %H:%M %Z}" for time in self.span)
        return f"the database is from a backup of {start}, which was restored by {end}"

    @property
    def span(self) -> tuple[datetime, datetime]:
        """Start and end."""
        return self.start, self.end

    @property
    def held(self) -> Q:
        """The delayed tasks that may have run since the backup."""
        return Q(created_at__lte=self.start, due_at__lte=self.end)


def get_identity() -> tuple[str, str]:
    """Return identity and timeline of the database; empty strings if they are unknown."""
    if connection.vendor != "postgresql":
        return "", ""
    with connection.cursor() as cursor:
        cursor.execute(IDENTITY)
        row = cursor.fetchone()
        identity = row[0] if row else ""
        try:
            cursor.execute(TIMELINE)
            return identity, cursor.fetchone()[0]
        except DatabaseError:
            return identity, ""  # Some hosted databases do not allow this.


def find_restore() -> Restore | None:
    """Return the restore that is not dealt with yet, or None."""
    origin = Origin.objects.first()
    if origin is None:
        return None
    if origin.restored_at is None:
        if not origin.identity:
            return None  # A database other than PostgreSQL, or a new one.
        identity, timeline = get_identity()
        now = timezone.now()
        is_copy = identity != origin.identity
        is_recovered = timeline and "" != origin.timeline != timeline
        if not is_copy and not (is_recovered and origin.seen_at < now - FAILOVER):
            return None
        Origin.objects.filter(restored_at=None).update(restored_at=now)
        origin.restored_at = now
    return Restore(origin.seen_at, origin.restored_at)


def create_row(using: str, **kwargs: Any) -> None:
    """Create the row, without an identity; a receiver of ``post_migrate``.

    Nothing else creates it, because it is missing while a backup is being restored.
    """
    if using == DEFAULT_DB_ALIAS and Origin._meta.db_table in connection.introspection.table_names():
        Origin.objects.get_or_create(pk=1, defaults={"seen_at": timezone.now()})


def note_origin() -> None:
    """Store that the rows belong to this database, now; ``find_restore()`` has returned None."""
    identity, timeline = get_identity()
    Origin.objects.update(
        identity=identity, timeline=timeline, seen_at=timezone.now(), restored_at=None
    )


def announce(start: datetime) -> Restore:
    """Store that the database was restored to a time; return the restore."""
    Origin.objects.update_or_create(
        pk=1, defaults={"seen_at": start, "restored_at": timezone.now()}
    )
    restore = find_restore()
    assert restore is not None
    return restore
