"""Unsubscribing: by a signed link, without a login, and by nobody else."""

from urllib.parse import urlsplit

import pytest

from {{ cookiecutter.project_slug }} import unsubscribe

KINDS = [("digest", "digest_frequency", "off"), ("notification", "notify_on_response", False)]


@pytest.fixture
def user(make_user):
    return make_user("reader", digest_frequency="daily")


@pytest.mark.parametrize(("kind", "field", "value"), KINDS)
def test_one_click_unsubscribes(client, user, kind, field, value):
    path = urlsplit(unsubscribe.link(user, kind)).path
    response = client.post(path, {"List-Unsubscribe": "One-Click"})
    assert response.status_code == 200
    assert "gets no more" in response.text
    before = {"digest_frequency": "daily", "notify_on_response": True}
    user.refresh_from_db()
    assert {name: getattr(user, name) for name in before} == before | {field: value}


def test_a_scanner_that_follows_the_link_changes_nothing(client, user):
    path = urlsplit(unsubscribe.link(user, "digest")).path
    response = client.get(path)
    assert "<button>Unsubscribe</button>" in response.text
    user.refresh_from_db()
    assert user.digest_frequency == "daily"


@pytest.mark.parametrize("token", ["x", "x:y", "1:digest:x"])
@pytest.mark.django_db
def test_a_forged_link_is_not_found(client, token):
    assert client.post(f"/unsubscribe/{token}/").status_code == 404


def test_a_link_of_somebody_who_is_gone_is_not_found(client, user):
    path = urlsplit(unsubscribe.link(user, "digest")).path
    user.delete()
    assert client.post(path).status_code == 404
