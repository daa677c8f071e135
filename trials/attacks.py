"""Attack the web process of services, while probes check that the site and its health respond.

    uv run trials/attacks.py [--short] [--servers gunicorn,granian,uvicorn] [--seconds 0.5] [--seed 1]

Generates, for each web server, the default service and one with all options, and starts it in
production mode on PostgreSQL (127.0.0.1:5432, user postgres, trust) and RabbitMQ. Clients send each of
``ATTACKS`` for some time, as fast as the responses come. Each role requests every address, and addresses
with ``VALUES``; ``attack_unsubscribe`` forges links, and ``attack_websockets`` attacks open connections, of
which one is idle behind the proxy of Compose from the beginning to the end. ``attack_randomly`` sends
requests of random methods, paths, headers and bodies, many of which are no HTTP. In the meantime a probe
requests the site and ``/health/ready`` without pause. Exits with status 1 unless

- each probe gets status 200 within ``PROBE_LIMIT``,
- no request gets status 500, and none is logged with a traceback,
- nobody reads what their role must not see, and markup that is stored is escaped,
- no line of the log is longer than 16 KB, and none contains the secrets of the requests,
- the memory of the web process does not grow by more than ``GROWTH``.

All servers take about ten minutes. ``--short`` attacks the default service on gunicorn for a minute.
``tests/test_answers.py`` has the hostile answers of the template.
"""

import argparse
import base64
import collections
import concurrent.futures
import contextlib
import http.client
import itertools
import json
import os
import random
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.parse
import uuid
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import psycopg
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from tests.conftest import POSTGRES_SERVER, RABBITMQ_URL, Service, production_variables
from tests.generate import generated_project
from tests.servers import PATIENCE, find_program, free_port, reachable, wait_for
from tests.test_attacks import ATTACKS as KNOWN

SLUG = "attacked"
HOST = f"{SLUG}.example.com"
REDIS_URL = os.environ.get("TEST_REDIS_URL", "redis://127.0.0.1:6379/9")

#: The answers of the service with all options. Channels needs an ASGI server.
OPTIONS = {
    "compose": True,
    "queues": "high",
    "lifecycle": "archive",
    "monitoring": "flower",
    "task_results": "database",
}

#: Text that only moderators may read, and markup that must be escaped on every page.
PRIVATE, MARKUP = "private-to-moderators", "<script>stored()</script>"

#: Creates a user for each role, prints their cookies, and stores what the attacks look for.
PREPARE = f"""
from django.contrib.auth.models import Group, Permission
from django.test import Client
from django.conf import settings
from django.utils import timezone
from prodserver_ops.api.tokens import create_token
from prodserver_ops.mail.unsubscribe import link
from prodserver_ops.mail.digests import registry

def create(name, **fields):
    user = User.objects.create_user(name, name + "@example.com", "x", **fields)
    client = Client()
    client.force_login(user)
    key = client.session.session_key
    print("COOKIE", name, settings.SESSION_COOKIE_NAME + "=" + key)
    return user

admin = create("superuser", is_staff=True, is_superuser=True, first_name={MARKUP!r})
create("moderator", is_staff=True).groups.add(Group.objects.get(name="moderators"))
create("viewer", is_staff=True).user_permissions.add(
    Permission.objects.get(codename="view_submission"))
create("staff", is_staff=True)
user = create("user")
create("inactive").delete()
print("COOKIE", "forged", settings.SESSION_COOKIE_NAME + "=" + "a" * 32)
print("TOKEN", create_token(user)[0])
message = next(each for each in registry.values() if each.unsubscribe_label)
print("LINK", link(user, message).split("/")[-2])
Submission.objects.bulk_create(
    Submission(author=admin, body="{PRIVATE} {MARKUP} " + "some words " * 100) for _ in range(5000))
from django_celery_beat.models import PeriodicTask
PeriodicTask.objects.update(description={MARKUP!r})
"""

#: Prints every address of the service, with values for its parameters.
PRINT_ADDRESSES = """
import re
from django.urls import get_resolver
def walk(patterns, prefix=""):
    for each in patterns:
        path = prefix + str(each.pattern)
        if hasattr(each, "url_patterns"):
            walk(each.url_patterns, path)
        else:
            path = re.sub(r"<[^>]*>", "1", path)
            path = re.sub(r"\\(\\?P<[^>]*>[^)]*\\)|\\([^)]*\\)", "1", path)
            print("ADDRESS", "/" + re.sub(r"[\\^$?]|\\\\Z", "", path))
walk(get_resolver().url_patterns)
"""

#: Addresses with a value, and values that are not expected there.
PATHS = """
    /admin/SLUG/submission/%s/change/ /admin/SLUG/submission/%s/delete/ /admin/r/%s/1/ /admin/r/8/%s/
    /admin/SLUG/submission/?id__exact=%s /admin/SLUG/submission/?author__id__exact=%s
    /admin/SLUG/submission/?p=%s /admin/SLUG/submission/?o=%s /admin/SLUG/submission/?status=%s
    /admin/SLUG/submission/?created_at__year=%s /admin/SLUG/submission/?created_at__gte=%s
    /admin/SLUG/submission/?_changelist_filters=%s /admin/SLUG/submission/add/?author=%s
    /admin/SLUG/user/?groups__id__exact=%s /admin/login/?next=%s /admin/autocomplete/?term=%s
    /admin/ops/operations/?page=%s /admin/django_celery_beat/periodictask/?%s=1
    /api/submissions/%s/ /api/submissions/?cursor=%s /api/submissions/?page_size=%s /api/%s
    /unsubscribe/%s/ /emails/%s/ /static/%s /welcome/%s
""".split()
VALUES = [
    *(
        "9" * 30,
        "-1",
        "NaN",
        "1e999",
        "%00",
        "%ff",
        "%0a",
        "%ED%A0%80",
        "%F0%9F%98%80",
        "'",
        "{{7*7}}",
    ),
    *("..%2f..%2f", "%5B%5D", "%25s", "a" * 1500, "0000-00-00", "99999-01-01", "_", "_3A", "True"),
]

#: Which roles may read what is private: on the pages of the admin, or in their own data.
TRUSTED = {"superuser", "moderator", "viewer"}

CLIENTS, PROBE_LIMIT = 8, 5 * PATIENCE

#: How much the memory of the process and its children may grow, in MiB.
GROWTH = 100

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
    "chunked form": ("POST", "/admin/login/", {"Content-Type": FORM}, [b"x" * 2**16] * 64),
    "chunked JSON": (
        "POST",
        "/api/token/",
        {"Content-Type": "application/json"},
        [b"x" * 2**16] * 64,
    ),
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
    "control characters": (
        "GET",
        "/nothing/",
        {"X-Request-ID": "\x1b[31m\x7f", "User-Agent": "\x1b]0;title\x07" * 1000},
        None,
    ),
    "request id": ("GET", "/nothing/", {"X-Request-ID": "a" * 7000}, None),
    "forwarded": ("GET", "/", {"X-Forwarded-For": "1," * 3000}, None),
    "slow": ("POST", "/api/token/", {"Content-Length": "100000"}, None),
    "staff: many words": ("GET", "/admin/SLUG/submission/?q=" + "+".join("ab" * 75), {}, None),
    "staff: lookup": ("GET", "/admin/SLUG/submission/?body__icontains=a", {}, None),
    "staff: search": ("GET", "/admin/SLUG/submission/?status=all&q=a+b+c+d+e", {}, None),
    "staff: bad page": ("GET", "/admin/SLUG/submission/?p=99999999999999999999", {}, None),
}


#: What random requests are made of.
METHODS = "GET GET GET POST POST POST PUT PATCH DELETE HEAD OPTIONS TRACE CONNECT PROPFIND get G\x00T".split()
KEYS = (
    "q p o e cursor page page_size format status next action username password body author email "
    "csrfmiddlewaretoken _popup _to_field _save _changelist_filters _selected_action select_across index "
    "created_at__year created_at__range id__in id__exact body__icontains author__username name task "
    "crontab interval args kwargs expires start_time enabled form-TOTAL_FORMS form-0-id"
).split()
TEXTS = [
    *(
        "",
        "0",
        "-1",
        "1e999",
        "9" * 400,
        "a" * 70_000,
        "é" * 3000,
        "\U0001f600",
        "\x00",
        "\ud800",
        "\x1b[31m",
    ),
    *(
        "\r\nSet-Cookie: a=b",
        "\u202e",
        "\ufeff",
        "{{7*7}}",
        "%s%n",
        "../../etc/passwd",
        "' OR 1=1--",
        MARKUP,
    ),
    *(
        "True",
        "null",
        "NaN",
        "[]",
        "{}",
        "1,2",
        "2024-02-30",
        "9999-12-31T23:59:60Z",
        "1/0",
        "a@b",
        "//evil.example",
    ),
]
HEADERS = (
    "Accept Accept-Language Accept-Encoding Authorization Content-Type Content-Encoding Content-Length "
    "Transfer-Encoding Cookie Expect Forwarded From Host If-Modified-Since If-None-Match If-Range If-Match "
    "Origin Range Referer Upgrade Connection User-Agent X-CSRFToken X-Forwarded-For X-Forwarded-Host "
    "X-Forwarded-Proto X-HTTP-Method-Override X-Request-ID X-Requested-With Sec-WebSocket-Key TE Via a_b"
).split()
HEADER_VALUES = [
    *(
        "bytes=0-",
        "bytes=-1,5-1",
        "*/*",
        "*/*;q=x",
        "text/html;q=" + "9" * 400,
        "application/json; version=1",
    ),
    *(
        "chunked",
        "gzip, chunked",
        "identity",
        "100-continue",
        "websocket",
        "keep-alive, Upgrade",
        "-5",
        "1e3",
        "0x10",
    ),
    *(
        "en;q=1.0.0",
        "zz-" * 300,
        "Basic !!!",
        "Basic Og==",
        "Bearer a.b.c",
        "Token",
        "Token " + "é" * 10,
    ),
    *(
        "sessionid=" + "a" * 3000,
        "csrftoken=a; csrftoken=b;;;=",
        'a="' + "\\011" * 500,
        "messages=[]",
    ),
    *(
        "Mon, 31 Feb 9999 25:61:61 GMT",
        'W/"' + "a" * 500,
        "for=[::1]:99999",
        "::1%eth0",
        "1.2.3.4:http",
        "evil.example",
    ),
    *(
        "[::1",
        "a:b:c",
        "http://",
        "null",
        "https://evil.example",
        "multipart/form-data; boundary=\xff",
        "text/a; =",
        FORM,
    ),
]


def make_random_request(chance, addresses, roles):
    """Return the bytes of a random request."""

    def text():
        return (
            chance.choice(TEXTS) if chance.random() < 0.8 else chance.randbytes(9).decode("latin-1")
        )

    def data(depth=0):
        kind = chance.randrange(8 if depth < 4 else 4)
        if kind < 4:
            return [text(), chance.randint(-(2**70), 2**70), None, 1.5e308][kind]
        if kind < 6:
            return [data(depth + 1) for _ in range(chance.randrange(4))]
        return {chance.choice(KEYS): data(depth + 1) for _ in range(chance.randrange(5))}

    def form():
        pairs = [(chance.choice(KEYS), text()) for _ in range(chance.randrange(8))]
        return urllib.parse.urlencode(pairs, errors="surrogatepass").encode()

    method, path = chance.choice(METHODS), chance.choice(addresses)
    if chance.random() < 0.3:
        parts = path.split("/")
        parts[chance.randrange(len(parts))] = urllib.parse.quote(text(), errors="surrogatepass")
        path = "/".join(parts)
    if chance.random() < 0.4:
        path += "?" + form().decode()
    if chance.random() < 0.05:
        path = chance.choice(
            [
                "*",
                "http://evil.example" + path,
                "//" + path,
                path + " x",
                "/%",
                "/%zz/%c0%ae",
                "",
                "/\xff",
            ]
        )
    headers = {"Host": HOST, "X-Forwarded-Proto": "https", "Connection": "close"}
    headers["X-Forwarded-For"] = f"198.18.{chance.randrange(256)}.{chance.randrange(256)}"
    headers |= roles[chance.choice(sorted(roles))]
    if "Cookie" in headers:
        # With a token, requests reach the forms.
        headers["Cookie"] += "; csrftoken=" + "a" * 32
        headers |= {"X-CSRFToken": "a" * 32, "Referer": f"https://{HOST}/"}
    body = b""
    if method not in ("GET", "HEAD"):
        part = b'--x\r\nContent-Disposition: form-data; name="%s"%s\r\n\r\n%s\r\n'
        name = b'; filename="%s"\r\nContent-Type: a/b'
        kind, body = chance.choice(
            [
                ("application/json", json.dumps(data()).encode()),
                ("application/json", json.dumps({chance.choice(KEYS): data()}).encode()),
                ("application/json", chance.randbytes(50)),
                (FORM, form()),
                (FORM, chance.randbytes(50)),
                (MULTIPART, b"".join(
                    part % (
                        chance.choice(KEYS).encode(),
                        name % text().encode("utf-8", "replace") if chance.random() < 0.5 else b"",
                        text().encode("utf-8", "replace"),
                    )
                    for _ in range(chance.randrange(5))
                ) + b"--x--\r\n"),
                (MULTIPART, chance.randbytes(50)),
                ("a/b", b"x"),
            ]
        )  # fmt: skip
        headers |= {"Content-Type": kind, "Content-Length": str(len(body))}
    for name in chance.sample(HEADERS, chance.choice([0, 0, 1, 1, 2, 5])):
        headers[name] = chance.choice(HEADER_VALUES) if chance.random() < 0.7 else text()
    lines = [f"{method} {path} HTTP/1.{chance.choice('1111110')}"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    head = "\r\n".join(lines) + "\r\n\r\n"
    if chance.random() < 0.02:
        head = head[: chance.randrange(len(head))]
    return head.encode("utf-8", "surrogatepass") + body


def send_bytes(service, request):
    """Send bytes; return the status of the response, or None if the request is not complete."""
    answer = b""
    with (
        socket.create_connection(("127.0.0.1", service.port), timeout=5 * PATIENCE) as client,
        contextlib.suppress(OSError),
    ):
        client.sendall(request)
        while len(answer) < 12 and (part := client.recv(4096)):
            answer += part
    match = re.match(rb"HTTP/1.\d (\d+)", answer)
    return int(match[1]) if match else None


def attack_randomly(service, roles, seed, count):
    """Yield the random requests that get status 500 or more."""
    output = service.shell(PRINT_ADDRESSES)
    addresses = sorted(set(re.findall(r"^ADDRESS (.*)$", output, re.M)) | {"/nothing/"})
    # These would end what the others need.
    addresses = [path for path in addresses if "logout" not in path and "/user/" not in path]
    statuses, failed = collections.Counter(), []

    def run(client):
        for number in range(client, count, CLIENTS):
            request = make_random_request(random.Random(f"{seed}-{number}"), addresses, roles)
            status = send_bytes(service, request)
            statuses[status] += 1
            # Gunicorn responds with 501 to a transfer encoding that it does not know.
            if status is not None and status >= 500 and status != 501:
                failed.append(f"random request {seed}-{number} got {status}: {request[:500]}")

    with concurrent.futures.ThreadPoolExecutor(CLIENTS) as pool:
        list(pool.map(run, range(CLIENTS)))
    print(f"  {count} random requests: {dict(statuses)}")
    yield from failed


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


def fetch(service, path, headers, method="GET"):
    """Return the status and text of the response to one request."""
    base = {"Host": HOST, "X-Forwarded-Proto": "https", "X-Forwarded-For": "192.0.2.2"}
    with contextlib.closing(
        http.client.HTTPConnection("127.0.0.1", service.port, timeout=20 * PATIENCE)
    ) as connection:
        connection.request(method, path, headers=base | headers)
        response = connection.getresponse()
        return response.status, response.read().decode(errors="replace")


def attack_addresses(service, roles):
    """Yield what is wrong with the response to each address, for each role."""
    output = service.shell(PRINT_ADDRESSES)
    addresses = sorted(set(re.findall(r"^ADDRESS (.*)$", output, re.M)) | {"/nothing/"})
    statuses, readers, escaped = collections.Counter(), set(), False
    for (name, headers), path in itertools.product(roles.items(), addresses):
        for method in ("GET",) if "logout" in path or name in TRUSTED else ("GET", "POST"):
            status, text = fetch(service, path, headers, method)
            statuses[status] += 1
            if status >= 500:
                yield f"{name}: {method} {path} got {status}"
            if PRIVATE in text:
                readers.add(name)
                if name not in TRUSTED:
                    yield f"{name}: {method} {path} shows what is private"
            escaped = escaped or MARKUP.replace("<", "&lt;").replace(">", "&gt;") in text
            if MARKUP in text:
                # JSON is no page.
                with contextlib.suppress(ValueError):
                    json.loads(text)
                    continue
                yield f"{name}: {method} {path} has markup that is not escaped"
    # Otherwise these requests prove nothing.
    if not escaped or readers != TRUSTED & roles.keys():
        yield f"addresses: only {readers} read what is private"
    print(f"  {len(addresses)} addresses, {len(roles)} roles: {dict(statuses)}")


def attack_values(service, roles, values):
    """Yield each address that fails with one of the values."""
    for path, value in itertools.product(PATHS, values):
        role = "token" if path.startswith("/api") else "superuser"
        status, _ = fetch(service, path.replace("SLUG", SLUG).replace("%s", value), roles[role])
        if status >= 500:
            yield f"{path} got {status} with {value[:40]}"
    print(f"  {len(PATHS)} addresses with {len(values)} values each: done")


def attack_unsubscribe(service, token):
    """Yield what is wrong with the responses to forged links."""
    forged = [
        token[:-1],
        token + "a",
        token.upper(),
        token.replace(":", "", 1),
        token[::-1],
        "a:b:c",
    ]
    forged += [token.replace(part, other) for part in token.split(":") for other in ("", "MQ", "1")]
    forged += ["%00", "%ff", "..%2f", "x" * 5000, token.split(":")[0] + ":" + "A" * 43]
    for link in dict.fromkeys(each for each in forged if each != token):
        for method in ("GET", "POST"):
            status, _ = fetch(service, f"/unsubscribe/{link}/", {}, method)
            if status not in (400, 403, 404, 414):
                yield f"unsubscribe: {method} {link[:80]} got {status}"
    fields = "User.objects.values_list('digest_frequency', 'notify_on_response')"
    if service.shell(f"print({fields}.get(username='user'))").split() != ["('weekly',", "True)"]:
        yield "unsubscribe: a forged link worked"
    print("  forged links: done")


@contextlib.contextmanager
def run_proxy(service):
    """Yield the port of nginx with the configuration of the service, or None without nginx."""
    program = find_program("nginx", "/usr/sbin/nginx")
    if program is None:
        print("  nginx is not installed: no connection is idle behind it")
        yield None
        return
    port, folder = free_port(), Path(tempfile.mkdtemp())
    text = (service.folder / "nginx.conf").read_text()
    text = text.replace("web:8000", f"127.0.0.1:{service.port}").replace("/tmp/", f"{folder}/")
    text = text.replace("listen 8080", f"listen 127.0.0.1:{port}")
    (folder / "nginx.conf").write_text(text)
    folder.chmod(0o777)
    command = [program, "-c", folder / "nginx.conf", "-g", "daemon off;"]
    popen = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        wait_for(lambda: reachable(port), 10, lambda: "nginx did not start")
        yield port
    finally:
        popen.terminate()
        popen.wait()
        shutil.rmtree(folder)


def open_socket(port, headers, **options):
    """Return a WebSocket of a moderator's list."""
    headers = {"X-Forwarded-Proto": "https", "X-Forwarded-For": "192.0.2.3"} | headers
    return connect(
        f"ws://{HOST}/ws/moderation/",
        sock=socket.create_connection(("127.0.0.1", port)),
        origin=f"https://{HOST}",
        additional_headers=headers,
        open_timeout=20 * PATIENCE,
        compression=None,
        **options,
    )


#: What is sent to an open WebSocket.
FRAMES = {
    "no JSON": "{",
    "nested": "[" * 100_000,
    "binary": b"\xff\xfe",
    "number": "1e999999",
    "huge": "a" * 2**22,
    "NUL": "\x00",
}

#: How a user loses the right to a connection.
LOSSES = {
    "deactivated": "u.is_active = False; u.save()",
    "logged out": "from django.contrib.sessions.models import Session; Session.objects.all().delete()",
    "lost right": "u.groups.clear()",
}


def attack_websockets(service, roles):
    """Yield what is wrong with open WebSockets and those that must be refused."""
    for name, headers in roles.items():
        try:
            with open_socket(service.port, headers):
                pass
        except InvalidStatus:
            if name in ("superuser", "moderator"):
                yield f"WebSocket: refused to {name}"
        else:
            if name not in ("superuser", "moderator"):
                yield f"WebSocket: open to {name}"
    for name, frame in FRAMES.items():
        with open_socket(service.port, roles["moderator"]) as client:
            try:
                client.send(frame)
                # What is valid JSON is ignored, or a server closes the connection.
                client.recv(timeout=2 * PATIENCE)
            except (ConnectionClosed, TimeoutError, OSError):
                pass
            else:
                yield f"WebSocket: {name} got a message"
    with contextlib.ExitStack() as stack:
        clients = [
            stack.enter_context(open_socket(service.port, roles["superuser"])) for _ in range(150)
        ]
        service.shell("Submission.objects.create(author=User.objects.first(), body='x')")
        for client in clients:
            try:
                client.recv(timeout=20 * PATIENCE)
            except (ConnectionClosed, TimeoutError) as error:
                yield f"WebSocket: one of many got no message: {error!r}"
                break
    for name, loss in LOSSES.items():
        output = service.shell(
            "from django.contrib.auth.models import Group; from django.test import Client;"
            "from django.conf import settings;"
            f"u = User.objects.create_user({name!r}, is_staff=True);"
            "u.groups.add(Group.objects.get(name='moderators')); c = Client(); c.force_login(u);"
            "print('COOKIE', settings.SESSION_COOKIE_NAME + '=' + c.session.session_key)"
        )
        cookie = {"Cookie": re.search(r"COOKIE (\S+)", output)[1]}
        with open_socket(service.port, cookie) as client:
            service.shell(
                f"u = User.objects.get(username={name!r}); {loss};"
                "Submission.objects.create(author=u, body='x')"
            )
            try:
                message = client.recv(timeout=20 * PATIENCE)
                yield f"WebSocket: a user who {name} got {message}"
            except ConnectionClosed:
                pass
            except TimeoutError:
                yield f"WebSocket: a user who {name} keeps an open connection"
    print("  WebSockets: done")


def get_memory(pid):
    """Return the memory of a process and its children in MiB."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20 + sum(map(get_memory, children))


def find_log_problems(text):
    """Yield what is wrong with the log."""
    changes = collections.Counter()
    for line in text.splitlines():
        if len(line.encode()) > 16 * 1024:
            yield f"a line of {len(line)} characters: {line[:200]}"
        if SECRET in line or base64.b64encode(SECRET.encode()).decode() in line:
            yield f"a secret: {line[:400]}"
        with contextlib.suppress(ValueError):
            event = json.loads(line)
            if event.get("logger") == "prodserver_ops.web.health":
                changes[event["message"]] += 1
                continue  # No worker is running.
            if event.get("level") in ("ERROR", "CRITICAL") or "exception" in event:
                yield f"an error: {line[:600]}"
    # Each process logs a problem once, not for each request.
    yield from (f"{count} times: {text}" for text, count in changes.items() if count > 8)


@contextlib.contextmanager
def send_slowly(service):
    """Keep connections open whose bodies do not arrive."""
    head = f"POST /api/token/ HTTP/1.1\r\nHost: {HOST}\r\nContent-Length: 9\r\n\r\na"
    with contextlib.ExitStack() as stack:
        for _ in range(4 * CLIENTS):
            client = socket.create_connection(("127.0.0.1", service.port))
            stack.enter_context(client).sendall(head.encode())
        yield


@contextlib.contextmanager
def probed(service, name, problems):
    """Probe the service meanwhile, and add what is wrong to the problems."""
    probe = Probe(service)
    probe.start()
    try:
        yield
    finally:
        probe.running = False
        probe.join()
    print(f"  {name}: {probe.count} probes, slowest {probe.slowest:.2f} s", flush=True)
    problems += [f"{name}: {problem}" for problem in probe.problems[:3]]
    if probe.slowest > PROBE_LIMIT:
        problems.append(f"{name}: a probe took {probe.slowest:.1f} s")


def run(service, seconds, realtime, is_asgi, is_short=False, seed=1):
    """Attack a service in all ways, in short with few roles and values; return the problems."""
    output = service.shell(PREPARE)
    cookies = dict(re.findall(r"^COOKIE (\S+) (\S+)$", output, re.M))
    roles = {name: {"Cookie": cookie} for name, cookie in cookies.items()} | {
        "anonymous": {},
        "token": {"Authorization": f"Token {re.search('^TOKEN (.*)$', output, re.M)[1]}"},
        "bad token": {"Authorization": "Token aaaa"},
    }
    few = {"anonymous", "user", "staff", "superuser"} if is_short else roles.keys()
    web = service.start("web")
    wait_for(lambda: is_ready(service), 40, web.text)
    attack(service, "health", cookies["superuser"], 1)
    problems = []
    with probed(service, "addresses", problems):
        problems += list(attack_addresses(service, {name: roles[name] for name in few}))[:10]
    with probed(service, "values", problems):
        problems += list(attack_values(service, roles, VALUES[:: 5 if is_short else 1]))[:10]
    with probed(service, "links", problems):
        token = re.search("^LINK (.*)$", output, re.M)[1]
        problems += attack_unsubscribe(service, token)
    count = 100 if is_short else 3000
    with probed(service, "random requests", problems):
        problems += list(attack_randomly(service, roles, f"{seed}a", count))[:10]
    # A thread of gunicorn waits for a body, unless the proxy waits for it first.
    with probed(service, "slow bodies", problems), contextlib.ExitStack() as stack:
        if is_asgi:
            stack.enter_context(send_slowly(service))
            time.sleep(2)
    # Each process has loaded what it needs.
    for name in () if is_short else ATTACKS:
        attack(service, name, cookies["superuser"], 0.1)
    memory = get_memory(web.popen.pid)
    with contextlib.ExitStack() as stack:
        idle = proxy = None
        if realtime and (proxy := stack.enter_context(run_proxy(service))):
            idle = stack.enter_context(open_socket(proxy, roles["superuser"], ping_interval=None))
            opened = time.monotonic()
        for name in ATTACKS:
            with probed(service, name, problems):
                statuses = attack(service, name, cookies["superuser"], seconds)
            print(f"    {dict(statuses)}")
            if statuses[500]:
                problems.append(f"{name}: {statuses[500]} times status 500")
        if idle is not None:
            try:
                time.sleep(max(0, 65 - (time.monotonic() - opened)))
                service.shell("Submission.objects.create(author=User.objects.first(), body='x')")
                idle.recv(timeout=20 * PATIENCE)
            except (ConnectionClosed, TimeoutError) as error:
                problems.append(f"WebSocket: one that was idle got no message: {error!r}")
            print(f"  idle behind nginx for {time.monotonic() - opened:.0f} s")
        with probed(service, "random requests", problems):
            problems += list(attack_randomly(service, roles, f"{seed}b", count))[:10]
        if realtime:
            with probed(service, "WebSockets", problems):
                problems += attack_websockets(service, roles)
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
    parser.add_argument("--seconds", type=float, default=0.5, help="how long each attack lasts")
    parser.add_argument("--seed", default="1", help="selects the random requests")
    options = parser.parse_args()
    servers = ["gunicorn"] if options.short else options.servers.split(",")
    failed = False
    for server in servers:
        realtime = "none" if server == "gunicorn" else "channels"
        choices = [{}] if options.short else [{}, OPTIONS | {"realtime": realtime}]
        for answers in choices:
            print(f"{server} {answers}", flush=True)
            with make_service(web_server=server, **answers) as service:
                seconds = 0.3 if options.short else options.seconds
                problems = run(
                    service,
                    seconds,
                    answers.get("realtime") == "channels",
                    server != "gunicorn",
                    options.short,
                    options.seed,
                )
            print(*(f"  PROBLEM {problem}" for problem in problems), sep="\n")
            failed = failed or bool(problems)
    sys.exit(failed)


if __name__ == "__main__":
    main()
