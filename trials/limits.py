"""Let a service reach limits of its machine and servers, and see that it goes on afterwards.

    uv run --directory library python ../trials/limits.py [NAME...]

NAME is one of

===============  =========================================================================
``descriptors``  64 file descriptors for each process
``memory``       a task whose child process is killed again and again, among others
``connections``  PostgreSQL accepts fewer connections than the processes need
``read-only``    no file can be written, not even in /tmp
``disk``         the disk for logs and temporary files is full
``held``         all threads of web are busy with requests that do not end
``cpu``          others take the CPU for a minute
``clocks``       the clocks of worker and beat are five minutes fast, slow, or apart
``rabbitmq``     RabbitMQ restarts three times, loses a queue, and revokes a permission
``backlog``      200,000 messages wait in RabbitMQ
``redis``        Redis has no memory left
``pgmq``         PGMQ after 1,000,000 messages
===============  =========================================================================

Uses a small project. Starts its own RabbitMQ, Redis and PostgreSQL where they are hurt; otherwise
those of library/tests/services.py. Some need root or a C compiler, and say so. Prints a line for each,
and exits with status 1 if one is worse than it may be.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import ExitStack, closing, contextmanager, suppress
from http.client import HTTPConnection
from pathlib import Path
from urllib.parse import urlsplit

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import psycopg
import redis
import small_project
from servers import RabbitMQ, free_port, reachable
from small_project import services, wait_for

TASKS = """
import os, signal, time
from celery import shared_task
from django.contrib.auth.models import Group

@shared_task
def write(number, seconds=0):
    time.sleep(seconds)
    Group.objects.get_or_create(name=f"group {number}")

@shared_task
def pass_on(number):
    write.delay(number)

@shared_task
def die():
    os.kill(os.getpid(), signal.SIGKILL)  # As the kernel does when there is no memory left.
"""

URLS = """
import time
from django.http import HttpResponse
from django.urls import path
from dummy.urls import *

def wait(request, seconds):
    time.sleep(seconds)
    return HttpResponse()

urlpatterns = [path("wait/<int:seconds>", wait), *urlpatterns]
"""

#: A token that does not exist, which a web process looks for in the database.
TOKEN = f"Token 1-{'x' * 43}"

ROOT = Path(__file__).resolve().parent.parent

NAMES = ("web", "worker", "beat")


class Project(small_project.Project):
    """A project with tasks that write rows."""

    def __init__(self, folder, database, broker):
        super().__init__(folder, database, broker, "limited", {"tasks": TASKS, "urls": URLS})
        path = self.folder / "limited" / "settings.py"
        text = path.read_text()
        urls = 'ROOT_URLCONF = "limited.urls"'
        path.write_text(text.replace("    INSTALLED", f"    {urls}\n    INSTALLED", 1))
        self.environment["CELERY_BROKER_URL"] = broker
        self.port = free_port()

    def start_all(self, *prefix, names=NAMES, **variables):
        for name in names:
            self.start(name, prefix=prefix, PORT=str(self.port), PGAPPNAME=name, **variables)

    def queue(self, *calls, **kwargs):
        """Queue tasks, such as ``write.delay(1)``."""
        self.shell("from limited.tasks import *\n" + "\n".join(calls), **kwargs)

    def count(self):
        """Return how many tasks have written their row."""
        return self.query("SELECT count(*) FROM auth_group")[0][0]

    def get(self, path="/health/ready", timeout=30):
        """Return the status of a request, or the name of the error."""
        headers = {"Host": "dummy.example.com", "X-Forwarded-Proto": "https"}
        method = "GET"
        if path == "/token":
            method, path, headers["Authorization"] = "DELETE", "/api/token/", TOKEN
        with closing(HTTPConnection("127.0.0.1", self.port, timeout=timeout)) as connection:
            try:
                connection.request(method, path, headers=headers)
                return connection.getresponse().status
            except OSError as error:
                return type(error).__name__

    def wait_for_web(self, status=200, seconds=90):
        wait_for(lambda: self.get() == status, seconds, lambda: self.get_log("web")[-3000:])

    def wait_for_tasks(self, count, seconds=120):
        """Wait until so many tasks have run; return how long it took, in seconds."""
        start = time.monotonic()
        wait_for(
            lambda: self.count() >= count,
            seconds,
            lambda: f"{self.count()} of {count}: {self.get_log('worker')[-3000:]}",
        )
        return round(time.monotonic() - start, 1)

    def stop_all(self):
        """Stop all processes; return the longest time in seconds, and the statuses."""
        start, processes = time.monotonic(), list(self.processes)
        self.stop()
        statuses = sorted({process.returncode for process in processes})
        return {"stop": round(time.monotonic() - start, 1), "statuses": statuses}


def make(broker=services.RABBITMQ, **kwargs):
    return small_project.make(Project, broker, **kwargs)


def check_at_work(project, tasks=20, first=0):
    """Queue tasks and wait until they have run; return how long it took, in seconds."""
    project.queue(f"for n in range({first}, {first + tasks}): write.delay(n)")
    return project.wait_for_tasks(first + tasks)


def play_descriptors(limit=64):
    """Each process may open 64 files."""
    with make() as project:
        project.start_all("prlimit", f"--nofile={limit}")
        project.wait_for_web()
        found = {"seconds": check_at_work(project)}
        clients = [HTTPConnection("127.0.0.1", project.port, timeout=5) for _ in range(100)]
        for client in clients:
            client.connect()
        found["with 100 idle clients"] = project.get(timeout=10)
        for client in clients:
            client.close()
        project.wait_for_web()
        found["open"] = {
            name: len(os.listdir(f"/proc/{process.pid}/fd"))
            for name, process in zip(NAMES, project.processes, strict=True)
        }
        found["deep"] = project.get("/health/ready?deep")
        return found | project.stop_all()


def play_memory(kills=10, tasks=20):
    """A task kills its child process whenever it runs; others go on."""
    with make() as project:
        project.start_all(names=["worker"])
        project.queue(
            f"for n in range({kills}): die.delay(); [write.delay(n * 2 + k) for k in range(2)]"
        )
        found = {"seconds": project.wait_for_tasks(kills * 2)}
        given_up = f"{kills} tasks were given up"
        wait_for(lambda: given_up in project.call("doctor").stdout, 120)
        return found | project.stop_all()


def get_connections(url):
    """Return how many sessions each process name has, by PGAPPNAME."""
    with psycopg.connect(url, autocommit=True) as raw:
        return dict(
            raw.execute(
                "SELECT application_name, count(*) FROM pg_stat_activity WHERE application_name = "
                "ANY(%s) AND datname = current_database() GROUP BY 1",
                [list(NAMES)],
            ).fetchall()
        )


def count_connections(broker, seconds=9, **variables):
    """Return the most connections that each process holds while all its threads wait for a lock."""
    with make(broker) as project, psycopg.connect(project.database) as lock:
        project.start_all(**variables)
        project.wait_for_web()
        project.get("/health/ready?deep")
        check_at_work(project, 4)
        most, end = {}, threading.Event()

        def ask(path):
            while not end.is_set():
                project.get(path)

        for path, count in (("/token", 24), ("/health/ready", 4), ("/health/ready?deep", 4)):
            for _ in range(count):
                threading.Thread(target=ask, args=[path], daemon=True).start()
        project.shell(EVERY_SECOND)
        project.queue("for n in range(20): write.delay(n)", "for n in range(20): pass_on.delay(n)")
        for _ in range(2):
            lock.execute("LOCK TABLE auth_group, ops_token, django_session")
            until = time.monotonic() + seconds
            while time.monotonic() < until:
                for name, count in get_connections(project.database).items():
                    most[name] = max(most.get(name, 0), count)
                time.sleep(0.05)
            lock.rollback()
            time.sleep(1)
        end.set()
        project.stop_all()
        return most


def read_formulas(broker):
    """Return the connections of each process at most, as docs/limits.md of a service says."""
    name = "postgresql" if broker == services.POSTGRESQL else "rabbitmq"
    text = (ROOT / "templates" / "brokers" / f"{name}.j2").read_text()
    formulas = json.loads(re.search(r"set connections = (\{.*?\})", text)[1])
    formulas["web"] = f"WEB_CONCURRENCY * (WEB_THREADS + {formulas['web']})"
    values = {"WEB_CONCURRENCY": 2, "WEB_THREADS": 4, "WORKER_CONCURRENCY": 2}
    return {
        name: eval(str(formula).replace("`", "").replace("\u00d7", "*"), values)
        for name, formula in formulas.items()
    }


def play_connections():
    """The most connections of each process, and a database that accepts too few for a while."""
    found = {}
    for broker in (services.RABBITMQ, services.POSTGRESQL):
        most, limits = count_connections(broker), read_formulas(broker)
        found[broker] = {name: f"{most[name]} of {limits[name]}" for name in NAMES}
        found[f"{broker} within"] = all(most[name] <= limits[name] for name in NAMES)
    return found | play_few_connections()


def play_few_connections(tasks=60, seconds=20, limit=3):
    """PostgreSQL accepts three connections for a while."""
    with ExitStack() as stack:
        database = services.create(services.POSTGRESQL, "few")
        stack.callback(services.delete, services.POSTGRESQL, database)
        role = urlsplit(database).path[1:]
        with psycopg.connect(database, autocommit=True) as admin:
            admin.execute(f"CREATE ROLE {role} LOGIN; ALTER DATABASE {role} OWNER TO {role}")
            url = database.replace("postgres@", f"{role}@")
            project = stack.enter_context(make(database=url))
            project.start_all()
            project.wait_for_web()
            project.queue(f"for n in range({tasks}): write.delay(n, 0.5)")
            admin.execute(f"ALTER ROLE {role} CONNECTION LIMIT {limit}")
            admin.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = %s", [role]
            )
            statuses, until = [], time.monotonic() + seconds
            while time.monotonic() < until:
                statuses.append(project.get("/health/ready?deep"))
                time.sleep(0.5)
            admin.execute(f"ALTER ROLE {role} CONNECTION LIMIT -1")
            project.database = database
            after = project.wait_for_tasks(tasks, 300)
            project.wait_for_web()
            found = {
                "too few: health": {status: statuses.count(status) for status in set(statuses)},
                "tasks lost": tasks - project.count(),
                "seconds after": after,
                "deep": project.get("/health/ready?deep"),
                **project.stop_all(),
            }
            admin.execute(
                f"REASSIGN OWNED BY {role} TO postgres; DROP OWNED BY {role}; DROP ROLE {role}"
            )
            return found


def play_read_only():
    """No file can be written: the processes work all the same."""
    script = 'mount -o remount,bind,ro /; for d in /tmp /var; do mountpoint -q $d && mount -o remount,bind,ro $d; done; exec "$@"'
    with make() as project:
        project.start_all("unshare", "-m", "sh", "-c", script, "-")
        project.wait_for_web()
        found = {"seconds": check_at_work(project), "deep": project.get("/health/ready?deep")}
        return found | project.stop_all()


def play_disk():
    """The disk for logs and temporary files is full: what was logged is lost, and nothing else."""
    script = (
        "mount -o remount,bind,ro /; mount -t tmpfs -o size=16k tmpfs /var/tmp; "
        'head -c 20000 /dev/zero > /var/tmp/full; exec "$@" >> /var/tmp/log 2>&1'
    )
    with make() as project:
        prefix = ["unshare", "-m", "sh", "-c", script, "-"]
        project.start_all(*prefix, TMPDIR="/var/tmp")
        project.wait_for_web()
        found = {"seconds": check_at_work(project), "deep": project.get("/health/ready?deep")}
        root = Path("/proc", str(project.processes[0].pid), "root")
        (root / "var/tmp/full").unlink()
        check_at_work(project, 20, 20)
        project.get("/unknown")
        log = (root / "var/tmp/log").read_text()
        found["lost is logged"] = "log events were lost" in log
        return found | project.stop_all()


def play_held(seconds=45):
    """All threads of web are busy with requests that do not end."""
    with make() as project:
        project.start_all(names=["web"], WEB_CONCURRENCY="1")
        project.wait_for_web()
        threads = [
            threading.Thread(target=project.get, args=[f"/wait/{seconds}", 60]) for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        time.sleep(10)
        found = {"after 10 s": project.get()}
        time.sleep(25)
        found |= {"after 35 s": project.get(), "live": project.get("/health/live")}
        for thread in threads:
            thread.join()
        return found | {"afterwards": project.get()} | project.stop_all()


def play_cpu(seconds=60, hogs=6):
    """Six processes use the CPU of the service for a minute."""
    with make() as project:
        project.start_all("taskset", "-c", "0", "nice", "-n", "5")
        project.wait_for_web()
        found = {"before": check_at_work(project)}
        busy = [
            subprocess.Popen(["taskset", "-c", "0", sys.executable, "-c", "while True: pass"])
            for _ in range(hogs)
        ]
        try:
            statuses, until = [], time.monotonic() + seconds
            project.queue("for n in range(20, 60): write.delay(n)")
            while time.monotonic() < until:
                statuses.append((project.get("/health/ready"), project.get("/health/ready?deep")))
                time.sleep(1)
        finally:
            for process in busy:
                process.kill()
        found["ready"] = [sum(s[n] == 200 for s in statuses) for n in (0, 1)], len(statuses)
        found["after"] = project.wait_for_tasks(60)
        return found | project.stop_all()


#: By how many seconds the clocks of worker, beat and client are wrong.
CLOCKS = [(300, -300, 0), (-300, 300, 0), (0, 0, -300)]


def play_clocks(tasks=20):
    """The clock of each process is five minutes wrong: what is due runs once."""
    found = {}
    for worker, beat, client in CLOCKS:
        with make() as project:
            library = project.folder / "clock.so"
            source = Path(__file__).with_name("clock.c")
            subprocess.run(["cc", "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)

            def fake_clock(offset, library=library):
                return {"LD_PRELOAD": str(library), "CLOCK_OFFSET": str(offset)}

            for name, offset in (("web", 0), ("worker", worker), ("beat", beat)):
                project.start_all(names=[name], **fake_clock(offset))
            project.wait_for_web()
            project.shell(EVERY_SECOND)
            seconds = check_at_work(project, tasks)
            start = time.monotonic()
            project.queue("write.apply_async([100], countdown=20)", **fake_clock(client))
            project.wait_for_tasks(tasks + 1, 400)
            ran = round(time.monotonic() - start)
            query = "SELECT count(*), count(DISTINCT (schedule_id, due_at)) FROM ops_schedulerun"
            wait_for(lambda query=query, project=project: project.query(query)[0][0] > 5, 120)
            rows = project.query(query)[0]
            found[f"worker {worker}, beat {beat}, client {client}"] = {
                "seconds": seconds,
                "countdown of 20": ran,
                "runs": rows,
                "deep": project.get("/health/ready?deep"),
                **project.stop_all(),
            }
    return found


#: Creates a schedule for each second, and enough time for it to be dispatched.
EVERY_SECOND = """
from django_celery_beat.models import IntervalSchedule, PeriodicTask
interval, _ = IntervalSchedule.objects.get_or_create(every=2, period="seconds")
PeriodicTask.objects.create(name="each", task="limited.tasks.write", args="[1]", interval=interval)
"""


def play_rabbitmq(tasks=300):
    """RabbitMQ restarts three times in a minute, loses a queue, and revokes a permission."""
    with ExitStack() as stack:
        path = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        server = RabbitMQ(path)
        server.start()
        stack.callback(server.stop)
        project = stack.enter_context(make_on(server.url))

        project.start_all()
        project.wait_for_web()
        project.queue(f"for n in range({tasks}): write.delay(n, 0.2)")
        for _ in range(3):
            time.sleep(5)
            server.stop()
            time.sleep(3)
            server.start()
        found = {"after restarts": project.wait_for_tasks(tasks, 240)}
        project.wait_for_web()
        server.control("delete_queue", "dummy")
        start = time.monotonic()
        wait_for(lambda: project.get("/health/ready?deep") == 200, 120)
        found["deleted queue"] = check_at_work(project, 20, tasks), round(time.monotonic() - start)
        server.control("set_permissions", "guest", "^$", "^$", "^$")
        time.sleep(15)
        found["revoked: deep"] = project.get("/health/ready?deep")
        found["revoked: doctor"] = [
            line for line in project.call("doctor").stdout.splitlines() if "broker" in line
        ]
        server.control("set_permissions", "guest", ".*", ".*", ".*")
        found["granted again"] = check_at_work(project, 20, tasks + 20)
        found["running"] = [process.poll() for process in project.processes]
        return found | project.stop_all()


@contextmanager
def make_on(url):
    """Yield a project on a broker of its own."""
    with ExitStack() as stack:
        database = services.create(services.POSTGRESQL, "limits")
        stack.callback(services.delete, services.POSTGRESQL, database)
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        project = Project(folder, database, url)
        stack.callback(project.close)
        project.run("migrate", "--run-syncdb", "-v0")
        yield project


def play_backlog(messages=200_000):
    """So many messages wait; health, doctor and a worker that starts."""
    with make() as project:
        start = time.monotonic()
        project.queue(
            "from itertools import batched",
            f"for keys in batched(range({messages}), 10000): write.apply_many([(n % 50,) for n in keys])",
        )
        found = {"queued in": round(time.monotonic() - start)}
        project.start_all()
        project.wait_for_web()
        start = time.monotonic()
        found["doctor"] = [
            line for line in project.call("doctor").stdout.splitlines() if "queue" in line
        ]
        found["doctor took"] = round(time.monotonic() - start, 1)
        found["rows"] = project.wait_for_tasks(50)
        found["deep"] = project.get("/health/ready?deep")
        found["memory in MB"] = [get_memory(process.pid) for process in project.processes]
        return found | project.stop_all()


def get_memory(pid):
    """Return the resident memory of a process in MB."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4 // 1024


def play_redis(tasks=50):
    """Redis has no memory left, and later it has."""
    port = free_port()
    url = f"redis://127.0.0.1:{port}/0"
    server = subprocess.Popen(
        ["redis-server", "--port", str(port), "--maxmemory", "4mb", "--save", ""],
        stdout=subprocess.DEVNULL,
    )
    try:
        wait_for(lambda: reachable(port), 30)
        with make_on(url) as project, closing(redis.Redis.from_url(url)) as client:
            project.start_all()
            project.wait_for_web()
            found = {"before": check_at_work(project)}
            fill = 0
            for size in (10_000, 100, 1):
                with suppress(redis.ResponseError):
                    while True:
                        client.set(f"fill-{fill}", "x" * size)
                        fill += 1
            time.sleep(30)
            done = project.call("shell", "-c", "from limited.tasks import *; write.delay(20)")
            found["queued while full"] = done.stderr.strip().splitlines()[-1:][:100]
            found["deep"] = project.get("/health/ready?deep")
            found["doctor"] = [
                line for line in project.call("doctor").stdout.splitlines() if "broker" in line
            ]
            found["running"] = [process.poll() for process in project.processes]
            client.delete(*(f"fill-{n}" for n in range(fill)))
            found["after"] = check_at_work(project, tasks, 20)
            project.wait_for_web()
            return found | project.stop_all()
    finally:
        server.kill()
        server.wait()


#: Measures the median of ``delay()``, in milliseconds.
DELAY = """
import statistics, time
from limited.tasks import write
times = []
for number in range(300):
    start = time.perf_counter()
    write.delay(number % 50)
    times.append(time.perf_counter() - start)
print(round(statistics.median(times) * 1000, 2))
"""

#: Queues messages as long as that of a task, and deletes them as a worker does.
SEND = "SELECT count(*) FROM pgmq.send_batch(%s, array_fill(%s::jsonb, ARRAY[1000]))"
TAKE = "SELECT count(*) FROM pgmq.delete(%s, ARRAY(SELECT msg_id FROM pgmq.read(%s, 60, 1000)))"

TABLE = """
SELECT pg_total_relation_size(relid) / 1048576, n_dead_tup, autovacuum_count
FROM pg_stat_user_tables WHERE schemaname = 'pgmq' AND relname = %s
"""


def play_pgmq(messages=1_000_000):
    """So many messages wait in PGMQ and are taken: the table, and whether it is still fast."""
    queue, table, body = "dummy", "q_dummy", json.dumps({"body": "x" * 800})
    found = {}

    def measure(name):
        project.start_all()
        project.wait_for_web()
        delay = float(project.shell(DELAY))
        wait_for(lambda: not project.query("SELECT count(*) FROM pgmq.q_dummy")[0][0], 300)
        start = time.monotonic()
        calls = "write.apply_many([(n % 50,) for n in range(500)])"
        project.queue(calls)
        wait_for(lambda: not project.query("SELECT count(*) FROM pgmq.q_dummy")[0][0], 300)
        seconds = time.monotonic() - start
        found[name] = {"delay() in ms": delay, "500 tasks in s": round(seconds, 1)}
        found[name] |= project.stop_all()

    with make(services.POSTGRESQL) as project:
        measure("before")
        with psycopg.connect(project.database, autocommit=True) as connection:

            def repeat(statement, *parameters):
                start = time.monotonic()
                for _ in range(messages // 1000):
                    connection.execute(statement, parameters)
                seconds = round(time.monotonic() - start)
                size = connection.execute(TABLE, [table]).fetchone()
                return {"seconds": seconds, "MB, dead rows, vacuumed": size}

            found["queued"] = repeat(SEND, queue, body)
            found["taken"] = repeat(TAKE, queue, queue)
            measure("after")
            connection.execute("VACUUM pgmq.q_dummy")
            measure("after a vacuum")
            found["queued again"] = repeat(SEND, queue, body)
    return found


def is_fast(found):
    """Return whether PGMQ is as fast as before, and has reused its room."""
    before, after = found["before"], found["after a vacuum"]
    return (
        after["delay() in ms"] < 2 * before["delay() in ms"]
        and after["500 tasks in s"] < 2 * before["500 tasks in s"]
        and found["queued again"]["MB, dead rows, vacuumed"][0]
        < 1.5 * found["queued"]["MB, dead rows, vacuumed"][0]
    )


def is_fine(found):
    """Return whether health was fine in the end, and all processes stopped with status 0."""
    return found.get("deep", 200) == 200 and found["statuses"] == [0] and found["stop"] < 30


PLAYS = {
    "descriptors": (
        play_descriptors,
        lambda found: is_fine(found) and found["with 100 idle clients"] == 200,
    ),
    "memory": (play_memory, is_fine),
    "connections": (
        play_connections,
        lambda found: (
            is_fine(found)
            and found["rabbitmq within"]
            and found["postgresql within"]
            and found["too few: health"].get(503)
            and not found["tasks lost"]
        ),
    ),
    "read-only": (play_read_only, is_fine),
    "disk": (play_disk, lambda found: is_fine(found) and found["lost is logged"]),
    "held": (
        play_held,
        lambda found: (
            is_fine(found)
            and [found[name] for name in ("after 10 s", "after 35 s", "live", "afterwards")]
            == [200, 503, 200, 200]
        ),
    ),
    "cpu": (play_cpu, is_fine),
    "clocks": (
        play_clocks,
        lambda found: all(
            is_fine(each) and each["runs"][0] == each["runs"][1] for each in found.values()
        ),
    ),
    "rabbitmq": (
        play_rabbitmq,
        lambda found: (
            is_fine(found) and found["revoked: deep"] == 503 and found["running"] == [None] * 3
        ),
    ),
    "backlog": (play_backlog, lambda found: is_fine(found) and found["doctor took"] < 30),
    "redis": (
        play_redis,
        lambda found: (
            found["deep"] == 503 and found["running"] == [None] * 3 and found["statuses"] == [0]
        ),
    ),
    "pgmq": (play_pgmq, is_fast),
}


def main(*names):
    """Play, print what was found, and return whether all is well."""
    good = True
    for name in names or PLAYS:
        play, is_good = PLAYS[name]
        found = play()
        print(f"{name}: {found}", flush=True)
        good = bool(is_good(found)) and good
    return good


if __name__ == "__main__":
    sys.exit(0 if main(*sys.argv[1:]) else 1)
