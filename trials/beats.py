"""Disturb three beats in every way, and compare what they dispatched with the schedules.

    uv run trials/beats.py [ROUNDS] [SEED]

Generates a service and runs a worker and three beats on PostgreSQL (127.0.0.1:5432, user
postgres, trust) and RabbitMQ (127.0.0.1:5672, guest). In each round one beat is paused, killed,
cut off from a server, faced with silence, or its clock jumps. Then it compares the runs that
the worker recorded with the schedules: none twice, none early, none of the crontab missing,
and no gap of ``TAKEOVER`` seconds in the interval. Exits with status 1 if anything is wrong.
"""

import collections
import contextlib
import functools
import itertools
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from datetime import UTC, datetime, timedelta
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import psycopg

from tests.servers import Wire

ROOT = Path(__file__).resolve().parent.parent
SERVER = "postgres://postgres@127.0.0.1:5432"
ROUNDS, SEED, BEATS = 1000, 20261125, 3

#: How long no run may be dispatched, in seconds.
TAKEOVER = 90

#: How far ahead of its time a run may be recorded, in seconds: the clocks of two processes.
TOLERANCE = 0.05

#: Seconds between the runs of the crontab.
CRONTAB_SECONDS = 120

#: Runs in each process of a beat: moves its clock by the seconds that a file names.
CLOCK = """
import datetime, os, threading, time, time_machine

def follow(path):
    offset, traveller = 0, None
    while True:
        time.sleep(0.2)
        wanted = int(open(path).read() or 0)
        if wanted == offset:
            continue
        if traveller is not None:
            traveller.stop()
        offset = wanted
        moved = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=offset)
        traveller = time_machine.travel(moved, tick=True)
        traveller.start()

threading.Thread(target=follow, args=[os.environ["TRIAL_CLOCK"]], daemon=True).start()
"""

TASK = """

from celery import shared_task


@shared_task(bind=True)
def note(self, name):
    import time

    with open("notes", "a") as file:
        file.write(f"{name} {self.queued_at.timestamp()} {time.time()}\\n")
"""

SCHEDULES = """
from django_celery_beat.models import CrontabSchedule, IntervalSchedule, PeriodicTask
PeriodicTask.objects.update(enabled=False)
every = IntervalSchedule.objects.create(every=1, period="seconds")
crontab = CrontabSchedule.objects.create(minute="*/2", timezone="Europe/London")
PeriodicTask.objects.create(name="i", task="trial.tasks.note", args='["i"]', interval=every)
PeriodicTask.objects.create(name="c", task="trial.tasks.note", args='["c"]', crontab=crontab)
"""


class Beat:
    """A beat with wires of its own to the servers, and a clock of its own."""

    def __init__(self, number, service):
        self.service = service
        self.log = service.folder / f"beat-{number}.log"
        self.clock = service.folder / f"clock-{number}"
        self.clock.write_text("0")
        self.wires = [Wire(5432), Wire(5672)]
        self.process = None
        self.paused = False

    def start(self):
        database, broker = self.wires
        environment = self.service.environment | {
            "DATABASE_URL": f"{SERVER.replace('5432', str(database.port))}/{self.service.database}",
            "RABBITMQ_URL": f"amqp://guest:guest@127.0.0.1:{broker.port}//",
        }
        environment |= {
            "TRIAL_CLOCK": str(self.clock),
            "PYTHONPATH": str(self.service.folder / "clock"),
        }
        self.process = self.service.spawn("beat", self.log, environment)

    def check_runs(self):
        """Start the beat again if it ended, as the platform does."""
        if self.process.poll() is not None:
            self.start()

    def kill(self, rng):
        """Kill it, and start another."""
        self.process.kill()
        self.process.wait()
        self.start()

    def pause(self, rng):
        """Stop it for some seconds."""
        self.process.send_signal(signal.SIGSTOP)
        self.service.later(rng.uniform(0.2, 5), functools.partial(self._continue, self.process))

    def pause_long(self, rng):
        """Stop it until another has taken over."""
        self.process.send_signal(signal.SIGSTOP)
        self.service.later(75, functools.partial(self._continue, self.process))

    def _continue(self, process):
        process.send_signal(signal.SIGCONT)

    def cut(self, rng):
        """End its connections to a server."""
        rng.choice(self.wires).reset()

    def silence(self, rng):
        """Drop all packets between it and a server for some seconds."""
        wire = rng.choice(self.wires)
        wire.cut()
        self.service.later(rng.uniform(1, 90), wire.mend)

    def jump(self, rng):
        """Change its clock."""
        self.clock.write_text(str(rng.choice([0, 30, -30, 3600, -3600, 86400])))


#: How often each disturbance comes, against the others. Long ones never overlap.
DISTURBANCES = {"kill": 3, "pause": 4, "cut": 3, "jump": 3, "pause_long": 1, "silence": 1}
LONG = {"pause_long": 80, "silence": 95}


class Service:
    """A generated service in production mode."""

    def __init__(self, folder):
        self.folder = folder
        self.database = f"trial_{uuid.uuid4().hex[:12]}"
        self.processes = []
        self.timers = []
        self.environment = {
            name: value for name, value in os.environ.items() if name != "VIRTUAL_ENV"
        } | {
            "DJANGO_MODE": "prod",
            "SECRET_KEY": "a-key-for-this-trial-alone-of-more-than-fifty-characters-",
            "DATABASE_URL": f"{SERVER}/{self.database}",
            "RABBITMQ_URL": "amqp://guest:guest@127.0.0.1:5672//",
            "PATH": f"{folder / '.venv' / 'bin'}{os.pathsep}{os.environ['PATH']}",
        }

    def run(self, *command):
        subprocess.run(
            command,
            cwd=self.folder,
            env=self.environment,
            check=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )

    def spawn(self, name, log, environment):
        with log.open("ab") as file:
            process = subprocess.Popen(
                ["python", "manage.py", "prodserver", name],
                cwd=self.folder,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.processes.append(process)
        return process

    def later(self, seconds, function):
        """Call a function after some seconds, at the start of a round."""
        self.timers.append((time.monotonic() + seconds, function))

    def run_timers(self, *, all_of_them=False):
        now = time.monotonic()
        due = [timer for timer in self.timers if all_of_them or timer[0] <= now]
        self.timers = [timer for timer in self.timers if timer not in due]
        for _, function in due:
            function()

    def get_notes(self):
        """Return name, due time and time of each run that the worker recorded."""
        path = self.folder / "notes"
        lines = path.read_text().splitlines() if path.exists() else []
        return [(name, float(due), float(at)) for name, due, at in map(str.split, lines)]

    def close(self):
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def generate(folder):
    """Generate and install the service, and return it."""
    from cookiecutter.main import cookiecutter

    os.environ["COOKIECUTTER_CONFIG"] = f"{folder}/none"
    (Path(folder) / "none").touch()
    answers = {"setup": False, "project_slug": "trial"}
    path = cookiecutter(str(ROOT), no_input=True, extra_context=answers, output_dir=folder)
    with (Path(path) / "trial" / "tasks.py").open("a") as tasks:
        tasks.write(TASK)
    service = Service(Path(path))
    uv = os.environ.get("UV") or shutil.which("uv")
    # With the development dependencies, for time-machine
    service.run(uv, "sync", "--quiet", "--compile-bytecode")
    (service.folder / "clock").mkdir()
    (service.folder / "clock" / "sitecustomize.py").write_text(CLOCK)
    with psycopg.connect(f"{SERVER}/postgres", autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {service.database}")
    service.run("python", "manage.py", "migrate", "-v0")
    return service


def play(service, rounds, rng):
    """Play the rounds. Return the number of each disturbance, and start and end."""
    worker = service.spawn("worker", service.folder / "worker.log", service.environment)
    beats = [Beat(number, service) for number in range(BEATS)]
    for beat in beats:
        beat.start()
    while not service.get_notes():
        time.sleep(0.5)
    start = time.time()
    played, long_until = collections.Counter(), 0.0
    for number in range(1, rounds + 1):
        (name,) = rng.choices(list(DISTURBANCES), DISTURBANCES.values())
        if name in LONG and time.monotonic() < long_until:
            name = "pause"
        if name in LONG:
            long_until = time.monotonic() + LONG[name]
        beat = rng.choice(beats)
        beat.check_runs()
        getattr(beat, name)(rng)
        played[name] += 1
        time.sleep(rng.uniform(0.5, 3))
        service.run_timers()
        for beat in beats:
            beat.check_runs()
        if number % 50 == 0:
            problems = compare(service.get_notes(), start, time.time() - TAKEOVER)
            print(f"{number} rounds, {time.time() - start:.0f} s: {problems}", flush=True)
    service.run_timers(all_of_them=True)
    for beat in beats:
        beat.clock.write_text("0")
    time.sleep(TAKEOVER)
    assert worker.poll() is None
    return played, start, time.time()


def compare(notes, start, end):
    """Return what is wrong between two times."""
    runs = collections.Counter((name, due) for name, due, _ in notes)
    twice = sum(count - 1 for count in runs.values())
    early = sum(at < due - TOLERANCE for _, due, at in notes)
    crontab = {due for name, due in runs if name == "c"}
    first = datetime.fromtimestamp(start, UTC).replace(second=0, microsecond=0)
    step = timedelta(seconds=CRONTAB_SECONDS)
    due = first + step - timedelta(minutes=first.minute % 2)
    expected = set()
    while due.timestamp() < end - 2:
        expected.add(due.timestamp())
        due += step
    intervals = sorted(at for name, _, at in notes if name == "i" and at <= end)
    gap = max(b - a for a, b in itertools.pairwise([start, *intervals, end]))
    return {
        "runs": len(runs),
        "twice": twice,
        "early": early,
        "missing": len(expected - crontab),
        "longest gap": round(gap, 1),
    }


def main(rounds=ROUNDS, seed=SEED):
    """Play, print what was found, and return whether all is well."""
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        service = generate(folder)
        try:
            service.run("python", "manage.py", "shell", "-v0", "-c", SCHEDULES)
            played, start, end = play(service, rounds, rng)
            result = compare(service.get_notes(), start, end)
        finally:
            service.close()
            with psycopg.connect(f"{SERVER}/postgres", autocommit=True) as connection:
                connection.execute(f"DROP DATABASE {service.database} WITH (FORCE)")
    print(f"{sum(played.values())} rounds: {dict(played)}")
    print(result)
    wrong = result["twice"] or result["early"] or result["missing"]
    return not wrong and result["longest gap"] < TAKEOVER


if __name__ == "__main__":
    sys.exit(0 if main(*map(int, sys.argv[1:])) else 1)
