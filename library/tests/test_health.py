"""Health checks: available over HTTP under any host name, without secrets."""

import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from threading import Barrier, Event
from unittest.mock import Mock

import pytest
from django.db import OperationalError, connection, connections
from django.http import HttpResponse
from django.test import Client, RequestFactory

from prodserver_ops.web import health


@pytest.fixture(autouse=True)
def _close_databases_in_memory(monkeypatch):
    """Close the connections of check threads; Django keeps databases in memory open."""

    def close_all():
        for each in connections.all(initialized_only=True):
            if each.connection is not None:
                each.connection.close()
                each.connection = None

    monkeypatch.setattr(connections, "close_all", close_all)


@pytest.fixture
def fail(monkeypatch):
    """Return a function that makes a readiness check fail."""

    def fail(name):
        def check():
            raise ConnectionError("broker://guest:hunter2@broker refused the connection")

        monkeypatch.setitem(health.CHECKS, name, check)

    return fail


def test_live_works_without_a_database(client):
    response = client.get("/health/live")
    assert (response.status_code, response.json()) == (200, {"status": "ok"})


@pytest.mark.django_db
def test_ready_if_database_and_broker_are_available(client):
    response = client.get("/health/ready")
    assert response.status_code == 200
    assert response.json() == {"status": "ok", "checks": {"database": "ok", "broker": "ok"}}


@pytest.mark.django_db
@pytest.mark.parametrize("name", ["database", "broker"])
def test_not_ready_names_the_failed_check_and_no_secret(client, caplog, fail, name):
    fail(name)
    response = client.get("/health/ready")
    assert response.status_code == 503
    assert response.json() == {
        "status": "unavailable",
        "checks": {"database": "ok", "broker": "ok"} | {name: "unavailable"},
    }
    assert "hunter2" not in response.text + caplog.text


@pytest.mark.parametrize(("alive", "status"), [(True, 200), (False, 503)])
def test_deep_check_requires_heartbeats(client, monkeypatch, alive, status):
    monkeypatch.setattr(health, "CHECKS", {"database": lambda: None, "broker": lambda: None})
    monkeypatch.setattr(health, "check_queues", lambda: None)
    monkeypatch.setattr(health, "check_writes", lambda: None)
    monkeypatch.setattr(health.heartbeats, "is_alive", lambda process: alive or process == "beat")
    response = client.get("/health/ready?deep")
    assert response.status_code == status
    workers = dict.fromkeys(health.heartbeats.get_workers(), "ok" if alive else "unavailable")
    others = dict.fromkeys(("database", "broker", "writes", "beat", "queues"), "ok")
    assert response.json()["checks"] == workers | others
    assert "worker" in workers


def test_a_check_that_hangs_is_unavailable_and_not_started_again(client, monkeypatch):
    started, end = [], Event()

    def hang():
        started.append(True)
        end.wait()

    monkeypatch.setattr(health, "READY_TIMEOUT", 0.1)
    monkeypatch.setattr(health, "MAX_AGE", 0)
    monkeypatch.setattr(health, "CHECKS", {"database": hang, "broker": lambda: None})
    for _ in range(3):
        response = client.get("/health/ready")
        assert response.json()["checks"] == {"database": "unavailable", "broker": "ok"}
    assert len(started) == 1
    end.set()


@pytest.mark.parametrize("path", ["/health/live", "/health/ready"])
@pytest.mark.django_db
def test_responds_over_http_under_any_host(client, settings, path):
    settings.SECURE_SSL_REDIRECT = True
    assert client.get(path, headers={"host": "172.17.0.2:5000"}).status_code == 200


@pytest.mark.parametrize("query", ["", "?deep"])
def test_requests_at_the_same_time_get_the_result_of_one_check(client, monkeypatch, query):
    started, end = [], Event()

    def check():
        started.append(True)
        end.wait(10)

    monkeypatch.setattr(health, "CHECKS", {"database": check})
    monkeypatch.setattr(health, "get_deep_checks", lambda: health.CHECKS)
    client.get("/health/live")  # Load the middleware.
    with ThreadPoolExecutor(8) as pool:
        responses = [pool.submit(client.get, f"/health/ready{query}") for _ in range(8)]
        while not started:
            time.sleep(0.01)
        end.set()
        assert [response.result().status_code for response in responses] == [200] * 8
    assert len(started) == 1


def test_result_is_used_for_a_second(client, monkeypatch):
    started = []
    now = [100.0]
    monkeypatch.setattr(health, "time", Mock(monotonic=lambda: now[0]))
    monkeypatch.setattr(health, "CHECKS", {"database": lambda: started.append(True)})
    for now[0] in (100, 100.5, 100.99, 101, 101.5, 102):
        assert client.get("/health/ready").status_code == 200
    assert len(started) == 3


def test_a_problem_is_logged_when_it_begins_and_when_it_ends(client, monkeypatch, caplog):
    monkeypatch.setattr(health, "MAX_AGE", 0)
    caplog.set_level("INFO")
    for check in (lambda: None, lambda: 1 / 0, lambda: None):
        monkeypatch.setattr(health, "CHECKS", {"database": check})
        for _ in range(3):
            client.get("/health/ready")
    records = [(each.levelname, each.message) for each in caplog.records if each.name != "httpx"]
    assert [record for record in records if "health" not in record[1]] == [
        ("ERROR", "database is unavailable: ZeroDivisionError"),
        ("INFO", "database is available again"),
    ]
    assert not [record for record in records if record[0] != "INFO"][1:]


@pytest.mark.parametrize("method", ["head", "options", "post"])
def test_every_method_gets_the_same_response(client, monkeypatch, method):
    monkeypatch.setattr(health, "CHECKS", {"database": lambda: None})
    assert getattr(client, method)("/health/ready").status_code == 200
    monkeypatch.setattr(health, "CHECKS", {"database": lambda: 1 / 0})
    assert getattr(Client(), method)("/health/ready").status_code == 503


@pytest.mark.django_db
def test_database_can_be_written():
    health.check_writes()


@pytest.mark.django_db(transaction=True, serialized_rollback=True)
def test_read_only_database_is_an_error():
    on, off = {
        "postgresql": ("SET default_transaction_read_only = on", "RESET ALL"),
        "sqlite": ("PRAGMA query_only = 1", "PRAGMA query_only = 0"),
    }[connection.vendor]
    with connection.cursor() as cursor:
        cursor.execute(on)
        with pytest.raises(OperationalError):
            health.check_writes()
        cursor.execute(off)


@pytest.mark.django_db
def test_not_ready_if_no_request_gets_through(client, settings, monkeypatch):
    settings.WEB_THREADS = 2
    monkeypatch.setattr(health, "STUCK", 0)
    monkeypatch.setattr(health, "MAX_AGE", 0)
    release, busy = Event(), Barrier(3)

    def respond(request):
        busy.wait(10)
        assert release.wait(10)
        return HttpResponse()

    middleware = health.HealthMiddleware(respond)

    def send():
        with closing(middleware(RequestFactory().get("/"))):
            busy.wait(10)  # A thread is busy until the response is sent.

    with ThreadPoolExecutor(2) as threads:
        sent = [threads.submit(send) for _ in range(2)]
        busy.wait(10)
        assert client.get("/health/ready").json()["checks"]["requests"] == "unavailable"
        release.set()
        while busy.n_waiting < 2:
            time.sleep(0.01)
        assert client.get("/health/ready").status_code == 503
        busy.wait(10)
        for each in sent:
            each.result()
    assert client.get("/health/ready").status_code == 200
