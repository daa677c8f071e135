"""Databases of an earlier service: their tables are kept, and the migrations fitted to them.

An earlier service may have used ``auth.User``, or an app of the same name, so that its recorded
migrations are not those of this service. ``python manage.py adopt`` keeps each table that exists,
adds the columns, indexes and constraints that it lacks, and creates the rest. docs/move.md leads
through a move.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from django.apps import apps
from django.conf import settings
from django.contrib.auth import get_user_model
from django.contrib.auth.models import Group, Permission
from django.contrib.contenttypes.models import ContentType
from django.db import migrations, models
from django.db.backends.base.base import BaseDatabaseWrapper
from django.db.backends.base.schema import BaseDatabaseSchemaEditor
from django.db.migrations.executor import MigrationExecutor
from django.db.migrations.loader import MigrationLoader
from django.db.migrations.migration import Migration
from django.db.migrations.operations.base import Operation
from django.db.migrations.state import ProjectState
from django.db.models import Q

#: The label of the app whose migrations each service of the template has.
OPS = "ops"

PROBLEM = "The migrations of this database are those of another service: {}."


def find_foreign_history(connection: BaseDatabaseWrapper) -> str | None:
    """Return what shows that the recorded migrations are another service's, or None."""
    loader = MigrationExecutor(connection).loader
    user = get_user_model()._meta
    first = next(iter(loader.graph.root_nodes(user.app_label)), None)
    if first and first not in loader.applied_migrations:
        for label in ("admin", "authtoken"):
            if any(key[0] == label for key in loader.applied_migrations):
                return f"{label} is migrated, and {'.'.join(first)} is not"
    labels = {label for label, _ in loader.applied_migrations}
    if user.app_label not in labels:
        return None
    if OPS not in labels and (problem := _find_misfit(connection, loader, user.app_label)):
        return f"{user.app_label} is migrated, and {OPS} is not, and {problem}"
    if user.db_table not in connection.introspection.table_names():
        return f"{user.app_label} is migrated, and there is no {user.db_table}"
    return None


def _find_misfit(
    connection: BaseDatabaseWrapper, loader: MigrationLoader, label: str
) -> str | None:
    """Return what an app's applied migrations create and the database lacks, or None.

    A project that this library is added to has it all.
    """
    nodes = [key for key in loader.applied_migrations if key[0] == label and key in loader.graph]
    state = loader.project_state(nodes)
    tables = set(connection.introspection.table_names())
    for model in state.apps.get_models():
        options = model._meta
        if options.app_label != label or not options.managed or options.swapped:
            continue
        if options.db_table not in tables:
            return f"there is no {options.db_table}"
        with connection.cursor() as cursor:
            found = connection.introspection.get_table_description(cursor, options.db_table)
        columns = {str(field.column) for field in options.local_concrete_fields}
        if missing := columns - {column.name for column in found}:
            return f"{options.db_table} has no {', '.join(sorted(missing))}"
    return None


def _own_labels() -> set[str]:
    """Return the labels of the service's own apps, and of this library."""
    base, site = Path(settings.BASE_DIR), Path(models.__file__).parents[3]
    return {
        config.label
        for config in apps.get_app_configs()
        if Path(config.path).is_relative_to(base) and not Path(config.path).is_relative_to(site)
    } | {OPS}


def adopt(connection: BaseDatabaseWrapper) -> Iterable[str]:
    """Apply all migrations; keep the tables that exist. Yield a line for each one kept."""
    executor = MigrationExecutor(connection)
    executor.recorder.ensure_schema()
    tables = set(connection.introspection.table_names())
    applied, own = executor.loader.applied_migrations, _own_labels()
    plan = executor.migration_plan(executor.loader.graph.leaf_nodes(), clean_start=True)
    state = ProjectState(real_apps=executor.loader.unmigrated_apps)
    for migration, _ in plan:
        key = migration.app_label, migration.name
        if migration.app_label in own:
            yield from _adopt_migration(connection, migration, state, tables)
            if key not in applied:
                executor.recorder.record_applied(*key)
        elif key in applied:
            migration.mutate_state(state, preserve=False)
        else:
            state = executor.apply_migration(state, migration)


def _adopt_migration(
    connection: BaseDatabaseWrapper, migration: Migration, state: ProjectState, tables: set[str]
) -> Iterable[str]:
    with connection.schema_editor(atomic=migration.atomic) as editor:
        for operation in migration.operations:
            before = state.clone()
            operation.state_forwards(migration.app_label, state)
            kept = _get_kept_table(operation, migration.app_label, state, tables)
            if kept is None:
                operation.database_forwards(migration.app_label, editor, before, state)
            else:
                yield from _fit(operation, migration.app_label, editor, kept)


def _get_kept_table(
    operation: Operation, label: str, state: ProjectState, tables: set[str]
) -> Any | None:
    """Return the model of an operation that creates something in a table that is kept."""
    match operation:
        case migrations.CreateModel():
            name = operation.name
        case migrations.AddField() | migrations.AddIndex() | migrations.AddConstraint():
            name = operation.model_name
        case _:
            return None
    model = state.apps.get_model(label, name)
    return model if model._meta.managed and model._meta.db_table in tables else None


def _fit(
    operation: Operation, label: str, editor: BaseDatabaseSchemaEditor, model: Any
) -> Iterable[str]:
    """Add what the operation creates and the table lacks."""
    connection, table = editor.connection, model._meta.db_table
    with connection.cursor() as cursor:
        description = connection.introspection.get_table_description(cursor, table)
        constraints = connection.introspection.get_constraints(cursor, table)
    columns = {column.name for column in description}
    match operation:
        case migrations.CreateModel():
            added = [field for field in model._meta.local_fields if field.column not in columns]
            for field in added:
                _add_field(editor, model, field)
            for field in model._meta.local_many_to_many:
                through = field.remote_field.through
                names = connection.introspection.table_names()
                if through._meta.auto_created and through._meta.db_table not in names:
                    editor.create_model(through)
            for index in model._meta.indexes:
                if index.name not in constraints:
                    editor.add_index(model, index)
            for constraint in model._meta.constraints:
                if constraint.name not in constraints:
                    editor.add_constraint(model, constraint)
            new = ", ".join(field.column for field in added) or "nothing"
            yield f"{table} is kept for {label}.{operation.name}; added to it: {new}"
        case migrations.AddField():
            field = model._meta.get_field(operation.name)
            if field.many_to_many or field.column not in columns:
                _add_field(editor, model, field)
        case migrations.AddIndex() if operation.index.name not in constraints:
            editor.add_index(model, operation.index)
        case migrations.AddConstraint() if operation.constraint.name not in constraints:
            editor.add_constraint(model, operation.constraint)


def _add_field(editor: BaseDatabaseSchemaEditor, model: Any, field: Any) -> None:
    editor.add_field(model, field)
    default = editor.effective_default(field)
    # The earlier service, which does not know the column, must still be able to add rows.
    if editor.connection.vendor == "postgresql" and field.column and default is not None:
        table, column = editor.quote_name(model._meta.db_table), editor.quote_name(field.column)
        value = editor.quote_value(default)
        editor.execute(f"ALTER TABLE {table} ALTER COLUMN {column} SET DEFAULT {value}")


def copy_permissions() -> int:
    """Copy permissions on models of the earlier service to the same models of this one.

    The earlier one is ``auth.User`` or a model of an app that is not installed. Returns how many
    were copied.
    """
    user, count, own = get_user_model(), 0, _own_labels()
    labels = {config.label for config in apps.get_app_configs()}
    for model in apps.get_models():
        label, name = model._meta.app_label, model._meta.model_name
        if label not in own:
            continue
        same = Q(model=name) & ~Q(app_label__in=labels)
        if model is user:
            same |= Q(app_label="auth", model="user")
        earlier = ContentType.objects.filter(same)
        for old in Permission.objects.filter(content_type__in=earlier):
            action = old.codename.removesuffix(f"_{old.content_type.model}")
            for new in Permission.objects.filter(
                content_type__app_label=label, codename=f"{action}_{name}"
            ):
                for group in Group.objects.filter(permissions=old):
                    group.permissions.add(new)
                    count += 1
                for holder in user._default_manager.filter(user_permissions=old):
                    holder.user_permissions.add(new)
                    count += 1
    return count
