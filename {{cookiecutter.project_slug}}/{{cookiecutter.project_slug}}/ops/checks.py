"""System checks of what would fail only at run time: schedules and processes."""

import copy
from collections.abc import Sequence
from typing import Any, NoReturn

from celery import Celery, current_app
from celery.bin.base import CLIContext
from celery.bin.beat import beat
from celery.bin.worker import worker
from click import ClickException
from django.apps import AppConfig
from django.conf import settings
from django.core import checks, mail
from django.core.exceptions import ImproperlyConfigured
from django.db.migrations.exceptions import CircularDependencyError, NodeNotFoundError
from django.db.migrations.loader import MigrationLoader
from django.utils.module_loading import import_string
from django_prodserver.backends.base import BaseProcessBackend
from django_prodserver.backends.servers.gunicorn import GunicornServer
from django_prodserver.backends.workers.celery import CeleryBeat, CeleryWorker
from gunicorn.config import Config
from gunicorn.util import load_class

from .database import find_pooler
from .schedules import REQUIRED_MIGRATION, CreateSchedule, DeleteSchedule


@checks.register
def check_schedules(
    app_configs: Sequence[AppConfig] | None, **kwargs: Any
) -> list[checks.CheckMessage]:
    """Report schedules that cannot run, and migrations of schedules that may run too early."""
    current_app.autodiscover_tasks(force=True)
    # The service's first migration does not exist while makemigrations creates it.
    loader = MigrationLoader(None, load=False, ignore_no_migrations=True)
    try:
        loader.build_graph()
        plan = dict.fromkeys(
            key for leaf in loader.graph.leaf_nodes() for key in loader.graph.forwards_plan(leaf)
        )
    except (NodeNotFoundError, CircularDependencyError) as error:
        return [checks.Error(str(error), id="schedules.E003")]
    schedules: dict[str, tuple[CreateSchedule, str]] = {}
    messages: list[checks.CheckMessage] = []
    for key in plan:
        name = ".".join(key)
        operations = [
            operation
            for operation in loader.graph.nodes[key].operations
            if isinstance(operation, CreateSchedule)
        ]
        schedules |= {operation.name: (operation, name) for operation in operations}
        if operations and REQUIRED_MIGRATION not in loader.graph.forwards_plan(key):
            messages.append(
                checks.Error(
                    f"Migration {name} changes schedules, but an empty database may have no "
                    f"table for them when it runs.",
                    hint="Add this line to its dependencies: "
                    f'("{REQUIRED_MIGRATION[0]}", "{REQUIRED_MIGRATION[1]}"),',
                    obj=name,
                    id="schedules.E002",
                )
            )
    for operation, name in schedules.values():
        problems = operation.get_problems()
        # The task of a deleted schedule may no longer exist.
        if operation.task not in current_app.tasks and not isinstance(operation, DeleteSchedule):
            problems.append(
                f"Schedule {operation.name!r} has a task that is not registered: "
                f"{operation.task!r}."
            )
        messages += [checks.Error(text, obj=name, id="schedules.E001") for text in problems]
    return messages


@checks.register
def check_database(
    app_configs: Sequence[AppConfig] | None, **kwargs: Any
) -> list[checks.CheckMessage]:
    """Report a pooler that does not keep sessions; a database that does not respond is none."""
    if problem := find_pooler():
        return [checks.Error(problem, id="database.E001")]
    return []


@checks.register(deploy=True)
def check_email(
    app_configs: Sequence[AppConfig] | None, **kwargs: Any
) -> list[checks.CheckMessage]:
    """Report a mail server that gets its password in clear, and one that cannot be used."""
    if settings.EMAIL_USE_TLS and settings.EMAIL_USE_SSL:
        problem = "EMAIL_USE_TLS and EMAIL_USE_SSL are both on: the server has one of them."
        return [checks.Error(problem, id="email.E002")]
    if settings.EMAIL_API:
        try:
            mail.get_connection()
        except ImportError as error:
            hint = "Run uv add django-anymail, and see https://anymail.dev/ for the provider."
            return [checks.Error(f"EMAIL_API: {error}.", hint=hint, id="email.E003")]
        except ImproperlyConfigured as error:
            problem = f"EMAIL_API: {' '.join(str(error).split())}"
            return [checks.Error(problem, id="email.E003")]
        return []
    encrypted = settings.EMAIL_USE_TLS or settings.EMAIL_USE_SSL
    if settings.EMAIL_HOST and settings.EMAIL_HOST_USER and not encrypted:
        problem = "The password of the SMTP server is sent in clear."
        hint = "Set EMAIL_USE_TLS=on for STARTTLS, or EMAIL_USE_SSL=on."
        return [checks.Error(problem, hint=hint, id="email.E001")]
    return []


@checks.register
def check_processes(
    app_configs: Sequence[AppConfig] | None, **kwargs: Any
) -> list[checks.CheckMessage]:
    """Report the processes that cannot start."""
    messages: list[checks.CheckMessage] = []
    for name, process in settings.PRODUCTION_PROCESSES.items():
        for check, id_ in (
            (check_backend, "processes.E001"),
            (check_app, "processes.E002"),
            (check_arguments, "processes.E003"),
        ):
            try:
                check(process)
            except Exception as error:
                problem = str(error).partition("\n")[0]
                messages.append(checks.Error(f"Process {name!r}: {problem}", id=id_))
                break
    return messages


def check_backend(process: dict[str, Any]) -> None:
    """Raise an exception if BACKEND is not a backend of django-prodserver."""
    if "BACKEND" not in process:
        raise ValueError("BACKEND is missing.")
    try:
        backend = import_string(process["BACKEND"])
    except Exception as error:
        raise ValueError(f"BACKEND cannot be imported: {error}") from error
    if not (isinstance(backend, type) and issubclass(backend, BaseProcessBackend)):
        raise TypeError(f"BACKEND {process['BACKEND']!r} is not a process backend.")


def check_app(process: dict[str, Any]) -> None:
    """Raise an exception if a Celery process has an APP that is not a Celery app."""
    if not issubclass(import_string(process["BACKEND"]), CeleryWorker):
        return
    if "APP" not in process:
        raise ValueError("APP is missing.")
    try:
        app = import_string(process["APP"])
    except Exception as error:
        raise ValueError(f"APP cannot be imported: {error}") from error
    if not isinstance(app, Celery):
        raise TypeError(f"APP {process['APP']!r} is not a Celery app.")


def check_arguments(process: dict[str, Any]) -> None:
    """Raise an exception if gunicorn or Celery would reject the ARGS."""
    backend_class = import_string(process["BACKEND"])
    if not issubclass(backend_class, GunicornServer | CeleryWorker):
        return
    backend = backend_class(**process)
    arguments = list(backend.prep_server_args())
    try:
        if isinstance(backend, GunicornServer):
            parse_gunicorn_arguments(arguments)
        else:
            parse_celery_arguments(backend, arguments)
    except Exception as error:
        raise ValueError(f"ARGS: {error}") from error


def parse_celery_arguments(backend: CeleryWorker, arguments: list[str]) -> None:
    """Parse the arguments of a worker or beat; raise ValueError for invalid ones."""
    command = copy.copy(beat if isinstance(backend, CeleryBeat) else worker)
    options = backend.app.user_options
    command.params = [*command.params, *options[command.name], *options["preload"]]
    context = CLIContext(app=backend.app, no_color=True, workdir=None)
    try:
        command.make_context(command.name, arguments, obj=context)
    except ClickException as error:
        raise ValueError(error.format_message()) from error


def parse_gunicorn_arguments(arguments: list[str]) -> Config:
    """Return gunicorn's configuration; raise ValueError or RuntimeError for invalid arguments."""
    config = Config()
    parser = config.parser()
    parser.error = _raise_error
    for name, value in vars(parser.parse_args(arguments)).items():
        if name != "args" and value is not None:
            try:
                config.set(name, value)
            except Exception as error:
                raise ValueError(f"--{name.replace('_', '-')}: {error}") from error
    load_class(config.worker_class_str)
    load_class(config.settings["logger_class"].get())
    return config


def _raise_error(message: str) -> NoReturn:
    raise ValueError(message)
