"""How tasks are queued: never at the cost of a request, and stamped with the time."""

from datetime import datetime

from celery.contrib.django.task import DjangoTask
from django.db import transaction
from django.utils import timezone


class Task(DjangoTask):
    """The base of every task of the service."""

    def apply_async(self, args=None, kwargs=None, **options):
        """Queue the task, stamped with the time, so that a late worker knows when it was due."""
        headers = options.pop("headers", None) or {}
        headers.setdefault("queued_at", timezone.now().isoformat())
        return super().apply_async(args, kwargs, headers=headers, **options)

    def delay_on_commit(self, *args, **kwargs):
        """Queue the task once the transaction is committed.

        Where the broker is away the error is logged, and the request goes on: what
        must not be lost has a row in the database, and ``resume_deliveries`` finds it.
        """

        def queue():
            self.delay(*args, **kwargs)

        transaction.on_commit(queue, robust=True)

    @property
    def queued_at(self):
        """When the running task was queued; now, where it was called directly."""
        headers = self.request.headers or {}
        stamp = self.request.get("queued_at") or headers.get("queued_at")
        return datetime.fromisoformat(stamp) if stamp else timezone.now()
