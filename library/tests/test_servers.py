"""The web server: arguments that it would reject are errors of ``check``."""

import pytest

from prodserver_ops.console import checks
from prodserver_ops.web import web_backend
from prodserver_ops.web import web_server


@pytest.fixture
def report(settings):
    """Return a function that returns the check's messages for changed arguments of web."""

    def check(**arguments):
        process = {"BACKEND": web_server.WEB_BACKEND, "ARGS": arguments}
        settings.PRODUCTION_PROCESSES = {"sample": process}
        return [f"{error.id} {error.msg}" for error in checks.check_processes(None)]

    return check


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({"blind": "127.0.0.1:8000"}, "unrecognized arguments: --blind"),
        ({"workers": "two"}, "--workers"),
        ({"workers": -1}, "--workers"),
        ({"preload": None, "threads": None}, "--threads"),
        ({"worker-class": "no.such.Worker"}, "no.such.Worker"),
        ({"logger-class": "no.such.Logger"}, "no.such.Logger"),
    ],
)
def test_invalid_argument_is_an_error_that_names_the_process(report, capsys, arguments, problem):
    (message,) = report(**arguments)
    assert message.startswith("processes.E003 Process 'sample': ARGS: ")
    assert problem in message
    assert capsys.readouterr() == ("", "")


def test_valid_arguments_are_accepted(report):
    assert report(**{"bind": "[::1]:8000", "preload": None, "worker-class": "gthread"}) == []


@pytest.mark.parametrize("arguments", [{}, {"bind": "unix:/run/web.sock"}])
def test_process_that_listens_on_a_socket_has_no_port(arguments):
    assert web_backend.get_address({"ARGS": arguments}) is None
