"""The web servers: ``check`` reports arguments that they would reject."""

from datetime import timedelta
from unittest.mock import Mock

import pytest
from django.utils.module_loading import import_string
from gunicorn.config import Config

from prodserver_ops.conf import processes
from prodserver_ops.console import checks
from prodserver_ops.web.gunicorn import Logger

SERVERS = ["gunicorn", "granian", "uvicorn"]


def get_backend(server):
    return f"prodserver_ops.web.{server}.Server"


def get_address(process):
    return import_string(process["BACKEND"])(**process).get_address()


@pytest.fixture
def report(settings):
    """Return a function that returns the check's messages for a server with these arguments."""

    def check(server, arguments):
        process = {"BACKEND": get_backend(server), "ARGS": arguments}
        settings.PRODUCTION_PROCESSES = {"sample": process}
        return [f"{error.id} {error.msg}" for error in checks.check_processes(None)]

    return check


@pytest.mark.parametrize(
    ("server", "arguments", "problem"),
    [
        ("gunicorn", {"blind": "127.0.0.1:8000"}, "unrecognized arguments: --blind"),
        ("gunicorn", {"workers": "two"}, "--workers"),
        ("gunicorn", {"workers": -1}, "--workers"),
        ("gunicorn", {"preload": None, "threads": None}, "--threads"),
        ("gunicorn", {"worker-class": "no.such.Worker"}, "no.such.Worker"),
        ("gunicorn", {"logger-class": "no.such.Logger"}, "no.such.Logger"),
        ("granian", {"hots": "127.0.0.1"}, "hots"),
        ("granian", {"workers": "two"}, "workers: 'two' is not an integer"),
        ("granian", {"port": None}, "port: None is not an integer"),
        ("granian", {"log_level": "loud"}, "loud"),
        ("uvicorn", {"hots": "127.0.0.1"}, "hots"),
        ("uvicorn", {"workers": "two"}, "workers: 'two' is not an integer"),
        ("uvicorn", {"port": None}, "port: None is not an integer"),
        ("uvicorn", {"log_level": "loud"}, "loud"),
    ],
)
def test_invalid_argument_is_an_error_that_names_the_process(
    report, capsys, server, arguments, problem
):
    (message,) = report(server, arguments)
    assert message.startswith("processes.E003 Process 'sample': ARGS: ")
    assert problem in message
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("server", "arguments"),
    [
        ("gunicorn", {"bind": "[::1]:8000", "preload": None, "worker-class": "gthread"}),
        ("granian", {"address": "::1", "port": 8000, "workers": 2}),
        ("uvicorn", {"host": "::1", "port": 8000, "workers": 2}),
    ],
)
def test_valid_arguments_are_accepted(report, server, arguments):
    assert report(server, arguments) == []


@pytest.mark.parametrize(
    ("server", "arguments"),
    [
        ("gunicorn", {}),
        ("gunicorn", {"bind": "unix:/run/web.sock"}),
        ("granian", {}),
        ("granian", {"uds": "/run/web.sock", "port": 8000}),
        ("uvicorn", {}),
        ("uvicorn", {"uds": "/run/web.sock", "port": 8000}),
        ("uvicorn", {"fd": 3, "port": 8000}),
    ],
)
def test_process_that_listens_on_a_socket_has_no_port(server, arguments):
    assert get_address({"BACKEND": get_backend(server), "ARGS": arguments}) is None


@pytest.mark.parametrize("server", SERVERS)
def test_web_listens_where_the_settings_say(settings, server):
    process = getattr(processes, server)(settings)
    assert process["BACKEND"] == get_backend(server)
    assert get_address(process) == (settings.BIND_HOST, settings.PORT)


@pytest.mark.parametrize("server", SERVERS)
def test_arguments_of_the_library_are_valid(report, settings, server):
    assert report(server, getattr(processes, server)(settings)["ARGS"]) == []


def test_arguments_add_to_the_usual_ones_or_replace_them(settings):
    arguments = processes.gunicorn(settings, workers=7, max_requests=1000)["ARGS"]
    assert (arguments["workers"], arguments["max-requests"]) == (7, 1000)
    assert arguments["threads"] == settings.WEB_THREADS
    assert processes.granian(settings, workers=7)["ARGS"]["workers"] == 7
    assert processes.uvicorn(settings, timeout_keep_alive=9)["ARGS"]["timeout_keep_alive"] == 9


def test_gunicorn_does_not_log_requests_again(capfd):
    config = Config()
    config.set("accesslog", "-")
    response = Mock(status="200 OK", sent=1, headers=[])
    request = Mock(headers=[("USER-AGENT", "hunter2")])
    environ = {"REQUEST_METHOD": "GET", "RAW_URI": "/?token=hunter2", "SERVER_PROTOCOL": "HTTP/1.1"}
    Logger(config).access(response, request, environ, timedelta(seconds=1))
    assert "hunter2" not in "".join(capfd.readouterr())
