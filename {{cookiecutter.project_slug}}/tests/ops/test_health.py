"""Health checks: available over HTTP under any host name, without secrets."""

import pytest

from {{ cookiecutter.project_slug }}.ops import health


@pytest.fixture
def fail(monkeypatch):
    """Return a function that makes a readiness check fail."""

    def fail(name):
        def check():
            raise ConnectionError("amqp://guest:hunter2@broker refused the connection")

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


@pytest.mark.parametrize("path", ["/health/live", "/health/ready"])
@pytest.mark.django_db
def test_responds_over_http_under_any_host(client, settings, path):
    settings.SECURE_SSL_REDIRECT = True
    assert client.get(path, headers={"host": "172.17.0.2:5000"}).status_code == 200
