"""Benchmark the daily digest of a generated service against a naive implementation.

    uv run bench/digest.py [N ...]

Generates the default service, creates N users with one answered submission each in
PostgreSQL (127.0.0.1:5432, user postgres, trust), and sends their daily digest in one
process with Django's dummy email backend. The naive implementation is one task that, for
each user, queries the submissions, renders and sends the email, and commits a delivery.
Each row is measured in its own process. The last column compares rows of the same run.
"""

import json
import os
import subprocess
import sys
import uuid
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SERVER = "postgres://postgres@127.0.0.1:5432"
SIZES = [1_000, 10_000, 100_000]
METHODS = ["chunks", "naive"]


def main(sizes):
    """Measure each method with each number of users, and print a table in Markdown."""
    print("| recipients | method | recipients/s | queries per 1,000 | peak MiB | times naive |")
    print("|---|---|---|---|---|---|", flush=True)
    with generate_service() as service:
        for size in sizes:
            rates = {}
            for method in reversed(METHODS):
                result = run(service, method, size)
                rates[method] = result["rate"]
                ratio = f"{rates[method] / rates['naive']:.1f}" if method == "chunks" else ""
                print("|", size, "|", method, end=" ")
                print("| {rate:.0f} | {queries:.0f} | {memory:.1f}".format(**result), end=" ")
                print("|", ratio, "|", flush=True)


def run(service, method, size):
    """Return the rate, queries per 1,000 recipients and MiB of one measurement."""
    with service.database():
        return json.loads(service.python(__file__, "measure", method, str(size)))


@contextmanager
def generate_service(release=None):
    """Yield the default service, generated and installed in a folder that is deleted after.

    ``release`` is the version of the template's release, if it is not the template of now.
    """
    sys.path.insert(0, str(ROOT))
    from tests.generate import generated_project

    with generated_project(release) as project:
        service = Service(str(project))
        service.run(os.environ.get("UV", "uv"), "sync", "--quiet", "--no-dev", "--compile-bytecode")
        yield service


class Service:
    """Runs the commands of a generated service in production mode."""

    def __init__(self, project):
        self.project = project
        self.database_name = f"bench_{uuid.uuid4().hex[:12]}"
        self.environment = {name: os.environ[name] for name in os.environ if name != "VIRTUAL_ENV"}
        self.environment |= {
            "DJANGO_MODE": "prod",
            "SECRET_KEY": "a-key-for-this-benchmark-alone-of-more-than-fifty-characters",
            "DATABASE_URL": f"{SERVER}/{self.database_name}",
            "RABBITMQ_URL": os.environ.get("RABBITMQ_URL", "amqp://guest:guest@127.0.0.1:5672//"),
            "PYTHONPATH": project,
            "LOG_LEVEL": "WARNING",
        }

    @contextmanager
    def database(self):
        """Create and migrate the service's database, and drop it after."""
        import psycopg

        with psycopg.connect(f"{SERVER}/postgres", autocommit=True) as server:
            server.execute(f"CREATE DATABASE {self.database_name}")
            try:
                self.python("manage.py", "migrate", "-v0")
                yield
            finally:
                server.execute(f"DROP DATABASE {self.database_name} WITH (FORCE)")

    def run(self, *command):
        done = subprocess.run(
            command, cwd=self.project, env=self.environment, stdout=subprocess.PIPE, text=True
        )
        if done.returncode:
            sys.exit(f"{' '.join(command)} exited with status {done.returncode}")
        return done.stdout

    def python(self, *arguments):
        return self.run(f"{self.project}/.venv/bin/python", *arguments)


# The functions below run in the environment of the generated service.

CREATE_DATA = """
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


def measure(method, size):
    """Send the digest to ``size`` users and print the measurements as JSON."""
    import resource
    import time

    import django

    os.environ.setdefault("DJANGO_SETTINGS_MODULE", "prayer_room_api.settings")
    django.setup()
    from django.conf import settings
    from django.db import connection
    from django.urls import reverse
    from prayer_room_api.models import Submission, User
    from prodserver_ops.models import DigestDelivery

    settings.EMAIL_BACKEND = "django.core.mail.backends.dummy.EmailBackend"
    tables = {"users": User._meta.db_table, "submissions": Submission._meta.db_table}
    with connection.cursor() as cursor:
        cursor.execute(CREATE_DATA.format(size=size, **tables))
    # Import the URLconf outside the measurement: a worker does this once, not for each digest.
    reverse("unsubscribe", args=["token"])
    queries = 0

    def count(execute, *arguments):
        nonlocal queries
        queries += 1
        return execute(*arguments)

    with connection.execute_wrapper(count):
        start = time.perf_counter()
        {"chunks": send_in_chunks, "naive": send_naively}[method]()
        seconds = time.perf_counter() - start
    assert DigestDelivery.objects.filter(status="sent").count() == size
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    rate = size / seconds
    print(json.dumps({"rate": rate, "queries": queries / size * 1000, "memory": memory}))


def send_in_chunks():
    """Run the scheduled task, then the tasks that it queued."""
    from unittest.mock import patch

    from prayer_room_api.tasks import send_user_digest
    from prodserver_ops.mail.tasks import send_digest_chunk

    queued = []
    with patch.object(
        send_digest_chunk, "apply_many", lambda arguments, **_: queued.extend(arguments)
    ):
        send_user_digest("daily")
    for args in queued:
        send_digest_chunk(*args)


def send_naively():
    """Query, render, send and commit for one user at a time."""
    from django.core.mail import EmailMultiAlternatives
    from django.template.loader import render_to_string
    from django.utils import timezone
    from prayer_room_api.models import Submission, User
    from prodserver_ops.mail import unsubscribe
    from prodserver_ops.mail.digests import get_digest
    from prodserver_ops.models import DigestDelivery

    digest = get_digest("daily")
    start, end = digest.period(timezone.now())
    for user in User.objects.with_digest("daily"):
        submissions = Submission.objects.answered_between(start, end).filter(author=user)
        context = {
            "site_name": "Prayer Room API",
            "recipient": user,
            "submissions": list(submissions),
            "unsubscribe_url": unsubscribe.link(user, digest),
        }
        text = render_to_string("email/user_digest.txt", context)
        message = EmailMultiAlternatives("Your submissions were answered", text, to=[user.email])
        html = render_to_string("email/user_digest.html", context)
        message.attach_alternative(html, "text/html")
        message.send()
        DigestDelivery.objects.create(digest="daily", recipient=user, period_end=end, status="sent")


if __name__ == "__main__":
    if sys.argv[1:2] == ["measure"]:
        measure(sys.argv[2], int(sys.argv[3]))
    else:
        main([int(argument) for argument in sys.argv[1:]] or SIZES)
