"""Web servers: each honours port, processes, proxies and the access log, and stops gracefully."""

import http.client
import json
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from urllib.request import Request, urlopen

import psycopg
import pytest

from tests.conftest import production_variables
from tests.servers import PATIENCE, wait_for

pytestmark = pytest.mark.slow

#: A view that takes some time, with a connection to the database.
SLOW_VIEW = """

def slow(request):
    import time
    from django.db import connection
    from django.http import HttpResponse

    with connection.cursor() as cursor:
        cursor.execute("SELECT 1")
    time.sleep(2)
    return HttpResponse("done")


urlpatterns.append(path("slow/", slow))
"""

#: How long a web process may take to stop, in seconds. Granian kills a worker that was still
#: starting after 25.
STOP_SECONDS = 40

#: The headers of a proxy that terminates HTTPS.
PROXY = {"X-Forwarded-Proto": "https", "X-Forwarded-For": "203.0.113.9", "Host": "localhost"}


#: The servers of a test that the library has a short form of.
FIRST = [
    "gunicorn",
    pytest.param("granian", marks=pytest.mark.long),
    pytest.param("uvicorn", marks=pytest.mark.long),
]


@pytest.fixture(params=["gunicorn", "granian", "uvicorn"])
def service(request, bake, make_service, postgres_url, rabbitmq_url):
    """A service in production mode with two web processes of two threads."""
    project = bake(web_server=request.param, project_slug=f"web_{request.param}")
    with (project / project.name / "urls.py").open("a") as file:
        file.write(SLOW_VIEW)
    service = make_service(
        project,
        ALLOWED_HOSTS="localhost",
        WEB_CONCURRENCY=2,
        WEB_THREADS=2,
        **production_variables(postgres_url, rabbitmq_url),
    )
    service.deploy()
    service.web = service.start("web")
    wait_for(lambda: is_ready(service), 30, service.web.text)
    return service


def is_ready(service):
    try:
        return service.get("/health/ready")[0] == 200
    except OSError:
        return False


def get(service, path):
    """Return status and text of a response to a request that a proxy passes on."""
    request = Request(f"http://127.0.0.1:{service.port}{path}", headers=PROXY)
    with urlopen(request, timeout=20) as response:
        return response.status, response.read().decode()


def get_processes(service):
    """Return the numbers of the processes that serve, besides the one that started them."""
    pid = service.web.popen.pid
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    commands = {int(child): Path(f"/proc/{child}/cmdline").read_text() for child in children}
    return [child for child, command in commands.items() if "resource_tracker" not in command]


def test_processes_proxy_and_log_are_as_set(service):
    wait_for(lambda: len(get_processes(service)) == 2, 20, service.web.text)
    with pytest.raises(OSError):
        service.get("/", Host="localhost")  # No proxy says that this is HTTPS.
    assert get(service, "/")[0] == 200
    events = [json.loads(line) for line in service.web.text().splitlines()]
    (event,) = [e for e in events if e.get("client") == "203.0.113.9"]
    assert (event["process"], event["method"], event["path"]) == ("web", "GET", "/")
    assert event["status"] == 200


def test_sigterm_completes_requests(service):
    with ThreadPoolExecutor() as pool:
        responses = [pool.submit(get, service, "/slow/") for _ in range(4)]
        time.sleep(1)
        assert service.web.stop(signal.SIGTERM, seconds=STOP_SECONDS) == 0
        assert [response.result() for response in responses] == [(200, "done")] * 4
    for line in service.web.text().splitlines():
        assert json.loads(line)["level"] in ("INFO", "WARNING"), line


# granian resets some of them; a service cannot change that.
@pytest.mark.parametrize("service", ["gunicorn", "uvicorn"], indirect=True)
def test_sigterm_completes_requests_of_connections_that_wait(service):
    wait_for(lambda: len(get_processes(service)) == 2, 20, service.web.text)
    processes = get_processes(service)
    for process in processes:
        os.kill(process, signal.SIGSTOP)
    with ThreadPoolExecutor(20) as pool:
        responses = [pool.submit(get, service, "/health/live") for _ in range(20)]
        time.sleep(0.5)
        service.web.popen.send_signal(signal.SIGTERM)
        time.sleep(0.5)
        for process in processes:
            os.kill(process, signal.SIGCONT)
        assert [response.result()[0] for response in responses] == [200] * 20
    assert service.web.popen.wait(timeout=20 * PATIENCE) == 0


@pytest.mark.parametrize("service", FIRST, indirect=True)
def test_sigint_stops(service):
    assert service.web.stop(signal.SIGINT, seconds=STOP_SECONDS) in (0, -signal.SIGINT)


def test_health_checks_respond_while_all_threads_are_busy(service):
    with ThreadPoolExecutor(20) as pool, attacked_health_checks(service):
        responses = [pool.submit(get, service, "/slow/") for _ in range(12)]
        time.sleep(0.5)
        for path in ("/health/live", "/health/ready") * 4:
            assert service.get(path)[0] == 200
        # Requests wait for one of four threads: all take at least three rounds.
        assert not all(response.done() for response in responses)
        assert [response.result()[0] for response in responses] == [200] * 12


@contextmanager
def attacked_health_checks(service):
    """Request health checks at the same time; the bodies of some requests never arrive."""
    running = True

    def send(method, headers):
        statuses = set()
        while running:
            connection = http.client.HTTPConnection("127.0.0.1", service.port, timeout=20)
            connection.request(method, "/health/ready", headers=headers)
            if not headers:
                statuses.add(connection.getresponse().status)
            connection.close()
            time.sleep(0.05)
        return statuses

    kinds = [("GET", {}), ("HEAD", {}), ("OPTIONS", {}), ("GET", {"Content-Length": "9"})]
    with ThreadPoolExecutor(8) as pool:
        attackers = [pool.submit(send, *kind) for kind in kinds * 2]
        try:
            yield
        finally:
            running = False
        assert set().union(*(attacker.result() for attacker in attackers)) == {200}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_gunicorn_stops_while_its_workers_start(bake, make_service, tmp_path, number):
    config = tmp_path / "gunicorn_config.py"
    config.write_text("import time\n\n\ndef post_fork(server, worker):\n    time.sleep(2)\n")
    service = make_service(bake(), DEBUG="true", GUNICORN_CMD_ARGS=f"--config {config}")
    service.deploy()
    web = service.start("web")
    web.wait_for_text("Booting worker")
    assert web.stop(number, seconds=15) == 0
    assert "SIGKILL" not in web.text()


@pytest.mark.parametrize("service", FIRST, indirect=True)
def test_connections_to_the_database_stay_few(service):
    with ThreadPoolExecutor(12) as pool:
        for response in [pool.submit(get, service, "/slow/") for _ in range(12)]:
            assert response.result()[0] == 200
    with psycopg.connect(service.environment["DATABASE_URL"]) as connection:
        query = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()"
        (count,) = connection.execute(query).fetchone()
    # Two processes with two threads and two health checks each, and this connection
    assert count <= 2 * (2 + 2) + 1
