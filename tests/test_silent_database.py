"""A database that does not respond or keeps no sessions: health checks do, every wait ends."""

import concurrent.futures
import json
import os
import shutil
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.conftest import POSTGRES_SERVER, production_variables
from tests.servers import PATIENCE, Wire, find_program, free_port, reachable, wait_for
from tests.test_beat import RUN_ONE_SCHEDULE_EVERY_SECOND

pytestmark = pytest.mark.slow

#: The limit of a statement in these tests, in seconds.
STATEMENT_TIMEOUT = 3


@pytest.fixture
def pgbouncer():
    """Return a function that starts PgBouncer in a pool mode before this machine's PostgreSQL."""
    program = find_program("pgbouncer", "/usr/sbin/pgbouncer")
    if program is None:
        pytest.skip("PgBouncer is not installed")
    started = []

    def start(mode):
        port = free_port()
        folder = Path(tempfile.mkdtemp())
        folder.chmod(0o755)
        (folder / "pgbouncer.ini").write_text(
            f"[databases]\n* = host=127.0.0.1 port={urlsplit(POSTGRES_SERVER).port} user=postgres\n"
            f"[pgbouncer]\nlisten_addr = 127.0.0.1\nlisten_port = {port}\n"
            f"auth_type = any\npool_mode = {mode}\nunix_socket_dir =\n"
        )
        # PgBouncer refuses to run as root.
        user = ["runuser", "-u", "nobody", "--"] if os.geteuid() == 0 else []
        popen = subprocess.Popen([*user, program, "-q", folder / "pgbouncer.ini"])
        started.append((popen, folder))
        wait_for(lambda: reachable(port), 10, lambda: "PgBouncer did not start")
        return port

    yield start
    for popen, folder in started:
        popen.terminate()
        popen.wait()
        shutil.rmtree(folder)


def request(service, path):
    """Return the status, the seconds it took, and the text."""
    url = f"http://127.0.0.1:{service.port}{path}"
    https = urllib.request.Request(url, headers={"X-Forwarded-Proto": "https"})
    start = time.monotonic()
    try:
        with urllib.request.urlopen(https, timeout=60) as response:
            status, text = response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        status, text = error.code, error.read().decode()
    return status, time.monotonic() - start, text


def test_health_checks_respond_while_the_database_is_frozen(
    bake, make_service, dedicated_postgres, rabbitmq_url
):
    variables = production_variables(dedicated_postgres.url, rabbitmq_url)
    service = make_service(
        bake(project_slug="frozen"),
        ALLOWED_HOSTS="127.0.0.1",
        DATABASE_STATEMENT_TIMEOUT=str(STATEMENT_TIMEOUT),
        **variables,
    )
    service.install("--no-dev")
    service.run(service.procfile()["release"])
    web = service.start("web")
    web.wait_for_text("Listening at")
    wait_for(lambda: request(service, "/health/ready")[0] == 200, 20, web.text)

    dedicated_postgres.freeze()
    try:
        with concurrent.futures.ThreadPoolExecutor(12) as pool:
            waiting = [pool.submit(request, service, "/api/submissions/") for _ in range(12)]
            time.sleep(1)
            for _ in range(5):
                status, seconds, _ = request(service, "/health/live")
                assert (status, seconds < PATIENCE) == (200, True)
            status, seconds, text = request(service, "/health/ready")
            print(f"not ready after {seconds:.1f} s")
            assert (status, seconds < 6 * PATIENCE) == (503, True)
            assert json.loads(text)["checks"] == {"database": "unavailable", "broker": "ok"}
            results = [future.result() for future in waiting]
        slowest = max(seconds for _, seconds, _ in results)
        print(f"12 requests ended after {slowest:.1f} s at most")
        assert {status for status, _, _ in results} == {500}
    finally:
        dedicated_postgres.thaw()
    wait_for(lambda: request(service, "/health/ready")[0] == 200, 20, web.text)
    assert request(service, "/api/submissions/")[0] == 200
    assert web.stop() == 0


def test_beat_notices_a_black_hole_and_recovers(bake, make_service, postgres_url, rabbitmq_url):
    port = urlsplit(postgres_url).port
    wire = Wire(port)
    url = postgres_url.replace(f":{port}/", f":{wire.port}/")
    service = make_service(bake(project_slug="hole"), **production_variables(url, rabbitmq_url))
    service.install("--no-dev")
    service.run(service.procfile()["release"])
    service.shell(RUN_ONE_SCHEDULE_EVERY_SECOND)
    beat = service.start("beat")
    beat.wait_for_text("Sending due task deliveries-resume")
    wire.cut()
    cut = time.monotonic()
    beat.wait_for_text("the database is unavailable", seconds=90)
    print(f"beat noticed after {time.monotonic() - cut:.0f} s")
    assert time.monotonic() - cut < 60 * PATIENCE
    wire.mend()
    before = beat.text().count("Sending due task")
    wait_for(lambda: beat.text().count("Sending due task") > before, 60, beat.text)
    print(f"beat dispatched again after {time.monotonic() - cut:.0f} s")
    assert beat.stop() == 0
    wire.close()


@pytest.mark.parametrize(("mode", "works"), [("session", True), ("transaction", False)])
def test_a_pooler_must_keep_sessions(
    bake, make_service, postgres_url, rabbitmq_url, pgbouncer, mode, works
):
    port = urlsplit(postgres_url).port
    url = postgres_url.replace(f":{port}/", f":{pgbouncer(mode)}/")
    service = make_service(bake(project_slug="pooled"), **production_variables(url, rabbitmq_url))
    service.install("--no-dev")
    if works:
        service.run("python manage.py check")
        service.run(service.procfile()["release"])
        beat = service.start("beat")
        beat.wait_for_text("beat: Starting...")
        assert beat.stop() == 0
        return
    for process in (
        service.start("beat"),
        service.spawn("check", *"python manage.py check".split()),
    ):
        assert process.popen.wait(timeout=30 * PATIENCE) == 1
        problem = "A pooler does not keep sessions between transactions"
        assert len([line for line in process.text().splitlines() if problem in line]) == 1
        assert "Traceback" not in process.text()
