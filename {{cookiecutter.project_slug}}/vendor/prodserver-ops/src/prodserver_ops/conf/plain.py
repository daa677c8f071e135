"""Settings for a project whose settings are a plain module."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from dotenv import load_dotenv

from .defaults import ProcessDefaults, ProductionProcessDefaults
from .environment import evaluate


def add_settings(
    module: dict[str, Any],
    package: str,
    get_processes: Callable[[ProcessDefaults], dict[str, Any]] | None = None,
) -> None:
    """Add to a settings module what the processes need; call it at the end of the module.

    module
        ``globals()`` of the module. A setting that it has already is kept, and the others follow
        from it: with ``DEBUG = False`` they are those of production.
    package
        The Python package of the service, whose ``celery_app`` is the Celery app.
    get_processes
        A function of the settings that returns ``PRODUCTION_PROCESSES``: by default web with
        gunicorn, worker and beat.

    Raises EnvironmentVariableError for a missing or invalid environment variable.
    """
    from . import processes

    load_dotenv(Path(module["BASE_DIR"], ".env"))
    base = ProcessDefaults if module.get("DEBUG") else ProductionProcessDefaults
    given = {name: value for name, value in module.items() if name.isupper()}
    plain = type("Plain", (base,), {"PACKAGE": package, **given})()
    module.update(evaluate(plain) | given)
    if "PRODUCTION_PROCESSES" not in given:
        module["PRODUCTION_PROCESSES"] = (get_processes or processes.get_default)(plain)
