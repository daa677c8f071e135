"""Schedules that a migration puts into the database, where an administrator owns them.

A new schedule is a new migration that depends on the last one and says::

    operations = [
        CreateSchedule(
            "submissions-expire",
            task="{{ cookiecutter.project_slug }}.tasks.expire_submissions",
            interval=timedelta(minutes=5),
        ),
    ]

The row belongs to the administrator from then on: it is created where no
schedule has its name, and never touched again.
"""

import json
from datetime import timedelta
from zoneinfo import ZoneInfo

from celery.schedules import crontab as parse_crontab
from django.conf import settings
from django.core import checks
from django.db.migrations.exceptions import BadMigrationError
from django.db.migrations.loader import MigrationLoader
from django.db.migrations.operations.base import Operation
from django.utils import timezone as clock

from .celery import app

APP_LABEL = "django_celery_beat"
CRONTAB_FIELDS = ("minute", "hour", "day_of_month", "month_of_year", "day_of_week")

#: The units that an interval can be counted in, the largest first.
INTERVAL_UNITS = {
    "days": timedelta(days=1),
    "hours": timedelta(hours=1),
    "minutes": timedelta(minutes=1),
    "seconds": timedelta(seconds=1),
    "microseconds": timedelta(microseconds=1),
}


class CreateSchedule(Operation):
    """Migration operation: create a schedule, unless one of that name exists.

    name
        Unique name of the schedule, as the admin shows it.
    task
        Name of a registered task, such as ``"{{ cookiecutter.project_slug }}.tasks.send_user_digest"``.
    crontab
        When to run: five fields as in crontab(5), such as ``"0 8 * * 1"``.
    interval
        Or how often to run: a ``timedelta``. Give one of the two.
    timezone
        IANA name of the time zone that the crontab is read in; ``TIME_ZONE`` by default.
    args, kwargs
        What the task is called with, as JSON can hold it.

    Reversed, it deletes the schedule of that name. What is wrong with a schedule is
    reported by ``check``; ``migrate`` runs that first, and raises BadMigrationError
    by itself for a bad crontab, interval, time zone or argument.
    """

    reduces_to_sql = False
    reversible = True

    def __init__(
        self, name, *, task, crontab=None, interval=None, timezone=None, args=(), kwargs=None
    ):
        self.name = name
        self.task = task
        self.crontab = crontab
        self.interval = interval
        self.timezone = timezone or settings.TIME_ZONE
        self.args = list(args)
        self.kwargs = kwargs or {}

    def describe(self):
        return f"Create schedule {self.name}"

    @property
    def migration_name_fragment(self):
        return f"schedule_{self.name.replace('-', '_')}"

    def problems(self):
        """Return a list of sentences that say what is wrong, each with the schedule's name."""
        wrong = []
        if (self.crontab is None) == (self.interval is None):
            wrong.append("needs either a crontab or an interval")
        if self.crontab is not None:
            try:
                parse_crontab.from_string(self.crontab)
            except Exception as error:
                wrong.append(f"has a bad crontab {self.crontab!r}: {error}")
        if self.interval is not None and self.interval <= timedelta(0):
            wrong.append(f"has an interval that is not positive: {self.interval}")
        try:
            ZoneInfo(self.timezone)
        except Exception:
            wrong.append(f"has an unknown time zone {self.timezone!r}")
        try:
            json.dumps([self.args, self.kwargs])
        except TypeError as error:
            wrong.append(f"has arguments that JSON cannot hold: {error}")
        return [f"Schedule {self.name!r} {sentence}." for sentence in wrong]

    def state_forwards(self, app_label, state):
        pass

    def database_forwards(self, app_label, schema_editor, from_state, to_state):
        if problems := self.problems():
            raise BadMigrationError(" ".join(problems))
        tasks = self._objects("PeriodicTask", from_state, schema_editor)
        if tasks.filter(name=self.name).exists():
            return
        tasks.create(
            name=self.name,
            task=self.task,
            args=json.dumps(self.args),
            kwargs=json.dumps(self.kwargs),
            **self._timing(from_state, schema_editor),
        )
        self._tell_beat(from_state, schema_editor)

    def database_backwards(self, app_label, schema_editor, from_state, to_state):
        self._objects("PeriodicTask", from_state, schema_editor).filter(name=self.name).delete()
        self._tell_beat(from_state, schema_editor)

    def _objects(self, model, state, schema_editor):
        manager = state.apps.get_model(APP_LABEL, model)._default_manager
        return manager.using(schema_editor.connection.alias)

    def _timing(self, state, schema_editor):
        """Return the crontab or interval as a field of the task, shared where one exists."""
        if self.crontab is not None:
            field, model = "crontab", "CrontabSchedule"
            values = dict(zip(CRONTAB_FIELDS, self.crontab.split(), strict=True))
            values["timezone"] = ZoneInfo(self.timezone)
        else:
            field, model = "interval", "IntervalSchedule"
            period, unit = next(
                (period, unit)
                for period, unit in INTERVAL_UNITS.items()
                if not self.interval % unit
            )
            values = {"every": self.interval // unit, "period": period}
        objects = self._objects(model, state, schema_editor)
        return {field: objects.filter(**values).first() or objects.create(**values)}

    def _tell_beat(self, state, schema_editor):
        # Historical models send no signals, and beat reads the rows when this changes.
        self._objects("PeriodicTasks", state, schema_editor).update_or_create(
            ident=1, defaults={"last_update": clock.now()}
        )


class DeleteSchedule(CreateSchedule):
    """Migration operation: delete a schedule; reversed, create it as described."""

    def describe(self):
        return f"Delete schedule {self.name}"

    database_forwards = CreateSchedule.database_backwards
    database_backwards = CreateSchedule.database_forwards


@checks.register
def check_schedules(app_configs, **kwargs):
    """System check: report what is wrong with the schedules that the migrations leave."""
    app.autodiscover_tasks(force=True)
    loader = MigrationLoader(None, load=False)
    loader.load_disk()
    schedules = {
        operation.name: (operation, ".".join(key))
        for key, migration in sorted(loader.disk_migrations.items())
        for operation in migration.operations
        if isinstance(operation, CreateSchedule)
    }
    errors = []
    for operation, migration in schedules.values():
        problems = operation.problems()
        # A schedule that is deleted in the end may name a task that is gone.
        if operation.task not in app.tasks and not isinstance(operation, DeleteSchedule):
            problems.append(
                f"Schedule {operation.name!r} names a task that is not registered: "
                f"{operation.task!r}."
            )
        errors += [
            checks.Error(problem, obj=migration, id="schedules.E001") for problem in problems
        ]
    return errors
