"""Failures: a process that is killed or a server that stops leaves no work for a hand."""

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

from tests.servers import wait_for

pytestmark = pytest.mark.slow

#: How long a server is away, in seconds.
AWAY = 20

FILL = """
from django_celery_beat.models import IntervalSchedule, PeriodicTask
task = PeriodicTask.objects.get(name="deliveries-resume")
task.interval = IntervalSchedule.objects.create(every=1, period="seconds")
task.save()
User.objects.create_superuser("admin", "admin@example.com", "secret")
author = User.objects.create_user("author", "author@example.com")
for number in range(3):
    Submission.objects.create(author=author, body=f"Question {number}")
"""


class Watch(threading.Thread):
    """Asks the health checks all the time; ``ready`` is the last answer of ``/health/ready``."""

    def __init__(self, service):
        super().__init__(daemon=True)
        self.service = service
        self.live = []
        self.ready = None
        self.slowest = 0
        self.ended = threading.Event()

    def run(self):
        while not self.ended.wait(0.2):
            start = time.monotonic()
            self.ready = self.ask("/health/ready")
            self.slowest = max(self.slowest, time.monotonic() - start)
            self.live.append(self.ask("/health/live")[0])

    def ask(self, path):
        try:
            status, text = self.service.get(path)
        except urllib.error.HTTPError as error:
            status, text = error.code, error.read().decode()
        except OSError as error:
            return repr(error), {}
        return status, json.loads(text).get("checks", {})


class Moderator:
    """A browser in which a moderator is logged in and answers submissions."""

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
        """Fill the form of a page in and submit it; return the seconds that this took."""
        url = f"http://127.0.0.1:{self.service.port}{path}"
        headers = {
            "Host": "failures.example.com",
            "X-Forwarded-Proto": "https",
            "Referer": "https://failures.example.com/",
        }
        page = self.opener.open(urllib.request.Request(url, None, headers), timeout=30)
        page = page.read().decode()
        fields["csrfmiddlewaretoken"] = re.search(r'csrfmiddlewaretoken" value="(\w+)"', page)[1]
        start = time.monotonic()
        data = urllib.parse.urlencode(fields).encode()
        with contextlib.suppress(Redirected):
            self.opener.open(urllib.request.Request(url, data, headers), timeout=30).read()
        return time.monotonic() - start

    def answer(self, number):
        return self.submit(
            f"/admin/failures/submission/{number}/change/",
            response=f"Answer {number}.",
            expires_at_0="",
            expires_at_1="",
        )


class Redirected(Exception):
    """The service sends on to an https address, where nothing listens in a test."""


class NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *args):
        raise Redirected


@pytest.fixture
def service(bake, make_service, smtp, own_postgres, own_rabbitmq):
    service = make_service(
        bake(project_slug="failures"),
        DJANGO_MODE="prod",
        SECRET_KEY="a-key-for-this-test-alone-of-more-than-fifty-characters",
        DATABASE_URL=own_postgres.url,
        RABBITMQ_URL=own_rabbitmq.url,
        EMAIL_HOST="127.0.0.1",
        EMAIL_PORT=smtp.port,
    )
    service.install("--no-dev")
    service.run("python manage.py collectstatic --noinput")
    service.run(service.procfile()["release"])
    service.shell(FILL)
    return service


def test_the_service_heals(service, smtp, own_postgres, own_rabbitmq):
    """Processes and servers go in turn; each time all is well again, and the work is done."""
    processes = {name: service.start(name) for name in ("web", "worker", "beat")}
    watch = Watch(service)
    processes["web"].wait_for_text("Listening at")
    watch.start()

    def is_well():
        return watch.ready == (200, {"database": "ok", "broker": "ok"})

    def works():
        """Beat dispatches, and the worker runs what it dispatched."""
        seen = processes["worker"].text().count("succeeded")
        wait_for(
            lambda: processes["worker"].text().count("succeeded") > seen,
            60,
            lambda: processes["beat"].text() + processes["worker"].text(),
        )

    def report(what, since):
        print(f"{what}: well again after {time.monotonic() - since:.1f} s")

    wait_for(is_well, 30, processes["web"].text)
    works()

    for name in processes:
        since = time.monotonic()
        processes[name].kill_all()
        processes[name] = service.start(name)
        wait_for(is_well, 30, processes["web"].text)
        works()
        report(f"{name} killed", since)

    watch.live.clear()
    own_postgres.stop()
    wait_for(lambda: watch.ready == (503, {"database": "unavailable", "broker": "ok"}), 10, str)
    time.sleep(AWAY)
    assert watch.ready == (503, {"database": "unavailable", "broker": "ok"})
    own_postgres.start()
    since = time.monotonic()
    wait_for(is_well, 30, processes["web"].text)
    works()
    report("PostgreSQL stopped", since)

    moderator = Moderator(service)
    own_rabbitmq.stop()
    wait_for(lambda: watch.ready == (503, {"database": "ok", "broker": "unavailable"}), 20, str)
    away = time.monotonic()
    seconds = [moderator.answer(number) for number in (1, 2)]
    time.sleep(max(0, away + AWAY - time.monotonic()))
    assert watch.ready == (503, {"database": "ok", "broker": "unavailable"})
    own_rabbitmq.start()
    since = time.monotonic()
    wait_for(is_well, 30, processes["web"].text)
    works()
    report("RabbitMQ stopped", since)
    wait_for(lambda: len(smtp.messages) >= 2, 120, processes["worker"].text)
    seconds.append(moderator.answer(3))
    wait_for(lambda: len(smtp.messages) >= 3, 30, processes["worker"].text)

    watch.ended.set()
    watch.join()
    print(f"answers queued without a broker took {max(seconds[:2]):.1f} s at most")
    print(f"slowest /health/ready: {watch.slowest:.1f} s")
    assert set(watch.live) == {200}
    assert max(seconds) < 5
    assert watch.slowest < 10
    assert sorted(message["message-id"].split("@")[0] for message in smtp.messages) == [
        "<notification.1",
        "<notification.2",
        "<notification.3",
    ]
    assert all(process.stop(seconds=30) == 0 for process in processes.values())
