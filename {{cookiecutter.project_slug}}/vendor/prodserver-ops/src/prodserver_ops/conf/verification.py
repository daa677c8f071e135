"""What settings must have in production, and the order of their classes.

A service with classes verifies itself whenever its settings are loaded. A project with a plain
module verifies itself when one of its processes starts, because its tests also turn DEBUG off.
"""

import os
import sys
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

import cbs
from django.conf import settings

from .. import broker

LIBRARY = __package__.partition(".")[0]

#: Hosts that are valid in ``ALLOWED_HOSTS``, but that no client of a service in production uses.
LOCAL_HOSTS = {"localhost", "127.0.0.1", "[::1]", ".localhost"}

#: Backends of e-mail that send nothing.
HARMLESS_BACKENDS = {
    f"django.core.mail.backends.{name}" for name in ("console", "dummy", "filebased", "locmem")
}

SESSIONS = "django.contrib.sessions"
CSRF = "django.middleware.csrf.CsrfViewMiddleware"


def find_weakness(key: str) -> str:
    """Return why Django's own check would reject a secret key, or an empty string."""
    if key.startswith("django-insecure-"):
        return "an insecure key that starts with django-insecure-"
    if len(key) < 50 or len(set(key)) < 5:
        return f"{len(key)} characters, {len(set(key))} of them distinct"
    return ""


class UnsafeSettingsError(SystemExit):
    """Settings that a mode must not have. Python prints it and exits with status 1."""


def find_faults(get: Callable[[str], Any]) -> Iterator[tuple[str, str, str, str]]:
    """Return the settings that production must not have.

    ``get`` returns a setting, or None. A fault is the id in ``SILENCED_SYSTEM_CHECKS`` that allows
    it, which is Django's own if Django has a check for it, the setting, what it is, and the value
    to write instead.
    """
    if get("DEBUG"):
        yield "security.W018", "DEBUG", "is on, which shows code and settings to visitors", "False"
    for name in ("SECRET_KEY", "SECRET_KEY_FALLBACKS"):
        keys = [get(name) or ""] if name == "SECRET_KEY" else get(name) or []
        if weakness := next(filter(None, map(find_weakness, keys)), ""):
            id_ = "security.W009" if name == "SECRET_KEY" else "security.W025"
            value = f'os.environ["{name}"], with at least 50 random characters'
            yield id_, name, f"has {weakness}", value
    if SESSIONS in (get("INSTALLED_APPS") or ()) and not get("SESSION_COOKIE_SECURE"):
        yield "security.W012", "SESSION_COOKIE_SECURE", "is off: HTTP can leak logins", "True"
    csrf = CSRF in (get("MIDDLEWARE") or ()) and not get("CSRF_USE_SESSIONS")
    if csrf and not get("CSRF_COOKIE_SECURE"):
        yield "security.W016", "CSRF_COOKIE_SECURE", "is off: HTTP can leak the token", "True"
    # The operator of a service may turn it off in the environment.
    if not get("SECURE_SSL_REDIRECT") and "SECURE_SSL_REDIRECT" not in os.environ:
        yield "security.W008", "SECURE_SSL_REDIRECT", "is off: pages are served over HTTP", "True"
    hosts = set(get("ALLOWED_HOSTS") or ())
    local = hosts <= LOCAL_HOSTS and "ALLOWED_HOSTS" not in os.environ
    if "*" in hosts or local:
        what = "is ['*'], which any host matches" if "*" in hosts else "has no public host"
        yield "settings.E001", "ALLOWED_HOSTS", what, '["www.example.com"], the hosts of the site'
    scheme = broker.get_scheme(get("CELERY_BROKER_URL") or "")
    if scheme in broker.EMBEDDED_SCHEMES:
        what = f"is {scheme}://, which other machines and containers cannot read"
        yield "settings.E002", "CELERY_BROKER_URL", what, "the URL of a server"


def find_inherited(mode: type, values: dict[str, Any]) -> Iterator[tuple[str, str, str, str]]:
    """Return the settings of the service that reach the outside world from staging or tests.

    They are right in the class that sets them, but this mode must override them.
    """
    backend = values.get("EMAIL_BACKEND", "").rpartition(".")[0]
    if getattr(mode, "is_staging", False) and backend not in HARMLESS_BACKENDS:
        for name in ("EMAIL_HOST", "EMAIL_API", "EMAIL_BACKEND"):
            if values[name] and is_inherited(mode, name):
                value = '""' if name != "EMAIL_BACKEND" else '"django.core.mail.backends.dummy..."'
                yield "settings.E004", name, "would send e-mail of staging to real people", value
    scheme = broker.get_scheme(values.get("CELERY_BROKER_URL") or "")
    is_server = scheme not in broker.EMBEDDED_SCHEMES
    if getattr(mode, "is_test", False) and is_server and is_inherited(mode, "CELERY_BROKER_URL"):
        what = "would get the messages of tests"
        yield "settings.E005", "CELERY_BROKER_URL", what, '"memory://"'


def verify(
    faults: Iterable[tuple[str, str, str, str]],
    silenced: Collection[str],
    locate: Callable[[str], str],
    place: str = "",
) -> None:
    """Raise UnsafeSettingsError with a line for each fault that is not silenced.

    ``locate`` returns where a setting is set, and ``place`` is where to override it.
    """
    lines = [
        f"{locate(name)}: {name} {what}. Write {name} = {value}{place} ({id_})"
        for id_, name, what, value in faults
        if id_ not in silenced
    ]
    if lines:
        raise UnsafeSettingsError("\n".join(lines))


def verify_class(chosen: cbs.BaseSettings, values: dict[str, Any]) -> None:
    """Raise UnsafeSettingsError if the values of a class have faults."""
    mode = type(chosen)

    def locate(name: str) -> str:
        owner = find_owner(mode, name)
        if variable := find_variable(owner, name):
            return f"variable {variable}"
        return get_place(mode if is_library(owner) else owner)

    faults = [*find_inherited(mode, values)]
    if getattr(chosen, "is_production", False):
        faults += find_faults(values.get)
    verify(faults, values.get("SILENCED_SYSTEM_CHECKS", ()), locate, f" in class {mode.__name__}")


def verify_module() -> None:
    """Raise UnsafeSettingsError if a plain settings module with DEBUG off has faults.

    The processes call it when they start.
    """
    if hasattr(settings, "ADDED_SETTINGS") and not settings.DEBUG:
        module = sys.modules[settings.SETTINGS_MODULE]
        file = get_file(module.__file__ or module.__name__, settings.BASE_DIR)
        faults = find_faults(lambda name: getattr(settings, name, None))
        verify(faults, settings.SILENCED_SYSTEM_CHECKS, lambda name: file)


def find_owner(mode: type, name: str) -> type:
    """Return the class whose value of a setting a mode has."""
    return next((owner for owner in mode.__mro__ if name in vars(owner)), mode)


def is_inherited(mode: type, name: str) -> bool:
    """Return whether a mode has the value of another class of the service."""
    owner = find_owner(mode, name)
    return owner is not mode and not is_library(owner) and not find_variable(owner, name)


def find_variable(owner: type, name: str) -> str:
    """Return the environment variable that a setting has its value from; "" if there is none."""
    variable = getattr(vars(owner).get(name), "env_name", "")
    return variable if variable in os.environ else ""


# The order of classes

#: The class that ``use()`` was called with: development, and the base of the other modes.
used: list[type[cbs.BaseSettings]] = []


def find_misordered(
    base: type[cbs.BaseSettings],
) -> Iterator[tuple[type[cbs.BaseSettings], list[str], str]]:
    """Return the modes in which classes of the library come before those of the service.

    With each, return the settings whose values in the service are dropped, and the line to write.
    """
    for mode in get_modes(base):
        earlier: dict[str, Any] = {}
        dropped: list[str] = []
        is_misordered = False
        for owner in mode.__mro__[:-1]:
            values = {name: value for name, value in vars(owner).items() if name.isupper()}
            if is_library(owner):
                earlier = values | earlier
            elif owner is not cbs.BaseSettings:
                is_misordered |= bool(earlier)
                dropped += [
                    name
                    for name, value in values.items()
                    if name in earlier and earlier[name] != value
                ]
        # A mode with the fault of its base is not reported a second time.
        if is_misordered and any(map(is_library, mode.__bases__)):
            bases = sorted(mode.__bases__, key=is_library)
            names = [
                f"conf.{base.__name__}" if is_library(base) else base.__name__ for base in bases
            ]
            yield mode, dropped, f"class {mode.__name__}({', '.join(names)}):"


def get_modes(base: type[cbs.BaseSettings]) -> Iterator[type[cbs.BaseSettings]]:
    """Return the class, and all classes that inherit from it."""
    yield base
    for mode in base.__subclasses__():
        yield from get_modes(mode)


def is_library(owner: type) -> bool:
    """Return whether a class belongs to this package."""
    return owner.__module__.partition(".")[0] == LIBRARY


def get_place(owner: type) -> str:
    """Return the file and the name of a class of settings."""
    module = sys.modules.get(owner.__module__)
    file = getattr(module, "__file__", None) or owner.__module__
    base_dir = getattr(owner, "BASE_DIR", None)
    return f"{get_file(file, base_dir)}, class {owner.__name__}"


def get_file(file: str, base_dir: Any) -> str:
    """Return the path of a file, relative to ``BASE_DIR`` if it is below."""
    path = Path(file)
    if base_dir is not None and path.is_relative_to(base_dir):
        return str(path.relative_to(base_dir))
    return path.name
