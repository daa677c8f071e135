"""Fixtures, and the servers that tests use.

=============================================  ==================================================
Command, in the folder ``library``             What it tests
=============================================  ==================================================
``uv run pytest``                              with SQLite and a broker in memory; the modules of
                                               the other brokers with their servers, if these run
``DATABASE_URL=URL uv run pytest``             with PostgreSQL, such as
                                               ``postgres://postgres@127.0.0.1:5432/postgres``
``uv run pytest --broker=rabbitmq``            with a server as the broker of all tests;
                                               or ``redis``, or ``postgresql``
``uv run pytest --require-services``           as above, and fails if one of the servers, which
                                               are those in services.py, is not running
``uv run pytest -n0 tests/test_locks.py``      one module, in one process
=============================================  ==================================================

Each process of pytest-xdist has its own database, part of a broker and range of ports, so that
several runs may take place at the same time.
"""

import importlib.util
import os
import shutil
import signal
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import Mock

import pytest
import services
from celery import current_app
from celery.contrib.testing.worker import TestWorkController, start_worker
from celery.worker import state
from django.conf import settings
from django.contrib.auth import get_user_model
from django.db import connection
from django.db.models import CharField
from kombu.transport import memory

from prodserver_ops.api import throttles
from prodserver_ops.worker import record
from prodserver_ops.worker.app import Task

#: How many ports each test process has, and the first one of all. Test runs at the same time need
#: other ports: set ``TEST_FIRST_PORT``.
PORTS, FIRST_PORT = 100, int(os.environ.get("TEST_FIRST_PORT", "20000"))


def pytest_addoption(parser):
    parser.addoption(
        "--broker", choices=list(services.URLS), help="the broker of all tests, a server"
    )
    parser.addoption(
        "--require-services",
        action="store_true",
        help="fail instead of skip if a server is not running",
    )


def pytest_configure(config):
    # A shell lets what it starts in the background ignore SIGINT, and its child processes too.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # Without pytest-xdist the settings were read before this file.
    is_alone = not config.getoption("numprocesses") and "PYTEST_XDIST_WORKER" not in os.environ
    if config.getoption("--broker") and is_alone:
        raise pytest.UsageError("--broker needs pytest-xdist; use -n1 for one process")
    config.parts = []


def pytest_xdist_auto_num_workers(config):
    """Use one worker more than there are cores, because some tests wait."""
    return (os.cpu_count() or 1) + 1


def pytest_xdist_setupnodes(config, specs):
    """Give each process its ports and its part of the broker, before it reads the settings."""
    name = config.getoption("--broker")
    for number, spec in enumerate(specs):
        spec.env["PORT"] = str(FIRST_PORT + PORTS * number)
        if name:
            try:
                spec.env["CELERY_BROKER_URL"] = services.create(name, number)
            except services.Unavailable as error:
                raise pytest.UsageError(str(error)) from None
            config.parts.append(spec.env["CELERY_BROKER_URL"])


def pytest_unconfigure(config):
    for url in config.parts:
        services.delete(config.getoption("--broker"), url)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport():
    """Escape lone surrogates in what a test has logged, which pytest-xdist cannot send."""
    report = yield
    report.sections = [
        (name, text.encode(errors="backslashreplace").decode()) for name, text in report.sections
    ]
    return report


@pytest.fixture(scope="session")
def use_servers(request):
    """A context manager that skips a test, or fails it, if a server is not running."""

    @contextmanager
    def use():
        try:
            yield
        except services.Unavailable as error:
            if request.config.getoption("--require-services"):
                pytest.fail(str(error))
            pytest.skip(str(error))

    return use


@pytest.fixture
def load_trial(use_servers, monkeypatch):
    """A function that returns the module of a trial, which needs servers."""

    def load(trial, *names):
        with use_servers():
            for name in names:
                services.check(name)
        path = Path(__file__).parents[2] / "trials" / f"{trial}.py"
        monkeypatch.syspath_prepend(str(path.parent))
        spec = importlib.util.spec_from_file_location(f"trial_{trial}", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture(scope="session")
def make_part(use_servers, worker_id):
    """A function that returns the URL of a part of a server; skips if it is not running.

    Tests use queues whose names no other test has, and delete them.
    """
    urls = {}

    def make(name):
        if name not in urls:
            with use_servers():
                is_shared = name == services.RABBITMQ
                urls[name] = services.share() if is_shared else services.create(name, worker_id)
        return urls[name]

    yield make
    for name in urls.keys() - {services.RABBITMQ}:
        services.delete(name, urls[name])


class Worker(TestWorkController):
    """A worker that often checks whether it has to stop, even if the broker sends nothing."""

    def on_consumer_ready(self, consumer):
        if self.hub:
            self.hub.call_repeatedly(0.1, lambda: None)
        super().on_consumer_ready(consumer)


@pytest.fixture
def run_worker(monkeypatch):
    """A function that returns the context manager of a worker in a thread."""
    # Check more often for messages, and whether the worker has to stop.
    monkeypatch.setattr(memory.Transport, "polling_interval", 0.02)
    drain_events = memory.Transport.drain_events
    monkeypatch.setattr(
        memory.Transport,
        "drain_events",
        lambda transport, connection, timeout=None: drain_events(
            transport, connection, min(timeout, 0.1) if timeout else timeout
        ),
    )

    # It would configure logging again, without the handler of caplog.
    monkeypatch.setattr("celery.fixups.django.DjangoWorkerFixup.django_setup", lambda fixup: None)
    # The thread would use the database of later tests.
    with monkeypatch.context() as patch:
        patch.setattr(record.threading, "Thread", Mock())
        monkeypatch.setattr(record, "_recorder", record.Recorder())

    def run(app=current_app):
        return start_worker(
            app, WorkController=Worker, perform_ping_check=False, shutdown_timeout=60
        )

    return run


@pytest.fixture(autouse=True)
def _forget_requests():
    """Forget the requests of earlier tests, which throttles would count."""
    throttles.counts.clear()


@pytest.fixture(autouse=True)
def _forget_messages():
    """Forget the messages of earlier tests, which a worker would hold, or discard as revoked."""
    state.reset_state()


@pytest.fixture(scope="session", autouse=True)
def _delete_locks():
    yield
    shutil.rmtree(settings.LOCK_DIR, ignore_errors=True)


@pytest.fixture(scope="session")
def django_db_setup(django_db_setup, django_db_blocker, django_db_keepdb):
    """Keep the rows that migrations create for the next run with ``--reuse-db``.

    Tests with transactions empty all tables.
    """
    yield
    contents = getattr(connection, "_test_serialized_contents", None)
    if django_db_keepdb and contents:
        with django_db_blocker.unblock():
            connection.creation.deserialize_db_from_string(contents)
            connection.close()


@pytest.fixture
def make_user(db):
    """Return a function that creates a user, whatever the user model is."""

    def make(name, **fields):
        model = get_user_model()
        values = {
            field.name: name
            for field in model._meta.concrete_fields
            if field.unique and isinstance(field, CharField)
        }
        values[model.get_email_field_name()] = f"{name}@example.com"
        user = model(**values | fields)
        user.set_password("secret")
        user.save()
        return user

    return make


@pytest.fixture
def queue(monkeypatch):
    """Return the list of queued tasks, as (name, arguments, options), without a broker."""
    queued = []

    def apply_async(task, args=None, kwargs=None, **options):
        queued.append((task.name, tuple(args or ()), options))

    monkeypatch.setattr(Task, "apply_async", apply_async)
    return queued


@pytest.fixture
def sample_templates(settings):
    """Make ``email/sample.txt`` and ``email/sample.html`` of this folder available."""
    folder = Path(__file__).parent / "templates"
    settings.TEMPLATES = [
        {**backend, "DIRS": [*backend.get("DIRS", ()), folder]} for backend in settings.TEMPLATES
    ]
