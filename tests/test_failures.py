"""Failures: a service recovers by itself from killed processes and server outages."""

import contextlib
import http.cookiejar
import json
import re
import threading
import time
import urllib.error
import urllib.parse
import urllib.request

import pytest

from tests.conftest import production_variables
from tests.servers import PATIENCE, wait_for

pytestmark = pytest.mark.slow

#: How long a server is stopped, in seconds: longer than a connection may take to fail.
OUTAGE = 12

CREATE_DATA = """
from django_celery_beat.models import IntervalSchedule, PeriodicTask
# A digest would be due if the test runs over a full hour.
PeriodicTask.objects.exclude(name="deliveries-resume").update(enabled=False)
task = PeriodicTask.objects.get(name="deliveries-resume")
task.interval = IntervalSchedule.objects.create(every=1, period="seconds")
task.save()
User.objects.create_superuser("admin", "admin@example.com", "secret")
author = User.objects.create_user("author", "author@example.com")
for number in range(3):
    Submission.objects.create(author=author, body=f"Question {number}")
"""


class HealthMonitor(threading.Thread):
    """Polls the health checks.

    ``live`` are the statuses of ``/health/live``, ``ready`` is the last status and checks of
    ``/health/ready``, and ``slowest`` is its longest response time.
    """

    def __init__(self, service):
        super().__init__(daemon=True)
        self.service = service
        self.live = []
        self.ready = None
        self.slowest = 0
        self.stopped = threading.Event()

    def run(self):
        while not self.stopped.wait(0.2):
            start = time.monotonic()
            self.ready = self.request("/health/ready")
            self.slowest = max(self.slowest, time.monotonic() - start)
            self.live.append(self.request("/health/live")[0])

    def request(self, path):
        try:
            status, text = self.service.get(path)
        except urllib.error.HTTPError as error:
            status, text = error.code, error.read().decode()
        except OSError as error:
            return repr(error), {}
        return status, json.loads(text).get("checks", {})


class Moderator:
    """A logged-in moderator who answers submissions in the admin."""

    def __init__(self, service):
        self.service = service
        self.cookies = http.cookiejar.CookieJar(
            http.cookiejar.DefaultCookiePolicy(secure_protocols=("http", "https"))
        )
        self.opener = urllib.request.build_opener(
            urllib.request.HTTPCookieProcessor(self.cookies), NoRedirect()
        )
        self.submit("/admin/login/", username="admin", password="secret", next="/admin/")

    def submit(self, path, **fields):
        """Submit the form of a page. Return how long the response took, in seconds."""
        url = f"http://127.0.0.1:{self.service.port}{path}"
        headers = {
            "Host": f"{self.service.folder.name}.example.com",
            "X-Forwarded-Proto": "https",
            "Referer": f"https://{self.service.folder.name}.example.com/",
        }
        page = self.opener.open(urllib.request.Request(url, None, headers), timeout=30)
        page = page.read().decode()
        fields["csrfmiddlewaretoken"] = re.search(r'csrfmiddlewaretoken" value="(\w+)"', page)[1]
        start = time.monotonic()
        data = urllib.parse.urlencode(fields, doseq=True).encode()
        with contextlib.suppress(RedirectError):
            self.opener.open(urllib.request.Request(url, data, headers), timeout=30).read()
        return time.monotonic() - start

    def answer(self, number):
        return self.submit(
            f"/admin/{self.service.folder.name}/submission/{number}/change/",
            response=f"Answer {number}.",
            expires_at_0="",
            expires_at_1="",
        )


class RedirectError(Exception):
    """The response redirects to an https URL, which no server serves in a test."""


class NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *args):
        raise RedirectError


@pytest.fixture
def service(bake_impatient, make_service, smtp, dedicated_postgres, dedicated_rabbitmq):
    service = make_service(
        bake_impatient(project_slug="failures"),
        EMAIL_HOST="127.0.0.1",
        EMAIL_PORT=smtp.port,
        **production_variables(dedicated_postgres.url, dedicated_rabbitmq.url),
    )
    service.deploy()
    service.shell(CREATE_DATA)
    return service


def test_service_recovers_from_killed_processes_and_server_outages(
    service, smtp, dedicated_postgres, dedicated_rabbitmq
):
    processes = {name: service.start(name) for name in ("web", "worker", "beat")}
    monitor = HealthMonitor(service)
    processes["web"].wait_for_text("Listening at")
    monitor.start()

    def wait_for_work():
        """Wait until the service is ready and completes another scheduled task."""
        ready = (200, {"database": "ok", "broker": "ok"})
        wait_for(lambda: monitor.ready == ready, 30, processes["web"].text)
        completed = processes["worker"].text().count("succeeded")
        wait_for(
            lambda: processes["worker"].text().count("succeeded") > completed,
            90,  # A new beat waits a minute for one that was killed.
            lambda: processes["beat"].text() + processes["worker"].text(),
        )

    def check_recovery(event, since):
        wait_for_work()
        print(f"{event}: recovered after {time.monotonic() - since:.1f} s")

    wait_for_work()

    for name in processes:
        since = time.monotonic()
        processes[name].kill_all()
        processes[name] = service.start(name)
        check_recovery(f"{name} killed", since)

    monitor.live.clear()
    dedicated_postgres.stop()
    unavailable = (503, {"database": "unavailable", "broker": "ok"})
    wait_for(lambda: monitor.ready == unavailable, 10, str)
    time.sleep(OUTAGE)
    assert monitor.ready == unavailable
    dedicated_postgres.start()
    check_recovery("PostgreSQL stopped", time.monotonic())

    moderator = Moderator(service)
    dedicated_rabbitmq.stop()
    unavailable = (503, {"database": "ok", "broker": "unavailable"})
    wait_for(lambda: monitor.ready == unavailable, 20, str)
    start = time.monotonic()
    seconds = [moderator.answer(number) for number in (1, 2)]
    time.sleep(max(0, start + OUTAGE - time.monotonic()))
    assert monitor.ready == unavailable
    dedicated_rabbitmq.start()
    check_recovery("RabbitMQ stopped", time.monotonic())
    wait_for(lambda: len(smtp.messages) >= 2, 120, processes["worker"].text)
    seconds.append(moderator.answer(3))
    wait_for(lambda: len(smtp.messages) >= 3, 30, processes["worker"].text)

    monitor.stopped.set()
    monitor.join()
    print(f"slowest answer in the admin without a broker: {max(seconds[:2]):.1f} s")
    print(f"slowest /health/ready: {monitor.slowest:.1f} s")
    assert set(monitor.live) == {200}
    assert max(seconds) < 5 * PATIENCE
    assert monitor.slowest < 10 * PATIENCE
    assert sorted(message["message-id"].split("@")[0] for message in smtp.messages) == [
        "<answer.1",
        "<answer.2",
        "<answer.3",
    ]
    assert all(process.stop(seconds=30) == 0 for process in processes.values())
