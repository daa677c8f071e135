"""Publish messages that no Celery client sends, and find out what becomes of each.

    uv run trials/messages.py [BROKER ...] [--every NUMBER]

BROKER is ``rabbitmq``, ``redis``, ``postgresql`` or ``embedded``; by default the first three. For each
one it generates a service, starts a worker, and publishes the kinds of messages that
``library/tests/malformed.py`` generates, or each NUMBERth, one after another. Every message must end in
a task, a line in the log or the queue of failed tasks, the worker must go on, and no line of its log
may be longer than ``MAX_LINE`` bytes. ``TEST_POSTGRESQL_URL``, ``TEST_RABBITMQ_URL`` and
``TEST_REDIS_URL`` are the servers. Exits with status 1 if one does not.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import time
import uuid
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "library" / "tests"))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import malformed
import psycopg

from tests.conftest import (
    POSTGRES_SERVER,
    RABBITMQ_URL,
    REDIS_SERVER,
    Service,
    clean_environment,
    production_variables,
)
from tests.generate import SOURCES, generated_project, replace

BROKERS = ["rabbitmq", "redis", "postgresql"]

#: Maximum length of a line of the log, in bytes.
MAX_LINE = 16 * 1024

#: How long the worker may take for a message, in seconds.
PATIENCE = 20

TASK = """

from celery import shared_task


@shared_task
def note(*args, **kwargs):
    with open("notes", "a") as file:
        file.write(f"{args[1] if args[:1] == ('marker',) else 'ran'}\\n")
"""

#: Reads a request of JSON from each line of its input, and prints the answer.
PUBLISHER = """
import base64, json, sys
from celery import current_app as app
from django.conf import settings
from trial.tasks import note
from prodserver_ops.worker.app import make_failed_queue

connection = app.connection_for_write()
own = app.amqp.queues[app.conf.task_default_queue]
failed = make_failed_queue(app)

def publish(channel, body, content_type, content_encoding, headers, properties):
    priority = properties.pop("priority", None)
    message = channel.prepare_message(
        base64.b64decode(body), priority, content_type, content_encoding, headers, properties
    )
    channel.basic_publish(message, exchange=own.exchange.name, routing_key=own.routing_key)

def put(channel, envelope):
    scheme = settings.CELERY_BROKER_URL.partition(":")[0]
    if scheme == "redis":
        channel.client.lpush(own.name, envelope)
    elif scheme == "pgmq":
        from django.db import connection
        with connection.cursor() as cursor:
            cursor.execute("SELECT pgmq.send(%s, %s::jsonb)", [channel._queue_name(own.name), envelope])
    else:
        channel._put(own.name, json.loads(envelope))

def count(channel):
    bound, number = failed(channel), 0
    bound.declare()
    while (message := bound.get(no_ack=True)) is not None:
        number += 1
    return number

def handle(name, *arguments):
    with connection.channel() as channel:
        if name == "declare":
            own(channel).declare()
        if name == "publish":
            publish(channel, **arguments[0])
        if name == "put":
            put(channel, *arguments)
        if name == "mark":
            note.delay("marker", *arguments)
        if name == "purge":
            own(channel).purge()
        if name == "count":
            return count(channel)

for line in sys.stdin:
    try:
        answer = {"answer": handle(*json.loads(line))}
    except Exception as error:
        answer = {"error": f"{type(error).__name__}: {error}"[:200]}
        connection.collect()
    print(json.dumps(answer), flush=True)
"""


class Publisher:
    """A process of the service that publishes messages."""

    def __init__(self, service):
        self.popen = subprocess.Popen(
            ["python", "manage.py", "shell", "-v0", "-c", PUBLISHER],
            cwd=service.folder,
            env=service.environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, *request):
        """Return the answer to a request."""
        self.popen.stdin.write(json.dumps(request) + "\n")
        self.popen.stdin.flush()
        return json.loads(self.popen.stdout.readline())

    def count(self):
        """Return the number of messages in the queue of failed tasks, and remove them."""
        answer = self.ask("count")
        assert "error" not in answer, answer
        return answer["answer"]


@contextlib.contextmanager
def make_service(broker):
    """Yield a service, generated, installed and migrated."""
    database = f"trial_{uuid.uuid4().hex[:12]}"
    answers = {} if broker == "embedded" else {"broker": broker}
    with generated_project(project_slug="trial", **answers) as folder:
        with (folder / "trial" / "tasks.py").open("a") as tasks:
            tasks.write(TASK)
        failed = folder / SOURCES / "worker" / "failed.py"
        replace(failed, "UNKNOWN_SECONDS = 120", "UNKNOWN_SECONDS = 2")
        environments = folder.parent / "environments"
        environments.mkdir()
        variables = production_variables(f"{POSTGRES_SERVER}/{database}", RABBITMQ_URL)
        if broker == "embedded":
            variables = {}
        service = Service(
            folder,
            os.environ.get("UV", "uv"),
            environments,
            REDIS_URL=f"{REDIS_SERVER}/7",
            WORKER_CONCURRENCY=1,
            LOG_FORMAT="json",
            **variables,
        )
        with psycopg.connect(f"{POSTGRES_SERVER}/postgres", autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {database}")
            try:
                service.install()
                service.run(service.procfile()["release"])
                yield service
            finally:
                service.close()
                connection.execute(f"DROP DATABASE {database} WITH (FORCE)")


class Trial:
    """A service, its worker and what became of the messages."""

    def __init__(self, service):
        self.service = service
        self.publisher = Publisher(service)
        self.publisher.ask("declare")
        self.fates = {}
        self.position = self.number = self.longest = 0
        self.start()

    def start(self):
        self.worker = self.service.start("worker")
        self.worker.wait_for_text(" ready.", 60)
        self.position = self.worker.log.stat().st_size

    def get_notes(self):
        path = self.service.folder / "notes"
        return path.read_text().split() if path.exists() else []

    def wait(self, mark):
        """Return whether the worker gets to the mark."""
        deadline = time.monotonic() + PATIENCE
        while mark not in self.get_notes():
            if self.worker.popen.poll() is not None or time.monotonic() > deadline:
                return False
            time.sleep(0.02)
        return True

    def read_log(self):
        """Return the new warnings and errors."""
        with self.worker.log.open("rb") as file:
            file.seek(self.position)
            lines = file.read().splitlines(keepends=True)
        if lines and not lines[-1].endswith(b"\n"):
            lines.pop()
        self.position += sum(map(len, lines))
        self.longest = max([self.longest, *map(len, lines)])
        return [line for line in lines if b'"level": "INFO"' not in line]

    def play(self, name, *request):
        """Publish a message; note what becomes of it."""
        before = self.get_notes()
        answer = self.publisher.ask(*request)
        if "error" in answer:
            self.fates[name] = "refused by the client"
            return
        self.number += 1
        mark = f"mark-{self.number}"
        self.publisher.ask("mark", mark)
        if not self.wait(mark):
            ended = self.worker.popen.poll() is not None
            self.fates[name] = "ENDS THE WORKER" if ended else "STOPS THE WORKER"
            print(f"{self.fates[name]}: {name}", flush=True)
            if os.environ.get("SHOW"):
                print(self.worker.text()[-3000:])
            self.worker.kill_all()
            self.publisher.ask("purge")
            self.publisher.count()
            self.start()
            return
        deadline = time.monotonic() + 2
        while True:
            lines = self.read_log()
            if len(self.get_notes()) > len(before) + 1:
                fate = "task"
            elif self.publisher.count():
                fate = "failed queue"
            elif lines:
                fate = "log"
            elif time.monotonic() < deadline:
                time.sleep(0.05)
                continue
            else:
                fate = "VANISHES"
                print(f"{fate}: {name}", flush=True)
            break
        self.fates[name] = fate


def main(brokers, every):
    """Play all kinds on each broker; return whether all is well."""
    is_good = True
    for broker in brokers:
        with make_service(broker) as service:
            trial = Trial(service)
            for name, kind in list(malformed.make_kinds("trial.tasks.note").items())[::every]:
                trial.play(name, "publish", kind)
            if broker != "rabbitmq":
                for name, envelope in malformed.ENVELOPES.items():
                    trial.play(f"envelope: {name}", "put", json.dumps(envelope))
            fates = list(trial.fates.values())
            counts = {fate: fates.count(fate) for fate in sorted(set(fates))}
            print(f"{broker}: {counts}, longest line {trial.longest} bytes", flush=True)
            bad = [name for name, fate in trial.fates.items() if fate.isupper()]
            is_good &= not bad and trial.longest <= MAX_LINE and fates.count("task") > 0
    return is_good


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("brokers", nargs="*", metavar="BROKER", default=BROKERS)
    parser.add_argument("--every", type=int, default=1, metavar="NUMBER")
    options = parser.parse_args()
    os.environ.update(clean_environment())
    sys.exit(0 if main(options.brokers, options.every) else 1)
