"""Compare the processes of a generated service with those of another Django project.

    uv run bench/compare.py PATH [options]
    uv run bench/compare.py --release VERSION [--runs N]

The other project is in a folder, or the default service of an earlier release. Generates the default service, and measures both in turns: the size of the installed packages,
`manage.py check`, migrations of an empty database, the time from the start of web until the first
response, the memory of all processes (PSS), and requests per second with 32 clients. Prints a
table in Markdown with medians.

PATH is the folder of a project whose packages are installed and whose static files are
collected. Its commands run there. `{port}` in them, and in the values of `--env`, is a free port,
and `{database}` an empty PostgreSQL database (127.0.0.1:5432, user postgres, trust). They get
PORT, DATABASE_URL, CELERY_BROKER_URL and REDIS_URL too. Needs RabbitMQ (127.0.0.1:5672, guest),
Redis (127.0.0.1:6379), and wrk for requests.
"""

import argparse
import contextlib
import http.client
import os
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from dataclasses import dataclass, field
from pathlib import Path

from digest import ROOT, SERVER, generate_service

#: How long processes run before their memory is measured, in seconds.
SETTLE_SECONDS = 12

#: How long requests are sent, in seconds, how often, and by how many clients.
REQUEST_SECONDS = 2
REQUEST_RUNS = 5
CLIENTS = 32

#: Prints how many packages are installed, and their size on the disk in bytes.
SIZE = """
import importlib.metadata, os, sysconfig
folder = sysconfig.get_path("purelib")
blocks = sum(
    os.lstat(os.path.join(path, name)).st_blocks
    for path, _, names in os.walk(folder) for name in names
)
print(len(list(importlib.metadata.distributions(path=[folder]))), blocks * 512)
"""

#: A view that says "ok", as the first URL of a project.
VIEW = """
from django.http import HttpResponse

urlpatterns.insert(0, path("ok", lambda request: HttpResponse("ok")))
"""

#: Django alone: one view, no middleware.
BARE = """
from django.conf import settings
from django.core.wsgi import get_wsgi_application
from django.http import HttpResponse
from django.urls import path

settings.configure(ROOT_URLCONF=__name__, ALLOWED_HOSTS=["*"], SECRET_KEY="benchmark")
urlpatterns = [path("ok", lambda request: HttpResponse("ok"))]
application = get_wsgi_application()
"""

#: The web server of the service, for Django alone
GUNICORN = "-m gunicorn bare --worker-class gthread --workers 2 --threads 4 --bind 127.0.0.1:{port}"


@dataclass
class Project:
    """A Django project, by its commands."""

    name: str
    folder: Path
    python: str
    commands: dict[str, str]
    manage: str = "manage.py"
    url: str = "/"
    variables: dict[str, str] = field(default_factory=dict)

    def environment(self, port=8000, database=""):
        """Return the environment variables of its processes."""
        inherited = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
        url = f"{SERVER}/{database}"
        given = {
            name: value.replace("{port}", str(port)).replace("{database}", url)
            for name, value in self.variables.items()
        }
        return {
            **inherited,
            "PORT": str(port),
            "DATABASE_URL": url,
            "CELERY_BROKER_URL": "amqp://guest:guest@127.0.0.1:5672//",
            "REDIS_URL": "redis://127.0.0.1:6379/0",
            **given,
        }

    def run(self, *arguments, database=""):
        """Run Python until it ends, and return its output."""
        done = subprocess.run(
            [self.python, *arguments],
            cwd=self.folder,
            env=self.environment(database=database),
            capture_output=True,
            text=True,
        )
        if done.returncode:
            sys.exit(f"{self.name}: {shlex.join(arguments)} failed:\n{done.stdout}{done.stderr}")
        return done.stdout

    @contextlib.contextmanager
    def started(self, process, port, database):
        """Run one of its processes."""
        command = [
            part.replace("{port}", str(port)) for part in shlex.split(self.commands[process])
        ]
        with tempfile.TemporaryFile("w+") as output:
            running = subprocess.Popen(
                command,
                cwd=self.folder,
                env=self.environment(port, database),
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                yield running
                if running.poll() is not None:
                    output.seek(0)
                    sys.exit(f"{self.name}: {process} ended:\n{output.read()}")
            finally:
                with contextlib.suppress(ProcessLookupError):
                    running.terminate()
                try:
                    running.wait(20)
                except subprocess.TimeoutExpired:
                    os.killpg(running.pid, signal.SIGKILL)
                    running.wait()


@contextlib.contextmanager
def database():
    """Yield the name of an empty database, which is dropped after."""
    import psycopg

    name = f"bench_{uuid.uuid4().hex[:12]}"
    with psycopg.connect(f"{SERVER}/postgres", autocommit=True) as server:
        server.execute(f"CREATE DATABASE {name}")
        try:
            yield name
        finally:
            server.execute(f"DROP DATABASE {name} WITH (FORCE)")


def get_port():
    """Return a free port."""
    from tests.servers import free_port

    return free_port()


# Measurements: each takes a project and the name of a migrated database


def measure_packages(project, database):
    """Return the number of installed packages."""
    return int(project.run("-c", SIZE).split()[0])


def measure_size(project, database):
    """Return the size of the installed packages on the disk, with bytecode, in MiB."""
    return int(project.run("-c", SIZE).split()[1]) / 2**20


def measure_check(project, database):
    """Return how long the system checks take, in seconds."""
    start = time.perf_counter()
    project.run(project.manage, "check", database=database)
    return time.perf_counter() - start


def measure_migrate(project, _):
    """Return how long the migrations of an empty database take, in seconds."""
    with globals()["database"]() as empty:
        start = time.perf_counter()
        project.run(project.manage, "migrate", database=empty)
        return time.perf_counter() - start


def measure_start(project, database):
    """Return how long it takes from the start of web until a response with status 200."""
    port = get_port()
    start = time.perf_counter()
    with project.started("web", port, database) as process:
        while get_status(port, project.url) != 200:
            if process.poll() is not None or time.perf_counter() - start > 60:
                sys.exit(f"{project.name}: web does not respond to {project.url} with status 200")
            time.sleep(0.005)
        return time.perf_counter() - start


def get_status(port, url):
    """Return the status of a response, or None without one."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request("GET", url, headers=HEADERS)
        return connection.getresponse().status
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()


#: As the proxy of a platform sends them
HEADERS = {"Host": "localhost", "X-Forwarded-Proto": "https", "X-Forwarded-For": "192.0.2.1"}


def measure_memory(project, database):
    """Return the memory of all processes, in MiB: what they share counts once."""
    port = get_port()
    with contextlib.ExitStack() as stack:
        running = [
            stack.enter_context(project.started(process, port, database))
            for process in project.commands
        ]
        time.sleep(SETTLE_SECONDS)
        for _ in range(8):
            get_status(port, project.url)
        sums = [sum(map(get_pss, get_descendants(process.pid))) for process in running]
    parts = zip(project.commands, sums, strict=True)
    print(project.name, *(f"{name} {mib:.0f} MiB" for name, mib in parts), file=sys.stderr)
    return sum(sums)


def get_descendants(pid):
    """Yield the process id and those of all child processes."""
    yield pid
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            yield from get_descendants(int(child))


def get_pss(pid):
    """Return the proportional set size of a process, in MiB."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return int(re.search(r"^Pss:\s+(\d+) kB$", text, re.M)[1]) / 1024


def measure_requests(project, database):
    """Return how many requests per second web responds to, all with status 200.

    It is the best of some runs: one process of web may get most of the connections of a run.
    """
    port = get_port()
    headers = [part for name, value in HEADERS.items() for part in ("-H", f"{name}: {value}")]
    with project.started("web", port, database):
        deadline = time.monotonic() + 60
        while get_status(port, project.url) != 200 and time.monotonic() < deadline:
            time.sleep(0.05)
        rates = []
        for _ in range(REQUEST_RUNS + 1):  # The first one warms up.
            url = f"http://127.0.0.1:{port}{project.url}"
            command = ["wrk", "-t1", f"-c{CLIENTS}", f"-d{REQUEST_SECONDS}s", *headers, url]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            if "Non-2xx" in done.stdout or "Socket errors" in done.stdout:
                sys.exit(f"{project.name}: requests failed:\n{done.stdout}")
            rates.append(float(re.search(r"Requests/sec:\s+([\d.]+)", done.stdout)[1]))
    return max(rates[1:])


#: The measurements by what a row says, with the format of a value
MEASUREMENTS = {
    "production packages": (measure_packages, "{:.0f}"),
    "their size with bytecode, MiB": (measure_size, "{:.0f}"),
    "`check`, seconds": (measure_check, "{:.2f}"),
    "`migrate`, empty PostgreSQL, seconds": (measure_migrate, "{:.2f}"),
    "web, start to first 200, seconds": (measure_start, "{:.2f}"),
    "memory (PSS): web with 2 workers, worker with 2, beat, MiB": (measure_memory, "{:.0f}"),
    f"requests per second, {CLIENTS} clients": (measure_requests, "{:.0f}"),
}


def compare(projects, names, runs):
    """Measure projects in turns and return the medians, by measurement and project.

    `names` are those of the measurements for each project; a project may lack some.
    """
    medians = {}
    with contextlib.ExitStack() as stack:
        databases = {}
        for project in projects:
            if project.commands.keys() - {"web"}:
                databases[project.name] = name = stack.enter_context(database())
                project.run(project.manage, "migrate", database=name)
        for measurement, (function, _) in MEASUREMENTS.items():
            measured = [project for project in projects if measurement in names[project.name]]
            values = {project.name: [] for project in measured}
            for _ in range(runs):
                for project in measured:
                    values[project.name].append(function(project, databases.get(project.name, "")))
            for name, results in values.items():
                print(f"{measurement}: {name}: {results}", file=sys.stderr, flush=True)
                medians[measurement, name] = statistics.median(results)
    return medians


def format_table(medians, first, second):
    """Return a table in Markdown that compares two projects."""
    lines = [f"| figure | {first} | {second} | ratio |", "|---|---|---|---|"]
    for measurement, (_, text) in MEASUREMENTS.items():
        ours, theirs = medians.get((measurement, first)), medians.get((measurement, second))
        if ours is not None and theirs is not None:
            values = f"{text.format(ours)} | {text.format(theirs)} | {ours / theirs:.2f}"
            lines.append(f"| {measurement} | {values} |")
    return "\n".join(lines)


@contextlib.contextmanager
def generated_project(release=None, **variables):
    """Yield the default service as a project, with a view that says "ok".

    ``release`` is the version of the template's release, if it is not the template of now.
    """
    name = f"release {release}" if release else "this template"
    with generate_service(release) as service:
        python = f"{service.project}/.venv/bin/python"
        with Path(service.project, "prayer_room_api", "urls.py").open("a") as urls:
            urls.write(VIEW)
        given = ("DJANGO_MODE", "SECRET_KEY", "RABBITMQ_URL")
        project = Project(
            name,
            Path(service.project),
            python,
            {
                process: f"{python} manage.py prodserver {process}"
                for process in ("web", "worker", "beat")
            },
            url="/ok",
            variables={
                **{variable: service.environment[variable] for variable in given},
                "ALLOWED_HOSTS": "localhost",
                "BIND_HOST": "127.0.0.1",
                **variables,
            },
        )
        project.run("manage.py", "collectstatic", "--noinput", "-v0", database="postgres")
        yield project


@contextlib.contextmanager
def bare_project(python):
    """Yield Django alone with the packages of a service, its web server and no middleware."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "bare.py").write_text(BARE)
        command = f"{python} {GUNICORN}"
        yield Project("bare Django", Path(folder), python, {"web": command}, url="/ok")


def main():
    """Measure the project that the arguments describe, and print the table."""
    sys.path.insert(0, str(ROOT))
    from tests.generate import get_releases

    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "path", metavar="PATH", type=Path, nargs="?", help="the folder of the project"
    )
    parser.add_argument(
        "--release", metavar="VERSION", choices=get_releases(), help="an earlier release instead"
    )
    parser.add_argument("--name", default="the other project", help="its name in the table")
    parser.add_argument("--python", default=".venv/bin/python", help="its Python interpreter")
    parser.add_argument("--manage", default="manage.py", help="the script with its commands")
    for process in ("web", "worker", "beat"):
        command = f"{{python}} manage.py prodserver {process}"
        parser.add_argument(f"--{process}", default=command, help=f"default: {command}")
    parser.add_argument("--url", default="/", help="a URL that it answers with status 200")
    parser.add_argument(
        "--env", metavar="NAME=VALUE", action="append", default=[], help="a variable; repeatable"
    )
    parser.add_argument("--runs", type=int, default=5, help="of each measurement, default 5")
    options = parser.parse_args()
    if not shutil.which("wrk"):
        parser.error("wrk is missing: install it with the package manager of the system")
    if bool(options.path) == bool(options.release):
        parser.error("give either PATH or --release")
    project = other_project(parser, options)
    with generated_project() as ours, project as other:
        projects = [ours, other]
        names = {project.name: set(MEASUREMENTS) for project in projects}
        medians = compare(projects, names, options.runs)
        print(format_table(medians, ours.name, other.name))


def other_project(parser, options):
    """Return the context manager of the project that the arguments describe."""
    if options.release:
        return generated_project(options.release)
    folder = options.path.resolve()
    # Not resolved further: the link tells Python which environment it is in.
    python = str(folder / options.python)
    if not Path(python).exists():
        parser.error(f"{python} does not exist: install the project, or name its --python")
    project = Project(
        options.name,
        folder,
        python,
        {
            name: getattr(options, name).replace("{python}", python)
            for name in ("web", "worker", "beat")
        },
        options.manage,
        options.url,
        dict(pair.split("=", 1) for pair in options.env),
    )
    return contextlib.nullcontext(project)


if __name__ == "__main__":
    main()
