"""Previews of e-mail in development, and how it looks in text."""

import pytest
from django.urls import reverse

from prodserver_ops.mail.digests import registry
from prodserver_ops.templatetags.email import quote


@pytest.fixture(autouse=True)
def _debug(settings):
    settings.DEBUG = True


def test_index_lists_each_message(client):
    text = client.get(reverse("emails")).text
    assert all(reverse("email", args=[name, "html"]) in text for name in registry)


def test_each_message_has_a_preview_that_loads_nothing(client):
    for name in registry:
        html = client.get(reverse("email", args=[name, "html"]))
        assert html.status_code == 200
        assert html.headers["Content-Security-Policy"].startswith("default-src 'none'")
        text = client.get(reverse("email", args=[name, "txt"]))
        assert text.headers["Content-Type"] == "text/plain; charset=utf-8"
        assert text.text.startswith("Subject: ")


def test_unknown_message_is_not_found(client):
    assert client.get(reverse("email", args=["unknown", "html"])).status_code == 404


def test_there_is_no_preview_in_production(client, settings):
    settings.DEBUG = False
    urls = [reverse("emails"), *(reverse("email", args=[name, "txt"]) for name in registry)]
    assert {client.get(url).status_code for url in urls} == {404}


def test_quote_marks_each_line():
    assert quote("One <b>\n\nTwo") == "> One <b>\n>\n> Two"
