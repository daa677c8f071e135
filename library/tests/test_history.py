"""Databases that have migrations already: of this project, of another one, without the admin."""

import pytest
from django.db import connection
from django.db.migrations.recorder import MigrationRecorder

from prodserver_ops.console.adoption import find_foreign_history
from prodserver_ops.core import history

pytestmark = pytest.mark.django_db


def get_indexes():
    with connection.cursor() as cursor:
        constraints = connection.introspection.get_constraints(cursor, history.TABLE)
    return constraints.keys() & history.INDEXES.keys()


@pytest.fixture
def without_ops():
    """Forget the migrations of this library, as in a project that it is added to."""
    MigrationRecorder(connection).migration_qs.filter(app="ops").delete()


def test_project_that_the_library_is_added_to_has_its_own_history(without_ops):
    assert find_foreign_history(connection) is None


def test_other_columns_are_those_of_another_service(without_ops):
    with connection.cursor() as cursor:
        cursor.execute("ALTER TABLE dummy_user RENAME COLUMN email TO mail")
    assert find_foreign_history(connection) == (
        "dummy is migrated, and ops is not, and dummy_user has no email"
    )


def test_missing_table_is_of_another_service(without_ops):
    with connection.cursor() as cursor:
        cursor.execute("ALTER TABLE dummy_user RENAME TO dummy_person")
    assert find_foreign_history(connection) == (
        "dummy is migrated, and ops is not, and there is no dummy_user"
    )


def test_history_of_the_admin_has_indexes():
    assert get_indexes() == history.INDEXES.keys()


def test_missing_index_of_the_history_is_created():
    with connection.cursor() as cursor:
        cursor.execute("DROP INDEX history_of_user")
    history.create_indexes("default")
    assert get_indexes() == history.INDEXES.keys()


def test_project_without_the_admin_has_no_history(monkeypatch):
    monkeypatch.setattr(history, "TABLE", "no_such_table")
    history.create_indexes("default")
