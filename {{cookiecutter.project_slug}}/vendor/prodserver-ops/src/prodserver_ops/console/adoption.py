"""Adopt the database of an earlier service: keep its tables, and fit the migrations to them.

An earlier service may have used ``auth.User``, or an app with the same name, so that its migration
history does not match this service. ``python manage.py adopt`` keeps existing tables, adds missing
columns, indexes and constraints, and creates the other tables. docs/move.md describes how to move
a service.
"""

import ast
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from django.apps import apps
from django.conf import settings
from django.contrib.auth import get_user_model
from django.contrib.auth.models import Group, Permission
from django.contrib.contenttypes.models import ContentType
from django.db import migrations, models, router
from django.db.backends.base.base import BaseDatabaseWrapper
from django.db.backends.base.schema import BaseDatabaseSchemaEditor
from django.db.migrations.executor import MigrationExecutor
from django.db.migrations.loader import MigrationLoader
from django.db.migrations.migration import Migration
from django.db.migrations.operations.base import Operation
from django.db.migrations.state import ProjectState
from django.db.models import Q
from django_celery_beat.models import PeriodicTask

from ..scheduling import queues

#: The label of this library's app.
OPS = "ops"

PROBLEM = "The migration history of this database belongs to another service: {}."


def find_foreign_history(connection: BaseDatabaseWrapper) -> str | None:
    """Return why the migration history belongs to another service, or None."""
    loader = MigrationExecutor(connection).loader
    user = get_user_model()._meta
    first = next(iter(loader.graph.root_nodes(user.app_label)), None)
    if first and first not in loader.applied_migrations:
        for label in ("admin", "authtoken"):
            if any(key[0] == label for key in loader.applied_migrations):
                return f"{label} is migrated, but {'.'.join(first)} is not"
    labels = {label for label, _ in loader.applied_migrations}
    for label in sorted(_own_labels() & labels):
        if problem := _find_misfit(connection, loader, label):
            return f"{label} is migrated, but {problem}"
    if user.app_label in labels and user.db_table not in connection.introspection.table_names():
        return f"{user.app_label} is migrated, but there is no {user.db_table}"
    return None


def _find_misfit(
    connection: BaseDatabaseWrapper, loader: MigrationLoader, label: str
) -> str | None:
    """Return which table or columns of an app's applied migrations are missing, or None.

    In a project that this library is added to, none are missing.
    """
    tables = set(connection.introspection.table_names())
    for model in _get_applied_models(connection, loader, {label}):
        options = model._meta
        if options.db_table not in tables:
            return f"there is no {options.db_table}"
        with connection.cursor() as cursor:
            found = connection.introspection.get_table_description(cursor, options.db_table)
        columns = {str(field.column) for field in options.local_concrete_fields}
        if missing := columns - {column.name for column in found}:
            return f"{options.db_table} has no {', '.join(sorted(missing))}"
    return None


def _get_applied_models(
    connection: BaseDatabaseWrapper, loader: MigrationLoader, labels: set[str]
) -> list[Any]:
    """Return the models of apps whose tables the applied migrations have created."""
    applied = [key for key in loader.applied_migrations if key[0] in labels and key in loader.graph]
    models = loader.project_state(applied).apps.get_models() if applied else []
    return [
        model
        for model in models
        if model._meta.app_label in {label for label, _ in applied}
        and model._meta.managed
        and not model._meta.proxy
        and not model._meta.swapped
        and router.allow_migrate_model(connection.alias, model)
    ]


def _own_labels() -> set[str]:
    """Return the labels of the service's own apps, and of this library."""
    base, site = Path(settings.BASE_DIR), Path(models.__file__).parents[3]
    return {
        config.label
        for config in apps.get_app_configs()
        if Path(config.path).is_relative_to(base) and not Path(config.path).is_relative_to(site)
    } | {OPS}


def adopt(connection: BaseDatabaseWrapper) -> Iterable[str]:
    """Apply all migrations and keep existing tables; yield a line for each kept table.

    What is recorded as applied is not repeated: the tables get what its models have and they lack.
    Run it in a transaction.
    """
    executor = MigrationExecutor(connection)
    executor.recorder.ensure_schema()
    applied, own = executor.loader.applied_migrations, _own_labels()
    yield from _complete(connection, _get_applied_models(connection, executor.loader, own))
    tables = set(connection.introspection.table_names())
    plan = executor.migration_plan(executor.loader.graph.leaf_nodes(), clean_start=True)
    state = ProjectState(real_apps=executor.loader.unmigrated_apps)
    for migration, _ in plan:
        key = migration.app_label, migration.name
        if key in applied:
            migration.mutate_state(state, preserve=False)
        elif migration.app_label in own:
            yield from _adopt_migration(connection, migration, state, tables)
            executor.recorder.record_applied(*key)
        else:
            state = executor.apply_migration(state, migration)
        if connection.in_atomic_block:
            # PostgreSQL refuses to alter a table with rows that are not checked yet.
            connection.check_constraints()


def _complete(connection: BaseDatabaseWrapper, models: list[Any]) -> Iterable[str]:
    """Create the tables of models, or add what they lack."""
    tables = set(connection.introspection.table_names())
    with connection.schema_editor() as editor:
        for model in models:
            if model._meta.db_table not in tables:
                editor.create_model(model)
                yield f"created {model._meta.db_table}"
            else:
                lines = _fit_model(editor, model)
                yield from (line for line in lines if not line.endswith("added: nothing"))


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
    """Return the model of an operation that would create or extend an existing table, or None."""
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
    """Add the parts of the operation that the table lacks."""
    connection, table = editor.connection, model._meta.db_table
    with connection.cursor() as cursor:
        description = connection.introspection.get_table_description(cursor, table)
        constraints = connection.introspection.get_constraints(cursor, table)
    columns = {column.name for column in description}
    match operation:
        case migrations.CreateModel():
            yield from _fit_model(editor, model)
        case migrations.AddField():
            field = model._meta.get_field(operation.name)
            if field.many_to_many:
                through = field.remote_field.through._meta.db_table
                is_missing = through not in connection.introspection.table_names()
            else:
                is_missing = field.column not in columns
            if is_missing:
                _add_field(editor, model, field)
        case migrations.AddIndex() if operation.index.name not in constraints:
            editor.add_index(model, operation.index)
        case migrations.AddConstraint() if operation.constraint.name not in constraints:
            editor.add_constraint(model, operation.constraint)


def _fit_model(editor: BaseDatabaseSchemaEditor, model: Any) -> Iterable[str]:
    """Add the columns, indexes and constraints that the table of a model lacks."""
    connection, table = editor.connection, model._meta.db_table
    with connection.cursor() as cursor:
        description = connection.introspection.get_table_description(cursor, table)
        constraints = connection.introspection.get_constraints(cursor, table)
    columns = {column.name for column in description}
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
    yield f"kept {table} for {model._meta.label}; added: {new}"


def _add_field(editor: BaseDatabaseSchemaEditor, model: Any, field: Any) -> None:
    editor.add_field(model, field)
    default = editor.effective_default(field)
    # The earlier service, which does not know the column, must still be able to add rows.
    if editor.connection.vendor == "postgresql" and field.column and default is not None:
        table, column = editor.quote_name(model._meta.db_table), editor.quote_name(field.column)
        value = editor.quote_value(default)
        editor.execute(f"ALTER TABLE {table} ALTER COLUMN {column} SET DEFAULT {value}")


def find_user_imports() -> list[str]:
    """Return where the service's own code imports ``auth.User``, if its users are of another model.

    Django reports such code only when it runs. Migrations use historical models.
    """
    if get_user_model()._meta.label == "auth.User":
        return []
    found = []
    base = Path(settings.BASE_DIR)
    folders = [Path(apps.get_app_config(label).path) for label in _own_labels() - {OPS}]
    for path in sorted({path for folder in folders for path in folder.rglob("*.py")}):
        if "migrations" in path.parts:
            continue
        found += [
            f"{path.relative_to(base)}:{node.lineno} imports User of django.contrib.auth.models; "
            "use get_user_model()"
            for node in ast.walk(ast.parse(path.read_bytes()))
            if isinstance(node, ast.ImportFrom)
            and node.module == "django.contrib.auth.models"
            and any(alias.name == "User" for alias in node.names)
        ]
    return found


def find_unconsumed_schedules() -> list[str]:
    """Return the schedules of the earlier service whose queue no worker of this one consumes."""
    rows = PeriodicTask.objects.exclude(queue=None).exclude(queue="")
    return [
        f"the schedule {row.name} uses the queue {row.queue}, which no worker consumes: add it to "
        "QUEUES in the settings, or clear the queue of the schedule in the admin"
        for row in rows.exclude(queue__in=queues.get_consumed()).order_by("name")
    ]


def copy_permissions() -> int:
    """Copy permissions for models of the earlier service to the same models of this service.

    The earlier models are ``auth.User`` and models of apps that are not installed. Returns the
    number of copied permissions.
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
