"""The proxy of compose.yaml: slow clients hold up no thread of web, large bodies are refused."""

import contextlib
import http.client
import shutil
import socket
import subprocess
import tempfile
import time
from pathlib import Path

import pytest

from tests.conftest import production_variables
from tests.servers import PATIENCE, find_program, free_port, reachable, wait_for

pytestmark = pytest.mark.slow

#: Connections of slow clients; web has two processes with four threads each.
SLOW = 24

#: The start of a request whose body takes forever.
SLOW_REQUEST = (
    b"POST /admin/login/ HTTP/1.1\r\nHost: proxied.example.com\r\nX-Forwarded-Proto: https\r\n"
    b"Content-Type: application/x-www-form-urlencoded\r\nContent-Length: 1000\r\n\r\nuser"
)


@pytest.fixture
def service(bake, make_service, postgres_url, rabbitmq_url):
    service = make_service(
        bake(project_slug="proxied", compose=True),
        **production_variables(postgres_url, rabbitmq_url),
    )
    service.deploy()
    web = service.start("web")
    web.wait_for_text("Listening at")
    wait_for(lambda: service.get("/health/ready")[0] == 200, 20, web.text)
    return service


@pytest.fixture
def proxy(service):
    """The port of nginx with the configuration of the service."""
    program = find_program("nginx", "/usr/sbin/nginx")
    if program is None:
        pytest.skip("nginx is not installed")
    port = free_port()
    folder = Path(tempfile.mkdtemp())
    text = (service.folder / "nginx.conf").read_text()
    for old, new in (
        ("web:8000", f"127.0.0.1:{service.port}"),
        ("listen 8080", f"listen 127.0.0.1:{port}"),
        ("/tmp/", f"{folder}/"),
    ):
        assert old in text
        text = text.replace(old, new)
    (folder / "nginx.conf").write_text(text)
    folder.chmod(0o777)
    command = [program, "-c", folder / "nginx.conf", "-g", "daemon off;"]
    popen = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    wait_for(lambda: reachable(port), 10, lambda: "nginx did not start")
    yield port
    popen.terminate()
    popen.wait()
    shutil.rmtree(folder)


def get(port, path, body=None, timeout=30):
    """Return the status and the seconds it took."""
    start = time.monotonic()
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout)
    headers = {"Host": "proxied.example.com", "X-Forwarded-Proto": "https"}
    with contextlib.closing(connection):
        connection.request("POST" if body else "GET", path, body, headers)
        return connection.getresponse().status, time.monotonic() - start


def test_slow_clients_do_not_stop_the_service(service, proxy):
    assert get(proxy, "/")[0] == 200
    with contextlib.ExitStack() as stack:
        for _ in range(SLOW):
            client = stack.enter_context(socket.create_connection(("127.0.0.1", proxy)))
            client.sendall(SLOW_REQUEST)
        time.sleep(1)
        status, seconds = get(proxy, "/")
        print(f"with {SLOW} slow clients: {status} after {seconds:.2f} s")
        assert (status, seconds < PATIENCE) == (200, True)


def test_health_checks_respond_to_slow_clients_without_a_proxy(service):
    with contextlib.ExitStack() as stack:
        for _ in range(SLOW):
            client = stack.enter_context(socket.create_connection(("127.0.0.1", service.port)))
            client.sendall(SLOW_REQUEST)
        time.sleep(1)
        status, seconds = get(service.port, "/health/live")
        assert (status, seconds < PATIENCE) == (200, True)


def test_the_body_of_a_request_is_limited(proxy):
    assert get(proxy, "/api/token/", b"x" * 100)[0] in (400, 415)
    assert get(proxy, "/api/token/", b"x" * 7 * 2**20)[0] == 413
