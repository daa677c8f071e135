"""``add_settings()``: a project with a plain settings module."""

from pathlib import Path

import pytest
from django.core.exceptions import ImproperlyConfigured

from prodserver_ops.conf import add_settings, flower, processes
from prodserver_ops.conf.environment import EnvironmentVariableError


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Return the names of a settings module."""
    for name in ("CELERY_BROKER_URL", "PORT", "WORKER_POOL"):
        monkeypatch.delenv(name, raising=False)
    file = tmp_path / "sample" / "settings.py"
    return {"__name__": "sample.settings", "__file__": str(file), "DEBUG": True}


def test_module_gets_the_settings_and_the_processes(module, tmp_path):
    add_settings(module, package="sample")
    assert module["CELERY_TASK_DEFAULT_QUEUE"] == module["SITE_NAME"] == "sample"
    assert module["ASGI_APPLICATION"] == "sample.asgi.application"
    assert module["BASE_DIR"] == tmp_path
    assert list(module["PRODUCTION_PROCESSES"]) == ["web", "worker", "beat"]
    assert module["PRODUCTION_PROCESSES"]["worker"]["APP"] == "sample.celery_app"


def test_setting_of_the_module_is_kept_and_others_follow_from_it(module):
    module |= {"CELERY_BROKER_URL": "amqp://mq", "WORKER_POOL": "solo", "TIME_ZONE": "Asia/Tokyo"}
    add_settings(module, package="sample")
    assert module["WORKER_POOL"] == "solo"
    assert module["CELERY_TASK_DEFAULT_QUEUE_TYPE"] == "quorum"
    assert module["CELERY_TIMEZONE"] == "Asia/Tokyo"
    assert not {"WORKER_POOL", "TIME_ZONE"} & set(module["ADDED_SETTINGS"])


def test_other_settings_are_not_called(module):
    module["SHOW_TOOLBAR"] = shown = pytest.fail
    add_settings(module, package="sample")
    assert module["SHOW_TOOLBAR"] is shown


def test_production_requires_a_broker(module):
    module["DEBUG"] = False
    with pytest.raises(
        EnvironmentVariableError, match=r"^CELERY_BROKER_URL: got nothing, expected"
    ):
        add_settings(module, package="sample")


def test_domain_is_the_first_host(module):
    module["ALLOWED_HOSTS"] = [".example.com", "example.org"]
    assert add_settings(module, package="sample").DOMAIN == "example.com"


def test_second_call_is_refused(module):
    add_settings(module, package="sample")
    with pytest.raises(ImproperlyConfigured, match="already called by a module that this one"):
        add_settings(module, package="sample")


def test_processes_can_be_chosen(module):
    settings = add_settings(module, package="sample", parts=[flower.Defaults])
    assert processes.worker(settings, queues="a", concurrency=1)["ARGS"]["concurrency"] == 1
    assert flower.get_process(settings)["ARGS"]["port"] == 5555
    module["PRODUCTION_PROCESSES"] = {"web": processes.granian(settings)}
    assert module["FLOWER_BASIC_AUTH"] == ""


def test_databases_get_the_options_that_they_lack(module):
    module["DATABASES"] = {
        "default": {"ENGINE": "django.db.backends.sqlite3", "OPTIONS": {"timeout": 3}},
        "other": {"ENGINE": "django.db.backends.postgresql"},
        "foreign": {"ENGINE": "django.db.backends.oracle"},
    }
    add_settings(module, package="sample")
    databases = module["DATABASES"]
    assert databases["default"]["OPTIONS"]["timeout"] == 3
    assert databases["default"]["OPTIONS"]["transaction_mode"] == "IMMEDIATE"
    assert databases["other"]["OPTIONS"]["connect_timeout"] == 5
    assert "OPTIONS" not in databases["foreign"]


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("settings", "settings.py"),
        ("config.settings.local", "config/settings/local.py"),
        ("config.settings", "config/settings/__init__.py"),
    ],
)
def test_base_dir_has_the_package(module, tmp_path, name, file):
    module |= {"__name__": name, "__file__": str(tmp_path / file)}
    add_settings(module, package="sample")
    assert Path(module["BASE_DIR"]) == tmp_path


def test_base_dir_may_be_a_string(module, tmp_path):
    module["BASE_DIR"] = str(tmp_path)
    add_settings(module, package="sample")
    assert module["BASE_DIR"] == str(tmp_path)
    assert str(module["VAR_DIR"]) == f"{tmp_path}/var"
