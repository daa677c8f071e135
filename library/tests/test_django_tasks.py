"""Django's own tasks: Celery's workers run them."""

import asyncio
import time
from collections import Counter
from datetime import timedelta
from queue import Queue
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
from celery import current_app
from django.conf import global_settings
from django.core import checks
from django.core.signals import request_finished, request_started
from django.db import OperationalError, transaction
from django.utils import timezone
from django_celery_beat.models import IntervalSchedule, PeriodicTask
from django_celery_results.backends import DatabaseBackend
from django_celery_results.models import TaskResult as StoredResult
from kombu.exceptions import OperationalError as BrokerError

from prodserver_ops import broker
from prodserver_ops.console.checks import check_tasks
from prodserver_ops.models import TaskRun
from prodserver_ops.scheduling import validation
from prodserver_ops.worker import delayed, record

pytest.importorskip("django.tasks", reason="Django 6.0 adds django.tasks")

from django.tasks import TaskResultStatus, task, task_backends
from django.tasks.exceptions import InvalidTask, TaskResultDoesNotExist
from django.tasks.signals import task_enqueued, task_finished, task_started

from prodserver_ops.worker import django_tasks

done = Queue()

NAME = f"{__name__}.add"


@task
def add(first, second=1):
    done.put(first + second)
    return {"sum": first + second}


@task(takes_context=True, priority=50, queue_name="mail")
def describe(context, text):
    result = context.task_result
    done.put((text, context.attempt, result.status, result.enqueued_at, result.started_at))


@task
async def add_async(first, second):
    done.put(first + second)


@task
def fail(text):
    done.put(text)
    raise ValueError(text)


@task
def query(failures):
    done.put(failures)
    if current_app.tasks[query.module_path].request.retries < failures:
        raise OperationalError("the connection is closed")


@pytest.fixture(autouse=True)
def _empty():
    while not done.empty():
        done.get_nowait()


@pytest.fixture
def sent(monkeypatch):
    """The messages that would be published, as (name, arguments, options)."""
    messages = []

    def send_task(name, args, kwargs, **options):
        messages.append(SimpleNamespace(name=name, args=args, kwargs=kwargs, **options))

    monkeypatch.setattr(type(current_app._get_current_object()), "send_task", Mock(wraps=send_task))
    return messages


@pytest.fixture
def signals():
    """The signals that Django's tasks send, as (name, status)."""
    sent, receivers = [], []
    for name, signal in (
        ("enqueued", task_enqueued),
        ("started", task_started),
        ("finished", task_finished),
    ):

        def receive(sender, task_result, name=name, **kwargs):
            sent.append((name, task_result.status, task_result))

        signal.connect(receive, weak=False)
        receivers.append((signal, receive))
    yield sent
    for signal, receive in receivers:
        signal.disconnect(receive)


@pytest.fixture
def results(settings, monkeypatch):
    """Store results in the database, as services do that store them."""
    settings.CELERY_RESULT_BACKEND = "django-db"
    app = current_app._get_current_object()
    monkeypatch.setattr(type(app), "backend", DatabaseBackend(app))
    for name in (add, fail, query):
        monkeypatch.setattr(app.tasks[name.module_path], "ignore_result", False)
    # A table of SQLite in memory is locked while another thread writes; then the task runs again.
    monkeypatch.setattr(delayed.Keeper, "run", lambda keeper: None)


@pytest.fixture
def _no_delay(monkeypatch):
    """Let a task be tried again at once."""
    delay = Mock(return_value=0)
    monkeypatch.setattr("celery.app.autoretry.get_exponential_backoff_interval", delay)


def test_task_is_a_task_of_celery():
    assert isinstance(task_backends["default"], django_tasks.Backend)
    assert add.module_path == NAME
    celery_task = current_app.tasks[NAME]
    assert celery_task.acks_late
    assert celery_task.reject_on_worker_lost


@pytest.mark.django_db(transaction=True, serialized_rollback=True)
class TestWorker:
    def test_runs_tasks(self, run_worker, signals):
        with run_worker():
            result = add.enqueue(1, second=2)
            assert done.get(timeout=30) == 3
            asyncio.run(add_async.aenqueue(2, 2))
            assert done.get(timeout=30) == 4
        assert result.status == TaskResultStatus.READY
        assert abs(result.enqueued_at - timezone.now()) < timedelta(minutes=1)
        # The worker may be faster than the thread that queues.
        assert Counter((name, status) for name, status, _ in signals) == {
            ("enqueued", "READY"): 2,
            ("started", "RUNNING"): 2,
            ("finished", "SUCCESSFUL"): 2,
        }

    def test_passes_the_context(self, run_worker):
        with run_worker():
            start = timezone.now()
            describe.enqueue("text")
            text, attempt, status, enqueued_at, started_at = done.get(timeout=30)
        assert (text, attempt, status) == ("text", 1, TaskResultStatus.RUNNING)
        assert start <= enqueued_at <= started_at <= timezone.now()

    def test_reports_failures_once(self, run_worker, signals, caplog):
        with run_worker():
            fail.enqueue("no reason")
            assert done.get(timeout=30) == "no reason"
        ((status, result),) = [each[1:] for each in signals if each[0] == "finished"]
        assert status == "FAILED"
        (error,) = result.errors
        assert error.exception_class is ValueError
        assert "no reason" in error.traceback
        errors = [line for line in caplog.records if line.levelname == "ERROR"]
        assert len(errors) == 1

    @pytest.mark.usefixtures("_no_delay")
    def test_tries_again_as_celery_does(self, run_worker, signals):
        with run_worker():
            query.enqueue(2)
            assert [done.get(timeout=30) for _ in range(3)] == [2, 2, 2]
        finished = [status for name, status, _ in signals if name == "finished"]
        assert finished == ["SUCCESSFUL"]

    def test_records_the_run(self, run_worker):
        with run_worker():
            result = add.enqueue(7)
            assert done.get(timeout=30) == 8
        record._recorder.write()
        run = TaskRun.objects.get(task_id=result.id)
        assert (run.name, run.status, run.arguments) == (NAME, "succeeded", "[[7], {}]")

    def test_stores_results(self, run_worker, results, signals):
        result = add.enqueue(4, second=5)
        waiting = add.get_result(result.id)
        assert (waiting.status, waiting.args, waiting.kwargs) == ("READY", [4], {"second": 5})
        assert waiting.enqueued_at is not None
        failed = fail.enqueue("no reason")
        with run_worker():
            assert {done.get(timeout=30), done.get(timeout=30)} == {9, "no reason"}
            # Whoever reads a table of SQLite in memory keeps the worker from writing to it.
            until = time.monotonic() + 30
            while [name for name, _, _ in signals].count("finished") < 2:
                assert time.monotonic() < until
                time.sleep(0.01)
        result.refresh()
        assert (result.status, result.return_value) == ("SUCCESSFUL", {"sum": 9})
        assert result.enqueued_at <= result.started_at <= result.finished_at
        assert result.attempts == 1
        failed.refresh()
        assert (failed.status, failed.is_finished) == ("FAILED", True)
        assert failed.errors[0].exception_class is ValueError
        assert "no reason" in failed.errors[0].traceback

    @pytest.mark.usefixtures("_no_delay", "results")
    def test_stores_the_arguments_of_a_task_that_is_tried_again(self, run_worker):
        result = query.enqueue(1)
        with run_worker():
            assert [done.get(timeout=30) for _ in range(2)] == [1, 1]
        stored = query.get_result(result.id)
        assert (stored.args, stored.status, stored.attempts) == ([1], "SUCCESSFUL", 2)


class TestEnqueue:
    @pytest.mark.django_db
    def test_takes_little_time_in_a_request(self):
        add.enqueue(1)  # The first one connects.
        request_started.send(None)
        start = time.monotonic()
        add.enqueue(1)
        assert time.monotonic() - start < 0.05
        request_finished.send(None)

    def test_options(self, sent, settings):
        settings.CELERY_BROKER_URL = "redis://localhost"
        due = timezone.now() + timedelta(hours=1)
        add.using(run_after=due, priority=-100).enqueue(1)
        describe.enqueue("text")
        describe.using(queue_name="default").enqueue("text")
        describe.using(queue_name="dummy").enqueue("text")
        assert [message.name for message in sent] == [NAME, *3 * [describe.module_path]]
        assert (sent[0].eta, sent[0].priority, getattr(sent[0], "queue", None)) == (due, 9, None)
        assert [message.queue for message in sent[1:]] == ["dummy.mail", "dummy", "dummy"]

    @pytest.mark.parametrize(
        ("url", "priorities"),
        [
            ("amqp://localhost", [0, 0, 0, 5, 9]),
            ("redis://localhost", [9, 3, 0, 0, 0]),
            ("pgmq://localhost", [0, 0, 0, 0, 0]),
            ("memory://", [0, 0, 0, 0, 0]),
        ],
    )
    def test_priorities_are_those_of_the_broker(self, url, priorities):
        given = [-100, -1, 0, 1, 100]
        assert [broker.get_priority(url, priority) for priority in given] == priorities

    @pytest.mark.parametrize(
        ("args", "kwargs"), [([], {}), ([1, 2, 3], {}), ([1], {"third": 3}), ([object()], {})]
    )
    def test_wrong_arguments_are_refused(self, sent, args, kwargs):
        with pytest.raises(TypeError):
            add.enqueue(*args, **kwargs)
        assert sent == []

    def test_context_is_not_an_argument(self, sent):
        describe.enqueue("text")
        with pytest.raises(TypeError):
            describe.enqueue("context", "text")
        assert len(sent) == 1

    def test_unknown_queue_is_refused(self):
        with pytest.raises(InvalidTask, match="no-such-queue"):
            add.using(queue_name="no-such-queue")

    @pytest.mark.django_db(transaction=True, serialized_rollback=True)
    def test_is_queued_after_the_transaction(self, sent):
        with transaction.atomic():
            result = add.enqueue(1)
            assert (sent, result.enqueued_at) == ([], None)
        assert [message.task_id for message in sent] == [result.id]
        assert result.enqueued_at is not None
        with pytest.raises(RuntimeError), transaction.atomic():
            add.enqueue(1)
            raise RuntimeError
        assert len(sent) == 1

    @pytest.mark.django_db(transaction=True, serialized_rollback=True)
    def test_is_queued_at_once_without_the_option(self, sent, settings):
        backend = settings.TASKS["default"]["BACKEND"]
        settings.TASKS = {"default": {"BACKEND": backend}}
        with transaction.atomic():
            add.enqueue(1)
            assert len(sent) == 1

    @pytest.mark.django_db(transaction=True, serialized_rollback=True)
    def test_failure_is_raised_or_logged_after_the_transaction(self, sent, caplog):
        type(current_app._get_current_object()).send_task.side_effect = BrokerError("no broker")
        with pytest.raises(BrokerError):
            add.enqueue(1)
        with transaction.atomic():
            add.enqueue(1)
        assert f"{NAME} is not queued: no broker" in caplog.text


class TestResults:
    @pytest.mark.django_db
    @pytest.mark.usefixtures("results")
    def test_unknown_result(self):
        with pytest.raises(TaskResultDoesNotExist):
            add.get_result("no-such-id")

    @pytest.mark.django_db(transaction=True, serialized_rollback=True)
    @pytest.mark.usefixtures("results")
    def test_result_of_a_task_that_is_not_queued_does_not_exist(self, sent, signals):
        def fail(*args, **kwargs):
            assert StoredResult.objects.exists()
            raise BrokerError("no broker")

        type(current_app._get_current_object()).send_task.side_effect = fail
        with pytest.raises(BrokerError):
            add.enqueue(1)
        with transaction.atomic():
            add.enqueue(1)
        assert not StoredResult.objects.exists()
        assert signals == []

    def test_results_need_a_result_backend(self):
        assert not task_backends["default"].supports_get_result
        with pytest.raises(NotImplementedError):
            add.get_result("some-id")


@pytest.mark.django_db
class TestSchedules:
    def make(self, **fields):
        interval = IntervalSchedule.objects.create(every=1, period="hours")
        return PeriodicTask(name="sample", interval=interval, task=NAME, **fields)

    def test_may_name_the_task(self):
        assert validation.find_problems(self.make(args="[1]")) == {}

    def test_arguments_are_compared_with_its_signature(self):
        assert "args" in validation.find_problems(self.make(args="[]"))
        assert "kwargs" in validation.find_problems(self.make(args="[1]", kwargs='{"third": 3}'))

    def test_queue_and_priority_are_those_of_the_task(self, sent):
        current_app.tasks[describe.module_path].apply_async(["text"])
        assert sent[0].queue == "dummy.mail"


def test_check_reports_backends_that_run_no_tasks_in_workers(settings):
    assert check_tasks() == []
    settings.TASKS = {
        "default": {"BACKEND": "django.tasks.backends.immediate.ImmediateBackend"},
        "other": {"BACKEND": "django.tasks.backends.dummy.DummyBackend"},
    }
    first, second = check_tasks()
    assert "'default'" in first.msg
    assert "inside requests" in first.msg
    assert "'other'" in second.msg
    assert first.level == checks.WARNING


def test_check_reports_the_default_of_django(settings):
    settings.TASKS = global_settings.TASKS
    assert [message.id for message in check_tasks()] == ["tasks.W003"]
