"""Error pages, and errors of the API."""

import logging

import pytest
from django.core.exceptions import PermissionDenied, SuspiciousOperation
from django.http import Http404
from django.test import Client
from django.urls import include, path

from prodserver_ops.api import root
from prodserver_ops.api.views import TokenView
from prodserver_ops.web import errors, servers, static
from tests.dummy.urls import handler400, handler403, handler404, handler500  # noqa: F401


def fail(request):
    raise {
        "bad": SuspiciousOperation("secret"),
        "forbidden": PermissionDenied("secret"),
        "missing": Http404("This link is not valid."),
        "broken": ValueError("secret"),
    }[request.GET["error"]]


urlpatterns = [
    path("fail/", fail),
    path("api/fail/", fail),
    path("api/token/", TokenView.as_view(), name="token"),
    path("api/", include(root)),
]

ERRORS = [("bad", 400), ("forbidden", 403), ("missing", 404), ("broken", 500)]


@pytest.fixture(autouse=True)
def _urls(settings):
    settings.ROOT_URLCONF = __name__


@pytest.fixture
def client():
    return Client(raise_request_exception=False)


@pytest.mark.parametrize(("error", "status"), ERRORS)
def test_page_has_the_name_of_the_service_and_a_way_back(client, settings, error, status):
    response = client.get("/fail/", {"error": error})
    assert response.status_code == status
    assert settings.SITE_NAME in response.text
    assert errors.TEXTS[status][0] in response.text
    assert '<a href="/">' in response.text
    assert "secret" not in response.text


@pytest.mark.parametrize(("error", "status"), ERRORS)
def test_api_gets_json(client, error, status):
    response = client.get("/api/fail/", {"error": error})
    assert response.status_code == status
    assert list(response.json()) == ["detail"]
    assert "secret" not in response.text


def test_page_says_why_a_link_is_not_valid(client):
    assert "This link is not valid." in client.get("/fail/", {"error": "missing"}).text
    assert errors.TEXTS[404][1] in client.get("/unknown/").text


def test_broken_base_template_leaves_a_plain_page(client, monkeypatch, settings):
    def fail():
        raise ValueError("no manifest")

    monkeypatch.setattr(errors, "get_base", fail)
    response = client.get("/fail/", {"error": "broken"})
    assert response.status_code == 500
    assert settings.SITE_NAME in response.text
    # The page has no style sheet: the browser gives it the theme of the user.
    assert '<meta name="color-scheme" content="light dark">' in response.text


def test_expired_form_has_a_page(settings):
    settings.CSRF_FAILURE_VIEW = "prodserver_ops.web.errors.csrf_failure"
    response = Client(enforce_csrf_checks=True).post("/fail/?error=missing")
    assert response.status_code == 403
    assert errors.CSRF_TEXT in response.text


class TestApi:
    def test_root_names_what_there_is(self, client):
        assert client.get("/api/").json() == {"token": "http://testserver/api/token/"}

    @pytest.mark.parametrize("debug", [False, True])
    def test_unknown_path_is_json(self, client, settings, debug):
        settings.DEBUG = debug
        for method in (client.get, client.post, client.delete):
            response = method("/api/unknown/path")
            assert response.status_code == 404
            assert response.json() == {"detail": "There is no /api/unknown/path in this API."}

    def test_missing_slash_is_added_or_explained(self, client):
        response = client.get("/api/token?a=b")
        assert (response.status_code, response["Location"]) == (301, "/api/token/?a=b")
        response = client.post("/api/token", {}, content_type="application/json")
        assert response.status_code == 404
        assert response.json() == {"detail": "The path ends with a slash: /api/token/"}

    def test_wrong_content_type_names_the_right_one(self, client, db):
        response = client.post("/api/token/", {"username": "sam"})
        assert response.status_code == 415
        assert response.json()["detail"].endswith("Use the Content-Type application/json.")


class TestStaticFiles:
    @pytest.fixture
    def storage(self, settings, tmp_path, monkeypatch):
        settings.STATIC_ROOT, settings.DEBUG = tmp_path, False
        storage = static.ManifestStorage(tmp_path, "/static/")
        monkeypatch.setattr(servers, "staticfiles_storage", storage)
        return storage

    def test_pages_need_no_manifest(self, storage, caplog):
        assert storage.url("site.css") == "/static/site.css"
        with caplog.at_level(logging.WARNING):
            servers.warn_about_static_files()
        (message,) = caplog.messages
        assert message.endswith("python manage.py collectstatic")

    def test_file_that_was_not_collected_is_an_error(self, storage, caplog):
        storage.hashed_files = {"site.css": "site.1234.css"}
        assert storage.url("site.css") == "/static/site.1234.css"
        with pytest.raises(ValueError, match=r"other\.css"):
            storage.url("other.css")
        servers.warn_about_static_files()
        assert caplog.messages == []
