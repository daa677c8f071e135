"""Indexes of the admin's history, which has an entry for each action on each object.

No migration can create them: one that depends on the admin fails in a project without it, and
Django refuses an admin that is added after a migration that depends on it.
"""

from typing import Any

from django.db import connections

TABLE = "django_admin_log"

#: The columns of each index, by its name.
INDEXES = {
    "history_of_object": ["object_id", "content_type_id"],
    "history_of_user": ["user_id", "action_time"],
}


def create_indexes(using: str, **kwargs: Any) -> None:
    """Create the indexes that are missing; a receiver of ``post_migrate``."""
    connection = connections[using]
    with connection.cursor() as cursor:
        if TABLE not in connection.introspection.table_names(cursor):
            return
        existing = connection.introspection.get_constraints(cursor, TABLE)
        for name in INDEXES.keys() - existing.keys():
            cursor.execute(f"CREATE INDEX {name} ON {TABLE} ({', '.join(INDEXES[name])})")
