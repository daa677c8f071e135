"""Schedules: migrations create them, the administrator owns them."""

from datetime import timedelta
from types import SimpleNamespace

import pytest
from django.apps import apps
from django.core.management import call_command
from django.db import connection
from django.db.migrations.exceptions import BadMigrationError
from django.db.migrations.state import ProjectState
from django_celery_beat.models import CrontabSchedule, PeriodicTask, PeriodicTasks

from {{ cookiecutter.project_slug }} import schedules
from {{ cookiecutter.project_slug }}.schedules import CreateSchedule, DeleteSchedule

TASK = "{{ cookiecutter.project_slug }}.tasks.send_moderator_digest"
SEEDED = ["moderator-digest-hourly", "user-digest-daily", "user-digest-weekly"]
ALL = ["deliveries-resume", *SEEDED]

pytestmark = pytest.mark.django_db


def apply(operation, backwards=False):
    """Run a migration operation on the database as ``migrate`` does."""
    state = ProjectState.from_apps(apps)
    run = operation.database_backwards if backwards else operation.database_forwards
    run("{{ cookiecutter.project_slug }}", SimpleNamespace(connection=connection), state, state)


def names():
    return sorted(PeriodicTask.objects.values_list("name", flat=True))


class TestSeededSchedules:
    def test_are_in_a_new_database(self):
        rows = PeriodicTask.objects.filter(name__in=SEEDED).order_by("name")
        assert [
            (row.name, row.task.rpartition(".")[2], row.args, str(row.crontab).split(" (")[0])
            for row in rows
        ] == [
            ("moderator-digest-hourly", "send_moderator_digest", "[]", "0 * * * *"),
            ("user-digest-daily", "send_user_digest", '["daily"]', "0 8 * * *"),
            ("user-digest-weekly", "send_user_digest", '["weekly"]', "0 8 * * 1"),
        ]

    def test_run_in_the_time_zone_of_the_service(self, settings):
        zones = CrontabSchedule.objects.filter(periodictask__name__in=SEEDED)
        assert {str(row.timezone) for row in zones} == {settings.TIME_ZONE}

    def test_have_tasks_that_exist(self):
        assert schedules.check_schedules(None) == []


@pytest.mark.django_db(transaction=True, serialized_rollback=True)
def test_the_seeds_can_be_taken_back_and_brought_again():
    """A schedule of the administrator's own, on a crontab of the seeds, stays."""
    crontab = PeriodicTask.objects.get(name="user-digest-daily").crontab
    PeriodicTask.objects.create(name="mine", task=TASK, crontab=crontab)
    try:
        for _ in range(2):
            call_command("migrate", "{{ cookiecutter.project_slug }}", "0001", verbosity=0)
            assert names() == ["mine"]
        for _ in range(2):
            call_command("migrate", verbosity=0)
            assert names() == sorted([*ALL, "mine"])
    finally:
        call_command("migrate", verbosity=0)
        PeriodicTask.objects.filter(name="mine").delete()


class TestCreateSchedule:
    def test_leaves_the_administrators_edits_alone(self):
        PeriodicTask.objects.filter(name="user-digest-daily").update(
            enabled=False, args='["weekly"]', crontab=CrontabSchedule.objects.create(hour="5")
        )
        before = PeriodicTask.objects.values().get(name="user-digest-daily")
        apply(CreateSchedule("user-digest-daily", task=TASK, crontab="0 8 * * *"))
        assert PeriodicTask.objects.values().get(name="user-digest-daily") == before

    def test_can_be_applied_and_reversed_twice(self):
        operation = CreateSchedule("new", task=TASK, crontab="*/5 * * * *")
        for _ in range(2):
            apply(operation)
            assert names() == sorted([*ALL, "new"])
        for _ in range(2):
            apply(operation, backwards=True)
            assert names() == ALL

    def test_takes_an_interval_and_arguments(self):
        apply(
            CreateSchedule(
                "new",
                task=TASK,
                interval=timedelta(minutes=90),
                args=["a", 1],
                kwargs={"b": None},
            )
        )
        row = PeriodicTask.objects.get(name="new")
        assert (row.interval.every, row.interval.period) == (90, "minutes")
        assert (row.args, row.kwargs) == ('["a", 1]', '{"b": null}')

    def test_takes_a_time_zone_of_its_own(self):
        apply(CreateSchedule("new", task=TASK, crontab="0 8 * * *", timezone="Asia/Tokyo"))
        assert str(PeriodicTask.objects.get(name="new").crontab.timezone) == "Asia/Tokyo"

    def test_shares_a_crontab_that_exists(self):
        apply(CreateSchedule("one", task=TASK, crontab="7 7 * * *"))
        apply(CreateSchedule("two", task=TASK, crontab="7 7 * * *"))
        assert CrontabSchedule.objects.filter(minute="7").count() == 1

    @pytest.mark.parametrize("backwards", [False, True])
    def test_tells_a_running_beat_at_once(self, backwards):
        operation = CreateSchedule("new", task=TASK, crontab="0 8 * * *")
        if backwards:
            apply(operation)
        before = PeriodicTasks.last_change()
        apply(operation, backwards)
        assert PeriodicTasks.last_change() > before

    @pytest.mark.parametrize(
        ("timing", "problem"),
        [
            ({}, "needs either a crontab or an interval"),
            ({"crontab": "0 25 * * *"}, "has a bad crontab '0 25 * * *'"),
            ({"crontab": "0 8 * *"}, "has a bad crontab '0 8 * *'"),
            ({"crontab": "0 8 * * *", "timezone": "Mars/Base"}, "unknown time zone 'Mars/Base'"),
            ({"interval": timedelta(0)}, "has an interval that is not positive"),
            ({"crontab": "0 8 * * *", "args": [object()]}, "has arguments that JSON cannot hold"),
        ],
    )
    def test_refuses_what_cannot_run_and_names_the_schedule(self, timing, problem):
        with pytest.raises(BadMigrationError, match=r"Schedule 'broken' ") as caught:
            apply(CreateSchedule("broken", task=TASK, **timing))
        assert problem in str(caught.value)
        assert names() == ALL


class TestDeleteSchedule:
    def test_deletes_and_when_reversed_creates(self):
        operation = DeleteSchedule("user-digest-daily", task=TASK, crontab="0 8 * * *")
        apply(operation)
        assert "user-digest-daily" not in names()
        apply(operation, backwards=True)
        assert "user-digest-daily" in names()


class TestCheck:
    @pytest.fixture
    def report(self, monkeypatch):
        """Return what the check says when the last migration ends with these operations."""

        def check(*operations):
            def load(loader):
                migration = type("Migration", (), {"operations": operations})
                loader.disk_migrations = {("app", "0001_first"): migration}

            monkeypatch.setattr(schedules.MigrationLoader, "load_disk", load)
            return [error.msg for error in schedules.check_schedules(None)]

        return check

    def test_names_the_schedule_whose_task_is_not_registered(self, report):
        operation = CreateSchedule("lost", task="no.such.task", crontab="0 8 * * *")
        assert report(operation) == [
            "Schedule 'lost' names a task that is not registered: 'no.such.task'."
        ]

    def test_names_the_schedule_whose_crontab_is_bad(self, report):
        (message,) = report(CreateSchedule("odd", task=TASK, crontab="x"))
        assert message.startswith("Schedule 'odd' has a bad crontab 'x'")

    def test_allows_a_deleted_schedule_to_name_a_task_that_is_gone(self, report):
        timing = {"task": "no.such.task", "crontab": "0 8 * * *"}
        assert report(CreateSchedule("old", **timing), DeleteSchedule("old", **timing)) == []
