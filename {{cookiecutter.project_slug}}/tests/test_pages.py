"""Pages: the home page and the admin open, and the admin asks who is there."""

import pytest
from django.urls import reverse

from {{ cookiecutter.project_slug }}.models import DigestDelivery, Submission, User

pytestmark = pytest.mark.django_db


def test_home_says_what_this_is(client, settings):
    response = client.get("/")
    assert response.status_code == 200
    assert response.context["site_name"] == settings.SITE_NAME


def test_admin_asks_who_is_there(client):
    response = client.get(reverse("admin:index"))
    assert response.status_code == 302
    assert reverse("admin:login") in response["location"]


@pytest.mark.parametrize(
    ("model", "page"),
    [
        (Submission, "changelist"),
        (DigestDelivery, "changelist"),
        (User, "changelist"),
        (User, "add"),
    ],
)
def test_admin_opens(client, superuser, make_submission, model, page):
    make_submission()
    client.force_login(superuser)
    url = reverse(f"admin:{model._meta.app_label}_{model._meta.model_name}_{page}")
    assert client.get(url).status_code == 200
