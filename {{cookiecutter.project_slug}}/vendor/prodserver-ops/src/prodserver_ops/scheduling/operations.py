"""Migration operations for schedules. Once created, administrators own the schedules.

To add a schedule, add a migration::

    from datetime import timedelta

    from django.db import migrations

    from prodserver_ops.scheduling.operations import CreateSchedule


    class Migration(migrations.Migration):
        dependencies = [
            ("example", "0002_last_migration"),
            ("django_celery_beat", "0019_alter_periodictasks_options"),
        ]

        operations = [
            CreateSchedule(
                "sessions-clear",
                task="example.tasks.clear_sessions",
                interval=timedelta(hours=1),
            ),
        ]

The migration creates a row if no schedule has that name, and never changes it afterwards.
``python manage.py check`` reports schedules that cannot run.
"""

import json
from collections.abc import Iterable, Iterator
from datetime import timedelta
from typing import Any
from zoneinfo import ZoneInfo

from django.conf import settings
from django.db import models
from django.db.backends.base.schema import BaseDatabaseSchemaEditor
from django.db.migrations.exceptions import BadMigrationError
from django.db.migrations.loader import MigrationLoader
from django.db.migrations.migration import Migration
from django.db.migrations.operations.base import Operation
from django.db.migrations.state import ProjectState
from django.utils import timezone as clock

from . import crontabs

#: The migration on which migrations of schedules must depend.
REQUIRED_MIGRATION = ("django_celery_beat", "0019_alter_periodictasks_options")

APP_LABEL = REQUIRED_MIGRATION[0]

#: The units of an interval, the largest first.
INTERVAL_UNITS = {
    "days": timedelta(days=1),
    "hours": timedelta(hours=1),
    "minutes": timedelta(minutes=1),
    "seconds": timedelta(seconds=1),
    "microseconds": timedelta(microseconds=1),
}


def get_migrations(loader: MigrationLoader) -> Iterator[tuple[tuple[str, str], Migration]]:
    """Yield keys and migrations in the order in which they run on a new database."""
    graph = loader.graph
    plan = dict.fromkeys(key for leaf in graph.leaf_nodes() for key in graph.forwards_plan(leaf))
    for key in plan:
        yield key, graph.nodes[key]


class CreateSchedule(Operation):
    """Migration operation: create a schedule unless one with that name exists.

    name
        Unique name of the schedule, as the admin shows it.
    task
        Name of a registered task, such as ``"example.tasks.clear_sessions"``.
    crontab
        When to run: five fields as in crontab(5), such as ``"0 8 * * 1"``.
    interval
        Or how often to run: a ``timedelta``. Pass either this or ``crontab``.
    timezone
        IANA name of the crontab's time zone; default ``TIME_ZONE``.
    args, kwargs
        The task's arguments, serializable as JSON.

    Reversed, it deletes the schedule with that name. ``migrate`` raises BadMigrationError
    for an invalid crontab, interval, time zone or argument.
    """

    reduces_to_sql = False
    reversible = True

    def __init__(
        self,
        name: str,
        *,
        task: str,
        crontab: str | None = None,
        interval: timedelta | None = None,
        timezone: str | None = None,
        args: Iterable[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> None:
        self.name = name
        self.task = task
        self.crontab = crontab
        self.interval = interval
        self.timezone = timezone or settings.TIME_ZONE
        self.args = list(args)
        self.kwargs = kwargs or {}

    def describe(self) -> str:
        """Return what ``migrate --plan`` shows."""
        return f"Create schedule {self.name}"

    @property
    def migration_name_fragment(self) -> str:
        """Part of the name of a generated migration."""
        return f"schedule_{self.name.replace('-', '_')}"

    def get_problems(self) -> list[str]:
        """Return a sentence for each problem, with the schedule's name."""
        problems = []
        if (self.crontab is None) == (self.interval is None):
            problems.append("needs either a crontab or an interval")
        if self.crontab is not None:
            try:
                crontabs.parse(*self.crontab.split())
            except ValueError as error:
                problems.append(f"has an invalid crontab {self.crontab!r}: {error}")
        if self.interval is not None and self.interval <= timedelta(0):
            problems.append(f"has an interval that is not positive: {self.interval}")
        try:
            ZoneInfo(self.timezone)
        except Exception:
            problems.append(f"has an unknown time zone {self.timezone!r}")
        try:
            json.dumps([self.args, self.kwargs])
        except TypeError as error:
            problems.append(f"has arguments that are not valid JSON: {error}")
        return [f"Schedule {self.name!r} {problem}." for problem in problems]

    def state_forwards(self, app_label: str, state: ProjectState) -> None:
        """Change no models."""

    def database_forwards(
        self,
        app_label: str,
        schema_editor: BaseDatabaseSchemaEditor,
        from_state: ProjectState,
        to_state: ProjectState,
    ) -> None:
        """Create the schedule unless one with this name exists."""
        if not self._is_allowed(from_state, schema_editor):
            return
        if problems := self.get_problems():
            raise BadMigrationError(" ".join(problems))
        tasks = self._get_manager("PeriodicTask", from_state, schema_editor)
        if tasks.filter(name=self.name).exists():
            return
        tasks.create(
            name=self.name,
            task=self.task,
            args=json.dumps(self.args),
            kwargs=json.dumps(self.kwargs),
            **self._get_timing(from_state, schema_editor),
        )
        self._notify_beat(from_state, schema_editor)

    def database_backwards(
        self,
        app_label: str,
        schema_editor: BaseDatabaseSchemaEditor,
        from_state: ProjectState,
        to_state: ProjectState,
    ) -> None:
        """Delete the schedule with this name."""
        if not self._is_allowed(from_state, schema_editor):
            return
        tasks = self._get_manager("PeriodicTask", from_state, schema_editor)
        tasks.filter(name=self.name).delete()
        self._notify_beat(from_state, schema_editor)

    def _is_allowed(self, state: ProjectState, schema_editor: BaseDatabaseSchemaEditor) -> bool:
        """Return whether the database routers keep schedules in this database."""
        model = state.apps.get_model(APP_LABEL, "PeriodicTask")
        return self.allow_migrate_model(schema_editor.connection.alias, model)

    def _get_manager(
        self, model: str, state: ProjectState, schema_editor: BaseDatabaseSchemaEditor
    ) -> models.Manager[Any]:
        manager: models.Manager[Any] = state.apps.get_model(APP_LABEL, model)._default_manager
        return manager.db_manager(schema_editor.connection.alias)

    def _get_timing(
        self, state: ProjectState, schema_editor: BaseDatabaseSchemaEditor
    ) -> dict[str, models.Model]:
        """Return the crontab or interval as a field of the task; reuse an existing row."""
        if self.crontab is not None:
            field, model = "crontab", "CrontabSchedule"
        else:
            field, model = "interval", "IntervalSchedule"
        values = self.get_timing_values()
        rows = self._get_manager(model, state, schema_editor)
        return {field: rows.filter(**values).first() or rows.create(**values)}

    def get_timing_values(self) -> dict[str, Any]:
        """Return the fields of the crontab or interval, by name."""
        if self.crontab is not None:
            values: dict[str, Any] = dict(zip(crontabs.FIELDS, self.crontab.split(), strict=True))
            return values | {"timezone": ZoneInfo(self.timezone)}
        assert self.interval is not None
        period, unit = next(
            (period, unit) for period, unit in INTERVAL_UNITS.items() if not self.interval % unit
        )
        return {"every": self.interval // unit, "period": period}

    def _notify_beat(self, state: ProjectState, schema_editor: BaseDatabaseSchemaEditor) -> None:
        # Beat reads the rows again when this changes; historical models send no signals.
        self._get_manager("PeriodicTasks", state, schema_editor).update_or_create(
            ident=1, defaults={"last_update": clock.now()}
        )


class DeleteSchedule(CreateSchedule):
    """Migration operation: delete a schedule. Reversed, it creates the schedule."""

    database_forwards = CreateSchedule.database_backwards
    database_backwards = CreateSchedule.database_forwards

    def describe(self) -> str:
        """Return what ``migrate --plan`` shows."""
        return f"Delete schedule {self.name}"
