"""Logins: guessing is stopped, whoever it comes from and whatever door it uses."""

from datetime import UTC, datetime, timedelta

import pytest
import time_machine
from django.core.cache import caches
from django.core.cache.backends.db import DatabaseCache
from django.db import connection
from django.urls import reverse

from {{ cookiecutter.project_slug }} import logins

pytestmark = pytest.mark.django_db


@pytest.fixture(autouse=True)
def few_slots(monkeypatch):
    monkeypatch.setattr(logins, "SLOTS", {"address": 3, "name": 5})


@pytest.fixture
def log_in(client, superuser):
    """Try the login of the admin; return the error that it shows, or None."""

    def log_in(password="wrong", username="admin", address="203.0.113.1"):
        response = client.post(
            reverse("admin:login"),
            {"username": username, "password": password},
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


def test_a_right_password_lets_in(log_in):
    assert log_in("secret") is None


def test_a_few_wrong_ones_before_do_no_harm(log_in):
    fail(log_in, 2)
    assert log_in("secret") is None


def test_an_address_is_refused_after_too_many(log_in):
    fail(log_in, 3)
    assert log_in("secret") == "Too many logins failed. Try again in 15 minutes."
    assert log_in("secret", address="203.0.113.2") is None


def test_an_address_is_refused_whatever_names_it_tries(log_in):
    for name in ("one", "two", "three"):
        fail(log_in, 1, username=name)
    assert log_in("secret")


def test_a_name_is_refused_after_too_many_from_anywhere(log_in):
    for number in range(5):
        fail(log_in, 1, username="Admin", address=f"203.0.113.{number}")
    assert log_in("secret", address="203.0.113.99")


def test_all_are_welcome_again_after_a_while(log_in):
    now = datetime.now(UTC)
    with time_machine.travel(now) as clock:
        fail(log_in, 3)
        assert log_in("secret")
        clock.move_to(now + timedelta(minutes=logins.MINUTES, seconds=2))
        assert log_in("secret") is None


def test_tries_while_refused_prolong_nothing(log_in):
    fail(log_in, 3)
    fail(log_in, 10)
    taken = caches["logins"]._table
    with connection.cursor() as cursor:
        cursor.execute(f"SELECT count(*) FROM {taken}")
        assert cursor.fetchone() == (6,)


def test_tokens_are_refused_too(client, log_in):
    fail(log_in, 3)
    response = client.post(
        reverse("token"),
        {"username": "admin", "password": "secret"},
        content_type="application/json",
        REMOTE_ADDR="203.0.113.1",
    )
    assert response.status_code == 400


def test_all_web_processes_count_together():
    assert isinstance(caches["logins"], DatabaseCache)


def test_nobody_is_named_in_the_count_or_the_log(log_in, caplog):
    fail(log_in, 3)
    with connection.cursor() as cursor:
        cursor.execute(f"SELECT cache_key, value FROM {caches['logins']._table}")
        stored = str(cursor.fetchall())
    assert "Logins of one address are refused for 15 minutes" in caplog.text
    assert "admin" not in stored + caplog.text.replace("/admin/", "")
    assert "203.0.113" not in stored + caplog.text
