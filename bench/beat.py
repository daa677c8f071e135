"""Measure how late beat queues what is due.

    uv run bench/beat.py [DISPATCHES]
    uv run bench/beat.py --same-minute SCHEDULES

Generates the default service with 20 schedules that are due every five seconds, at different
times, in PostgreSQL (127.0.0.1:5432, user postgres, trust), and runs beat with RabbitMQ
(127.0.0.1:5672, guest) until it has queued DISPATCHES runs, 200 unless given. Prints the median,
the 99th percentile and the longest of the times between when a run is due and when it is
published. Exits with status 1 if the 99th percentile is longer than a second.

With ``--same-minute`` all schedules are due in the same minute, as a crontab of ``* * * * *`` is. It
prints the same times for the runs of one minute, and the number of SQL statements of beat for each run.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

from digest import generate_service

#: The longest time that 99 of 100 runs may take, in seconds.
LIMIT = 1

CREATE_SCHEDULES = """
import time
from django_celery_beat.models import IntervalSchedule, PeriodicTask
from prayer_room_api.celery import app
from prodserver_ops.models import ScheduleRun
with app.connection_for_write() as broker:
    broker.default_channel.queue_delete("prayer_room_api")
PeriodicTask.objects.all().delete()
every = IntervalSchedule.objects.create(every=5, period="seconds")
for number in range(20):
    PeriodicTask.objects.create(name=f"bench {number}", task="bench.nothing", interval=every)
    time.sleep(0.25)
"""

GET_TIMES = """
import json
from prodserver_ops.models import ScheduleRun
runs = ScheduleRun.objects.filter(published_at__isnull=False).order_by("due_at")
print(json.dumps([(run.published_at - run.due_at).total_seconds() for run in runs]))
"""


CREATE_MINUTELY = """
from django_celery_beat.models import CrontabSchedule, PeriodicTask
from prayer_room_api.celery import app
with app.connection_for_write() as broker:
    broker.default_channel.queue_delete("prayer_room_api")
PeriodicTask.objects.all().delete()
minutely = CrontabSchedule.objects.create(minute="*")
PeriodicTask.objects.bulk_create(
    PeriodicTask(name=f"bench {number}", task="bench.nothing", crontab=minutely)
    for number in range(COUNT)
)
"""

GET_MINUTES = """
import json
from itertools import groupby
from prodserver_ops.models import ScheduleRun
runs = ScheduleRun.objects.filter(published_at__isnull=False).order_by("due_at")
print(json.dumps([
    [(run.published_at - run.due_at).total_seconds() for run in group]
    for _, group in groupby(runs, lambda run: run.due_at)
]))
"""

#: Counts the SQL statements of a process, and writes their number to a file when it ends.
COUNT_STATEMENTS = """
import atexit, os
from django.db.backends import utils

def count(execute):
    def counted(*args, **kwargs):
        counted.number += 1
        return execute(*args, **kwargs)
    counted.number = 0
    return counted

utils.CursorWrapper.execute = count(utils.CursorWrapper.execute)
atexit.register(
    lambda: open(os.environ["STATEMENTS"], "w").write(str(utils.CursorWrapper.execute.number))
)
"""


def measure_minute(count):
    """Return how late each run of a minute was published, and the statements for each run."""
    with generate_service() as service, service.database():

        def shell(code):
            return service.python("manage.py", "shell", "-v0", "-c", code)

        shell(CREATE_MINUTELY.replace("COUNT", str(count)))
        folder = Path(service.project) / "statements"
        folder.mkdir()
        (folder / "sitecustomize.py").write_text(COUNT_STATEMENTS)
        environment = service.environment | {
            "PYTHONPATH": str(folder),
            "STATEMENTS": str(folder / "number"),
        }
        command = [f"{service.project}/.venv/bin/python", "manage.py", "prodserver", "beat"]
        started = {"cwd": service.project, "env": environment, "stdout": subprocess.DEVNULL}
        with subprocess.Popen(command, **started) as beat:
            try:
                minutes = []
                # The first minute may have begun before beat did.
                while len(minutes) < 3 or len(minutes[2]) < count:
                    time.sleep(5)
                    minutes = json.loads(shell(GET_MINUTES))
            finally:
                beat.terminate()
                beat.wait(timeout=30)
        statements = int((folder / "number").read_text())
    return minutes[1], statements / sum(map(len, minutes))


def measure(count):
    """Return how late each of ``count`` runs or more was published, in seconds."""
    with generate_service() as service, service.database():

        def shell(code):
            return service.python("manage.py", "shell", "-v0", "-c", code)

        shell(CREATE_SCHEDULES)
        command = [f"{service.project}/.venv/bin/python", "manage.py", "prodserver", "beat"]
        # The first pass finds what was due before beat ran.
        started = {"cwd": service.project, "env": service.environment}
        with subprocess.Popen(command, **started, stdout=subprocess.DEVNULL) as beat:
            try:
                time.sleep(10)
                early = len(json.loads(shell(GET_TIMES)))
                while len(times := json.loads(shell(GET_TIMES))) < early + count:
                    time.sleep(5)
            finally:
                beat.terminate()
                beat.wait(timeout=30)
    return times[early : early + count]


def get_percentile(values, percent):
    """Return the value that ``percent`` of the values do not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, -(-len(ordered) * percent // 100) - 1)]


def report(times):
    """Print median, 99th percentile and the latest; return the 99th percentile."""
    late = get_percentile(times, 99)
    print(
        f"{len(times)} dispatches: median {get_percentile(times, 50):.2f} s, "
        f"99 % within {late:.2f} s, the latest {max(times):.2f} s"
    )
    return late


def main(arguments):
    """Measure, and print the figures."""
    if arguments.same_minute:
        times, statements = measure_minute(arguments.same_minute)
        report(times)
        print(f"SQL statements for each run: {statements:.3f}")
        return 0
    return 0 if report(measure(arguments.dispatches)) <= LIMIT else 1


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("dispatches", type=int, nargs="?", default=200)
    parser.add_argument("--same-minute", type=int, metavar="SCHEDULES")
    sys.exit(main(parser.parse_args()))
