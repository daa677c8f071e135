"""Messages that no Celery client sends: none ends a worker, and each leaves a trace."""

import base64
import json
from queue import Queue

import malformed
import pytest
from celery import current_app

from prodserver_ops.broker import envelopes
from prodserver_ops.core import headers
from prodserver_ops.worker import failed, messages
from prodserver_ops.worker.app import make_failed_queue

NAME = "test.malformed"
KINDS = malformed.make_kinds(NAME)


class FakeChannel:
    def decode_body(self, body, encoding):
        return base64.b64decode(body) if encoding == "base64" else body


def receive(kind):
    """Return a kind as a worker receives it."""
    payload = {
        "body": kind["body"],
        "content-type": kind["content_type"],
        "content-encoding": kind["content_encoding"],
        "headers": kind["headers"],
        "properties": {
            "body_encoding": "base64",
            "delivery_tag": "tag",
            "delivery_info": {"exchange": "", "routing_key": ""},
            **kind["properties"],
        },
    }
    message = envelopes.Message(payload, channel=FakeChannel())
    message.accept = {"application/json"}
    return message


def find_problem(name):
    return messages.find_problem(receive(KINDS[name]))


@pytest.mark.parametrize(
    "name",
    [
        "valid",
        "lang is null",
        "retries is zero",
        "argsrepr is nul",
        "ignore_result is true",
        "schedule is text",
        "queued_at is array",
        "body: args have a NUL",
        "body: args have a surrogate",
        "body: NaN",
        "body: embed is null",
        "body: protocol 1 in a body",
        "protocol 1: valid",
    ],
)
def test_message_of_a_task_is_accepted(name):
    assert find_problem(name) == ""


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("task is array", "invalid task"),
        ("task is null", "no task"),
        ("id is long", "invalid id"),
        ("id is newlines", "invalid id"),
        ("no id", "no id"),
        ("timelimit is an array of texts", "invalid timelimit"),
        ("timelimit is one number", "invalid timelimit"),
        ("timelimit is endless", "invalid timelimit"),
        ("eta is far", "invalid eta"),
        ("expires is date", "invalid expires"),
        ("retries is negative", "invalid retries"),
        ("retries is true", "invalid retries"),
        ("stamps is deep", "invalid stamps"),
        ("get is text", "invalid get"),
        ("_children is null", "invalid name"),
        ("headers is text", "invalid headers"),
        ("chord is text", "invalid chord"),
        ("body: object", "invalid body"),
        ("body: two items", "invalid body"),
        ("body: kwargs is an array", "invalid arguments"),
        ("body: embed has other keys", "invalid body"),
        ("callbacks in the body is array", "invalid callbacks"),
        ("chain in the body is array of an unknown type", "invalid chain"),
        ("property priority is text", "invalid priority"),
        ("protocol 1: task is an array", "invalid task"),
        ("protocol 1: timelimit is a text", "invalid timelimit"),
    ],
)
def test_other_message_is_refused_with_a_reason(name, problem):
    assert find_problem(name) == problem


@pytest.mark.parametrize("payload", [*malformed.ENVELOPES.values(), [[]], "\ud800", True])
def test_any_json_becomes_a_message(payload):
    message = envelopes.Message(payload, channel=FakeChannel())
    assert isinstance(message.headers, dict)
    assert isinstance(message.delivery_tag, str)
    assert isinstance(message.delivery_info, dict)


def test_other_json_is_the_body_of_the_message():
    message = envelopes.Message([1, "\ud800"], channel=FakeChannel())
    assert message.body == rb"[1, '\ud800']"
    assert envelopes.loads("[1") == "[1"
    assert envelopes.loads("[" * 200_000) == "[" * 200_000
    assert envelopes.loads("[1]") == [1]


def test_body_that_cannot_be_decoded_keeps_the_number_of_its_message():
    payload = malformed.ENVELOPES["body is not base64"]
    info = {**payload["properties"]["delivery_info"], "pgmq_msg_id": 7}
    payload = {**payload, "properties": {**payload["properties"], "delivery_info": info}}
    assert envelopes.Message(payload, channel=FakeChannel()).delivery_info["pgmq_msg_id"] == 7


@pytest.mark.parametrize("value", [None, True, 0, -1, 2**31, 1.5, "1", [1]])
def test_forged_number_is_no_number(value):
    assert headers.get_integer({"schedule": value}, "schedule") is None
    assert headers.get_integer({"schedule": 7}, "schedule") == 7


@pytest.mark.parametrize("value", [None, 5, "", "2026-13-01", "2026-01-01T00:00", ["x"]])
def test_forged_time_is_no_time(value):
    assert headers.get_time(value) is None
    assert headers.get_time("2026-01-01T00:00:00+00:00").year == 2026


@pytest.fixture
def done(monkeypatch):
    """Register the task; return the queue of the ids of its runs."""
    done = Queue()

    @current_app.task(name=NAME, bind=True, shared=False)
    def note(self, *args, **kwargs):
        done.put(self.request.id)

    monkeypatch.setattr(failed, "UNKNOWN_SECONDS", 0)
    monkeypatch.setattr(failed, "HOLD_SECONDS", 0)
    yield done
    current_app.tasks.pop(NAME, None)


def take_failed():
    """Return the headers of the failed tasks, and remove them."""
    taken = []
    with current_app.connection_for_read() as connection:
        bound = make_failed_queue(current_app)(connection.default_channel)
        bound.declare()
        while (message := bound.get(no_ack=True)) is not None:
            taken.append(message.headers)
    return taken


@pytest.mark.django_db(transaction=True, serialized_rollback=True)
def test_every_kind_ends_in_a_task_or_in_the_queue_of_failed_tasks(done, run_worker, caplog):
    own = current_app.amqp.queues[current_app.conf.task_default_queue]
    take_failed()
    with current_app.connection_for_write() as connection:
        channel = connection.default_channel
        own(channel).declare()
        for kind in KINDS.values():
            properties = dict(kind["properties"])
            message = channel.prepare_message(
                base64.b64decode(kind["body"]),
                properties.pop("priority", None),
                kind["content_type"],
                kind["content_encoding"],
                kind["headers"],
                properties,
            )
            channel.basic_publish(message, own.exchange.name, own.routing_key)
    ran = []
    with run_worker():
        current_app.tasks[NAME].apply_async(task_id="last")
        while "last" not in ran:
            ran.append(done.get(timeout=60))
    given_up = json.dumps(take_failed())
    for name, kind in KINDS.items():
        task_id = kind["headers"].get("id")
        if isinstance(task_id, str) and task_id.startswith("kind-"):
            assert task_id in ran or f'"{task_id}"' in given_up or f"'{task_id}'" in given_up, name
    assert len(ran) > 100
    assert caplog.text.count("A message is given up") > 100
