"""Read settings from environment variables, and check every value.

A cast takes the text of a variable and returns the value, or raises ValueError. If a variable is
missing or invalid, every process exits at its start with status 1 and one line on stderr:
``PORT: got "80a", expected an integer from 1 to 65535``.
"""

import json
import os
import re
from collections.abc import Callable, Collection
from email.utils import parseaddr
from functools import wraps
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import SplitResult, parse_qs, parse_qsl, urlsplit

import cbs
from cbs.cast import as_bool, as_list
from cbs.urls import parse_dburl
from dotenv import load_dotenv

from .. import broker
from ..core import mistakes
from ..core.database import get_sqlite
from . import verification

T = TypeVar("T")
Cast = Callable[[str], T]

HOST = r"[a-z0-9_]([a-z0-9_.-]*[a-z0-9_])?"
IPV6 = r"\[[0-9a-f:.]+\]"

#: The variables that platforms set for one broker, and the module of that broker.
BROKERS_BY_VARIABLE = {
    "RABBITMQ_URL": "rabbitmq",
    "REDIS_URL": "redis",
    "DATABASE_URL": "postgresql",
}


class EnvironmentVariableError(SystemExit):
    """Invalid environment variables. Unless caught, Python prints it and exits with status 1."""


class RedactedError(ValueError):
    """Describes an invalid value without showing it, because it may contain a secret."""


class env(cbs.env):  # type: ignore[misc]
    """A setting that an environment variable can override; see ``cbs.env``."""

    def __get__(self, settings: Any, owner: type | None = None) -> Any:
        if settings is None:
            return self
        text = os.environ.get(self.env_name)
        if text is None:
            if self.getter is None and self.default is self.Required:
                raise self._error("nothing")
            return super().__get__(settings, owner)
        if self.cast is None:
            return text
        try:
            return self.cast(text)
        except RedactedError as error:
            raise self._error(str(error)) from None
        except ValueError:
            raise self._error(_quote(text)) from None

    def _error(self, got: str) -> EnvironmentVariableError:
        expected = getattr(self.cast, "expects", "another value")
        return EnvironmentVariableError(f"{self.env_name}: got {got}, expected {expected}")


def use(
    settings: type[cbs.BaseSettings], variable: str = "DJANGO_MODE"
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Return the settings of the current mode as a module's ``__getattr__`` and ``__dir__``.

    Works like ``BaseSettings.use`` of cbs, but reports all invalid variables at once,
    evaluates each setting once, and reads variables that are not set from ``.env`` in
    ``BASE_DIR``. Raises UnsafeSettingsError for settings that the mode must not have; see
    ``verification.py``.
    """
    verification.used[:] = [settings]
    load_dotenv(Path(settings.BASE_DIR, ".env"))
    try:
        chosen = settings.get_settings_instance(env=variable)
    except ValueError:
        names = [mode.__name__ for mode in verification.get_modes(settings)][1:]
        modes = ", ".join(sorted(name.removesuffix("Settings").lower() for name in names))
        raise EnvironmentVariableError(
            f"{variable}: got {_quote(os.environ[variable])}, "
            f"expected one of {modes}, or unset for development"
        ) from None
    values = evaluate(chosen)
    verification.verify_class(chosen, values)
    mistakes.install(values)

    def get_value(name: str) -> Any:
        if name not in values:
            raise AttributeError(name)
        return values[name]

    return get_value, lambda: list(values)


def evaluate(settings: cbs.BaseSettings) -> dict[str, Any]:
    """Return the values of all settings by name.

    Raises EnvironmentVariableError with a line for each invalid variable.
    """
    values: dict[str, Any] = {}
    problems: dict[str, str] = {}  # Two settings may read the same variable.
    for name in filter(str.isupper, dir(settings)):
        try:
            values[name] = getattr(settings, name)
        except EnvironmentVariableError as problem:
            problems[str(problem).partition(":")[0]] = str(problem)
    if problems:
        raise EnvironmentVariableError("\n".join(problems.values()))
    return values


def _quote(text: str) -> str:
    # The value may be a URL with a password that was meant for another variable.
    shown = json.dumps(re.sub(r"\S*:\S*@", "***@", text))
    return shown if len(shown) <= 80 else f'{shown[:76]}..."'


# Casts


def expects(description: str) -> Callable[[Cast[T]], Cast[T]]:
    """Add a description of the accepted values to a cast."""

    def describe(cast: Cast[T]) -> Cast[T]:
        cast.expects = description  # type: ignore[attr-defined]
        return cast

    return describe


def or_empty(cast: Cast[Any], value: Any = "") -> Cast[Any]:
    """Return a cast that returns ``value`` if the variable is set but empty."""

    @wraps(cast)
    def cast_unless_empty(text: str) -> Any:
        return cast(text) if text else value

    return cast_unless_empty


def one_of(*values: str) -> Cast[str]:
    """Return a cast that accepts one of these words, case-insensitively."""
    by_name = {value.lower(): value for value in values}

    @expects(f"{', '.join(values[:-1])} or {values[-1]}")
    def cast(text: str) -> str:
        if text.lower() not in by_name:
            raise ValueError
        return by_name[text.lower()]

    return cast


def integer(lowest: int, highest: int | None = None) -> Cast[int]:
    """Return a cast that accepts an integer between two limits, both included."""

    @expects(f"an integer from {lowest}" + (f" to {highest}" if highest else ""))
    def cast(text: str) -> int:
        if not re.fullmatch("[0-9]{1,18}", text):
            raise ValueError
        number = int(text)
        if number < lowest or (highest and number > highest):
            raise ValueError
        return number

    return cast


port = integer(1, 65535)


@expects("on or off")
def boolean(text: str) -> bool:
    """Accept on, yes, true and 1, or off, no, false and 0."""
    return bool(as_bool(text))


@expects("a host name or an IP address, without a port")
def host(text: str) -> str:
    """Accept the name or the IP address of a host."""
    if not re.fullmatch(f"{HOST}|{IPV6}", text, re.IGNORECASE):
        raise ValueError
    return text


@expects("host names such as api.example.com, separated by commas, without https:// or a port")
def hosts(text: str) -> list[str]:
    """Accept a list of host names in the forms that ``ALLOWED_HOSTS`` supports."""
    names: list[str] = as_list(text)
    pattern = rf"\*|\.?{HOST}|{IPV6}"
    if not names or not all(re.fullmatch(pattern, name, re.IGNORECASE) for name in names):
        raise ValueError
    return names


@expects("names of queues, separated by commas")
def queue_names(text: str) -> list[str]:
    """Accept a list of names of queues."""
    names: list[str] = as_list(text)
    if not names or not all(re.fullmatch(r"[\w.:-]{1,255}", name) for name in names):
        raise ValueError
    return names


@expects("an e-mail address such as noreply@example.com")
def email_address(text: str) -> str:
    """Accept an address with or without a display name."""
    if not re.fullmatch(r"[^@\s]+@[^@\s]+", parseaddr(text)[1]) or "\n" in text:
        raise ValueError
    return text


@expects("a path such as admin/, of letters, digits, - and _")
def path(text: str) -> str:
    """Return the path as Django's ``path()`` expects it: without leading, with trailing slash."""
    if not re.fullmatch(r"[\w-]+(/[\w-]+)*", text.strip("/"), re.ASCII):
        raise ValueError
    return f"{text.strip('/')}/"


@expects("the start of a URL, such as https://api.example.com or https://example.com/app")
def site_url(text: str) -> str:
    """Accept a scheme, a host, and optionally a port and a path; strip a trailing slash."""
    path = r"(/[\w.~-]+)*/?"
    if not re.fullmatch(rf"https?://({HOST}|{IPV6})(:[0-9]+)?{path}", text, re.I | re.A):
        raise ValueError
    return text.rstrip("/")


@expects("at least 50 random characters")
def secret_key(text: str) -> str:
    """Accept a key that passes Django's own check (security.W009)."""
    if weakness := verification.find_weakness(text):
        raise RedactedError(weakness)
    return text


@expects("earlier secret keys, separated by commas")
def secret_keys(text: str) -> list[str]:
    """Accept earlier keys, whose signatures stay valid, such as those of links in e-mails."""
    return [secret_key(key.strip()) for key in text.split(",")]


@expects("postgres://USER:PASSWORD@HOST:PORT/NAME")
def database_url(text: str) -> dict[str, Any]:
    """Return an entry of ``DATABASES`` for the URL of a PostgreSQL database."""
    parts = _split(text, {"postgres", "postgresql"})
    if not parts.hostname and "host" not in parse_qs(parts.query):
        raise RedactedError("a URL without a host")
    if not parts.path.strip("/"):
        raise RedactedError("a URL without a database name")
    try:
        config: dict[str, Any] = parse_dburl(text)
        return config
    except (TypeError, ValueError):
        raise RedactedError("a URL with an invalid option after the ?") from None


@expects("postgres://USER:PASSWORD@HOST:PORT/NAME or sqlite:///PATH")
def development_database_url(text: str) -> dict[str, Any]:
    """Return an entry of ``DATABASES`` for the URL of a PostgreSQL or SQLite database."""
    if not text.startswith("sqlite:"):
        return database_url(text)
    path = text.removeprefix("sqlite:///")
    if not path or path == text:
        raise RedactedError("a URL without a path")
    return get_sqlite(path)


@expects("the name of a provider and its settings, such as postmark?server_token=TOKEN")
def email_api(text: str) -> tuple[str, dict[str, str]]:
    """Return the name of a provider of django-anymail, and its settings by name."""
    provider, _, query = text.partition("?")
    if not re.fullmatch("[a-z_]+", provider):
        raise RedactedError("an invalid provider name")
    try:
        values = dict(parse_qsl(query, strict_parsing=bool(query)))
    except ValueError:
        raise RedactedError("settings that are not in the form name=value&name=value") from None
    return provider, {f"{provider}_{name}".upper(): value for name, value in values.items()}


def broker_url(*schemes: str, variable: str = "") -> Cast[str]:
    """Return a cast that accepts the URL of a supported broker, or one with these schemes.

    ``variable`` is the name of the variable: ``RABBITMQ_URL`` accepts only URLs of RabbitMQ.
    """
    module = BROKERS_BY_VARIABLE.get(variable)
    supported = (name for name, each in broker.BY_SCHEME.items() if module in (None, each.module))
    schemes = (*supported, *schemes)

    @expects(f"{', '.join(f'{scheme}://' for scheme in schemes[:-1])} or {schemes[-1]}://...")
    def cast(text: str) -> str:
        _split(text, schemes)
        if extra := broker.find_missing_extra(text):
            scheme = broker.get_scheme(text)
            raise RedactedError(f"{scheme}://, which needs prodserver-ops[{extra}]")
        return broker.get_url(text)

    return cast


@expects("a DSN in the form https://KEY@HOST/PROJECT")
def sentry_dsn(text: str) -> str:
    """Accept the DSN of a Sentry project."""
    parts = _split(text, {"http", "https"})
    if find_spec("sentry_sdk") is None:
        raise RedactedError("a DSN, which needs prodserver-ops[sentry]")
    if not (parts.username and parts.hostname and parts.path.strip("/")):
        raise RedactedError("an incomplete DSN")
    return text


@expects("https://HOST/PATH")
def webhook_url(text: str) -> str:
    """Accept a URL, whose path may be a secret."""
    parts = _split(text, {"http", "https"})
    if not parts.hostname or parts.username is not None:
        raise RedactedError("a URL without a host" if not parts.hostname else "a URL with a user")
    if not re.fullmatch("[!-~]+", text):
        raise RedactedError("a URL with a space or a letter that is not ASCII")
    return text


def _split(url: str, schemes: Collection[str]) -> SplitResult:
    scheme, separator, _ = url.partition("://")
    if not separator or not re.fullmatch("[a-z][a-z0-9+.-]*", scheme):
        raise RedactedError("not a URL" if url else '""')
    if scheme not in schemes:
        raise RedactedError(f"a URL that starts with {scheme}://")
    try:
        parts = urlsplit(url)
        parts.port  # noqa: B018  (parsed only when it is read)
    except ValueError:
        raise RedactedError(
            "a URL with an invalid port, or a password that is not percent-encoded"
        ) from None
    return parts
