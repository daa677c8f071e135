"""Processes: all run with ``python manage.py prodserver``; ``check`` reports invalid ones."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time

import pytest
from django.core.management import CommandError

from prodserver_ops.conf import processes
from prodserver_ops.console import checks
from prodserver_ops.console.checks import check_processes
from prodserver_ops.console.processes import find_file_problems
from prodserver_ops.development import reloading
from prodserver_ops.management.commands.prodserver import Command

WORKER = "django_prodserver.backends.workers.celery.CeleryWorker"
BEAT = "django_prodserver.backends.workers.celery.CeleryBeat"
APP = "dummy.celery_app"


def test_default_processes_are_web_worker_and_beat(settings):
    default = processes.get_default(settings)
    assert default == settings.PRODUCTION_PROCESSES
    assert {name: process["BACKEND"] for name, process in default.items()} == {
        "web": "prodserver_ops.web.gunicorn.Server",
        "worker": WORKER,
        "beat": BEAT,
    }


def test_arguments_of_celery_add_to_the_usual_ones_or_replace_them(settings):
    worker = processes.worker(settings, queues="reports", concurrency=1, max_tasks_per_child=9)
    assert worker["APP"] == APP
    assert worker["ARGS"].items() > {"queues": "reports", "concurrency": 1}.items()
    assert worker["ARGS"]["max-tasks-per-child"] == 9
    assert worker["ARGS"]["pool"] == settings.WORKER_POOL
    assert processes.beat(settings, max_interval=9)["ARGS"]["max-interval"] == 9


def test_list_prints_the_processes(settings, capsys):
    Command().run_from_argv(["manage.py", "prodserver", "--list"])
    assert capsys.readouterr().out.split() == list(settings.PRODUCTION_PROCESSES)


@pytest.mark.parametrize(
    ("name", "problem"), [("no-such", "unknown process 'no-such'"), (None, "no process name")]
)
def test_invalid_name_is_reported_with_the_valid_ones(settings, name, problem):
    settings.PRODUCTION_PROCESSES = {"one": {}, "two": {}}
    with pytest.raises(CommandError, match=f"{problem}; the processes are: one, two"):
        Command().start_process(name)


class TestCheck:
    @pytest.fixture
    def report(self, settings):
        """Return a function that returns the messages of the check for a process."""

        def check(**process):
            settings.PRODUCTION_PROCESSES = {"sample": process}
            return [f"{error.id} {error.msg}" for error in checks.check_processes(None)]

        return check

    def test_processes_of_the_service_are_valid(self):
        assert checks.check_processes(None) == []

    @pytest.mark.parametrize(
        ("process", "message"),
        [
            ({}, "processes.E001 Process 'sample': BACKEND is missing."),
            (
                {"BACKEND": "no.such.Backend"},
                "processes.E001 Process 'sample': BACKEND cannot be imported: No module named 'no'",
            ),
            (
                {"BACKEND": "pathlib.Path"},
                "processes.E001 Process 'sample': BACKEND 'pathlib.Path' is not a process backend.",
            ),
            ({"BACKEND": WORKER}, "processes.E002 Process 'sample': APP is missing."),
            (
                {"BACKEND": BEAT, "APP": "no.such.app"},
                "processes.E002 Process 'sample': APP cannot be imported: No module named 'no'",
            ),
            (
                {"BACKEND": WORKER, "APP": "pathlib.Path"},
                "processes.E002 Process 'sample': APP 'pathlib.Path' is not a Celery app.",
            ),
        ],
    )
    def test_invalid_backend_or_app_is_an_error_that_names_the_process(
        self, report, process, message
    ):
        assert report(**process) == [message]

    @pytest.mark.parametrize(
        ("backend", "arguments", "problem"),
        [
            (WORKER, {"concurency": 2}, "No such option"),
            (WORKER, {"concurrency": "two"}, "Invalid value for '-c' / '--concurrency'"),
            (WORKER, {"loglevel": "LOUD"}, "Invalid value for '-l' / '--loglevel'"),
            (WORKER, {"pool": "none"}, "Invalid value for '-P' / '--pool'"),
            (BEAT, {"concurrency": 2}, "No such option"),
            (BEAT, {"max-interval": "x"}, "Invalid value for '--max-interval'"),
        ],
    )
    def test_invalid_argument_is_an_error_that_names_the_process(
        self, report, capsys, backend, arguments, problem
    ):
        (message,) = report(BACKEND=backend, APP=APP, ARGS=arguments)
        assert message.startswith("processes.E003 Process 'sample': ARGS: ")
        assert problem in message
        assert capsys.readouterr() == ("", "")

    @pytest.mark.parametrize(
        ("backend", "arguments"),
        [
            (WORKER, {"queues": "a,b", "hostname": "mail@%h", "without-gossip": None}),
            (BEAT, {"scheduler": "celery.beat:PersistentScheduler"}),
            ("django_prodserver.backends.base.BaseServerBackend", {"any": "thing"}),
        ],
    )
    def test_valid_arguments_are_accepted(self, report, backend, arguments):
        assert report(BACKEND=backend, APP=APP, ARGS=arguments) == []


class TestReload:
    def test_packages_beside_manage_py_are_watched(self, settings, tmp_path):
        settings.BASE_DIR = tmp_path
        for folder in ("first", "second", "docs"):
            (tmp_path / folder).mkdir()
        for package in ("first", "second"):
            (tmp_path / package / "__init__.py").touch()
        assert sorted(reloading.get_packages()) == [tmp_path / "first", tmp_path / "second"]

    def test_missing_watchfiles_is_reported(self, settings, monkeypatch):
        monkeypatch.setattr(reloading, "watchfiles", None)
        name = next(iter(settings.PRODUCTION_PROCESSES))
        with pytest.raises(CommandError, match="--reload needs the package watchfiles"):
            Command().start_process(name, reload=True)

    @pytest.mark.parametrize("make", [processes.gunicorn, processes.granian, processes.uvicorn])
    def test_port_in_use_is_reported(self, settings, make):
        settings.BIND_HOST = "127.0.0.1"
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = settings.PORT = server.getsockname()[1]
            process = make(settings)
            with pytest.raises(CommandError) as caught:
                reloading.check_port(reloading.get_address(process))
        assert str(caught.value) == (
            f"Port {port} is already in use. "
            "Stop the process that uses it, or set PORT to another port."
        )
        reloading.check_port(reloading.get_address(process))

    def test_process_without_a_port_needs_no_free_port(self, settings):
        assert reloading.get_address(processes.worker(settings)) is None
        assert (
            reloading.get_address(processes.gunicorn(settings, bind="unix:/run/web.sock")) is None
        )

    def test_prompt_is_shown_without_the_end_of_its_line(self, monkeypatch, capfdbinary):
        code = "print('a line\\n(Pdb) ', end='', flush=True); import time; time.sleep(60)"
        monkeypatch.setattr(reloading, "get_command", lambda name: [sys.executable, "-c", code])
        child = reloading.Child("web")
        while len(child.lines) < 2:
            time.sleep(0.01)
        child.stop(timeout=30)
        assert list(child.lines) == ["a line\n", "(Pdb) \n"]
        assert capfdbinary.readouterr().out == b"a line\n(Pdb) \n"

    @pytest.mark.parametrize(
        ("ignored", "status"), [(False, -signal.SIGTERM), (True, -signal.SIGKILL)]
    )
    def test_process_that_ignores_sigterm_is_killed(self, monkeypatch, ignored, status):
        code = "import signal, time; "
        code += "signal.signal(signal.SIGTERM, signal.SIG_IGN); " if ignored else ""
        code += "print('ready', flush=True); time.sleep(60)"
        monkeypatch.setattr(reloading, "get_command", lambda name: [sys.executable, "-c", code])
        child = reloading.Child("web")
        while not child.lines:
            time.sleep(0.01)
        child.stop(timeout=0.2 if ignored else 30)
        assert child.popen.returncode == status


class TestFiles:
    """Procfile and app.json name the same processes as the settings."""

    PROCFILE = "web: python manage.py prodserver web\nworker: ./manage.py worker worker\n"

    @pytest.fixture
    def problems(self, settings, tmp_path):
        """Return a function that writes files and returns the problems of three processes."""
        settings.BASE_DIR = tmp_path
        settings.PRODUCTION_PROCESSES = {
            "web": processes.gunicorn(settings),
            "worker": processes.worker(settings),
            "loop": processes.command(settings, "loop"),
        }

        def problems(**files):
            for name, text in files.items():
                (tmp_path / name.replace("_", ".")).write_text(text)
            return list(find_file_problems())

        return problems

    def test_service_without_them_has_no_problem(self, problems):
        assert problems() == []

    def test_manage_py_that_a_release_command_cannot_run(self, problems, tmp_path):
        script = tmp_path / "manage.py"
        script.write_text("#!/usr/bin/env python\r\n")
        script.chmod(0o644)
        assert problems(Procfile="release: python manage.py migrate\n") == []
        (lines, _), (mode, hint) = problems(Procfile="release: ./manage.py migrate\n")
        assert "line breaks of Windows" in lines
        assert "not executable" in mode
        assert "chmod +x manage.py" in hint
        script.write_text("#!/usr/bin/env python\n")
        script.chmod(0o755)
        assert problems() == []

    def test_procfile_that_does_not_use_the_command_is_not_compared(self, problems):
        assert problems(Procfile="web: gunicorn x.wsgi\n", app_json="{}") == []

    def test_process_that_no_line_starts(self, problems):
        assert problems(Procfile=self.PROCFILE) == [
            (
                "Procfile does not start the process 'loop' of PRODUCTION_PROCESSES.",
                "Write loop: python manage.py prodserver loop",
            )
        ]
        assert problems(Procfile=f"{self.PROCFILE}loop: ./loop.sh\n") == []

    def test_line_that_starts_no_process(self, problems):
        more = "loop: ./loop.sh\nbeat: python manage.py prodserver beat\n"
        assert problems(Procfile=self.PROCFILE + more) == [
            (
                "Procfile starts 'beat', which PRODUCTION_PROCESSES does not name.",
                "Name 'beat' there, or remove the line from Procfile.",
            )
        ]

    def test_app_json(self, problems):
        names = ("web", "worker", "beat", "removed")
        checks = {name: [] for name in names}
        formation = {name: {"quantity": int(name != "removed")} for name in names}
        found = problems(app_json=json.dumps({"healthchecks": checks, "formation": formation}))
        assert [problem.partition("app.json ")[2] for problem, _ in found] == [
            "does not start the process 'loop' of PRODUCTION_PROCESSES.",
            "has no health check of the process 'loop'.",
            "starts 'beat', which PRODUCTION_PROCESSES does not name.",
        ]
        assert '"-m", "prodserver_ops.heartbeat", "loop"' in found[1][1]

    def test_check_reports_them(self, problems):
        problems(Procfile=self.PROCFILE)
        errors = [error for error in check_processes() if error.id == "processes.E005"]
        assert [error.hint for error in errors] == ["Write loop: python manage.py prodserver loop"]

    def test_command_that_does_not_exist_is_an_error(self, problems):
        (error,) = [error for error in check_processes() if error.id == "processes.E003"]
        assert error.msg == "Process 'loop': ARGS: COMMAND 'loop' is not a management command"


class TestFourthProcess:
    """A project with a worker and a loop, and without web and beat."""

    FILES = {
        "config.py": """
from pathlib import Path

BASE_DIR = Path(__file__).parent
DEBUG = USE_TZ = True
SECRET_KEY = "x"
SILENCED_SYSTEM_CHECKS = [f"admin.E{number}" for number in (403, 406, 408, 409, 410)]
INSTALLED_APPS = ["sample", "django.contrib.admin", "django.contrib.auth", "prodserver_ops",
    "django.contrib.contenttypes", "django_celery_beat", "django_prodserver"]
DATABASES = {"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": BASE_DIR / "db"}}
from prodserver_ops.conf import add_settings, processes

settings = add_settings(globals(), package="sample")
PRODUCTION_PROCESSES = {
    "worker": processes.worker(settings),
    "loop": processes.command(settings, "loop", seconds=1),
}
""",
        "manage.py": """
import os
from django.core.management import execute_from_command_line
import sys

os.environ["DJANGO_SETTINGS_MODULE"] = "config"
execute_from_command_line(sys.argv)
""",
        "sample/__init__.py": """
from prodserver_ops.worker.app import CeleryApp

celery_app = CeleryApp("sample")
celery_app.config_from_object("django.conf:settings", namespace="CELERY")
celery_app.autodiscover_tasks()
""",
        "sample/management/commands/loop.py": """
import time
from pathlib import Path
from django.core.management.base import BaseCommand

class Command(BaseCommand):
    def add_arguments(self, parser):
        parser.add_argument("--seconds", type=int)

    def handle(self, *args, seconds, **options):
        try:
            while True:
                time.sleep(seconds)
        finally:
            Path("ended").touch()
""",
    }

    def test_is_run_watched_and_stopped(self, tmp_path):
        for name, text in self.FILES.items():
            file = tmp_path / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)

        def run(*arguments):
            return subprocess.run(
                [sys.executable, "manage.py", *arguments],
                cwd=tmp_path,
                env={"PATH": os.environ["PATH"]},
                capture_output=True,
                text=True,
                timeout=300,
                check=False,
            )

        assert run("migrate").returncode == 0
        done = run("smoke", "--timeout=120")
        assert re.match(r"worker, loop: ready after [\d.]+ seconds; stopped ", done.stdout), done
        # SIGTERM let the command end.
        assert (tmp_path / "ended").exists()
        checks = json.loads(run("doctor", "--json").stdout)["checks"]
        assert checks["loop"] == {
            "status": "error",
            "message": "no heartbeat",
            "next": "python manage.py prodserver loop",
        }
        assert "beat" not in checks
        assert run("heartbeat", "loop").returncode == 1
