"""Leases: one process at a time is in charge of something, whatever happens to the others.

A lease is a row with a number that grows with each holder, and the time of its renewal. Who
does not renew it for ``LEASE_SECONDS`` has lost it to the first who asks for it. A holder
that was paused finds its number outdated and must not act any more. The times are those of
the database, so that no machine's clock matters.
"""

from datetime import datetime, timedelta
from typing import cast

from django.db import transaction
from django.db.models import F
from django.db.models.functions import Now

from . import models

#: How long a lease is kept without being renewed, in seconds.
LEASE_SECONDS = 60


class LostLease(Exception):
    """Another process holds the lease now."""


class Lease:
    """The lease of a name, which this process may hold."""

    def __init__(self, name: str) -> None:
        self.name = name
        #: The number of the lease while this process holds it, otherwise 0.
        self.number = 0

    def acquire(self) -> bool:
        """Try to take the lease, unless another process has renewed it lately."""
        with transaction.atomic():
            models.Lease.objects.get_or_create(name=self.name)
            row = models.Lease.objects.annotate(now=Now()).get(name=self.name)
            kept = row.renewed_at and row.now - row.renewed_at < timedelta(seconds=LEASE_SECONDS)
            # Another process may have taken it since the row was read.
            unchanged = models.Lease.objects.filter(name=self.name, number=row.number)
            if kept or not unchanged.update(number=F("number") + 1, renewed_at=Now()):
                return False
            self.number = row.number + 1
            return True

    def renew(self) -> datetime:
        """Renew the lease, and return the time of the database.

        Raises LostLease if another process holds it.
        """
        rows = models.Lease.objects.filter(name=self.name, number=self.number)
        if not rows.update(renewed_at=Now()):
            raise LostLease
        return cast(datetime, rows.values_list("renewed_at", flat=True)[0])

    def release(self) -> None:
        """Let another process take the lease at once."""
        rows = models.Lease.objects.filter(name=self.name, number=self.number)
        rows.update(renewed_at=None)
        self.number = 0
