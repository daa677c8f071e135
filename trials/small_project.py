"""A small project with the library, its processes, and a mail server, for trials.

Run such a trial with ``uv run --directory library python ../trials/NAME.py``.
"""

import contextlib
import os
import secrets
import shutil
import signal
import socketserver
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "library" / "tests"))

import psycopg
import services

TESTS = Path(services.__file__).parent

SETTINGS = """
from dummy import settings
from prodserver_ops import conf

class Settings(settings.Settings):
    INSTALLED_APPS = [*settings.Settings.INSTALLED_APPS, "{package}"]

class ProdSettings(conf.ProductionDefaults, Settings):
    pass

__getattr__, __dir__ = conf.use(Settings)
"""


class Project:
    """The project in a folder, its database and its processes."""

    def __init__(self, folder, database, broker, package, files, **variables):
        self.folder, self.database = Path(folder), database
        path = self.folder / package
        path.mkdir()
        files = {"__init__": "", "settings": SETTINGS.format(package=package), **files}
        for name, text in files.items():
            (path / f"{name}.py").write_text(text)
        self.environment = os.environ | {
            "DJANGO_MODE": "prod",
            "DJANGO_SETTINGS_MODULE": f"{package}.settings",
            "PYTHONPATH": os.pathsep.join([str(self.folder), str(TESTS)]),
            "SECRET_KEY": secrets.token_urlsafe(50),
            "DATABASE_URL": database,
            "CELERY_BROKER_URL": broker,
            "RABBITMQ_URL": broker,
            "LOG_FORMAT": "text",
            **variables,
        }
        self.processes = []

    def call(self, *arguments, prefix=(), **variables):
        """Run a command of Django; return the completed process."""
        return subprocess.run(
            [*prefix, sys.executable, "-m", "django", *arguments],
            env=self.environment | variables,
            cwd=self.folder,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )

    def run(self, *arguments, **variables):
        """Run a command of Django; return what it prints."""
        done = self.call(*arguments, **variables)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def shell(self, code, **kwargs):
        return self.run("shell", "--no-imports", "-v0", "-c", code, **kwargs)

    def start(self, name, stdout=None, prefix=(), **variables):
        """Start a process in a group of its own; ``prefix`` is a command that starts another."""
        with (self.folder / f"{name}.log").open("a") as log:
            process = subprocess.Popen(
                [*prefix, sys.executable, "-m", "django", "prodserver", name],
                env=self.environment | variables,
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=stdout or log,
                stderr=stdout or subprocess.STDOUT,
                start_new_session=True,
            )
        self.processes.append(process)
        return process

    def get_log(self, name):
        """Return what the processes of that name have logged."""
        return (self.folder / f"{name}.log").read_text()

    def stop(self):
        """Stop all processes with SIGTERM, and wait."""
        for process in self.processes:
            process.send_signal(signal.SIGTERM)
        for process in self.processes:
            process.wait(60)
        self.processes.clear()

    def close(self):
        """Kill all processes."""
        for process in self.processes:
            # Another process may have the number of one that has ended.
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()

    def query(self, sql):
        """Return the rows of a query; wait while the server restarts."""
        for attempt in range(60):
            try:
                with psycopg.connect(self.database) as connection:
                    return connection.execute(sql).fetchall()
            except psycopg.OperationalError:
                if attempt == 59:
                    raise
                time.sleep(1)


@contextlib.contextmanager
def make(project_class, broker, database=None):
    """Yield a project on a broker, migrated, with its own database unless one is given."""
    with contextlib.ExitStack() as stack:
        if database is None:
            database = services.create(services.POSTGRESQL, "trial")
            stack.callback(services.delete, services.POSTGRESQL, database)
        url = database
        if broker != services.POSTGRESQL:
            url = services.create(broker, "trial")
            stack.callback(services.delete, broker, url)
        folder = tempfile.mkdtemp()
        stack.callback(shutil.rmtree, folder)
        project = project_class(folder, database, url)
        stack.callback(project.close)
        project.run("migrate", "--run-syncdb", "-v0")
        yield project


class Mailbox(socketserver.ThreadingTCPServer):
    """An SMTP server that counts the Message-IDs that it accepts, each after ``delay`` seconds."""

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, delay=0.0):
        super().__init__(("127.0.0.1", 0), Session)
        self.delay = delay
        self.messages = Counter()
        self.lock = threading.Lock()
        self.port = self.server_address[1]
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def count_repeated(self):
        """Return how many e-mails were accepted more than once."""
        return sum(count - 1 for count in list(self.messages.values()))


class Session(socketserver.StreamRequestHandler):
    """A connection to the mail server."""

    def reply(self, text):
        self.wfile.write(f"{text}\r\n".encode())

    def handle(self):
        self.reply("220 trial")
        for line in self.rfile:
            match line[:4].upper():
                case b"DATA":
                    self.reply("354 go on")
                    self.read_message()
                case b"QUIT":
                    return self.reply("221 bye")
                case _:
                    self.reply("250 ok")

    def read_message(self):
        key = ""
        for line in iter(self.rfile.readline, b".\r\n"):
            if not line:
                return  # The client has left.
            if line.lower().startswith(b"message-id:"):
                key = line.decode().partition(":")[2].strip()
        time.sleep(self.server.delay)
        with self.server.lock:
            self.server.messages[key] += 1
        self.reply("250 ok")


def wait_for(condition, seconds, describe=lambda: ""):
    """Wait until the condition is true; raise an exception after so many seconds."""
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, describe()
        time.sleep(0.2)
