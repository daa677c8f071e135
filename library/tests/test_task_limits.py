"""A task whose time limit is longer than what RabbitMQ or a deploy allows is reported."""

import math

import celery
import pytest
from celery import current_app
from django.conf import settings as django_settings

from prodserver_ops.console import task_limits
from prodserver_ops.console.checks import check_classes_of_tasks

COMPOSE = """
services:
  worker:
    # Longer than the time limit of tasks, CELERY_TASK_TIME_LIMIT.
    stop_grace_period: 310s
  worker_high:
    stop_grace_period: 1000s
"""


@pytest.fixture
def folder(settings, tmp_path):
    settings.BASE_DIR = tmp_path
    settings.CELERY_BROKER_URL = "amqp://mq.example.com"
    return tmp_path


@pytest.fixture
def limit():
    """A function that registers a task with a time limit."""

    def limit(seconds):
        @current_app.task(name="tests.long", shared=False, time_limit=seconds)
        def long():
            pass

    yield limit
    current_app.tasks.pop("tests.long", None)


def find():
    return [message.id for message in task_limits.find_messages()]


def test_tasks_whose_body_would_not_run_or_with_another_class_are_reported():
    @current_app.task(name="tests.async", shared=False)
    async def waits():
        pass

    @current_app.task(name="tests.generator", shared=False, bind=True)
    def yields(self):
        yield 1

    @current_app.task(name="tests.plain", shared=False, base=celery.Task)
    def plain():
        pass

    try:
        messages = check_classes_of_tasks()
    finally:
        for name in ("tests.async", "tests.generator", "tests.plain"):
            current_app.tasks.pop(name)
    assert [message.msg.partition(":")[0] for message in messages] == [
        "The task tests.async is async",
        "The task tests.generator is a generator",
        "The class of the task tests.plain is not a subclass of prodserver_ops's",
    ]
    assert check_classes_of_tasks() == []


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("310", 310),
        ("310s", 310),
        ("'5m10s' # longer than the limit", 310),
        ("1h0m0.5s", 3600.5),
        ("5min 10s", 310),
        ("1hr", 3600),
        ("infinity", math.inf),
        ("5 fortnights", math.inf),
        ("", math.inf),
    ],
)
def test_durations_of_compose_and_systemd(text, seconds):
    assert task_limits.parse_duration(text) == seconds


def test_only_workers_of_compose_count(folder):
    web = "services:\n  web:\n    stop_grace_period: 30s\n"
    (folder / "compose.yaml").write_text(web)
    assert find() == []
    worker = (
        "  worker:\n    init: true\n\n    environment:\n      A: b\n    stop_grace_period: 2m\n"
    )
    (folder / "compose.yaml").write_text(web + worker)
    (message,) = task_limits.find_messages()
    assert "compose.yaml lets a worker that stops take only 120 s" in message.msg


def test_usual_limits_fit(folder):
    (folder / "compose.yaml").write_text(COMPOSE)
    (folder / "shop-worker.service").write_text("[Service]\nTimeoutStopSec=310\n")
    assert task_limits.get_longest()[0] == django_settings.CELERY_TASK_TIME_LIMIT
    assert find() == []


def test_task_that_takes_longer_than_rabbitmq_allows(folder, limit, settings):
    limit(3600)
    (message,) = task_limits.find_messages()
    assert message.msg.startswith("The task tests.long may take 3600 s, but RabbitMQ ends it after")
    settings.RABBITMQ_CONSUMER_TIMEOUT = 7200
    assert find() == []
    settings.RABBITMQ_CONSUMER_TIMEOUT = 1800
    settings.CELERY_BROKER_URL = "redis://redis.example.com"
    assert find() == []


def test_task_that_takes_longer_than_a_worker_may_take_to_stop(folder, limit):
    (folder / "compose.yaml").write_text(COMPOSE)
    for name in ("web", "worker", "worker-high"):
        (folder / f"shop-{name}.service").write_text("[Service]\nTimeoutStopSec=310\n")
    limit(900)
    messages = task_limits.find_messages()
    assert [message.id for message in messages] == ["tasks.W002"] * 3
    assert "compose.yaml lets a worker that stops take only 310 s" in messages[0].msg
    assert {message.hint for message in messages} == {"Raise it to 910 s."}
