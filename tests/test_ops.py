"""Operations: startup errors, doctor, logs and Sentry, without secrets or personal data."""

import gzip
import http.server
import json
import shlex
import socket
import subprocess
import threading
import time

import pytest

from tests.conftest import SECRET_KEY, production_variables
from tests.servers import PATIENCE, wait_for

pytestmark = pytest.mark.slow


def run_unchecked(service, command, **variables):
    """Run a command and return the completed process, whatever its exit status."""
    return subprocess.run(
        shlex.split(command),
        cwd=service.folder,
        env=service.environment | variables,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
    )


class TestInvalidVariable:
    @pytest.fixture
    def service(self, bake, make_service):
        service = make_service(bake(project_slug="variables"))
        service.install("--no-dev")
        return service

    def test_stops_every_process_and_command_with_one_line(self, service):
        for command in (
            *service.procfile().values(),
            "python manage.py doctor --json",
            "celery --app variables worker",
            "gunicorn variables.wsgi --check-config",
        ):
            done = run_unchecked(service, command, PORT="80a")
            assert (done.returncode, done.stdout) == (1, ""), command
            assert done.stderr == 'PORT: got "80a", expected an integer from 1 to 65535\n', command

    def test_gets_its_own_line_without_secrets(self, service):
        done = run_unchecked(
            service,
            "python manage.py prodserver web",
            DJANGO_MODE="prod",
            SECRET_KEY="hunter2",
            DATABASE_URL="mysql://user:hunter2@db/name",
        )
        assert (done.returncode, done.stdout) == (1, "")
        assert sorted(done.stderr.splitlines()) == [
            "DATABASE_URL: got a URL that starts with mysql://, "
            "expected postgres://USER:PASSWORD@HOST:PORT/NAME",
            "RABBITMQ_URL: got nothing, expected amqp:// or amqps://...",
            "SECRET_KEY: got 7 characters, 7 of them distinct, "
            "expected at least 50 random characters",
        ]


# Services with all processes


@pytest.fixture(params=["embedded", "production"])
def service(request, bake, make_service, smtp):
    """An installed and migrated service."""
    variables = {"EMAIL_HOST": "127.0.0.1", "EMAIL_PORT": smtp.port}
    if request.param == "production":
        variables |= production_variables(
            request.getfixturevalue("postgres_url"), request.getfixturevalue("rabbitmq_url")
        )
    service = make_service(bake(project_slug=f"ops_{request.param}"), **variables)
    service.deploy()
    return service


def start_processes(service):
    """Start all processes, wait until they are ready, and return them by name."""
    processes = {name: service.start(name) for name in ("web", "worker", "beat")}
    processes["web"].wait_for_text("Listening at")
    processes["worker"].wait_for_text(" ready.", seconds=60)
    processes["beat"].wait_for_text("beat: Starting...")
    return processes


def run_doctor(service, **variables):
    """Run the doctor. Return its report, and the status of each check by name."""
    start = time.monotonic()
    done = run_unchecked(service, "python manage.py doctor --json", **variables)
    assert time.monotonic() - start < 25 * PATIENCE
    report = json.loads(done.stdout)
    assert done.returncode == (0 if report["ok"] else 1)
    assert "guest:guest" not in done.stdout + done.stderr
    assert "hunter2" not in done.stdout + done.stderr
    return report, {name: check["status"] for name, check in report["checks"].items()}


ALL_OK = dict.fromkeys(
    (
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
        "template",
    ),
    "ok",
)

BREAK_SCHEDULE = """
from django_celery_beat.models import PeriodicTask
PeriodicTask.objects.filter(name="user-digest-daily").update(task="no.such.task")
"""


@pytest.mark.parametrize(
    "service", [pytest.param("embedded", marks=pytest.mark.long), "production"], indirect=True
)
def test_doctor_reports_failures_and_commands_that_fix_them(service, smtp):
    processes = start_processes(service)
    # Beat logs that it starts shortly before it responds to the doctor.
    wait_for(lambda: run_doctor(service)[1] == ALL_OK, 30, processes["beat"].text)
    report, statuses = run_doctor(service)
    assert statuses == ALL_OK, report
    names = [schedule["name"] for schedule in report["schedules"]]
    assert "user-digest-daily" in names
    assert all(schedule["next_run"] for schedule in report["schedules"])

    # A stopped process, and the command that starts it again.
    for name in ("worker", "beat"):
        processes[name].stop()
        report, statuses = run_doctor(service)
        assert statuses == ALL_OK | {name: "error"}
        command = report["checks"][name]["next"]
        restarted = service.spawn(name, *shlex.split(command))
        wait_for(lambda: run_doctor(service)[1] == ALL_OK, 30, restarted.text)

    # A schedule whose task does not exist, and the command that disables it.
    service.shell(BREAK_SCHEDULE)
    report, statuses = run_doctor(service)
    assert statuses == ALL_OK | {"schedules": "error"}
    (invalid,) = [schedule for schedule in report["schedules"] if schedule["problem"]]
    assert invalid["problem"] == "its task does not exist: no.such.task"
    service.run(invalid["next"])
    assert run_doctor(service)[1] == ALL_OK

    # An unapplied migration.
    service.run(f"python manage.py migrate {service.folder.name} 0002")
    report, statuses = run_doctor(service)
    assert statuses == ALL_OK | {"migrations": "error"}
    service.run(report["checks"]["migrations"]["next"])
    assert run_doctor(service)[1] == ALL_OK


def test_doctor_times_out_on_unresponsive_servers(bake, make_service):
    """Unresponsive servers accept a connection and send nothing."""
    service = make_service(bake(project_slug="ops_silent"))
    service.install("--no-dev")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        report, statuses = run_doctor(
            service,
            DATABASE_URL=f"postgres://user:hunter2@127.0.0.1:{port}/name",
            CELERY_BROKER_URL=f"amqp://user:hunter2@127.0.0.1:{port}//",
            EMAIL_HOST="127.0.0.1",
            EMAIL_PORT=str(port),
        )
    unresponsive = dict.fromkeys(("database", "broker", "e-mail"), "error")
    assert (
        statuses
        == dict.fromkeys(ALL_OK, "skipped") | {"settings": "ok", "template": "ok"} | unresponsive
    )
    assert all(report["checks"][name]["next"] for name in unresponsive)


CREATE_DATA = """
from datetime import timedelta
from django.utils import timezone
from django_celery_beat.models import IntervalSchedule, PeriodicTask
for name in ("good", "bad"):
    User.objects.create_superuser(name, f"{name}@example.com", "secret")
Submission.objects.create(author=User.objects.first(), body="Please remember us.")
Submission.objects.update(created_at=timezone.now() - timedelta(hours=1))
schedule = PeriodicTask.objects.get(name="moderator-digest-hourly")
schedule.crontab = None
schedule.interval = IntervalSchedule.objects.get_or_create(every=1, period="seconds")[0]
schedule.save()
"""


@pytest.mark.parametrize("service", ["production"], indirect=True)
def test_production_logs_are_json_without_personal_data(service, smtp):
    async def handle_rcpt(server, session, envelope, address, options):
        if address == "bad@example.com":
            return f"550 5.1.1 <{address}>: no such user"
        envelope.rcpt_tos.append(address)
        return "250 OK"

    smtp.handle_RCPT = handle_rcpt
    service.shell(CREATE_DATA)
    processes = start_processes(service)
    headers = {"Host": "ops-production.example.com", "X-Forwarded-Proto": "https"}
    service.get("/?token=hunter2", **headers, **{"X-Request-ID": "request-0001"})
    service.get("/health/live")
    for path in ("/unsubscribe/hunter2/?a=b", "/no/such/bob@example.com"):
        with pytest.raises(OSError, match="404"):
            service.get(path, **headers)
    wait_for(lambda: smtp.messages, 30, processes["worker"].text)
    processes["worker"].wait_for_text("was not accepted, next attempt")
    assert [process.stop() for process in processes.values()] == [0, 0, 0]

    output = ""
    for name, process in processes.items():
        output += process.text()
        events = [json.loads(line) for line in process.text().splitlines()]
        assert all({"time", "level", "message"} <= event.keys() for event in events)
        assert {event["process"] for event in events} == {name}
    for private in ("@example.com", "hunter2", "guest:guest", "postgres@", SECRET_KEY):
        assert private not in output

    web = [json.loads(line) for line in processes["web"].text().splitlines()]
    requests = [event for event in web if event["logger"].endswith(".access")]
    assert [(event["path"], event["status"]) for event in requests] == [
        ("/", 200),
        ("/unsubscribe/***/", 404),
        ("/no/such/***@***", 404),
    ]
    assert requests[0]["request_id"] == "request-0001"
    worker = [json.loads(line) for line in processes["worker"].text().splitlines()]
    (rejected,) = [event for event in worker if "was not accepted" in event["message"]]
    assert rejected["task_id"]


class SentryHandler(http.server.BaseHTTPRequestHandler):
    """Receives Sentry envelopes and appends their text to the server's ``items``."""

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        self.server.items.append(body.decode())
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"{}")

    def log_message(self, *arguments):
        pass


@pytest.fixture
def sentry():
    """A server that accepts Sentry envelopes. ``sentry.items`` are their texts."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), SentryHandler) as server:
        server.items = []
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


FAILING_VIEW = """

def fail(request, token):
    raise RuntimeError("bob@example.com")


urlpatterns.insert(0, path("unsubscribe/<token>/", fail))
"""

MAKE_RESUME_DUE = """
from datetime import timedelta
from django.utils import timezone
from django_celery_beat.models import PeriodicTask
past = timezone.now() - timedelta(minutes=5)
PeriodicTask.objects.filter(name="deliveries-resume").update(
    last_run_at=past, date_changed=past
)
"""


@pytest.mark.parametrize("service", ["embedded"], indirect=True)
def test_sentry_receives_errors_and_check_ins_without_personal_data(service, sentry):
    with (service.folder / service.folder.name / "urls.py").open("a") as urls:
        urls.write(FAILING_VIEW)
    service.shell(MAKE_RESUME_DUE)
    service.environment["SENTRY_DSN"] = f"http://key@127.0.0.1:{sentry.server_port}/1"
    start_processes(service)
    with pytest.raises(OSError, match="500"):
        service.get("/unsubscribe/hunter2/?email=bob@example.com")

    def find_items(*parts):
        return [item for item in sentry.items if all(part in item for part in parts)]

    for parts in (
        ("RuntimeError", '"environment":"development"'),
        ('"type":"check_in"', '"monitor_slug":"deliveries-resume"', '"status":"in_progress"'),
        ('"type":"check_in"', '"monitor_slug":"deliveries-resume"', '"status":"ok"'),
    ):
        wait_for(lambda parts=parts: find_items(*parts), 20, lambda: "\n".join(sentry.items))
    assert not find_items("bob@example.com")
    assert not find_items("hunter2")
