"""The broker: a task that is queued is run by a worker, over whatever broker is set."""

from datetime import timedelta
from queue import Queue

import pytest
from celery.contrib.testing.worker import start_worker
from django.utils import timezone

from {{ cookiecutter.project_slug }} import celery_app


@pytest.mark.django_db(transaction=True, serialized_rollback=True)
def test_a_queued_task_is_run():
    done = Queue()

    @celery_app.task(name="tests.note", bind=True, shared=False)
    def note(self, text):
        done.put((text, self.queued_at))

    with start_worker(celery_app, perform_ping_check=False, shutdown_timeout=30):
        now = timezone.now()
        note.delay("run")
        note.delay("and done")
        found = dict([done.get(timeout=30), done.get(timeout=30)])
    assert set(found) == {"run", "and done"}
    assert all(abs(queued_at - now) < timedelta(seconds=30) for queued_at in found.values())
