"""``doctor``: the result of each check and the next command for problems, in limited time."""

import json
import os
import socket
import subprocess
import time
from datetime import datetime, timedelta

import pytest
import time_machine
from celery import current_app
from django.core import checks
from django.core.management import call_command
from django.db import connection
from django.db.migrations.loader import MigrationLoader
from django.db.migrations.recorder import MigrationRecorder
from django.utils import timezone
from django_celery_beat.models import CrontabSchedule, IntervalSchedule, PeriodicTask
from kombu.transport import memory

from prodserver_ops import broker
from prodserver_ops.console import doctor, upgrades
from prodserver_ops.console.doctor import ERROR, OK, SKIPPED, Result
from prodserver_ops.management.commands import doctor as command
from prodserver_ops.models import Heartbeat
from prodserver_ops.worker.app import make_failed_queue

#: A task that every Celery app has.
TASK = "celery.backend_cleanup"


@pytest.fixture
def silent_server():
    """The port of a server that accepts connections and sends nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


class TestCommand:
    @pytest.fixture
    def run(self, monkeypatch, capsys):
        """Return a function that runs the command with these results of the checks.

        It returns the exit status and the output.
        """

        def run(*arguments, **results):
            all_results = dict.fromkeys(doctor.get_checks(), Result("fine")) | results
            monkeypatch.setattr(command, "run_all", all_results.copy)
            try:
                call_command("doctor", *arguments)
            except SystemExit as exit:
                return exit.code, capsys.readouterr().out
            return 0, capsys.readouterr().out

        return run

    def test_each_part_has_a_line(self, run):
        status, output = run()
        assert status == 0
        assert [line.split() for line in output.splitlines()] == [
            [name, "ok", "fine"]
            for name in (
                "settings",
                "database",
                "migrations",
                "broker",
                "queue",
                "delayed",
                "worker",
                "beat",
                "schedules",
                "pile-ups",
                "e-mail",
                "deliveries",
                "tables",
            )
        ]

    @pytest.mark.parametrize("status", [ERROR, SKIPPED])
    def test_any_problem_ends_with_status_1(self, run, status):
        assert run(worker=Result("no reply", status))[0] == 1

    def test_next_command_follows_a_problem(self, run):
        _, output = run(worker=Result("no reply", ERROR, "python manage.py prodserver worker"))
        assert [line.split(maxsplit=2) for line in output.splitlines()[6:8]] == [
            ["worker", "error", "no reply"],
            ["run", "python", "manage.py prodserver worker"],
        ]

    def test_each_schedule_has_its_next_run_or_its_problem(self, run):
        schedules = [
            {"name": "good", "next_run": datetime(2026, 1, 2, 8, 0), "problem": None, "next": None},
            {"name": "bad", "next_run": None, "problem": "it has no task", "next": "do something"},
        ]
        _, output = run(schedules=Result("2 enabled", ERROR, schedules=schedules))
        first = 1 + list(doctor.get_checks()).index("schedules")
        assert [line.strip() for line in output.splitlines()[first : first + 3]] == [
            "good: Fri 02 Jan 08:00:00",
            "bad: it has no task",
            "run      do something",
        ]

    def test_json_has_the_same_report(self, run):
        status, output = run("--json", beat=Result("no reply", ERROR, "do something"))
        report = json.loads(output)
        assert status == 1
        assert report["ok"] is False
        assert list(report["checks"]) == list(doctor.get_checks())
        assert report["checks"]["beat"] == {
            "status": "error",
            "message": "no reply",
            "next": "do something",
        }
        assert report["schedules"] == []


class TestRun:
    def test_check_that_hangs_times_out(self, monkeypatch):
        monkeypatch.setattr(doctor, "CHECK_TIMEOUT", 0.2)
        start = time.monotonic()
        results = doctor.run({"beat": lambda: time.sleep(5), "worker": lambda: Result("fine")})
        assert time.monotonic() - start < 4
        assert (results["beat"].status, results["worker"].status) == (ERROR, OK)
        assert results["beat"].message == "no result within 0.2 seconds"
        assert results["beat"].next is None

    @pytest.mark.parametrize("name", ["migrations", "queue", "delayed", "schedules", "e-mail"])
    def test_check_that_times_out_has_no_repair(self, name):
        result = doctor.run({name: lambda: time.sleep(1)}, timeout=0.1)[name]
        assert (result.status, result.next) == (ERROR, None)

    def test_system_checks_may_take_longer_than_the_answer_of_a_server(self, monkeypatch):
        """They only compute, and a busy machine is no problem of the settings."""

        def check():
            time.sleep(0.3)
            return Result("slow")

        sample = dict.fromkeys(doctor.get_checks(), lambda: Result("fine")) | {"settings": check}
        monkeypatch.setattr(doctor, "get_checks", lambda: sample)
        monkeypatch.setattr(doctor, "CHECK_TIMEOUT", 0.1)
        assert doctor.run_all()["settings"] == Result("slow")

    def test_error_has_the_next_command_and_no_secrets(self, settings):
        settings.EMAIL_HOST_PASSWORD = "hunter2"

        def check():
            raise OSError("refused bob@example.com,\nwith hunter2")

        result = doctor.run({"e-mail": check})["e-mail"]
        assert result.status == ERROR
        assert result.message == "OSError: refused ***@***, with ***"
        assert result.next == "python manage.py sendtestemail ADDRESS"

    def test_checks_that_require_a_failed_one_are_skipped(self, monkeypatch):
        def refuse():
            raise ConnectionRefusedError

        sample = dict.fromkeys(doctor.get_checks(), lambda: Result("fine")) | {"broker": refuse}
        monkeypatch.setattr(doctor, "get_checks", lambda: sample)
        results = doctor.run_all()
        assert list(results) == list(sample)
        assert [name for name, result in results.items() if result.status == SKIPPED] == ["queue"]
        assert results["queue"] == Result("skipped because the broker check failed", SKIPPED)


class TestSettings:
    @pytest.fixture
    def report(self, monkeypatch):
        """Return a function that returns the result with these messages of Django's checks."""

        def report(*messages):
            monkeypatch.setattr(doctor.checks, "run_checks", lambda **options: [*messages])
            return doctor.check_settings()

        return report

    def test_are_ok_without_warnings(self, report):
        assert report(checks.Info("good to know")) == Result("no problems")

    def test_silenced_warning_is_ok(self, report, settings):
        settings.SILENCED_SYSTEM_CHECKS = ["sample.W001"]
        assert report(checks.Warning("unusual", id="sample.W001")).status == OK

    @pytest.mark.parametrize(
        ("debug", "command"),
        [(True, "python manage.py check"), (False, "python manage.py check --deploy")],
    )
    def test_warning_is_an_error_with_the_next_command_and_no_secrets(
        self, report, settings, debug, command
    ):
        settings.DEBUG = debug
        settings.EMAIL_HOST_PASSWORD = "hunter2"
        messages = [checks.Warning("bad hunter2", id="sample.W001"), checks.Error("worse")]
        assert report(*messages) == Result("bad *** (sample.W001), and 1 more", ERROR, command)

    @pytest.mark.parametrize("debug", [True, False])
    def test_production_includes_the_checks_for_deployment(self, monkeypatch, settings, debug):
        settings.DEBUG = debug
        calls = []
        monkeypatch.setattr(
            doctor.checks, "run_checks", lambda **options: calls.append(options) or []
        )
        doctor.check_settings()
        assert calls == [{"include_deployment_checks": not debug}]


@pytest.mark.django_db
class TestDatabase:
    def test_is_ok_if_available(self):
        assert doctor.check_database().status == OK

    def test_address_has_no_password(self, monkeypatch):
        monkeypatch.setattr(connection, "vendor", "postgresql")
        monkeypatch.setitem(connection.settings_dict, "HOST", "db.example.com")
        monkeypatch.setitem(connection.settings_dict, "PORT", "")
        assert doctor.check_database().message.endswith(" on db.example.com:5432")
        assert doctor.get_next_command("database") == "pg_isready --host=db.example.com --port=5432"

    def test_is_ok_if_all_migrations_are_applied(self):
        assert doctor.check_migrations() == Result("all applied")

    def test_unapplied_migration_is_an_error(self):
        ((label, name),) = MigrationLoader(connection).graph.leaf_nodes("ops")
        MigrationRecorder(connection).record_unapplied(label, name)
        results = doctor.check_migrations()
        assert results.status == ERROR
        assert results.message == f"1 not applied, first: {label}.{name}"
        assert results.next == "python manage.py migrate"


class TestBroker:
    def test_is_ok_if_available(self):
        assert doctor.check_broker().status == OK

    @pytest.mark.parametrize(
        ("scheme", "port"),
        [(scheme, port) for each in broker.BROKERS for scheme, port in each.ports.items()],
    )
    def test_address_has_no_password(self, settings, monkeypatch, scheme, port):
        monkeypatch.setattr(doctor.health, "check_broker", lambda: None)
        monkeypatch.setattr(doctor.broker, "find_problem", lambda *args: None)
        settings.CELERY_BROKER_URL = f"{scheme}://user:hunter2@mq.example.com/1"
        assert doctor.check_broker() == Result(f"{scheme} on mq.example.com:{port}")
        assert doctor.get_next_command("broker") == f"nc -zv mq.example.com {port}"

    def test_queue_that_cannot_be_used_is_an_error(self, monkeypatch):
        monkeypatch.setattr(doctor.broker, "find_problem", lambda *args: "not a quorum queue")
        assert doctor.check_broker() == Result("not a quorum queue", ERROR)


@pytest.mark.django_db
class TestQueue:
    @pytest.fixture(autouse=True)
    def _purge(self):
        """Delete the messages of earlier tests in this process."""
        for queue in memory.Channel.queues.values():
            queue.queue.clear()

    def test_is_ok_without_failed_tasks(self):
        expected = Result("no task was given up, and each queue is consumed; 0 messages wait")
        assert doctor.check_queue() == expected

    def test_counts_failed_tasks(self):
        with current_app.connection_for_write() as broker:
            queue = make_failed_queue(current_app)(broker.default_channel)
            queue.declare()
            queue.purge()
            try:
                current_app.send_task(TASK, queue=make_failed_queue(current_app))
                results = doctor.check_queue()
            finally:
                queue.purge()
        assert results.status == ERROR
        assert results.message.startswith("1 tasks were given up: they killed workers")
        assert results.next.endswith("manage.py requeue")


@pytest.mark.django_db
class TestProcesses:
    @pytest.mark.parametrize("process", ["worker", "beat"])
    def test_heartbeat_or_the_command_that_starts_them(self, process):
        check = doctor.get_checks()[process]
        start = f"python manage.py prodserver {process}"
        assert check() == Result("no heartbeat", ERROR, start)
        now = timezone.now()
        for pid, age in ((1, 80), (2, 70.5)):
            seen_at = now - timedelta(seconds=age)
            Heartbeat.objects.create(process=process, host="a", pid=pid, seen_at=seen_at)
        assert check().message.startswith("the last heartbeat was 7")
        assert check().next == start
        Heartbeat.objects.update(seen_at=now - timedelta(days=2, seconds=5.5))
        assert check().message.startswith("the last heartbeat was 17280")
        Heartbeat.objects.update(seen_at=now)
        assert check().status == OK
        assert check().message.startswith("2 running, the last heartbeat was ")


@pytest.mark.django_db
class TestSchedules:
    @pytest.fixture(autouse=True)
    def no_other_schedules(self):
        PeriodicTask.objects.all().delete()

    def make(self, zone="UTC", **fields):
        if "interval" not in fields:
            eight = {"minute": "0", "hour": "8", "timezone": zone}
            fields["crontab"] = CrontabSchedule.objects.create(**eight)
        return PeriodicTask.objects.create(**{"name": "sample", "task": TASK} | fields)

    @time_machine.travel("2026-01-02 07:00:30+00:00", tick=False)
    @pytest.mark.parametrize(
        ("zone", "run"),
        [("UTC", "2026-01-02T08:00:00+00:00"), ("Asia/Tokyo", "2026-01-03T08:00:00+09:00")],
    )
    def test_next_run_is_in_the_time_zone_of_the_service(self, settings, zone, run):
        settings.TIME_ZONE = zone
        self.make(zone=zone)
        results = doctor.check_schedules()
        assert (results.status, results.message) == (OK, f"1 enabled, 0 disabled; times in {zone}")
        assert results.schedules[0]["next_run"].isoformat() == run

    def test_schedule_in_another_time_zone_is_named(self, settings):
        self.make(zone="UTC")
        settings.TIME_ZONE = "Europe/Berlin"
        self.make(zone="Europe/Berlin", name="other")
        result = doctor.check_schedules()
        assert result.status == OK
        assert result.message == (
            "2 enabled, 0 disabled; times in Europe/Berlin; a schedule keeps the zone that it was "
            "created in: sample (UTC)"
        )

    @time_machine.travel("2026-01-02 07:00:30+00:00", tick=False)
    def test_overdue_schedule_runs_now(self):
        every = IntervalSchedule.objects.create(every=5, period="minutes")
        row = self.make(interval=every)
        PeriodicTask.objects.filter(pk=row.pk).update(
            date_changed=timezone.now() - timedelta(hours=1)
        )
        (schedule,) = doctor.check_schedules().schedules
        assert schedule["next_run"] == timezone.now()

    def test_disabled_schedule_is_only_counted(self):
        self.make(enabled=False, task="no.such.task")
        results = doctor.check_schedules()
        assert (results.status, results.schedules) == (OK, [])
        assert results.message.startswith("0 enabled, 1 disabled")

    @pytest.mark.parametrize(
        ("fields", "problem"),
        [
            ({"task": "no.such.task"}, "its task does not exist: no.such.task"),
            ({"crontab": None}, "it has neither a crontab nor an interval"),
            ({"args": "["}, "its args is not valid JSON: JSONDecodeError"),
        ],
    )
    def test_schedule_that_beat_cannot_run_is_an_error(self, fields, problem):
        row = self.make()
        PeriodicTask.objects.filter(pk=row.pk).update(**fields)
        results = doctor.check_schedules()
        (schedule,) = results.schedules
        assert results.status == ERROR
        assert schedule["problem"].startswith(problem)
        assert f"get(pk={row.pk})" in schedule["next"]
        assert schedule["next"].startswith("python manage.py shell --command '")


class TestEmail:
    @pytest.fixture
    def smtp(self, settings, monkeypatch):
        monkeypatch.setattr(doctor, "REPLY_TIMEOUT", 0.2)
        settings.EMAIL_BACKEND = "django.core.mail.backends.smtp.EmailBackend"
        settings.EMAIL_HOST = "127.0.0.1"
        return settings

    def test_is_ok_without_a_server(self):
        assert doctor.check_email().status == OK

    def test_unresponsive_server_is_an_error(self, smtp, silent_server):
        smtp.EMAIL_PORT = silent_server
        assert doctor.run({"e-mail": doctor.check_email})["e-mail"].status == ERROR

    def test_unavailable_server_is_an_error(self, smtp):
        smtp.EMAIL_PORT = 1
        results = doctor.run({"e-mail": doctor.check_email})["e-mail"]
        assert results.message.startswith("ConnectionRefusedError")


class TestTemplate:
    def test_version_and_commit_are_those_of_the_record(self, settings, tmp_path):
        settings.BASE_DIR = tmp_path
        context = {"cookiecutter": {"_version": "1.2.3"}}
        hint = "; record its repository: manage.py upgrade --template URL"
        for template, commit, shown in (
            ("https://example.com/t", "0123456789abcdef", "0123456789ab"),
            ("/home/anna/t", "0123456789abcdef", f"0123456789ab{hint}"),
            ("https://example.com/t.zip", None, f"unknown{hint}"),
        ):
            record = {"template": template, "commit": commit, "context": context}
            (tmp_path / ".cruft.json").write_text(json.dumps(record))
            assert doctor.check_template() == Result(f"1.2.3, commit {shown}")

    def test_says_when_a_clone_last_looked_for_a_release(self, settings, tmp_path):
        settings.BASE_DIR = tmp_path
        record = {"template": "https://example.com/t", "commit": "0123456789ab"}
        context = {"context": {"cookiecutter": {"_version": "1.2.3"}}}
        (tmp_path / ".cruft.json").write_text(json.dumps(record | context))
        git = ["git", "-c", "user.name=A", "-c", "user.email=a@example.com"]
        day = "2026-01-02T12:00:00Z"
        environment = os.environ | {"GIT_COMMITTER_DATE": day}
        for arguments in ("init --quiet", "add .cruft.json", "commit --quiet -m Upgrade"):
            subprocess.run([*git, *arguments.split()], cwd=tmp_path, env=environment, check=True)
        shown = "1.2.3, commit 0123456789ab; newer releases were looked for on "
        old = "2026-01-02, over 30 days ago: uv run manage.py upgrade"
        assert doctor.check_template() == Result(shown + old)
        now = str(int(timezone.now().timestamp()))
        subprocess.run([*git, "config", upgrades.CHECKED, now], cwd=tmp_path, check=True)
        assert doctor.check_template() == Result(f"{shown}{timezone.now():%Y-%m-%d}")

    def test_is_checked_if_there_is_a_record(self, settings, tmp_path):
        settings.BASE_DIR = tmp_path
        assert "template" not in doctor.get_checks()
        (tmp_path / ".cruft.json").touch()
        assert doctor.get_checks()["template"] is doctor.check_template
