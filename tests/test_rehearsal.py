"""Deploys: three in a row, as Dokku does them, while people and schedules are at work.

A rehearsal with the service's own Procfile and app.json and with real processes. Dokku's
order: predeploy, release, a new web until its health check passes, new worker and beat
beside the old ones, the proxy switches, SIGTERM to the old ones.
https://dokku.com/docs/deployment/zero-downtime-deploys/
"""

import collections
import itertools
import json
import re
import threading
import time
import urllib.error
import urllib.request

import pytest

from tests.servers import free_port, wait_for

pytestmark = pytest.mark.slow

DEPLOYS = 3

#: A task that takes its time and leaves a line when it is done.
TASK = """

@shared_task
def rehearse(number):
    import time
    from pathlib import Path

    time.sleep(5)
    with Path("rehearsed").open("a") as file:
        file.write(f"{number}\\n")
"""

SCHEDULE = """
from django_celery_beat.models import IntervalSchedule, PeriodicTask
PeriodicTask.objects.exclude(name="deliveries-resume").update(enabled=False)
task = PeriodicTask.objects.get(name="deliveries-resume")
task.interval = IntervalSchedule.objects.create(every=2, period="seconds")
task.save()
"""

#: Queues tasks until it is told to stop, and then says how many there were.
QUEUE = """
import time
from pathlib import Path
from rehearsal.tasks import rehearse
number = 0
while not Path("stop").exists():
    rehearse.delay(number)
    number += 1
    time.sleep(1.5)
print(number)
"""


class Visitors(threading.Thread):
    """Sends request after request to where the proxy leads, and counts the answers."""

    def __init__(self, port):
        super().__init__(daemon=True)
        self.port = port
        self.answers = collections.Counter()
        self.ended = threading.Event()

    def run(self):
        while not self.ended.is_set():
            for path in ("/", "/admin/login/", "/api/submissions/", "/health/ready"):
                visitor = sum(self.answers.values()) % 250
                headers = {
                    "Host": "rehearsal.example.com",
                    "X-Forwarded-For": f"192.0.2.{visitor}",
                    "X-Forwarded-Proto": "https",
                }
                url = f"http://127.0.0.1:{self.port}{path}"
                try:
                    request = urllib.request.Request(url, headers=headers)
                    with urllib.request.urlopen(request, timeout=10) as response:
                        self.answers[response.status] += 1
                except urllib.error.HTTPError as error:
                    self.answers[f"{path} {error.code}"] += 1
                except OSError as error:
                    self.answers[f"{path} {error!r}"] += 1
                time.sleep(0.02)


class Dokku:
    """Deploys a service as Dokku's scheduler does; ``running`` is what serves now."""

    def __init__(self, service):
        self.service = service
        self.procfile = service.procfile()
        self.app = json.loads((service.folder / "app.json").read_text())
        self.running = {}
        self.visitors = None
        self.stops = []

    def deploy(self):
        self.service.run(self.app["scripts"]["dokku"]["predeploy"])
        self.service.run(self.procfile["release"])
        old = self.running
        self.service.port = free_port()
        self.service.environment["PORT"] = str(self.service.port)
        self.running = {"web": self.service.start("web")}
        self.check_web()
        self.service.environment["PORT"] = ""
        for name in self.app["formation"]:
            if name != "web":
                self.running[name] = self.service.start(name)
        time.sleep(3)
        assert all(process.popen.poll() is None for process in self.running.values())
        if self.visitors is None:
            self.visitors = Visitors(self.service.port)
            self.visitors.start()
        self.visitors.port = self.service.port
        for process in old.values():
            process.popen.terminate()
        for name, process in old.items():
            start = time.monotonic()
            status = process.popen.wait(timeout=30)
            self.stops.append((name, status, time.monotonic() - start))

    def check_web(self):
        (check,) = self.app["healthchecks"]["web"]
        for _ in range(check["attempts"]):
            try:
                # Without a domain the address of the container is the host.
                status, _ = self.service.get(check["path"], Host=f"172.17.0.2:{self.service.port}")
            except OSError:
                time.sleep(check["wait"])
            else:
                assert status == 200
                return
        pytest.fail(self.running["web"].text())


def test_three_in_a_row(bake, make_service, postgres_url, rabbitmq_url):
    project = bake(project_slug="rehearsal")
    with (project / "rehearsal" / "tasks.py").open("a") as file:
        file.write(TASK)
    service = make_service(
        project,
        DJANGO_MODE="prod",
        SECRET_KEY="Kx9-this-key-is-for-a-rehearsal-alone-and-long-enough-7f3Qz",
        DATABASE_URL=postgres_url,
        RABBITMQ_URL=rabbitmq_url,
        WORKER_CONCURRENCY=8,
    )
    service.install("--no-dev")
    service.run("python manage.py collectstatic --noinput")
    service.run(service.procfile()["release"])
    service.shell(SCHEDULE)

    dokku = Dokku(service)
    dokku.deploy()
    queue = service.spawn("queue", "python", "manage.py", "shell", "-v0", "-c", QUEUE)
    for _ in range(DEPLOYS):
        dokku.deploy()
        time.sleep(3)
    (project / "stop").touch()
    assert queue.popen.wait(timeout=30) == 0, queue.text()
    queued = set(range(int(queue.text().split()[-1])))
    done = project / "rehearsed"
    wait_for(lambda: queued <= set(map(int, done.read_text().split())), 60, done.read_text)
    dokku.visitors.ended.set()
    dokku.visitors.join()

    beats = [process for process in service.processes if "beat" in process.log.name]
    times = sorted(time for beat in beats for time in dispatches(beat.text()))
    gaps = [later - earlier for earlier, later in itertools.pairwise(times)]
    runs = list(map(int, done.read_text().split()))
    answers = dokku.visitors.answers
    print(f"{sum(answers.values())} requests, {sum(answers.values()) - answers[200]} failed")
    lost, repeated = len(queued - set(runs)), len(runs) - len(set(runs))
    print(f"{len(queued)} tasks queued, {lost} lost, {repeated} run twice")
    print(f"{len(times)} dispatches, shortest gap {min(gaps):.1f} s, longest {max(gaps):.1f} s")
    print(f"slowest end of an old process: {max(seconds for *_, seconds in dokku.stops):.1f} s")
    assert set(answers) == {200}, answers
    assert (lost, repeated) == (0, 0), runs
    assert min(gaps) > 1.5
    assert max(gaps) < 10
    assert len(times) > 10
    assert {status for _, status, _ in dokku.stops} == {0}
    assert all(beat.text().count("beat: Starting...") == 1 for beat in beats)


def dispatches(log):
    """Return when a beat dispatched, in seconds of the day."""
    found = re.findall(r"(\d\d):(\d\d):(\d\d)[,.](\d{3}).*Sending due task", log)
    return [int(h) * 3600 + int(m) * 60 + int(s) + int(ms) / 1000 for h, m, s, ms in found]
