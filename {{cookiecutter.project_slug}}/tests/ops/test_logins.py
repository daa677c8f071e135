"""Logins: guessing passwords is throttled, in the admin and in the API."""

from datetime import UTC, datetime, timedelta

import pytest
import time_machine
from django.core.cache import caches
from django.core.cache.backends.db import DatabaseCache
from django.db import connection
from django.urls import reverse
from rest_framework.test import APIRequestFactory

from {{ cookiecutter.project_slug }}.ops import logins
from {{ cookiecutter.project_slug }}.ops.api import TokenView

pytestmark = pytest.mark.django_db


@pytest.fixture(autouse=True)
def few_slots(monkeypatch):
    monkeypatch.setattr(logins, "SLOTS", {"address": 3, "user name": 5})


@pytest.fixture
def user(make_user):
    return make_user("anna", is_staff=True)


@pytest.fixture
def log_in(client, user):
    """Return a function that logs in to the admin; it returns the error message, or None."""

    def log_in(password="wrong", username=None, address="203.0.113.1"):
        response = client.post(
            reverse("admin:login"),
            {"username": username or user.get_username(), "password": password},
            REMOTE_ADDR=address,
        )
        if response.status_code == 302:
            client.logout()
            return None
        (error,) = response.context["form"].non_field_errors()
        return error

    return log_in


def fail(log_in, times, **options):
    for _ in range(times):
        assert log_in(**options)


def get_token(user, password):
    data = {"username": user.get_username(), "password": password}
    request = APIRequestFactory().post("/", data, format="json", REMOTE_ADDR="203.0.113.1")
    return TokenView.as_view()(request)


def test_correct_password_logs_in(log_in):
    assert log_in("secret") is None


def test_login_works_after_a_few_failures(log_in):
    fail(log_in, 2)
    assert log_in("secret") is None


def test_address_is_locked_after_too_many_failures(log_in):
    fail(log_in, 3)
    assert log_in("secret") == "Too many failed logins. Try again in 15 minutes."
    assert log_in("secret", address="203.0.113.2") is None


def test_address_is_locked_whichever_user_names_fail(log_in):
    for name in ("one", "two", "three"):
        fail(log_in, 1, username=name)
    assert log_in("secret")


def test_user_name_is_locked_after_too_many_failures_from_any_address(log_in, user):
    for number in range(5):
        name = user.get_username().title()
        fail(log_in, 1, username=name, address=f"203.0.113.{number}")
    assert log_in("secret", address="203.0.113.99")


def test_lock_ends_after_a_time(log_in):
    now = datetime.now(UTC)
    with time_machine.travel(now) as clock:
        fail(log_in, 3)
        assert log_in("secret")
        clock.move_to(now + timedelta(minutes=logins.LOCKOUT_MINUTES, seconds=2))
        assert log_in("secret") is None


def test_attempts_while_locked_do_not_prolong_the_lock(log_in):
    fail(log_in, 3)
    fail(log_in, 10)
    with connection.cursor() as cursor:
        cursor.execute(f"SELECT count(*) FROM {caches['logins']._table}")
        assert cursor.fetchone() == (6,)


def test_token_needs_the_correct_password(user):
    assert get_token(user, "wrong").status_code == 400
    response = get_token(user, "secret")
    assert response.status_code == 200
    assert response.data["token"]


def test_token_is_refused_while_logins_are_locked(log_in, user):
    fail(log_in, 3)
    assert get_token(user, "secret").status_code == 400


def test_token_requests_are_throttled(user):
    statuses = [get_token(user, str(number)).status_code for number in range(11)]
    assert statuses == [400] * 10 + [429]


def test_all_web_processes_count_together():
    assert isinstance(caches["logins"], DatabaseCache)


def test_neither_count_nor_log_contains_who_failed(log_in, user, caplog):
    fail(log_in, 3)
    with connection.cursor() as cursor:
        cursor.execute(f"SELECT cache_key, value FROM {caches['logins']._table}")
        stored = str(cursor.fetchall())
    assert "Logins of one address are locked for 15 minutes" in caplog.text
    assert user.get_username() not in stored + caplog.text
    assert "203.0.113" not in stored + caplog.text
