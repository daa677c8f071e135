"""Operations: real processes say what is wrong with them, and nothing that is private."""

import gzip
import http.server
import json
import shlex
import socket
import subprocess
import threading
import time

import pytest

from tests.servers import wait_for

pytestmark = pytest.mark.slow

SECRET_KEY = "a-key-for-this-test-alone-of-more-than-fifty-characters"


def run(service, command, **variables):
    """Run a command to its end, whatever that is."""
    return subprocess.run(
        shlex.split(command),
        cwd=service.folder,
        env=service.environment | variables,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
    )


class TestABadVariable:
    @pytest.fixture
    def service(self, bake, make_service):
        service = make_service(bake(project_slug="variables"))
        service.install("--no-dev")
        return service

    def test_ends_every_process_and_command_in_one_line(self, service):
        for command in (
            *service.procfile().values(),
            "python manage.py doctor --json",
            "celery --app variables worker",
            "gunicorn variables.wsgi --check-config",
        ):
            done = run(service, command, PORT="80a")
            assert (done.returncode, done.stdout) == (1, ""), command
            assert done.stderr == 'PORT: got "80a", wants a whole number from 1 to 65535\n', command

    def test_has_a_line_of_its_own_and_tells_no_secret(self, service):
        done = run(
            service,
            "python manage.py prodserver web",
            DJANGO_MODE="prod",
            SECRET_KEY="hunter2",
            DATABASE_URL="mysql://user:hunter2@db/name",
        )
        assert (done.returncode, done.stdout) == (1, "")
        assert sorted(done.stderr.splitlines()) == [
            "DATABASE_URL: got a URL that starts with mysql://, "
            "wants postgres://USER:PASSWORD@HOST:PORT/NAME",
            "RABBITMQ_URL: got nothing, wants amqp://... or amqps://...",
            "SECRET_KEY: got 7 characters, 7 of them different, "
            "wants at least 50 random characters",
        ]


# A service with all processes


@pytest.fixture(params=["embedded", "production"])
def service(request, bake, make_service, smtp):
    """A service that is installed and migrated, with a moderator and a submission."""
    variables = {"EMAIL_HOST": "127.0.0.1", "EMAIL_PORT": smtp.port}
    if request.param == "production":
        variables |= {
            "DJANGO_MODE": "prod",
            "SECRET_KEY": SECRET_KEY,
            "DATABASE_URL": request.getfixturevalue("postgres_url"),
            "RABBITMQ_URL": request.getfixturevalue("rabbitmq_url"),
        }
    service = make_service(bake(project_slug=f"ops_{request.param}"), **variables)
    service.install("--no-dev")
    service.run(service.procfile()["release"])
    if request.param == "production":
        service.run("python manage.py collectstatic --noinput")
    return service


def start(service):
    """Start all three processes; return them by their names, at work."""
    processes = {name: service.start(name) for name in ("web", "worker", "beat")}
    processes["web"].wait_for_text("Listening at")
    processes["worker"].wait_for_text(" ready.", seconds=60)
    processes["beat"].wait_for_text("beat: Starting...")
    return processes


def examine(service, **variables):
    """Run the doctor; return its report by the status of each check."""
    began = time.monotonic()
    done = run(service, "python manage.py doctor --json", **variables)
    assert time.monotonic() - began < 25
    report = json.loads(done.stdout)
    assert done.returncode == (0 if report["ok"] else 1)
    assert "guest:guest" not in done.stdout + done.stderr
    assert "hunter2" not in done.stdout + done.stderr
    return report, {name: check["status"] for name, check in report["checks"].items()}


WELL = dict.fromkeys(
    ("database", "migrations", "broker", "worker", "beat", "schedules", "e-mail"), "ok"
)

LOST = """
from django_celery_beat.models import PeriodicTask
PeriodicTask.objects.filter(name="user-digest-daily").update(task="no.such.task")
"""


def test_the_doctor_finds_what_is_broken_and_what_mends_it(service, smtp):
    processes = start(service)
    # Beat says that it starts a moment before it answers.
    wait_for(lambda: examine(service)[1] == WELL, 30, processes["beat"].text)
    report, statuses = examine(service)
    assert statuses == WELL, report
    names = [schedule["name"] for schedule in report["schedules"]]
    assert "user-digest-daily" in names
    assert all(schedule["next_run"] for schedule in report["schedules"])

    # A process that has ended, and the command that brings it back.
    for name in ("worker", "beat"):
        processes[name].stop()
        report, statuses = examine(service)
        assert statuses == WELL | {name: "broken"}
        command = report["checks"][name]["next"]
        mended = service.spawn(name, *shlex.split(command))
        wait_for(lambda: examine(service)[1] == WELL, 30, mended.text)

    # A schedule whose task is gone, and the command that stops it.
    service.shell(LOST)
    report, statuses = examine(service)
    assert statuses == WELL | {"schedules": "broken"}
    (lost,) = [schedule for schedule in report["schedules"] if schedule["problem"]]
    assert lost["problem"] == "its task does not exist: no.such.task"
    service.run(lost["next"])
    assert examine(service)[1] == WELL

    # A migration that is not applied.
    service.run(f"python manage.py migrate {service.folder.name} 0003")
    report, statuses = examine(service)
    assert statuses == WELL | {"migrations": "broken"}
    service.run(report["checks"]["migrations"]["next"])
    assert examine(service)[1] == WELL


def test_the_doctor_waits_for_nobody(bake, make_service):
    """Servers that take a connection and never say a word."""
    service = make_service(bake(project_slug="ops_silent"))
    service.install("--no-dev")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        report, statuses = examine(
            service,
            DATABASE_URL=f"postgres://user:hunter2@127.0.0.1:{port}/name",
            CELERY_BROKER_URL=f"amqp://user:hunter2@127.0.0.1:{port}//",
            EMAIL_HOST="127.0.0.1",
            EMAIL_PORT=str(port),
        )
    down = dict.fromkeys(("database", "broker", "e-mail"), "broken")
    assert statuses == dict.fromkeys(WELL, "unknown") | down
    assert all(report["checks"][name]["next"] for name in down)


PEOPLE = """
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
def test_a_log_in_production_is_json_and_names_nobody(service, smtp):
    async def refuse(server, session, envelope, address, options):
        if address == "bad@example.com":
            return f"550 5.1.1 <{address}>: no such user"
        envelope.rcpt_tos.append(address)
        return "250 OK"

    smtp.handle_RCPT = refuse
    service.shell(PEOPLE)
    processes = start(service)
    headers = {"Host": "ops-production.example.com", "X-Forwarded-Proto": "https"}
    service.get("/?token=hunter2", **headers, **{"X-Request-ID": "request-0001"})
    service.get("/health/live")
    for path in ("/unsubscribe/hunter2/?a=b", "/no/such/bob@example.com"):
        with pytest.raises(OSError, match="404"):
            service.get(path, **headers)
    wait_for(lambda: smtp.messages, 30, processes["worker"].text)
    processes["worker"].wait_for_text("was refused: 550 5.1.1 <***@***>")
    assert [process.stop() for process in processes.values()] == [0, 0, 0]

    text = ""
    for name, process in processes.items():
        text += process.text()
        events = [json.loads(line) for line in process.text().splitlines()]
        assert all({"time", "level", "message"} <= event.keys() for event in events)
        assert {event["process"] for event in events} == {name}
    for private in ("@example.com", "hunter2", "guest:guest", "postgres@", SECRET_KEY):
        assert private not in text

    web = [json.loads(line) for line in processes["web"].text().splitlines()]
    requests = [event for event in web if event["logger"].endswith(".access")]
    assert [(event["path"], event["status"]) for event in requests] == [
        ("/", 200),
        ("/unsubscribe/***/", 404),
        ("/no/such/***@***", 404),
    ]
    assert requests[0]["request_id"] == "request-0001"
    worker = [json.loads(line) for line in processes["worker"].text().splitlines()]
    (refused,) = [event for event in worker if "was refused" in event["message"]]
    assert refused["task_id"]


class SentryRequest(http.server.BaseHTTPRequestHandler):
    """Takes what is reported to Sentry; ``items`` of the server are the texts of it."""

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
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), SentryRequest) as server:
        server.items = []
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


DUE = """
from datetime import timedelta
from django.utils import timezone
from django_celery_beat.models import PeriodicTask
past = timezone.now() - timedelta(minutes=5)
PeriodicTask.objects.filter(name="deliveries-resume").update(last_run_at=past)
"""


@pytest.mark.parametrize("service", ["embedded"], indirect=True)
def test_sentry_gets_errors_and_schedules_and_nobodys_data(service, sentry):
    unsubscribe = service.folder / service.folder.name / "unsubscribe.py"
    text = unsubscribe.read_text()
    before, line, after = text.partition("    try:\n")
    assert line
    unsubscribe.write_text(f'{before}    raise RuntimeError("bob@example.com")\n{line}{after}')
    service.shell(DUE)
    service.environment["SENTRY_DSN"] = f"http://key@127.0.0.1:{sentry.server_port}/1"
    start(service)
    with pytest.raises(OSError, match="500"):
        service.get("/unsubscribe/hunter2/?email=bob@example.com")

    def reported(*parts):
        return [item for item in sentry.items if all(part in item for part in parts)]

    for parts in (
        ("RuntimeError", '"environment":"development"'),
        ('"type":"check_in"', '"monitor_slug":"deliveries-resume"', '"status":"in_progress"'),
        ('"type":"check_in"', '"monitor_slug":"deliveries-resume"', '"status":"ok"'),
    ):
        wait_for(lambda parts=parts: reported(*parts), 20, lambda: "\n".join(sentry.items))
    assert not reported("bob@example.com")
    assert not reported("hunter2")
