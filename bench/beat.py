"""Measure how late beat queues what is due.

    uv run bench/beat.py [DISPATCHES]

Generates the default service with 20 schedules that are due every five seconds, at different
times, in PostgreSQL (127.0.0.1:5432, user postgres, trust), and runs beat with RabbitMQ
(127.0.0.1:5672, guest) until it has queued DISPATCHES runs, 200 unless given. Prints the median,
the 99th percentile and the longest of the times between when a run is due and when it is
published. Exits with status 1 if the 99th percentile is longer than a second.
"""

import json
import subprocess
import sys
import time

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


def main(count):
    """Measure, and print the figures."""
    times = measure(count)
    median, late = get_percentile(times, 50), get_percentile(times, 99)
    print(
        f"{len(times)} dispatches: median {median:.2f} s, 99 % within {late:.2f} s, "
        f"the latest {max(times):.2f} s (limit of 99 %: {LIMIT} s)"
    )
    return 0 if late <= LIMIT else 1


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if sys.argv[1:] else 200))
