"""The API rejects harmful requests with a response in JSON."""

import json

import pytest
from django.db import DataError
from django.urls import reverse
from rest_framework.exceptions import NotFound
from rest_framework.pagination import CursorPagination as BasePagination
from rest_framework.settings import api_settings
from rest_framework.test import APIClient

from prodserver_ops.api.views import CursorPagination

pytestmark = pytest.mark.django_db


@pytest.fixture
def api():
    return APIClient(raise_request_exception=True)


def post(api, body):
    return api.post(reverse("token"), body, content_type="application/json")


def test_deeply_nested_json_is_a_bad_request(api):
    response = post(api, "[" * 100_000 + "]" * 100_000)
    assert (response.status_code, response.json()) == (
        400,
        {"detail": "JSON parse error - nested too deeply"},
    )


def test_a_large_body_is_refused(api, settings):
    settings.DATA_UPLOAD_MAX_MEMORY_SIZE = 1000
    response = post(api, json.dumps({"username": "x" * 1000, "password": "x"}))
    assert (response.status_code, response.json()) == (
        413,
        {"detail": "The request is too large."},
    )


@pytest.mark.parametrize("field", ["username", "password"])
def test_long_credentials_are_refused_before_they_are_normalized(api, field, make_user):
    make_user("anna")
    # To normalize this name takes about a minute.
    value = "a" + "\u0301" * 50_000 + "\u0327" * 50_000
    response = post(api, json.dumps({"username": "anna", "password": "secret"} | {field: value}))
    assert response.status_code == 400


def test_a_new_view_requires_a_login():
    (permission,) = api_settings.DEFAULT_PERMISSION_CLASSES
    assert permission.__name__ == "IsAuthenticated"


@pytest.mark.parametrize("error", [DataError, OverflowError])
def test_a_cursor_that_the_database_refuses_is_not_found(monkeypatch, error):
    def refuse(*args):
        raise error

    monkeypatch.setattr(BasePagination, "paginate_queryset", refuse)
    with pytest.raises(NotFound):
        CursorPagination().paginate_queryset([], None)
