"""System checks of what would fail only at run time: schedules and processes."""

from collections.abc import Sequence
from typing import Any

from celery import current_app
from django.apps import AppConfig
from django.conf import settings
from django.core import checks, mail
from django.core.exceptions import ImproperlyConfigured
from django.db.migrations.exceptions import CircularDependencyError, NodeNotFoundError
from django.db.migrations.loader import MigrationLoader

from . import schema
from .database import find_pooler
from .schedules import REQUIRED_MIGRATION, CreateSchedule, DeleteSchedule, get_migrations


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
        plan = list(get_migrations(loader))
    except (NodeNotFoundError, CircularDependencyError) as error:
        return [checks.Error(str(error), id="schedules.E003")]
    schedules: dict[str, tuple[CreateSchedule, str]] = {}
    messages: list[checks.CheckMessage] = []
    for key, migration in plan:
        name = ".".join(key)
        operations = [
            operation for operation in migration.operations if isinstance(operation, CreateSchedule)
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


@checks.register(deploy=True)
def check_schema(
    app_configs: Sequence[AppConfig] | None, **kwargs: Any
) -> list[checks.CheckMessage]:
    """Report that the file with the schema of the API is missing."""
    path = schema.get_path()
    if path.exists():
        return []
    hint = "Run uv run manage.py openapi, and commit the file."
    return [checks.Error(f"{path.name} is missing.", hint=hint, id="openapi.E001")]


@checks.register
def check_processes(
    app_configs: Sequence[AppConfig] | None, **kwargs: Any
) -> list[checks.CheckMessage]:
    """Report the processes that cannot start."""
    from . import processes

    messages: list[checks.CheckMessage] = []
    for name, process in settings.PRODUCTION_PROCESSES.items():
        for check, id_ in (
            (processes.check_backend, "processes.E001"),
            (processes.check_app, "processes.E002"),
            (processes.check_arguments, "processes.E003"),
        ):
            try:
                check(process)
            except Exception as error:
                problem = str(error).partition("\n")[0]
                messages.append(checks.Error(f"Process {name!r}: {problem}", id=id_))
                break
    return messages
