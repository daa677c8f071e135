"""Check that the processes in ``PRODUCTION_PROCESSES`` can start: backends and arguments."""

import json
import os
import re
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from celery import Celery
from click import ClickException
from django.apps import apps
from django.conf import settings
from django.utils.module_loading import import_string
from django_prodserver.backends.base import BaseProcessBackend
from django_prodserver.backends.workers.celery import CeleryBeat, CeleryWorker

from ..scheduling import heartbeats
from ..worker.app import get_command

#: A line of a Procfile that starts a process of ``PRODUCTION_PROCESSES``.
LINE = re.compile(r"^(?P<type>[\w-]+):.*\bmanage\.py (prodserver|server|worker) (?P<name>[\w-]+)")


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


def find_file_problems() -> Iterator[tuple[str, str]]:
    """Return where Procfile and app.json differ from ``PRODUCTION_PROCESSES``, and what to write."""
    base = Path(settings.BASE_DIR)
    names = settings.PRODUCTION_PROCESSES
    for file in ("Procfile", "Procfile.dev"):
        text = (base / file).read_text() if (base / file).exists() else ""
        lines = [match for match in map(LINE.match, text.splitlines()) if match]
        started = {line["name"] for line in lines}
        types = {line.partition(":")[0] for line in text.splitlines()}
        for name in names if lines else ():
            if name not in started | types:
                line = f"Write {name}: python manage.py prodserver {name}"
                yield f"{file} does not start the process {name!r} of PRODUCTION_PROCESSES.", line
        for name in started - set(names):
            problem = f"{file} starts {name!r}, which PRODUCTION_PROCESSES does not name."
            yield problem, f"Name {name!r} there, or remove the line from {file}."
    yield from _find_script_problems(base)
    yield from _find_app_problems(base / "app.json")


def _find_script_problems(base: Path) -> Iterator[tuple[str, str]]:
    """Return why ./manage.py, which deploys run, cannot be run as it is."""
    script = base / "manage.py"
    files = [base / name for name in ("Procfile", "app.json")]
    runs = any(path.exists() and "./manage.py" in path.read_text() for path in files)
    if not runs or not script.exists():
        return
    if b"\r\n" in script.read_bytes():
        hint = "Run: git add --renormalize . && git rm --cached -rq . && git reset --hard"
        yield "manage.py has the line breaks of Windows, so that ./manage.py does not start.", hint
    if not os.access(script, os.X_OK):
        hint = "Run: chmod +x manage.py && git update-index --chmod=+x manage.py"
        yield "manage.py is not executable, but the release command runs ./manage.py.", hint


def _find_app_problems(path: Path) -> Iterator[tuple[str, str]]:
    try:
        app = json.loads(path.read_text())
    except (OSError, ValueError):
        return
    # Dokku's files have both; those of other platforms may have neither.
    checks, formation = app.get("healthchecks"), app.get("formation")
    for name in settings.PRODUCTION_PROCESSES:
        if formation and name not in formation:
            line = f'Write "{name}": ' + '{"quantity": 1} in formation.'
            yield f"app.json does not start the process {name!r} of PRODUCTION_PROCESSES.", line
        if checks and name not in checks and name in heartbeats.get_processes():
            command = ["python", "-m", "prodserver_ops.heartbeat", name]
            check = {"type": "startup", "name": f"{name} runs", "command": command}
            line = json.dumps({name: [check | {"attempts": 5, "wait": 5, "timeout": 30}]})[1:-1]
            hint = f"Write {line} in healthchecks."
            yield f"app.json has no health check of the process {name!r}.", hint
    for name in (formation or {}).keys() - settings.PRODUCTION_PROCESSES.keys():
        # Dokku ends a process whose quantity becomes 0.
        if formation[name].get("quantity") != 0:
            problem = f"app.json starts {name!r}, which PRODUCTION_PROCESSES does not name."
            hint = f"Name {name!r} there, or write quantity 0 in formation in app.json."
            yield problem, hint
