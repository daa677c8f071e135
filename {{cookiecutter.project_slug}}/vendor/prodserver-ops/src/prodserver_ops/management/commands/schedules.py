"""``python manage.py schedules``: list, simulate and restore schedules."""

import json
import shutil
import time
from argparse import ArgumentParser, ArgumentTypeError
from collections.abc import Callable
from dataclasses import asdict
from datetime import datetime
from types import SimpleNamespace
from typing import Any

from django.apps import apps
from django.core.management import CommandError
from django.core.management.base import BaseCommand
from django.db import connection, transaction
from django.db.migrations.loader import MigrationLoader
from django.db.migrations.state import ProjectState
from django_celery_beat.models import PeriodicTask

from ...console import schedule_list
from ...scheduling.operations import CreateSchedule, DeleteSchedule, get_migrations
from ...scheduling.simulation import simulate

#: The longest simulation, in days.
MAX_DAYS = 3660

#: Seconds between two lines of progress.
PROGRESS = 2


class Command(BaseCommand):
    """List all schedules: when they run, the last run and its result, the next run or the problem.

    ``--simulate DAYS`` says what will run in the days from now on, and changes nothing.
    ``--created`` lists the schedules that migrations created, and whether they are as created;
    ``--missing`` those alone that were deleted or edited since. ``--restore NAME`` creates one that
    was deleted, as its migration does; with ``--overwrite`` it also reverts the edits of one that is
    there. Exits with status 1 for a name that no migration created.
    """

    help = "List all schedules, simulate their runs, or restore those that migrations created."

    def add_arguments(self, parser: ArgumentParser) -> None:
        """Add the options."""
        actions = parser.add_mutually_exclusive_group()
        actions.add_argument(
            "--simulate",
            type=parse_days,
            metavar="DAYS",
            help="Say what will run in the next days: overlaps, clock changes, worker slots.",
        )
        actions.add_argument(
            "--created", action="store_true", help="List those that migrations created."
        )
        actions.add_argument(
            "--missing", action="store_true", help="List only those that were deleted or edited."
        )
        actions.add_argument(
            "--restore", nargs="+", default=[], metavar="NAME", help="Create these again."
        )
        parser.add_argument(
            "--overwrite", action="store_true", help="Let --restore undo an administrator's edits."
        )
        parser.add_argument(
            "--json", action="store_true", help="Print the list or the simulation as JSON."
        )

    def handle(self, *args: Any, **options: Any) -> None:
        """List, simulate or restore schedules."""
        if options["created"] or options["missing"] or options["restore"]:
            return self.handle_created(options)
        # Lines for a terminal must not wrap.
        width = shutil.get_terminal_size().columns if self.stdout.isatty() else None
        if options["simulate"]:
            report = simulate(options["simulate"], self.make_progress())
            values: Any = asdict(report)
            lines = schedule_list.format_report(report, width)
        else:
            values = schedule_list.list_schedules()
            lines = schedule_list.format_list(values, width)
        if options["json"]:
            lines = iter([json.dumps(values, indent=2, default=datetime.isoformat)])
        for line in lines:
            self.stdout.write(line)

    def make_progress(self) -> Callable[[str], None]:
        """Return a function that prints the progress every two seconds."""
        written_at = time.monotonic()

        def write(text: str) -> None:
            nonlocal written_at
            if (now := time.monotonic()) - written_at >= PROGRESS:
                written_at = now
                self.stderr.write(text, self.style.NOTICE)

        return write

    def handle_created(self, options: dict[str, Any]) -> None:
        """List or restore the schedules that migrations created."""
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


def parse_days(text: str) -> int:
    """Return the number of days of a simulation."""
    if not text.isdecimal() or not 1 <= int(text) <= MAX_DAYS:
        raise ArgumentTypeError(f"must be a number from 1 to {MAX_DAYS}")
    return int(text)


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
