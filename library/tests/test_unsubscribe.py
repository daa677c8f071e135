"""Unsubscribing through a signed link, without a login."""

from urllib.parse import urlsplit

import pytest
from django.urls import reverse

from prodserver_ops.mail import unsubscribe
from prodserver_ops.mail.digests import Message, registry


class Sample(Message):
    """An e-mail that stores the users who unsubscribed."""

    name = "ops-test"
    unsubscribe_label = "sample news"

    def __init__(self):
        self.unsubscribed = []

    def unsubscribe(self, recipient):
        self.unsubscribed.append(recipient)


@pytest.fixture
def message(monkeypatch):
    message = Sample()
    monkeypatch.setitem(registry, message.name, message)
    return message


@pytest.fixture
def user(make_user):
    return make_user("anna")


@pytest.fixture
def path(user, message):
    return urlsplit(unsubscribe.link(user, message)).path


def test_one_click_unsubscribes_without_a_csrf_token(client, user, message, path):
    client.handler.enforce_csrf_checks = True
    response = client.post(path, {"List-Unsubscribe": "One-Click"})
    assert response.status_code == 200
    assert "anna@example.com is unsubscribed from sample news." in response.text
    assert message.unsubscribed == [user]


def test_link_is_on_the_site(settings, user, message):
    settings.SITE_URL = "https://service.example"
    assert unsubscribe.link(user, message).startswith("https://service.example/")


def test_scanner_that_follows_the_link_changes_nothing(client, message, path):
    for method in (client.get, client.head):
        assert method(path).status_code == 200
    text = client.get(path).text
    assert "Unsubscribe anna@example.com from sample news?" in text
    assert "<button>Unsubscribe</button>" in text
    assert message.unsubscribed == []


@pytest.mark.parametrize("token", ["x", "x:y", "1:ops-test:x"])
@pytest.mark.django_db
def test_forged_link_is_not_found(client, message, token):
    assert client.post(reverse("unsubscribe", args=[token])).status_code == 404
    assert message.unsubscribed == []


def test_link_of_a_deleted_user_is_not_found(client, user, message, path):
    user.delete()
    assert client.post(path).status_code == 404


def test_link_for_a_message_that_was_removed_is_not_found(client, message, path, monkeypatch):
    monkeypatch.delitem(registry, message.name)
    assert client.get(path).status_code == 404
    assert client.post(path).status_code == 404


def test_link_for_a_message_that_has_no_label_any_more_is_not_found(client, message, path):
    message.unsubscribe_label = None
    assert client.post(path).status_code == 404
    assert message.unsubscribed == []
