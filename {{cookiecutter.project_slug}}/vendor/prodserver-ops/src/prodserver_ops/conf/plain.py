"""Settings for a project whose settings are a plain module."""

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
    """Add to a settings module what the processes need, and return all settings as an object.

    Call it once, at the end of the module that ``DJANGO_SETTINGS_MODULE`` names.

    module
        ``globals()`` of the module. A setting that it has already is kept, and the others follow
        from it: with ``DEBUG = False`` they are those of production.
    package
        The Python package whose ``celery_app`` is the Celery app.
    parts
        Classes with more settings, such as ``prodserver_ops.conf.flower.Defaults``.

    The object is for the functions of ``prodserver_ops.conf.processes``, if the module sets
    ``PRODUCTION_PROCESSES`` itself: by default they are web with gunicorn, worker and beat.

    Raises EnvironmentVariableError for a missing or invalid environment variable.
    """
    if "ADDED_SETTINGS" in module:
        raise ImproperlyConfigured(
            "add_settings() was called before, by a module that this one imports. Call it once, "
            "at the end of each module that DJANGO_SETTINGS_MODULE may name."
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
    # Only settings that the classes know: cbs would call any other that is a function.
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
    """Return the folder that has the settings' package, usually with ``manage.py``."""
    path = Path(module["__file__"]).resolve()
    depth = str(module["__name__"]).count(".") + (path.stem == "__init__")
    return path.parents[depth]
