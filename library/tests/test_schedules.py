"""Schedules: migrations create them, administrators own them, ``check`` reports invalid ones."""

import json
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace

import pytest
from django.apps import apps
from django.core.management import CommandError, call_command
from django.db import connection, migrations
from django.db.migrations.exceptions import BadMigrationError
from django.db.migrations.loader import MigrationLoader
from django.db.migrations.state import ProjectState
from django_celery_beat.models import (
    CrontabSchedule,
    IntervalSchedule,
    PeriodicTask,
    PeriodicTasks,
)

from prodserver_ops.console import checks, schedule_list
from prodserver_ops.management.commands import schedules as command
from prodserver_ops.models import TaskRun
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
            (
                {"crontab": "0 8 * *"},
                "has an invalid crontab '0 8 * *': expected five fields, got 4",
            ),
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
        assert run("--created") == ["records-delete: as created"]
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


@pytest.mark.usefixtures("no_other_schedules")
class TestList:
    @pytest.fixture
    def rows(self, no_other_schedules):
        """A schedule that failed, one that has not run, one that cannot, and one that is off."""
        ran = datetime(2026, 3, 4, 5, 6, 7, tzinfo=UTC)
        daily = CrontabSchedule.objects.create(minute="0", hour="8", timezone="UTC")
        hourly = IntervalSchedule.objects.create(every=1, period="hours")
        create = PeriodicTask.objects.create
        failed = create(name="failed", task=TASK, crontab=daily, last_run_at=ran)
        for status, number in (("succeeded", 1), ("failed", 2)):
            started = ran + timedelta(seconds=number)
            TaskRun.objects.create(schedule=failed, name=TASK, started_at=started, status=status)
        create(name="new", task=TASK, interval=hourly)
        create(name="faulty", task="no.such.task", interval=hourly)
        create(name="disabled", task=TASK, interval=hourly, last_run_at=ran)
        PeriodicTask.objects.filter(name="disabled").update(enabled=False)

    @pytest.fixture
    def list_json(self, rows, capsys):
        """Return a function that returns what the command lists, by name."""

        def run():
            call_command("schedules", "--json")
            return {each["name"]: each for each in json.loads(capsys.readouterr().out)}

        return run

    def test_last_run_with_its_result(self, list_json, settings):
        settings.TIME_ZONE = "UTC"
        listed = list_json()
        assert {name: (each["last_run"], each["result"]) for name, each in listed.items()} == {
            "failed": ("2026-03-04T05:06:09+00:00", "failed"),
            "new": (None, None),
            "faulty": (None, None),
            # The record does not have its run.
            "disabled": ("2026-03-04T05:06:07+00:00", None),
        }

    def test_next_run_problem_and_whether_it_is_off(self, list_json):
        listed = list_json()
        assert {name: (each["enabled"], each["problem"]) for name, each in listed.items()} == {
            "failed": (True, None),
            "new": (True, None),
            "faulty": (True, "its task does not exist: no.such.task"),
            "disabled": (False, None),
        }
        next_run = datetime.fromisoformat(listed["new"]["next_run"])
        assert timedelta(minutes=59) < next_run - datetime.now(UTC) < timedelta(minutes=61)
        assert listed["disabled"]["next_run"] is None
        assert listed["failed"]["timing"] == "At 08:00 AM UTC"

    @pytest.mark.usefixtures("rows")
    def test_columns_are_aligned(self, capsys, settings):
        call_command("schedules")
        header, *lines, last = capsys.readouterr().out.splitlines()
        position = header.index("NEXT RUN")
        ends = {line.split()[0]: line[position:] for line in lines}
        assert ends["disabled"] == "off"
        assert ends["faulty"] == "cannot run: its task does not exist: no.such.task"
        assert all(line[position - 1] == " " != line[position] for line in lines)
        assert last == f"4 schedules, 1 off, 1 cannot run; times in {settings.TIME_ZONE}"

    @pytest.mark.usefixtures("rows")
    @pytest.mark.parametrize("width", [80, 100, 120])
    def test_lines_fit_a_terminal(self, width):
        hourly = IntervalSchedule.objects.create(every=2, period="hours")
        PeriodicTask.objects.create(name="x" * 200, task="a.b\nc" * 30, interval=hourly)
        lines = list(schedule_list.format_list(schedule_list.list_schedules(), width))
        assert max(map(len, lines)) <= width
        assert not any("\n" in line for line in lines)

    def test_timing_that_cannot_be_read(self, list_json):
        crontab = CrontabSchedule.objects.create(minute="*/0", timezone="UTC")
        PeriodicTask.objects.create(name="odd", task=TASK, crontab=crontab)
        assert list_json()["odd"]["problem"]

    def test_number_of_queries_does_not_grow(self, rows, django_assert_num_queries):
        with django_assert_num_queries(1):
            schedule_list.list_schedules()
