"""Processes: all run under ``python manage.py prodserver``; ``check`` finds what cannot start."""

import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from django.core.management import CommandError

from prodserver_ops.console import checks
from prodserver_ops.web import web_backend
from prodserver_ops.web import web_server
from prodserver_ops.management.commands import prodserver
from prodserver_ops.management.commands.prodserver import Command

WORKER = "django_prodserver.backends.workers.celery.CeleryWorker"
BEAT = "django_prodserver.backends.workers.celery.CeleryBeat"
APP = "{{ cookiecutter.project_slug }}.celery_app"


def test_each_process_of_the_procfile_is_in_the_settings(settings):
    procfile = (Path(settings.BASE_DIR) / "Procfile").read_text()
    names = re.findall(r"^\w[\w-]*: python manage.py prodserver (\S+)$", procfile, re.M)
    assert names
    assert set(names) <= set(settings.PRODUCTION_PROCESSES)


def test_web_listens_where_the_settings_say(settings):
    address = web_backend.get_address(settings.PRODUCTION_PROCESSES["web"])
    assert address == (settings.BIND_HOST, settings.PORT)


def test_list_prints_the_processes(settings, capsys):
    Command().run_from_argv(["manage.py", "prodserver", "--list"])
    assert capsys.readouterr().out.split() == list(settings.PRODUCTION_PROCESSES)


@pytest.mark.parametrize(
    ("name", "problem"), [("no-such", "unknown process 'no-such'"), (None, "no process named")]
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
        assert sorted(prodserver.get_packages()) == [tmp_path / "first", tmp_path / "second"]

    def test_missing_watchfiles_is_reported(self, settings, monkeypatch):
        monkeypatch.setattr(prodserver, "watchfiles", None)
        name = next(iter(settings.PRODUCTION_PROCESSES))
        with pytest.raises(CommandError, match="needs the development dependencies: run uv sync"):
            Command().start_process(name, reload=True)

    def test_port_in_use_is_reported(self, settings):
        settings.BIND_HOST = "127.0.0.1"
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = settings.PORT = server.getsockname()[1]
            process = {"ARGS": web_server.get_web_arguments(settings)}
            with pytest.raises(CommandError) as caught:
                prodserver.check_port(process)
        assert str(caught.value) == (
            f"Port {port} is already in use. "
            "Stop the process that uses it, or set PORT to another port."
        )
        prodserver.check_port(process)

    def test_process_without_a_port_needs_no_free_port(self):
        prodserver.check_port({})

    @pytest.mark.parametrize(
        ("ignored", "status"), [(False, -signal.SIGTERM), (True, -signal.SIGKILL)]
    )
    def test_process_that_ignores_sigterm_is_killed(self, ignored, status):
        code = "import signal, time; "
        code += "signal.signal(signal.SIGTERM, signal.SIG_IGN); " if ignored else ""
        code += "print('ready', flush=True); time.sleep(60)"
        with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as child:
            child.stdout.readline()
            prodserver.stop(child, timeout=1)
        assert child.returncode == status
