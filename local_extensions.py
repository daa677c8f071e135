"""The template's own Jinja filters: they check the answers and quote free text.

A check is called from a private variable right after its field in
``cookiecutter.json``, so that a bad answer ends the run before anything is on
disk. It returns nothing to render, or raises ``FailedHookException`` with one
line, which cookiecutter prints before it exits with status 1.
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

#: Longest package name: it stands in database tables, host names and queues.
SLUG_LENGTH = 30

#: What a service imports, runs or labels an app with, besides the standard library.
#: ``tests/test_answers.py`` holds this against what a generated service installs.
RESERVED_NAMES = frozenset(
    """
    admin auth contenttypes messages sessions staticfiles
    docs manage test tests var
    amqp annotated_types anyio asgiref attr attrs billiard cbs celery certifi click
    click_didyoumean click_plugins click_repl colorama cron_descriptor cronlog crontab
    crontabs csp dateutil django django_celery_beat django_prodserver dotenv drf_spectacular
    drf_spectacular_sidecar gunicorn honcho idna inflection iniconfig jsonschema
    jsonschema_specifications kombu packaging pip pkg_resources pluggy prompt_toolkit
    psycopg psycopg_binary py pygments pytest pytest_django pytest_env python_discovery
    pythonjsonlogger referencing rest_framework rpds ruff sentry_sdk setuptools six sqlparse
    time_machine timezone_field typing_extensions tzdata tzlocal uritemplate urllib3 vine
    watchfiles wcwidth wheel whitenoise yaml
    """.split()
)


def refuse(field, value, rule):
    """End the generation with one line that names the field, the value and the rule."""
    shown = json.dumps(value, ensure_ascii=False)
    if len(shown) > 80:
        shown = f'{shown[:76]}..."'
    raise FailedHookException(f"{field}: {shown} {rule}")


def reserved(name):
    """Return what else has the name, or None where a service may have it."""
    if keyword.iskeyword(name):
        return "a Python keyword"
    if name in sys.stdlib_module_names:
        return "a module of Python's standard library"
    if name in RESERVED_NAMES:
        return "a package or app that the service itself uses"
    return None


def package_name(text):
    """Return a package name made from a human one: ``Söhne's Räume`` is ``sohnes_raume``."""
    name = slugify(
        re.sub("['`\u2019]", "", text),
        separator="_",
        max_length=SLUG_LENGTH,
        word_boundary=True,
        save_order=True,
    )
    if name[:1].isdigit():
        return f"app_{name}"[:SLUG_LENGTH].rstrip("_")
    return f"{name}_service" if reserved(name) else name


def check_text(length):
    """Return a check that refuses text that is empty, too long or holds control characters."""

    def check(field, text):
        if not text.strip():
            refuse(field, text, "is empty; type at least one letter")
        if len(text) > length:
            refuse(field, text, f"is too long: {len(text)} characters, and {length} are allowed")
        if re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", text):
            refuse(field, text, "holds a control character; use plain text")

    return check


def check_slug(field, slug):
    """Refuse a name that no importable package of a service can have."""
    if not slug:
        refuse(field, slug, "is empty; a package needs a name such as prayer_room_api")
    if len(slug) > SLUG_LENGTH:
        refuse(field, slug, f"is too long: {len(slug)} characters, and {SLUG_LENGTH} are allowed")
    if not re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)*", slug):
        refuse(
            field,
            slug,
            "is no package name: lower-case letters a-z, digits and single underscores,"
            " starting with a letter",
        )
    if taken := reserved(slug):
        refuse(field, slug, f"is {taken}; choose another name")


def is_domain(text):
    """Tell whether the text is a fully qualified domain name in ASCII (RFC 1035, RFC 1123)."""
    label = r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?"
    return len(text) <= 253 and bool(
        re.fullmatch(rf"({label}\.)+(?!\d+$){label}", text, re.IGNORECASE)
    )


def check_domain(field, domain):
    """Refuse what is no domain: a URL, an address, a bare host name."""
    if not is_domain(domain):
        refuse(
            field,
            domain,
            "is no domain: write it like api.example.com, without https:// or a port"
            " (an international name in its xn-- form)",
        )


def check_email(field, address):
    """Refuse what is no e-mail address: a local part (RFC 5322 dot-atom), an @ and a domain."""
    local, _, domain = address.rpartition("@")
    atom = r"[a-zA-Z0-9!#$%&'*+/=?^_`{|}~-]+"
    if not re.fullmatch(rf"{atom}(\.{atom})*", local) or not is_domain(domain):
        refuse(field, address, "is no e-mail address: write it like you@example.com")


def check_timezone(field, name):
    """Refuse a name that the IANA time zone database does not have."""
    known = zoneinfo.available_timezones()
    if known and name not in known:
        refuse(field, name, "is no IANA time zone: write it like Europe/London or UTC")


CHECKS = {
    "project_name": check_text(100),
    "project_slug": check_slug,
    "description": check_text(500),
    "author_name": check_text(100),
    "author_email": check_email,
    "domain_name": check_domain,
    "timezone": check_timezone,
}


def check(answer, field):
    """Refuse a bad answer to the field; render nothing for a good one."""
    CHECKS[field](field, answer)
    return ""


def check_all(answers):
    """Refuse the first bad answer of all; render nothing where all are good."""
    return "".join(check(answers[field], field) for field in CHECKS)


def quoted(text):
    """Return the text in double quotes, as JSON, TOML, YAML and Python all read it."""
    escaped = json.dumps(text, ensure_ascii=False)
    return "".join(c if c.isprintable() else escape(c) for c in escaped)


def escape(character):
    """Return the escape for a character that does not print, as Python and TOML read it."""
    code = ord(character)
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def python_string(text):
    """Return the text as a Python string literal in the quotes that ruff format chooses."""
    literal = quoted(text)
    if text.count('"') > text.count("'"):
        body = literal[1:-1].replace('\\"', '"').replace("'", "\\'")
        literal = f"'{body}'"
    return literal


def one_line(text):
    """Return the text with every run of white space as one space."""
    return " ".join(text.split())


def markdown(text):
    """Return the text with everything escaped that CommonMark would read as mark-up."""
    text = re.sub(r"([\\`*_\[\]<>~|])", r"\\\1", text)
    text = re.sub(r"&(?=#?\w+;)", r"\\&", text)
    text = re.sub(r"(?m)^(\s*)([#+=-])", r"\1\\\2", text)
    return re.sub(r"(?m)^(\s*\d+)([.)])", r"\1\\\2", text)


def shell_word(text):
    """Return the text as one word of a shell command."""
    return shlex.quote(text)


class Filters(Extension):
    """Makes the functions above filters of the template's Jinja environment."""

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
