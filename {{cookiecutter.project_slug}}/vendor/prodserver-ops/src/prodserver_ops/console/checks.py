"""System checks for problems that would otherwise appear only at run time."""

import inspect
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from celery import current_app
from django.apps import apps
from django.conf import settings
from django.contrib.auth import get_user_model
from django.core import checks, mail
from django.core.exceptions import ImproperlyConfigured
from django.core.files.storage import FileSystemStorage
from django.db import connections
from django.db.migrations.exceptions import CircularDependencyError, NodeNotFoundError
from django.db.migrations.loader import MigrationLoader
from django.db.models import FileField, IntegerField
from django.db.utils import OperationalError
from django.urls import get_resolver

from .. import broker
from ..api import schema
from ..conf import verification
from ..core.database import find_pooler
from ..mail.digests import get_digests
from ..scheduling import heartbeats, queues
from ..scheduling.operations import (
    REQUIRED_MIGRATION,
    CreateSchedule,
    DeleteSchedule,
    get_migrations,
)
from ..worker.app import Task, find_faulty_limit, get_usual_limits
from . import retention

Messages = list[checks.CheckMessage]

#: What a task lacks that has another class.
LACKS = "it may run twice, is not tried again if the database is unavailable, and is never given up"

#: How long a check waits for the broker, in seconds.
BROKER_TIMEOUT = 3


@checks.register
def check_classes(app_configs: Any = None, **kwargs: Any) -> Messages:
    """Report classes of settings whose order drops values of the service."""
    messages: Messages = []
    for used in verification.used:
        for mode, dropped, line in verification.find_misordered(used):
            problem = f"{verification.get_place(mode)}: the order of its base classes drops "
            problem += ", ".join(dropped) or "values that the service will set"
            kind, id_ = (checks.Error, "E003") if dropped else (checks.Warning, "W001")
            messages.append(kind(f"{problem}.", hint=f"Write {line}", id=f"settings.{id_}"))
    return messages


@checks.register
def check_env_file(app_configs: Any = None, **kwargs: Any) -> Messages:
    """Report a file ``.env`` of this user, which contains passwords, that other users can read."""
    path = Path(settings.BASE_DIR, ".env")
    if not path.is_file() or path.stat().st_uid != os.getuid() or not path.stat().st_mode & 0o077:
        return []
    hint = f"Run: chmod 600 {path}"
    return [checks.Warning("Other users can read .env.", hint=hint, id="settings.W002")]


@checks.register(deploy=True)
def check_production(app_configs: Any = None, **kwargs: Any) -> Messages:
    """Report what a plain settings module must not have, and Django's own checks do not report."""
    if not hasattr(settings, "ADDED_SETTINGS"):
        return []  # Classes of settings have been verified.
    faults = verification.find_faults(lambda name: getattr(settings, name, None))
    return [
        checks.Error(f"{name} {what}.", hint=f"Write {name} = {value}.", id=id_)
        for id_, name, what, value in faults
        if id_.startswith("settings.")
    ]


@checks.register
def check_schedules(app_configs: Any = None, **kwargs: Any) -> Messages:
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
    messages: Messages = []
    for key, migration in plan:
        name = ".".join(key)
        operations = [
            operation for operation in migration.operations if isinstance(operation, CreateSchedule)
        ]
        schedules |= {operation.name: (operation, name) for operation in operations}
        if operations and REQUIRED_MIGRATION not in loader.graph.forwards_plan(key):
            messages.append(
                checks.Error(
                    f"Migration {name} changes schedules, but on an empty database it may run "
                    f"before their table exists.",
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
def check_queues(app_configs: Any = None, **kwargs: Any) -> Messages:
    """Report tasks and routes with a queue that no process consumes."""
    return [
        checks.Error(
            f"No process in PRODUCTION_PROCESSES consumes the queue {name!r} of {', '.join(users)}.",
            hint=f'Write QUEUES = ["{name}"] in the settings, or another queue there; a worker '
            "with the argument queues consumes only those.",
            id="queues.E001",
        )
        for name, users in queues.find_unconsumed().items()
    ]


@checks.register
def check_classes_of_tasks(app_configs: Any = None, **kwargs: Any) -> Messages:
    """Report tasks whose body a worker does not run, or whose class lacks what is promised."""
    messages: Messages = []
    for name, task in sorted(current_app.tasks.items()):
        if not isinstance(task, Task) and not name.startswith("celery."):
            text = f"The class of the task {name} is not a subclass of prodserver_ops's: {LACKS}."
            hint = "Use prodserver_ops.worker.app.Task in place of celery.Task."
            messages.append(checks.Warning(text, hint=hint, id="tasks.W004"))
        function = inspect.unwrap(task.run)
        if inspect.iscoroutinefunction(function):
            kind, hint = "async", "Write def, and await in async_to_sync() of asgiref."
        elif inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
            kind, hint = "a generator", "Use @resumable_task, or remove yield."
        else:
            continue
        text = f"The task {name} is {kind}: a worker does not run its body."
        messages.append(checks.Error(text, hint=hint, id="tasks.E001"))
    return messages


@checks.register
def check_time_limits(app_configs: Any = None, **kwargs: Any) -> Messages:
    """Report time limits that are invalid, or have no effect."""
    limits: dict[str, tuple[Any, Any]] = {
        f"The task {name}": (task.time_limit, task.soft_time_limit)
        for name, task in sorted(current_app.tasks.items())
    }
    limits["CELERY_TASK_TIME_LIMIT and CELERY_TASK_SOFT_TIME_LIMIT"] = get_usual_limits(current_app)
    messages: Messages = [
        checks.Error(f"{place}: {problem}.", id="tasks.E002")
        for place, pair in limits.items()
        if (problem := find_faulty_limit(*pair))
    ]
    messages += [
        checks.Error(
            f"The argument {option} of the process {name} has no effect: each message has its limits.",
            hint="Set CELERY_TASK_TIME_LIMIT and CELERY_TASK_SOFT_TIME_LIMIT, or the limits of the task.",
            id="tasks.E003",
        )
        for name in heartbeats.get_workers()
        for option in ("time-limit", "soft-time-limit")
        if (settings.PRODUCTION_PROCESSES[name].get("ARGS") or {}).get(option)
    ]
    return messages


@checks.register(deploy=True)
def check_broker(app_configs: Any = None, **kwargs: Any) -> Messages:
    """Report a broker that deletes queued tasks when its memory is full, if it is running."""
    try:
        problem = broker.find_eviction(current_app, BROKER_TIMEOUT)
    except Exception:
        return []  # The command doctor reports it.
    return [checks.Error(f"{problem}.", id="broker.E001")] if problem else []


@checks.register
def check_database(app_configs: Any = None, **kwargs: Any) -> Messages:
    """Report a pooler that does not keep sessions."""
    if problem := find_pooler():
        return [checks.Error(problem, id="database.E001")]
    return []


@checks.register
def check_recipients(app_configs: Any = None, **kwargs: Any) -> Messages:
    """Report a user model that digests cannot divide into parts."""
    key = get_user_model()._meta.pk
    if isinstance(key, IntegerField) or not get_digests():
        return []
    kind = type(key).__name__
    problem = f"AUTH_USER_MODEL: {key} is a {kind}, but digests need an integer as primary key."
    hint = (
        f"Write id = models.BigAutoField(primary_key=True) in the model, and the {kind} as another "
        "field with unique=True; or remove the digests."
    )
    return [checks.Error(problem, hint=hint, id="digests.E001")]


@checks.register
def check_retention(app_configs: Any = None, **kwargs: Any) -> Messages:
    """Report entries of ``KEEP_DAYS`` that have no effect, or delete what is needed."""
    return [
        checks.Error(
            f"KEEP_DAYS: {problem}.",
            hint=f"The names are {', '.join(retention.DEFAULTS)}.",
            id="retention.E001",
        )
        for problem in retention.find_problems()
    ]


@checks.register
def check_time_zone(app_configs: Any = None, **kwargs: Any) -> Messages:
    """Report times without a time zone, which are ambiguous when clocks change."""
    if settings.USE_TZ:
        return []
    problem = "USE_TZ is off, but schedules need times with a time zone."
    hint = "https://docs.djangoproject.com/en/stable/topics/i18n/timezones/#migration-guide"
    return [checks.Error(problem, hint=hint, id="schedules.E004")]


@checks.register(deploy=True)
def check_email(app_configs: Any = None, **kwargs: Any) -> Messages:
    """Report a mail server that receives its password unencrypted, or is misconfigured."""
    if settings.EMAIL_USE_TLS and settings.EMAIL_USE_SSL:
        problem = "EMAIL_USE_TLS and EMAIL_USE_SSL are mutually exclusive, but both are on."
        return [checks.Error(problem, id="email.E002")]
    if getattr(settings, "EMAIL_API", None):
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
        problem = "The password of the SMTP server is sent unencrypted."
        hint = "Set EMAIL_USE_TLS=on for STARTTLS, or EMAIL_USE_SSL=on."
        return [checks.Error(problem, hint=hint, id="email.E001")]
    return []


@checks.register(deploy=True)
def check_tasks(app_configs: Any = None, **kwargs: Any) -> Messages:
    """Report tasks of Django that a request runs itself, or that no process runs."""
    faults = {"immediate": "runs tasks inside requests", "dummy": "does not run tasks"}
    return [
        checks.Warning(
            f"The backend {alias!r} in TASKS {fault}.",
            hint='Set its "BACKEND" to "prodserver_ops.worker.django_tasks.Backend".',
            id="tasks.W003",
        )
        for alias, backend in getattr(settings, "TASKS", {}).items()
        for name, fault in faults.items()
        if backend.get("BACKEND", "").startswith(f"django.tasks.backends.{name}.")
    ]


@checks.register(deploy=True)
def check_media(app_configs: Any = None, **kwargs: Any) -> Messages:
    """Report uploaded files that are lost with their container, or have no folder."""
    fields = [
        str(field)
        for model in apps.get_models()
        for field in model._meta.concrete_fields
        if isinstance(field, FileField) and isinstance(field.storage, FileSystemStorage)
    ]
    if not fields:
        return []
    root = Path(settings.MEDIA_ROOT or settings.BASE_DIR)
    if not settings.MEDIA_ROOT:
        problem = f"MEDIA_ROOT is empty, so {fields[0]} writes files to the working directory."
        hint = 'Write MEDIA_ROOT = "/srv/media" in the settings, the path of a volume.'
        return [checks.Error(problem, hint=hint, id="media.E001")]
    if is_container() and not any(map(os.path.ismount, [root, *root.parents][:-1])):
        problem = f"MEDIA_ROOT is {root}, in a container: each deploy deletes the files of "
        hint = (
            "Mount a volume there, or write a STORAGES in the settings whose default is not the "
            "disk, such as S3; see docs/recipes.md."
        )
        return [checks.Warning(f"{problem}{', '.join(fields)}.", hint=hint, id="media.W001")]
    return []


def is_container() -> bool:
    """Return whether this process runs in a container whose files are lost when it is replaced."""
    files = ("/.dockerenv", "/run/.containerenv")
    variables = ("KUBERNETES_SERVICE_HOST", "DYNO")
    return any(map(os.path.exists, files)) or any(name in os.environ for name in variables)


@checks.register(deploy=True)
def check_task_limits(app_configs: Any = None, **kwargs: Any) -> Messages:
    """Report tasks that RabbitMQ or a deploy ends before their time limit."""
    from . import task_limits

    return task_limits.find_messages()


@checks.register(deploy=True)
def check_schema(app_configs: Any = None, **kwargs: Any) -> Messages:
    """Report that the file with the OpenAPI schema is missing."""
    path = schema.get_path()
    if path.exists() or not is_served(schema.view):
        return []
    hint = "Run uv run manage.py openapi, and commit the file."
    return [checks.Error(f"{path.name} is missing.", hint=hint, id="openapi.E001")]


def is_served(view: Any, resolver: Any = None) -> bool:
    """Return whether a URL of the project leads to the view."""
    return any(
        is_served(view, pattern) if hasattr(pattern, "url_patterns") else pattern.callback is view
        for pattern in (resolver or get_resolver()).url_patterns
    )


@checks.register(checks.Tags.database)
def check_history(
    app_configs: Any = None, databases: Sequence[str] | None = None, **kwargs: Any
) -> Messages:
    """Report a database of another service; ``migrate`` would fail, or skip tables."""
    from . import adoption

    for alias in databases or []:
        try:
            problem = adoption.find_foreign_history(connections[alias])
        except OperationalError:
            continue
        if problem:
            hint = "Run python manage.py adopt; see docs/move.md."
            return [checks.Error(adoption.PROBLEM.format(problem), hint=hint, id="database.E002")]
    return []


@checks.register(checks.Tags.database)
def check_migrations(
    app_configs: Any = None, databases: Sequence[str] | None = None, **kwargs: Any
) -> Messages:
    """Report unapplied migrations that break the previous version."""
    from . import migration_safety

    return [
        message for alias in databases or [] for message in migration_safety.find_messages(alias)
    ]


@checks.register
def check_processes(app_configs: Any = None, **kwargs: Any) -> Messages:
    """Report the processes that cannot start, or that a file of the platform does not start."""
    from . import processes

    messages: Messages = []
    if processes.runs_other_commands():
        messages.append(
            checks.Error(
                "django-prodserver overrides the commands prodserver, server and worker.",
                hint='Move "prodserver_ops" before "django_prodserver" in INSTALLED_APPS.',
                id="processes.E004",
            )
        )
    for name, process in settings.PRODUCTION_PROCESSES.items():
        for check, id_ in (
            (processes.check_backend, "processes.E001"),
            (processes.check_app, "processes.E002"),
            (processes.check_arguments, "processes.E003"),
        ):
            try:
                check(process)
            except Exception as error:
                problem = f"Process {name!r}: {str(error).partition('\n')[0]}"
                hint = processes.find_hint(process)
                messages.append(checks.Error(problem, hint=hint, id=id_))
                break
    messages += [
        checks.Error(problem, hint=hint, id="processes.E005")
        for problem, hint in processes.find_file_problems()
    ]
    return messages
