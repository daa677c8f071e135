"""The environment: a bad variable ends every process in one line, which tells no secret."""

import os
import subprocess
import sys

import pytest
from django.conf import settings

from {{ cookiecutter.project_slug }}.environment import BadEnvironment, use
from {{ cookiecutter.project_slug }}.settings import Settings

PRODUCTION = {
    "DJANGO_MODE": "prod",
    "SECRET_KEY": "a-key-for-this-test-alone-of-more-than-fifty-characters",
    "DATABASE_URL": "postgres://user:hunter2@db.example.com:5432/name",
    "RABBITMQ_URL": "amqp://user:hunter2@mq.example.com:5672/vhost",
}


@pytest.fixture
def read(monkeypatch):
    """Read the settings in an environment of these variables alone."""

    def read(**variables):
        monkeypatch.setattr(os, "environ", variables)
        return use(Settings)[0]

    return read


@pytest.fixture
def problem(read):
    """Return what ends a process with these variables."""

    def problem(**variables):
        with pytest.raises(BadEnvironment) as caught:
            read(**variables)
        return str(caught.value)

    return problem


class TestGoodVariables:
    def test_development_needs_none(self, read):
        assert read()("DEBUG") is True

    def test_production_needs_three(self, read):
        value = read(**PRODUCTION)
        assert value("DATABASES")["default"]["HOST"] == "db.example.com"
        assert value("CELERY_BROKER_URL") == PRODUCTION["RABBITMQ_URL"]

    def test_another_broker_stands_in_for_the_usual_one(self, read):
        variables = PRODUCTION | {"CELERY_BROKER_URL": "amqps://mq"}
        del variables["RABBITMQ_URL"]
        assert read(**variables)("CELERY_BROKER_URL") == "amqps://mq"

    @pytest.mark.parametrize(
        ("name", "text", "value"),
        [
            ("ADMIN_PATH", "/back/office", "back/office/"),
            ("ALLOWED_HOSTS", "one.example.com, .example.org,[::1]", None),
            ("DEBUG", "Off", False),
            ("LOG_LEVEL", "warning", "WARNING"),
            ("PORT", "5000", 5000),
            ("PORT", "", 8000),
            ("SITE_URL", "https://example.com:8443/", "https://example.com:8443"),
            ("WEB_CONCURRENCY", "8", 8),
        ],
    )
    def test_are_cast(self, read, name, text, value):
        expected = text.replace(" ", "").split(",") if value is None else value
        assert read(**{name: text})(name) == expected


@pytest.mark.parametrize(
    ("name", "text", "line"),
    [
        ("ADMIN_PATH", "/", 'got "/", wants a path such as admin/, of letters, digits, - and _'),
        (
            "ALLOWED_HOSTS",
            "https://example.com",
            'got "https://example.com", wants host names such as api.example.com '
            "with commas between, without https:// or a port",
        ),
        ("BIND_HOST", "", 'got "", wants a host name or an address, without a port'),
        ("DEBUG", "maybe", 'got "maybe", wants on or off'),
        (
            "DEFAULT_FROM_EMAIL",
            "nobody",
            'got "nobody", wants an e-mail address such as noreply@example.com',
        ),
        ("DJANGO_MODE", "production", None),
        ("EMAIL_HOST", "smtp:25", 'got "smtp:25", wants a host name or an address, without a port'),
        ("EMAIL_PORT", "0", 'got "0", wants a whole number from 1 to 65535'),
        ("EMAIL_USE_TLS", "", 'got "", wants on or off'),
        ("LOG_FORMAT", "xml", 'got "xml", wants text or json'),
        ("LOG_LEVEL", "loud", 'got "loud", wants DEBUG, INFO, WARNING or ERROR'),
        ("PORT", "80a", 'got "80a", wants a whole number from 1 to 65535'),
        ("PORT", "65536", 'got "65536", wants a whole number from 1 to 65535'),
        ("SITE_URL", "example.com", None),
        ("WEB_CONCURRENCY", "-1", 'got "-1", wants a whole number from 1 on'),
        ("WEB_THREADS", "0", 'got "0", wants a whole number from 1 on'),
        ("WORKER_CONCURRENCY", "two\nlines", 'got "two\\nlines", wants a whole number from 1 on'),
    ],
)
def test_a_malformed_variable_is_told_with_what_it_wants(problem, name, text, line):
    said = problem(**{name: text})
    assert said == f"{name}: {line}" if line else said.startswith(f'{name}: got "{text}", wants ')


@pytest.mark.parametrize(
    ("name", "text", "got"),
    [
        ("SECRET_KEY", None, "nothing"),
        ("SECRET_KEY", "", "0 characters, 0 of them different"),
        ("SECRET_KEY", "hunter2", "7 characters, 7 of them different"),
        ("SECRET_KEY", "ab" * 30, "60 characters, 2 of them different"),
        (
            "SECRET_KEY",
            f"django-insecure-{'hunter2' * 9}",
            "a key that is not secret: it starts with django-insecure-",
        ),
        ("DATABASE_URL", None, "nothing"),
        ("DATABASE_URL", "", '""'),
        ("DATABASE_URL", "hunter2", "no URL"),
        ("DATABASE_URL", "mysql://user:hunter2@db/name", "a URL that starts with mysql://"),
        ("DATABASE_URL", "postgres://user:hunter2@/name", "a URL without a host"),
        (
            "DATABASE_URL",
            "postgres://user:hunter2@db",
            "a URL without the name of a database",
        ),
        (
            "DATABASE_URL",
            "postgres://user:hunter2/@db/name",
            "a URL with a bad port, or a password not percent-encoded",
        ),
        (
            "DATABASE_URL",
            "postgres://user:hunter2@db/name?conn_max_age=long",
            "a URL with a bad option after the ?",
        ),
        ("RABBITMQ_URL", None, "nothing"),
        ("RABBITMQ_URL", "redis://user:hunter2@mq", "a URL that starts with redis://"),
        ("CELERY_BROKER_URL", "user:hunter2@mq", "no URL"),
        ("SENTRY_DSN", "https://hunter2@sentry.example.com", "a URL without one of its parts"),
    ],
)
def test_a_secret_is_not_told(problem, name, text, got):
    variables = PRODUCTION | {name: text}
    said = problem(**{name: text for name, text in variables.items() if text is not None})
    assert said.startswith(f"{name}: got {got}, wants ")
    assert "hunter2" not in said
    assert "\n" not in said


def test_a_password_in_the_wrong_place_is_not_told(problem):
    said = problem(EMAIL_HOST="smtp://user:hunter2@mail.example.com")
    assert said.startswith('EMAIL_HOST: got "***@mail.example.com", wants ')


def test_every_bad_variable_has_its_line(problem):
    said = problem(PORT="80a", DEBUG="maybe")
    assert [line.partition(":")[0] for line in said.splitlines()] == ["DEBUG", "PORT"]


def test_an_unknown_mode_is_told_with_the_known_ones(problem):
    assert problem(DJANGO_MODE="production") == (
        'DJANGO_MODE: got "production", wants one of prod, staging, test, or nothing for development'
    )


def test_a_command_ends_with_that_line_and_status_1():
    done = subprocess.run(
        [sys.executable, "manage.py", "check"],
        cwd=settings.BASE_DIR,
        env=os.environ | {"PORT": "80a"},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == 'PORT: got "80a", wants a whole number from 1 to 65535\n'
