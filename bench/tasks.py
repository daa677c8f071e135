"""Measure what the record of task runs costs a task.

    uv run bench/tasks.py [TASKS [RUNS]]

Generates the default service and queues TASKS tasks that do nothing, 6,000 unless given, in
RabbitMQ (127.0.0.1:5672, guest). Then a worker with two processes runs them, with and without the
record, in turns, RUNS times each, 5 unless given. Prints the rate of each run and the ratio of
the medians. The rate is that between the 500th and the last task. Needs PostgreSQL (127.0.0.1:5432,
user postgres, trust). Exits with status 1 if the record costs more than 5 %.
"""

import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

from digest import generate_service

#: The least ratio of the rates with and without the record.
LIMIT = 0.95

#: Tasks that are not measured, while the worker starts.
WARM_UP = 500

TASK = """
from celery import shared_task

@shared_task
def measure():
    pass
"""

QUEUE = """
from prayer_room_api.tasks import measure
with measure.app.connection_for_write() as broker:
    broker.default_channel.queue_delete("prayer_room_api")
for _ in range({count}):
    measure.delay()
"""


def main(count, runs):
    """Measure in turns and print the table."""
    rates = {"without": [], "with": []}
    with generate_service() as service, service.database():
        package = Path(service.project, "prayer_room_api")
        with (package / "tasks.py").open("a") as file:
            file.write(TASK)
        module = package / "ops" / "task_runs.py"
        source = module.read_text()
        sources = {
            "with": source,
            "without": re.sub(r"^@signals\.task_\w+\.connect\n", "", source, flags=re.M),
        }
        assert sources["with"].count("@signals.task_") == 2
        print("| run | record | tasks/s |\n|---|---|---|", flush=True)
        for number in range(runs):
            for name in rates:
                module.write_text(sources[name])
                service.python("manage.py", "shell", "-v0", "-c", QUEUE.format(count=count))
                rates[name].append(measure(service, count))
                print(f"| {number + 1} | {name} | {rates[name][-1]:.0f} |", flush=True)
        module.write_text(source)
    medians = {name: statistics.median(values) for name, values in rates.items()}
    ratio = medians["with"] / medians["without"]
    print(f"with the record: {ratio:.1%} of the rate without it (limit {LIMIT:.0%})")
    return 0 if ratio >= LIMIT else 1


def measure(service, count):
    """Start a worker, wait until the queue is empty, and return the tasks per second."""
    import amqp

    command = [f"{service.project}/.venv/bin/python", "manage.py", "prodserver", "worker"]
    environment = service.environment | {"WORKER_CONCURRENCY": "2"}
    with amqp.Connection("127.0.0.1:5672") as connection:
        channel = connection.channel()

        def waiting():
            return channel.queue_declare("prayer_room_api", passive=True).message_count

        with subprocess.Popen(
            command, cwd=service.project, env=environment, stdout=subprocess.DEVNULL
        ) as worker:
            try:
                while (left := waiting()) > count - WARM_UP:
                    time.sleep(0.01)
                start = time.monotonic()
                while waiting():
                    time.sleep(0.01)
                seconds = time.monotonic() - start
            finally:
                worker.terminate()
                worker.wait(timeout=60)
    return left / seconds


if __name__ == "__main__":
    sys.exit(main(*map(int, [*sys.argv[1:], *["6000", "5"][len(sys.argv) - 1 :]])))
