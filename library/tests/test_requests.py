"""A task that runs out of memory, or exits, fails; it neither ends its worker nor runs for ever."""

import pytest
from billiard.einfo import ExceptionInfo
from celery.worker import request as celery_request

from prodserver_ops.worker.record import TaskExit
from prodserver_ops.worker.requests import Request, TaskMemoryError


@pytest.fixture
def fail(monkeypatch):
    """A function that fails a request with an exception, and returns what Celery gets."""
    passed = []
    monkeypatch.setattr(
        celery_request.Request, "on_failure", lambda self, info, **others: passed.append(info)
    )

    def fail(error, is_cancelled=False):
        failed = Request.__new__(Request)
        failed._already_cancelled, failed._already_revoked = is_cancelled, False
        try:
            raise error
        except BaseException:
            failed.on_failure(ExceptionInfo(), return_ok=True)
        error = passed.pop().exception
        return getattr(error, "exc", error)

    return fail


@pytest.mark.parametrize(
    ("error", "kind", "text"),
    [
        (MemoryError("too large"), TaskMemoryError, "too large"),
        (SystemExit(3), TaskExit, "SystemExit(3)"),
        (KeyboardInterrupt(), TaskExit, "KeyboardInterrupt()"),
        (ValueError("a"), ValueError, "a"),
    ],
)
def test_error_of_a_task_is_a_failure(fail, error, kind, text):
    found = fail(error)
    assert (type(found), str(found)) == (kind, text)


def test_task_that_the_worker_has_cancelled_is_no_failure(fail):
    assert type(fail(SystemExit(), is_cancelled=True)) is SystemExit
