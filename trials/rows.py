"""Run beat with thousands of schedules that have a random value in every field.

    uv run trials/rows.py [ROWS] [SEED]

Generates a service, fills its table of schedules with random rows (``library/tests/random_rows.py``,
hypothesis) of which a third are good, and runs beat on PostgreSQL (127.0.0.1:5432, user postgres,
trust) and RabbitMQ (127.0.0.1:5672, guest) for some minutes. Beat must live, queue each good row in each
minute within ``LATE`` seconds, and log why a row cannot run once. ``doctor`` and the page must show what
it logged. Exits with status 1 if anything is wrong.
"""

import collections
import json
import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import psycopg

from trials.beats import make_service

ROOT = Path(__file__).resolve().parent.parent

ROWS, SEED = 10_000, 20261130

#: The whole minutes that beat runs, and how late a good row may be queued in them, in seconds.
MINUTES, LATE = 3, 30

TASK, ARGUMENTS = "trial.tasks.note", '["good"]'

CREATE = """
import json, sys
sys.path.insert(0, {tests!r})
import create_rows
from django_celery_beat.models import PeriodicTask
PeriodicTask.objects.all().delete()
create_rows.create([json.loads(line) for line in open({path!r})])
"""

#: The page as an administrator gets it, and what doctor says, with the seconds that each takes.
ASK = """
import json, time
from django.conf import settings
from django.test import Client
from django.contrib.auth import get_user_model
from django.urls import reverse
from prodserver_ops.console import doctor
user = get_user_model().objects.create_superuser("admin", "admin@example.com", "x" * 20)
client = Client(headers={"host": settings.ALLOWED_HOSTS[0]})
client.force_login(user)
start = time.monotonic()
page = client.get(reverse("admin:ops_operations"), secure=True)
middle = time.monotonic()
result = doctor.check_schedules()
print(json.dumps({
    "status": page.status_code,
    "page": page.content.decode().count("<strong class=\\"problem\\">"),
    "page seconds": round(middle - start, 1),
    "doctor": {row["name"]: row["problem"] for row in result.schedules if row["problem"]},
    "message": result.message,
    "doctor seconds": round(time.monotonic() - middle, 1),
}))
"""

GET_RUNS = """
SELECT s.name, r.due_at, extract(epoch FROM r.published_at - r.due_at)::float
FROM ops_schedulerun r JOIN django_celery_beat_periodictask s ON s.id = r.schedule_id
WHERE r.published_at IS NOT NULL AND s.name LIKE 'good%'
"""


def make_rows(path, count, seed):
    """Write the rows to a file, in the environment of the library's tests."""
    uv = os.environ.get("UV", "uv")
    command = [uv, "run", "--directory", str(ROOT / "library"), "python", "tests/random_rows.py"]
    environment = {name: os.environ[name] for name in os.environ if name != "VIRTUAL_ENV"}
    environment |= {"DJANGO_SETTINGS_MODULE": "dummy.settings", "DJANGO_MODE": "test"}
    with path.open("w") as file:
        arguments = [str(count), str(seed), TASK, ARGUMENTS]
        subprocess.run([*command, *arguments], check=True, stdout=file, env=environment)


def main(count=ROWS, seed=SEED):
    """Run beat, print what was found, and return whether all is well."""
    with make_service() as service:
        rows = service.folder / "rows"
        make_rows(rows, count, seed)
        tests = str(ROOT / "library" / "tests")
        service.shell(CREATE.format(tests=tests, path=str(rows)))
        beat = service.spawn("beat", *shlex.split(service.procfile()["beat"]))
        # The first minute may have begun before beat did.
        time.sleep(60 * (MINUTES + 2) - time.time() % 60)
        alive = beat.popen.poll() is None
        with psycopg.connect(service.environment["DATABASE_URL"]) as connection:
            runs = connection.execute(GET_RUNS).fetchall()
        service.run("python manage.py collectstatic --noinput -v0")
        answer = json.loads(service.shell(ASK).splitlines()[-1])
        text = beat.text()
    return report(count, alive, runs, answer, text)


def get_number(message):
    """Return the number of the row that a message is about.

    Its name ends with it. The rest may be redacted in the log, and contain the same words.
    """
    return re.search(r" (\d+) cannot run: ", message)[1]


def report(count, alive, runs, answer, text):
    """Print what was found; return whether all is well."""
    good = -(-count // 3)
    minutes = sorted({due for _, due, _ in runs})[1 : MINUTES + 1]
    late = [seconds for _, due, seconds in runs if due in minutes]
    events = [json.loads(line) for line in text.splitlines() if line.startswith("{")]
    messages = [event["message"] for event in events if " cannot run: " in event["message"]]
    logged = collections.Counter(messages)
    known = {name.rpartition(" ")[2] for name in answer["doctor"]}
    unknown = {message for message in logged if get_number(message) not in known}
    for message in sorted(unknown):
        print("unknown to doctor:", message)
    result = {
        "rows": count,
        "alive": alive,
        "good runs": len(late),
        "expected": good * MINUTES,
        "latest": round(max(late, default=0), 1),
        "logged": len(logged),
        "logged twice": sum(number - 1 for number in logged.values()),
        "tracebacks": sum("exception" in event for event in events),
        "doctor": len(answer["doctor"]),
        "good ones that doctor complains about": sum(
            name.startswith("good ") for name in answer["doctor"]
        ),
        "logged, unknown to doctor": len(unknown),
        **{name: answer[name] for name in ("status", "page", "page seconds", "doctor seconds")},
    }
    print(json.dumps(result, indent=2))
    return (
        alive
        and len(late) == good * MINUTES
        and max(late) < LATE
        and answer["status"] == 200
        and answer["page"] > 0
        and len(answer["doctor"]) > 0
        and not result["logged twice"]
        and not result["tracebacks"]
        and not result["good ones that doctor complains about"]
        and not result["logged, unknown to doctor"]
    )


if __name__ == "__main__":
    sys.exit(0 if main(*map(int, sys.argv[1:])) else 1)
