"""Databases with the migration history of this project, or of another one."""

import pytest
from django.apps import apps
from django.db import connection
from django.db.migrations.recorder import MigrationRecorder

from prodserver_ops.console.adoption import adopt, find_foreign_history, find_user_imports

pytestmark = pytest.mark.django_db


@pytest.fixture
def without_ops():
    """Forget the migrations of this library, as in a project that it is added to."""
    MigrationRecorder(connection).migration_qs.filter(app="ops").delete()


def test_project_that_the_library_is_added_to_has_its_own_history(without_ops):
    assert find_foreign_history(connection) is None


def test_other_columns_are_those_of_another_service(without_ops):
    with connection.cursor() as cursor:
        cursor.execute("ALTER TABLE dummy_user RENAME COLUMN email TO mail")
    assert find_foreign_history(connection) == ("dummy is migrated, but dummy_user has no email")


def test_missing_table_is_of_another_service(without_ops):
    with connection.cursor() as cursor:
        cursor.execute("ALTER TABLE dummy_user RENAME TO dummy_person")
    assert find_foreign_history(connection) == ("dummy is migrated, but there is no dummy_user")


def test_what_is_missing_is_added_and_nothing_else():
    """A database in which an earlier ``adopt`` has failed halfway, after it was recorded."""
    if connection.vendor != "postgresql":
        pytest.skip("SQLite does not change tables in a transaction")
    with connection.cursor() as cursor:
        cursor.execute("ALTER TABLE dummy_user DROP COLUMN email")
        cursor.execute("DROP TABLE ops_heartbeat")
    assert find_foreign_history(connection) == "dummy is migrated, but dummy_user has no email"
    expected = ["created ops_heartbeat", "kept dummy_user for dummy.User; added: email"]
    assert sorted(adopt(connection)) == expected
    assert find_foreign_history(connection) is None
    assert list(adopt(connection)) == []


def test_imports_of_another_user_model_are_found(settings, tmp_path, monkeypatch):
    folder = tmp_path / "dummy"
    (folder / "migrations").mkdir(parents=True)
    text = "from django.contrib.auth.models import Group, User\n"
    for name in ("views.py", "migrations/0001_initial.py"):
        (folder / name).write_text(text)
    (folder / "models.py").write_text("from django.contrib.auth.models import AbstractUser\n")
    settings.BASE_DIR = tmp_path
    monkeypatch.setattr(apps.get_app_config("dummy"), "path", str(folder))
    assert find_user_imports() == [
        "dummy/views.py:1 imports User of django.contrib.auth.models; use get_user_model()"
    ]
