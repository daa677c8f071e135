"""Health checks: available over HTTP under any host name, without secrets."""

from threading import Event

import pytest
from django.db import connections

from prodserver_ops.web import health


@pytest.fixture(autouse=True)
def _close_databases_in_memory(monkeypatch):
    """Close the connections of check threads; Django keeps databases in memory open."""

    def close_all():
        for connection in connections.all(initialized_only=True):
            if connection.connection is not None:
                connection.connection.close()
                connection.connection = None

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
    monkeypatch.setattr(health.heartbeats, "is_alive", lambda process: alive or process == "beat")
    response = client.get("/health/ready?deep")
    assert response.status_code == status
    workers = dict.fromkeys(health.heartbeats.get_workers(), "ok" if alive else "unavailable")
    others = dict.fromkeys(("database", "broker", "beat", "queues"), "ok")
    assert response.json()["checks"] == workers | others
    assert "worker" in workers


def test_a_check_that_hangs_is_unavailable_and_not_started_again(client, monkeypatch):
    started, end = [], Event()

    def hang():
        started.append(True)
        end.wait()

    monkeypatch.setattr(health, "READY_TIMEOUT", 0.1)
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
