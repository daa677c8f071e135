"""The doctor: says what is well, what is not, and which command comes next, in time."""

import json
import socket
import time
from datetime import datetime, timedelta

import pytest
import time_machine
from celery.contrib.testing.worker import start_worker
from django.core.management import call_command
from django.db import connection
from django.db.migrations.recorder import MigrationRecorder
from django.utils import timezone
from django_celery_beat.models import CrontabSchedule, IntervalSchedule, PeriodicTask

from {{ cookiecutter.project_slug }} import celery_app, doctor
from {{ cookiecutter.project_slug }}.doctor import BROKEN, OK, UNKNOWN, Finding
from {{ cookiecutter.project_slug }}.management.commands import doctor as command

TASK = "{{ cookiecutter.project_slug }}.tasks.send_moderator_digest"


@pytest.fixture
def silent_server():
    """The port of a server that takes connections, and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


class TestTheCommand:
    @pytest.fixture
    def run(self, monkeypatch, capsys):
        """Run the command with these findings; return its exit status and what it printed."""

        def run(*arguments, **findings):
            found = dict.fromkeys(doctor.CHECKS, Finding("fine")) | findings
            monkeypatch.setattr(command, "examine", found.copy)
            try:
                call_command("doctor", *arguments)
            except SystemExit as end:
                return end.code, capsys.readouterr().out
            return 0, capsys.readouterr().out

        return run

    def test_says_in_a_line_for_each_part_that_all_is_well(self, run):
        status, said = run()
        assert status == 0
        assert [line.split() for line in said.splitlines()] == [
            [name, "ok", "fine"]
            for name in (
                "database",
                "migrations",
                "broker",
                "worker",
                "beat",
                "schedules",
                "e-mail",
            )
        ]

    @pytest.mark.parametrize("state", [BROKEN, UNKNOWN])
    def test_ends_with_status_1_if_anything_is_not_well(self, run, state):
        assert run(worker=Finding("none answers", state))[0] == 1

    def test_gives_the_command_to_run_next(self, run):
        _, said = run(worker=Finding("none answers", BROKEN, "python manage.py prodserver worker"))
        assert [line.split(maxsplit=2) for line in said.splitlines()[3:5]] == [
            ["worker", "broken", "none answers"],
            ["run", "python", "manage.py prodserver worker"],
        ]

    def test_tells_the_next_run_of_each_schedule_or_its_problem(self, run):
        schedules = [
            {"name": "good", "next_run": datetime(2026, 1, 2, 8, 0), "problem": None, "next": None},
            {"name": "bad", "next_run": None, "problem": "it has no task", "next": "do something"},
        ]
        _, said = run(schedules=Finding("2 on", BROKEN, schedules=schedules))
        assert [line.strip() for line in said.splitlines()[6:9]] == [
            "good: Fri 02 Jan 08:00:00",
            "bad: it has no task",
            "run      do something",
        ]

    def test_prints_the_same_as_json(self, run):
        status, said = run("--json", beat=Finding("none answers", BROKEN, "do something"))
        report = json.loads(said)
        assert status == 1
        assert report["ok"] is False
        assert list(report["checks"]) == list(doctor.CHECKS)
        assert report["checks"]["beat"] == {
            "status": "broken",
            "message": "none answers",
            "next": "do something",
        }
        assert report["schedules"] == []


class TestARound:
    def test_ends_in_time_though_a_check_hangs(self, monkeypatch):
        monkeypatch.setattr(doctor, "LIMIT", 0.2)
        start = time.monotonic()
        found = doctor.run({"beat": lambda: time.sleep(5), "worker": lambda: Finding("fine")})
        assert time.monotonic() - start < 1
        assert (found["beat"].status, found["worker"].status) == (BROKEN, OK)
        assert found["beat"].message == "no answer within 0.2 seconds"

    def test_tells_an_error_with_the_next_command_and_without_secrets(self, settings):
        settings.EMAIL_HOST_PASSWORD = "hunter2"

        def check():
            raise OSError("refused bob@example.com,\nwho said hunter2")

        finding = doctor.run({"e-mail": check})["e-mail"]
        assert finding.status == BROKEN
        assert finding.message == "OSError: refused ***@***, who said ***"
        assert finding.next == "python manage.py sendtestemail ADDRESS"

    def test_does_not_look_at_what_rests_on_something_broken(self, monkeypatch):
        def refuse():
            raise ConnectionRefusedError

        looks = dict.fromkeys(doctor.CHECKS, lambda: Finding("fine")) | {"broker": refuse}
        monkeypatch.setattr(doctor, "CHECKS", looks)
        found = doctor.examine()
        assert list(found) == list(looks)
        assert {name for name, each in found.items() if each.status == OK} == {
            "database",
            "migrations",
            "schedules",
            "e-mail",
        }
        assert found["beat"] == Finding("not looked at: the broker is broken", UNKNOWN)


@pytest.mark.django_db
class TestTheDatabase:
    def test_is_well_when_it_answers(self):
        assert doctor.check_database().status == OK

    def test_is_named_without_its_password(self, monkeypatch):
        monkeypatch.setattr(connection, "vendor", "postgresql")
        monkeypatch.setitem(connection.settings_dict, "HOST", "db.example.com")
        monkeypatch.setitem(connection.settings_dict, "PORT", "")
        assert doctor.check_database().message.endswith(" on db.example.com:5432")
        assert doctor.next_command("database") == "pg_isready --host=db.example.com --port=5432"

    def test_is_well_migrated(self):
        assert doctor.check_migrations() == Finding("all applied")

    def test_lacks_a_migration(self):
        label, name = "{{ cookiecutter.project_slug }}", "0004_resume_deliveries"
        MigrationRecorder(connection).record_unapplied(label, name)
        found = doctor.check_migrations()
        assert found.status == BROKEN
        assert found.message == f"1 to apply: first {label}.{name}"
        assert found.next == "python manage.py migrate"


class TestTheBroker:
    def test_is_well_when_it_answers(self):
        assert doctor.check_broker().status == OK

    def test_is_named_without_its_password(self, settings, monkeypatch):
        monkeypatch.setattr(doctor.health, "check_broker", lambda: None)
        settings.CELERY_BROKER_URL = "amqp://user:hunter2@mq.example.com//"
        assert doctor.check_broker() == Finding("amqp on mq.example.com:5672")
        assert doctor.next_command("broker") == "nc -zv mq.example.com 5672"


@pytest.mark.django_db(transaction=True, serialized_rollback=True)
class TestTheProcesses:
    def test_answer_or_do_not(self, monkeypatch):
        monkeypatch.setattr(doctor, "PATIENCE", 2)
        with start_worker(celery_app, hostname="celery@host", perform_ping_check=False):
            assert doctor.check_worker() == Finding("celery@host answers")
            assert doctor.check_beat() == Finding(
                "none answers", BROKEN, "python manage.py prodserver beat"
            )


@pytest.mark.django_db
class TestTheSchedules:
    @pytest.fixture(autouse=True)
    def only_ours(self):
        PeriodicTask.objects.all().delete()

    def make(self, zone="UTC", **fields):
        if "interval" not in fields:
            eight = {"minute": "0", "hour": "8", "timezone": zone}
            fields["crontab"] = CrontabSchedule.objects.create(**eight)
        return PeriodicTask.objects.create(**{"name": "ours", "task": TASK} | fields)

    @time_machine.travel("2026-01-02 07:00:30+00:00", tick=False)
    @pytest.mark.parametrize(
        ("zone", "run"),
        [("UTC", "2026-01-02T08:00:00+00:00"), ("Asia/Tokyo", "2026-01-03T08:00:00+09:00")],
    )
    def test_have_their_next_run_in_the_time_zone_of_the_service(self, settings, zone, run):
        settings.TIME_ZONE = zone
        self.make(zone=zone)
        found = doctor.check_schedules()
        assert (found.status, found.message) == (OK, f"1 on, 0 off; times in {zone}")
        assert found.schedules[0]["next_run"].isoformat() == run

    @time_machine.travel("2026-01-02 07:00:30+00:00", tick=False)
    def test_may_be_due_now(self):
        every = IntervalSchedule.objects.create(every=5, period="minutes")
        self.make(interval=every, last_run_at=timezone.now() - timedelta(hours=1))
        (schedule,) = doctor.check_schedules().schedules
        assert schedule["next_run"] == timezone.now()

    def test_may_be_off(self):
        self.make(enabled=False, task="no.such.task")
        found = doctor.check_schedules()
        assert (found.status, found.schedules) == (OK, [])
        assert found.message.startswith("0 on, 1 off")

    @pytest.mark.parametrize(
        ("fields", "problem"),
        [
            ({"task": "no.such.task"}, "its task does not exist: no.such.task"),
            ({"crontab": None}, "it has neither a crontab nor an interval"),
            ({"args": "["}, "JSONDecodeError"),
        ],
    )
    def test_may_be_such_as_beat_cannot_run(self, fields, problem):
        row = self.make()
        PeriodicTask.objects.filter(pk=row.pk).update(**fields)
        found = doctor.check_schedules()
        (schedule,) = found.schedules
        assert found.status == BROKEN
        assert schedule["problem"].startswith(problem)
        assert f"get(pk={row.pk})" in schedule["next"]
        assert schedule["next"].startswith("python manage.py shell --command '")


class TestTheEmail:
    @pytest.fixture
    def smtp(self, settings, monkeypatch):
        monkeypatch.setattr(doctor, "PATIENCE", 0.2)
        settings.EMAIL_BACKEND = "django.core.mail.backends.smtp.EmailBackend"
        settings.EMAIL_HOST = "127.0.0.1"
        return settings

    def test_may_have_no_server(self):
        assert doctor.check_email().status == OK

    def test_has_a_server_that_does_not_answer(self, smtp, silent_server):
        smtp.EMAIL_PORT = silent_server
        assert doctor.run({"e-mail": doctor.check_email})["e-mail"].status == BROKEN

    def test_has_a_server_that_is_away(self, smtp):
        smtp.EMAIL_PORT = 1
        found = doctor.run({"e-mail": doctor.check_email})["e-mail"]
        assert found.message.startswith("ConnectionRefusedError")
