"""Parts that changes can break: processes, migrations, schedules, e-mail, pages."""

import re
from pathlib import Path

import pytest
from celery import current_app
from django.conf import settings
from django.core import checks
from django.core.management import call_command
from django.test import override_settings
from django.urls import URLResolver, get_resolver
from django_celery_beat.models import PeriodicTask
from prodserver_ops.mail.digests import registry
from prodserver_ops.mail.preview import compose_sample
from prodserver_ops.scheduling import validation
from prodserver_ops.web import health

#: Paths of public pages.
PUBLIC = {"", "api/", "api/docs/", "api/schema/", {{ cookiecutter.__submissions and '"api/submissions/", ' }}"admin/login/"}

#: Status codes of pages that are not public.
CLOSED = {302, 401, 403, 404, 405}


def find_paths(patterns, prefix=""):
    """Yield the paths without arguments."""
    for pattern in patterns:
        path = prefix + str(pattern.pattern)
        if isinstance(pattern, URLResolver):
            yield from find_paths(pattern.url_patterns, path)
        elif not re.search(r"[<(?\\^]", path):
            yield path


@pytest.mark.django_db
def test_checks_report_no_problem():
    assert [str(message) for message in checks.run_checks(databases=["default"])] == []


@pytest.mark.django_db
def test_each_change_of_a_model_has_its_migration():
    call_command("makemigrations", check=True, dry_run=True, verbosity=0)


def test_procfile_migrates():
    """Each deploy runs it. The checks compare the other lines with the settings."""
    text = Path(settings.BASE_DIR, "Procfile").read_text()
    assert re.search(r"^release: .*manage\.py migrate --noinput", text, re.M)


@pytest.mark.django_db
def test_each_schedule_of_a_new_database_has_a_task():
    current_app.loader.import_default_modules()
    rows = PeriodicTask.objects.all()
    assert {row.name: row.task for row in rows if row.task not in current_app.tasks} == {}
    for row in rows:
        validation.check(row)


@override_settings(DEBUG=True)
def test_each_email_renders():
    for name in registry:
        email = compose_sample(name)
        assert email.subject and email.body and email.alternatives, name


def test_openapi_yaml_is_current():
    call_command("openapi", check=True, verbosity=0)


def test_health_checks_respond_under_any_host_name(client, monkeypatch):
    monkeypatch.setattr(health, "CHECKS", {"database": lambda: None})
    for path in ("/health/live", "/health/ready"):
        assert client.get(path, headers={"host": "10.0.0.1"}).status_code == 200


@pytest.mark.django_db
def test_visitors_see_only_what_is_public(client):
    """Other pages redirect to the login, are hidden, or do not accept GET."""
    paths = set(find_paths(get_resolver().url_patterns))
    statuses = {path: client.get(f"/{path}").status_code for path in paths - PUBLIC}
    assert {path for path, status in statuses.items() if status not in CLOSED} == set()
