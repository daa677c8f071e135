"""Disturb three beats in every way, and compare what they dispatched with the schedules.

    uv run trials/beats.py [ROUNDS] [SEED] [BEATS]

Generates a service and runs a worker and three beats on PostgreSQL (127.0.0.1:5432, user
postgres, trust) and RabbitMQ (127.0.0.1:5672, guest). All beats are running. In each round one of them
is paused, killed, disconnected from a server, cut off from it without notice, or its clock jumps. Then
it compares the runs that the worker recorded with the schedules: none twice, none early, none of
the crontabs missing, and no schedule of every second without a run for ``GAP`` seconds while a beat that
nothing disturbs is running. Exits with status 1 if anything is wrong.
"""

import collections
import contextlib
import functools
import itertools
import os
import random
import shlex
import signal
import sys
import time
import uuid
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import psycopg

from tests.conftest import RABBITMQ_URL, Service, production_variables
from tests.generate import generated_project
from tests.servers import Wire

SERVER = "postgres://postgres@127.0.0.1:5432"
ROUNDS, SEED, BEATS = 1000, 20261125, 3

#: How long no run may be dispatched while a beat is running, in seconds.
GAP = 5

#: How long a round takes, in seconds.
ROUND = (0.2, 1.2)

#: How often a round begins although no other beat is running, and how long others wait, in seconds.
ALL_AWAY, PATIENCE = 0.2, 4

#: How long a beat may be cut off after its connections work again, in seconds: the servers wait too.
RECONNECT = 30

#: Runs that were due shortly before may still be on their way, in seconds.
UNDERWAY = 15

#: How long the beats may take to be running again after the last round, in seconds.
REST = 30

#: How far ahead of its time a run may be recorded, in seconds: the clocks of two processes.
TOLERANCE = 0.05

#: Seconds between the runs of a crontab, and the number of schedules of each kind.
CRONTAB_SECONDS = 60
CRONTABS, INTERVALS = 10, 5

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
crontab = CrontabSchedule.objects.create(minute="*", timezone="Europe/London")
for kind, count, timing in (("i", INTERVALS, {"interval": every}), ("c", CRONTABS, {"crontab": crontab})):
    for number in range(count):
        name = f"{kind}{number}"
        PeriodicTask.objects.create(name=name, task="trial.tasks.note", args=f'["{name}"]', **timing)
""".replace("INTERVALS", str(INTERVALS)).replace("CRONTABS", str(CRONTABS))

#: The beats that have recorded a heartbeat since they were started.
HEARTBEATS = "SELECT pid FROM ops_heartbeat WHERE process = 'beat'"


#: When the runs of each schedule of every second were dispatched, in seconds since the epoch.
DISPATCHED = """
SELECT s.name, extract(epoch FROM r.published_at)::float
FROM ops_schedulerun r JOIN django_celery_beat_periodictask s ON s.id = r.schedule_id
WHERE s.name LIKE 'i%' AND r.published_at IS NOT NULL ORDER BY r.published_at
"""


class Beat:
    """A beat with wires of its own to the servers, and a clock of its own."""

    def __init__(self, number, service):
        self.service = service
        self.clock = service.folder / f"clock-{number}"
        self.clock.write_text("0")
        self.wires = [Wire(5432), Wire(5672)]
        self.process = None
        self.is_starting = False
        #: How many disturbances have not ended, and until when a long one goes on.
        self.disturbances = 0
        self.long_until = 0.0
        #: When it was undisturbed: start and end of each span, in seconds since the epoch.
        self.spans = []
        self.undisturbed_from = None

    def disturb(self):
        """Note that it may be unable to work."""
        self.disturbances += 1
        self.note_span()

    def recover(self):
        """Note that a disturbance has ended."""
        self.disturbances -= 1
        self.note_span()

    def note_span(self):
        """Note since when it is undisturbed, or that it is no longer."""
        if self.disturbances or self.is_starting:
            if self.undisturbed_from is not None:
                self.spans.append((self.undisturbed_from, time.time()))
            self.undisturbed_from = None
        elif self.undisturbed_from is None:
            self.undisturbed_from = time.time()

    def start(self):
        self.is_starting = True
        self.note_span()
        database, broker = self.wires
        url = self.service.environment["DATABASE_URL"]
        self.process = self.service.spawn(
            "beat",
            *shlex.split(self.service.procfile()["beat"]),
            DATABASE_URL=url.replace(":5432", f":{database.port}"),
            RABBITMQ_URL=RABBITMQ_URL.replace(":5672", f":{broker.port}"),
            TRIAL_CLOCK=str(self.clock),
            PYTHONPATH=str(self.service.folder / "clock"),
        ).popen

    def check_runs(self):
        """Start the beat again if it ended, as the platform does."""
        if self.process.poll() is not None:
            self.start()
        if self.is_starting and self.process.pid in self.service.get_beats():
            self.is_starting = False
            self.note_span()

    def kill(self, rng):
        """Kill it, and start another."""
        self.process.kill()
        self.process.wait()
        self.start()

    def pause(self, rng):
        """Stop it for some seconds."""
        self.disturb()
        self.process.send_signal(signal.SIGSTOP)
        self.service.later(rng.uniform(0.2, 5), functools.partial(self._continue, self.process))

    def pause_long(self, rng):
        """Stop it for more than a minute."""
        self.disturb()
        self.process.send_signal(signal.SIGSTOP)
        self.service.later(75, functools.partial(self._continue, self.process))

    def _continue(self, process):
        process.send_signal(signal.SIGCONT)
        self.recover()

    def cut(self, rng):
        """End its connections to a server."""
        rng.choice(self.wires).reset()

    def silence(self, rng):
        """Drop all packets between it and a server for some seconds."""
        wire = rng.choice(self.wires)
        self.disturb()
        wire.cut()
        seconds = rng.uniform(1, 90)
        self.service.later(seconds, wire.mend)
        self.service.later(seconds + RECONNECT, self.recover)

    def jump(self, rng):
        """Change its clock."""
        self.clock.write_text(str(rng.choice([0, 30, -30, 3600, -3600, 86400])))


#: How often each disturbance comes, against the others. One beat at least is free of long ones.
DISTURBANCES = {"kill": 3, "pause": 4, "cut": 3, "jump": 3, "pause_long": 1, "silence": 1}
LONG = {"pause_long": 80, "silence": 95 + RECONNECT}


class TrialService(Service):
    """A generated service, and what happens to it later."""

    def __init__(self, folder, uv, environments, **variables):
        super().__init__(folder, uv, environments, **variables)
        self.timers = []

    def later(self, seconds, function):
        """Call a function after some seconds, at the end of a round."""
        self.timers.append((time.monotonic() + seconds, function))

    def run_timers(self, *, all_of_them=False):
        now = time.monotonic()
        due = [timer for timer in self.timers if all_of_them or timer[0] <= now]
        self.timers = [timer for timer in self.timers if timer not in due]
        for _, function in due:
            function()

    def get_beats(self):
        """Return the process ids of the beats that work, or have worked."""
        url = self.environment["DATABASE_URL"]
        with psycopg.connect(url, autocommit=True) as connection:
            return {pid for (pid,) in connection.execute(HEARTBEATS)}

    def get_notes(self):
        """Return name, due time and time of each run that the worker recorded."""
        path = self.folder / "notes"
        lines = path.read_text().splitlines() if path.exists() else []
        return [(name, float(due), float(at)) for name, due, at in map(str.split, lines)]

    def get_dispatched(self):
        """Return the times at which the runs of each schedule of every second were dispatched."""
        times = collections.defaultdict(list)
        with psycopg.connect(self.environment["DATABASE_URL"]) as connection:
            for name, at in connection.execute(DISPATCHED):
                times[name].append(at)
        return times


@contextlib.contextmanager
def make_service():
    """Yield the service, generated, installed and migrated."""
    database = f"trial_{uuid.uuid4().hex[:12]}"
    with generated_project(project_slug="trial") as folder:
        with (folder / "trial" / "tasks.py").open("a") as tasks:
            tasks.write(TASK)
        (folder / "clock").mkdir()
        (folder / "clock" / "sitecustomize.py").write_text(CLOCK)
        environments = folder.parent / "environments"
        environments.mkdir()
        variables = production_variables(f"{SERVER}/{database}", RABBITMQ_URL)
        service = TrialService(folder, os.environ.get("UV", "uv"), environments, **variables)
        with psycopg.connect(f"{SERVER}/postgres", autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {database}")
            try:
                # With the development dependencies, for time-machine
                service.install()
                service.run(service.procfile()["release"])
                service.shell(SCHEDULES)
                yield service
            finally:
                service.close()
                connection.execute(f"DROP DATABASE {database} WITH (FORCE)")


def play(service, rounds, rng, number_of_beats):
    """Play the rounds. Return the number of each disturbance, and start and end."""
    worker = service.start("worker")
    beats = [Beat(number, service) for number in range(number_of_beats)]
    for beat in beats:
        beat.start()
    while not service.get_notes():
        time.sleep(0.5)
    start = time.time()
    played = collections.Counter()
    for number in range(1, rounds + 1):
        (name,) = rng.choices(list(DISTURBANCES), DISTURBANCES.values())
        beat, now = rng.choice(beats), time.monotonic()
        busy = [each for each in beats if each.long_until > now]
        if name in LONG and (beat in busy or len(busy) >= len(beats) - 1):
            name = "pause"
        if name in LONG:
            beat.long_until = now + LONG[name]
        if rng.random() > ALL_AWAY:
            wait_for_another(service, beats, beat)
        beat.check_runs()
        getattr(beat, name)(rng)
        played[name] += 1
        time.sleep(rng.uniform(*ROUND))
        service.run_timers()
        for beat in beats:
            beat.check_runs()
        if number % 50 == 0:
            problems = compare(service, beats, start, time.time() - UNDERWAY)
            print(f"{number} rounds, {time.time() - start:.0f} s: {problems}", flush=True)
    service.run_timers(all_of_them=True)
    for beat in beats:
        beat.clock.write_text("0")
    time.sleep(REST)
    assert worker.popen.poll() is None
    return played, beats, start, time.time()


def wait_for_another(service, beats, beat):
    """Wait until a beat is running beside the one that is disturbed next."""
    deadline = time.monotonic() + PATIENCE
    while not any(other.undisturbed_from for other in beats if other is not beat):
        if time.monotonic() > deadline:
            return
        time.sleep(0.2)
        service.run_timers()
        for each in beats:
            each.check_runs()


def compare(service, beats, start, end):
    """Return what is wrong between two times.

    Gaps are those between the times at which runs were dispatched: on a busy machine, the worker
    starts them later.
    """
    notes = service.get_notes()
    runs = collections.Counter((name, due) for name, due, _ in notes)
    twice = sum(count - 1 for count in runs.values())
    early = sum(at < due - TOLERANCE for _, due, at in notes)
    first = start - start % CRONTAB_SECONDS + CRONTAB_SECONDS
    times = itertools.takewhile(lambda due: due < end - 2, itertools.count(first, CRONTAB_SECONDS))
    names = [f"c{number}" for number in range(CRONTABS)]
    missing = set(itertools.product(names, times)) - runs.keys()
    gaps = []
    for times in service.get_dispatched().values():
        gaps += itertools.pairwise([start, *(at for at in times if start <= at <= end), end])
    spans = [
        (begin, until)
        for beat in beats
        for begin, until in [*beat.spans, (beat.undisturbed_from or end, end)]
    ]
    return {
        "runs": len(runs),
        "twice": twice,
        "early": early,
        "missing": len(missing),
        "longest gap": round(max(b - a for a, b in gaps), 1),
        "while a beat is running": round(find_longest(gaps, spans), 1),
    }


def find_longest(gaps, spans):
    """Return how long a gap and a span go on together, at most."""
    shared = (min(b, until) - max(a, begin) for a, b in gaps if b - a > 1 for begin, until in spans)
    return max(shared, default=0)


def main(rounds=ROUNDS, seed=SEED, beats=BEATS):
    """Play, print what was found, and return whether all is well."""
    # Ended early, it stops its processes too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    with make_service() as service:
        played, disturbed, start, end = play(service, rounds, random.Random(seed), beats)
        result = compare(service, disturbed, start, end)
    print(f"{sum(played.values())} rounds: {dict(played)}")
    print(result)
    wrong = result["twice"] or result["early"] or result["missing"]
    return not wrong and result["while a beat is running"] < GAP


if __name__ == "__main__":
    sys.exit(0 if main(*map(int, sys.argv[1:])) else 1)
