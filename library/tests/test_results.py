"""Results of tasks in the database: each outcome is stored as it is, or the task runs again."""

import logging
from unittest.mock import Mock
from uuid import uuid4

import pytest
from celery import chord, group
from celery.app.trace import build_tracer
from celery.exceptions import Reject, SoftTimeLimitExceeded
from django.db import DataError, InterfaceError, OperationalError
from django_celery_results.models import ChordCounter, TaskResult
from kombu.exceptions import OperationalError as BrokerError

from prodserver_ops.models import TaskRun
from prodserver_ops.worker import record, results
from prodserver_ops.worker.app import CeleryApp

pytestmark = pytest.mark.django_db


@pytest.fixture(autouse=True)
def recorder(monkeypatch):
    """A recorder without its thread, which keeps the test's connection."""
    monkeypatch.setattr(results, "close_old_connections", lambda: None)
    monkeypatch.setattr(record.connection, "close", lambda: None)
    with monkeypatch.context() as patch:
        patch.setattr(record.threading, "Thread", Mock())
        monkeypatch.setattr(record, "_recorder", record.Recorder())
    return record._recorder


@pytest.fixture(autouse=True)
def no_log(monkeypatch):
    """Celery logs errors, and pytest-xdist cannot send lone surrogates."""
    monkeypatch.setattr(logging.getLogger("celery.app.trace"), "disabled", True)


@pytest.fixture(autouse=True)
def short_times(monkeypatch):
    monkeypatch.setattr(results, "FIRST_WAIT", 0.001)
    monkeypatch.setattr(results, "STORE_SECONDS", 0.5)


@pytest.fixture
def app():
    """A Celery app that stores results in the database."""
    app = CeleryApp("results", set_as_current=False)
    app.conf.update(
        broker_url="memory://",
        result_backend="django-db",
        result_extended=True,
        task_ignore_result=False,
        task_acks_late=True,
    )
    app.set_current()
    yield app
    app.close()


@pytest.fixture(autouse=True)
def keep_current_app():
    from dummy.celery import app

    yield
    app.set_current()


@pytest.fixture
def act(app):
    """A task that calls its argument ``act.body``, and counts its runs."""

    @app.task(name="sample.act", shared=False, autoretry_for=())
    def act(*args):
        act.runs += 1
        return act.body(*args)

    act.runs = 0
    act.body = lambda *args: "done"
    return act


def run(task, *args, **request):
    """Run a task as a worker does; return its id."""
    task_id = request.setdefault("id", str(uuid4()))
    trace = build_tracer(task.name, task, app=task.app)
    trace(task_id, args, {}, {"delivery_info": {}, "task": task.name, **request})
    return task_id


def get_rows(recorder):
    recorder.write()
    return list(TaskRun.objects.order_by("pk").values_list("status", "error"))


def fail(error):
    """Return a function that raises an exception."""

    def function(*args, **kwargs):
        raise error

    return function


def fail_times(monkeypatch, number, error):
    """Let the first attempts to store a result fail."""
    store, errors = TaskResult.objects.store_result, [error] * number

    def store_result(**kwargs):
        if errors:
            raise errors.pop()
        return store(**kwargs)

    monkeypatch.setattr(TaskResult._default_manager, "store_result", store_result)


def test_failure_with_characters_that_no_database_stores(act, recorder):
    act.body = fail(ValueError("a\0b\ud800"))
    task_id = run(act, "\0", argsrepr="('\0\ud800',)", hostname="x" * 300)
    result = TaskResult.objects.get(task_id=task_id)
    assert result.status == "FAILURE"
    assert r"ValueError: a\x00b\ud800" in result.traceback
    assert act.AsyncResult(task_id).result.args == ("a\0b\ud800",)
    assert get_rows(recorder) == [("failed", r"ValueError: a\x00b\ud800")]


def test_result_with_characters_that_no_database_stores(act, recorder):
    act.body = lambda: ["a\0b\ud800"]
    task_id = run(act)
    assert act.AsyncResult(task_id).result == ["a\0b\ud800"]
    assert get_rows(recorder) == [("succeeded", "")]


@pytest.mark.parametrize(
    "error", [OperationalError("gone"), InterfaceError("closed"), SoftTimeLimitExceeded(240)]
)
def test_outcome_is_stored_when_the_database_is_back(act, recorder, monkeypatch, error):
    fail_times(monkeypatch, 2, error)
    task_id = run(act)
    assert TaskResult.objects.get(task_id=task_id).status == "SUCCESS"
    assert act.runs == 1
    assert get_rows(recorder) == [("succeeded", "")]


def test_task_that_succeeded_runs_again_if_that_is_not_stored(act, recorder, monkeypatch):
    fail_times(monkeypatch, 1000, OperationalError("gone"))
    with pytest.raises(Reject) as caught:
        run(act)
    assert caught.value.requeue
    assert not TaskResult.objects.exists()
    assert get_rows(recorder) == [("retried", "the outcome is not stored: OperationalError")]


@pytest.mark.parametrize(
    "error",
    [
        OperationalError("gone"),
        InterfaceError("closed"),
        ConnectionResetError(),
        DataError("too long"),
        RuntimeError("a bug of the backend"),
        UnicodeEncodeError("utf-8", "\ud800", 0, 1, "surrogates not allowed"),
    ],
    ids=repr,
)
def test_failure_is_recorded_although_the_result_backend_fails(act, recorder, monkeypatch, error):
    fail_times(monkeypatch, 1000, error)
    act.body = fail(ValueError("wrong"))
    try:
        run(act)
    except Reject as rejected:
        assert rejected.requeue
    assert get_rows(recorder) == [("failed", "ValueError: wrong")]


def test_success_that_can_never_be_stored_is_no_failure(act, recorder, monkeypatch, caplog):
    fail_times(monkeypatch, 1000, DataError("too long"))
    run(act)
    assert not TaskResult.objects.exists()
    assert "The outcome of sample.act cannot be stored" in caplog.text
    assert get_rows(recorder) == [("succeeded", "")]


def test_result_that_is_not_json_is_a_failure_as_in_celery(act, recorder):
    act.body = object
    task_id = run(act)
    assert TaskResult.objects.get(task_id=task_id).status == "FAILURE"
    ((status, error),) = get_rows(recorder)
    assert status == "failed"
    assert "not JSON serializable" in error


def test_retry_whose_state_is_not_stored_is_queued_once(act, recorder, monkeypatch):
    fail_times(monkeypatch, 1, OperationalError("gone"))
    act.body = lambda: act.retry(countdown=60)
    act.bind(act.app)
    queued = []
    monkeypatch.setattr(act, "apply_async", lambda *args, **options: queued.append(options))
    monkeypatch.setattr(
        "celery.canvas.Signature.apply_async", lambda *args, **options: queued.append(options)
    )
    run(act, called_directly=False)
    assert len(queued) == 1
    assert [status for status, _ in get_rows(recorder)] == ["retried"]


def test_message_of_a_run_that_was_started_already_has_no_result(act, recorder):
    run(act, headers={"schedule_run": 7, "schedule_attempt": 1})
    assert act.runs == 0
    assert not TaskResult.objects.exists()
    assert get_rows(recorder) == []


class TestChord:
    @pytest.fixture
    def queued(self, app, monkeypatch):
        """The messages that are published, as (name, arguments, options)."""
        queued = []

        def send_task(name, args=None, kwargs=None, **options):
            queued.append((name, args, options))

        monkeypatch.setattr(app, "send_task", send_task)
        return queued

    @pytest.fixture
    def collect(self, app):
        @app.task(name="sample.collect", shared=False)
        def collect(values):
            return values

        return collect

    def test_test_may_run_it_at_once(self, act, app, collect):
        app.conf.task_always_eager = True
        act.body = lambda number: number * 10
        result = chord([act.s(1), act.s(2)], app=app)(collect.s())
        assert result.get() == [10, 20]

    @pytest.fixture
    def parts(self, act, collect, queued):
        """The requests of the two tasks of a chord, which are queued."""
        chord([act.s(1), act.s(2)], app=act.app)(collect.s())
        requests = []
        for _, _, options in queued:
            names = ("chord", "root_id", "parent_id")
            requests.append(
                {name: options.get(name) for name in names}
                | {"id": options["task_id"], "group": options["group_id"]}
            )
        queued.clear()
        assert len(requests) == 2
        return requests

    def test_callback_is_queued_once_with_all_results(self, act, parts, queued):
        act.body = lambda number: number * 10
        run(act, 1, **parts[0])
        assert queued == []
        run(act, 2, **parts[1])
        ((name, args, _),) = queued
        assert (name, list(args)) == ("sample.collect", [[10, 20]])
        assert not ChordCounter.objects.exists()

    def test_task_that_runs_again_counts_once(self, act, parts, queued):
        for _ in range(3):
            run(act, 1, **parts[0])
        assert queued == []
        run(act, 2, **parts[1])
        assert len(queued) == 1
        run(act, 2, **parts[1])
        assert len(queued) == 1

    def test_callback_is_queued_later_if_the_broker_is_unavailable(
        self, act, app, parts, queued, monkeypatch
    ):
        run(act, 1, **parts[0])
        with monkeypatch.context() as patch:
            patch.setattr(app, "send_task", fail(BrokerError("refused")))
            with pytest.raises(Reject):
                run(act, 2, **parts[1])
        assert ChordCounter.objects.exists()
        run(act, 2, **parts[1])
        assert len(queued) == 1

    def test_callback_of_a_task_that_failed_fails(self, act, collect, parts, queued):
        run(act, 1, **parts[0])
        act.body = fail(ValueError("wrong"))
        run(act, 2, **parts[1])
        assert queued == []
        result = TaskResult.objects.get(task_id=parts[0]["chord"]["options"]["task_id"])
        assert result.status == "FAILURE"
        assert "ValueError('wrong')" in result.result


class TestWithoutResults:
    """A service that stores none: Celery would return None, or name a page of its documentation."""

    @pytest.fixture
    def app(self, settings, monkeypatch):
        settings.CELERY_BROKER_URL = "memory://"
        monkeypatch.delenv("CELERY_BROKER_URL", raising=False)  # Celery prefers it.
        app = CeleryApp("no-results", set_as_current=False, broker="memory://")
        app.conf.task_ignore_result = True
        return app

    @pytest.fixture
    def add(self, app):
        @app.task(name="add", shared=False)
        def add(a, b):
            return a + b

        return add

    def test_get_says_how_to_store_them(self, add):
        with pytest.raises(NotImplementedError, match=r'CELERY_RESULT_BACKEND = "django-db" in'):
            add.delay(1, 2).get()

    def test_state_says_so_too(self, add):
        with pytest.raises(NotImplementedError, match=r"prodserver-ops\[results\]"):
            add.delay(1, 2).state  # noqa: B018

    def test_chord_is_an_error_at_the_call(self, add, app):
        parts = [add.s(1, 2), add.s(3, 4)]
        with app.connection_for_write() as connection:
            channel = connection.default_channel
            before = channel._size(app.conf.task_default_queue)
            for chord_ in (chord(parts, add.s()), group(parts) | add.s()):
                with pytest.raises(NotImplementedError, match="chords, and groups in a chain need"):
                    chord_.delay()
            assert channel._size(app.conf.task_default_queue) == before

    def test_chord_of_a_test_that_runs_tasks_at_once_is_the_same_error(self, add, app):
        app.conf.task_always_eager = True
        parts = [add.s(1, 2), add.s(3, 4)]
        for chord_ in (chord(parts, add.s()), group(parts) | add.s()):
            with pytest.raises(NotImplementedError, match="change task_results=database"):
                chord_.delay()
