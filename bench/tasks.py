"""Measure tasks per second through RabbitMQ.

    uv run bench/tasks.py [TASKS [RUNS]]

Generates the default service, and TASKS tasks that do nothing, 6,000 unless given, in turns, RUNS
times each, 5 unless given. Needs PostgreSQL (127.0.0.1:5432, user postgres, trust) and RabbitMQ
(127.0.0.1:5672, guest). ``RABBITMQ_URL`` can name another virtual host.

End to end: one process queues tasks while a worker with two processes runs them. The service, with
`delay()` and with `apply_many()`, beside Celery alone with the same guarantees: quorum queues,
confirmed messages, acknowledged late. The rate is that from the first message until the queue is
empty, after 200 others that let the processes warm up; a ratio is the median of those of each run.

The record of runs: two workers, with and without the record, take turns of two seconds at one
queue. So do workers with 1, 2 and 4 processes.

Exits with status 1 if the service reaches less than 97 % of Celery alone, if `apply_many()` does
not beat it, or if the record costs more than 5 %.
"""

import contextlib
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from urllib.parse import urlsplit

from digest import generate_service

#: The least ratio of the rates of the service and Celery alone, and with and without the record.
END_TO_END_LIMIT, RECORD_LIMIT = 0.97, 0.95

#: How long the turn of a worker takes, in seconds, and how many turns are not measured.
WINDOW = 2
WARM_UP_TURNS = 2

#: How many turns of workers at one queue a run has.
TURNS = 4

#: How many tasks are queued before the turns of a round, for each worker: more than it can run.
TASKS_OF_A_ROUND = 10_000

TASK = """
from celery import shared_task

@shared_task
def measure():
    pass
"""

#: Celery alone, with the guarantees of the service.
BARE = """
import os
from celery import Celery
from kombu import Exchange, Queue

app = Celery("bare", broker=os.environ["RABBITMQ_URL"])
app.conf.task_default_queue = "bare"
app.conf.task_queues = [
    Queue("bare", Exchange("bare", "topic"), "bare", queue_arguments={"x-queue-type": "quorum"})
]
app.conf.task_default_queue_type = "quorum"
app.conf.task_default_exchange_type = "topic"
app.conf.broker_transport_options = {"confirm_publish": True}
app.conf.task_acks_late = app.conf.task_reject_on_worker_lost = True
app.conf.worker_prefetch_multiplier = 1
app.conf.task_ignore_result = True
app.conf.task_soft_time_limit, app.conf.task_time_limit = 240, 300

@app.task
def measure():
    pass
"""

#: Queues tasks, and prints when it begins; some before let all processes warm up.
QUEUE = """
import time
for _ in range(200):
    measure.delay()
time.sleep(1)
print(time.monotonic(), flush=True)
"""

QUEUE_ONE_BY_ONE = (
    QUEUE
    + """
for _ in range({count}):
    measure.delay()
"""
)

QUEUE_MANY = QUEUE + "measure.apply_many([()] * {count})"

SETTINGS, MODULE = "DJANGO_SETTINGS_MODULE", "prayer_room_api.settings"

SERVICE = "import django; django.setup(); from prayer_room_api.tasks import measure\n"


def compare(count, runs):
    """Return the medians of the rates end to end, of the record, and by number of processes."""
    with generate_service() as service, service.database(), tempfile.TemporaryDirectory() as folder:
        Path(folder, "bare.py").write_text(BARE)
        with Path(service.project, "prayer_room_api", "tasks.py").open("a") as file:
            file.write(TASK)
        end_to_end = compare_end_to_end(service, folder, count, runs)
        record = compare_record(service, runs)
        return end_to_end, record, compare_workers(service, runs)


def main(count, runs):
    """Measure in turns and print the tables."""
    end_to_end, record, workers = compare(count, runs)
    print("| end to end | tasks/s | times Celery alone |\n|---|---|---|")
    for name, (rate, ratio) in end_to_end.items():
        print(f"| {name} | {rate:.0f} | {ratio:.2f} |")
    print(
        f"\nA worker with the record of runs: {record['with']:.0f} tasks/s, "
        f"without: {record['without']:.0f}, {record['ratio']:.1%} (at least {RECORD_LIMIT:.0%})"
    )
    print("\n| processes of a worker | tasks/s |\n|---|---|")
    for processes, rate in workers.items():
        print(f"| {processes} | {rate:.0f} |")
    _, (_, one_by_one), (_, many) = end_to_end.values()
    is_good = one_by_one >= END_TO_END_LIMIT and many > 1 and record["ratio"] >= RECORD_LIMIT
    return 0 if is_good else 1


def compare_end_to_end(service, folder, count, runs):
    """Return the median rate and ratio to Celery alone, by name, Celery alone first."""
    python = f"{service.project}/.venv/bin/python"
    worker = [python, "manage.py", "prodserver", "worker"]
    options = "worker -c 2 -l warning --without-gossip --without-mingle"
    bare = [python, "-m", "celery", "-A", "bare", *options.split()]
    variants = {
        "Celery alone": ("bare", folder, bare, "from bare import measure\n" + QUEUE_ONE_BY_ONE),
        "service, `delay()`": (
            "prayer_room_api",
            service.project,
            worker,
            SERVICE + QUEUE_ONE_BY_ONE,
        ),
        "service, `apply_many()`": (
            "prayer_room_api",
            service.project,
            worker,
            SERVICE + QUEUE_MANY,
        ),
    }
    rates = {name: [] for name in variants}
    environment = service.environment | {"WORKER_CONCURRENCY": "2", SETTINGS: MODULE}
    with contextlib.ExitStack() as stack:
        workers = {}
        for queue, cwd, command, _ in variants.values():
            if queue not in workers:
                get_state = stack.enter_context(opened(service, queue))
                worker = stack.enter_context(run(command, cwd, environment))
                while not get_state().consumer_count:
                    time.sleep(0.1)
                stack.callback(os.killpg, worker.pid, signal.SIGCONT)
                os.killpg(worker.pid, signal.SIGSTOP)
                workers[queue] = worker, get_state
        for turn in range(runs):
            for name in sorted(variants, reverse=bool(turn % 2)):
                queue, cwd, _, code = variants[name]
                worker, get_state = workers[queue]
                os.killpg(worker.pid, signal.SIGCONT)
                publish = [python, "-c", code.format(count=count)]
                with subprocess.Popen(
                    publish, cwd=cwd, env=environment, stdout=subprocess.PIPE, text=True
                ) as publisher:
                    start = float(publisher.stdout.readline())
                    if publisher.wait():
                        sys.exit("queueing tasks failed")
                while get_state().message_count:
                    time.sleep(0.005)
                rates[name].append(count / (time.monotonic() - start))
                os.killpg(worker.pid, signal.SIGSTOP)
            last = {name: round(values[-1]) for name, values in rates.items()}
            print(f"tasks/s in turns: {last}", file=sys.stderr, flush=True)
    bare = rates["Celery alone"]
    return {
        name: (statistics.median(values), get_ratio(values, bare)) for name, values in rates.items()
    }


def get_ratio(values, others):
    """Return the median ratio of values of the same turn."""
    return statistics.median(one / other for one, other in zip(values, others, strict=True))


def compare_record(service, runs):
    """Return the medians of the rates with and without the record, and that of their ratios."""
    code = "from importlib.util import find_spec; print(find_spec('prodserver_ops.worker').origin)"
    module = Path(service.python("-c", code).strip()).with_name("record.py")
    source = module.read_text()
    assert source.count("@signals.task_") == 3
    sources = {
        "without": re.sub(r"^@signals\.task_\w+\.connect\n", "", source, flags=re.M),
        "with": source,
    }

    def start(name):
        # The file may be a link to that of uv's cache.
        module.unlink()
        module.write_text(sources[name])
        return 2

    rates = measure_in_turns(service, sources, start, TURNS * runs)
    return {
        **{name: statistics.median(values) for name, values in rates.items()},
        "ratio": get_ratio(rates["with"], rates["without"]),
        "turns": TURNS * runs,
    }


def compare_workers(service, runs):
    """Return the medians of the rates of workers with 1, 2 and 4 processes."""
    rates = measure_in_turns(service, [1, 2, 4], lambda processes: processes, runs)
    return {processes: statistics.median(values) for processes, values in rates.items()}


def measure_in_turns(service, names, start, turns):
    """Return the rates of workers that take tasks from one queue in turns.

    A turn takes WINDOW seconds; meanwhile the other workers are stopped by a signal. So all see the
    same machine. ``start`` is called before a worker starts, and returns how many processes it has.
    """
    command = [f"{service.project}/.venv/bin/python", "manage.py", "prodserver", "worker"]
    rates = {name: [] for name in names}
    with opened(service, "prayer_room_api") as get_state, contextlib.ExitStack() as stack:
        workers = {}
        for name in names:
            environment = service.environment | {"WORKER_CONCURRENCY": str(start(name))}
            workers[name] = stack.enter_context(run(command, service.project, environment))
            while get_state().consumer_count < len(workers):
                time.sleep(0.1)
        for worker in workers.values():
            stack.callback(os.killpg, worker.pid, signal.SIGCONT)
            os.killpg(worker.pid, signal.SIGSTOP)
        code = SERVICE + QUEUE_MANY.format(count=TASKS_OF_A_ROUND * len(workers))
        # The processes warm up in the first turns.
        for turn in range(WARM_UP_TURNS + turns):
            while get_state().message_count < TASKS_OF_A_ROUND * len(workers):
                service.python("-c", f"import os; os.environ[{SETTINGS!r}] = {MODULE!r}\n{code}")
            for name in sorted(workers, reverse=bool(turn % 2)):
                os.killpg(workers[name].pid, signal.SIGCONT)
                time.sleep(0.2)
                begin, left = time.monotonic(), get_state().message_count
                time.sleep(WINDOW)
                done = left - get_state().message_count
                rates[name].append(done / (time.monotonic() - begin))
                os.killpg(workers[name].pid, signal.SIGSTOP)
            last = {name: round(values[-1]) for name, values in rates.items()}
            print(f"tasks/s in turns: {last}", file=sys.stderr, flush=True)
        if not get_state().message_count:
            sys.exit("too few tasks were queued")
    return {name: values[WARM_UP_TURNS:] for name, values in rates.items()}


@contextlib.contextmanager
def opened(service, queue):
    """Delete a queue, and yield a function that returns its state."""
    import amqp

    url = urlsplit(service.environment["RABBITMQ_URL"])
    server, virtual_host = f"{url.hostname}:{url.port}", url.path[1:]
    with amqp.Connection(
        server, url.username, url.password, virtual_host=virtual_host
    ) as connection:
        connection.channel().queue_delete(queue)

        def get_state():
            with connection.channel() as channel:
                try:
                    return channel.queue_declare(queue, passive=True)
                except amqp.NotFound:
                    return amqp.protocol.queue_declare_ok_t(queue, 0, 0)

        yield get_state


@contextlib.contextmanager
def run(command, folder, environment):
    """Run a worker in a process group of its own."""
    with subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.DEVNULL, start_new_session=True
    ) as worker:
        try:
            yield worker
        finally:
            worker.terminate()
            worker.wait(timeout=60)


if __name__ == "__main__":
    sys.exit(main(*map(int, [*sys.argv[1:], *["6000", "5"][len(sys.argv) - 1 :]])))
