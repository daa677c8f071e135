"""API tokens: they expire, become invalid with a new password, and can be deleted."""

from datetime import datetime, timedelta

import pytest
import time_machine
from django.urls import reverse
from django.utils import timezone
from rest_framework.exceptions import AuthenticationFailed
from rest_framework.test import APIClient

from prodserver_ops.api import tokens
from prodserver_ops.api.tokens import TokenAuthentication, create_token
from prodserver_ops.models import Token

pytestmark = pytest.mark.django_db


@pytest.fixture
def user(make_user):
    return make_user("anna")


@pytest.fixture
def api():
    return APIClient()


def log_in(api, user):
    credentials = {"username": user.get_username(), "password": "secret"}
    return api.post(reverse("token"), credentials, format="json")


def is_valid(text):
    try:
        TokenAuthentication().authenticate_credentials(text)
    except AuthenticationFailed:
        return False
    return True


def test_a_login_returns_a_token_and_its_end(api, user, settings):
    data = log_in(api, user).json()
    end = datetime.fromisoformat(data["expires_at"]) - timezone.now()
    assert timedelta(days=89) < end < timedelta(days=settings.TOKEN_DAYS)
    found, token = TokenAuthentication().authenticate_credentials(data["token"])
    assert (found, token.user) == (user, user)


def test_the_database_does_not_contain_the_token(user):
    text, token = create_token(user)
    number, _, secret = text.partition("-")
    assert number == str(token.pk)
    assert secret not in str(Token.objects.values().get())


def test_each_login_gets_another_token(user):
    first, second = create_token(user)[0], create_token(user)[0]
    assert first != second
    assert is_valid(first)


def test_a_user_has_a_limited_number_of_tokens(user, make_user, monkeypatch):
    monkeypatch.setattr(tokens, "MAX_TOKENS", 2)
    other = create_token(make_user("other"))[0]
    texts = [create_token(user)[0] for _ in range(3)]
    assert [is_valid(text) for text in [other, *texts]] == [True, False, True, True]


def test_it_ends_after_some_days(user, settings):
    text, _ = create_token(user)
    with time_machine.travel(timezone.now() + timedelta(days=settings.TOKEN_DAYS, seconds=1)):
        assert not is_valid(text)


def test_it_ends_with_the_password(user):
    text, _ = create_token(user)
    user.set_password("another")
    user.save()
    assert not is_valid(text)


def test_it_ends_with_the_account(user):
    text, _ = create_token(user)
    type(user).objects.filter(pk=user.pk).update(is_active=False)
    assert not is_valid(text)


@pytest.mark.parametrize("text", ["", "x", "1-x", f"{'9' * 30}-x", "0-" + "x" * 43, "-" + "é" * 43])
def test_what_is_not_a_token_is_refused(user, text):
    create_token(user)
    assert not is_valid(text)


def test_the_secret_of_another_token_is_refused(user):
    (_, first), (text, _) = create_token(user), create_token(user)
    assert not is_valid(f"{first.pk}-{text.partition('-')[2]}")


def test_a_user_can_end_a_token(api, user):
    text, other = create_token(user)[0], create_token(user)[0]
    api.credentials(HTTP_AUTHORIZATION=f"Token {text}")
    assert api.delete(reverse("token")).status_code == 204
    assert api.delete(reverse("token")).status_code == 401
    assert (is_valid(text), is_valid(other)) == (False, True)


def test_ending_needs_a_token(api, client, user):
    assert api.delete(reverse("token")).status_code == 401
    client.force_login(user)
    assert client.delete(reverse("token")).status_code == 401


def test_an_administrator_can_end_a_token_but_not_read_it(client, make_user, user):
    text, token = create_token(user)
    client.force_login(make_user("admin", is_superuser=True, is_staff=True))
    page = client.get(reverse("admin:ops_token_change", args=[token.pk]))
    assert user.get_username() in page.text
    assert token.digest not in page.text
    client.post(reverse("admin:ops_token_delete", args=[token.pk]), {"post": "yes"})
    assert not is_valid(text)
