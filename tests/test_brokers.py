"""Brokers: with each one no task is lost, whatever is killed, and the checks tell the truth."""

import json
import re
import shutil
import signal
import subprocess
import urllib.error

import psycopg
import pytest

from tests.conftest import production_variables
from tests.servers import free_port, wait_for

pytestmark = pytest.mark.slow

#: A task that takes some time, and writes a line when it starts and one when it completes.
TASK = """
from celery import shared_task

@shared_task
def write(number):
    import time
    from pathlib import Path

    with Path("started").open("a") as file:
        file.write(f"{number}\\n")
    time.sleep(3)
    with Path("done").open("a") as file:
        file.write(f"{number}\\n")
"""


@pytest.fixture(params=["rabbitmq", "redis", "postgresql"])
def service(request, bake, make_service, postgres_url, rabbitmq_url, redis_url):
    """A service with the broker; its lost tasks come back after 12 seconds instead of 6 minutes."""
    slug = f"broker_{request.param}"
    project = bake(project_slug=slug, broker=request.param)
    with (project / slug / "tasks.py").open("a") as file:
        file.write(TASK)
    broker = project / slug / "ops" / "production_broker.py"
    broker.write_text(broker.read_text().replace("MARGIN = 60", "MARGIN = 2"))
    settings = project / slug / "settings.py"
    text = settings.read_text()
    limits = "    CELERY_TASK_SOFT_TIME_LIMIT = 9\n    CELERY_TASK_TIME_LIMIT = 10\n"
    settings.write_text(text.replace("    USE_TZ = True\n", f"    USE_TZ = True\n{limits}"))
    service = make_service(
        project,
        LOG_FORMAT="text",
        REDIS_URL=redis_url,
        WORKER_CONCURRENCY=2,
        **production_variables(postgres_url, rabbitmq_url),
    )
    service.deploy()
    return service


def queue(service, numbers):
    service.shell(
        f"from {service.folder.name}.tasks import write\nfor n in {list(numbers)}: write.delay(n)"
    )


def read(service, name):
    path = service.folder / name
    return list(map(int, path.read_text().split())) if path.exists() else []


def test_all_processes_start_run_a_schedule_and_stop(service):
    print(service.run("python manage.py smoke"))


def test_remote_control_finds_the_worker(service):
    worker = service.start("worker")
    worker.wait_for_text(" ready.")
    output = service.run(f"celery -A {service.folder.name} inspect ping --timeout 10")
    assert "pong" in output


def test_killed_and_stopped_workers_lose_no_task(service):
    worker = service.start("worker")
    worker.wait_for_text(" ready.")
    queue(service, range(6))
    wait_for(lambda: len(read(service, "started")) >= 2, 20, worker.text)
    worker.kill_all()
    killed = len(read(service, "started"))
    worker = service.start("worker")
    wait_for(lambda: len(read(service, "started")) >= killed + 2, 40, worker.text)
    # It completes what it started, and leaves the rest to the next one.
    assert worker.stop(signal.SIGTERM, seconds=20) == 0
    assert len(read(service, "done")) >= 2
    last = service.start("worker")
    wait_for(lambda: set(read(service, "done")) == set(range(6)), 60, last.text)
    assert last.stop(seconds=20) == 0
    runs = read(service, "done")
    print(f"6 tasks, {6 - len(set(runs))} lost, {len(runs) - 6} run twice")
    assert len(runs) == 6


def test_health_check_and_doctor_name_a_broker_that_is_away(service):
    environment = service.environment
    variable = {"redis": "REDIS_URL", "rabbitmq": "RABBITMQ_URL"}.get(
        service.folder.name.removeprefix("broker_"), "CELERY_BROKER_URL"
    )
    before = environment.get(variable, environment["DATABASE_URL"])
    environment[variable] = re.sub(r"127\.0\.0\.1:\d+", f"127.0.0.1:{free_port()}", before)
    web = service.start("web")
    web.wait_for_text("Booting worker")
    with pytest.raises(urllib.error.HTTPError) as caught:
        service.get("/health/ready")
    assert caught.value.code == 503
    checks = json.loads(caught.value.read())["checks"]
    assert checks == {"database": "ok", "broker": "unavailable"}
    doctor = service.spawn("doctor", "python", "manage.py", "doctor")
    assert doctor.popen.wait(timeout=30) == 1
    assert re.search(r"broker +error", doctor.text())
    assert re.search(r"run +nc -zv 127\.0\.0\.1 \d+", doctor.text())


def test_connections_to_postgresql_as_the_broker_verify_the_server(
    bake, make_service, dedicated_postgres
):
    authorities = {name: make_certificate(dedicated_postgres, name) for name in ("own", "other")}
    use_tls(dedicated_postgres)
    project = bake(project_slug="broker_tls", broker="postgresql")
    with (project / project.name / "tasks.py").open("a") as file:
        file.write(TASK)
    variables = production_variables(dedicated_postgres.url, "")
    service = make_service(project, WORKER_CONCURRENCY=1, **variables)

    def trust(authority):
        query = f"sslmode=verify-full&sslrootcert={authorities[authority]}"
        service.environment["DATABASE_URL"] = f"{dedicated_postgres.url}?{query}"

    trust("own")
    service.deploy()
    worker = service.start("worker")
    queue(service, [1])
    wait_for(lambda: read(service, "done") == [1], 30, worker.text)
    with psycopg.connect(dedicated_postgres.url) as connection:
        rows = connection.execute("SELECT ssl, count(*) FROM pg_stat_ssl GROUP BY ssl").fetchall()
    # This connection, the worker's two and those of its pool
    assert dict(rows).keys() == {True}, rows
    assert dict(rows)[True] >= 4, rows
    assert worker.stop(seconds=20) == 0

    trust("other")
    check = service.spawn(
        "check",
        *("python", "manage.py", "shell", "-v0", "-c"),
        f"from {project.name}.ops import health; health.check_broker()",
    )
    assert check.popen.wait(timeout=60) == 1
    assert "OperationalError" in check.text()


def make_certificate(server, name):
    """Write a certificate for 127.0.0.1, and its key, to the server's folder; return its path."""
    certificate, key = server.folder / f"{name}.crt", server.folder / f"{name}.key"
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"),
            *("-subj", f"/CN={name}", "-addext", "subjectAltName=IP:127.0.0.1"),
            *("-out", certificate, "-keyout", key),
        ],
        check=True,
        capture_output=True,
    )
    key.chmod(0o600)
    if server.user:
        shutil.chown(key, "postgres")
    return certificate


def use_tls(server):
    """Restart a PostgreSQL server so that it accepts connections with TLS only."""
    data = server.folder / "data"
    with (data / "postgresql.conf").open("a") as file:
        file.write("ssl = on\n")
        file.write(f"ssl_cert_file = '{server.folder}/own.crt'\n")
        file.write(f"ssl_key_file = '{server.folder}/own.key'\n")
    (data / "pg_hba.conf").write_text("hostssl all all 127.0.0.1/32 trust\n")
    server.stop()
    server.start()
