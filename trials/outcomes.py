"""Compare what is recorded of tasks with what they did, while workers and the database fail.

    uv run trials/outcomes.py [BROKER] [KILLS]

BROKER is ``rabbitmq``, ``redis`` or ``postgresql``. Generates a service with ``task_results=database``,
and runs a worker. ``TEST_POSTGRESQL_URL``, ``TEST_RABBITMQ_URL`` and ``TEST_REDIS_URL`` are the
servers. Then

- tasks fail with texts that PostgreSQL does not store, and arguments contain them,
- a soft time limit interrupts a query,
- a hard time limit kills a process,
- the worker is killed KILLS times while tasks and chords are running,
- the database is read-only for ``READ_ONLY`` seconds.

Each task must have the result of what it did and a record, and the callback of each chord must get all
results. Exits with status 1 otherwise.
"""

import collections
import contextlib
import json
import os
import random
import sys
import time
import uuid
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import psycopg

from tests.conftest import (
    POSTGRES_SERVER,
    RABBITMQ_URL,
    REDIS_SERVER,
    Service,
    clean_environment,
    production_variables,
)
from tests.generate import generated_project
from tests.servers import wait_for

KILLS = 20

#: How many tasks and chords run while the worker is killed, and the tasks of a chord.
TASKS, CHORDS, PARTS = 100, 10, 8

#: How long the database is read-only, in seconds, and how many tasks run then.
READ_ONLY, WRITES = 30, 60

TASK = r"""

import time
from celery import chord, shared_task
from celery.exceptions import SoftTimeLimitExceeded
from django.contrib.auth.models import Group
from django.db import connection

TEXTS = ["a\0b", "\ud800", "é\udcff", "\0\ud800" * 5000, "\U0001f64f" * 5000, "plain"]


def note(name, value):
    with open(name, "a") as file:
        file.write(f"{value}\n")


@shared_task
def fail(number, text):
    raise ValueError(text)


@shared_task
def work(number):
    time.sleep(0.3)
    note("worked", number)
    return number * 2


@shared_task
def collect(values, number):
    note("collected", f"{number} {sum(values)} {len(values)}")


@shared_task(soft_time_limit=2)
def query():
    note("queried", 1)
    try:
        with connection.cursor() as cursor:
            cursor.execute("SELECT pg_sleep(60)")
    except SoftTimeLimitExceeded:
        Group.objects.create(name="cleaned up")
        raise


@shared_task(soft_time_limit=1, time_limit=2)
def hang():
    try:
        time.sleep(60)
    except SoftTimeLimitExceeded:
        time.sleep(60)


@shared_task
def write(number):
    time.sleep(0.3)
    Group.objects.get_or_create(name=f"group {number}")
"""

QUEUE_FAILURES = """
from trial import tasks
print([tasks.fail.delay(n, text).id for n, text in enumerate(tasks.TEXTS)])
print([tasks.query.delay().id, tasks.hang.delay().id])
"""

QUEUE_WORK = f"""
from celery import chord
from trial import tasks
for number in range({TASKS}):
    tasks.work.delay(number)
for number in range({CHORDS}):
    chord([tasks.work.s(number) for _ in range({PARTS})])(tasks.collect.s(number))
"""

QUEUE_WRITES = f"""
from trial import tasks
for number in range({WRITES}):
    tasks.write.delay(number)
"""

READ_RESULTS = """
import json
from django_celery_results.models import TaskResult
from prodserver_ops.models import TaskRun
from django.contrib.auth.models import Group
print("RESULT" + json.dumps({
    "results": list(TaskResult.objects.values_list("task_name", "status", "result")),
    "runs": list(TaskRun.objects.values_list("name", "status", "error")),
    "groups": list(Group.objects.values_list("name", flat=True)),
}))
"""


@contextlib.contextmanager
def make_service(broker):
    """Yield a service, generated, installed and migrated, and a connection to the server."""
    database = f"trial_{uuid.uuid4().hex[:12]}"
    answers = {"broker": broker, "task_results": "database"}
    with generated_project(project_slug="trial", **answers) as folder:
        with (folder / "trial" / "tasks.py").open("a") as tasks:
            tasks.write(TASK)
        environments = folder.parent / "environments"
        environments.mkdir()
        variables = production_variables(f"{POSTGRES_SERVER}/{database}", RABBITMQ_URL)
        uv = os.environ.get("UV", "uv")
        service = Service(folder, uv, environments, REDIS_URL=f"{REDIS_SERVER}/7", **variables)
        with psycopg.connect(f"{POSTGRES_SERVER}/postgres", autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {database}")
            try:
                service.install()
                service.run(service.procfile()["release"])
                service.database = database
                service.connection = connection
                yield service
            finally:
                service.close()
                connection.execute(f"DROP DATABASE {database} WITH (FORCE)")


def read(service, name):
    """Return the lines that tasks noted."""
    path = service.folder / name
    return path.read_text().splitlines() if path.exists() else []


def get_state(service):
    """Return the results, the records, and the rows that tasks wrote."""
    return json.loads(service.shell(READ_RESULTS).partition("RESULT")[2])


def start(service):
    worker = service.start("worker")
    worker.wait_for_text(" ready.", 60)
    return worker


def set_read_only(service, value):
    """Make the database read-only, and end the sessions that can write, or make it as before."""
    service.connection.execute(
        f"ALTER DATABASE {service.database} SET default_transaction_read_only = {value}"
    )
    service.connection.execute(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s",
        [service.database],
    )


def play_failures(service):
    """Return what is wrong after tasks that fail."""
    worker = start(service)
    service.shell(QUEUE_FAILURES)

    def ended():
        runs = [row for row in get_state(service)["runs"] if row[0].startswith("trial.")]
        return len(runs) >= 8 and all(status != "running" for _, status, _ in runs)

    wait_for(ended, 90, worker.text)
    worker.stop(seconds=40)
    state = get_state(service)
    runs = collections.Counter((name, status) for name, status, _ in state["runs"])
    results = collections.Counter((name, status) for name, status, _ in state["results"])
    return {
        "failures missing from the record": 6 - runs["trial.tasks.fail", "failed"],
        "failures without a result": 6 - results["trial.tasks.fail", "FAILURE"],
        "runs of an interrupted query beyond 1": len(read(service, "queried")) - 1,
        "interrupted query not cleaned up": 1 - state["groups"].count("cleaned up"),
        "interrupted query not recorded": 1 - runs["trial.tasks.query", "failed"],
        "killed process not recorded": 1 - runs["trial.tasks.hang", "failed"],
        "killed process recorded twice": max(0, runs["trial.tasks.hang", "failed"] - 1),
    }


def play_kills(service, kills, rng):
    """Return what is wrong after workers were killed."""
    service.shell(QUEUE_WORK)
    for _ in range(kills):
        worker = start(service)
        time.sleep(rng.uniform(0.2, 3))
        worker.kill_all()
    worker = start(service)
    wait_for(lambda: len(get_collected(service)) == CHORDS, 600, worker.text)
    wait_for(lambda: len(set(read(service, "worked"))) == TASKS, 600, worker.text)
    worker.stop(seconds=40)
    state = get_state(service)
    statuses = collections.Counter(
        status for name, status, _ in state["results"] if name == "trial.tasks.work"
    )
    values = collections.Counter(json.loads(row[2]) for row in state["results"] if "work" in row[0])
    for number in range(TASKS):
        values[number * 2] -= 1 + PARTS * (number < CHORDS)
    wrong = {n: v for n, v in get_collected(service).items() if v != (n * 2 * PARTS, PARTS)}
    return {
        "work stored as something else": statuses.total() - statuses["SUCCESS"],
        "work without a result": sum(count < 0 for count in values.values()),
        "chords with other values": len(wrong),
        "(work done twice)": len(read(service, "worked")) - TASKS - CHORDS * PARTS,
        "(chords collected twice)": len(read(service, "collected")) - CHORDS,
    }


def get_collected(service):
    """Return the sum and the number of the values of each chord."""
    rows = [tuple(map(int, line.split())) for line in read(service, "collected")]
    return {number: (total, count) for number, total, count in rows}


def play_read_only(service):
    """Return what is wrong after the database was read-only."""
    worker = start(service)
    service.shell(QUEUE_WRITES)
    time.sleep(1)
    set_read_only(service, "on")
    time.sleep(READ_ONLY)
    set_read_only(service, "off")

    def count():
        return sum(name.startswith("group") for name in get_state(service)["groups"])

    deadline = time.monotonic() + 240
    while count() < WRITES and time.monotonic() < deadline:
        time.sleep(2)
    worker.stop(seconds=40)
    runs = get_state(service)["runs"]
    failed = sum(name.endswith(".write") and status == "failed" for name, status, _ in runs)
    return {"writes missing": WRITES - count(), "writes failed": failed}


def main(broker="rabbitmq", kills=KILLS):
    """Play all, print what was found, and return whether all is well."""
    with make_service(broker) as service:
        problems = {}
        for play in (
            play_failures,
            lambda service: play_kills(service, int(kills), random.Random(1)),
            play_read_only,
        ):
            found = play(service)
            print(f"{broker}: {found}", flush=True)
            problems |= found
    return not any(count for name, count in problems.items() if not name.startswith("("))


if __name__ == "__main__":
    os.environ.update(clean_environment())
    sys.exit(0 if main(*sys.argv[1:]) else 1)
