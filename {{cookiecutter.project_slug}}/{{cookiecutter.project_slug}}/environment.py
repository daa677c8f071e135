"""What settings read from the environment: each value is checked, and named where it is bad.

A cast takes the text of a variable and returns the value, or raises ValueError. A
variable that is missing or malformed ends any process at its start, with one line on
stderr and exit status 1: ``PORT: got "80a", wants a whole number from 1 to 65535``.
"""

import json
import os
import re
from email.utils import parseaddr
from functools import wraps
from urllib.parse import parse_qs, urlsplit

import cbs
from cbs.cast import as_bool, as_list
from cbs.urls import parse_dburl

HOST = r"[a-z0-9_]([a-z0-9_.-]*[a-z0-9_])?"
IPV6 = r"\[[0-9a-f:.]+\]"


class BadEnvironment(SystemExit):
    """What is wrong with the environment; uncaught, Python prints it and exits with status 1."""


class Untold(ValueError):
    """What is wrong with a value that is, or may hold, a secret: told without the value."""


class env(cbs.env):
    """A setting that an environment variable sets; see ``cbs.env``."""

    def __get__(self, settings, owner=None):
        if settings is None:
            return self
        text = os.environ.get(self.env_name)
        if text is None:
            if self.getter is None and self.default is self.Required:
                raise self._bad("nothing")
            return super().__get__(settings, owner)
        if self.cast is None:
            return text
        try:
            return self.cast(text)
        except Untold as error:
            raise self._bad(error) from None
        except ValueError:
            raise self._bad(_quoted(text)) from None

    def _bad(self, got):
        wanted = getattr(self.cast, "wants", "another value")
        return BadEnvironment(f"{self.env_name}: got {got}, wants {wanted}")


def use(settings, variable="DJANGO_MODE"):
    """Return ``__getattr__`` and ``__dir__`` of a module, with the settings of the mode.

    As ``BaseSettings.use`` of cbs does, but every variable that is bad is named.
    """
    try:
        chosen = settings.get_settings_instance(env=variable)
    except ValueError:
        modes = ", ".join(sorted(_modes(settings)))
        raise BadEnvironment(
            f"{variable}: got {_quoted(os.environ[variable])}, "
            f"wants one of {modes}, or nothing for development"
        ) from None
    problems = []
    for name in filter(str.isupper, dir(chosen)):
        try:
            getattr(chosen, name)
        except BadEnvironment as problem:
            problems.append(str(problem))
    if problems:
        raise BadEnvironment("\n".join(dict.fromkeys(problems)))
    return chosen.getattr_factory(), chosen.dir_factory()


def _modes(settings):
    for mode in settings.__subclasses__():
        yield mode.__name__.removesuffix("Settings").lower()
        yield from _modes(mode)


def _quoted(text):
    # A URL with a password may stand where none is wanted.
    shown = json.dumps(re.sub(r"\S*:\S*@", "***@", text))
    return shown if len(shown) <= 80 else f'{shown[:76]}..."'


# Casts


def wants(description):
    """Give a cast the words that tell what it takes."""

    def describe(cast):
        cast.wants = description
        return cast

    return describe


def or_empty(cast, value=""):
    """Return the cast, with a value of its own for a variable that is set, but empty."""

    @wraps(cast)
    def cast_unless_empty(text):
        return cast(text) if text else value

    return cast_unless_empty


def one_of(*values):
    """Return a cast for one of these words, in capital letters or not."""
    by_name = {value.lower(): value for value in values}

    @wants(f"{', '.join(values[:-1])} or {values[-1]}")
    def cast(text):
        if text.lower() not in by_name:
            raise ValueError
        return by_name[text.lower()]

    return cast


def whole_number(lowest, highest=None):
    """Return a cast for a whole number; both limits are included."""

    @wants(f"a whole number from {lowest} " + (f"to {highest}" if highest else "on"))
    def cast(text):
        if not re.fullmatch("[0-9]{1,18}", text):
            raise ValueError
        number = int(text)
        if number < lowest or (highest and number > highest):
            raise ValueError
        return number

    return cast


port = whole_number(1, 65535)


@wants("on or off")
def switch(text):
    """Cast on, yes, true and 1, or off, no, false and 0."""
    return as_bool(text)


@wants("a host name or an address, without a port")
def host(text):
    """Cast the name or the address of a host."""
    if not re.fullmatch(f"{HOST}|{IPV6}", text, re.IGNORECASE):
        raise ValueError
    return text


@wants("host names such as api.example.com with commas between, without https:// or a port")
def hosts(text):
    """Cast a list of the host names that ``ALLOWED_HOSTS`` knows."""
    names = as_list(text)
    pattern = rf"\*|\.?{HOST}|{IPV6}"
    if not names or not all(re.fullmatch(pattern, name, re.IGNORECASE) for name in names):
        raise ValueError
    return names


@wants("an e-mail address such as noreply@example.com")
def email_address(text):
    """Cast an address, with a name before it or without."""
    if not re.fullmatch(r"[^@\s]+@[^@\s]+", parseaddr(text)[1]) or "\n" in text:
        raise ValueError
    return text


@wants("a path such as admin/, of letters, digits, - and _")
def path(text):
    """Cast a path to what Django's ``path()`` takes: no slash before, one after."""
    if not re.fullmatch(r"[\w-]+(/[\w-]+)*", text.strip("/"), re.ASCII):
        raise ValueError
    return f"{text.strip('/')}/"


@wants("the start of a URL, such as https://api.example.com")
def site_url(text):
    """Cast scheme, host and perhaps port, without a slash at the end."""
    if not re.fullmatch(rf"https?://({HOST}|{IPV6})(:[0-9]+)?/?", text, re.IGNORECASE):
        raise ValueError
    return text.rstrip("/")


@wants("at least 50 random characters")
def secret_key(text):
    """Cast a key that Django's own check holds to be safe."""
    if text.startswith("django-insecure-"):
        raise Untold("a key that is not secret: it starts with django-insecure-")
    if len(text) < 50 or len(set(text)) < 5:
        raise Untold(f"{len(text)} characters, {len(set(text))} of them different")
    return text


@wants("postgres://USER:PASSWORD@HOST:PORT/NAME")
def database_url(text):
    """Cast the URL of a PostgreSQL database to what ``DATABASES`` holds."""
    parts = _split(text, {"postgres", "postgresql"})
    if not parts.hostname and "host" not in parse_qs(parts.query):
        raise Untold("a URL without a host")
    if not parts.path.strip("/"):
        raise Untold("a URL without the name of a database")
    try:
        return parse_dburl(text)
    except (TypeError, ValueError):
        raise Untold("a URL with a bad option after the ?") from None


def broker_url(*schemes):
    """Return a cast for the URL of a broker, with one of these schemes."""

    @wants(" or ".join(f"{scheme}://..." for scheme in schemes))
    def cast(text):
        _split(text, schemes)
        return text

    return cast


@wants("https://KEY@HOST/PROJECT, as Sentry shows it")
def sentry_dsn(text):
    """Cast the address of a project at Sentry."""
    parts = _split(text, {"http", "https"})
    if not (parts.username and parts.hostname and parts.path.strip("/")):
        raise Untold("a URL without one of its parts")
    return text


def _split(url, schemes):
    scheme, separator, _ = url.partition("://")
    if not separator or not re.fullmatch("[a-z][a-z0-9+.-]*", scheme):
        raise Untold("no URL" if url else '""')
    if scheme not in schemes:
        raise Untold(f"a URL that starts with {scheme}://")
    try:
        parts = urlsplit(url)
        parts.port  # noqa: B018  (is read only now, and may be none)
    except ValueError:
        raise Untold("a URL with a bad port, or a password not percent-encoded") from None
    return parts
