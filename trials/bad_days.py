"""Play bad days of a service, and count what is lost, sent twice or not answered.

    uv run --directory library python ../trials/bad_days.py [NAME...]

NAME is one of

=============  =========================================================================
``restore``    a digest is sent between a backup and its restore with pg_dump
``locks``      a table is locked in a digest, and all sessions are ended three times
``migrations`` two deploys migrate an empty database at once
``standby``    PostgreSQL crashes in a digest, and its standby is promoted
``years``      the tables have the rows of ten years
``log``        nobody reads the logs of web and worker
``drill``      damaged backups, of which ``manage.py drill`` has to say what is wrong
=============  =========================================================================

Uses a small project with PostgreSQL and RabbitMQ, whose addresses are in library/tests/services.py.
Prints a line for each, and exits with status 1 if one is worse than it may be.
"""

import fcntl
import glob
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from http.client import HTTPConnection
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import damages
import psycopg
import small_project
from servers import Wire
from small_project import Mailbox, services, wait_for

RECIPIENTS = 3000

#: A token that does not exist, which a web process looks for in the database.
TOKEN = f"Token 1-{'x' * 43}"

#: Where Debian keeps the programs of PostgreSQL.
POSTGRESQL = "/usr/lib/postgresql/*/bin"

DIGESTS = """
from django.contrib.auth import get_user_model
from prodserver_ops.mail.digests import DailyDigest, register

@register
class News(DailyDigest):
    name = "news"
    subject = "news"
    template = "sample"
    recipient_fields = ["email"]

    def recipients(self, run):
        return get_user_model().objects.exclude(email="")

    def contents(self, recipients, run):
        return {user.pk: {"content": "news"} for user in recipients}
"""

TASKS = """
import time
from celery import shared_task
from django.contrib.auth.models import Group
from prodserver_ops.mail.tasks import digest_task

@digest_task
def send_news():
    return "news"

@shared_task
def write(number):
    time.sleep(0.3)
    Group.objects.get_or_create(name=f"group {number}")
"""

#: Creates users, and a schedule of the digest that was due at midnight.
MODELS = """
from django.db import models
from django.db.models import Q

class Note(models.Model):
    key = models.CharField(max_length=20, primary_key=True)
    level = models.IntegerField(db_default=12)
    created_at = models.DateTimeField(auto_now_add=True)

    class Meta:
        constraints = [
            models.CheckConstraint(condition=Q(level__gt=1), name="positive"),
            models.CheckConstraint(condition=Q(key__in=["", "a"]) | ~Q(key="b"), name="known"),
        ]
        indexes = [models.Index("level", condition=Q(level__lt=20), name="low")]
"""

NOTES = """
from django.db import connection
from news.models import Note
Note.objects.bulk_create(Note(key=f"note {n}") for n in range(40))
cursor = connection.cursor()
cursor.execute("CREATE FUNCTION notify() RETURNS trigger AS 'BEGIN RAISE NOTICE ''it is low''; RETURN NEW; END' LANGUAGE plpgsql")
cursor.execute("CREATE TRIGGER notice BEFORE UPDATE ON news_note EXECUTE FUNCTION notify()")
cursor.execute("CREATE VIEW low_notes AS SELECT key FROM news_note WHERE level = 14")
"""

CREATE = """
from datetime import timedelta
from django.utils import timezone
from django_celery_beat.models import CrontabSchedule, PeriodicTask
from dummy.models import User
from prodserver_ops.mail.tasks import resume_deliveries
resume_deliveries()
User.objects.bulk_create(
    User(username=f"user{n}", email=f"user{n}@example.com") for n in range(RECIPIENTS)
)
midnight = CrontabSchedule.objects.create(minute="0", hour="0", timezone="UTC")
PeriodicTask.objects.create(name="news", task="news.tasks.send_news", crontab=midnight)
PeriodicTask.objects.update(date_changed=timezone.now() - timedelta(days=2))
"""

RESUME = """
from celery import current_app
from prodserver_ops.mail.tasks import resume_deliveries
current_app.loader.import_default_modules()
resume_deliveries()
"""


class Project(small_project.Project):
    """A project with a digest, and its mail server."""

    def __init__(self, folder, database, broker):
        self.mailbox = Mailbox(delay=0.002)
        super().__init__(
            folder,
            database,
            broker,
            "news",
            {"digests": DIGESTS, "models": MODELS, "tasks": TASKS},
            EMAIL_HOST="127.0.0.1",
            EMAIL_PORT=str(self.mailbox.port),
        )
        templates = Path(folder, "news", "templates", "email")
        templates.mkdir(parents=True)
        for name in ("sample.txt", "sample.html"):
            text = Path(small_project.TESTS, "templates", "email", name).read_text()
            (templates / name).write_text(text)

    def close(self):
        super().close()
        self.mailbox.shutdown()
        self.mailbox.server_close()

    def create(self, recipients):
        """Create recipients and the schedule."""
        self.shell(f"RECIPIENTS = {recipients}\n{CREATE}")
        return recipients

    def wait_for_all(self, recipients, seconds=600):
        """Wait until the mail server has an e-mail for each."""
        mailbox = self.mailbox
        wait_for(
            lambda: len(mailbox.messages) >= recipients,
            seconds,
            lambda: f"{len(mailbox.messages)} of {recipients}: {self.get_log('worker')[-3000:]}",
        )

    def rest(self):
        """Start what is due, and wait until the worker has no messages."""
        self.shell(RESUME)
        count = "from prodserver_ops.broker import count_messages\n"
        count += "from celery import current_app\n"
        count += "print(sum(count_messages(current_app, ['dummy', 'dummy.mail'], 5).values()))"
        wait_for(lambda: self.shell(count).split()[-1] == "0", 60)


def copy(database, name):
    """Return the dump of a database, and a function that restores it to a new one."""
    dump = subprocess.run(
        ["pg_dump", "--format=custom", "--dbname", database], check=True, capture_output=True
    ).stdout

    def restore():
        url = services.create(services.POSTGRESQL, name)
        subprocess.run(
            ["pg_restore", "--clean", "--if-exists", "--no-owner", "--dbname", url],
            input=dump,
            check=True,
        )
        return url

    return restore


def play_restore(recipients=RECIPIENTS):
    """A digest between a dump and its restore."""
    with small_project.make(Project, services.RABBITMQ) as project:
        mailbox = project.mailbox
        project.create(recipients)
        restore = copy(project.database, "restored")
        project.start("worker")
        project.shell(RESUME)
        project.wait_for_all(recipients // 2)
        restore_later = copy(project.database, "restored_later")
        project.wait_for_all(recipients)
        project.stop()
        found = {"recipients": recipients}
        for name, function, option in (
            ("before", restore, ["--mark-sent"]),
            ("during", restore_later, ["--log", "mail.log"]),
        ):
            url = project.environment["DATABASE_URL"] = function()
            try:
                # A new user has no e-mail yet.
                log = "".join(f"sent message-id={key}\n" for key in mailbox.messages)
                (project.folder / "mail.log").write_text(log)
                project.start("worker")
                project.start("beat")
                project.rest()
                project.rest()
                assert "E-mail waits" in project.call("doctor").stdout + project.shell(
                    "from prodserver_ops.console.problems import find_email; print(find_email({}))"
                )
                found[f"twice, {name}"] = mailbox.count_repeated()
                undecided = project.call("restored")
                assert undecided.returncode == 1, undecided
                print(undecided.stdout.partition("\n\n")[0])
                print(project.run("restored", *option), end="")
                project.rest()
                project.rest()
                found[f"twice after {option[0]}"] = mailbox.count_repeated()
                project.stop()
            finally:
                services.delete(services.POSTGRESQL, url)
        return found


def play_locks(recipients=RECIPIENTS, seconds=25):
    """A table is locked for a while in a digest, and all sessions are ended three times."""
    with small_project.make(Project, services.RABBITMQ) as project:
        mailbox = project.mailbox
        mailbox.delay = 0.05
        project.create(recipients)
        project.start("worker")
        project.shell(RESUME)
        project.wait_for_all(recipients // 4)
        with psycopg.connect(project.database) as connection:
            connection.execute("LOCK TABLE ops_digestdelivery")
            time.sleep(seconds)
        project.wait_for_all(recipients // 2)
        after_lock = mailbox.count_repeated()
        for _ in range(3):
            project.query(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                "WHERE datname = current_database() AND pid <> pg_backend_pid()"
            )
            time.sleep(2.3)
        project.wait_for_all(recipients)
        project.rest()
        return {
            "recipients": recipients,
            "missing": recipients - len(mailbox.messages),
            "twice after the lock": after_lock,
            "twice after the sessions": mailbox.count_repeated() - after_lock,
        }


def play_migrations():
    """Two deploys migrate an empty database at once."""
    database = services.create(services.POSTGRESQL, "migrations")
    with tempfile.TemporaryDirectory() as folder:
        project = Project(folder, database, services.URLS[services.RABBITMQ])
        try:
            with ThreadPoolExecutor(2) as threads:
                done = list(threads.map(project.call, ["migrate", "migrate"]))
        finally:
            project.close()
            services.delete(services.POSTGRESQL, database)
    waited = sum("Another process is migrating" in each.stdout for each in done)
    return {"statuses": [each.returncode for each in done], "waited": waited}


class Servers:
    """A PostgreSQL server and its standby, behind an address that leads to one of them."""

    def __init__(self, folder):
        self.folder, self.programs = Path(folder), Path(max(glob.glob(POSTGRESQL)))
        shutil.chown(folder, "postgres")
        self.ports = {name: free_port() for name in ("primary", "standby")}
        self.run("initdb", "-U", "postgres", "--auth=trust", "--no-sync", "-D", "primary")
        self.start("primary")
        self.run(
            *("pg_basebackup", "-U", "postgres", "-h", "127.0.0.1", "-R", "-D", "standby"),
            *("-p", self.ports["primary"]),
        )
        self.start("standby")
        self.wire = Wire(self.ports["primary"])
        self.url = f"postgres://postgres@127.0.0.1:{self.wire.port}/postgres"

    def run(self, name, *arguments):
        user = ["runuser", "-u", "postgres", "--"] if os.geteuid() == 0 else []
        subprocess.run(
            [*user, self.programs / name, *map(str, arguments)],
            cwd=self.folder,
            check=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def start(self, name):
        options = f"-p {self.ports[name]} -c listen_addresses=127.0.0.1 -k {self.folder}"
        self.run("pg_ctl", "-w", "-D", name, "-o", options, "-l", f"{name}.log", "start")

    def fail_over(self):
        """Let the server crash, and promote its standby."""
        self.wire.target = ("127.0.0.1", self.ports["standby"])
        self.run("pg_ctl", "-w", "-D", "primary", "-m", "immediate", "stop")
        self.wire.reset()
        self.run("pg_ctl", "-w", "-D", "standby", "promote")

    def close(self):
        self.wire.close()
        self.run("pg_ctl", "-w", "-D", "standby", "-m", "immediate", "stop")


def play_standby(recipients=RECIPIENTS, tasks=60, clients=8):
    """A server crashes and its standby is promoted: tasks, a digest and web go on."""
    with ExitStack() as stack:
        servers = Servers(stack.enter_context(tempfile.TemporaryDirectory()))
        stack.callback(servers.close)
        project = stack.enter_context(
            small_project.make(Project, services.RABBITMQ, database=servers.url)
        )
        mailbox, port, statuses, end = project.mailbox, free_port(), [], threading.Event()
        mailbox.delay = 0.05
        project.create(recipients)
        for name in ("worker", "web"):
            project.start(name, PORT=str(port))
        wait_for(lambda: get(port, "/health/ready") == 200, 60)

        def ask(number):
            while not end.is_set():
                statuses.append(
                    (time.monotonic(), get(port, "/api/token/", "DELETE", Authorization=TOKEN))
                )
                time.sleep(0.2)

        threads = [threading.Thread(target=ask, args=[n], daemon=True) for n in range(clients)]
        for thread in threads:
            thread.start()
        project.shell(
            f"{RESUME}\nfrom news.tasks import write\n"
            f"for number in range({tasks}): write.delay(number)"
        )
        project.wait_for_all(recipients // 4)
        start = time.monotonic()
        servers.fail_over()
        promoted = time.monotonic()
        project.wait_for_all(recipients, 300)
        count = "SELECT count(*) FROM auth_group"
        wait_for(lambda: project.query(count) == [(tasks,)], 120, lambda: project.query(count))
        end.set()
        project.rest()
        back = [at for at, status in statuses if status != 401 and at > promoted]
        assert statuses[0][1] == 401, statuses[0]
        return {
            "recipients": recipients,
            "missing": recipients - len(mailbox.messages),
            "twice": mailbox.count_repeated(),
            "tasks lost": tasks - project.query(count)[0][0],
            "promoted after": round(promoted - start, 1),
            "web back after": round(max(back, default=promoted) - promoted, 1),
            "waits": "E-mail waits" in project.call("doctor").stdout,
        }


#: Rows of ten years that nothing deleted, by table: an INSERT with a number in ``n``.
YEARS = {
    "ops_digestrun": (
        3650,
        "(digest, period_start, period_end, queued_at, finished_at) SELECT 'news', t - "
        "interval '1 day', t, t, t FROM (SELECT date_trunc('day', now()) - n * interval '1 day' "
        "AS t FROM generate_series(3650, 1, -1) AS n) AS days",
    ),
    "ops_digestdelivery": (
        1000,
        "(digest, recipient_id, period_end, status, reason, created_at) SELECT 'news', u.id, t, "
        "'sent', '', t FROM (SELECT date_trunc('day', now()) - n * interval '1 day' AS t "
        "FROM generate_series(3650, 1, -1) AS n) AS days, "
        "(SELECT id FROM dummy_user ORDER BY id LIMIT {0}) AS u ORDER BY t",
    ),
    "ops_taskrun": (
        3_000_000,
        "(task_id, name, arguments, started_at, duration, status, error, host) "
        "SELECT n, 'task', '', now() - n * interval '0.02 s', 0.1, 'succeeded', '', 'host' "
        "FROM generate_series({0}, 1, -1) AS n",
    ),
    "ops_schedulerun": (
        1_000_000,
        "(schedule_id, due_at, attempts, published_at, started_at) SELECT (SELECT min(id) FROM "
        "django_celery_beat_periodictask), t, 1, t, t FROM (SELECT now() - n * interval '5 s' AS t "
        "FROM generate_series({0}, 1, -1) AS n) AS times",
    ),
    "django_session": (
        1_000_000,
        "(session_key, session_data, expire_date) SELECT n, 'x', now() - n * interval '1 minute' "
        "FROM generate_series(1, {0}) AS n",
    ),
}

#: Times each part in a process, in seconds.
TIMES = """
import json, time
from celery import current_app
from django.contrib.auth import get_user_model
from django.contrib.staticfiles import storage
from django.test import Client
from django.utils import timezone
from prodserver_ops.console import problems, retention
from prodserver_ops.mail.tasks import resume_deliveries
from prodserver_ops.models import DigestDelivery
current_app.loader.import_default_modules()
storage.staticfiles_storage._wrapped = storage.StaticFilesStorage()  # Nothing is collected.
times = {}
def measure(name, function):
    start = time.perf_counter()
    function()
    times[name] = max(times.get(name, 0), round(time.perf_counter() - start, 3))
admin = get_user_model().objects.create_superuser("admin", "", "x")
client = Client(headers={"host": "dummy.example.com", "x-forwarded-proto": "https"})
client.force_login(admin)
for path in ("", "ops/taskrun/operations/", "ops/taskrun/", "ops/digestdelivery/"):
    def get(path=path):
        response = client.get(f"/admin/{path}")
        assert response.status_code == 200, (path, response.status_code)
    get()
    measure(f"page {path}", get)
measure("resume", resume_deliveries)
for kind, find in problems.FINDERS.items():
    measure("finders", lambda: find({}))
until = time.monotonic() + SECONDS
deleted = 0
for batches in retention.get_batches(timezone.now()):
    while time.monotonic() < until:
        start = time.perf_counter()
        count = next(batches, None)
        times["batch"] = max(times.get("batch", 0), round(time.perf_counter() - start, 3))
        if count is None:
            break
        deleted += count
times["rows deleted a second"] = round(deleted / SECONDS)
print("TIMES" + json.dumps(times))
"""


def play_years(part=1.0, seconds=60):
    """Ten years of rows: pages, passes and deletion; ``part`` is that of the rows."""
    with small_project.make(Project, services.RABBITMQ) as project:
        project.create(1000)
        with psycopg.connect(project.database, autocommit=True) as connection:
            found = {"rows": 0}
            for table, (count, sql) in YEARS.items():
                statement = f"INSERT INTO {table} {sql.format(int(count * part))}"
                found["rows"] += connection.execute(statement).rowcount
            connection.execute("ANALYZE")
        times = project.shell(f"SECONDS = {seconds}\n{TIMES}").rpartition("TIMES")[2]
        return found | json.loads(times)


def play_log(requests=96, clients=8):
    """The reader of the log of web and worker hangs: a pipe of 4 KiB that nobody reads."""
    with small_project.make(Project, services.RABBITMQ) as project:
        source, target = os.pipe()
        fcntl.fcntl(target, fcntl.F_SETPIPE_SZ, 4096)
        port = free_port()
        web, worker = (
            project.start(name, target, PORT=str(port), LOG_FORMAT="json")
            for name in ("web", "worker")
        )
        wait_for(lambda: get(port, "/health/live") == 200, 60)
        with ThreadPoolExecutor(clients) as threads:
            statuses = list(threads.map(lambda n: get(port, f"/page/{n}"), range(requests)))
            ready = get(port, "/health/ready")
        stops = []
        for process in (web, worker):
            start = time.monotonic()
            process.send_signal(signal.SIGTERM)
            process.wait(90)
            stops.append(round(time.monotonic() - start, 1))
        os.close(target)
        os.close(source)
        return {"answered": statuses.count(404), "of": requests, "ready": ready, "stops": stops}


def play_drill(names=damages.EXPECTED, recipients=RECIPIENTS):
    """Drills of damaged backups: how many say what is wrong, and whether anything is left."""
    with small_project.make(Project, services.RABBITMQ) as project:
        project.create(recipients)
        project.shell(NOTES)
        project.shell(RESUME)
        right, wrong, seconds = 0, [], [0.0]
        for name in names:
            (project.folder / "backup").write_bytes(damages.make(project, name))
            start = time.monotonic()
            done = project.call("drill", "backup")
            seconds.append(time.monotonic() - start)
            is_said = (damages.EXPECTED[name] or "") in done.stdout
            if is_said and done.returncode == (0 if name in damages.GOOD else 1):
                right += 1
            else:
                wrong.append((name, done.stdout, done.stderr))
        # Another one is ended while it looks at the copy.
        (project.folder / "backup").write_bytes(damages.make(project, "intact, SQL"))
        command = [sys.executable, "-u", "-m", "django", "drill", "backup"]
        with subprocess.Popen(
            command, env=project.environment, cwd=project.folder, stdout=subprocess.PIPE
        ) as process:
            for line in process.stdout:
                if line.startswith(b"Newest"):
                    process.terminate()
        left = project.query("SELECT datname FROM pg_database WHERE datname LIKE '%_drill'")
        left += glob.glob(f"{tempfile.gettempdir()}/drill-*")
        return {
            "backups": len(names),
            "right": right,
            "wrong": wrong,
            "status when ended": process.returncode,
            "left": [each for each in left if str(os.getpid()) in str(each)],
            "e-mails": len(project.mailbox.messages),
            "seconds at most": round(max(seconds), 1),
        }


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def get(port, path, method="GET", **headers):
    """Return the status of a request, or the name of the error."""
    headers |= {"Host": "dummy.example.com", "X-Forwarded-Proto": "https"}
    with closing(HTTPConnection("127.0.0.1", port, timeout=30)) as connection:
        try:
            connection.request(method, path, headers=headers)
            return connection.getresponse().status
        except OSError as error:
            return type(error).__name__


PLAYS = {
    "drill": (
        play_drill,
        lambda found: (
            found["right"] >= found["backups"] * 0.95 and not found["left"] and not found["e-mails"]
        ),
    ),
    "restore": (play_restore, lambda found: not sum_of(found, "twice")),
    "locks": (play_locks, lambda found: not sum_of(found, "twice") and not found["missing"]),
    "migrations": (
        play_migrations,
        lambda found: found["statuses"] == [0, 0] and found["waited"] == 1,
    ),
    "standby": (
        play_standby,
        lambda found: (
            not found["missing"]
            and not found["tasks lost"]
            and found["twice"] <= 16
            and found["web back after"] < 10
        ),
    ),
    "years": (
        play_years,
        lambda found: max(v for k, v in found.items() if k.startswith(("page", "resume", "b"))) < 1,
    ),
    "log": (
        play_log,
        lambda found: (
            found["answered"] == found["of"] and found["ready"] == 200 and max(found["stops"]) < 30
        ),
    ),
}


def sum_of(found, prefix):
    """Return the sum of the numbers whose names start like that."""
    return sum(value for name, value in found.items() if name.startswith(prefix))


def main(*names):
    """Play, print what was found, and return whether all is well."""
    good = True
    for name in names or PLAYS:
        play, is_good = PLAYS[name]
        found = play()
        print(f"{name}: {found}", flush=True)
        good = is_good(found) and good
    return good


if __name__ == "__main__":
    sys.exit(0 if main(*sys.argv[1:]) else 1)
