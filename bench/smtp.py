"""Measure how fast a worker sends a digest through a mail server that takes a while.

    uv run bench/smtp.py [RECIPIENTS [RUNS]]

Generates the default service with RECIPIENTS users, 10,000 unless given, in PostgreSQL
(127.0.0.1:5432, user postgres, trust), and runs one worker process with RabbitMQ (127.0.0.1:5672,
guest). It sends the daily digest through an SMTP server in this process that takes 10 ms to accept
an e-mail. Measures EMAIL_CONNECTIONS of 8, its default, and 1, and a service of release 1.1.0, the
last one that sends one e-mail at a time, in turns, RUNS times each, 1 unless given. One at a time, a
tenth of the e-mails is sent, because the rate does not change. Exits with status 1 if a recipient
got no e-mail or more than one.
"""

import asyncio
import collections
import statistics
import subprocess
import sys
import time

from digest import CREATE_DATA, generate_service

#: The last release that sends one e-mail at a time.
ONE_AT_A_TIME = "1.1.0"

#: How long the mail server takes to accept an e-mail, in seconds.
DELAY = 0.01

CREATE = """
from django.db import connection
from prayer_room_api.models import Submission, User
tables = {{"users": User._meta.db_table, "submissions": Submission._meta.db_table}}
with connection.cursor() as cursor:
    cursor.execute({data!r}.format(size={size}, **tables))
"""

QUEUE = """
from prayer_room_api.celery import app
from prayer_room_api.tasks import send_user_digest
with app.connection_for_write() as broker:
    for name in ("prayer_room_api", "prayer_room_api.mail"):
        broker.default_channel.queue_delete(name)
send_user_digest.delay("daily")
"""


class Mailbox:
    """Counts the e-mails that the SMTP server accepts, by recipient."""

    def __init__(self):
        self.counts = collections.Counter()
        self.start = self.end = 0.0

    async def handle_DATA(self, server, session, envelope):
        """Accept an e-mail after a while."""
        self.start = self.start or time.monotonic()
        await asyncio.sleep(DELAY)
        self.counts.update(envelope.rcpt_tos)
        self.end = time.monotonic()
        return "250 OK"


def measure(service, size, connections, processes=1):
    """Send the digest to ``size`` recipients; return the e-mails per second.

    A worker with some processes sends it, each through some connections.
    """
    from aiosmtpd.controller import Controller

    from tests.servers import free_port

    mailbox = Mailbox()
    controller = Controller(mailbox, hostname="127.0.0.1", port=free_port())
    controller.start()
    variables = {
        "EMAIL_HOST": "127.0.0.1",
        "EMAIL_PORT": str(controller.port),
        "EMAIL_CONNECTIONS": str(connections),
        "WORKER_CONCURRENCY": str(processes),
    }
    with service.database():
        code = CREATE.format(data=CREATE_DATA, size=size)
        service.python("manage.py", "shell", "-v0", "-c", code)
        service.python("manage.py", "shell", "-v0", "-c", QUEUE)
        command = [f"{service.project}/.venv/bin/python", "manage.py", "prodserver", "worker"]
        worker = subprocess.Popen(
            command,
            cwd=service.project,
            env=service.environment | variables,
            stdout=subprocess.DEVNULL,
        )
        try:
            while len(mailbox.counts) < size:
                if worker.poll() is not None:
                    sys.exit("the worker ended")
                time.sleep(0.1)
            time.sleep(1)  # For one that is sent twice
        finally:
            worker.terminate()
            worker.wait(timeout=60)
            controller.stop()
    repeated = [recipient for recipient, count in mailbox.counts.items() if count > 1]
    if repeated or len(mailbox.counts) != size:
        sys.exit(f"{len(repeated)} of {size} recipients got an e-mail twice")
    return size / (mailbox.end - mailbox.start)


def compare(variants, runs):
    """Return the medians of the e-mails per second, by name.

    A variant is a service, and a number of e-mails, of connections and of processes.
    """
    rates = {name: [] for name in variants}
    for _ in range(runs):
        for name, (service, *numbers) in variants.items():
            rates[name].append(measure(service, *numbers))
            print(f"{name}: {rates[name][-1]:.0f}/s", file=sys.stderr, flush=True)
    return {name: statistics.median(values) for name, values in rates.items()}


def main(size, runs):
    """Measure in turns, and print the figures."""
    small = max(size // 10, 1)
    with generate_service(ONE_AT_A_TIME) as earlier, generate_service() as service:
        variants = {
            f"release {ONE_AT_A_TIME}": (earlier, small, 1, 1),
            "one connection": (service, small, 1, 1),
            "eight connections": (service, size, 8, 1),
        }
        rates = compare(variants, runs)
    print(f"{size} digests, each once:")
    for name, rate in rates.items():
        print(f"{name}: {rate:.0f}/s, {rate / next(iter(rates.values())):.1f} times the first")


if __name__ == "__main__":
    main(*map(int, [*sys.argv[1:], *["10000", "1"][len(sys.argv) - 1 :]]))
