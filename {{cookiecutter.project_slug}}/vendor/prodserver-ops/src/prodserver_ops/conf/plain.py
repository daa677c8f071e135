"""Settings for a project with a plain settings module."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from django.core.exceptions import ImproperlyConfigured
from dotenv import load_dotenv

from . import processes
from .defaults import ProcessDefaults, ProductionProcessDefaults, limit_database
from .environment import evaluate


def add_settings(
    module: dict[str, Any], package: str, parts: Iterable[type] = ()
) -> ProcessDefaults:
    """Add the settings that the processes need to a settings module; return all as an object.

    Call it once, at the end of the module that ``DJANGO_SETTINGS_MODULE`` names.

    module
        ``globals()`` of the module. Existing settings are kept, and the others are derived from
        them: with ``DEBUG = False`` they are the settings of production.
    package
        The Python package whose ``celery_app`` is the Celery app.
    parts
        Classes with more settings, such as ``prodserver_ops.conf.flower.Defaults``.

    The default processes are web with gunicorn, worker and beat. To set ``PRODUCTION_PROCESSES``
    yourself, pass the returned object to the functions of ``prodserver_ops.conf.processes``.

    Raises EnvironmentVariableError for a missing or invalid environment variable.
    """
    if "ADDED_SETTINGS" in module:
        raise ImproperlyConfigured(
            "add_settings() was already called by a module that this one imports. Call it only at "
            "the end of modules that DJANGO_SETTINGS_MODULE can name."
        )
    base_dir = Path(module.get("BASE_DIR") or find_base_dir(module))
    load_dotenv(base_dir / ".env")
    base = ProcessDefaults if module.get("DEBUG") else ProductionProcessDefaults
    domain = next(iter(module.get("ALLOWED_HOSTS", ())), "").lstrip("*.") or "localhost"
    names = {
        "PACKAGE": package,
        "BASE_DIR": base_dir,
        "SITE_NAME": package,
        "DOMAIN": domain,
        "ASGI_APPLICATION": f"{package}.asgi.application",
    }
    defaults = type("Plain", (*parts, base), names)
    # Only settings that the classes define: cbs would call functions among the others.
    given = {name: module[name] for name in dir(defaults) if name.isupper() and name in module}
    settings: ProcessDefaults = type("Plain", (defaults,), given | {"PACKAGE": package})()
    values = evaluate(settings) | given
    values.setdefault("PRODUCTION_PROCESSES", processes.get_default(settings))
    added = values.keys() - module.keys()
    module.update({name: values[name] for name in added})
    module["ADDED_SETTINGS"] = sorted(added)
    if "DATABASES" in module:
        databases = module["DATABASES"]
        module["DATABASES"] = {alias: limit_database(databases[alias]) for alias in databases}
    return settings


def find_base_dir(module: dict[str, Any]) -> Path:
    """Return the folder that contains the settings package, usually with ``manage.py``."""
    path = Path(module["__file__"]).resolve()
    depth = str(module["__name__"]).count(".") + (path.stem == "__init__")
    return path.parents[depth]
