"""Shared fixtures: generated projects, servers, and services with real processes."""

import asyncio
import contextlib
import fcntl
import hashlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import tomllib
import uuid
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

import amqp
import jinja2
import psycopg
import pytest
import redis
from aiosmtpd.controller import Controller
from aiosmtpd.handlers import Message

from tests.generate import OTHER_FOLDERS, SOURCES, copy_template, get_template, replace
from tests.servers import (
    PATIENCE,
    PostgreSQL,
    RabbitMQ,
    Remote,
    free_port,
    reachable,
    run_rabbitmqctl,
    wait_for,
)

ROOT = Path(__file__).parent.parent

#: The names of the schedules of a new service.
SCHEDULES = [
    "deliveries-resume",
    "moderator-digest-hourly",
    "records-delete",
    "tasks-resume",
    "user-digest-daily",
    "user-digest-weekly",
]

#: The servers of this machine. ``TEST_POSTGRESQL_URL``, ``TEST_RABBITMQ_URL`` and ``TEST_REDIS_URL``
#: name others, such as those of another version.
POSTGRES_SERVER = os.environ.get(
    "TEST_POSTGRESQL_URL", "postgres://postgres@127.0.0.1:5432/postgres"
).rpartition("/")[0]
REDIS_SERVER = os.environ.get("TEST_REDIS_URL", "redis://127.0.0.1:6379")

#: Each service uses the queue named after its slug, so test runs at the same time need a virtual
#: host each.
RABBITMQ_URL = (
    os.environ.get("TEST_RABBITMQ_URL")
    or os.environ.get("RABBITMQ_URL")
    or "amqp://guest:guest@127.0.0.1:5672//"
)

#: A secret key that passes the deployment checks.
SECRET_KEY = "a-key-for-this-test-alone-of-more-than-fifty-characters"

#: An author for commits on machines that have no git configuration.
GIT_IDENTITY = {
    "GIT_AUTHOR_NAME": "A",
    "GIT_AUTHOR_EMAIL": "a@example.com",
    "GIT_COMMITTER_NAME": "A",
    "GIT_COMMITTER_EMAIL": "a@example.com",
}

#: Variables that a service reads and that this machine may have set. Without bytecode, each
#: command of a service compiles Django and Celery first: 2.6 s instead of 0.7 s.
SERVICE_VARIABLES = {
    "CELERY_BROKER_URL",
    "DATABASE_STATEMENT_TIMEOUT",
    "DATABASE_URL",
    "DEBUG",
    "DJANGO_MODE",
    "DJANGO_SETTINGS_MODULE",
    "EMAIL_API",
    "LOG_FORMAT",
    "LOG_LEVEL",
    "PORT",
    "PROXY_COUNT",
    "PYTHONDONTWRITEBYTECODE",
    "REDIS_URL",
    "EXTRA_QUEUES",
    "RABBITMQ_URL",
    "SECRET_KEY",
    "SENTRY_DSN",
    "TOKEN_DAYS",
    "VIRTUAL_ENV",
}


def pytest_configure(config):
    """Let the processes of tests react to SIGINT.

    A shell lets what it starts in the background ignore it, and its child processes too.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser):
    parser.addoption(
        "--require-services",
        action="store_true",
        help="fail instead of skip if PostgreSQL or RabbitMQ is not running",
    )
    parser.addoption(
        "--real-times",
        action="store_true",
        help="wait as long as services in production do, a minute for a lease, for example",
    )


def pytest_xdist_auto_num_workers(config):
    """Use two workers more than there are cores, because slow tests mostly wait."""
    return (os.cpu_count() or 1) + 2


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config, items):
    """Let each test process begin with its share of the slow tests, and end with fast ones.

    pytest-xdist gives each process as many tests, in this order. A process without tests takes
    over those of others, but for the last two of each process: these have to be fast.
    """
    slow = [item for item in items if item.get_closest_marker("slow")]
    fast = [item for item in items if not item.get_closest_marker("slow")]
    count = getattr(config, "workerinput", {}).get("workercount", 1)

    def get_share(tests, number):
        return tests[len(tests) * number // count : len(tests) * (number + 1) // count]

    items[:] = [
        item
        for number in range(count)
        for tests in (slow, fast)
        for item in get_share(tests, number)
    ]


def clean_environment(**extra):
    """Return the environment of this process without the variables that a service reads."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in SERVICE_VARIABLES and not name.startswith("PYTEST_")
    }
    return kept | {name: str(value) for name, value in extra.items()}


def production_variables(database_url, rabbitmq_url):
    """Return the environment variables that a service requires in production mode."""
    return {
        "DJANGO_MODE": "prod",
        "SECRET_KEY": SECRET_KEY,
        "DATABASE_URL": database_url,
        "RABBITMQ_URL": rabbitmq_url,
    }


def get_tracked():
    """Return the paths of the files that git tracks or would add."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listed = subprocess.check_output(command, cwd=ROOT, text=True)
    paths = [ROOT / name for name in listed.split("\0") if name]
    return [path for path in paths if path.is_file()]


def read_procfile(path):
    """Return the commands of a Procfile by process name."""
    lines = (line for line in path.read_text().splitlines() if not line.startswith("#"))
    return dict(line.split(": ", 1) for line in lines)


_compile_template = jinja2.Environment.compile
_compiled = {}


def compile_once(environment, *args, **kwargs):
    """Compile a template once in each test process, which generates many services."""
    key = (*args, *kwargs.items())
    if key not in _compiled:
        _compiled[key] = _compile_template(environment, *args, **kwargs)
    return _compiled[key]


jinja2.Environment.compile = compile_once


def generate_project(cookies, **answers):
    """Generate a service without setup. Return its folder, or raise cookiecutter's error."""
    result = cookies.bake(extra_context={"setup": False} | answers, template=str(get_template()))
    if result.exception:
        raise result.exception
    return result.project_path


@pytest.fixture(scope="session")
def uv():
    """The path of the uv that runs these tests."""
    return os.environ.get("UV") or shutil.which("uv") or pytest.fail("run the tests with uv run")


@pytest.fixture(scope="session")
def uv_cache(uv):
    """The package cache of uv, for commands that run with another home directory."""
    done = subprocess.run([uv, "cache", "dir"], capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.fixture
def template_copy(tmp_path):
    """The folder of a copy of the template that the test may change."""
    folder = tmp_path / "template"
    copy_template(folder, without=OTHER_FOLDERS)
    return folder


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory, worker_id):
    """A folder that all test processes share."""
    folder = tmp_path_factory.getbasetemp()
    return folder if worker_id == "master" else folder.parent


@contextlib.contextmanager
def made_once(folder):
    """Hold the lock of a folder. Yield whether it has to be made."""
    with folder.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield not folder.exists()


@pytest.fixture(scope="session")
def bake(cookies_session, shared_folder, tmp_path_factory):
    """A function that generates a service with the given answers and returns its folder.

    The same answers are rendered once; each call returns a copy of its own.
    """
    rendered = shared_folder / "rendered"
    rendered.mkdir(exist_ok=True)

    def bake(**answers):
        key = hashlib.sha256(json.dumps(answers).encode()).hexdigest()[:16]
        with made_once(rendered / key) as is_missing:
            if is_missing:
                generate_project(cookies_session, **answers).parent.rename(rendered / key)
        (original,) = (rendered / key).iterdir()
        folder = tmp_path_factory.mktemp("service") / original.name
        shutil.copytree(original, folder)
        return folder

    return bake


#: Times of the library, by the file in which they stand, and those of an impatient service.
SHORT_TIMES = [
    ("broker/renewal.py", "VISIBILITY = 40", "VISIBILITY = 8"),
    ("broker/renewal.py", "INTERVAL = 5", "INTERVAL = 1"),
    ("broker/renewal.py", "LIMIT = 30", "LIMIT = 6"),
    ("conf/defaults.py", "EMAIL_TIMEOUT = 30", "EMAIL_TIMEOUT = 6"),
    ("mail/attempts.py", "for minutes in (1, 2", "for minutes in (0.1, 2"),
    (
        "mail/tasks.py",
        "NOTIFICATION_GRACE = timedelta(minutes=1)",
        "NOTIFICATION_GRACE = timedelta(seconds=8)",
    ),
    ("mail/tasks.py", "RESUME_SECONDS = 60", "RESUME_SECONDS = 8"),
    ("mail/transport.py", "PAUSE_SECONDS = 60", "PAUSE_SECONDS = 20"),
    ("worker/failed.py", "UNKNOWN_SECONDS = 120", "UNKNOWN_SECONDS = 5"),
]


@pytest.fixture(scope="session")
def real_times(pytestconfig):
    """Whether tests wait as long as services in production do."""
    return pytestconfig.getoption("--real-times")


@pytest.fixture(scope="session")
def bake_impatient(bake, real_times):
    """As ``bake``, but the library of the service waits for seconds instead of minutes.

    That needs an environment of its own. With ``--real-times`` the service is as any other.
    """

    def bake_impatient(**answers):
        project = bake(**answers)
        for name, old, new in SHORT_TIMES if not real_times else ():
            replace(project / SOURCES / name, old, new)
        return project

    return bake_impatient


@pytest.fixture(scope="session")
def default_project(bake):
    """The default service, for tests that do not change it."""
    return bake()


@pytest.fixture(scope="session")
def none_project(bake):
    """The service without the example, for tests that do not change it."""
    return bake(example="none")


# Servers


def require_server(request, name, port, start_command):
    """Skip the test (with ``--require-services``: fail) if the server is not running."""
    if reachable(port):
        return
    message = f"{name} is not running on 127.0.0.1:{port}; start it with: {start_command}"
    if request.config.getoption("--require-services"):
        pytest.fail(message)
    pytest.skip(message)


@pytest.fixture
def postgres_url(request):
    """The URL of a new, empty PostgreSQL database."""
    require_server(
        request,
        "PostgreSQL",
        urlsplit(POSTGRES_SERVER).port,
        "docker run -d -p 5432:5432 -e POSTGRES_HOST_AUTH_METHOD=trust postgres:16",
    )
    name = f"prodserver_{uuid.uuid4().hex[:12]}"
    with psycopg.connect(f"{POSTGRES_SERVER}/postgres", autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")
        yield f"{POSTGRES_SERVER}/{name}"
        connection.execute(f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture
def rabbitmq_url(request):
    """The URL of this machine's RabbitMQ server."""
    port = urlsplit(RABBITMQ_URL).port
    require_server(request, "RabbitMQ", port, "docker run -d -p 5672:5672 rabbitmq:4")
    return RABBITMQ_URL


@pytest.fixture
def redis_url(request, worker_id):
    """The URL of an empty database of this machine's Redis server."""
    port = urlsplit(REDIS_SERVER).port
    require_server(request, "Redis", port, "docker run -d -p 6379:6379 redis:7")
    number = 2 + int(worker_id.removeprefix("gw")) if worker_id != "master" else 1
    url = f"{REDIS_SERVER}/{number}"
    with redis.Redis.from_url(url) as client:
        client.flushdb()
    return url


def connect_to_rabbitmq():
    """Return a connection to this machine's RabbitMQ."""
    url = urlsplit(RABBITMQ_URL)
    host = f"{url.hostname}:{url.port}"
    return amqp.Connection(host, url.username, url.password, virtual_host=url.path[1:])


def run_dedicated_server(server_class):
    """Run a server for one test, or skip the test if the server is not installed."""
    if server_class.server is None:
        pytest.skip(f"{server_class.__name__} is not installed; install its server package")
    # Other users cannot read pytest's own temporary folders.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        server = server_class(Path(folder))
        server.start()
        yield server
        with contextlib.suppress(Exception):
            server.stop()


@pytest.fixture
def installed_rabbitmq():
    """A RabbitMQ node from the server package of this machine."""
    yield from run_dedicated_server(RabbitMQ)


@pytest.fixture
def installed_postgres():
    """A PostgreSQL server from the server package of this machine."""
    yield from run_dedicated_server(PostgreSQL)


@pytest.fixture
def dedicated_rabbitmq(request):
    """A RabbitMQ that the test can stop and start: installed, or that of ``TEST_RABBITMQ_URL``."""
    if "TEST_RABBITMQ_URL" not in os.environ:
        yield request.getfixturevalue("installed_rabbitmq")
        return
    name, url = f"prodserver_{uuid.uuid4().hex[:12]}", urlsplit(RABBITMQ_URL)
    run_rabbitmqctl("add_vhost", name)
    try:
        run_rabbitmqctl("set_permissions", "-p", name, url.username, ".*", ".*", ".*")
        with contextlib.closing(Remote(url._replace(path=f"/{name}").geturl())) as server:
            yield server
    finally:
        run_rabbitmqctl("delete_vhost", name)


@pytest.fixture
def dedicated_postgres(request):
    """A PostgreSQL that the test can stop and start: installed, or ``TEST_POSTGRESQL_URL``."""
    if "TEST_POSTGRESQL_URL" not in os.environ:
        yield request.getfixturevalue("installed_postgres")
        return
    with contextlib.closing(Remote(request.getfixturevalue("postgres_url"))) as server:
        yield server


class Mailbox(Message):
    """Stores each message that the SMTP server receives, after ``delay`` seconds."""

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
    """An SMTP server. ``smtp.messages`` are the messages that it received."""
    mailbox = Mailbox()
    controller = Controller(mailbox, hostname="127.0.0.1", port=free_port())
    controller.start()
    mailbox.port = controller.port
    yield mailbox
    controller.stop()


# Services and their processes


class Process:
    """A running process and its output."""

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
                pytest.fail(f"exited with status {self.popen.returncode}:\n{self.text()}")
            return text in self.text()

        wait_for(printed, seconds, lambda: f"no {text!r} in:\n{self.text()}")

    def stop(self, number=signal.SIGTERM, seconds=10):
        """Send a signal and return the exit status. Fail if the process does not exit in time."""
        self.popen.send_signal(number)
        try:
            return self.popen.wait(timeout=seconds * PATIENCE)
        except subprocess.TimeoutExpired:
            pytest.fail(f"still running {seconds} s after signal {number}:\n{self.text()}")

    def kill_all(self):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.popen.pid, signal.SIGKILL)
        self.popen.wait()


def digest_files(paths):
    """Return a digest of the names and contents of files, without bytecode."""
    files = sorted(path for path in paths if path.is_file() and path.suffix != ".pyc")
    contents = b"".join(f"{path.name}\n".encode() + path.read_bytes() for path in files)
    return hashlib.sha256(contents).hexdigest()


class Service:
    """A generated service with its own environment variables and processes."""

    #: The folder with the names of the databases that others may copy; None if nobody may.
    copies = None

    def __init__(self, folder, uv, environments, **variables):
        self.folder = folder
        self.uv = uv
        self.environments = environments
        self.processes = []
        self.port = free_port()
        scripts = folder / ".venv" / "bin"
        self.environment = clean_environment(PORT=self.port, **variables)
        # mypy reads the types of the packages once for all services of a test process.
        worker = os.environ.get("PYTEST_XDIST_WORKER", "master")
        self.environment["MYPY_CACHE_DIR"] = str(environments / f"mypy-{worker}")
        self.environment["PATH"] = f"{scripts}{os.pathsep}{self.environment['PATH']}"

    def run(self, command, status=0, **variables):
        """Run a command in the service's folder. Return its output; fail with another status."""
        done = subprocess.run(
            shlex.split(command),
            cwd=self.folder,
            env=self.environment | variables,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        if done.returncode != status:
            pytest.fail(f"{command} exited with status {done.returncode}:\n{done.stdout}")
        return done.stdout

    def get_digest(self, *options):
        """Return a digest of the packages that are installed, and of what they are installed for."""
        project = tomllib.loads((self.folder / "pyproject.toml").read_text())
        python = (self.folder / ".python-version").read_text()
        # A test may have changed the library.
        library = digest_files((self.folder / "vendor").rglob("*"))
        key = [project["project"]["dependencies"], python, library, options]
        return hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]

    def install(self, *options):
        """Install the dependencies. Services with the same dependencies share an environment."""
        environment = self.environments / self.get_digest(*options)
        with made_once(environment) as is_missing:
            if is_missing:
                command = [self.uv, "sync", "--quiet", *options]
                self.run(shlex.join(command), UV_PROJECT_ENVIRONMENT=str(environment))
        (self.folder / ".venv").symlink_to(environment)

    def deploy(self):
        """Install, collect static files and migrate, as a deploy in production mode does.

        On this machine's PostgreSQL, services with the same packages, models, migrations, settings
        and static files are deployed once; after that static files and database are copied.
        """
        self.install("--no-dev")
        server, _, name = self.environment.get("DATABASE_URL", "").rpartition("/")
        if server != POSTGRES_SERVER or self.copies is None:
            self.run("python manage.py collectstatic --noinput")
            self.run(self.procfile()["release"])
            return
        package = next(self.folder.glob("*/settings.py")).parent
        files = [package / name for name in ("apps.py", "models.py", "settings.py")]
        folders = [*package.rglob("migrations"), *package.rglob("static")]
        files += [path for folder in folders for path in folder.rglob("*")]
        deployed = self.environments / f"deployed-{self.get_digest(digest_files(files))}"
        copy = f"copy_{uuid.uuid5(uuid.NAMESPACE_URL, str(deployed)).hex[:12]}"
        with made_once(deployed) as is_missing:
            if is_missing:
                self.run("python manage.py collectstatic --noinput")
                self.run(self.procfile()["release"])
                copy_database(name, copy)
                (self.copies / copy).touch()
                shutil.copytree(self.folder / "staticfiles", deployed)
            else:
                copy_database(copy, name)
                shutil.copytree(deployed, self.folder / "staticfiles")

    def procfile(self):
        """Return the commands of the generated Procfile by process name."""
        return read_procfile(self.folder / "Procfile")

    def start(self, name):
        """Start a process of the Procfile."""
        return self.spawn(name, *shlex.split(self.procfile()[name]))

    def spawn(self, name, *arguments, **variables):
        """Start a command in the background. The name is the prefix of its log file."""
        log = self.folder.parent / f"{name}-{len(self.processes)}.log"
        process = Process(arguments, self.folder, self.environment | variables, log)
        self.processes.append(process)
        return process

    def shell(self, code):
        """Run code in Django's shell, which imports the models. Return the output."""
        return self.run(shlex.join(["python", "manage.py", "shell", "-v0", "-c", code]))

    def get(self, path, **headers):
        """Return the status and text of the web process's response, after any redirects."""
        request = Request(f"http://127.0.0.1:{self.port}{path}", headers=headers)
        with urlopen(request, timeout=10) as response:
            return response.status, response.read().decode()

    def uses_rabbitmq(self):
        """Return whether the service uses this machine's RabbitMQ."""
        return RABBITMQ_URL in self.environment.values()

    def delete_queue(self):
        """Delete the service's queue on this machine's RabbitMQ, with its messages."""
        if self.uses_rabbitmq():
            with connect_to_rabbitmq() as connection:
                for queue in (
                    self.folder.name,
                    f"{self.folder.name}.mail",
                    f"{self.folder.name}.failed",
                ):
                    connection.channel().queue_delete(queue)

    def close(self):
        for process in self.processes:
            process.kill_all()
        self.delete_queue()


@pytest.fixture(scope="session")
def environments(shared_folder):
    """The folder of the services' virtual environments, which all test processes share."""
    folder = shared_folder / "environments"
    folder.mkdir(exist_ok=True)
    return folder


def copy_database(name, copy):
    """Copy a database of this machine's PostgreSQL, in place of one that has the copy's name."""
    with psycopg.connect(f"{POSTGRES_SERVER}/postgres", autocommit=True) as connection:
        connection.execute(f"DROP DATABASE IF EXISTS {copy}")
        connection.execute(f"CREATE DATABASE {copy} TEMPLATE {name}")


@pytest.fixture(scope="session", autouse=True)
def database_copies(shared_folder):
    """The folder with the names of databases that are copied; the last process deletes them."""
    names = shared_folder / "copies"
    names.mkdir(exist_ok=True)
    with (shared_folder / "copies.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)
        yield names
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return
        for name in names.iterdir():
            with psycopg.connect(f"{POSTGRES_SERVER}/postgres", autocommit=True) as connection:
                connection.execute(f"DROP DATABASE IF EXISTS {name.name} WITH (FORCE)")


@pytest.fixture
def make_service(uv, environments, database_copies, shared_folder):
    """A function that returns a ``Service``. Its processes are killed after the test.

    A service's queues have its name: tests with the same one take turns.
    """
    services = []
    names = set()
    with contextlib.ExitStack() as stack:

        def make(folder, **variables):
            service = Service(folder, uv, environments, **variables)
            service.copies = database_copies
            if service.uses_rabbitmq() and folder.name not in names:
                lock = stack.enter_context((shared_folder / f"{folder.name}.queues").open("w"))
                fcntl.flock(lock, fcntl.LOCK_EX)
                names.add(folder.name)
            service.delete_queue()  # An interrupted run may have left messages.
            services.append(service)
            return service

        yield make
        for service in services:
            service.close()


@pytest.fixture(scope="session")
def run_cookiecutter(tmp_path_factory):
    """A function that runs cookiecutter in an empty folder and returns folder and process."""

    def run(*arguments, stdin=None, environment=None):
        environment = dict(environment or {})
        template = environment.pop("TEMPLATE", str(get_template()))
        folder = tmp_path_factory.mktemp("cli")
        home = tmp_path_factory.mktemp("home")
        done = subprocess.run(
            [sys.executable, "-m", "cookiecutter", template, *arguments],
            cwd=folder,
            env=clean_environment(HOME=home, PWD=folder, COLUMNS=200) | environment,
            input=stdin,
            stdin=None if stdin else subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        return folder, done

    return run
