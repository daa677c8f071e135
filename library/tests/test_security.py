"""Security: the headers of all responses, pages without inline code, terse error pages."""

import re
from html.parser import HTMLParser

import pytest
from django.contrib.staticfiles import finders
from django.core.files.storage import InMemoryStorage
from django.core.files.uploadedfile import SimpleUploadedFile
from django.db import models
from django.http import HttpResponse
from django.test import Client
from django.test.utils import isolate_apps
from django.urls import path, reverse
from django.utils.decorators import method_decorator
from django.views import View
from django.views.decorators.csrf import csrf_exempt

from prodserver_ops.console import checks
from prodserver_ops.console.checks import check_media
from prodserver_ops.mail import unsubscribe
from prodserver_ops.mail.digests import Message, registry
from prodserver_ops.web.uploads import limit_upload

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
        for file in re.findall(rf'(?:src|href)="{settings.STATIC_URL}([^"]+)"', response.text):
            assert finders.find(file), f"{name}: {file}"


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
        assert "broken" not in response.text
        assert "RuntimeError" not in response.text
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


class TestUploads:
    """Files of a request, in views of this module."""

    @pytest.fixture(autouse=True)
    def urls(self, settings):
        settings.ROOT_URLCONF, settings.UPLOAD_MAX_SIZE = __name__, 1000

    @pytest.fixture
    def upload(self):
        """Return a function that uploads a file of this size; it returns the response."""

        def upload(path, size, **options):
            data = {"file": SimpleUploadedFile("x.txt", b"x" * size)}
            return Client(enforce_csrf_checks=True, **options).post(path, data)

        return upload

    def test_small_one_is_accepted(self, upload):
        assert upload("/default/", 100).text == "100"

    @pytest.mark.parametrize("path", ["/default/", "/checked/"])
    def test_large_one_is_a_413_with_a_message(self, upload, path):
        response = upload(path, 2000)
        assert (response.status_code, response["Content-Type"]) == (
            413,
            "text/plain; charset=utf-8",
        )
        assert response.text == "The upload has 2.1 kB; at most 1.0 kB are accepted."

    def test_message_may_be_json(self, upload):
        response = upload("/default/", 2 * 2**20, headers={"accept": "application/json"})
        expected = "The upload has 2.0 MB; at most 1.0 kB are accepted."
        assert (response.status_code, response.json()) == (413, {"detail": expected})

    @pytest.mark.parametrize("path", ["/function/", "/class/"])
    def test_view_may_have_its_own_limit(self, upload, path):
        assert upload(path, 2500).text == "2500"
        assert upload(path, 3500).status_code == 413
        assert upload("/default/", 2500).status_code == 413

    def test_without_the_middleware_it_is_rejected(self, upload, settings):
        name = "prodserver_ops.web.uploads.UploadMiddleware"
        settings.MIDDLEWARE = [each for each in settings.MIDDLEWARE if each != name]
        assert upload("/default/", 2000).status_code in (400, 413)


def save(request):
    return HttpResponse(request.FILES["file"].size)


@method_decorator([limit_upload(3000), csrf_exempt], name="dispatch")
class SaveView(View):
    def post(self, request):
        return save(request)


urlpatterns = [
    path("default/", csrf_exempt(lambda request: save(request))),
    path("checked/", save),
    path("function/", limit_upload(3000)(csrf_exempt(lambda request: save(request)))),
    path("class/", SaveView.as_view()),
]


class TestMedia:
    """Files that a model of the service keeps."""

    @pytest.fixture(autouse=True)
    def model(self, monkeypatch, settings, tmp_path):
        settings.MEDIA_ROOT = str(tmp_path)
        with isolate_apps("dummy"):

            class Document(models.Model):  # noqa: DJ008
                file = models.FileField()

                class Meta:
                    app_label = "dummy"

        monkeypatch.setattr(checks.apps, "get_models", lambda: [Document])
        return Document

    @pytest.mark.parametrize("container", [True, False])
    def test_in_a_container_are_reported(self, monkeypatch, container, tmp_path):
        monkeypatch.setattr(checks, "is_container", lambda: container)
        messages = check_media()
        assert [message.id for message in messages] == ["media.W001"] * container
        if container:
            assert messages[0].msg == (
                f"MEDIA_ROOT is {tmp_path}, in a container: each deploy deletes the files of "
                "dummy.Document.file."
            )

    def test_on_a_volume_are_kept(self, monkeypatch, tmp_path):
        monkeypatch.setattr(checks, "is_container", lambda: True)
        monkeypatch.setattr(checks.os.path, "ismount", lambda path: path == tmp_path.parent)
        assert check_media() == []

    def test_without_a_folder_are_reported(self, settings):
        settings.MEDIA_ROOT = ""
        assert [message.id for message in check_media()] == ["media.E001"]

    def test_in_another_storage_are_kept(self, model, monkeypatch):
        monkeypatch.setattr(checks, "is_container", lambda: True)
        monkeypatch.setattr(model._meta.get_field("file"), "storage", InMemoryStorage())
        assert check_media() == []

    def test_service_without_files_has_no_problem(self, settings, monkeypatch):
        settings.MEDIA_ROOT = ""
        monkeypatch.setattr(checks.apps, "get_models", list)
        assert check_media() == []

    def test_platforms_are_recognized(self, monkeypatch):
        monkeypatch.setattr(checks.os.path, "exists", lambda path: False)
        assert not checks.is_container()
        monkeypatch.setenv("DYNO", "web.1")
        assert checks.is_container()
