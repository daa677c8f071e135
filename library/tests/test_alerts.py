"""Alerts: administrators are told once of each problem, and once that it is over."""

import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, HTTPServer
from itertools import count
from types import SimpleNamespace

import pytest
from celery import shared_task
from django.conf import settings as current
from django.core import mail
from django.core.mail.backends import locmem
from django.core.management import CommandError, call_command
from django.db import OperationalError, connections
from django.db.models import F
from django.urls import reverse
from django.utils import timezone
from django_celery_beat.models import IntervalSchedule, PeriodicTask
from kombu.exceptions import OperationalError as BrokerError

from prodserver_ops.apps import start_alerts
from prodserver_ops.conf.defaults import Defaults, StagingDefaults
from prodserver_ops.conf.environment import EnvironmentVariableError
from prodserver_ops.console import alerts, problems
from prodserver_ops.core.limits import entries
from prodserver_ops.mail import transport
from prodserver_ops.models import Alert, Heartbeat, ScheduleRun, TaskRun

pytestmark = pytest.mark.django_db

MINUTE = timedelta(minutes=1)


@shared_task(name="test.alerts")
def sample():
    pass


@pytest.fixture(autouse=True)
def _service(settings, monkeypatch):
    """A service in production in which all is well."""
    settings.DEBUG = False
    settings.ADMINS = ["admin@example.com"]
    settings.EMAIL_HOST = "mail.example.com"
    monkeypatch.setattr(alerts, "SILENT_BACKENDS", {"console", "dummy"})
    monkeypatch.setattr(alerts, "_running", {})
    monkeypatch.setattr(alerts, "_logged", "")
    monkeypatch.setattr(problems, "_running", {})
    monkeypatch.setattr(problems.broker, "count_messages", lambda app, names, _: lengths(names))
    PeriodicTask.objects.all().delete()
    for process in ("worker", "beat"):
        beat_heart(process)


def lengths(names, **longer):
    return dict.fromkeys(names, 0) | longer


def beat_heart(process):
    Heartbeat.objects.update_or_create(
        process=process, host="a", pid=1, defaults={"seen_at": timezone.now()}
    )


def check(times=1):
    """Make checks, each a minute after the other; return the subjects of new e-mails."""
    before = len(mail.outbox)
    for _ in range(times):
        Alert.objects.filter(key="").update(since=F("since") - MINUTE)
        if not Alert.objects.filter(key="").exists():
            Alert.objects.create(key="", since=timezone.now() - MINUTE)
        alerts.check()
    return [message.subject for message in mail.outbox[before:]]


def make_schedule(name="sample", **fields):
    interval, _ = IntervalSchedule.objects.get_or_create(every=5, period="minutes")
    return PeriodicTask.objects.create(name=name, task=sample.name, interval=interval, **fields)


def make_task_run(schedule, status="failed", **fields):
    error = "ValueError: no" if status == "failed" else ""
    fields = {"name": sample.name, "started_at": timezone.now(), "error": error} | fields
    return TaskRun.objects.create(schedule=schedule, status=status, **fields)


def make_run(schedule, minutes, published=True, started=False):
    then = timezone.now() - minutes * MINUTE
    return ScheduleRun.objects.create(
        schedule=schedule,
        due_at=then,
        created_at=then,
        published_at=then if published else None,
        started_at=then if started else None,
    )


@pytest.fixture
def serve(settings):
    """A function that starts a webhook whose replies a function writes; returns what it got."""
    servers = []

    def run(reply):
        received = []

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                content = self.rfile.read(int(self.headers["Content-Length"]))
                received.append((self.path, json.loads(content)))
                reply(self)

            def do_GET(self):
                pytest.fail("a redirect was followed")

            def log_message(self, *args):
                pass

        server = HTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, args=[0.02], daemon=True).start()
        servers.append(server)
        settings.ALERT_WEBHOOK = f"http://127.0.0.1:{server.server_port}/secret"
        return received

    yield run
    for server in servers:
        server.shutdown()
        server.server_close()


def accept(handler):
    handler.send_response(204)
    handler.end_headers()


# Each kind of problem


class TestKinds:
    def test_nothing_is_said_of_a_service_in_which_all_is_well(self):
        schedule = make_schedule()
        make_task_run(schedule, "succeeded")
        make_run(schedule, 20, started=True)
        make_run(schedule, 2)
        assert check(4) == []
        assert not Alert.objects.exclude(key="").exists()

    def test_schedule_whose_last_run_failed(self, settings):
        settings.TIME_ZONE = "UTC"
        schedule = make_schedule()
        make_task_run(schedule, "succeeded")
        run = make_task_run(schedule, error="ValueError: of bob@example.com")
        make_task_run(schedule, "running")
        make_task_run(schedule, "retried")
        assert check(2) == [f"Dummy: {Alert.objects.get(key=f'failed:{schedule.pk}')}"]
        body = mail.outbox[0].body
        when = f"{run.started_at:%Y-%m-%d %H:%M} UTC"
        assert f"sample failed, {when}: ValueError: of ***@***" in body
        assert f"{settings.SITE_URL}{reverse('admin:ops_operations')}" in body
        assert mail.outbox[0].to == ["admin@example.com"]
        make_task_run(schedule, "succeeded")
        assert check(2)[0].startswith("Dummy: recovered: Schedule sample")
        assert not Alert.objects.exclude(key="").exists()

    def test_failure_whose_record_is_deleted_is_not_over(self):
        schedule = make_schedule()
        make_task_run(schedule)
        assert len(check(2)) == 1
        TaskRun.objects.all().delete()
        assert check(3) == []
        PeriodicTask.objects.update(enabled=False)
        assert len(check(2)) == 1

    def test_failure_of_a_schedule_that_runs_once(self):
        make_task_run(make_schedule(one_off=True, enabled=False))
        make_task_run(make_schedule("off", enabled=False))
        assert len(check(2)) == 1
        assert alerts.get_open().count() == 1

    def test_run_that_is_not_queued(self):
        schedule = make_schedule()
        run = make_run(schedule, 6, published=False)
        make_run(make_schedule("other"), 4, published=False)
        (subject,) = check(2)
        assert subject.startswith("Dummy: Schedule sample is late: its run due at ")
        assert subject.endswith(" has not been queued")
        # Beat gives it up after an hour: the schedule did not recover.
        run.delete()
        make_run(schedule, 1)
        assert check(3) == []
        ScheduleRun.objects.update(started_at=timezone.now())
        assert len(check(2)) == 1

    def test_run_that_no_worker_starts(self):
        schedule = make_schedule()
        make_run(schedule, 11)
        make_run(schedule, 6)
        make_run(make_schedule("other"), 9)
        (subject,) = check(2)
        assert "sample is late" in subject
        assert subject.endswith(" has not been started")
        # That of the last run counts: an earlier message may be lost.
        make_run(schedule, -1, started=True)
        Alert.objects.update(since=timezone.now() - 5 * MINUTE)
        assert len(check(2)) == 1

    @pytest.mark.parametrize("fields", [{"task": "gone"}, {"headers": "[]"}, {"args": "{"}])
    def test_schedule_that_cannot_run(self, fields):
        schedule = make_schedule()
        PeriodicTask.objects.update(**fields)
        assert check(2)[0].startswith("Dummy: Schedule sample cannot run: ")
        schedule.save()
        assert len(check(2)) == 1

    def test_of_many_schedules_a_check_validates_a_part(self, monkeypatch):
        monkeypatch.setattr(problems, "VALIDATED", 2)
        for number in range(5):
            make_schedule(str(number), headers="[]")
        minutes = count()
        monkeypatch.setattr(problems, "time", SimpleNamespace(time=lambda: next(minutes) * 60))
        check(3)
        assert Alert.objects.exclude(key="").count() == 5
        PeriodicTask.objects.update(headers="{}")
        check(6)
        assert not alerts.get_open()

    @pytest.mark.parametrize("process", ["worker", "beat"])
    def test_process_that_is_dead(self, process):
        Heartbeat.objects.filter(process=process).update(seen_at=timezone.now() - 2 * MINUTE)
        assert check() == []
        assert check() == [f"Dummy: No {process} is running: there is no recent heartbeat"]
        beat_heart(process)
        assert check(2) == [
            f"Dummy: recovered: No {process} is running: there is no recent heartbeat"
        ]

    def test_queue_that_grows(self, monkeypatch):
        numbers = iter([10, 2000, 900, 1500, 1400, 1500, 1600, 1700, 1700, 1500, 1400, 1000, 1000])
        monkeypatch.setattr(
            problems.broker,
            "count_messages",
            lambda app, names, _: lengths(names, dummy=next(numbers)),
        )
        assert check(8) == []
        assert check() == ["Dummy: The queue dummy keeps growing, and has more than 1000 messages"]
        assert check(2) == []
        assert len(check(2)) == 1

    def test_tasks_that_were_given_up(self, monkeypatch):
        failed = {problems.get_failed_queue(): 2}
        monkeypatch.setattr(
            problems.broker, "count_messages", lambda app, names, _: lengths(names, **failed)
        )
        assert check(2) == ["Dummy: Tasks were given up; they are in the queue dummy.failed: 2"]

    def test_broker_that_is_away_says_nothing_of_its_queues(self, monkeypatch):
        failed = {problems.get_failed_queue(): 2}

        def count_messages(app, names, timeout):
            return lengths(names, **failed)

        monkeypatch.setattr(problems.broker, "count_messages", count_messages)
        assert len(check(2)) == 1

        def fail(*args):
            raise BrokerError("amqp://user:hunter2@host")

        monkeypatch.setattr(problems.broker, "count_messages", fail)
        assert check(3) == ["Dummy: The broker is unavailable: OperationalError"]
        monkeypatch.setattr(problems.broker, "count_messages", count_messages)
        assert check(2) == ["Dummy: recovered: The broker is unavailable: OperationalError"]

    def test_email_that_pauses(self):
        failures = (transport.Verdict.UNUSABLE.name, "ConnectionRefusedError: refused", 1)
        entries.set(transport.FAILURES, failures, 60)
        assert check(2) == [
            "Dummy: E-mail is paused, because the mail server accepts none: ConnectionRefusedError: refused"
        ]
        entries.delete(transport.FAILURES)
        assert len(check(2)) == 1


# Once


def test_problem_is_told_once_and_its_end_once():
    make_task_run(make_schedule())
    assert check() == []
    assert len(check()) == 1
    assert check(50) == []
    PeriodicTask.objects.all().delete()
    assert check() == []
    assert len(check()) == 1
    assert check(5) == []


def test_problem_of_one_check_is_not_told():
    for _ in range(3):
        Heartbeat.objects.all().delete()
        assert check() == []
        beat_heart("worker")
        beat_heart("beat")
        assert check(2) == []
    assert not Alert.objects.exclude(key="").exists()


def test_schedule_that_fails_every_second_time_is_told_once():
    schedule = make_schedule()
    subjects = []
    for number in range(20):
        make_task_run(schedule, "succeeded" if number % 2 else "failed")
        subjects += check()
    assert len(subjects) == 1


def test_thousand_problems_are_one_email():
    interval = make_schedule().interval
    PeriodicTask.objects.bulk_create(
        PeriodicTask(name=f"sample {number}", task=sample.name, interval=interval)
        for number in range(999)
    )
    TaskRun.objects.bulk_create(
        TaskRun(schedule=row, name=sample.name, status="failed", started_at=timezone.now())
        for row in PeriodicTask.objects.all()
    )
    start = time.monotonic()
    (subject,) = check(3)
    assert time.monotonic() - start < 30
    assert subject.endswith(", and 999 more")
    assert "- and 980 more" in mail.outbox[0].body
    assert len(mail.outbox[0].body) < 5000


def test_at_most_a_handful_an_hour(caplog):
    """A schedule after the other fails, and recovers."""
    for number in range(60):
        make_task_run(make_schedule(f"sample {number}"))
        check()
        if number % 3 == 0:
            TaskRun.objects.update(status="succeeded")
    assert len(mail.outbox) == alerts.LIMIT.slots
    assert sum("not sent yet" in record.message for record in caplog.records) >= 1
    # Nothing is lost: once an hour has passed, the next e-mail has the rest.
    alerts.LIMIT.clear("emailed_at")
    make_task_run(PeriodicTask.objects.last())
    assert 1 <= len(check(3)) <= 2
    assert "sample 59" in mail.outbox[-1].body


def test_end_of_problems_leaves_emails_to_new_ones():
    for number in range(4):
        make_task_run(make_schedule(str(number)))
        assert len(check(2)) == 1
    TaskRun.objects.all().update(status="succeeded")
    assert check(3) == []
    Heartbeat.objects.filter(process="worker").delete()
    (subject,) = check(2)
    assert subject == "Dummy: No worker is running: there is no recent heartbeat"
    assert "Recovered, or turned off:" in mail.outbox[-1].body


# Several processes


def test_check_is_claimed_for_a_minute():
    alerts.claim()
    Alert.objects.update(since=F("since") - MINUTE)
    assert [alerts.claim(), alerts.claim()] == [True, False]
    assert not alerts.get_open()


@pytest.mark.skipif(
    "connections['default'].vendor != 'postgresql'", reason="needs several connections"
)
@pytest.mark.django_db(transaction=True, serialized_rollback=True)
def test_one_of_several_processes_tells():
    for _ in range(5):
        make_task_run(make_schedule(f"{timezone.now()}"))
        before = len(mail.outbox)
        for _ in range(2):
            Alert.objects.filter(key="").update(since=timezone.now() - MINUTE)
            barrier = threading.Barrier(4)

            def work(barrier=barrier):
                try:
                    barrier.wait()
                    claimed = alerts.claim()
                    if claimed:
                        alerts.note_problems()
                        alerts.tell()
                    return claimed
                finally:
                    connections.close_all()

            if not Alert.objects.filter(key="").exists():
                Alert.objects.create(key="", since=timezone.now() - MINUTE)
            with ThreadPoolExecutor(4) as pool:
                assert sum(each.result() for each in [pool.submit(work) for _ in range(4)]) == 1
        assert len(mail.outbox) == before + 1


def test_process_that_is_killed_does_not_lose_the_alert(monkeypatch):
    make_task_run(make_schedule())
    check()

    def die(*args):
        raise SystemExit

    with monkeypatch.context() as patch:
        patch.setattr(alerts, "send", die)
        with pytest.raises(SystemExit):
            check()
    alerts.check()
    assert not mail.outbox  # The claim has not expired.
    assert len(check()) == 1
    assert check(3) == []


def test_process_that_was_paused_leaves_it_to_others(monkeypatch):
    make_task_run(make_schedule())
    check()
    with monkeypatch.context() as patch:
        patch.setattr(alerts, "MAX_AGE", -1)
        assert check() == []
    assert len(check()) == 1


# Channels


def test_webhook_gets_json(serve, settings):
    received = serve(accept)
    schedule = make_schedule()
    make_task_run(schedule)
    check(2)
    ((path, content),) = received
    assert path == "/secret"
    assert content["service"] == "Dummy"
    assert content["url"] == f"{settings.SITE_URL}{reverse('admin:ops_operations')}"
    (problem,) = content["problems"]
    assert problem["key"] == f"failed:{schedule.pk}"
    assert problem["message"] in content["text"]
    assert problem["since"]
    make_task_run(schedule, "succeeded")
    check(5)
    assert len(mail.outbox) == len(received) == 2
    assert received[1][1]["recovered"][0]["key"] == f"failed:{schedule.pk}"
    assert received[1][1]["problems"] == []


def test_webhook_alone(serve, settings):
    received = serve(accept)
    settings.EMAIL_BACKEND = "django.core.mail.backends.dummy.EmailBackend"
    make_task_run(make_schedule())
    check(3)
    assert len(received) == 1


def hang(handler):
    time.sleep(1)


def fail(handler):
    handler.send_response(500)
    handler.end_headers()


def redirect(handler):
    handler.send_response(302)
    handler.send_header("Location", "/login")
    handler.end_headers()


def lie(handler):
    handler.wfile.write(b"SSH-2.0-OpenSSH\r\n")


def trickle(handler):
    with pytest.raises(OSError):
        for _ in range(100):
            handler.wfile.write(b"H")
            time.sleep(0.05)
        raise OSError


@pytest.mark.parametrize("reply", [hang, fail, redirect, lie, trickle])
def test_webhook_that_fails_does_not_hold_up_email(serve, monkeypatch, caplog, reply):
    monkeypatch.setattr(alerts, "TIMEOUT", 0.5)
    received = serve(reply)
    make_task_run(make_schedule())
    start = time.monotonic()
    assert len(check(10)) == 1
    assert time.monotonic() - start < 5
    assert len(received) == 1  # It is tried again after five minutes.
    (line,) = [record.message for record in caplog.records if "not sent" in record.message]
    assert line.startswith("Alerts: not sent, posted: ")
    assert "secret" not in line
    # Tried forever, it gets a handful an hour.
    for _ in range(20):
        alerts.PAUSE.clear("posted_at")
        monkeypatch.setattr(alerts, "_running", {})
        check()
    assert len(received) <= alerts.LIMIT.slots
    assert len(mail.outbox) == 1


def test_mail_server_that_refuses(settings, caplog):
    settings.EMAIL_BACKEND = "django.core.mail.backends.smtp.EmailBackend"
    with socket.create_server(("127.0.0.1", 0)) as server:
        settings.EMAIL_HOST, settings.EMAIL_PORT = server.getsockname()
    make_task_run(make_schedule())
    for _ in range(30):
        alerts.PAUSE.clear("emailed_at")
        check()
    lines = [record.message for record in caplog.records if "not sent" in record.message]
    assert len(lines) == 1
    assert lines[0].startswith("Alerts: not sent, emailed: ConnectionRefusedError: ")
    # The attempts do not count, and the alert is not lost.
    settings.EMAIL_BACKEND = "django.core.mail.backends.locmem.EmailBackend"
    assert check() == []
    alerts.PAUSE.clear("emailed_at")
    assert len(check()) == 1


def test_mail_server_that_hangs(settings, monkeypatch, caplog):
    monkeypatch.setattr(alerts, "TIMEOUT", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as server:
        settings.EMAIL_BACKEND = "django.core.mail.backends.smtp.EmailBackend"
        settings.EMAIL_HOST, settings.EMAIL_PORT = server.getsockname()
        make_task_run(make_schedule())
        start = time.monotonic()
        check(3)
        assert time.monotonic() - start < 5
    assert sum("not sent" in record.message for record in caplog.records) == 1


def test_channel_that_failed_alone_is_tried_again(serve, monkeypatch):
    received = serve(accept)

    def refuse(*args):
        raise ConnectionRefusedError

    with monkeypatch.context() as patch:
        patch.setattr(locmem.EmailBackend, "send_messages", refuse)
        make_task_run(make_schedule())
        check(3)
    alerts.PAUSE.clear("emailed_at")
    assert len(check(3)) == 1
    assert len(received) == 1


def test_check_that_fails_changes_nothing(monkeypatch, caplog):
    make_task_run(make_schedule())
    assert len(check(2)) == 1

    def find(known):
        raise OperationalError("gone")

    monkeypatch.setitem(alerts.FINDERS, "failed", find)
    assert check(5) == []
    assert alerts.get_open().count() == 1
    assert sum("could not look for problems" in record.message for record in caplog.records) == 1


# Recipients, and whether anybody is told at all


@pytest.mark.parametrize("admins", [["a@example.com"], [("A", "a@example.com")]])
def test_admins_are_told(settings, admins):
    settings.ADMINS = admins
    assert alerts.get_recipients() == ["a@example.com"]


def test_superusers_are_told_if_there_are_no_admins(settings, make_user, caplog):
    settings.ADMINS = []
    make_user("staff", is_staff=True)
    make_user("left", is_superuser=True, is_active=False)
    make_user("silent", is_superuser=True, email="")
    make_task_run(make_schedule())
    assert check(3) == []
    assert [record.message for record in caplog.records] == [f"Alerts: they go to {alerts.NOBODY}"]
    make_user("root", is_superuser=True)
    assert len(check()) == 1
    assert mail.outbox[0].to == ["root@example.com"]


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({}, ""),
        ({"DEBUG": True}, "DEBUG is on"),
        ({"ALERTS": False}, "ALERTS is off"),
        (
            {"EMAIL_BACKEND": "django.core.mail.backends.console.EmailBackend"},
            "neither e-mail nor ALERT_WEBHOOK is configured",
        ),
        (
            {"EMAIL_BACKEND": "x.dummy.EmailBackend", "ALERT_WEBHOOK": "https://example.com"},
            "",
        ),
    ],
)
def test_thread_starts_in_production_alone(settings, monkeypatch, values, reason):
    started = []
    monkeypatch.setattr(alerts.threading.Thread, "start", lambda thread: started.append(thread))
    for name, value in values.items():
        setattr(settings, name, value)
    assert alerts.why_off() == reason
    start_alerts()
    start_alerts()
    assert len(started) == (not reason)
    assert all(thread.daemon for thread in started)


def test_nothing_starts_in_tests_and_in_development(monkeypatch):
    monkeypatch.undo()
    assert alerts.why_off()
    for name in ("EMAIL_HOST", "EMAIL_API", "ALERTS"):
        monkeypatch.delenv(name, raising=False)
    assert Defaults().ALERTS
    assert Defaults().DEBUG
    assert "console" in Defaults().EMAIL_BACKEND
    assert StagingDefaults.EMAIL_WITHOUT_SERVER == "dummy"
    assert {"console", "dummy"} < alerts.SILENT_BACKENDS


def test_thread_goes_on_after_an_error(monkeypatch, caplog):
    checks = []

    def check():
        checks.append(1)
        if len(checks) == 3:
            raise SystemExit
        raise OperationalError("the database is gone")

    monkeypatch.setattr(alerts, "check", check)
    monkeypatch.setattr(alerts.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(alerts.connections, "close_all", lambda: None)
    with pytest.raises(SystemExit):
        alerts.check_forever()
    assert len(caplog.records) == 1


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("hooks.example.com", "not a URL"),
        ("ftp://example.com/hunter2", "a URL that starts with ftp://"),
        ("https:///hunter2", "a URL without a host"),
        ("https://bob:hunter2@example.com/", "a URL with a user"),
        ("https://example.com/hunter 2", "a URL with a space"),
    ],
)
def test_webhook_is_a_url(monkeypatch, text, problem):
    monkeypatch.setenv("ALERT_WEBHOOK", text)
    with pytest.raises(EnvironmentVariableError, match=problem) as error:
        Defaults().ALERT_WEBHOOK  # noqa: B018
    assert "hunter2" not in str(error.value)
    monkeypatch.setenv("ALERT_WEBHOOK", "https://example.com:8443/a?b=c")
    assert Defaults().ALERT_WEBHOOK == "https://example.com:8443/a?b=c"


# Command and page


def test_command_lists_what_is_open(capsys):
    make_task_run(make_schedule())
    check(2)
    call_command("alerts")
    lines = capsys.readouterr().out.splitlines()
    assert "Schedule sample failed" in lines[0]
    assert lines[1:] == ["Alerts go to e-mail to admin@example.com"]


def test_command_sends_a_test(capsys, serve):
    received = serve(accept)
    call_command("alerts", "--test")
    lines = capsys.readouterr().out.splitlines()
    assert lines == ["e-mail to admin@example.com: sent", "webhook on 127.0.0.1: sent"]
    assert "test" in mail.outbox[0].subject
    assert len(received) == 1
    assert not Alert.objects.exists()


def test_command_fails_if_the_test_does(capsys, serve, settings):
    serve(fail)
    with pytest.raises(CommandError, match="Not sent"):
        call_command("alerts", "--test")
    assert "webhook on 127.0.0.1: HTTPError: HTTP Error 500" in capsys.readouterr().out
    settings.ALERT_WEBHOOK, settings.ADMINS = "", []
    with pytest.raises(CommandError, match="ADMINS is empty"):
        call_command("alerts", "--test")
    settings.ALERTS = False
    with pytest.raises(CommandError, match="Alerts are off: ALERTS is off"):
        call_command("alerts")


def test_page_shows_what_is_open(admin_client, settings):
    page = lambda: admin_client.get(reverse("admin:ops_operations")).text  # noqa: E731
    make_task_run(make_schedule("<b>"))
    check(2)
    assert "Problems:</strong> Schedule &lt;b&gt; failed, " in page()
    settings.ALERTS = False
    assert "Problems:" not in page()


def test_plain_project_needs_no_more_settings():
    assert current.ALERTS is True
    assert current.ALERT_WEBHOOK == ""
