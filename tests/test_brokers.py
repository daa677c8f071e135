"""Brokers: with each one no task is lost, whatever is killed, and the checks tell the truth."""

import json
import re
import shutil
import signal
import subprocess
import urllib.error
from pathlib import Path

import psycopg
import pytest

from tests.conftest import production_variables
from tests.generate import replace
from tests.servers import PATIENCE, free_port, reachable, wait_for

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


#: The brokers of a test that has a short form for each one in another test or in the library's.
FIRST = [
    "rabbitmq",
    pytest.param("redis", marks=pytest.mark.long),
    pytest.param("postgresql", marks=pytest.mark.long),
]


@pytest.fixture(params=["rabbitmq", "redis", "postgresql"])
def service(request, bake_impatient, make_service, postgres_url, rabbitmq_url, redis_url):
    """A service with the broker; its lost tasks come back after 12 seconds instead of 6 minutes."""
    slug = f"broker_{request.param}"
    project = bake_impatient(project_slug=slug, broker=request.param)
    with (project / slug / "tasks.py").open("a") as file:
        file.write(TASK)
    settings = project / slug / "settings.py"
    limits = "    CELERY_TASK_SOFT_TIME_LIMIT = 9\n    CELERY_TASK_TIME_LIMIT = 10\n"
    replace(settings, "    USE_TZ = True\n", f"    USE_TZ = True\n{limits}")
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


def test_remote_control_finds_a_worker_and_killed_and_stopped_ones_lose_no_task(service):
    worker = service.start("worker")
    worker.wait_for_text(" ready.")
    output = service.run(f"celery -A {service.folder.name} inspect ping --timeout 10")
    assert "pong" in output
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


@pytest.mark.parametrize("service", FIRST, indirect=True)
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
    assert doctor.popen.wait(timeout=30 * PATIENCE) == 1
    assert re.search(r"broker +error", doctor.text())
    assert re.search(r"run +nc -zv 127\.0\.0\.1 \d+", doctor.text())


class TestTls:
    """A broker that accepts connections with TLS only. Its certificate is for 127.0.0.1."""

    @pytest.fixture
    def certificates(self, tmp_path_factory):
        """The certificates of the server and of somebody else, by name."""
        folder = tmp_path_factory.mktemp("certificates")
        return {name: make_certificate(folder, name) for name in ("own", "other")}

    @pytest.mark.long
    def test_postgresql_is_verified(self, bake, make_service, installed_postgres, certificates):
        use_tls(installed_postgres, certificates["own"])

        def get_variables(host, certificate):
            url = installed_postgres.url.replace("127.0.0.1", host)
            authority = f"&sslrootcert={certificate}" if certificate else ""
            return {"DATABASE_URL": f"{url}?sslmode=verify-full{authority}"}

        variables = production_variables("", "")
        self.verify(bake, make_service, "postgresql", variables, get_variables, certificates)
        with psycopg.connect(installed_postgres.url) as connection:
            query = "SELECT DISTINCT ssl FROM pg_stat_ssl JOIN pg_stat_activity USING (pid)"
            assert connection.execute(query + " WHERE client_addr IS NOT NULL").fetchall() == [
                (True,)
            ]

    def test_rabbitmq_is_verified(
        self, bake, make_service, postgres_url, installed_rabbitmq, certificates
    ):
        installed_rabbitmq.stop()
        port = free_port()
        with (installed_rabbitmq.folder / "rabbitmq.conf").open("a") as file:
            file.write(f"listeners.ssl.1 = 0.0.0.0:{port}\n")
            file.write(f"ssl_options.certfile = {certificates['own']}\n")
            file.write(f"ssl_options.keyfile = {certificates['own'].with_suffix('.key')}\n")
        installed_rabbitmq.start()
        wait_for(lambda: reachable(port), 30, lambda: "no port for TLS")

        def get_variables(host, certificate):
            authority = f"?ssl_ca_certs={certificate}" if certificate else ""
            return {"RABBITMQ_URL": f"amqps://guest:guest@{host}:{port}//{authority}"}

        variables = production_variables(postgres_url, "")
        self.verify(bake, make_service, "rabbitmq", variables, get_variables, certificates)

    @pytest.mark.long
    def test_redis_is_verified(self, bake, make_service, postgres_url, tmp_path, certificates):
        if shutil.which("redis-server") is None:
            pytest.skip("redis-server is not installed; install its server package")
        port = free_port()
        server = subprocess.Popen(
            [
                *("redis-server", "--bind", "0.0.0.0", "--save", "", "--port", "0"),
                *("--tls-port", str(port), "--tls-auth-clients", "no", "--protected-mode", "no"),
                *(
                    "--tls-cert-file",
                    certificates["own"],
                    "--tls-ca-cert-file",
                    certificates["own"],
                ),
                *("--tls-key-file", certificates["own"].with_suffix(".key")),
            ],
            cwd=tmp_path,
            stdout=subprocess.DEVNULL,
        )

        def get_variables(host, certificate):
            authority = f"?ssl_ca_certs={certificate}" if certificate else ""
            return {"REDIS_URL": f"rediss://{host}:{port}/1{authority}"}

        try:
            wait_for(lambda: reachable(port), 30, lambda: "no port for TLS")
            variables = production_variables(postgres_url, "")
            self.verify(bake, make_service, "redis", variables, get_variables, certificates)
        finally:
            server.kill()
            server.wait()

    def verify(self, bake, make_service, broker, variables, get_variables, certificates):
        """Run a task; then connect under another name, and with another certificate or none."""
        project = bake(project_slug=f"tls_{broker}", broker=broker)
        with (project / project.name / "tasks.py").open("a") as file:
            file.write(TASK)
        variables |= get_variables("127.0.0.1", certificates["own"])
        service = make_service(project, WORKER_CONCURRENCY=1, **variables)
        service.deploy()
        worker = service.start("worker")
        queue(service, [1])
        wait_for(lambda: read(service, "done") == [1], 30, worker.text)

        code = "from prodserver_ops.web import health; health.check_broker()"
        service.shell(code)
        other_name = "localhost" if broker == "postgresql" else "127.0.0.2"
        for host, authority in (
            (other_name, certificates["own"]),
            ("127.0.0.1", certificates["other"]),
            ("127.0.0.1", None),
        ):
            check = service.spawn(
                "check",
                *("python", "manage.py", "shell", "-v0", "-c", code),
                **get_variables(host, authority),
            )
            assert check.popen.wait(timeout=60 * PATIENCE) == 1, (host, authority)
            assert "OperationalError" in check.text()


def make_certificate(folder, name):
    """Write a certificate for 127.0.0.1, and its key, to a folder; return its path."""
    certificate, key = folder / f"{name}.crt", folder / f"{name}.key"
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"),
            *("-subj", f"/CN={name}", "-addext", "subjectAltName=IP:127.0.0.1"),
            *("-out", certificate, "-keyout", key),
        ],
        check=True,
        capture_output=True,
    )
    return certificate


def use_tls(server, certificate):
    """Restart a PostgreSQL server so that it accepts connections with TLS only."""
    data = server.folder / "data"
    for path in (certificate, certificate.with_suffix(".key")):
        copy = Path(shutil.copy(path, data))
        copy.chmod(0o600)
        if server.user:
            shutil.chown(copy, "postgres")
    with (data / "postgresql.conf").open("a") as file:
        file.write("ssl = on\nssl_cert_file = 'own.crt'\nssl_key_file = 'own.key'\n")
    (data / "pg_hba.conf").write_text("hostssl all all 127.0.0.1/32 trust\n")
    server.stop()
    server.start()
