"""Queues that no process consumes: checks, doctor, alerts, the page and the readiness show them."""

import re

import pytest
from celery import current_app, shared_task
from django.urls import reverse
from django_celery_beat.models import IntervalSchedule, PeriodicTask
from kombu import Queue

from prodserver_ops import broker
from prodserver_ops.conf import Defaults, processes
from prodserver_ops.console import doctor, problems
from prodserver_ops.console.checks import check_queues
from prodserver_ops.scheduling import queues
from prodserver_ops.scheduling.queues import get_consumed, get_queue
from prodserver_ops.web import health
from prodserver_ops.worker.app import CeleryApp


@shared_task(name="test.queues")
def sample():
    """Do nothing."""


@pytest.fixture
def make_task(monkeypatch):
    """Return a function that gives the task options, as its decorator does."""

    def make(**options):
        task = current_app.tasks[sample.name]
        for name, value in options.items():
            monkeypatch.setattr(task, name, value, raising=False)
        monkeypatch.setattr(task, "_exec_options", None)
        return task

    return make


@pytest.fixture
def set_routes(settings):
    """Return a function that sets the routes; they are undone after the test."""
    before = current_app.conf.task_routes

    def set_routes(routes):
        settings.CELERY_TASK_ROUTES = routes
        current_app.conf.task_routes = routes
        current_app.amqp.flush_routes()
        current_app.amqp.router = current_app.amqp.Router()

    yield set_routes
    current_app.conf.task_routes = before
    current_app.amqp.flush_routes()
    current_app.amqp.router = current_app.amqp.Router()


def use_workers(settings, **arguments):
    workers = {name: processes.worker(settings, **each) for name, each in arguments.items()}
    settings.PRODUCTION_PROCESSES = workers


class TestCheck:
    def test_all_queues_of_the_project_are_consumed(self):
        assert check_queues() == []

    def test_queue_of_a_task(self, make_task):
        make_task(queue="reports")
        (error,) = check_queues()
        assert error.id == "queues.E001"
        assert error.msg == (
            "No process in PRODUCTION_PROCESSES consumes the queue 'reports' of "
            "the task test.queues."
        )
        assert error.hint.startswith('Write QUEUES = ["reports"] in the settings')

    def test_queue_of_a_route(self, set_routes, make_task):
        make_task()
        set_routes({"test.queue*": {"queue": "a"}, "other": "b"})
        assert queues.find_unconsumed() == {
            "a": ["the task test.queues", "the route 'test.queue*' in CELERY_TASK_ROUTES"],
            "b": ["the route 'other' in CELERY_TASK_ROUTES"],
        }

    def test_routes_in_other_forms(self, set_routes):
        set_routes(([("one", {"queue": "a"})], {"two": "b"}, lambda *args, **kwargs: None))
        assert list(queues.find_unconsumed()) == ["a", "b"]

    def test_queue_that_no_worker_names(self, settings):
        use_workers(settings, worker={"queues": "dummy"})
        (error,) = check_queues()
        assert "'dummy.mail' of the task ops.send_digest_chunk, the task ops.send" in error.msg

    def test_queue_that_a_worker_excludes(self, settings):
        use_workers(settings, worker={"exclude_queues": "dummy.mail"})
        assert get_consumed() == ["dummy"]

    def test_queue_of_a_worker_of_its_own(self, settings, make_task):
        make_task(queue="reports")
        use_workers(settings, worker={}, reports={"queues": "reports, more"})
        assert check_queues() == []
        assert get_consumed() == ["dummy", "dummy.mail", "reports", "more"]

    def test_project_that_starts_its_workers_itself(self, settings):
        settings.PRODUCTION_PROCESSES = {}
        assert get_consumed() == ["dummy", "dummy.mail"]

    def test_destination_without_a_queue_is_not_reported(self, make_task):
        assert get_queue(make_task(exchange="events", routing_key="new")) == ""


class TestUnknownQueue:
    @pytest.fixture
    def send(self, make_task):
        """Return a function that sends a task of an app that knows no further queues."""
        task = make_task()
        app = CeleryApp("unknown", set_as_current=False)
        app.conf.update(task_queues=current_app.conf.task_queues, broker_url="memory://")
        return lambda queue: app.send_task(task.name, queue=queue)

    def get_errors(self, caplog):
        return [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]

    def test_is_logged_once(self, send, caplog):
        for _ in range(2):
            send("typo")
        (message,) = self.get_errors(caplog)
        assert message.startswith(
            "A message is sent to the queue typo, which no process consumes: "
        )

    def test_known_ones_are_not_logged(self, send, caplog, settings):
        use_workers(settings, worker={}, reports={"queues": "reports"})
        for queue in ("dummy", "dummy.mail", "reports", Queue("other service")):
            send(queue)
        assert self.get_errors(caplog) == []


def test_own_queues_are_a_setting():
    own = {"PACKAGE": "own", "QUEUES": ["reports"], "BASE_DIR": ""}
    settings = type("OwnSettings", (Defaults,), own)()
    assert [queue.name for queue in settings.CELERY_TASK_QUEUES] == ["own", "own.mail", "reports"]


def test_routes_of_the_service_keep_those_of_the_library(settings):
    app = CeleryApp("routes", set_as_current=False)
    app.conf.task_routes = {"ops.send_notification": {"queue": "own"}, "own.*": "own"}
    queue_of = {
        name: app.amqp.router.lookup_route(name)
        for name in ("ops.send_notification", "ops.send_digest_chunk", "own.task", "other")
    }
    assert queue_of == {
        "ops.send_notification": {"queue": "own"},
        "ops.send_digest_chunk": {"queue": "dummy.mail"},
        "own.task": {"queue": "own"},
        "other": None,
    }


@pytest.mark.django_db
class TestMessages:
    """Messages that no process consumes, of the schedule of an earlier service."""

    @pytest.fixture(autouse=True)
    def message(self, monkeypatch):
        interval = IntervalSchedule.objects.create(every=1, period="days")
        PeriodicTask.objects.create(
            name="old", task="ops.delete_records", interval=interval, queue="default"
        )
        counts = {"default": 3, "dummy": 5}
        monkeypatch.setattr(
            broker,
            "count_messages",
            lambda app, names, timeout: {n: counts.get(n, 0) for n in names},
        )
        monkeypatch.setattr(health, "count_messages", broker.count_messages)

    MESSAGE = "the queue default has 3 messages, but no process consumes it: add it to QUEUES or"

    def test_in_doctor(self):
        result = doctor.check_queue()
        assert (result.status, result.next) == ("error", "python manage.py check --deploy")
        assert result.message.startswith(self.MESSAGE)
        schedules = doctor.check_schedules().schedules
        assert "queue is read by no worker" in next(
            row["problem"] for row in schedules if row["name"] == "old"
        )

    def test_on_the_page(self, admin_client):
        page = admin_client.get(reverse("admin:ops_operations")).text
        assert f"T{self.MESSAGE[1:]}" in page

    def test_in_an_alert(self):
        assert self.MESSAGE in problems.find_queues({})["default"]

    def test_in_the_deep_readiness(self):
        assert "queues" in health.get_deep_checks()
        with pytest.raises(health.NotConsumed, match=re.escape(self.MESSAGE)):
            health.check_queues()

    def test_of_a_queue_that_is_consumed_again_are_no_problem(self, settings):
        use_workers(settings, worker={}, old={"queues": "default"})
        assert doctor.check_queue().status == "ok"
        assert problems.find_queues({}) == {}
        health.check_queues()
