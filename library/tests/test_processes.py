"""Processes: all run with ``python manage.py prodserver``; ``check`` reports invalid ones."""

import signal
import socket
import subprocess
import sys

import pytest
from django.core.management import CommandError

from prodserver_ops.conf import processes
from prodserver_ops.console import checks
from prodserver_ops.management.commands import prodserver
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
        assert sorted(prodserver.get_packages()) == [tmp_path / "first", tmp_path / "second"]

    def test_missing_watchfiles_is_reported(self, settings, monkeypatch):
        monkeypatch.setattr(prodserver, "watchfiles", None)
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
                prodserver.check_port(process)
        assert str(caught.value) == (
            f"Port {port} is already in use. "
            "Stop the process that uses it, or set PORT to another port."
        )
        prodserver.check_port(process)

    def test_process_without_a_port_needs_no_free_port(self, settings):
        prodserver.check_port(processes.worker(settings))
        prodserver.check_port(processes.gunicorn(settings, bind="unix:/run/web.sock"))

    @pytest.mark.parametrize(
        ("ignored", "status"), [(False, -signal.SIGTERM), (True, -signal.SIGKILL)]
    )
    def test_process_that_ignores_sigterm_is_killed(self, ignored, status):
        code = "import signal, time; "
        code += "signal.signal(signal.SIGTERM, signal.SIG_IGN); " if ignored else ""
        code += "print('ready', flush=True); time.sleep(60)"
        with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as child:
            child.stdout.readline()
            prodserver.stop(child, timeout=0.2 if ignored else 30)
        assert child.returncode == status
