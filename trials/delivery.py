"""Long and delayed tasks, lost workers, and workers that start again and again, on each broker.

    uv run trials/delivery.py [PART...] [--broker NAME...] [--short]

===========  ======================================================================================
part         what it shows
===========  ======================================================================================
``long``     a task of 430 seconds runs once, while another worker is idle
``lost``     the task of a worker that gets SIGKILL is back within a minute
``delayed``  500 tasks with an ETA of an hour are 500 rows after 12 minutes, no worker holds one,
             and other tasks run; 20 that are due after 20 seconds run once
``killed``   200 delayed tasks while workers get SIGKILL for a minute, at least 30 times: none is
             lost, and only those that were running run again
``starts``   30 starts of a worker leave the failed tasks alone (RabbitMQ)
===========  ======================================================================================

Each part generates a service with the broker, and runs two workers of it. ``--short`` takes minutes
instead of a quarter of an hour. ``TEST_POSTGRESQL_URL``, ``TEST_RABBITMQ_URL`` and
``TEST_REDIS_URL`` are the servers. Exits with status 1 if a figure is not as it should be.
"""

import argparse
import collections
import contextlib
import os
import signal
import sys
import time
import uuid
from pathlib import Path
from urllib.parse import urlsplit

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import psycopg

from tests.conftest import POSTGRES_SERVER, RABBITMQ_URL, REDIS_SERVER, SECRET_KEY, Service
from tests.generate import generated_project

SERVERS = {"rabbitmq": RABBITMQ_URL, "redis": f"{REDIS_SERVER}/9"}

#: Seconds of work, delay of tasks, wait after they were queued, number of starts; and those of
#: the short form. A message is delivered again after 40 seconds without a renewal.
FULL = {"work": 430, "delay": 3600, "wait": 720, "starts": 30, "messages": 500, "settle": 60}
SHORT = {"work": 75, "delay": 3600, "wait": 60, "starts": 22, "messages": 100, "settle": 10}

TASKS = """
from celery import shared_task


def note(*values):
    import os, time

    with open("notes", "a") as file:
        file.write(" ".join(map(str, [time.time(), os.getpid(), *values])) + "\\n")


@shared_task(bind=True, time_limit=900, soft_time_limit=890)
def work(self, name, seconds):
    import time

    note("start", name)
    time.sleep(seconds)
    note("end", name)
"""


class Trial(Service):
    """A service of the trial; ``notes`` are what its tasks noted."""

    def get_notes(self):
        """Return the times of each (event, name)."""
        path = self.folder / "notes"
        notes = collections.defaultdict(list)
        for line in path.read_text().splitlines() if path.exists() else []:
            at, _, event, name = line.split()
            notes[event, name].append(float(at))
        return notes

    def wait_for_note(self, key, seconds, count=1):
        """Wait until there are so many notes; return their times."""
        deadline = time.monotonic() + seconds
        while len(times := self.get_notes()[key]) < count:
            assert time.monotonic() < deadline, f"no {key} after {seconds} s"
            time.sleep(0.2)
        return times

    def queue(self, name, seconds, **options):
        """Queue the task."""
        self.shell(
            f"from trial.tasks import work\nwork.apply_async([{name!r}, {seconds}], **{options!r})"
        )

    def start_workers(self, number=2):
        """Start workers, and wait until they are ready."""
        workers = [self.start("worker") for _ in range(number)]
        for worker in workers:
            worker.wait_for_text("ready", 60)
        return workers


@contextlib.contextmanager
def make_service(broker):
    """Yield the service, generated, installed and migrated."""
    database = f"trial_{uuid.uuid4().hex[:12]}"
    with generated_project(project_slug="trial", broker=broker) as folder:
        with (folder / "trial" / "tasks.py").open("a") as tasks:
            tasks.write(TASKS)
        environments = folder.parent / "environments"
        environments.mkdir()
        service = Trial(
            folder,
            os.environ.get("UV", "uv"),
            environments,
            DJANGO_MODE="prod",
            LOG_FORMAT="text",
            SECRET_KEY=SECRET_KEY,
            DATABASE_URL=f"{POSTGRES_SERVER}/{database}",
            CELERY_BROKER_URL=SERVERS.get(broker, f"{POSTGRES_SERVER}/{database}"),
        )
        execute(f"CREATE DATABASE {database}")
        try:
            service.install("--no-dev")
            service.run(service.procfile()["release"])
            empty(service)
            yield service
        finally:
            service.close()
            empty(service)
            execute(f"DROP DATABASE {database} WITH (FORCE)")


def execute(sql):
    """Run a statement of PostgreSQL."""
    with psycopg.connect(f"{POSTGRES_SERVER}/postgres", autocommit=True) as connection:
        connection.execute(sql)


def empty(service):
    """Delete what the service has in the broker."""
    scheme = urlsplit(service.environment["CELERY_BROKER_URL"]).scheme
    if scheme == "redis":
        service.shell(
            "from celery import current_app as app\n"
            "with app.connection_for_write() as c: c.default_channel.client.flushdb()"
        )
    elif scheme == "amqp":
        service.shell(
            "from celery import current_app as app\n"
            "with app.connection_for_write() as c:\n"
            "  for end in '', '.mail', '.failed':\n"
            "    c.default_channel.queue_delete('trial' + end)"
        )


def play_long(service, times):
    """Return how often a long task was started while it was running: 1."""
    service.start_workers()
    service.queue("long", times["work"])
    service.wait_for_note(("end", "long"), times["work"] + 120)
    starts = service.get_notes()["start", "long"]
    return {"starts of a long task": len(starts)}, len(starts) == 1


def play_lost(service, times):
    """Return after how many seconds the task of a killed worker is back: at most 60."""
    (first,) = service.start_workers(1)
    service.queue("lost", 30)
    service.wait_for_note(("start", "lost"), 60)
    service.start_workers(1)
    time.sleep(7)  # Some renewals later
    first.kill_all()
    killed = time.time()
    *_, again = service.wait_for_note(("start", "lost"), 150, count=2)
    service.wait_for_note(("end", "lost"), 60)
    seconds = round(again - killed, 1)
    return {"seconds until a lost task is back": seconds}, seconds <= 60


def play_starts(service, times):
    """Return how many of ten failed tasks are left after many starts of a worker: all."""
    service.shell(
        "from trial.celery import app\n"
        "from prodserver_ops.worker.app import make_failed_queue\n"
        "from trial.tasks import work\n"
        "for n in range(10): work.apply_async([str(n), 0], queue=make_failed_queue(app))"
    )
    for _ in range(times["starts"]):
        (worker,) = service.start_workers(1)
        time.sleep(1)  # Its thread reads the failed tasks.
        worker.stop(seconds=60)
    left = service.shell(
        "from celery import current_app as app\n"
        "from prodserver_ops import broker\n"
        "print(broker.count_messages(app, ['trial.failed'], 5)['trial.failed'])"
    )
    result = {f"failed tasks after {times['starts']} starts": int(left.split()[-1])}
    return result, set(result.values()) == {10}


def play_delayed(service, times):
    """Return how many tasks wait for their time, and who holds them: the rows, and no worker."""
    number, delay = times["messages"], times["delay"]
    service.shell(
        "from trial.tasks import work\n"
        f"for n in range({number}): work.apply_async([f'late-{{n}}', 0], countdown={delay})"
    )
    service.start_workers()
    service.queue("now", 0)
    service.wait_for_note(("end", "now"), 60)
    service.shell(
        "from trial.tasks import work\n"
        "for n in range(20): work.apply_async([f'soon-{n}', 0], countdown=20)"
    )
    time.sleep(times["wait"])
    counts = service.shell(
        "from celery import current_app as app\n"
        "from prodserver_ops import broker\n"
        "from prodserver_ops.worker import delayed\n"
        "held = [len(tasks) for name in ('scheduled', 'reserved', 'active')\n"
        "  for reply in app.control.broadcast(name, reply=True, timeout=5)\n"
        "  for tasks in reply.values()]\n"
        "print(delayed.WAITING.count(), broker.count_messages(app, ['trial'], 5)['trial'], *held)"
    )
    waiting, queued, *held = map(int, counts.splitlines()[-1].split())
    starts = {
        name: len(at) for (event, name), at in service.get_notes().items() if event == "start"
    }
    soon = [starts.get(f"soon-{n}") for n in range(20)]
    result = {
        "rows": waiting,
        "messages": queued,
        "workers asked": len(held) // 3,
        "held by workers": sum(held),
        "starts of 20 that were due": sum(filter(None, soon)),
    }
    # With PostgreSQL, only one of two workers with the same name gets a question.
    good = held and [waiting, queued, sum(held), set(soon)] == [number, 0, 0, {1}]
    return result, good and not any(name.startswith("late") for name in starts)


def play_killed(service, times):
    """Return how many delayed tasks were lost, or ran again for another reason than a kill."""
    number = 200
    workers = service.start_workers()
    service.shell(
        "from trial.tasks import work\n"
        f"for n in range({number}): work.apply_async([f'k-{{n}}', 0], countdown=8 + n / 5)"
    )
    kills = 0
    deadline = time.monotonic() + 60
    # A broker that counted deliveries would give up some tasks.
    while time.monotonic() < deadline or kills < 30:
        time.sleep(kills % 4 / 2)
        workers[kills % 2].kill_all()
        workers[kills % 2] = service.start("worker")
        workers[kills % 2].wait_for_text("ready", 60)
        kills += 1
    deadline = time.monotonic() + 150
    while time.monotonic() < deadline:
        notes = service.get_notes()
        if all(notes["end", f"k-{index}"] for index in range(number)):
            break
        time.sleep(1)
    time.sleep(times["settle"])
    starts = [len(service.get_notes()["start", f"k-{index}"]) for index in range(number)]
    result = {
        "delayed tasks": number,
        "kills": kills,
        "lost": starts.count(0),
        "run again": sum(starts) - number,
    }
    if 0 in starts:
        result["rows, messages, given up"] = service.shell(
            "from celery import current_app as app\n"
            "from prodserver_ops import broker\n"
            "from prodserver_ops.worker import delayed\n"
            "counts = broker.count_messages(app, ['trial', 'trial.failed'], 5)\n"
            "print(delayed.WAITING.count(), *counts.values())"
        ).splitlines()[-1]
    # A worker runs two tasks at the same time.
    return result, 0 not in starts and sum(starts) - number <= 2 * kills


PARTS = {
    "long": play_long,
    "lost": play_lost,
    "delayed": play_delayed,
    "killed": play_killed,
    "starts": play_starts,
}


def main():
    """Play the parts; return whether all figures are as they should be."""
    parser = argparse.ArgumentParser()
    parser.add_argument("parts", nargs="*", choices=[[], *PARTS], default=list(PARTS))
    parser.add_argument("--broker", action="append", choices=["rabbitmq", "redis", "postgresql"])
    parser.add_argument("--short", action="store_true")
    arguments = parser.parse_args()
    times = SHORT if arguments.short else FULL
    # A worker of the trial ends with it.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    good = True
    for broker in arguments.broker or ["rabbitmq", "redis", "postgresql"]:
        for part in arguments.parts or PARTS:
            if part == "starts" and broker != "rabbitmq":
                continue
            with make_service(broker) as service:
                result, is_good = PARTS[part](service, times)
            print(broker, part, result, "" if is_good else "WRONG", flush=True)
            good &= is_good
    return good


if __name__ == "__main__":
    sys.exit(0 if main() else 1)
