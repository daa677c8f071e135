"""The commands ``server`` and ``worker`` of django-prodserver 3."""

import sys

import pytest
from django.core.management import CommandError, get_commands, load_command_class

from prodserver_ops.console import checks, processes
from prodserver_ops.development import reloading
from prodserver_ops.management.commands import prodserver

PROCESSES = {
    "web": {"BACKEND": "prodserver_ops.web.gunicorn.Server", "ARGS": {}},
    "worker": {
        "BACKEND": "django_prodserver.backends.workers.celery.CeleryWorker",
        "APP": "dummy.celery_app",
    },
    "beat": {
        "BACKEND": "django_prodserver.backends.workers.celery.CeleryBeat",
        "APP": "dummy.celery_app",
    },
}


@pytest.fixture
def run(settings, monkeypatch):
    """Return a function that runs a command up to the start of the process."""
    settings.PRODUCTION_PROCESSES = PROCESSES
    started = []

    def start_process(command, name, **options):
        started.append(name)

    monkeypatch.setattr(prodserver.BaseProcessCommand, "start_process", start_process)
    monkeypatch.setattr(prodserver.logs, "configure", lambda name: None)
    monkeypatch.setattr(sys, "argv", ["manage.py"])

    def run(name, *arguments):
        command = load_command_class(get_commands()[name], name)
        command.run_from_argv(["manage.py", name, *arguments])
        return started

    return run


def test_commands_are_those_of_the_library():
    names = {name: get_commands()[name] for name in ("prodserver", "server", "worker")}
    assert set(names.values()) == {"prodserver_ops"}


@pytest.mark.parametrize(
    ("command", "process"),
    [
        ("prodserver", "web"),
        ("prodserver", "worker"),
        ("prodserver", "beat"),
        ("server", "web"),
        ("worker", "worker"),
        ("worker", "beat"),
    ],
)
def test_each_command_runs_its_processes(run, command, process):
    assert run(command, process) == [process]


@pytest.mark.parametrize(
    ("command", "process", "other"),
    [("server", "worker", "worker"), ("server", "beat", "worker"), ("worker", "web", "server")],
)
def test_process_of_another_kind_is_refused(run, capsys, command, process, other):
    with pytest.raises(SystemExit) as caught:
        run(command, process)
    assert caught.value.code == 1
    assert capsys.readouterr().err == (
        f"CommandError: '{process}' is not a {command} process; "
        f"run: python manage.py {other} {process}\n"
    )


@pytest.mark.parametrize(
    ("command", "names"),
    [
        ("prodserver", ["web", "worker", "beat"]),
        ("server", ["web"]),
        ("worker", ["worker", "beat"]),
    ],
)
def test_list_has_the_processes_of_the_command(run, capsys, command, names):
    run(command, "--list")
    assert capsys.readouterr().out.split() == names


def test_unknown_process_is_reported_with_those_of_the_command(settings):
    settings.PRODUCTION_PROCESSES = PROCESSES
    command = load_command_class("prodserver_ops", "worker")
    with pytest.raises(CommandError, match="unknown process 'x'; the processes are: worker, beat"):
        command.start_process("x")


def test_reload_is_that_of_prodserver(run, monkeypatch):
    reloaded = []
    monkeypatch.setattr(
        reloading.Supervisor, "run", lambda supervisor: reloaded.append(supervisor.name)
    )
    monkeypatch.setattr(reloading, "check_port", lambda address: None)
    assert run("server", "web", "--reload") == []
    assert reloaded == ["web"]


def test_invalid_backend_is_left_to_the_check(settings):
    settings.PRODUCTION_PROCESSES = {"sample": {"BACKEND": "no.such.Backend"}}
    command = load_command_class("prodserver_ops", "server")
    assert command.get_process_names() == ["sample"]


class TestOrder:
    def test_commands_of_django_prodserver_are_an_error(self, settings):
        settings.INSTALLED_APPS = sorted(settings.INSTALLED_APPS, key="django_prodserver".__ne__)
        (error,) = checks.check_processes(None)
        assert (error.id, error.hint) == (
            "processes.E004",
            'Move "prodserver_ops" before "django_prodserver" in INSTALLED_APPS.',
        )

    def test_django_prodserver_need_not_be_an_app(self, settings):
        settings.INSTALLED_APPS = [
            name for name in settings.INSTALLED_APPS if name != "django_prodserver"
        ]
        assert checks.check_processes(None) == []


def test_missing_web_server_is_an_error_with_its_extra(settings, monkeypatch):
    monkeypatch.setattr(processes, "find_spec", lambda name: None)
    monkeypatch.setitem(sys.modules, "prodserver_ops.web.gunicorn", None)
    settings.PRODUCTION_PROCESSES = {"web": PROCESSES["web"]}
    (error,) = checks.check_processes(None)
    assert (error.id, error.hint) == (
        "processes.E001",
        "Install prodserver-ops[gunicorn], or choose another web server.",
    )
