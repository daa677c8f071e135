"""Leases: at most one process at a time holds a lease.

A lease is a row with a number, which each new holder increases, and the time of its last renewal.
If the holder does not renew the lease for ``LEASE_SECONDS``, another process can take it. A process
on the same machine or in the same container can take it immediately if the holder was killed. A
holder that was paused notices that the number has changed, and must stop. Times are those of the
database, so that the clocks of the machines do not matter.
"""

import contextlib
import os
import socket
from datetime import datetime, timedelta
from typing import cast

from django.db import transaction
from django.db.models import F
from django.db.models.functions import Now

from .. import models

#: How long a lease is kept without being renewed, in seconds.
LEASE_SECONDS = 60


class LostLease(Exception):
    """Another process holds the lease now."""


def _get_holder() -> str:
    """Return host, namespace of process ids (that of a container, on Linux) and process id."""
    namespace = ""
    with contextlib.suppress(OSError):
        namespace = os.readlink("/proc/self/ns/pid")
    return f"{socket.gethostname()} {namespace} {os.getpid()}"


def _is_gone(holder: str) -> bool:
    """Return whether a holder was a process of this machine or container, and has ended."""
    place, _, pid = holder.rpartition(" ")
    own_place, _, own_pid = _get_holder().rpartition(" ")
    if place != own_place:
        return False
    if pid == own_pid:
        return True
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return False


class Lease:
    """A lease with a name, which this process may hold."""

    def __init__(self, name: str) -> None:
        self.name = name
        #: The number of the lease while this process holds it, otherwise 0.
        self.number = 0

    def acquire(self) -> bool:
        """Try to take the lease, unless another process has renewed it recently."""
        with transaction.atomic():
            models.Lease.objects.get_or_create(name=self.name)
            row = models.Lease.objects.annotate(now=Now()).get(name=self.name)
            renewed_lately = row.renewed_at is not None and (
                row.now - row.renewed_at < timedelta(seconds=LEASE_SECONDS)
            )
            # Another process may have taken it since the row was read.
            unchanged = models.Lease.objects.filter(name=self.name, number=row.number)
            kept = renewed_lately and not _is_gone(row.holder)
            values = {"number": F("number") + 1, "holder": _get_holder(), "renewed_at": Now()}
            if kept or not unchanged.update(**values):
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
        """Let another process take the lease immediately."""
        rows = models.Lease.objects.filter(name=self.name, number=self.number)
        rows.update(renewed_at=None)
        self.number = 0
