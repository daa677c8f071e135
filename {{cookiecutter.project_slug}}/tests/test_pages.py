"""The pages of the service."""

import pytest
from django.urls import reverse

from {{ cookiecutter.project_slug }}.models import Submission, User

pytestmark = pytest.mark.django_db


def test_home_page_shows_the_name_of_the_service(client, settings):
    response = client.get("/")
    assert response.status_code == 200
    assert response.context["site_name"] == settings.SITE_NAME


def test_admin_redirects_to_its_login_page(client):
    response = client.get(reverse("admin:index"))
    assert response.status_code == 302
    assert reverse("admin:login") in response["location"]


@pytest.mark.parametrize(
    ("model", "page"),
    [
        (Submission, "changelist"),
        (User, "changelist"),
        (User, "add"),
    ],
)
def test_administrator_can_open_the_admin_pages(client, superuser, make_submission, model, page):
    make_submission()
    client.force_login(superuser)
    url = reverse(f"admin:{model._meta.app_label}_{model._meta.model_name}_{page}")
    assert client.get(url).status_code == 200
