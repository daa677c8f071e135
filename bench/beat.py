"""Measure how late beat queues what is due.

    uv run bench/beat.py [DISPATCHES]
    uv run bench/beat.py --same-minute SCHEDULES [--beats NUMBER] [--slow MILLISECONDS]

Generates the default service with 20 schedules that are due every five seconds, at different
times, in PostgreSQL (127.0.0.1:5432, user postgres, trust), and runs beat with RabbitMQ
(127.0.0.1:5672, guest) until it has queued DISPATCHES runs, 200 unless given. Prints the median,
the 99th percentile and the longest of the times between when a run is due and when it is
published. Exits with status 1 if the 99th percentile is longer than a second.

With ``--same-minute`` all schedules are due in the same minute, as a crontab of ``* * * * *`` is. It
prints the same times for the runs of one minute, the number of SQL statements of all beats for each run,
how many runs each beat published, and the age of the oldest heartbeat meanwhile. ``--slow`` lets each
transaction take longer. ``RABBITMQ_URL`` can name another virtual host.
"""

import argparse
import contextlib
import json
import os
import select
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import psycopg
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
task = "prayer_room_api.tasks.send_user_digest"
PeriodicTask.objects.bulk_create(
    PeriodicTask(name=f"bench {number}", task=task, args='["daily"]', crontab=minutely)
    for number in range(COUNT)
)
"""

#: The runs of a minute; the first may have begun before beat did.
GET_MINUTE = """
SELECT extract(epoch FROM published_at - due_at)::float FROM ops_schedulerun
WHERE published_at IS NOT NULL AND due_at = (
    SELECT DISTINCT due_at FROM ops_schedulerun ORDER BY due_at LIMIT 1 OFFSET {}
)
"""

GET_AGE = """
SELECT max(extract(epoch FROM now() - seen_at))::float FROM ops_heartbeat WHERE process = 'beat'
"""

#: Counts SQL statements and messages of a process, and writes the numbers to a file when it ends.
COUNT_STATEMENTS = """
import atexit, os
from celery import signals
from django.db.backends import utils

numbers = {"statements": 0, "messages": 0}

def count(name, function):
    def counted(*args, **kwargs):
        numbers[name] += 1
        return function(*args, **kwargs)
    return counted

utils.CursorWrapper.execute = count("statements", utils.CursorWrapper.execute)
signals.before_task_publish.connect(count("messages", lambda **kwargs: None), weak=False)
path = os.path.join(os.environ["NUMBERS"], f"{os.getpid()}.json")
atexit.register(lambda: open(path, "w").write(__import__("json").dumps(numbers)))
"""


class SlowDatabase:
    """Passes connections on to PostgreSQL, and delays the end of each transaction."""

    def __init__(self, seconds):
        self.seconds = seconds
        self.server = socket.create_server(("127.0.0.1", 0))
        self.port = self.server.getsockname()[1]
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self):
        while True:
            client, _ = self.server.accept()
            threading.Thread(target=self.serve, args=[client], daemon=True).start()

    def serve(self, client):
        in_transaction = False
        with client, socket.create_connection(("127.0.0.1", 5432)) as server:
            while True:
                for ready in select.select([client, server], [], [])[0]:
                    if not (data := ready.recv(1 << 20)):
                        return
                    if ready is server:
                        client.sendall(data)
                        continue
                    if b"BEGIN" in data:
                        in_transaction = True
                    elif b"COMMIT" in data or b"ROLLBACK" in data or not in_transaction:
                        in_transaction = False
                        time.sleep(self.seconds)
                    server.sendall(data)


def measure_minute(count, beats=1, slow=0):
    """Return how late each run of a minute was published, and what else was measured."""
    with generate_service() as service, service.database():
        service.python(
            "manage.py", "shell", "-v0", "-c", CREATE_MINUTELY.replace("COUNT", str(count))
        )
        folder = Path(service.project) / "numbers"
        folder.mkdir()
        (folder / "sitecustomize.py").write_text(COUNT_STATEMENTS)
        environment = {"PYTHONPATH": str(folder), "NUMBERS": str(folder)}
        url = service.environment["DATABASE_URL"]
        if slow:
            environment["DATABASE_URL"] = url.replace("5432", str(SlowDatabase(slow / 1000).port))
        command = [f"{service.project}/.venv/bin/python", "manage.py", "prodserver", "beat"]
        started = {"cwd": service.project, "env": service.environment | environment}
        ages = []
        with contextlib.ExitStack() as stack:
            server = stack.enter_context(psycopg.connect(url, autocommit=True))
            processes = [
                stack.enter_context(subprocess.Popen(command, **started, stdout=subprocess.DEVNULL))
                for _ in range(beats)
            ]
            try:
                while len(server.execute(GET_MINUTE.format(2)).fetchall()) < count:
                    time.sleep(1)
                    ages.append(server.execute(GET_AGE).fetchone()[0] or 0)
            finally:
                for process in processes:
                    process.terminate()
                for process in processes:
                    process.wait(timeout=60)
            times = [late for (late,) in server.execute(GET_MINUTE.format(1))]
        numbers = [json.loads(path.read_text()) for path in folder.glob("*.json")]
    messages = [each["messages"] for each in numbers]
    statements = sum(each["statements"] for each in numbers) / sum(messages)
    return times, statements, messages, max(ages)


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
        times, statements, messages, age = measure_minute(
            arguments.same_minute, arguments.beats, arguments.slow
        )
        report(times)
        print(f"SQL statements for each run: {statements:.3f}; messages of each beat: {messages}")
        print(f"oldest heartbeat: {age:.0f} s; load of the machine: {os.getloadavg()[0]:.1f}")
        return 0
    return 0 if report(measure(arguments.dispatches)) <= LIMIT else 1


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("dispatches", type=int, nargs="?", default=200)
    parser.add_argument("--same-minute", type=int, metavar="SCHEDULES")
    parser.add_argument("--beats", type=int, default=1)
    parser.add_argument("--slow", type=int, default=0, metavar="MILLISECONDS")
    sys.exit(main(parser.parse_args()))
