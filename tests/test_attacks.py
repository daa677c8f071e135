"""Attacks of anonymous clients on the web process: it goes on to respond, and logs one line each."""

import concurrent.futures
import http.client
import json
import time
import urllib.parse

import pytest

from tests.conftest import production_variables
from tests.generate import replace
from tests.servers import PATIENCE, wait_for

pytestmark = pytest.mark.slow

#: Unicode normalization takes time that grows with the square of its length.
NAME = "a" + "\u0301" * 60_000 + "\u0327" * 60_000

JSON = {"Content-Type": "application/json"}
FORM = {"Content-Type": "application/x-www-form-urlencoded"}

#: Each attack: method, path, headers, body, and the statuses that are right.
ATTACKS = {
    "name": (
        "POST",
        "/api/token/",
        JSON,
        json.dumps({"username": NAME, "password": "x"}, ensure_ascii=False).encode(),
        {400},
    ),
    "password": (
        "POST",
        "/api/token/",
        JSON,
        json.dumps({"username": "x", "password": NAME}, ensure_ascii=False).encode(),
        {400},
    ),
    "form": (
        "POST",
        "/admin/login/",
        FORM,
        urllib.parse.urlencode({"username": NAME, "password": NAME}).encode(),
        {403, 413, 400},
    ),
    "nested": ("POST", "/api/token/", JSON, b"[" * 100_000 + b"]" * 100_000, {400}),
    "large": ("POST", "/api/token/", JSON, b'{"a": "' + b"x" * 2**21 + b'"}', {413}),
    "cursor": (
        "GET",
        "/api/submissions/?cursor=cD0yMDIwLTAxLTAxVDAwJTNBMDAlM0EwMCUyQjE2JTNBMDA%3D",
        {},
        None,
        {404},
    ),
    "version": ("GET", "/api/schema/?version=%0d%0a", {}, None, {200}),
    "host": ("GET", "/", {"Host": "evil.example"}, None, {400}),
    "token": ("GET", "/api/submissions/", {"Authorization": "Token " + "9" * 4000}, None, {401}),
    "link": ("GET", f"/unsubscribe/{'x' * 3000}/", {}, None, {404}),
}


@pytest.fixture(params=["PBKDF2"])
def service(request, bake, make_service, postgres_url, rabbitmq_url):
    """A service in production mode that hashes passwords in this way."""
    project = bake(project_slug="attacked")
    if request.param != "PBKDF2":
        hasher = f"django.contrib.auth.hashers.{request.param}PasswordHasher"
        old = "    USE_TZ = True\n"
        settings = project / "attacked" / "settings.py"
        replace(settings, old, f'{old}    PASSWORD_HASHERS = ["{hasher}"]\n')
    service = make_service(project, **production_variables(postgres_url, rabbitmq_url))
    service.deploy()
    return service


def request(service, method, path, headers, body=None):
    """Return the status and the seconds it took."""
    start = time.monotonic()
    connection = http.client.HTTPConnection("127.0.0.1", service.port, timeout=60)
    headers = {"Host": "attacked.example.com", "X-Forwarded-Proto": "https"} | headers
    connection.request(method, path, body, headers)
    status = connection.getresponse().status
    connection.close()
    return status, time.monotonic() - start


def test_no_attack_stops_the_service_or_fills_the_log(service):
    web = service.start("web")
    web.wait_for_text("Listening at")
    wait_for(lambda: service.get("/health/ready")[0] == 200, 20, web.text)
    for row, (name, attack) in enumerate(ATTACKS.items()):
        method, path, headers, body, expected = attack
        before = len(web.text().splitlines())
        with concurrent.futures.ThreadPoolExecutor(6) as pool:
            attacks = [
                pool.submit(
                    request,
                    service,
                    method,
                    path,
                    headers | {"X-Forwarded-For": f"203.0.{row}.{client}"},
                    body,
                )
                for client in range(6)
            ]
            slowest_live = 0
            while not all(attack.done() for attack in attacks):
                status, seconds = request(service, "GET", "/health/live", {})
                assert status == 200
                slowest_live = max(slowest_live, seconds)
        results = [attack.result() for attack in attacks]
        slowest = max(seconds for _, seconds in results)
        print(f"{name}: {slowest:.2f} s, health {slowest_live:.2f} s, {results[0][0]}")
        assert {status for status, _ in results} <= expected, name
        assert (slowest < 5 * PATIENCE, slowest_live < PATIENCE) == (True, True), name
        # One line for the request, and one for its reason.
        time.sleep(0.2)
        assert len(web.text().splitlines()) - before <= 12, name
    assert '"exception"' not in web.text()
    assert '"ERROR"' not in web.text()
    assert web.stop() == 0


# What is counted does not depend on how long a hash takes.
@pytest.mark.parametrize("service", ["MD5"], indirect=True)
def test_an_attack_on_a_name_locks_nobody_out(service):
    service.shell('User.objects.create_superuser("admin", "a@example.com", "secret")')
    web = service.start("web")
    web.wait_for_text("Listening at")

    def log_in(password, address):
        body = json.dumps({"username": "admin", "password": password}).encode()
        return request(service, "POST", "/api/token/", JSON | {"X-Forwarded-For": address}, body)[0]

    assert log_in("secret", "203.0.113.1") == 200
    for number in range(60):
        assert log_in("wrong", f"198.51.100.{number}") == 400
    # From where the owner logged in before, from a new address, and from an attacker's.
    assert log_in("wrong", "203.0.113.1") == 400
    assert log_in("secret", "203.0.113.1") == 200
    assert log_in("secret", "203.0.113.2") == 200
    assert log_in("secret", "198.51.100.7") == 400
    # A network of IPv6 is one address.
    statuses = [log_in("wrong", f"2001:db8::{number}") for number in range(12)]
    assert statuses[-1] == 429
    assert log_in("secret", "2001:db8:1::1") == 200
    service.run("python manage.py unlock admin 198.51.100.7")
    assert log_in("secret", "198.51.100.7") == 200
    assert web.stop() == 0


def test_posts_are_counted_by_all_processes_whatever_others_do(service):
    web = service.start("web")
    web.wait_for_text("Listening at")
    token = service.shell(
        "from prodserver_ops.api.tokens import create_token;"
        'print(create_token(User.objects.create_user("user"))[0])'
    ).split()[-1]
    headers = JSON | {"Authorization": f"Token {token}"}

    def post():
        return request(service, "POST", "/api/submissions/", headers, b'{"body": "x"}')[0]

    assert [post() for _ in range(30)] == [201] * 30
    for number in range(400):
        address = {"X-Forwarded-For": f"198.51.{number // 250}.{number % 250}"}
        request(service, "GET", "/api/submissions/", address)
    assert [post() for _ in range(4)] == [429] * 4
    assert web.stop() == 0
