"""``python manage.py schedules``: compare the schedules with those of the migrations."""

import json
from argparse import ArgumentParser
from types import SimpleNamespace
from typing import Any

from django.apps import apps
from django.core.management import CommandError
from django.core.management.base import BaseCommand
from django.db import connection, transaction
from django.db.migrations.loader import MigrationLoader
from django.db.migrations.state import ProjectState
from django_celery_beat.models import PeriodicTask

from ...scheduling.operations import CreateSchedule, DeleteSchedule, get_migrations


class Command(BaseCommand):
    """List the schedules that migrations have created, and whether they are unchanged.

    ``--missing`` lists only schedules that were deleted or edited. ``--restore NAME`` creates a
    deleted schedule again, as in its migration; with ``--overwrite``, it also reverts the edits of
    an existing schedule. Exits with status 1 for a name that no migration has created.
    """

    help = "Compare the schedules with those that migrations created, and restore deleted ones."

    def add_arguments(self, parser: ArgumentParser) -> None:
        """Add ``--missing``, ``--restore`` and ``--overwrite``."""
        parser.add_argument(
            "--missing", action="store_true", help="List only deleted or edited schedules."
        )
        parser.add_argument(
            "--restore", nargs="+", default=[], metavar="NAME", help="Create these schedules again."
        )
        parser.add_argument(
            "--overwrite", action="store_true", help="Let --restore revert edits of administrators."
        )

    def handle(self, *args: Any, **options: Any) -> None:
        """List or restore schedules."""
        created = get_created()
        for name in options["restore"]:
            if name not in created:
                known = ", ".join(created)
                raise CommandError(f"no migration created {name!r}; they created: {known}")
        for name in options["restore"]:
            self.stdout.write(f"{name}: {restore(created[name], options['overwrite'])}")
        if options["restore"]:
            return
        for name, operation in created.items():
            difference = compare(operation)
            if difference or not options["missing"]:
                self.stdout.write(f"{name}: {difference or 'as created'}")


def get_created() -> dict[str, CreateSchedule]:
    """Return the schedules that migrations create and do not delete later, by name."""
    created: dict[str, CreateSchedule] = {}
    for _, migration in get_migrations(MigrationLoader(None)):
        for operation in migration.operations:
            if isinstance(operation, DeleteSchedule):
                created.pop(operation.name, None)
            elif isinstance(operation, CreateSchedule):
                created[operation.name] = operation
    return created


def compare(operation: CreateSchedule) -> str | None:
    """Return ``missing``, or how the schedule differs from what its migration creates."""
    rows = PeriodicTask.objects.select_related("crontab", "interval")
    row = rows.filter(name=operation.name).first()
    if row is None:
        return "missing"
    expected = {
        "task": operation.task,
        "args": operation.args,
        "kwargs": operation.kwargs,
        **operation.get_timing_values(),
    }
    timing = row.crontab or row.interval
    found = {
        "task": row.task,
        "args": json.loads(row.args),
        "kwargs": json.loads(row.kwargs),
        **{name: getattr(timing, name, None) for name in operation.get_timing_values()},
    }
    changes = [f"{name} is {found[name]}" for name in expected if found[name] != expected[name]]
    if not row.enabled:
        changes.append("disabled")
    return f"edited: {', '.join(changes)}" if changes else None


def restore(operation: CreateSchedule, overwrite: bool) -> str:
    """Create a schedule again; return what was done."""
    difference = compare(operation)
    if difference is None:
        return "unchanged"
    if difference != "missing" and not overwrite:
        return f"not restored, {difference}; --overwrite reverts the edits"
    state = ProjectState.from_apps(apps)
    editor: Any = SimpleNamespace(connection=connection)
    with transaction.atomic():
        PeriodicTask.objects.filter(name=operation.name).delete()
        operation.database_forwards("ops", editor, state, state)
    return "restored"
