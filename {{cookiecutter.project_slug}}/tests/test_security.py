"""Security: what browsers are told, and what error pages keep to themselves."""

import re
from html.parser import HTMLParser

import pytest
from django.test import Client
from django.urls import reverse

from {{ cookiecutter.project_slug }} import unsubscribe

SECRET = "hunter2"

pytestmark = pytest.mark.django_db


class Inline(HTMLParser):
    """Collects what a content security policy forbids: code and style within a page."""

    def __init__(self, page):
        super().__init__()
        self.found = []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        data = attributes.get("type") == "application/json"
        if (tag == "script" and "src" not in attributes and not data) or tag == "style":
            self.found.append(tag)
        self.found += [name for name in attributes if name == "style" or name.startswith("on")]


@pytest.fixture
def pages(client, superuser, make_submission):
    """Get pages of every kind, by their names."""
    submission = make_submission()
    answer = {"action": "answer", "_selected_action": [submission.pk]}
    strict = Client(enforce_csrf_checks=True)

    pages = {
        "login": client.get(reverse("admin:login")),
        "wrong login": client.post(reverse("admin:login"), {"username": "x", "password": "y"}),
        "form out of date": strict.post(reverse("admin:login"), {}),
    }
    client.force_login(superuser)
    pages |= {
        "home": client.get("/"),
        "admin": client.get(reverse("admin:index")),
        "docs": client.get(reverse("docs")),
        "not found": client.get("/no/such/page"),
        "schedules": client.get(reverse("admin:django_celery_beat_periodictask_changelist")),
        "schedule": client.get(reverse("admin:django_celery_beat_periodictask_add")),
        "password": client.get(reverse("admin:password_change")),
        "submission": client.get(submission.get_admin_url()),
        "answer": client.post(re.sub(r"\d+/change/$", "", submission.get_admin_url()), answer),
        "unsubscribe": client.get(unsubscribe.link(superuser, "digest")),
    }
    return pages


def test_every_answer_has_the_headers_that_bind_a_browser(pages):
    for name, response in pages.items():
        policy = response.headers["Content-Security-Policy"]
        assert "default-src 'self'" in policy, name
        assert "unsafe" not in policy, name
        assert response.headers["Permissions-Policy"].startswith("camera=(), ")
        assert response.headers["Referrer-Policy"] == "same-origin"
        assert response.headers["X-Content-Type-Options"] == "nosniff"
        assert response.headers["X-Frame-Options"] == "DENY"


def test_no_page_has_code_or_style_within(pages):
    assert {name: response.status_code for name, response in pages.items()} == dict.fromkeys(
        pages, 200
    ) | {"form out of date": 403, "not found": 404}
    for name, response in pages.items():
        assert Inline(response.text).found == [], name


class TestAnErrorPage:
    @pytest.fixture
    def page(self, monkeypatch, settings):
        """Make a request whose view fails where it knows the broker; return the page."""
        settings.CELERY_BROKER_URL = f"amqp://user:{SECRET}@mq.example.com//"
        monkeypatch.setitem(settings.DATABASES["default"], "PASSWORD", SECRET)

        def fail(token):
            broker = settings.CELERY_BROKER_URL
            database_url = {"password": SECRET}
            raise RuntimeError("broken", len(broker), len(database_url))

        monkeypatch.setattr(unsubscribe.signer, "unsign", fail)
        environment = {"DATABASE_URL": f"postgres://user:{SECRET}@db/name"}
        client = Client(raise_request_exception=False, **environment)
        return lambda **headers: client.get("/unsubscribe/token/", **headers)

    def test_in_production_tells_nothing(self, page):
        response = page()
        assert response.status_code == 500
        assert len(response.text) < 200

    @pytest.mark.parametrize("accept", ["text/html", "text/plain"])
    def test_in_development_tells_all_but_secrets(self, page, settings, accept):
        settings.DEBUG = True
        response = page(headers={"Accept": accept})
        assert response.status_code == 500
        assert "RuntimeError" in response.text
        assert SECRET not in response.text

    @pytest.mark.parametrize("debug", [True, False])
    def test_for_a_foreign_host_tells_no_secret(self, page, settings, debug):
        settings.DEBUG = debug
        response = page(headers={"Host": "evil.example.com"})
        assert response.status_code == 400
        assert SECRET not in response.text


def test_the_admin_is_where_the_settings_say(settings):
    assert reverse("admin:index") == f"/{settings.ADMIN_PATH}"


def test_messages_that_run_code_are_refused(settings):
    assert settings.CELERY_ACCEPT_CONTENT == ["json"]
