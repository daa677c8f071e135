"""What the tests stand on: bakes, services of this machine, and real processes of a service."""

import asyncio
import contextlib
import hashlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tomllib
import uuid
from pathlib import Path
from urllib.request import Request, urlopen

import amqp
import psycopg
import pytest
from aiosmtpd.controller import Controller
from aiosmtpd.handlers import Message

from tests.servers import PostgreSQL, RabbitMQ, free_port, reachable, wait_for

ROOT = Path(__file__).parent.parent

#: The RabbitMQ of the machine; each service has a queue of its own name there.
RABBITMQ_URL = "amqp://guest:guest@127.0.0.1:5672//"

#: What a service could read, which the machine that runs the tests may have set.
SERVICE_VARIABLES = {
    "CELERY_BROKER_URL",
    "DATABASE_URL",
    "DEBUG",
    "DJANGO_MODE",
    "DJANGO_SETTINGS_MODULE",
    "LOG_FORMAT",
    "LOG_LEVEL",
    "PORT",
    "RABBITMQ_URL",
    "SECRET_KEY",
    "SENTRY_DSN",
    "VIRTUAL_ENV",
}


def pytest_addoption(parser):
    parser.addoption(
        "--require-services",
        action="store_true",
        help="fail, and do not skip, where PostgreSQL or RabbitMQ is not running",
    )


def pytest_xdist_auto_num_workers(config):
    """One worker more than there are cores, for a slow test spends half its time waiting."""
    return (os.cpu_count() or 1) + 1


def clean_environment(**extra):
    """Return this process's environment without what a service would read from it."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in SERVICE_VARIABLES and not name.startswith("PYTEST_")
    }
    return kept | {name: str(value) for name, value in extra.items()}


@pytest.fixture(scope="session")
def uv():
    """The path of uv, which runs these tests."""
    return os.environ.get("UV") or shutil.which("uv") or pytest.fail("run the tests with uv run")


@pytest.fixture
def bake(cookies):
    """Generate a service with these answers, set-up off; return its folder or fail."""

    def bake(**answers):
        result = cookies.bake(extra_context={"setup": False} | answers, template=str(ROOT))
        if result.exception:
            raise result.exception
        return result.project_path

    return bake


@pytest.fixture(scope="session")
def default_project(cookies_session):
    """The service that the default answers give, for tests that only read it."""
    result = cookies_session.bake(extra_context={"setup": False}, template=str(ROOT))
    if result.exception:
        raise result.exception
    return result.project_path


# Services of the machine


def require(request, name, port, start):
    """Skip, or fail with ``--require-services``, where nothing listens on the port."""
    if reachable(port):
        return
    message = f"{name} is not running on 127.0.0.1:{port}; start it with: {start}"
    if request.config.getoption("--require-services"):
        pytest.fail(message)
    pytest.skip(message)


@pytest.fixture
def postgres_url(request):
    """The URL of a new, empty PostgreSQL database."""
    require(
        request,
        "PostgreSQL",
        5432,
        "docker run -d -p 5432:5432 -e POSTGRES_HOST_AUTH_METHOD=trust postgres:16",
    )
    server = "postgres://postgres@127.0.0.1:5432"
    name = f"prodserver_{uuid.uuid4().hex[:12]}"
    with psycopg.connect(f"{server}/postgres", autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")
        yield f"{server}/{name}"
        connection.execute(f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture
def rabbitmq_url(request):
    """The URL of the machine's RabbitMQ."""
    require(request, "RabbitMQ", 5672, "docker run -d -p 5672:5672 rabbitmq:4")
    return RABBITMQ_URL


def own_server(kind, folder):
    """Run a server of the test's own, or skip where it is not installed."""
    if kind.server is None:
        pytest.skip(f"{kind.__name__} is not installed here; install its server package")
    folder.mkdir()
    server = kind(folder)
    server.start()
    yield server
    with contextlib.suppress(Exception):
        server.stop()


@pytest.fixture
def own_rabbitmq(tmp_path):
    """A RabbitMQ node that the test may stop and start."""
    yield from own_server(RabbitMQ, tmp_path / "rabbitmq")


@pytest.fixture
def own_postgres(tmp_path):
    """A PostgreSQL server that the test may stop and start."""
    yield from own_server(PostgreSQL, tmp_path / "postgres")


class Mailbox(Message):
    """Keeps every message that the SMTP server takes, each after ``delay`` seconds."""

    def __init__(self):
        super().__init__()
        self.messages = []
        self.delay = 0

    async def handle_DATA(self, server, session, envelope):
        await asyncio.sleep(self.delay)
        return await super().handle_DATA(server, session, envelope)

    def handle_message(self, message):
        self.messages.append(message)


@pytest.fixture
def smtp():
    """A real SMTP server; ``smtp.messages`` is what it took."""
    mailbox = Mailbox()
    controller = Controller(mailbox, hostname="127.0.0.1", port=free_port())
    controller.start()
    mailbox.port = controller.port
    yield mailbox
    controller.stop()


# A service and its processes


class Process:
    """A running process of a service, with what it printed."""

    def __init__(self, arguments, folder, environment, log):
        self.log = log
        with log.open("wb") as output:
            self.popen = subprocess.Popen(
                arguments,
                cwd=folder,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def text(self):
        return self.log.read_text(errors="replace")

    def wait_for_text(self, text, seconds=30):
        def printed():
            if self.popen.poll() is not None:
                pytest.fail(f"ended with status {self.popen.returncode}:\n{self.text()}")
            return text in self.text()

        wait_for(printed, seconds, lambda: f"no {text!r} in:\n{self.text()}")

    def stop(self, number=signal.SIGTERM, seconds=10):
        """Signal the process; return its exit status, or fail if it does not end in time."""
        self.popen.send_signal(number)
        try:
            return self.popen.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            pytest.fail(f"still running {seconds} s after signal {number}:\n{self.text()}")

    def kill_all(self):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.popen.pid, signal.SIGKILL)
        self.popen.wait()


class Service:
    """A generated service, installed, and run in an environment of its own."""

    def __init__(self, folder, uv, environments, **variables):
        self.folder = folder
        self.uv = uv
        self.environments = environments
        self.processes = []
        self.port = free_port()
        scripts = folder / ".venv" / "bin"
        self.environment = clean_environment(PORT=self.port, **variables)
        self.environment["PATH"] = f"{scripts}{os.pathsep}{self.environment['PATH']}"

    def run(self, command, **variables):
        """Run a command in the service's folder; return what it printed, or fail."""
        done = subprocess.run(
            shlex.split(command),
            cwd=self.folder,
            env=self.environment | variables,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        if done.returncode:
            pytest.fail(f"{command} ended with status {done.returncode}:\n{done.stdout}")
        return done.stdout

    def install(self, *options):
        """Install what the service depends on, once for all services that depend on the same."""
        project = tomllib.loads((self.folder / "pyproject.toml").read_text())
        python = (self.folder / ".python-version").read_text()
        wanted = [project["project"]["dependencies"], python, options]
        name = hashlib.sha256(json.dumps(wanted).encode()).hexdigest()[:16]
        environment = self.environments / name
        if not environment.exists():
            command = [self.uv, "sync", "--quiet", "--compile-bytecode", *options]
            self.run(shlex.join(command), UV_PROJECT_ENVIRONMENT=str(environment))
        (self.folder / ".venv").symlink_to(environment)

    def procfile(self):
        """Return the commands of the generated Procfile by their names."""
        lines = (self.folder / "Procfile").read_text().splitlines()
        return dict(line.split(": ", 1) for line in lines)

    def start(self, name):
        """Start the process of that name by its line of the Procfile."""
        return self.spawn(name, *shlex.split(self.procfile()[name]))

    def spawn(self, name, *arguments):
        """Start a command beside the others; its log has that name."""
        log = self.folder.parent / f"{name}-{len(self.processes)}.log"
        process = Process(arguments, self.folder, self.environment, log)
        self.processes.append(process)
        return process

    def shell(self, code):
        """Run Python in the service's shell, with its models imported; return what it printed."""
        return self.run(shlex.join(["python", "manage.py", "shell", "-v0", "-c", code]))

    def get(self, path, **headers):
        """Return status and text of the answer that web gives, redirects followed."""
        request = Request(f"http://127.0.0.1:{self.port}{path}", headers=headers)
        with urlopen(request, timeout=10) as response:
            return response.status, response.read().decode()

    def delete_queue(self):
        """Delete the service's queue on the machine's RabbitMQ, with all that waits in it."""
        if RABBITMQ_URL in self.environment.values():
            with amqp.Connection("127.0.0.1:5672") as connection:
                connection.channel().queue_delete(self.folder.name)

    def close(self):
        for process in self.processes:
            process.kill_all()
        self.delete_queue()


@pytest.fixture(scope="session")
def environments(tmp_path_factory):
    """The folder of the environments that services are installed into."""
    return tmp_path_factory.mktemp("environments")


@pytest.fixture
def make_service(uv, environments):
    """Make a ``Service`` of a folder and variables; its processes end with the test."""
    services = []

    def make(folder, **variables):
        service = Service(folder, uv, environments, **variables)
        service.delete_queue()  # A run that was cut short leaves messages that count twice.
        services.append(service)
        return service

    yield make
    for service in services:
        service.close()


@pytest.fixture(scope="session")
def run_cookiecutter(tmp_path_factory):
    """Run cookiecutter's command line in an empty folder; return the folder and what it said."""

    def run(*arguments, stdin=None, environment=None):
        folder = tmp_path_factory.mktemp("cli")
        home = tmp_path_factory.mktemp("home")
        done = subprocess.run(
            [sys.executable, "-m", "cookiecutter", str(ROOT), *arguments],
            cwd=folder,
            env=clean_environment(HOME=home, PWD=folder, COLUMNS=200) | (environment or {}),
            input=stdin,
            stdin=None if stdin else subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        return folder, done

    return run
