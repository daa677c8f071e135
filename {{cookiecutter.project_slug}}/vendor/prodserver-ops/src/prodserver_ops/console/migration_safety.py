"""Migrations that break the previous version of the service.

During a deploy, and after a rollback, the previous version runs on the new schema. An operation
breaks it if its INSERTs lack a new required column, or its queries use a column or table that no
longer exists.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from django.core import checks
from django.db import connections, migrations, models
from django.db.migrations.executor import MigrationExecutor
from django.db.migrations.operations.base import Operation
from django.db.migrations.state import ProjectState
from django.db.models.fields import NOT_PROVIDED
from django.db.utils import OperationalError

#: Set this attribute to True in a migration that the previous version is compatible with.
ATTRIBUTE = "old_version_works"


def find_messages(alias: str) -> list[checks.CheckMessage]:
    """Report unapplied migrations of a database that break the previous version.

    Runs with ``check --database default``, for example before each deploy. An app without applied
    migrations has no previous version.
    """
    try:
        executor = MigrationExecutor(connections[alias])
        plan = executor.migration_plan(executor.loader.graph.leaf_nodes())
    except OperationalError:
        return []
    messages: list[checks.CheckMessage] = []
    applied = {label for label, _ in executor.loader.applied_migrations}
    for migration, _ in plan:
        if migration.app_label not in applied or getattr(migration, ATTRIBUTE, False):
            continue
        state = executor.loader.project_state((migration.app_label, migration.name), False)
        messages += [
            checks.Warning(
                f"Migration {migration}: {problem}, which breaks the running version.",
                hint=f"{hint} See docs/deploy.md, or set {ATTRIBUTE} = True in the migration "
                "if that version is compatible with it.",
                obj=f"{migration}",
                id="migrations.W001",
            )
            for problem, hint in find_problems(migration.operations, migration.app_label, state)
        ]
    return messages


def find_problems(
    operations: Sequence[Operation], label: str, state: ProjectState
) -> Iterator[tuple[str, str]]:
    """Yield each problem for the previous version, and what to do instead.

    ``state`` is the state before the operations.
    """
    created: set[str] = set()
    for operation in operations:
        yield from _find_problem(operation, label, state, created)
        if isinstance(operation, migrations.CreateModel):
            created.add(operation.name_lower)
        operation.state_forwards(label, state)


def _find_problem(
    operation: Operation, label: str, state: ProjectState, created: set[str]
) -> Iterator[tuple[str, str]]:
    match operation:
        case migrations.SeparateDatabaseAndState():
            yield from find_problems(operation.database_operations, label, state.clone())
        case migrations.AddField() if operation.model_name_lower not in created:
            if _is_required(operation.field):
                yield (
                    f"the new field {operation.model_name}.{operation.name} is required",
                    "Give it a db_default, or null=True at first.",
                )
        case migrations.AlterField():
            model = state.models[label, operation.model_name_lower]
            before = model.fields[operation.name]
            if before.null and _is_required(operation.field):
                yield (
                    f"the field {operation.model_name}.{operation.name} becomes required",
                    "Deploy code that always sets it first, or give it a db_default.",
                )
        case migrations.RemoveField():
            yield (
                f"the field {operation.model_name}.{operation.name} is removed",
                "Remove it from the code in one deploy and from the table in the next.",
            )
        case migrations.RenameField():
            yield (
                f"the field {operation.model_name}.{operation.old_name} is renamed",
                "Keep the column with db_column.",
            )
        case migrations.RenameModel():
            yield f"the table of {operation.old_name} is renamed", "Keep the table with db_table."
        case migrations.DeleteModel():
            yield (
                f"the table of {operation.name} is deleted",
                "Remove the model from the code in one deploy and the table in the next.",
            )
        case migrations.AlterModelTable():
            yield f"the table of {operation.name} is renamed", "Keep the table with db_table."


def _is_required(field: "models.Field[Any, Any]") -> bool:
    """Return whether an INSERT without the field's column fails."""
    generated = isinstance(field, models.ManyToManyField | models.AutoField)
    return not (field.null or generated or field.db_default is not NOT_PROVIDED)
