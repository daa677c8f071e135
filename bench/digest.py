"""Measure the daily digest of a generated service, beside the naive way.

    uv run bench/digest.py [N ...]

Bakes the default service, fills PostgreSQL (127.0.0.1:5432, user postgres, trust) with N
users who have an answered submission each, and sends their daily digest in one process
with Django's dummy e-mail backend. The naive way is one task that reads every user,
queries the submissions of each, renders, sends and commits a delivery. Each figure comes
from a process of its own; the last column is a ratio of figures of the same run.
"""

import json
import os
import subprocess
import sys
import tempfile
import uuid
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SERVER = "postgres://postgres@127.0.0.1:5432"
SIZES = [1_000, 10_000, 100_000]
WAYS = ["chunks", "naive"]


def main(sizes):
    """Bake, fill, measure each size in each way, and print a table."""
    import psycopg
    from cookiecutter.main import cookiecutter

    name = f"bench_{uuid.uuid4().hex[:12]}"
    with (
        tempfile.TemporaryDirectory() as folder,
        psycopg.connect(f"{SERVER}/postgres", autocommit=True) as server,
    ):
        os.environ["COOKIECUTTER_CONFIG"] = f"{folder}/none"
        (Path(folder) / "none").touch()
        answers = {"setup": False}
        project = cookiecutter(str(ROOT), no_input=True, extra_context=answers, output_dir=folder)
        service = Service(project, f"{SERVER}/{name}")
        service.run("uv", "sync", "--quiet", "--no-dev", "--compile-bytecode")
        header = "recipients", "way", "recipients/s", "queries/1000", "peak MiB", "times naive"
        row = "{:>10}  {:<6}  {:>12}  {:>12}  {:>8}  {:>11}".format
        print(row(*header), flush=True)
        for size in sizes:
            rates = {}
            for way in reversed(WAYS):
                server.execute(f"CREATE DATABASE {name}")
                try:
                    service.python("manage.py", "migrate", "-v0")
                    found = json.loads(service.python(__file__, "measure", way, str(size)))
                finally:
                    server.execute(f"DROP DATABASE {name} WITH (FORCE)")
                rates[way] = found["rate"]
                ratio = f"{rates[way] / rates['naive']:.1f}" if way == "chunks" else ""
                print(
                    row(
                        size,
                        way,
                        f"{found['rate']:.0f}",
                        f"{found['queries']:.0f}",
                        f"{found['memory']:.1f}",
                        ratio,
                    ),
                    flush=True,
                )


class Service:
    """A generated service whose commands run in production mode on a database."""

    def __init__(self, project, database_url):
        self.project = project
        self.environment = {name: os.environ[name] for name in os.environ if name != "VIRTUAL_ENV"}
        self.environment |= {
            "DJANGO_MODE": "prod",
            "SECRET_KEY": "a-key-for-this-benchmark-alone-of-more-than-fifty-characters",
            "DATABASE_URL": database_url,
            "RABBITMQ_URL": "amqp://guest:guest@127.0.0.1:5672//",
            "PYTHONPATH": project,
            "LOG_LEVEL": "WARNING",
        }

    def run(self, *command):
        done = subprocess.run(
            command, cwd=self.project, env=self.environment, stdout=subprocess.PIPE, text=True
        )
        if done.returncode:
            sys.exit(f"{' '.join(command)} ended with status {done.returncode}")
        return done.stdout

    def python(self, *arguments):
        return self.run(f"{self.project}/.venv/bin/python", *arguments)


# What follows runs in the generated service.

FILL = """
INSERT INTO {users} (
    username, email, password, first_name, last_name, is_superuser, is_staff, is_active,
    date_joined, digest_frequency, notify_on_response
)
SELECT 'user' || n, 'user' || n || '@example.com', '', 'First', 'Last', false, false, true,
    now(), 'daily', false
FROM generate_series(1, {size}) AS n;
INSERT INTO {submissions} (author_id, body, created_at, response, answered_at)
SELECT id, 'Please remember us.', now(), 'We do.',
    date_trunc('day', now() AT TIME ZONE 'UTC') AT TIME ZONE 'UTC' - interval '3 hours'
FROM {users};
ANALYZE;
"""


def measure(way, size):
    """Send the digest to ``size`` users and print the figures as JSON."""
    import resource
    import time

    import django

    os.environ.setdefault("DJANGO_SETTINGS_MODULE", "prayer_room_api.settings")
    django.setup()
    from django.conf import settings
    from django.db import connection
    from django.urls import reverse
    from prayer_room_api.models import DigestDelivery, Submission, User

    settings.EMAIL_BACKEND = "django.core.mail.backends.dummy.EmailBackend"
    tables = {"users": User._meta.db_table, "submissions": Submission._meta.db_table}
    with connection.cursor() as cursor:
        cursor.execute(FILL.format(size=size, **tables))
    # A worker imports the URLs with its first link; that is no part of any digest.
    reverse("unsubscribe", args=["token"])
    queries = 0

    def count(execute, *arguments):
        nonlocal queries
        queries += 1
        return execute(*arguments)

    with connection.execute_wrapper(count):
        start = time.perf_counter()
        {"chunks": send_in_chunks, "naive": send_naively}[way]()
        seconds = time.perf_counter() - start
    assert DigestDelivery.objects.filter(status="sent").count() == size
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    rate = size / seconds
    print(json.dumps({"rate": rate, "queries": queries / size * 1000, "memory": memory}))


def send_in_chunks():
    """Run the scheduled task, and each task that it queues, one after the other."""
    from unittest.mock import patch

    from prayer_room_api import tasks

    queued = []
    with patch.object(tasks.send_digest_chunk, "delay", lambda *args: queued.append(args)):
        tasks.send_user_digest("daily")
    for args in queued:
        tasks.send_digest_chunk(*args)


def send_naively():
    """Query, render, send and commit for one user after the other, all in one task."""
    from django.core.mail import EmailMultiAlternatives
    from django.template.loader import render_to_string
    from django.utils import timezone
    from prayer_room_api import unsubscribe
    from prayer_room_api.digests import DIGESTS
    from prayer_room_api.models import DigestDelivery, Submission, User

    start, end = DIGESTS["daily"].period(timezone.now())
    for user in User.objects.with_digest("daily"):
        submissions = Submission.objects.answered_between(start, end).filter(author=user)
        context = {
            "site_name": "Prayer Room API",
            "recipient": user,
            "submissions": list(submissions),
            "unsubscribe_url": unsubscribe.link(user, "digest"),
        }
        text = render_to_string("email/user_digest.txt", context)
        message = EmailMultiAlternatives("Your submissions were answered", text, to=[user.email])
        html = render_to_string("email/user_digest.html", context)
        message.attach_alternative(html, "text/html")
        message.send()
        DigestDelivery.objects.create(
            digest="daily", recipient=user, period_start=start, status="sent"
        )


if __name__ == "__main__":
    if sys.argv[1:2] == ["measure"]:
        measure(sys.argv[2], int(sys.argv[3]))
    else:
        main([int(argument) for argument in sys.argv[1:]] or SIZES)
