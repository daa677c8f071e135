"""The template's Jinja filters, which validate answers and escape free text.

``cookiecutter.json`` applies the ``check`` filter in a private variable after each
field, so an invalid answer stops the run before cookiecutter writes any file. The
filter renders an empty string or raises ``FailedHookException`` with a one-line
message, which cookiecutter prints before it exits with status 1.
"""

import json
import keyword
import re
import shlex
import sys
import zoneinfo

from cookiecutter.exceptions import FailedHookException
from jinja2.ext import Extension
from slugify import slugify

#: Maximum length of a package name, which is part of table, host and queue names.
SLUG_LENGTH = 30

#: Names of modules, scripts and app labels that a generated service uses, without the
#: standard library. ``tests/test_answers.py`` compares them with the installed packages.
RESERVED_NAMES = frozenset(
    """
    admin auth contenttypes messages sessions staticfiles
    docs manage ops test tests var
    amqp annotated_types anyio asgiref ast_serialize attr attrs billiard cbs celery certifi
    click click_didyoumean click_plugins click_repl colorama cron_descriptor cronlog crontab
    crontabs csp dateutil django django_celery_beat django_prodserver django_stubs_ext
    dotenv drf_spectacular drf_spectacular_sidecar gunicorn honcho idna inflection iniconfig
    jsonschema jsonschema_specifications kombu librt mypy mypy_django_plugin mypy_drf_plugin
    mypy_extensions mypyc packaging pathspec pip pkg_resources pluggy prompt_toolkit psycopg
    psycopg_binary py pygments pytest pytest_django pytest_env python_discovery
    pythonjsonlogger referencing rest_framework rpds ruff sentry_sdk setuptools six sqlparse
    time_machine timezone_field typing_extensions tzdata tzlocal uritemplate urllib3 vine
    watchfiles wcwidth wheel whitenoise yaml
    """.split()
)


def reject(field, value, reason):
    """Stop the generation with one line that names the field, the value and the reason."""
    quoted_value = json.dumps(value, ensure_ascii=False)
    if len(quoted_value) > 80:
        quoted_value = f'{quoted_value[:76]}..."'
    raise FailedHookException(f"{field}: {quoted_value} {reason}")


def name_conflict(name):
    """Return a description of what already uses the name, or None if it is available."""
    if keyword.iskeyword(name):
        return "a Python keyword"
    if name in sys.stdlib_module_names:
        return "a module of Python's standard library"
    if name in RESERVED_NAMES:
        return "a package or app that the service uses"
    return None


def package_name(text):
    """Convert a project name to a package name: ``Söhne's Räume`` to ``sohnes_raume``."""
    name = slugify(
        re.sub("['`\u2019]", "", text),
        separator="_",
        max_length=SLUG_LENGTH,
        word_boundary=True,
        save_order=True,
    )
    if name[:1].isdigit():
        return f"app_{name}"[:SLUG_LENGTH].rstrip("_")
    return f"{name}_service" if name_conflict(name) else name


def check_length(field, text, max_length):
    """Reject text that is longer than ``max_length``."""
    if len(text) > max_length:
        reject(field, text, f"must have at most {max_length} characters (it has {len(text)})")


def text_check(max_length):
    """Return a check that rejects blank text, long text and control characters."""

    def check_text(field, text):
        if not text.strip():
            reject(field, text, "must not be blank")
        check_length(field, text, max_length)
        if re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", text):
            reject(field, text, "must not contain control characters")

    return check_text


def check_slug(field, slug):
    """Reject a name that is not a valid, available package name."""
    if not slug:
        reject(field, slug, "must not be blank; use a name such as prayer_room_api")
    check_length(field, slug, SLUG_LENGTH)
    if not re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)*", slug):
        reject(
            field,
            slug,
            "is not a valid package name: use lowercase letters a-z, digits and single"
            " underscores, and start with a letter",
        )
    if conflict := name_conflict(slug):
        reject(field, slug, f"is {conflict}; choose another name")


def is_domain(text):
    """Return whether the text is a fully qualified ASCII domain name (RFC 1035, RFC 1123)."""
    label = r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?"
    return len(text) <= 253 and bool(
        re.fullmatch(rf"({label}\.)+(?!\d+$){label}", text, re.IGNORECASE)
    )


def check_domain(field, domain):
    """Reject anything but a domain name, for example a URL, an IP address or a host name."""
    if not is_domain(domain):
        reject(
            field,
            domain,
            "is not a valid domain name: use a name such as api.example.com, without https://"
            " or a port (an internationalized name in its xn-- form)",
        )


def check_email(field, address):
    """Reject anything but an email address: local part (RFC 5322 dot-atom), @ and domain."""
    local, _, domain = address.rpartition("@")
    atom = r"[a-zA-Z0-9!#$%&'*+/=?^_`{|}~-]+"
    if not re.fullmatch(rf"{atom}(\.{atom})*", local) or not is_domain(domain):
        reject(field, address, "is not a valid email address: use a form such as you@example.com")


def check_timezone(field, name):
    """Reject a name that is not in the IANA time zone database, if there is one."""
    available = zoneinfo.available_timezones()
    if available and name not in available:
        reject(field, name, "is not an IANA time zone: use a name such as Europe/London or UTC")


CHECKS = {
    "project_name": text_check(100),
    "project_slug": check_slug,
    "description": text_check(500),
    "author_name": text_check(100),
    "author_email": check_email,
    "domain_name": check_domain,
    "timezone": check_timezone,
}


def check(answer, field):
    """Reject an invalid answer to the field. Render an empty string for a valid one."""
    CHECKS[field](field, answer)
    return ""


def check_all(answers):
    """Reject the first invalid answer. Render an empty string if all answers are valid."""
    return "".join(check(answers[field], field) for field in CHECKS)


def quoted(text):
    """Return the text as a double-quoted string literal for TOML, YAML and Python."""
    escaped = json.dumps(text, ensure_ascii=False)
    return "".join(c if c.isprintable() else escape(c) for c in escaped)


def escape(character):
    """Return the escape sequence of a non-printable character for TOML, YAML and Python."""
    code = ord(character)
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def python_string(text):
    """Return the text as a Python string literal with the quotes that ``ruff format`` prefers."""
    literal = quoted(text)
    if text.count('"') > text.count("'"):
        body = literal[1:-1].replace('\\"', '"').replace("'", "\\'")
        literal = f"'{body}'"
    return literal


def one_line(text):
    """Collapse each run of whitespace into one space."""
    return " ".join(text.split())


def markdown(text):
    """Escape the characters that CommonMark would interpret as markup."""
    text = re.sub(r"([\\`*_\[\]<>~|])", r"\\\1", text)
    text = re.sub(r"&(?=#?\w+;)", r"\\&", text)
    text = re.sub(r"(?m)^(\s*)([#+=-])", r"\1\\\2", text)
    return re.sub(r"(?m)^(\s*\d+)([.)])", r"\1\\\2", text)


def shell_word(text):
    """Quote the text as one shell argument."""
    return shlex.quote(text)


class Filters(Extension):
    """Registers the filters in the template's Jinja environment."""

    def __init__(self, environment):
        super().__init__(environment)
        environment.filters.update(
            {
                function.__name__: function
                for function in (
                    package_name,
                    check,
                    check_all,
                    quoted,
                    python_string,
                    one_line,
                    markdown,
                    shell_word,
                )
            }
        )
