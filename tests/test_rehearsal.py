"""Zero-downtime deploys: as Dokku does them, under load.

The test starts real processes from the service's Procfile and app.json, in the order of Dokku 0.38:
run predeploy and release, start the new web process and wait for its health check, switch the proxy,
start the new beat and worker beside the old ones, send SIGTERM to the old ones. A minute after a
process was replaced, a timer stops it, also while the next ones are starting.
Requests that the old web has accepted, or that wait for it, are in test_web_servers.py.
https://github.com/dokku/dokku/blob/v0.38.27/plugins/scheduler-docker-local/scheduler-deploy
"""

import collections
import contextlib
import itertools
import json
import re
import shlex
import shutil
import subprocess
import tempfile
import threading
import time
import urllib.error
import urllib.request

import pytest

from tests.conftest import production_variables
from tests.servers import PATIENCE, free_port, wait_for

pytestmark = pytest.mark.slow

#: A slow task that writes a line to a file when it completes.
TASK = """
from celery import shared_task

@shared_task
def rehearse(number, seconds=5):
    import time
    from pathlib import Path

    time.sleep(seconds)
    with Path("rehearsed").open("a") as file:
        file.write(f"{number}\\n")
"""

RUN_ONE_SCHEDULE_EVERY_TWO_SECONDS = """
from django_celery_beat.models import IntervalSchedule, PeriodicTask
PeriodicTask.objects.exclude(name="deliveries-resume").update(enabled=False)
task = PeriodicTask.objects.get(name="deliveries-resume")
task.interval = IntervalSchedule.objects.create(every=2, period="seconds")
# One that is queued again although an earlier one waits, and does nothing
task.task, task.args = "ops.send_notification", '["answer", 0]'
task.save()
"""

#: Queues tasks until a file named "stop" exists, then prints their number.
QUEUE_TASKS = """
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


#: A task that one of two versions has; each writes a line to a file that both share.
TASK_OF_ONE_VERSION = """
from celery import shared_task

@shared_task
def {name}(number):
    from pathlib import Path

    with Path("{folder}", "{name}").open("a") as file:
        file.write(f"{{number}}\\n")
"""


class Visitors(threading.Thread):
    """Sends requests to the port that the proxy routes to, and counts the responses."""

    def __init__(self, port, host):
        super().__init__(daemon=True)
        self.port, self.host = port, host
        self.responses = collections.Counter()
        self.stopped = threading.Event()
        # Held during a request, and by the proxy when it switches to another port.
        self.lock = threading.Lock()

    def run(self):
        while not self.stopped.is_set():
            for path in ("/", "/admin/login/", "/api/submissions/", "/health/ready"):
                visitor = sum(self.responses.values()) % 250
                headers = {
                    "Host": self.host,
                    "X-Forwarded-For": f"192.0.2.{visitor}",
                    "X-Forwarded-Proto": "https",
                }
                with self.lock:
                    self.responses[self.get(path, headers)] += 1
                time.sleep(0.02)

    def get(self, path, headers):
        """Return the status of the response; with the path, if the request failed."""
        url = f"http://127.0.0.1:{self.port}{path}"
        request = urllib.request.Request(url, headers=headers)
        try:
            with urllib.request.urlopen(request, timeout=10) as response:
                return response.status
        except urllib.error.HTTPError as error:
            return f"{path} {error.code}"
        except OSError as error:
            return f"{path} {error!r}"


class DeployError(Exception):
    """A check failed: the new process is stopped, and Dokku replaces no other one."""


class Dokku:
    """Deploys a service as Dokku does. ``running`` are the current processes by name.

    A process that was replaced gets SIGTERM twice, ``wait_to_retire`` seconds apart, and SIGKILL
    ``stop_timeout`` seconds later. ``second`` is how long a check waits for each second of app.json.
    """

    def __init__(self, service, wait_to_retire=60, stop_timeout=30, second=1):
        self.service = service
        self.wait_to_retire, self.stop_timeout, self.second = wait_to_retire, stop_timeout, second
        self.procfile = service.procfile()
        self.app = json.loads((service.folder / "app.json").read_text())
        self.running = {}
        self.visitors = None
        self.stops = []

    def deploy(self, service=None, during_overlap=lambda: None):
        """Deploy a version; raise DeployError if a check fails."""
        self.service = service or self.service
        self.service.run(self.app["scripts"]["dokku"]["predeploy"])
        self.service.run(self.procfile["release"])
        old = dict(self.running)
        # Dokku's timer stops what was replaced also if a later process fails, or is still starting.
        timers = []
        try:
            # Web is first, and the proxy switches before the others are started, in this order.
            for name in ["web", *sorted(self.app["formation"].keys() - {"web"})]:
                self.replace(name)
                if name in old:
                    timers.append(
                        threading.Timer(self.wait_to_retire, self.stop, [name, old[name]])
                    )
                    timers[-1].start()
            during_overlap()
            assert all(process.popen.poll() is None for process in self.running.values())
            for process in old.values():
                process.popen.terminate()
        finally:
            for timer in timers:
                timer.join()

    def replace(self, name):
        """Start a process and wait for its check; for web, let the proxy switch to it."""
        if name == "web":
            self.service.port = free_port()
        self.service.environment["PORT"] = str(self.service.port) if name == "web" else ""
        # A container has its own files: a check does not see the heartbeat of the old process.
        folder = tempfile.mkdtemp(dir=self.service.folder.parent)
        command = shlex.split(self.service.procfile()[name])
        process = self.service.spawn(name, *command, TMPDIR=folder)
        check = self.check_path if name == "web" else self.check_command
        try:
            check(process, folder, *self.app["healthchecks"][name])
        except DeployError:
            process.popen.terminate()
            process.popen.wait(timeout=self.stop_timeout)
            raise
        self.running[name] = process
        if name == "web":
            self.switch_proxy()

    def check_command(self, process, folder, check):
        # The first word sets the environment of a container.
        assert check["command"][0] == "/exec"
        for attempt in range(check.get("attempts", 3)):
            if attempt:
                # Dokku doubles the delay of a command check each time.
                delay = check.get("wait", 5) * self.second * 2 ** (attempt - 1)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.popen.wait(timeout=delay)
                    break  # It has ended.
            command = self.service.spawn("check", *check["command"][1:], TMPDIR=folder)
            if command.popen.wait(timeout=check.get("timeout", 5)) == 0:
                return
        raise DeployError(f"{command.text()}\n{process.text()}")

    def check_path(self, process, folder, check):
        for _ in range(check.get("attempts", 3)):
            try:
                # For an app without a domain, Dokku sends the container's IP address as the host.
                self.service.get(check["path"], Host=f"172.17.0.2:{self.service.port}")
            except OSError:
                time.sleep(check.get("wait", 5) * self.second)
            else:
                return
        raise DeployError(process.text())

    def switch_proxy(self):
        if self.visitors is None:
            host = f"{self.service.folder.name}.example.com"
            self.visitors = Visitors(self.service.port, host)
            self.visitors.start()
        # The old web finishes its requests: none is still on its way to it.
        with self.visitors.lock:
            self.visitors.port = self.service.port

    def stop(self, name, process):
        """Stop a process as Docker does."""
        start = time.monotonic()
        process.popen.terminate()
        try:
            process.popen.wait(timeout=self.stop_timeout)
        except subprocess.TimeoutExpired:
            process.popen.kill()
        self.stops.append((name, process.popen.wait(), time.monotonic() - start))


@pytest.mark.parametrize(
    ("broker", "deploys"),
    [
        ("rabbitmq", 1),
        pytest.param("rabbitmq", 3, marks=pytest.mark.long),
        pytest.param("redis", 3, marks=pytest.mark.long),
        pytest.param("postgresql", 3, marks=pytest.mark.long),
    ],
)
def test_deploys_fail_no_request_and_lose_no_task(
    bake, make_service, postgres_url, rabbitmq_url, redis_url, broker, deploys
):
    project = bake(project_slug="rehearsal", broker=broker)
    with (project / "rehearsal" / "tasks.py").open("a") as file:
        file.write(TASK)
    service = make_service(
        project,
        WORKER_CONCURRENCY=8,
        REDIS_URL=redis_url,
        **production_variables(postgres_url, rabbitmq_url),
    )
    service.deploy()
    service.shell(RUN_ONE_SCHEDULE_EVERY_TWO_SECONDS)

    dokku = Dokku(service, wait_to_retire=1, stop_timeout=30 * PATIENCE, second=0.5)
    dokku.deploy()
    producer = service.spawn("queue", "python", "manage.py", "shell", "-v0", "-c", QUEUE_TASKS)
    before = dict(dokku.running)
    fail_at_the_worker(dokku)
    # The old web is stopped, and so is the old beat; nobody replaces the old worker.
    assert {name for name, process in before.items() if process.popen.poll() is None} == {"worker"}
    assert dokku.running == {
        "web": dokku.running["web"],
        "beat": dokku.running["beat"],
        "worker": before["worker"],
    }
    for _ in range(deploys):
        dokku.deploy()
        time.sleep(3)
    (project / "stop").touch()
    assert producer.popen.wait(timeout=30 * PATIENCE) == 0, producer.text()
    queued = set(range(int(producer.text().split()[-1])))
    done = project / "rehearsed"
    wait_for(lambda: queued <= set(map(int, done.read_text().split())), 60, done.read_text)
    dokku.visitors.stopped.set()
    dokku.visitors.join()
    # No run is added while they are counted.
    beat = dokku.running["beat"].popen
    beat.terminate()
    assert beat.wait(timeout=30 * PATIENCE) == 0, dokku.running["beat"].text()

    beats = [process for process in service.processes if process.log.name.startswith("beat-")]
    times = sorted(time for beat in beats for time in dispatch_times(beat.text()))
    gaps = [later - earlier for earlier, later in itertools.pairwise(times)]
    runs = list(map(int, done.read_text().split()))
    responses = dokku.visitors.responses
    print(f"{sum(responses.values())} requests, {sum(responses.values()) - responses[200]} failed")
    lost, repeated = len(queued - set(runs)), len(runs) - len(set(runs))
    print(f"{len(queued)} tasks queued, {lost} lost, {repeated} run twice")
    print(f"{len(times)} dispatches, shortest gap {min(gaps):.1f} s, longest {max(gaps):.1f} s")
    print(
        f"slowest shutdown of an old process: {max(seconds for *_, seconds in dokku.stops):.1f} s"
    )
    assert set(responses) == {200}, responses
    assert (lost, repeated) == (0, 0), runs
    # Each run was dispatched once; one that is late keeps the next one on time.
    attempts = list(map(int, service.shell(PRINT_ATTEMPTS).split()))
    assert (set(attempts), len(attempts)) == ({1}, len(times))
    assert max(gaps) < 10 * PATIENCE
    assert len(times) > 3 * deploys
    assert {status for _, status, _ in dokku.stops} == {0}
    assert all(beat.text().count("beat: Starting...") == 1 for beat in beats)


def fail_at_the_worker(dokku):
    """Deploy a version whose worker does not start."""
    path = dokku.service.folder / "Procfile"
    procfile = path.read_text()
    path.write_text(procfile.replace("prodserver worker", "prodserver worker --nothing"))
    with pytest.raises(DeployError, match="--nothing"):
        dokku.deploy()
    path.write_text(procfile)


PRINT_ATTEMPTS = """
from prodserver_ops.models import ScheduleRun
print(*ScheduleRun.objects.values_list("attempts", flat=True))
"""


def dispatch_times(log):
    """Return the times at which beat dispatched a task, in seconds since midnight."""
    matches = re.findall(r"(\d\d):(\d\d):(\d\d)[,.](\d{3}).*Sending due task", log)
    return [int(h) * 3600 + int(m) * 60 + int(s) + int(ms) / 1000 for h, m, s, ms in matches]


@pytest.mark.long
def test_task_that_outlasts_the_stop_timeout_runs_again(
    bake, make_service, postgres_url, rabbitmq_url
):
    project = bake(project_slug="rehearsal")
    with (project / "rehearsal" / "tasks.py").open("a") as file:
        file.write(TASK)
    service = make_service(project, **production_variables(postgres_url, rabbitmq_url))
    service.deploy()
    dokku = Dokku(service, wait_to_retire=1, stop_timeout=2)
    dokku.deploy()
    service.shell("from rehearsal.tasks import rehearse; rehearse.delay(1, 60)")
    dokku.running["worker"].wait_for_text("rehearse[")
    dokku.deploy()
    dokku.visitors.stopped.set()
    dokku.visitors.join()
    assert {(name, status) for name, status, _ in dokku.stops} >= {("worker", -9), ("beat", 0)}
    done = project / "rehearsed"
    wait_for(done.exists, 90, dokku.running["worker"].text)
    assert done.read_text() == "1\n"


# The library's tests have a short form: what becomes of tasks that a worker does not know.
@pytest.mark.long
def test_another_version_and_its_rollback_fail_no_request_and_lose_no_task(
    bake_impatient, make_service, postgres_url, rabbitmq_url, tmp_path
):
    old_project = bake_impatient(project_slug="versions")
    new_project = tmp_path / "new" / "versions"
    shutil.copytree(old_project, new_project)
    variables = production_variables(postgres_url, rabbitmq_url)
    old, new = (make_service(project, **variables) for project in (old_project, new_project))
    add_task(old, "removed", tmp_path)
    add_task(new, "added", tmp_path)
    add_field(new)
    old.deploy()
    dokku = Dokku(old, wait_to_retire=1, stop_timeout=30 * PATIENCE)
    dokku.deploy()
    new.install("--no-dev")
    new.run("python manage.py collectstatic --noinput")
    new.run("python manage.py makemigrations versions", DJANGO_MODE="")

    queued = collections.Counter()

    def queue(service, name, count):
        first = queued[name]
        numbers = f"range({first}, {first + count})"
        service.shell(f"from versions.tasks import {name}\nfor n in {numbers}: {name}.delay(n)")
        queued[name] += count

    # Both workers run; the old one does not know the new task.
    dokku.deploy(new, lambda: queue(new, "added", 30))
    # The old web has just queued these, and no worker knows them any more.
    queue(old, "removed", 5)
    wait_for(lambda: get_failed(new) >= 5, 60, lambda: run_doctor(new))
    # After the rollback no worker knows the new task.
    dokku.deploy(old, lambda: queue(new, "added", 10))
    queue(new, "added", 3)
    wait_for(lambda: count_lines(tmp_path / "removed") == 5, 30, lambda: run_doctor(old))
    wait_for(lambda: get_failed(old) >= 3, 60, lambda: run_doctor(old))
    dokku.deploy(new)
    wait_for(
        lambda: count_lines(tmp_path / "added") >= queued["added"], 60, lambda: run_doctor(new)
    )
    dokku.visitors.stopped.set()
    dokku.visitors.join()

    responses = dokku.visitors.responses
    print(f"{sum(responses.values())} requests, {sum(responses.values()) - responses[200]} failed")
    for name, count in queued.items():
        runs = sorted(map(int, (tmp_path / name).read_text().split()))
        print(f"{count} tasks {name!r} queued, {count - len(set(runs))} lost")
        assert runs == list(range(count))
    assert set(responses) == {200}, responses
    assert {status for _, status, _ in dokku.stops} == {0}


def add_task(service, name, folder):
    """Give a version a task."""
    with (service.folder / "versions" / "tasks.py").open("a") as file:
        file.write(TASK_OF_ONE_VERSION.format(name=name, folder=folder))


def add_field(service):
    """Give a version a required field that the other one can live with."""
    models = service.folder / "versions" / "models.py"
    text = models.read_text()
    body = "    body = models.TextField(max_length=5000)\n"
    assert text.count(body) == 1
    field = '    room = models.CharField(max_length=9, default="a", db_default="a")\n'
    models.write_text(text.replace(body, body + field))


def count_lines(path):
    return len(path.read_text().split()) if path.exists() else 0


def run_doctor(service):
    command = service.spawn("doctor", "python", "manage.py", "doctor")
    command.popen.wait(timeout=30 * PATIENCE)
    return command.text()


def get_failed(service):
    """Return how many tasks doctor reports as given up."""
    match = re.search(r"(\d+) tasks were given up", run_doctor(service))
    return int(match[1]) if match else 0
