"""The README of the library, followed literally in an empty folder with its own environment."""

import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import suppress
from pathlib import Path

import kombu
import psycopg
import pytest

pytestmark = pytest.mark.slow

LIBRARY = Path(__file__).parents[2] / "{{cookiecutter.project_slug}}" / "vendor" / "prodserver-ops"

#: The first line of a block that is a file, and where it goes in the file.
PATH = re.compile(
    r"# (?P<path>[\w./]+)(, (?P<where>at the end|(before|instead of) add_settings\(\)))?\n"
)

#: Timeout of a command, and of the processes to be ready, in seconds.
TIMEOUT = 120


def get_blocks(*titles):
    """Return the language and the text of each block of code in these sections, in order."""
    sections = re.split(r"^## (.+)\n", (LIBRARY / "README.md").read_text(), flags=re.M)
    texts = dict(zip(sections[1::2], sections[2::2], strict=True))
    return [
        block
        for title in titles
        for block in re.findall(r"^```(\w+)\n(.*?)^```$", texts[title], re.M | re.S)
    ]


def find_free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


class Project:
    """A project in an empty folder, with an environment of its own."""

    def __init__(self, folder, wheel):
        self.folder, self.wheel = folder, wheel.name
        (folder / wheel.name).symlink_to(wheel)
        # For `uv venv`
        (folder / ".python-version").write_text(f"{sys.base_prefix}/bin/python3\n")
        names = ("DJANGO_", "UV_PROJECT", "UV_PYTHON", "PYTEST", "PYTHON")
        self.environment = {
            name: value for name, value in os.environ.items() if not name.startswith(names)
        } | {
            # uv may not be on the PATH; `uv run` sets UV to where it is.
            "PATH": f"{folder}/.venv/bin:{os.environ['PATH']}:{Path(os.environ.get('UV', '')).parent}",
            # For `uv pip` too: with UV_PYTHON it would install into the environment of the tests.
            "VIRTUAL_ENV": f"{folder}/.venv",
            "PORT": str(find_free_port()),
        }

    def run(self, command):
        """Run a command of a shell, and return its output."""
        done = subprocess.run(
            ["bash", "-ec", command],
            cwd=self.folder,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=TIMEOUT,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}"
        return done.stdout

    def follow(self, *titles, start=True):
        """Write the files and run the commands of these sections; return the last output.

        ``start`` is whether to run the commands that start the processes too.
        """
        output = ""
        for language, text in get_blocks(*titles):
            if "manage.py smoke" in text and not start:
                continue
            if language == "sh":
                output = self.run(text)
            elif match := PATH.match(text):
                self.write(match["path"], match["where"], text[match.end() :])
        return output

    def write(self, path, where, text):
        """Write a file, or a part of one."""
        file = self.folder / path
        if where is None:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
            return
        old = file.read_text()
        if where == "at the end":
            file.write_text(f"{old}\n{text}")
            return
        call = re.search(r"^add_settings\(.*\n", old, re.M)
        end = call.start() if where.startswith("before") else call.end()
        file.write_text(old[: call.start()] + text + old[end:])

    def run_processes(self):
        """Start each process with its line in the Procfile; wait until all work, and stop them."""
        lines = re.findall(r"^(\w+): (.+)$", (self.folder / "Procfile").read_text(), re.M)
        commands = dict(lines)
        assert list(commands) == ["web", "worker", "beat", "release"]
        self.run(commands.pop("release"))
        processes = {
            name: subprocess.Popen(
                ["bash", "-c", f"exec {command}"],
                cwd=self.folder,
                env=self.environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            for name, command in commands.items()
        }
        try:
            self.wait_until_ready(processes)
            self.run("python manage.py doctor")
            for process in processes.values():
                process.terminate()
            for name, process in processes.items():
                output, _ = process.communicate(timeout=TIMEOUT)
                assert process.returncode == 0, f"{name}:\n{output.decode()}"
        finally:
            for process in processes.values():
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                process.communicate()

    def wait_until_ready(self, processes):
        url = f"http://127.0.0.1:{self.environment['PORT']}/health/ready?deep"
        deadline = time.monotonic() + TIMEOUT
        answer = ""
        while time.monotonic() < deadline:
            assert [name for name, process in processes.items() if process.poll()] == []
            try:
                with urllib.request.urlopen(url, timeout=10):
                    return
            except urllib.error.HTTPError as error:
                answer = error.read().decode()
            except OSError as error:
                answer = str(error)
            time.sleep(0.2)
        pytest.fail(f"not ready: {answer}")


@pytest.fixture(scope="session")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    uv = os.environ.get("UV", "uv")
    command = [uv, "build", "--quiet", "--wheel", "--python", sys.executable]
    subprocess.run([*command, "--out-dir", folder, LIBRARY], check=True)
    return next(folder.glob("*.whl"))


@pytest.fixture
def project(wheel, tmp_path):
    return Project(tmp_path, wheel)


def test_new_project(project):
    assert "a schedule was run" in project.follow("Install", "Start a new project")
    project.run_processes()


#: A project that exists: settings with another name, a user model, migrations, a schedule.
SHOP = {
    "manage.py": """
import os
import sys

from django.core.management import execute_from_command_line

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "shop.config")
execute_from_command_line(sys.argv)
""",
    "shop/__init__.py": """
from .celery import app as celery_app
""",
    "shop/celery.py": """
import os

from celery import Celery
from celery.schedules import crontab

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "shop.config")

app = Celery("shop")
app.config_from_object("django.conf:settings", namespace="CELERY")
app.autodiscover_tasks()
BEAT_SCHEDULE
""",
    "shop/config.py": """
import os

BASE_DIR = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
DEBUG = True
SECRET_KEY = "secret"
INSTALLED_APPS = [
    "django.contrib.admin",
    "django.contrib.auth",
    "django.contrib.contenttypes",
    "django.contrib.messages",
    "django.contrib.sessions",
    "shop",
]
MIDDLEWARE = [
    "django.contrib.sessions.middleware.SessionMiddleware",
    "django.middleware.common.CommonMiddleware",
    "django.contrib.auth.middleware.AuthenticationMiddleware",
    "django.contrib.messages.middleware.MessageMiddleware",
]
TEMPLATES = [
    {
        "BACKEND": "django.template.backends.django.DjangoTemplates",
        "APP_DIRS": True,
        "OPTIONS": {
            "context_processors": [
                "django.template.context_processors.request",
                "django.contrib.auth.context_processors.auth",
                "django.contrib.messages.context_processors.messages",
            ],
        },
    },
]
ROOT_URLCONF = "shop.urls"
WSGI_APPLICATION = "shop.wsgi.application"
AUTH_USER_MODEL = "shop.Customer"
DEFAULT_AUTO_FIELD = "django.db.models.AutoField"
USE_TZ = True
TIME_ZONE = "Europe/Berlin"
DATABASES = {
    "default": {
        "ENGINE": "django.db.backends.sqlite3",
        "NAME": os.path.join(BASE_DIR, "shop.sqlite3"),
    },
}
IS_STAFF = lambda user: user.is_staff  # noqa: E731
""",
    "shop/wsgi.py": """
import os

from django.core.wsgi import get_wsgi_application

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "shop.config")
application = get_wsgi_application()
""",
    "shop/urls.py": """
urlpatterns = []
""",
    "shop/models.py": """
from django.contrib.auth.models import AbstractBaseUser
from django.db import models


class Customer(AbstractBaseUser):
    number = models.CharField(max_length=20, unique=True)

    USERNAME_FIELD = "number"
""",
    "shop/tasks.py": """
from celery import shared_task


@shared_task
def send_report(period):
    pass


@shared_task
def expire_orders():
    pass
""",
}


def test_existing_project(project):
    beat_schedule = next(
        text for _, text in get_blocks("Add it to an existing project") if "beat_schedule" in text
    )
    for path, text in SHOP.items():
        project.write(path, None, text.replace("BEAT_SCHEDULE", beat_schedule).lstrip())
    project.follow("Install")
    # The project as it was, whose migrations are applied.
    project.write("shop/migrations/__init__.py", None, "")
    project.run("python manage.py makemigrations shop && python manage.py migrate")
    assert "a schedule was run" in project.follow("Add it to an existing project")
    assert project.run("python manage.py schedules --created").splitlines() == [
        "deliveries-resume: as created",
        "records-delete: as created",
        "tasks-resume: as created",
        "report-daily: as created",
        "orders-expire: as created",
    ]
    procfile = next(text for _, text in get_blocks("Start a new project") if "release:" in text)
    project.write("Procfile", None, procfile)
    project.run_processes()


@pytest.fixture
def postgres_url():
    """The URL of a new database in the PostgreSQL server of the tests."""
    name = f"readme_{os.getpid()}"
    try:
        server = psycopg.connect("postgres://postgres@127.0.0.1:5432", autocommit=True)
    except psycopg.OperationalError:
        pytest.skip("needs PostgreSQL on 127.0.0.1:5432")
    with server:
        server.execute(f"CREATE DATABASE {name}")
        yield f"postgres://postgres@127.0.0.1:5432/{name}"
        server.execute(f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture
def rabbitmq_url():
    """The URL of the RabbitMQ server of the tests; the project's queues are deleted after."""
    url = "amqp://guest:guest@127.0.0.1:5672//"
    with kombu.Connection(url, connect_timeout=2) as connection:
        try:
            connection.connect()
        except OSError:
            pytest.skip("needs RabbitMQ on 127.0.0.1:5672")
        yield url
        for name in ("mysite", "mysite.mail", "mysite.failed"):
            with suppress(connection.channel_errors):
                connection.channel().queue_delete(name)
        connection.channel().exchange_delete("mysite")


def test_production(project, postgres_url, rabbitmq_url):
    project.environment["DEBUG"] = "on"
    project.follow("Install")
    project.run(f'uv pip install "./{project.wheel}[postgresql,uvicorn]"')
    project.follow("Start a new project", "Production", "Processes", start=False)
    project.environment |= {
        "DEBUG": "off",
        "SECRET_KEY": secrets.token_urlsafe(64),
        "ALLOWED_HOSTS": "www.example.com",
        "DATABASE_URL": postgres_url,
    }
    with pytest.raises(AssertionError, match="CELERY_BROKER_URL: got nothing, expected amqp://"):
        project.run("python manage.py check")
    project.environment["CELERY_BROKER_URL"] = rabbitmq_url
    project.run("python manage.py check --deploy --fail-level ERROR")
    project.run("python manage.py migrate --noinput")
    assert "web, worker, mail, beat: ready" in project.run("python manage.py smoke")
