"""A service below a path of its host: links, health checks and their log."""

import logging
from unittest.mock import Mock

import pytest
from asgiref.sync import async_to_sync
from django.test import AsyncClient, Client
from django.urls import get_script_prefix, reverse, set_script_prefix

from prodserver_ops.core.urls import get_path, make_absolute
from prodserver_ops.web import gunicorn_worker, health


@pytest.fixture(autouse=True)
def checks(monkeypatch):
    monkeypatch.setattr(health, "CHECKS", {"database": lambda: None})


@pytest.fixture
def prefix():
    """Set the prefix of ``reverse()``, as a request and ``django.setup()`` do."""
    before = get_script_prefix()
    yield set_script_prefix
    set_script_prefix(before)


@pytest.mark.parametrize("site_url", ["https://example.com", "https://example.com/app"])
@pytest.mark.parametrize("script_prefix", ["/", "/app/"])
def test_links_have_the_prefix_once(settings, prefix, site_url, script_prefix):
    settings.SITE_URL, settings.FORCE_SCRIPT_NAME = site_url, "/app"
    prefix(script_prefix)
    link = make_absolute(reverse("admin:index"))
    assert link == "https://example.com/app/admin/"


def test_links_of_a_service_at_the_root(settings):
    settings.SITE_URL = "https://example.com"
    assert make_absolute("/admin/") == "https://example.com/admin/"
    assert get_path("/health/live") == "/health/live"


@pytest.mark.parametrize("path", ["/health/live", "/health/ready"])
@pytest.mark.parametrize("sent", ["", "/app"])
class TestHealth:
    """Some proxies remove the prefix, and probes of a platform do not send it."""

    @pytest.fixture(autouse=True)
    def script_name(self, settings):
        settings.FORCE_SCRIPT_NAME = "/app"

    def test_responds(self, path, sent, caplog):
        caplog.set_level(logging.INFO)
        assert Client().get(f"{sent}{path}").status_code == 200
        assert "GET" not in caplog.text

    def test_responds_in_asgi(self, path, sent):
        get = async_to_sync(AsyncClient().get)
        assert get(f"{sent}{path}").status_code == 200

    @pytest.mark.parametrize("method", ["GET", "HEAD", "OPTIONS"])
    def test_has_its_own_thread_in_gunicorn(self, path, sent, method):
        start = f"{method} {sent}{path} HTTP/1.1\r\n"
        pattern = gunicorn_worker.make_pattern()
        match = pattern.match(f"{start}Host: a\r\n\r\n".encode())
        assert match["path"] == path.encode()
        assert not pattern.match(f"{start}Host: a\r\n".encode())
        assert not pattern.match(f"{method} {sent}{path}s HTTP/1.1\r\n\r\n".encode())


@pytest.mark.parametrize("header", ["Content-Length: 9", "transfer-encoding: chunked"])
def test_body_that_does_not_arrive_does_not_block_health_checks_in_gunicorn(header):
    worker = Mock(health_check=gunicorn_worker.make_pattern(), health_pools={"/health/live": "own"})
    for sent, pool in (("Host: a", "own"), (header, worker.tpool)):
        request = f"GET /health/live HTTP/1.1\r\n{sent}\r\n\r\n".encode()
        connection = Mock(**{"sock.recv.return_value": request})
        assert gunicorn_worker.HealthWorker.get_pool(worker, connection) is pool
