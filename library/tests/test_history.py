"""Databases with the migration history of this project, or of another one."""

import pytest
from django.db import connection
from django.db.migrations.recorder import MigrationRecorder

from prodserver_ops.console.adoption import find_foreign_history

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
    assert find_foreign_history(connection) == (
        "dummy is migrated, but ops is not, and dummy_user has no email"
    )


def test_missing_table_is_of_another_service(without_ops):
    with connection.cursor() as cursor:
        cursor.execute("ALTER TABLE dummy_user RENAME TO dummy_person")
    assert find_foreign_history(connection) == (
        "dummy is migrated, but ops is not, and there is no dummy_user"
    )
