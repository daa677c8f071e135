"""Kill and deploy the workers of resumable imports, and compare the rows with those of the files.

    uv run --directory library python ../trials/resumable.py [KILLS] [DEPLOYS] [BROKER...]

Runs two workers and a beat of a small project on PostgreSQL, with each of the brokers ``rabbitmq``,
``redis`` and ``postgresql``, whose addresses are in library/tests/services.py. Several imports of
10,000 rows are always running. Processes of the pool, and now and then a whole worker, are killed,
and workers are deployed: SIGTERM, and a new one. Then each import must have each row once, and each
kill may have repeated at most one step, which a file notes. At the end, it compares the time of an
import with that of a plain loop. Exits with status 1 if anything is wrong.
"""

import collections
import contextlib
import os
import random
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import small_project
from small_project import services

KILLS, DEPLOYS, ROWS, SEED = 1000, 50, 10_000, 20261130

#: How many imports run at the same time, and how many processes run them.
IMPORTS, WORKERS = 3, 2

#: Seconds between two kills, and the part of them that is a whole worker.
PAUSE, WHOLE = (0.1, 0.5), 0.03

#: How long the imports may take after the last kill, and a worker to stop, in seconds.
REST, STOP = 900, 60

MODELS = """
from django.db import models

class Row(models.Model):
    job = models.IntegerField()
    number = models.IntegerField()
    text = models.CharField(max_length=100)
"""

TASKS = """
import os, time
from celery import shared_task
from django.db import transaction
from prodserver_ops.worker.continuations import resumable_task, set_total
from .models import Row

def read(total, after=0):
    for number in range(after + 1, total + 1):
        yield number, f"row {number}"

@resumable_task(interval=0)
def import_steps(cursor, job, total):
    set_total(total)
    with open(os.environ["NOTES"], "a", buffering=1) as notes:
        for number, text in read(total, after=cursor or 0):
            notes.write(f"{job} {number}\\n")
            Row.objects.create(job=job, number=number, text=text)
            yield number

@resumable_task
def import_rows(cursor, job, total):
    set_total(total)
    for number, text in read(total, after=cursor or 0):
        Row.objects.create(job=job, number=number, text=text)
        time.sleep(0.002)
        yield number

@resumable_task
def import_fast(cursor, job, total):
    for number, text in read(total, after=cursor or 0):
        Row.objects.create(job=job, number=number, text=text)
        yield number

def import_plainly(job, total):
    with transaction.atomic():
        for number, text in read(total):
            Row.objects.create(job=job, number=number, text=text)
"""

FILES = {"models": MODELS, "tasks": TASKS}

#: Compares times in one process, in turns. A second is a common interval of commits.
BENCHMARK = """
import time
from imports.models import Row
from imports import tasks
from prodserver_ops.worker import continuations

continuations.SLICE = 10**6

def resumable(job, total):
    task = tasks.import_fast
    task.push_request(id=f"benchmark {job}", args=[job, total], kwargs={}, headers={}, retries=0,
        called_directly=False, is_eager=False, delivery_info={})
    try:
        task.run(job, total)
    finally:
        task.pop_request()

times = {resumable: [], tasks.import_plainly: []}
for job in range(-7, 0):
    for function in times:
        start = time.process_time(), time.perf_counter()
        function(job, 5000)
        times[function].append((time.process_time() - start[0], time.perf_counter() - start[1]))
        Row.objects.filter(job=job).delete()
for part in (0, 1):
    ours, plain = (min(pair[part] for pair in pairs) for pairs in times.values())
    print(ours / plain)
"""


class Project(small_project.Project):
    """The project with the imports."""

    def __init__(self, folder, database, broker):
        notes = Path(folder) / "notes"
        notes.touch()
        super().__init__(folder, database, broker, "imports", FILES, NOTES=str(notes))
        self.notes = notes

    def get_finished(self):
        """Return the number of imports that have finished."""
        sql = "SELECT count(*) FROM ops_resumablerun WHERE status = 'finished'"
        return self.query(sql)[0][0]

    def get_unfinished(self):
        """Return the imports that have not finished."""
        return self.query("SELECT * FROM ops_resumablerun WHERE status <> 'finished'")


def make_project(broker):
    """Return the context manager of the project on a broker, with its database."""
    return small_project.make(Project, broker)


def get_children(process):
    """Return the processes of a worker's pool; with PGMQ, a thread starts them."""
    pids = []
    for path in Path(f"/proc/{process.pid}/task").glob("*/children"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            pids += map(int, path.read_text().split())
    return pids


def play(project, kills, deploys, rows, rng):
    """Disturb the imports; return the number of imports, of kills that met one, and the stops."""
    workers = [project.start("worker") for _ in range(WORKERS)]
    project.start("beat")
    started, killed, shown, stops, stopping = 0, 0, 0, [], []
    moments = set(rng.sample(range(kills), deploys)) if deploys <= kills else set(range(kills))
    number = 0
    while number < kills:
        if missing := IMPORTS - started + project.get_finished():
            jobs = range(started + 1, started + missing + 1)
            names = {job: "import_steps" if job % 2 else "import_rows" for job in jobs}
            calls = [f"tasks.{name}.delay({job}, {rows})" for job, name in names.items()]
            project.shell("; ".join(["from imports import tasks", *calls]))
            started += missing
        worker = rng.choice(workers)
        if number in moments:
            moments.discard(number)
            worker.send_signal(signal.SIGTERM)
            stopping.append((worker, time.monotonic()))
            workers[workers.index(worker)] = project.start("worker")
        elif rng.random() < WHOLE:
            os.killpg(worker.pid, signal.SIGKILL)
            worker.wait()
            workers[workers.index(worker)] = project.start("worker")
            killed, number = killed + 1, number + 1
        elif children := get_children(worker):
            with contextlib.suppress(ProcessLookupError):
                os.kill(rng.choice(children), signal.SIGKILL)
                killed, number = killed + 1, number + 1
        stops += [time.monotonic() - since for old, since in stopping if old.poll() is not None]
        stopping = [(old, since) for old, since in stopping if old.poll() is None]
        for index, other in enumerate(workers):
            if other.poll() is not None:
                workers[index] = project.start("worker")
        time.sleep(rng.uniform(*PAUSE))
        if killed >= shown + 100:
            shown = killed
            print(f"{killed} kills, {started} imports", flush=True)
    until = time.monotonic() + REST
    while project.get_finished() < started or stopping:
        assert time.monotonic() < until, f"not finished: {project.get_unfinished()}, {stopping}"
        time.sleep(1)
        stops += [time.monotonic() - since for old, since in stopping if old.poll() is not None]
        stopping = [(old, since) for old, since in stopping if old.poll() is None]
    return started, killed, stops


def compare(project, imports, rows):
    """Return what is wrong with the rows, and the steps that were repeated."""
    sql = "SELECT job, number, count(*) FROM imports_row WHERE job > 0 GROUP BY job, number"
    counts = {(job, number): count for job, number, count in project.query(sql)}
    expected = {(job, number) for job in range(1, imports + 1) for number in range(1, rows + 1)}
    notes = collections.Counter(project.notes.read_text().splitlines())
    return {
        "lost": len(expected - counts.keys()),
        "doubled": sum(count - 1 for count in counts.values()),
        "repeated": sum(count - 1 for count in notes.values()),
    }


def run(broker, kills=KILLS, deploys=DEPLOYS, rows=ROWS, seed=SEED):
    """Play on a broker; return what was found."""
    with make_project(broker) as project:
        start = time.monotonic()
        imports, killed, stops = play(project, kills, deploys, rows, random.Random(seed))
        result = {"broker": broker, "imports": imports, "kills": killed, "deploys": len(stops)}
        result |= {"seconds": round(time.monotonic() - start)}
        result |= {"longest stop": round(max(stops, default=0), 1)}
        return result | compare(project, imports, rows)


def benchmark():
    """Return how long a resumable import takes against a plain loop: processor time, and time."""
    with make_project(services.POSTGRESQL) as project:
        cpu, elapsed = map(float, project.shell(BENCHMARK).split()[-2:])
    return cpu, elapsed


def is_good(result):
    """Return whether nothing is lost or doubled, a kill repeats one step, and workers stop soon."""
    limits = result["repeated"] <= result["kills"] and result["longest stop"] <= STOP
    return limits and not result["lost"] and not result["doubled"]


def main(kills=KILLS, deploys=DEPLOYS, *brokers):
    # The processes of the trial end with it.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    results = []
    for broker in brokers or services.URLS:
        results.append(run(broker, int(kills), int(deploys)))
        print(results[-1], flush=True)
    cpu, elapsed = benchmark()
    print(f"against a plain loop: {cpu:.3f} of the processor time, {elapsed:.3f} of the time")
    return all(map(is_good, results)) and min(cpu, elapsed) < 1.03


if __name__ == "__main__":
    sys.exit(0 if main(*sys.argv[1:]) else 1)
