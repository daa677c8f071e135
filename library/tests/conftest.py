import shutil
from pathlib import Path

import pytest
from django.conf import settings
from django.contrib.auth import get_user_model
from django.core.cache import caches
from django.db import connection
from django.db.models import CharField

from prodserver_ops.worker.app import Task


@pytest.fixture(autouse=True)
def _empty_cache():
    """Forget the requests of earlier tests, which throttles would count."""
    caches["default"].clear()


@pytest.fixture(scope="session", autouse=True)
def _delete_locks():
    yield
    shutil.rmtree(settings.LOCK_DIR, ignore_errors=True)


@pytest.fixture(scope="session")
def django_db_setup(django_db_setup, django_db_blocker, django_db_keepdb):
    """Keep the rows that migrations create for the next run with ``--reuse-db``.

    Tests with transactions empty all tables.
    """
    yield
    contents = getattr(connection, "_test_serialized_contents", None)
    if django_db_keepdb and contents:
        with django_db_blocker.unblock():
            connection.creation.deserialize_db_from_string(contents)
            connection.close()


@pytest.fixture
def make_user(db):
    """Return a function that creates a user, whatever the user model is."""

    def make(name, **fields):
        model = get_user_model()
        values = {
            field.name: name
            for field in model._meta.concrete_fields
            if field.unique and isinstance(field, CharField)
        }
        values[model.get_email_field_name()] = f"{name}@example.com"
        user = model(**values | fields)
        user.set_password("secret")
        user.save()
        return user

    return make


@pytest.fixture
def queue(monkeypatch):
    """Return the list of queued tasks, as (name, arguments, options), without a broker."""
    queued = []

    def apply_async(task, args=None, kwargs=None, **options):
        queued.append((task.name, tuple(args or ()), options))

    monkeypatch.setattr(Task, "apply_async", apply_async)
    return queued


@pytest.fixture
def sample_templates(settings):
    """Make ``email/sample.txt`` and ``email/sample.html`` of this folder available."""
    folder = Path(__file__).parent / "templates"
    settings.TEMPLATES = [
        {**backend, "DIRS": [*backend.get("DIRS", ()), folder]} for backend in settings.TEMPLATES
    ]
