"""Schedules: migrations create them, administrators own them, ``check`` reports invalid ones."""

from datetime import timedelta
from types import SimpleNamespace

import pytest
from django.apps import apps
from django.core.management import CommandError, call_command
from django.db import connection, migrations
from django.db.migrations.exceptions import BadMigrationError
from django.db.migrations.loader import MigrationLoader
from django.db.migrations.state import ProjectState
from django_celery_beat.models import CrontabSchedule, PeriodicTask, PeriodicTasks

from prodserver_ops.console import checks
from prodserver_ops.management.commands import schedules as command
from prodserver_ops.scheduling.operations import (
    REQUIRED_MIGRATION,
    CreateSchedule,
    DeleteSchedule,
)

#: A task that every Celery app has.
TASK = "celery.backend_cleanup"

pytestmark = pytest.mark.django_db


@pytest.fixture
def no_other_schedules():
    """Delete the schedules of the service."""
    PeriodicTask.objects.all().delete()


def apply(operation, backwards=False):
    """Run a migration operation on the database as ``migrate`` does."""
    state = ProjectState.from_apps(apps)
    run = operation.database_backwards if backwards else operation.database_forwards
    run("ops", SimpleNamespace(connection=connection), state, state)


def names():
    return sorted(PeriodicTask.objects.values_list("name", flat=True))


@pytest.mark.usefixtures("no_other_schedules")
class TestCreateSchedule:
    def test_edits_of_an_administrator_are_kept(self):
        crontab = CrontabSchedule.objects.create(hour="5")
        PeriodicTask.objects.create(
            name="sample", task="other", enabled=False, args='["weekly"]', crontab=crontab
        )
        before = PeriodicTask.objects.values().get(name="sample")
        apply(CreateSchedule("sample", task=TASK, crontab="0 8 * * *"))
        assert PeriodicTask.objects.values().get(name="sample") == before

    def test_a_database_that_a_router_excludes_is_left_alone(self, settings):
        settings.DATABASE_ROUTERS = [SimpleNamespace(allow_migrate=lambda db, app, **hints: False)]
        apply(CreateSchedule("sample", task=TASK, crontab="*/5 * * * *"))
        assert names() == []
        settings.DATABASE_ROUTERS = []
        apply(CreateSchedule("sample", task=TASK, crontab="*/5 * * * *"))
        settings.DATABASE_ROUTERS = [SimpleNamespace(allow_migrate=lambda db, app, **hints: False)]
        apply(DeleteSchedule("sample", task=TASK, crontab="*/5 * * * *"))
        assert names() == ["sample"]

    def test_can_be_applied_and_reversed_twice(self):
        apply(CreateSchedule("other", task=TASK, crontab="*/5 * * * *"))
        operation = CreateSchedule("sample", task=TASK, crontab="*/5 * * * *")
        for _ in range(2):
            apply(operation)
            assert names() == ["other", "sample"]
        for _ in range(2):
            apply(operation, backwards=True)
            assert names() == ["other"]

    def test_interval_and_arguments_are_stored(self):
        apply(
            CreateSchedule(
                "sample",
                task=TASK,
                interval=timedelta(minutes=90),
                args=["a", 1],
                kwargs={"b": None},
            )
        )
        row = PeriodicTask.objects.get(name="sample")
        assert (row.interval.every, row.interval.period) == (90, "minutes")
        assert (row.args, row.kwargs) == ('["a", 1]', '{"b": null}')

    def test_crontab_is_stored(self):
        apply(CreateSchedule("sample", task=TASK, crontab="5 8 * * 1"))
        row = PeriodicTask.objects.get(name="sample")
        assert str(row.crontab).startswith("5 8 * * 1 ")

    def test_default_time_zone_is_that_of_the_service(self, settings):
        settings.TIME_ZONE = "Asia/Kathmandu"
        apply(CreateSchedule("sample", task=TASK, crontab="0 8 * * *"))
        row = PeriodicTask.objects.get(name="sample")
        assert str(row.crontab.timezone) == "Asia/Kathmandu"

    def test_time_zone_can_be_set(self):
        apply(CreateSchedule("sample", task=TASK, crontab="0 8 * * *", timezone="Asia/Tokyo"))
        row = PeriodicTask.objects.get(name="sample")
        assert str(row.crontab.timezone) == "Asia/Tokyo"

    def test_equal_crontabs_share_a_row(self):
        apply(CreateSchedule("one", task=TASK, crontab="7 7 * * *"))
        apply(CreateSchedule("two", task=TASK, crontab="7 7 * * *"))
        assert CrontabSchedule.objects.filter(minute="7", hour="7").count() == 1

    @pytest.mark.parametrize("backwards", [False, True])
    def test_running_beat_is_notified_at_once(self, backwards):
        operation = CreateSchedule("sample", task=TASK, crontab="0 8 * * *")
        if backwards:
            apply(operation)
        before = PeriodicTasks.last_change()
        apply(operation, backwards)
        assert PeriodicTasks.last_change() > before

    @pytest.mark.parametrize(
        ("timing", "problem"),
        [
            ({}, "needs either a crontab or an interval"),
            ({"crontab": "0 25 * * *"}, "has an invalid crontab '0 25 * * *'"),
            ({"crontab": "0 8 * *"}, "has an invalid crontab '0 8 * *': it has 4 fields"),
            ({"crontab": "0 8 31 2 *"}, "has an invalid crontab '0 8 31 2 *': "),
            ({"crontab": "0 8 * * *", "timezone": "Mars/Base"}, "unknown time zone 'Mars/Base'"),
            ({"interval": timedelta(0)}, "has an interval that is not positive"),
            ({"crontab": "0 8 * * *", "args": [object()]}, "has arguments that are not valid JSON"),
        ],
    )
    def test_invalid_schedule_is_refused_with_its_name(self, timing, problem):
        with pytest.raises(BadMigrationError, match=r"Schedule 'sample' ") as caught:
            apply(CreateSchedule("sample", task=TASK, **timing))
        assert problem in str(caught.value)
        assert names() == []


@pytest.mark.usefixtures("no_other_schedules")
class TestDeleteSchedule:
    def test_deletes_and_when_reversed_creates(self):
        operation = DeleteSchedule("sample", task=TASK, crontab="0 8 * * *")
        apply(operation, backwards=True)
        assert names() == ["sample"]
        apply(operation)
        assert names() == []


@pytest.mark.django_db(transaction=True, serialized_rollback=True)
def test_migration_that_seeds_a_schedule_can_be_reversed_and_applied_again():
    """A schedule of an administrator that uses the same interval is kept."""
    interval = PeriodicTask.objects.get(name="deliveries-resume").interval
    PeriodicTask.objects.create(name="sample", task=TASK, interval=interval)
    before = names()
    try:
        call_command("migrate", "ops", "0001", verbosity=0)
        assert "deliveries-resume" not in names()
        assert "sample" in names()
        for _ in range(2):
            call_command("migrate", verbosity=0)
            assert names() == before
    finally:
        call_command("migrate", verbosity=0)


class TestCheck:
    @pytest.fixture
    def report(self, monkeypatch):
        """Return a function that returns the errors with one more migration of these operations.

        The migration is in an app of its own.
        """

        def check(*operations, dependencies=(REQUIRED_MIGRATION,)):
            load_disk = MigrationLoader.load_disk

            def load(loader):
                load_disk(loader)
                migration = migrations.Migration("0001_sample", "another")
                migration.operations = [*operations]
                migration.dependencies = [*dependencies]
                loader.disk_migrations["another", "0001_sample"] = migration

            monkeypatch.setattr(MigrationLoader, "load_disk", load)
            return checks.check_schedules(None)

        return check

    def test_schedules_of_the_service_are_valid(self):
        assert checks.check_schedules(None) == []

    def test_valid_schedule_is_accepted(self, report):
        assert report(CreateSchedule("sample", task=TASK, crontab="0 8 * * *")) == []

    def test_task_that_is_not_registered_is_an_error_with_the_schedules_name(self, report):
        (error,) = report(CreateSchedule("sample", task="no.such.task", crontab="0 8 * * *"))
        assert (error.id, error.msg) == (
            "schedules.E001",
            "Schedule 'sample' has a task that is not registered: 'no.such.task'.",
        )

    def test_invalid_crontab_is_an_error_with_the_schedules_name(self, report):
        (error,) = report(CreateSchedule("sample", task=TASK, crontab="x"))
        assert error.msg.startswith("Schedule 'sample' has an invalid crontab 'x'")

    def test_task_of_a_deleted_schedule_may_be_gone(self, report):
        timing = {"task": "no.such.task", "crontab": "0 8 * * *"}
        operations = (CreateSchedule("sample", **timing), DeleteSchedule("sample", **timing))
        assert report(*operations) == []

    @pytest.mark.parametrize("operation", [CreateSchedule, DeleteSchedule])
    @pytest.mark.parametrize(
        "dependencies",
        [(), [("django_celery_beat", "0001_initial")], [("contenttypes", "__first__")]],
    )
    def test_missing_dependency_is_an_error_with_the_line_to_add(
        self, report, operation, dependencies
    ):
        schedule = operation("sample", task=TASK, crontab="0 8 * * *")
        (error,) = report(schedule, dependencies=dependencies)
        assert error.id == "schedules.E002"
        assert "another.0001_sample" in error.msg
        assert error.hint.endswith(' ("django_celery_beat", "0019_alter_periodictasks_options"),')

    def test_indirect_dependency_is_accepted(self, report):
        schedule = CreateSchedule("sample", task=TASK, crontab="0 8 * * *")
        assert report(schedule, dependencies=[("ops", "0002_seed_schedules")]) == []

    def test_migration_without_schedules_needs_no_dependency(self, report):
        assert report(migrations.RunPython(migrations.RunPython.noop), dependencies=()) == []

    def test_dependency_that_does_not_exist_is_an_error(self, report):
        (error,) = report(dependencies=[("another", "0000_missing")])
        assert error.id == "schedules.E003"
        assert "0000_missing" in error.msg


class TestCommand:
    @pytest.fixture
    def run(self, capsys):
        """Return a function that runs the command and returns the lines about one schedule."""

        def run(*arguments):
            call_command("schedules", *arguments)
            lines = capsys.readouterr().out.splitlines()
            return [line for line in lines if line.startswith("records-delete: ")]

        return run

    def test_schedule_as_its_migration_created_it(self, run):
        assert run() == ["records-delete: as created"]
        assert run("--missing") == []
        assert run("--restore", "records-delete") == ["records-delete: unchanged"]

    def test_deleted_schedule_is_listed_and_restored_once(self, run):
        before = PeriodicTask.objects.get(name="records-delete")
        before.delete()
        assert run("--missing") == ["records-delete: missing"]
        assert run("--restore", "records-delete") == ["records-delete: restored"]
        assert run("--restore", "records-delete") == ["records-delete: unchanged"]
        restored = PeriodicTask.objects.get(name="records-delete")
        assert (restored.task, restored.interval) == (before.task, before.interval)

    def test_edited_schedule_is_restored_only_if_told_to(self, run):
        task = PeriodicTask.objects.get(name="records-delete")
        task.args, task.enabled = "[1]", False
        task.save()
        edits = "edited: args is [1], disabled"
        assert run("--missing") == [f"records-delete: {edits}"]
        assert run("--restore", "records-delete") == [
            f"records-delete: not restored, {edits}; --overwrite reverts the edits"
        ]
        task.refresh_from_db()
        assert not task.enabled
        assert run("--restore", "records-delete", "--overwrite") == ["records-delete: restored"]
        assert run("--missing") == []

    def test_crontab_is_compared_too(self):
        operation = CreateSchedule("sample", task=TASK, crontab="0 8 * * 1", timezone="UTC")
        apply(operation)
        assert command.compare(operation) is None
        row = PeriodicTask.objects.get(name="sample")
        row.crontab.hour = "9"
        row.crontab.save()
        row.save()
        assert command.compare(operation) == "edited: hour is 9"

    def test_unknown_name_is_an_error(self, run):
        with pytest.raises(CommandError, match="no migration created 'nothing'; they created: "):
            run("--restore", "nothing")
