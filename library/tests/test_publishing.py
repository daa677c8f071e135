"""Publishing: a request waits at most a second, even if the broker does not respond."""

import time
from threading import Event

import pytest
from django.http import HttpResponse
from django.urls import path
from kombu.exceptions import OperationalError

from prodserver_ops.broker import publishing
from prodserver_ops.broker.publishing import publish, try_to_publish


@pytest.fixture
def end():
    """An event that ends functions that hang."""
    event = Event()
    yield event
    event.set()


@pytest.fixture(autouse=True)
def publisher(monkeypatch):
    """A separate publisher thread for each test."""
    monkeypatch.setattr(publishing, "publisher", publishing.Publisher())
    return publishing.publisher


@pytest.fixture
def in_request(monkeypatch):
    """Run the test as a request of half a second."""
    monkeypatch.setattr(publishing, "REQUEST_TIMEOUT", 0.5)
    publishing.start_request()
    yield
    publishing.finish_request()


def fail():
    raise ConnectionRefusedError("refused")


def test_outside_a_request_nothing_is_limited(publisher):
    assert publish(lambda: "done") == "done"
    with pytest.raises(ConnectionRefusedError):
        publish(fail)
    assert publisher.thread is None


def test_a_request_gets_result_and_error(in_request, publisher):
    assert publish(lambda: "done") == "done"
    with pytest.raises(ConnectionRefusedError):
        publish(fail)
    assert publisher.thread is not None


def test_a_request_waits_once_for_all_its_messages(in_request, end, caplog):
    published = []
    start = time.monotonic()
    for number in range(50):
        try_to_publish("x", lambda number=number: (end.wait(), published.append(number)))
    with pytest.raises(OperationalError, match="does not respond"):
        publish(end.wait)
    assert 0.4 < time.monotonic() - start < 10  # Each alone would take 25 seconds.
    assert "x is not queued yet: the broker does not respond" in caplog.text
    end.set()
    publishing.publisher.flush(5)
    assert published == list(range(50))


def test_an_error_of_the_broker_is_one_line(in_request, caplog):
    try_to_publish("x", fail)
    (record,) = caplog.records
    assert (record.getMessage(), record.exc_info) == ("x is not queued: refused", None)


def test_the_number_of_waiting_messages_is_limited(in_request, end, monkeypatch, caplog):
    monkeypatch.setattr(publishing, "MAX_WAITING", 2)
    monkeypatch.setattr(publishing, "publisher", publishing.Publisher())
    for _ in range(5):
        try_to_publish("x", end.wait)
    assert "x is not queued yet: 2 messages are already waiting" in caplog.text


def test_a_process_that_ends_waits_for_a_moment(in_request, end, publisher):
    try_to_publish("x", end.wait)
    start = time.monotonic()
    publisher.flush(0.3)
    assert 0.2 < time.monotonic() - start < 10


def view(request):
    return HttpResponse(str(publishing.request.left))


urlpatterns = [path("", view)]


def test_each_request_counts_for_itself(client, settings):
    settings.ROOT_URLCONF = __name__
    publishing.request.left = 0
    assert client.get("/").text == str(publishing.REQUEST_TIMEOUT)
    assert publishing.request.left is None
