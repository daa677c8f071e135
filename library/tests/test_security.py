"""Security: the headers of all responses, pages without inline code, terse error pages."""

import re
from html.parser import HTMLParser

import pytest
from django.contrib.staticfiles import finders
from django.core.files.uploadedfile import SimpleUploadedFile
from django.test import Client
from django.urls import reverse

from prodserver_ops.mail import unsubscribe
from prodserver_ops.mail.digests import Message, registry

SECRET = "hunter2"

pytestmark = pytest.mark.django_db


class InlineCode(HTMLParser):
    """Collects what the content security policy forbids: inline scripts and styles."""

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


class Sample(Message):
    name = "ops-test"
    unsubscribe_label = "sample news"


@pytest.fixture
def responses(client, make_user, monkeypatch):
    """All kinds of responses of the library, by name."""
    monkeypatch.setitem(registry, Sample.name, Sample())
    strict = Client(enforce_csrf_checks=True)
    login = reverse("admin:login")
    responses = {
        "login": client.get(login),
        "failed login": client.post(login, {"username": "x", "password": "y"}),
        "expired form": strict.post(login, {}),
    }
    admin = make_user("admin", is_superuser=True, is_staff=True)
    client.force_login(admin)
    urls = {
        "admin": reverse("admin:index"),
        "schedules": reverse("admin:django_celery_beat_periodictask_changelist"),
        "new schedule": reverse("admin:django_celery_beat_periodictask_add"),
        "deliveries": reverse("admin:ops_digestdelivery_changelist"),
        "password": reverse("admin:password_change"),
        "unsubscribe": unsubscribe.link(admin, Sample()),
        "not found": "/no/such/page",
    }
    return responses | {name: client.get(url) for name, url in urls.items()}


def test_all_responses_have_security_headers(responses):
    for name, response in responses.items():
        policy = response.headers["Content-Security-Policy"]
        assert "default-src 'self'" in policy, name
        assert "unsafe" not in policy, name
        assert response.headers["Referrer-Policy"] == "same-origin"
        assert response.headers["X-Content-Type-Options"] == "nosniff"
        assert response.headers["X-Frame-Options"] == "DENY"


def test_pages_have_no_inline_scripts_or_styles(responses):
    assert {name: response.status_code for name, response in responses.items()} == dict.fromkeys(
        responses, 200
    ) | {"expired form": 403, "not found": 404}
    for name, response in responses.items():
        assert InlineCode(response.text).found == [], name


def test_scripts_and_styles_of_pages_exist(responses, settings):
    for name, response in responses.items():
        for path in re.findall(rf'(?:src|href)="{settings.STATIC_URL}([^"]+)"', response.text):
            assert finders.find(path), f"{name}: {path}"


class TestErrorPage:
    @pytest.fixture
    def get(self, monkeypatch, settings):
        """Return a function that requests a view whose local variables contain a secret."""
        settings.CELERY_BROKER_URL = f"broker://user:{SECRET}@mq.example.com//"
        monkeypatch.setitem(settings.DATABASES["default"], "PASSWORD", SECRET)

        def fail(token):
            broker = settings.CELERY_BROKER_URL
            raise RuntimeError("broken", len(broker))

        monkeypatch.setattr(unsubscribe.signer, "unsign", fail)
        environment = {"DATABASE_URL": f"postgres://user:{SECRET}@db/name"}
        client = Client(raise_request_exception=False, **environment)
        path = reverse("unsubscribe", args=["token"])
        return lambda **headers: client.get(path, headers=headers)

    def test_of_a_failed_view_says_nothing(self, get):
        response = get()
        assert response.status_code == 500
        assert len(response.text) < 200
        assert SECRET not in response.text

    def test_for_an_unknown_host_says_nothing(self, get):
        response = get(host="evil.example.com")
        assert response.status_code == 400
        assert len(response.text) < 200
        assert SECRET not in response.text


def test_admin_path_is_a_setting(settings):
    assert reverse("admin:index") == f"/{settings.ADMIN_PATH}"


def test_messages_are_json_only(settings):
    assert settings.CELERY_ACCEPT_CONTENT == ["json"]


@pytest.mark.parametrize("mode", ["host", "size"])
def test_a_rejected_request_is_one_line(client, caplog, settings, mode):
    if mode == "host":
        response = client.get("/", headers={"host": "evil.example"})
    else:
        settings.DATA_UPLOAD_MAX_MEMORY_SIZE = 10
        response = client.post(reverse("admin:login"), {"username": "x" * 100})
    assert response.status_code in (400, 413)
    (record,) = [record for record in caplog.records if record.name.startswith("django.security")]
    assert (record.levelname, record.exc_info) == ("WARNING", None)


def test_uploads_are_limited(client, settings):
    settings.UPLOAD_MAX_SIZE = 1000
    file = SimpleUploadedFile("x.txt", b"x" * 2000)
    response = client.post(reverse("admin:login"), {"file": file})
    assert response.status_code in (400, 413)
    small = SimpleUploadedFile("x.txt", b"x" * 100)
    assert client.post(reverse("admin:login"), {"file": small}).status_code == 200
