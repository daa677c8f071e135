"""Settings of a service: they hold in every mode, and production verifies them."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from cbs import BaseSettings
from django.core import checks

from prodserver_ops import conf
from prodserver_ops.conf import channels, environment, flower, queues, use, verification
from prodserver_ops.conf.verification import UnsafeSettingsError
from prodserver_ops.console.checks import check_classes, check_production

LIBRARY = (conf.Defaults, conf.TestDefaults, conf.ProductionDefaults, conf.StagingDefaults)
MODES = ("", "test", "prod", "staging")

ENVIRONMENT = {
    "SECRET_KEY": "a-key-for-this-test-alone-of-more-than-fifty-characters",
    "DATABASE_URL": "postgres://user@db.example.com:5432/name",
    "CELERY_BROKER_URL": "amqp://mq.example.com",
}

#: All settings that a class of the library defines.
NAMES = sorted(
    name
    for name in {name for library in LIBRARY for name in dir(library)}
    if name.isupper() and name not in ("PACKAGE", "BASE_DIR", "SITE_NAME", "DOMAIN")
)


class Value:
    """A value that no class of the library has."""


@pytest.fixture
def make(monkeypatch):
    """Return a function that makes the classes of a service; it returns the settings of a mode."""
    known = BaseSettings._BaseSettings__children
    monkeypatch.setattr(BaseSettings, "_BaseSettings__children", dict(known))
    monkeypatch.setattr(verification, "used", [])

    def make(
        mode, values=None, in_mode=None, order=lambda *bases: bases, variables=ENVIRONMENT, **more
    ):
        names = {
            "PACKAGE": "sample",
            "BASE_DIR": Path(__file__).parent,
            "SITE_NAME": "Sample",
            "DOMAIN": "sample.example.com",
            "INSTALLED_APPS": ["django.contrib.sessions"],
            "MIDDLEWARE": ["django.middleware.csrf.CsrfViewMiddleware"],
            "__module__": __name__,
        }
        for name in [*os.environ]:
            monkeypatch.delenv(name)
        for name, value in ({"DJANGO_MODE": mode} | variables).items():
            monkeypatch.setenv(name, value)
        base = type("Settings", (conf.Defaults,), names | (values or {}))
        own = {"__module__": __name__} | (in_mode or {})
        type("TestSettings", order(base, conf.TestDefaults), own)
        production = type("ProdSettings", order(base, conf.ProductionDefaults), own)
        type("StagingSettings", order(production, conf.StagingDefaults), own)
        return use(base)[0]

    return make


@pytest.mark.parametrize("mode", MODES)
def test_every_setting_of_the_service_holds_in_every_mode(make, monkeypatch, mode):
    # Some of the values are refused, which other tests show.
    monkeypatch.setattr(verification, "verify_class", lambda *args: None)
    values = {name: Value() for name in NAMES}
    get = make(mode, values, variables={})
    assert len(NAMES) > 90
    assert [name for name in NAMES if get(name) is not values[name]] == []


@pytest.mark.parametrize("part", [channels.Defaults, flower.Defaults, queues.Defaults])
def test_settings_of_a_part_hold_too(part):
    names = [name for name in vars(part) if name.isupper()]
    values = {name: Value() for name in names}
    base = type("PartSettings", (part, conf.Defaults), values)
    settings = type("PartprodSettings", (base, conf.ProductionDefaults), {})()
    assert names
    assert [name for name in names if getattr(settings, name) is not values[name]] == []


def test_production_still_replaces_what_the_service_does_not_set(make):
    get = make("prod")
    assert (get("DEBUG"), get("SESSION_COOKIE_SECURE"), get("LOG_FORMAT")) == (False, True, "json")
    assert get("STORAGES")["staticfiles"]["BACKEND"].startswith("prodserver_ops.web.static.")
    assert make("staging")("EMAIL_BACKEND").endswith("dummy.EmailBackend")


@pytest.mark.parametrize("mode", ["prod", "staging"])
@pytest.mark.parametrize(
    ("name", "value", "line"),
    [
        ("DEBUG", True, "is on, which shows code and settings to visitors. Write DEBUG = False"),
        (
            "SECRET_KEY",
            "django-insecure-x",
            "has an insecure key that starts with django-insecure-",
        ),
        ("SECRET_KEY_FALLBACKS", ["short"], "has 5 characters, 5 of them distinct."),
        ("SESSION_COOKIE_SECURE", False, "Write SESSION_COOKIE_SECURE = True"),
        ("CSRF_COOKIE_SECURE", False, "Write CSRF_COOKIE_SECURE = True"),
        ("SECURE_SSL_REDIRECT", False, "Write SECURE_SSL_REDIRECT = True"),
        ("ALLOWED_HOSTS", ["*"], "is ['*'], which any host matches."),
        ("ALLOWED_HOSTS", ["localhost", "127.0.0.1"], "has no public host."),
        ("ALLOWED_HOSTS", [], "has no public host."),
        ("CELERY_BROKER_URL", "memory://", "is memory://, which other machines and containers"),
    ],
)
def test_production_refuses_what_it_must_not_have(make, name, value, line, mode):
    with pytest.raises(UnsafeSettingsError) as caught:
        make(mode, {name: value})
    (found,) = str(caught.value).splitlines()
    assert found.startswith(f"test_verification.py, class Settings: {name} ")
    assert line in found
    assert f" in class {mode.title()}Settings (" in found
    assert "django-insecure-x" not in found
    make("")
    make("test")


def test_production_reports_all_faults_at_once(make):
    values = {"DEBUG": True, "SESSION_COOKIE_SECURE": False, "ALLOWED_HOSTS": ["*"]}
    with pytest.raises(UnsafeSettingsError) as caught:
        make("prod", values)
    assert len(str(caught.value).splitlines()) == 3


def test_an_override_in_the_class_of_the_mode_mends_a_fault(make):
    assert make("prod", {"DEBUG": True}, {"DEBUG": False})("DEBUG") is False


def test_a_silenced_fault_is_allowed(make):
    silenced = {"SILENCED_SYSTEM_CHECKS": ["security.W008"], "SECURE_SSL_REDIRECT": False}
    assert make("prod", silenced)("SECURE_SSL_REDIRECT") is False


def test_the_environment_may_turn_the_redirect_off_and_name_local_hosts(make):
    variables = ENVIRONMENT | {"SECURE_SSL_REDIRECT": "off", "ALLOWED_HOSTS": "localhost"}
    assert make("prod", variables=variables)("SECURE_SSL_REDIRECT") is False


def test_a_fault_from_the_environment_names_the_variable(make):
    with pytest.raises(UnsafeSettingsError, match=r"^variable DEBUG: DEBUG is on"):
        make(
            "prod",
            {"DEBUG": conf.env(False, cast=environment.boolean)},
            variables=ENVIRONMENT | {"DEBUG": "on"},
        )


def test_without_sessions_and_forms_cookies_need_not_be_secure(make):
    values = {"SESSION_COOKIE_SECURE": False, "CSRF_COOKIE_SECURE": False}
    make("prod", values | {"INSTALLED_APPS": [], "MIDDLEWARE": []})


def test_staging_refuses_the_mail_server_of_production(make):
    values = {"EMAIL_HOST": "smtp.example.com"}
    assert make("prod", values)("EMAIL_HOST") == "smtp.example.com"
    expected = r"class Settings: EMAIL_HOST would send .* Write EMAIL_HOST = \"\" in class Staging"
    with pytest.raises(UnsafeSettingsError, match=expected):
        make("staging", values)
    assert make("staging", values, values)("EMAIL_HOST") == "smtp.example.com"
    variable = {"EMAIL_HOST": "smtp.example.com"}
    assert make("staging", variables=ENVIRONMENT | variable)("EMAIL_HOST") == "smtp.example.com"


def test_tests_refuse_the_broker_of_development(make):
    values = {"CELERY_BROKER_URL": "redis://localhost"}
    assert make("", values)("CELERY_BROKER_URL") == "redis://localhost"
    with pytest.raises(UnsafeSettingsError, match='Write CELERY_BROKER_URL = "memory://" in class'):
        make("test", values)
    make("test", values, {"CELERY_BROKER_URL": "memory://"})
    make("test", variables={"CELERY_BROKER_URL": "amqp://localhost"})


class TestOrder:
    def test_the_order_of_release_2_0_is_a_warning(self, make):
        make("", order=lambda *bases: bases[::-1])
        warnings = check_classes()
        assert {warning.id for warning in warnings} == {"settings.W001"}
        assert [warning.hint for warning in warnings] == [
            "Write class TestSettings(Settings, conf.TestDefaults):",
            "Write class ProdSettings(Settings, conf.ProductionDefaults):",
            "Write class StagingSettings(ProdSettings, conf.StagingDefaults):",
        ]

    def test_values_that_it_drops_are_an_error(self, make):
        make("", {"STORAGES": {}, "DEBUG": True}, order=lambda *bases: bases[::-1])
        error = next(error for error in check_classes() if "ProdSettings" in error.msg)
        assert (error.id, error.level) == ("settings.E003", checks.ERROR)
        assert error.msg.startswith("test_verification.py, class ProdSettings: ")
        assert error.msg.endswith(" DEBUG, STORAGES.") or error.msg.endswith(" STORAGES, DEBUG.")

    def test_the_right_order_is_not_reported(self, make):
        make("", {"STORAGES": {}})
        assert check_classes() == []

    def test_the_dummy_project_has_it(self):
        assert check_classes() == []


class TestPlainModule:
    """A process with a plain settings module."""

    SETTINGS = """
from pathlib import Path

BASE_DIR = Path(__file__).parent
DEBUG = False
USE_TZ = True
INSTALLED_APPS = ["django.contrib.admin", "django.contrib.auth", "django.contrib.contenttypes",
    "django.contrib.sessions", "prodserver_ops", "django_celery_beat", "django_prodserver"]
MIDDLEWARE = ["django.middleware.csrf.CsrfViewMiddleware"]
DATABASES = {"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": BASE_DIR / "db"}}
CELERY_BROKER_URL = "amqp://localhost:1"
SECRET_KEY = "short"
from prodserver_ops.conf import add_settings

add_settings(globals(), package="sample")
"""
    CELERY = """
from prodserver_ops.worker.app import CeleryApp

celery_app = CeleryApp("sample")
celery_app.config_from_object("django.conf:settings", namespace="CELERY")
"""

    @pytest.fixture
    def run(self, tmp_path):
        """Return a function that runs a command; it returns its status and its output."""
        package = tmp_path / "sample"
        package.mkdir()
        (package / "__init__.py").write_text(self.CELERY)
        (tmp_path / "config.py").write_text(self.SETTINGS)

        def run(*command):
            names = {"PATH": os.environ["PATH"], "DJANGO_SETTINGS_MODULE": "config"}
            done = subprocess.run(
                [sys.executable, "-m", *command],
                cwd=tmp_path,
                env=names | {"PYTHONPATH": str(tmp_path)},
                capture_output=True,
                text=True,
                timeout=60,
                check=False,
            )
            return done.returncode, done.stdout + done.stderr

        return run

    @pytest.mark.parametrize(
        "command",
        [
            *(("django", "prodserver", name) for name in ("web", "worker", "beat")),
            *(("celery", "--app=sample", name) for name in ("worker", "beat")),
        ],
    )
    def test_refuses_to_start(self, run, command):
        status, output = run(*command)
        assert status == 1, output
        assert re.findall(r"config\.py: (\w+)", output) == [
            "SECRET_KEY",
            "SESSION_COOKIE_SECURE",
            "CSRF_COOKIE_SECURE",
            "SECURE_SSL_REDIRECT",
            "ALLOWED_HOSTS",
        ]
        assert "Traceback" not in output

    def test_its_tests_and_commands_run(self, run):
        status, output = run("django", "diffsettings")
        assert status == 0, output

    def test_check_deploy_reports_the_hosts(self, settings):
        settings.CELERY_BROKER_URL, settings.ALLOWED_HOSTS = "amqp://localhost", ["*"]
        assert check_production() == []
        settings.ADDED_SETTINGS = []
        (error,) = check_production()
        assert (error.id, error.level) == ("settings.E001", checks.ERROR)
