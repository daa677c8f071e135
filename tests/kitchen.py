"""Services that recipes were applied to, for tests and trials.

All of them share one environment, which has the packages of all recipes, and copies of one migrated
database. Processes run with the embedded broker, so that several services can run at the same time.
"""

import os
import re
import shlex
import shutil
import subprocess
import uuid
from urllib.parse import urlsplit
from urllib.request import urlopen

import amqp
import psycopg
from cookiecutter.main import cookiecutter

from tests.conftest import POSTGRES_SERVER, SECRET_KEY, Process, clean_environment, read_procfile
from tests.generate import get_template
from tests.recipes import get_path, read_recipes
from tests.servers import free_port

#: The package of the services, and so the prefix of their queues.
SLUG = "kitchen"

#: Their domain.
DOMAIN = "kitchen.example.com"

#: What follows may use a client behind a proxy with HTTPS, and a user.
PRELUDE = """
import django
django.setup()
from django.conf import settings
from django.contrib.auth import get_user_model
from django.core.management import call_command
from django.test import Client
from django.test.utils import setup_test_environment
call_command("check", deploy=True, fail_level="WARNING")
setup_test_environment()
settings.PASSWORD_HASHERS = ["django.contrib.auth.hashers.MD5PasswordHasher"]  # It is fast.
def make_client(address="192.0.2.1"):
    headers = {"x-forwarded-proto": "https", "x-forwarded-for": address}
    return Client(headers={"host": settings.ALLOWED_HOSTS[0], **headers})
client = make_client()
PASSWORD = "a-long-password-1"
User = get_user_model()
anna = User.objects.filter(username="anna").first() or User.objects.create_superuser(
    "anna", "anna@example.com", PASSWORD
)
"""


class CommandFailed(Exception):
    """A command failed; its output is the message."""


class Kitchen:
    """The service without recipes, its environment, and the database that others are copied from."""

    def __init__(self, folder, uv):
        self.folder = folder
        self.uv = uv
        self.project = folder / SLUG
        self.database = f"recipes_{uuid.uuid5(uuid.NAMESPACE_URL, str(folder)).hex[:12]}"
        self.recipes = read_recipes(get_path(self.project)) if self.project.exists() else {}

    def prepare(self):
        """Generate, install and migrate the service."""
        self.folder.mkdir(exist_ok=True)
        os.environ["COOKIECUTTER_CONFIG"] = os.devnull
        context = {"setup": False, "project_slug": SLUG, "domain_name": DOMAIN}
        cookiecutter(
            str(get_template()), no_input=True, extra_context=context, output_dir=self.folder
        )
        self.recipes = read_recipes(get_path(self.project))
        recipes = self.recipes.values()
        wanted = {each for recipe in recipes for each in recipe.requirements}
        dish = Dish(self.project, self)
        pyproject = dish.folder / "pyproject.toml"
        text = pyproject.read_text()
        dish.run([self.uv, "add", "--quiet", "--no-sync", *sorted(wanted)])
        dish.run([self.uv, "sync", "--quiet"])
        pyproject.write_text(text)
        (dish.folder / "uv.lock").unlink()
        create_database(self.database)
        dish.run("python manage.py collectstatic --noinput", **dish.production)
        dish.run("python manage.py migrate --noinput", **dish.production)
        dish.run("python manage.py migrate --noinput")

    def serve(self, folder, *titles):
        """Return a copy of the service with these recipes applied, and a database of its own."""
        shutil.copytree(
            self.project,
            folder,
            ignore=shutil.ignore_patterns(".venv", "staticfiles", "__pycache__"),
        )
        (folder / ".venv").symlink_to(self.project / ".venv")
        shutil.copytree(self.project / "staticfiles", folder / "staticfiles", copy_function=os.link)
        dish = Dish(folder, self)
        for title in titles:
            self.recipes[title].apply(folder, dish.run_unless_installed)
        create_database(dish.database, self.database)
        return dish

    def close(self):
        """Drop the database."""
        drop_database(self.database)


class Dish:
    """A service in a folder, with its environment variables and its processes."""

    def __init__(self, folder, kitchen):
        self.folder = folder
        self.kitchen = kitchen
        self.processes = []
        self.port = free_port()
        is_first = folder == kitchen.project
        self.database = kitchen.database if is_first else f"dish_{uuid.uuid4().hex[:12]}"
        scripts = folder / ".venv" / "bin"
        self.environment = clean_environment(PORT=self.port)
        self.environment["PATH"] = f"{scripts}{os.pathsep}{self.environment['PATH']}"
        self.production = {
            "DJANGO_MODE": "prod",
            "SECRET_KEY": SECRET_KEY,
            "DATABASE_URL": f"{POSTGRES_SERVER}/{self.database}",
            # Nothing is queued there.
            "RABBITMQ_URL": "amqp://127.0.0.1:1/",
            "DJANGO_SETTINGS_MODULE": f"{SLUG}.settings",
        }

    def run_unless_installed(self, command):
        """Run a command of a recipe; its packages are installed."""
        if command.startswith("uv run "):
            command = re.sub(r"^uv run (?=\S+\.py)", "python ", command)
        if not command.startswith(("uv add ", "uv remove ")):
            self.run(["sh", "-c", command])

    def run(self, command, status=0, **variables):
        """Run a command in the folder; return its output, or raise CommandFailed for another status."""
        arguments = shlex.split(command) if isinstance(command, str) else command
        done = subprocess.run(
            arguments,
            cwd=self.folder,
            env=self.environment | variables,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        if done.returncode != status:
            name = arguments[:2] if arguments[1:2] == ["-c"] else arguments
            raise CommandFailed(f"{name} exited with status {done.returncode}:\n{done.stdout}")
        return done.stdout

    def succeeds(self, command):
        """Return whether a command exits with status 0."""
        try:
            self.run(command)
        except CommandFailed:
            return False
        return True

    def ask(self, code, **variables):
        """Run the checks for a deploy, and then code, in production mode; return the output."""
        return self.run(["python", "-c", PRELUDE + code], **self.production | variables)

    def is_ready(self, path="/health/ready"):
        """Return whether the web process responds to a health check with 200."""
        try:
            with urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=10):
                return True
        except OSError:
            return False

    def delete_queues(self, url, package=SLUG):
        """Delete the queues on a RabbitMQ, with their messages."""
        virtual_host = urlsplit(url).path.removeprefix("/")
        with amqp.Connection("127.0.0.1:5672", virtual_host=virtual_host) as connection:
            for suffix in ("", ".mail", ".failed", ".reports"):
                connection.channel().queue_delete(package + suffix)

    def start(self, name, variables=None):
        """Start a process of the Procfile, in development mode unless the variables say more."""
        command = shlex.split(read_procfile(self.folder / "Procfile")[name])
        log = self.folder.parent / f"{self.folder.name}-{name}-{len(self.processes)}.log"
        process = Process(command, self.folder, self.environment | (variables or {}), log)
        self.processes.append(process)
        return process

    def close(self):
        """Kill the processes, and drop the database."""
        for process in self.processes:
            process.kill_all()
        if self.database != self.kitchen.database:
            drop_database(self.database)


def create_database(name, template="template1"):
    """Create a database of this machine's PostgreSQL, as a copy of another one."""
    drop_database(name)
    with psycopg.connect(f"{POSTGRES_SERVER}/postgres", autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name} TEMPLATE {template}")


def drop_database(name):
    """Drop a database of this machine's PostgreSQL, if it exists."""
    with psycopg.connect(f"{POSTGRES_SERVER}/postgres", autocommit=True) as connection:
        connection.execute(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")
