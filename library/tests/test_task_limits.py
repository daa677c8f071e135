"""A task whose time limit is longer than what RabbitMQ or a deploy allows is reported."""

import math

import celery
import pytest
from celery import current_app
from celery.app import annotations
from django.conf import settings as django_settings

from prodserver_ops.console import task_limits
from prodserver_ops.console.checks import check_classes_of_tasks, check_time_limits

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


@pytest.fixture
def make_task():
    """A function that registers a task with options."""

    def make(**options):
        @current_app.task(name="tests.limited", shared=False, **options)
        def limited(*args):
            pass

        return limited

    yield make
    current_app.tasks.pop("tests.limited", None)


@pytest.fixture
def sent(monkeypatch):
    """The options of the messages that Celery was asked to send."""
    sent = []
    monkeypatch.setattr(celery.Celery, "send_task", lambda self, *args, **given: sent.append(given))
    return sent


def get_limits(given):
    return given.get("time_limit"), given.get("soft_time_limit")


@pytest.mark.parametrize(
    ("options", "limits"),
    [
        ({}, (300, 240)),
        ({"time_limit": 100}, (100, 80)),
        ({"time_limit": 0.5}, (0.5, 0.4)),
        ({"time_limit": 3600}, (3600, 3540)),
        ({"soft_time_limit": 100}, (300, 100)),
        ({"soft_time_limit": 900}, (960, 900)),
        ({"time_limit": 3600, "soft_time_limit": 240}, (3600, 240)),
    ],
)
def test_limit_that_is_missing_follows_the_other_one(make_task, sent, options, limits):
    task = make_task(**options)
    assert (task.time_limit, task.soft_time_limit) == limits
    task.delay()
    assert check_time_limits() == []
    current_app.tasks.pop("tests.limited")
    make_task().apply_async(**options)
    assert [get_limits(given) for given in sent] == [limits, limits]


def test_limits_of_annotations(make_task, sent, monkeypatch):
    found = annotations.prepare({"tests.limited": {"time_limit": 100}})
    monkeypatch.setattr(current_app, "annotations", found)
    make_task().delay()
    assert [get_limits(given) for given in sent] == [(100, 80)]


def test_limits_of_a_task_that_is_queued_by_name(sent):
    current_app.send_task("tests.of_another_service", time_limit=100)
    current_app.send_task("tests.of_another_service")
    assert [get_limits(given) for given in sent] == [(100, 80), (None, None)]


def test_limit_of_a_retry(make_task, sent):
    task = make_task(bind=True)
    request = {"id": "a", "args": [], "kwargs": {}, "timelimit": [300, 240]}
    task.request_stack.push(celery.app.task.Context(request, called_directly=False))
    try:
        with pytest.raises(celery.exceptions.Retry):
            task.retry(time_limit=100, countdown=0)
    finally:
        task.request_stack.pop()
    assert [get_limits(given) for given in sent] == [(100, 80)]


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"time_limit": 0}, "time_limit must be a positive number of seconds, not 0"),
        ({"time_limit": -5}, "time_limit must be a positive number of seconds, not -5"),
        ({"time_limit": "100"}, "time_limit must be a positive number of seconds, not '100'"),
        ({"time_limit": math.inf}, "time_limit must be a positive number of seconds, not inf"),
        (
            {"soft_time_limit": True},
            "soft_time_limit must be a positive number of seconds, not True",
        ),
        (
            {"time_limit": 100, "soft_time_limit": 200},
            "soft_time_limit is 200 s, which is longer than time_limit, 100 s",
        ),
    ],
)
def test_limits_that_cannot_hold_are_refused(make_task, sent, options, problem):
    with pytest.raises(ValueError, match=f"^{problem}$"):
        make_task().apply_async(**options)
    with pytest.raises(ValueError, match=f"^{problem}$"):
        current_app.send_task("tests.of_another_service", **options)
    current_app.tasks.pop("tests.limited")
    make_task(**options)
    messages = [message.msg for message in check_time_limits()]
    assert messages == [f"The task tests.limited: {problem}."]
    assert sent == []


def test_options_of_a_worker_that_have_no_effect(settings):
    worker = settings.PRODUCTION_PROCESSES["worker"]
    processes = {"worker": {**worker, "ARGS": {**worker["ARGS"], "time-limit": 100}}}
    settings.PRODUCTION_PROCESSES = processes
    (message,) = check_time_limits()
    assert message.msg.startswith("The argument time-limit of the process worker has no effect")
