"""Check that the processes in ``PRODUCTION_PROCESSES`` can start: backends and arguments."""

from importlib.util import find_spec
from typing import Any

from celery import Celery
from click import ClickException
from django.apps import apps
from django.utils.module_loading import import_string
from django_prodserver.backends.base import BaseProcessBackend
from django_prodserver.backends.workers.celery import CeleryBeat, CeleryWorker

from ..worker.app import get_command


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


def runs_other_commands() -> bool:
    """Return whether the commands of django-prodserver replace those of this package."""
    names = [config.name for config in apps.get_app_configs()]
    return "django_prodserver" in names[: names.index("prodserver_ops")]


def find_hint(process: dict[str, Any]) -> str | None:
    """Return how to install the package of a backend in ``web/`` if it is missing."""
    package, _, rest = str(process.get("BACKEND")).partition(".web.")
    extra = rest.partition(".")[0]
    if package != "prodserver_ops" or find_spec(extra) is not None:
        return None
    return f"Install prodserver-ops[{extra}], or choose another web server."


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
    """Raise an exception if the web server or Celery would reject the ARGS."""
    backend = import_string(process["BACKEND"])(**process)
    try:
        if isinstance(backend, CeleryWorker):
            parse_celery_arguments(backend, list(backend.prep_server_args()))
        elif hasattr(backend, "check_arguments"):
            backend.check_arguments()
    except Exception as error:
        raise ValueError(f"ARGS: {error}") from error


def parse_celery_arguments(backend: CeleryWorker, arguments: list[str]) -> None:
    """Parse the arguments of a worker or beat; raise ValueError for invalid ones."""
    name = "beat" if isinstance(backend, CeleryBeat) else "worker"
    command, context = get_command(backend.app, name)
    try:
        command.make_context(name, arguments, obj=context)
    except ClickException as error:
        raise ValueError(error.format_message()) from error
