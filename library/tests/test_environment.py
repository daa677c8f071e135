"""Environment variables: with an invalid one, processes exit with one line and no secret."""

import os
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
from django.conf import settings

from prodserver_ops import apps, broker
from prodserver_ops.conf import environment, flower
from prodserver_ops.conf.defaults import Defaults, ProductionDefaults
from prodserver_ops.conf.environment import EnvironmentVariableError, use
from prodserver_ops.console import checks

BROKER_URL = "amqp://user:hunter2@mq.example.com:5672/vhost"

PRODUCTION = {
    "DJANGO_MODE": "sampleprod",
    "SECRET_KEY": "a-key-for-this-test-alone-of-more-than-fifty-characters",
    "DATABASE_URL": "postgres://user:hunter2@db.example.com:5432/name",
    "CELERY_BROKER_URL": BROKER_URL,
}


class SampleSettings(Defaults):
    """Development of another service."""

    PACKAGE = "sample"
    BASE_DIR = Path(__file__).parent
    DOMAIN = "sample.example.com"
    TIME_ZONE = "UTC"


class SampleprodSettings(SampleSettings, ProductionDefaults):
    """Production of another service."""


class SampleothervariableSettings(SampleprodSettings):
    """Production of a service whose platform has its own variable for the broker."""

    BROKER_VARIABLE = "SAMPLE_URL"


class SampledatabaseSettings(SampleprodSettings):
    """Production of a service whose broker is its database."""

    BROKER_VARIABLE = "DATABASE_URL"


@pytest.fixture
def read(monkeypatch):
    """Return a function that reads the settings with only these variables set."""

    def read(**variables):
        for name in [*os.environ]:
            monkeypatch.delenv(name)
        for name, value in ({"DJANGO_MODE": "sample"} | variables).items():
            monkeypatch.setenv(name, value)
        return use(SampleSettings)[0]

    return read


@pytest.fixture
def problem(read):
    """Return a function that returns the message that ends a process."""

    def problem(**variables):
        with pytest.raises(EnvironmentVariableError) as caught:
            read(**variables)
        return str(caught.value)

    return problem


class TestValidVariables:
    def test_development_requires_none(self, read):
        assert read()("DEBUG") is True

    def test_development_may_use_another_sqlite_database(self, read):
        database = read(DATABASE_URL="sqlite:///data/other.sqlite3")("DATABASES")["default"]
        assert (database["ENGINE"], database["NAME"]) == (
            "django.db.backends.sqlite3",
            "data/other.sqlite3",
        )

    def test_production_requires_three(self, read):
        value = read(**PRODUCTION)
        assert value("DATABASES")["default"]["HOST"] == "db.example.com"
        assert value("CELERY_BROKER_URL") == BROKER_URL

    @pytest.mark.parametrize(
        ("url", "expected"),
        [
            (BROKER_URL, BROKER_URL),
            ("redis://:hunter2@mq.example.com", "redis://:hunter2@mq.example.com/1"),
            ("postgres://user@db.example.com/name", "pgmq://user@db.example.com/name"),
        ],
    )
    def test_broker_is_that_of_the_scheme(self, read, url, expected):
        value = read(**PRODUCTION | {"CELERY_BROKER_URL": url})
        assert value("CELERY_BROKER_URL") == expected

    def test_url_of_the_broker_may_have_another_variable(self, read):
        variables = PRODUCTION | {"DJANGO_MODE": "sampleothervariable", "SAMPLE_URL": "redis://a/2"}
        assert read(**variables)("CELERY_BROKER_URL") == BROKER_URL
        del variables["CELERY_BROKER_URL"]
        assert read(**variables)("CELERY_BROKER_URL") == "redis://a/2"

    def test_database_may_be_the_broker(self, read):
        variables = PRODUCTION | {"DJANGO_MODE": "sampledatabase"}
        assert read(**variables)("CELERY_BROKER_URL") == BROKER_URL
        del variables["CELERY_BROKER_URL"]
        expected = PRODUCTION["DATABASE_URL"].replace("postgres:", "pgmq:")
        assert read(**variables)("CELERY_BROKER_URL") == expected

    def test_development_may_use_any_broker(self, read):
        assert read()("CELERY_BROKER_URL") == "filesystem://localhost"
        assert read(CELERY_BROKER_URL=BROKER_URL)("CELERY_BROKER_URL") == BROKER_URL

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
            ("SITE_URL", "https://example.com/my-app/v1/", "https://example.com/my-app/v1"),
            ("WEB_CONCURRENCY", "8", 8),
        ],
    )
    def test_value_is_cast(self, read, name, text, value):
        expected = text.replace(" ", "").split(",") if value is None else value
        assert read(**{name: text})(name) == expected


@pytest.mark.parametrize(
    ("name", "text", "line"),
    [
        ("ADMIN_PATH", "/", 'got "/", expected a path such as admin/, of letters, digits, - and _'),
        (
            "ALLOWED_HOSTS",
            "https://example.com",
            'got "https://example.com", expected host names such as api.example.com, '
            "separated by commas, without https:// or a port",
        ),
        ("BIND_HOST", "", 'got "", expected a host name or an IP address, without a port'),
        ("DEBUG", "maybe", 'got "maybe", expected on or off'),
        (
            "DEFAULT_FROM_EMAIL",
            "nobody",
            'got "nobody", expected an e-mail address such as noreply@example.com',
        ),
        ("DJANGO_MODE", "production", None),
        (
            "EMAIL_HOST",
            "smtp:25",
            'got "smtp:25", expected a host name or an IP address, without a port',
        ),
        ("EMAIL_PORT", "0", 'got "0", expected an integer from 1 to 65535'),
        ("EMAIL_USE_TLS", "", 'got "", expected on or off'),
        ("LOG_FORMAT", "xml", 'got "xml", expected text or json'),
        ("LOG_LEVEL", "loud", 'got "loud", expected DEBUG, INFO, WARNING or ERROR'),
        ("PORT", "80a", 'got "80a", expected an integer from 1 to 65535'),
        ("PORT", "65536", 'got "65536", expected an integer from 1 to 65535'),
        ("SITE_URL", "example.com", None),
        ("SITE_URL", "https://example.com/a b", None),
        ("SITE_URL", "https://example.com/app?x=1", None),
        ("WEB_CONCURRENCY", "-1", 'got "-1", expected an integer from 1'),
        ("WEB_THREADS", "0", 'got "0", expected an integer from 1'),
        ("WORKER_CONCURRENCY", "two\nlines", 'got "two\\nlines", expected an integer from 1'),
    ],
)
def test_invalid_value_is_reported_with_what_was_expected(problem, name, text, line):
    message = problem(**{name: text})
    assert (
        message == f"{name}: {line}"
        if line
        else message.startswith(f'{name}: got "{text}", expected ')
    )


@pytest.mark.parametrize(
    ("name", "text", "got"),
    [
        ("SECRET_KEY", None, "nothing"),
        ("SECRET_KEY", "", "0 characters, 0 of them distinct"),
        ("SECRET_KEY", "hunter2", "7 characters, 7 of them distinct"),
        ("SECRET_KEY", "ab" * 30, "60 characters, 2 of them distinct"),
        (
            "SECRET_KEY",
            f"django-insecure-{'hunter2' * 9}",
            "an insecure key that starts with django-insecure-",
        ),
        ("DATABASE_URL", None, "nothing"),
        ("DATABASE_URL", "", '""'),
        ("DATABASE_URL", "hunter2", "not a URL"),
        ("DATABASE_URL", "mysql://user:hunter2@db/name", "a URL that starts with mysql://"),
        ("DATABASE_URL", "postgres://user:hunter2@/name", "a URL without a host"),
        (
            "DATABASE_URL",
            "postgres://user:hunter2@db",
            "a URL without a database name",
        ),
        (
            "DATABASE_URL",
            "postgres://user:hunter2/@db/name",
            "a URL with an invalid port, or a password that is not percent-encoded",
        ),
        (
            "DATABASE_URL",
            "postgres://user:hunter2@db/name?conn_max_age=long",
            "a URL with an invalid option after the ?",
        ),
        ("CELERY_BROKER_URL", None, "nothing"),
        ("CELERY_BROKER_URL", "sqs://user:hunter2@mq", "a URL that starts with sqs://"),
        ("CELERY_BROKER_URL", "user:hunter2@mq", "not a URL"),
        ("SENTRY_DSN", "https://hunter2@sentry.example.com", "an incomplete DSN"),
    ],
)
def test_invalid_secret_is_reported_without_its_value(problem, name, text, got):
    variables = PRODUCTION | {name: text}
    message = problem(**{name: text for name, text in variables.items() if text is not None})
    assert message.startswith(f"{name}: got {got}, expected ")
    assert "hunter2" not in message
    assert "\n" not in message


def test_missing_url_of_the_broker_is_reported_by_its_variable(problem):
    variables = PRODUCTION | {"DJANGO_MODE": "sampleothervariable"}
    del variables["CELERY_BROKER_URL"]
    assert problem(**variables).startswith("SAMPLE_URL: got nothing, expected amqp://, ")
    message = problem(**variables, SAMPLE_URL="memory://")
    assert message.startswith("SAMPLE_URL: got a URL that starts with memory://, expected ")


@pytest.mark.parametrize(
    ("given", "got"),
    [({}, "nothing"), ({"RABBITMQ_URL": "redis://a/2"}, "a URL that starts with redis://")],
)
def test_variable_of_one_broker_expects_its_url(problem, monkeypatch, given, got):
    monkeypatch.setattr(SampleprodSettings, "BROKER_VARIABLE", "RABBITMQ_URL")
    variables = PRODUCTION | given
    del variables["CELERY_BROKER_URL"]
    assert problem(**variables) == f"RABBITMQ_URL: got {got}, expected amqp:// or amqps://..."


def test_broker_whose_package_is_missing_is_reported_with_the_extra(problem, monkeypatch):
    monkeypatch.setattr(broker, "find_spec", lambda package: None)
    message = problem(**PRODUCTION | {"CELERY_BROKER_URL": "redis://:hunter2@mq.example.com"})
    assert message.startswith("CELERY_BROKER_URL: got redis://, which needs prodserver-ops[redis],")
    assert "hunter2" not in message


def test_password_in_another_variable_is_redacted(problem):
    message = problem(EMAIL_HOST="smtp://user:hunter2@mail.example.com")
    assert message.startswith('EMAIL_HOST: got "***@mail.example.com", expected ')


def test_all_invalid_variables_are_reported_at_once(problem):
    message = problem(PORT="80a", DEBUG="maybe")
    assert [line.partition(":")[0] for line in message.splitlines()] == ["DEBUG", "PORT"]


def test_unknown_mode_is_reported_with_the_known_ones(problem):
    assert problem(DJANGO_MODE="production") == (
        'DJANGO_MODE: got "production", expected one of sampledatabase, sampleothervariable, '
        "sampleprod, or unset for development"
    )


def test_command_exits_with_that_line_and_status_1():
    result = subprocess.run(
        [sys.executable, "manage.py", "check"],
        cwd=settings.BASE_DIR,
        env=os.environ | {"PORT": "80a"},
        capture_output=True,
        text=True,
    )
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr == 'PORT: got "80a", expected an integer from 1 to 65535\n'


def test_password_of_flower_has_no_comma():
    with pytest.raises(environment.RedactedError):
        flower.account("admin:a-password,for-this-test")
    assert flower.account("admin:a-password-for-this-test")


def test_other_users_cannot_read_the_embedded_database(monkeypatch, tmp_path):
    path = tmp_path / "var" / "db.sqlite3"
    database = {"ENGINE": "django.db.backends.sqlite3", "NAME": path}
    settings = Mock(DATABASES={"default": database}, VAR_DIR=path.parent)
    monkeypatch.setattr(apps, "settings", settings)
    for mode in (0o700, 0o755):
        apps.create_database_folder()
        assert path.parent.stat().st_mode & 0o777 == 0o700
        path.parent.chmod(mode)
    # A folder that the service does not own as a whole, such as /tmp, keeps its mode.
    settings.VAR_DIR = tmp_path
    apps.create_database_folder()
    assert path.parent.stat().st_mode & 0o777 == 0o755


@pytest.mark.parametrize(("mode", "expected"), [(0o600, []), (0o640, ["settings.W002"])])
def test_an_env_file_that_others_can_read_is_reported(settings, tmp_path, mode, expected):
    settings.BASE_DIR = tmp_path
    assert checks.check_env_file() == []
    (tmp_path / ".env").touch(mode)
    (tmp_path / ".env").chmod(mode)
    assert [message.id for message in checks.check_env_file()] == expected
