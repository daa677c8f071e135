"""Attack the web process of services, while probes check that the site and its health respond.

    uv run trials/attacks.py [--short] [--servers gunicorn,granian,uvicorn] [--seconds 4]

Generates, for each web server, the default service and one with all options, and starts it in
production mode on PostgreSQL (127.0.0.1:5432, user postgres, trust) and RabbitMQ. Clients send each of
``ATTACKS`` for some seconds, as fast as the responses come. In the meantime a probe requests the site
and ``/health/ready`` without pause. Exits with status 1 unless

- each probe gets status 200 within ``PROBE_LIMIT``,
- no request gets status 500, and none is logged with a traceback,
- no line of the log is longer than 16 KB, and none contains the secrets of the requests,
- the memory of the web process does not grow by more than ``GROWTH``.

All servers take about ten minutes. ``--short`` attacks the default service on gunicorn for a minute.
"""

import argparse
import base64
import collections
import contextlib
import http.client
import itertools
import json
import os
import socket
import sys
import threading
import time
import uuid
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import psycopg

from tests.conftest import POSTGRES_SERVER, RABBITMQ_URL, Service, production_variables
from tests.generate import generated_project
from tests.servers import PATIENCE, wait_for
from tests.test_attacks import ATTACKS as KNOWN

SLUG = "attacked"
HOST = f"{SLUG}.example.com"
REDIS_URL = os.environ.get("TEST_REDIS_URL", "redis://127.0.0.1:6379/9")

#: The answers of the service with all options. Channels needs an ASGI server.
OPTIONS = {
    "queues": "high",
    "lifecycle": "archive",
    "monitoring": "flower",
    "task_results": "database",
}

CLIENTS, PROBE_LIMIT = 8, 5 * PATIENCE

#: How much the memory of the process and its children may grow, in MiB.
GROWTH = 150

#: Part of each secret that requests contain.
SECRET = "s3cr3t-of-the-attack"

FORM = "application/x-www-form-urlencoded"
MULTIPART = "multipart/form-data; boundary=x"
PART = b'--x\r\nContent-Disposition: form-data; name="a"%s\r\n\r\n%s\r\n--x--\r\n'


def post(content_type, body, path="/admin/login/", **headers):
    """Return a form with a cookie, so that Django reads it for the token."""
    cookie = {"Cookie": "csrftoken=" + "a" * 32}
    return ("POST", path, {"Content-Type": content_type} | cookie | headers, body)


#: Each attack: method, path, headers and body. A body of None with a length never arrives.
ATTACKS = {
    **{name: attack[:4] for name, attack in KNOWN.items()},
    "health": ("GET", "/health/ready", {}, None),
    "deep health": ("GET", "/health/ready?deep", {}, None),
    "HEAD of health": ("HEAD", "/health/ready", {}, None),
    "OPTIONS of health": ("OPTIONS", "/health/ready", {}, None),
    "health without its body": ("GET", "/health/ready", {"Content-Length": "9"}, None),
    **{
        f"charset {name}": post(f"{FORM}; charset={name}", b"a=%ff+AGE")
        for name in ("utf-7", "hex", "idna", "punycode", "none")
    },
    "multipart charset": post(f"{MULTIPART}; charset=hex", PART % (b"", b"+AGE")),
    "many fields": post(FORM, b"&".join(b"a=%d" % n for n in range(1500)), "/nothing/"),
    "many files": post(MULTIPART, (PART % (b"; filename=f", b""))[:-7] * 200, "/nothing/"),
    "large field": post(MULTIPART, PART % (b"", b"b" * 2**21), "/nothing/"),
    "no boundary": post("multipart/form-data", b"x", "/nothing/"),
    "other host": post(FORM + "; charset=utf-7", b"a=b", Host="evil.example"),
    "accept": ("GET", "/api/submissions/", {"Accept": "a/b; x*=hex''%41"}, None),
    "content type": ("POST", "/api/token/", {"Content-Type": "a/b; x*=hex''%41"}, b"{}"),
    "secrets": (
        "POST",
        f"/nothing/?token={SECRET}&password={SECRET}",
        {"Authorization": f"Basic {base64.b64encode(SECRET.encode()).decode()}"},
        f"password={SECRET}".encode(),
    ),
    "NUL": ("GET", "/api/submissions/?cursor=%00&x=%ff", {}, None),
    "many parameters": ("GET", "/?" + "a=b&" * 1500, {}, None),
    "request id": ("GET", "/nothing/", {"X-Request-ID": "a" * 7000}, None),
    "forwarded": ("GET", "/", {"X-Forwarded-For": "1," * 3000}, None),
    "slow": ("POST", "/api/token/", {"Content-Length": "100000"}, None),
    "staff: many words": ("GET", "/admin/SLUG/submission/?q=" + "+".join("ab" * 75), {}, None),
    "staff: lookup": ("GET", "/admin/SLUG/submission/?body__icontains=a", {}, None),
    "staff: search": ("GET", "/admin/SLUG/submission/?status=all&q=a+b+c+d+e", {}, None),
    "staff: bad page": ("GET", "/admin/SLUG/submission/?p=99999999999999999999", {}, None),
}


class Probe(threading.Thread):
    """Requests the site and the health check without pause, and notes what is wrong."""

    def __init__(self, service):
        super().__init__()
        self.service, self.running = service, True
        self.count, self.slowest, self.problems = 0, 0, []

    def run(self):
        for path in itertools.cycle(["/", "/health/ready"]):
            if not self.running:
                return
            start = time.monotonic()
            try:
                status = send(self.service, ("GET", path, {}, None), "192.0.2.1")
            except OSError as error:
                status = repr(error)
            self.count += 1
            self.slowest = max(self.slowest, time.monotonic() - start)
            if status != 200:
                self.problems.append(f"{path} got {status}")
            time.sleep(0.05)


def send(service, attack, address):
    """Send a request from an address; return the status, or None if it is not complete."""
    method, path, headers, body = attack
    headers = {"Host": HOST, "X-Forwarded-Proto": "https", "X-Forwarded-For": address} | headers
    with contextlib.closing(
        http.client.HTTPConnection("127.0.0.1", service.port, timeout=20 * PATIENCE)
    ) as connection:
        connection.request(method, path.replace("SLUG", SLUG), body, headers)
        if "Content-Length" in headers and body is None:
            connection.sock.shutdown(socket.SHUT_WR)
            time.sleep(0.1)
            return None
        return connection.getresponse().status


def attack(service, name, cookie, seconds):
    """Attack with all clients for some seconds; return how often each status came."""
    method, path, headers, body = ATTACKS[name]
    if name.startswith("staff"):
        headers = headers | {"Cookie": cookie}
    end, statuses = time.monotonic() + seconds, collections.Counter()

    def run(client):
        for number in itertools.count():
            if time.monotonic() > end:
                return
            try:
                address = f"203.0.{client}.{number % 250}"
                status = send(service, (method, path, headers, body), address)
            except (OSError, http.client.HTTPException) as error:
                status = type(error).__name__
            statuses[status] += 1

    threads = [threading.Thread(target=run, args=[client]) for client in range(CLIENTS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return statuses


def get_memory(pid):
    """Return the memory of a process and its children in MiB."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20 + sum(map(get_memory, children))


def find_log_problems(text):
    """Yield what is wrong with the log."""
    for line in text.splitlines():
        if len(line.encode()) > 16 * 1024:
            yield f"a line of {len(line)} characters: {line[:200]}"
        if SECRET in line or base64.b64encode(SECRET.encode()).decode() in line:
            yield f"a secret: {line[:400]}"
        with contextlib.suppress(ValueError):
            event = json.loads(line)
            if "Service Unavailable: /health/" in event.get("message", ""):
                continue  # No worker is running.
            if event.get("level") in ("ERROR", "CRITICAL") or "exception" in event:
                yield f"an error: {line[:600]}"


def run(service, seconds):
    """Attack a service in all ways; print and return the problems."""
    cookie = service.shell(
        "from django.conf import settings; from django.test import Client; c = Client();"
        'c.force_login(User.objects.create_superuser("admin", "a@example.com", "x"));'
        "print(settings.SESSION_COOKIE_NAME + '=' + c.session.session_key)"
    ).split()[-1]
    service.shell(
        "user = User.objects.get(); Submission.objects.bulk_create("
        'Submission(author=user, body="some words " * 100) for _ in range(5000))'
    )
    web = service.start("web")
    wait_for(lambda: is_ready(service), 40, web.text)
    attack(service, "health", cookie, 1)
    memory, problems = get_memory(web.popen.pid), []
    for name in ATTACKS:
        probe = Probe(service)
        probe.start()
        statuses = attack(service, name, cookie, seconds)
        probe.running = False
        probe.join()
        print(
            f"  {name}: {dict(statuses)}; {probe.count} probes, slowest {probe.slowest:.2f} s",
            flush=True,
        )
        problems += [f"{name}: {problem}" for problem in probe.problems[:3]]
        if probe.slowest > PROBE_LIMIT:
            problems.append(f"{name}: a probe took {probe.slowest:.1f} s")
        if statuses[500]:
            problems.append(f"{name}: {statuses[500]} times status 500")
    growth = get_memory(web.popen.pid) - memory
    print(f"  memory: {memory:.0f} MiB, and {growth:.0f} MiB more after all attacks")
    if growth > GROWTH:
        problems.append(f"the memory grew by {growth:.0f} MiB")
    problems += list(dict.fromkeys(find_log_problems(web.text())))[:10]
    if web.stop(seconds=40) != 0:
        problems.append("web did not stop")
    return problems


def is_ready(service):
    """Return whether the web process responds."""
    try:
        return service.get("/health/ready")[0] == 200
    except OSError:
        return False


@contextlib.contextmanager
def make_service(**answers):
    """Yield a deployed service."""
    database = f"attacks_{uuid.uuid4().hex[:12]}"
    with generated_project(project_slug=SLUG, **answers) as folder:
        environments = folder.parent / "environments"
        environments.mkdir()
        variables = production_variables(f"{POSTGRES_SERVER}/{database}", RABBITMQ_URL)
        uv = os.environ.get("UV", "uv")
        account = "admin:a-password-for-this-trial"
        service = Service(
            folder, uv, environments, REDIS_URL=REDIS_URL, FLOWER_BASIC_AUTH=account, **variables
        )
        with psycopg.connect(f"{POSTGRES_SERVER}/postgres", autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {database}")
            try:
                service.deploy()
                yield service
            finally:
                service.close()
                connection.execute(f"DROP DATABASE {database} WITH (FORCE)")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--short", action="store_true", help="the default service, for a minute")
    parser.add_argument("--servers", default="gunicorn,granian,uvicorn")
    parser.add_argument("--seconds", type=float, default=2, help="how long each attack lasts")
    options = parser.parse_args()
    servers = ["gunicorn"] if options.short else options.servers.split(",")
    failed = False
    for server in servers:
        realtime = "none" if server == "gunicorn" else "channels"
        choices = [{}] if options.short else [{}, OPTIONS | {"realtime": realtime}]
        for answers in choices:
            print(f"{server} {answers}", flush=True)
            with make_service(web_server=server, **answers) as service:
                problems = run(service, 0.5 if options.short else options.seconds)
            print(*(f"  PROBLEM {problem}" for problem in problems), sep="\n")
            failed = failed or bool(problems)
    sys.exit(failed)


if __name__ == "__main__":
    main()
