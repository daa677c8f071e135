"""The script that brings services of 1.x to 2.0: imports, dotted names and configuration."""

import importlib.util
import sys
from pathlib import Path
from textwrap import dedent

import pytest

SERVICE = Path(__file__).parents[2] / "{{cookiecutter.project_slug}}"
SCRIPT = SERVICE / "vendor" / "prodserver-ops" / "upgrade_from_1.py"
ANSWERS = {
    "project_slug": "prayers",
    "web_server": "granian",
    "broker": "redis",
    "_brokers": {"redis": {"variable": "REDIS_URL"}},
    "__extras": "api,granian,redis,sentry",
}

spec = importlib.util.spec_from_file_location("upgrade_from_1", SCRIPT)
script = importlib.util.module_from_spec(spec)
sys.modules["upgrade_from_1"] = script
spec.loader.exec_module(script)


@pytest.fixture(autouse=True)
def in_service(monkeypatch):
    monkeypatch.chdir(SERVICE)


@pytest.fixture
def record():
    return script.Record("", "", "", None, ANSWERS)


def translate(text, package="rooms", own=()):
    packages = [script.Package("rooms", "rooms"), script.Package("prayers", "prayers")]
    translator = script.Translator(packages, ANSWERS, own)
    new, left = translator.translate(dedent(text), package)
    return new, left


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (
            "from .ops.logs import JsonFormatter",
            "from prodserver_ops.core.logs import JsonFormatter",
        ),
        ("from .ops import logs", "from prodserver_ops.core import logs"),
        ("from .ops import mailer", "from prodserver_ops.mail import transport as mailer"),
        ("from .ops import logs as ours", "from prodserver_ops.core import logs as ours"),
        ("from rooms.ops import models", "from prodserver_ops import models"),
        ("from prayers.ops.models import Lease", "from prodserver_ops.models import Lease"),
        (
            "from .ops.runs import start_run  # noqa: F401",
            "from prodserver_ops.scheduling.claims import claim as start_run  # noqa: F401",
        ),
        (
            "from .ops.tasks import delete_records, digest_task  # ours",
            "from prodserver_ops.tasks import delete_records  # ours\n"
            "from prodserver_ops.mail.tasks import digest_task  # ours",
        ),
        (
            "def f():\n    from .ops import health, tokens",
            "def f():\n    from prodserver_ops.web import health\n"
            "    from prodserver_ops.api import tokens",
        ),
        (
            "from .ops.digests import (\n    Digest,  # one\n    # more\n    register as r,\n)",
            "from prodserver_ops.mail.digests import (\n    Digest,  # one\n    # more\n"
            "    register as r,\n)",
        ),
        (
            "from .ops.digests import DailyDigest, Digest, HourlyDigest, Notification, WeeklyDigest",
            "from prodserver_ops.mail.digests import (\n    DailyDigest,\n    Digest,\n"
            "    HourlyDigest,\n    Notification,\n    WeeklyDigest,\n)",
        ),
        ("import rooms.ops.logs as logs", "import prodserver_ops.core.logs as logs"),
        (
            "import rooms.ops.logs\nx = rooms.ops.logs.JsonFormatter",
            "import prodserver_ops.core.logs\nx = prodserver_ops.core.logs.JsonFormatter",
        ),
        ("x = 'rooms.ops.logs.JsonFormatter'", "x = 'prodserver_ops.core.logs.JsonFormatter'"),
        (
            "x = 'rooms.ops.scheduler:Scheduler'",
            "x = 'prodserver_ops.scheduling.scheduler:Scheduler'",
        ),
        ("x = ['rooms.ops', 'rooms']", "x = ['prodserver_ops', 'rooms']"),
        ("x = f'{y} rooms.ops.logs.access'", "x = f'{y} prodserver_ops.core.logs.access'"),
        ("x = 'rooms.ops.gunicorn_log.GunicornLogger'", "x = 'prodserver_ops.web.gunicorn.Logger'"),
        (
            "from .ops.production_broker import install",
            "from prodserver_ops.broker.redis import install",
        ),
        (
            "é = 'rooms.ops.logs.x'; from .ops import logs",
            "é = 'prodserver_ops.core.logs.x'; from prodserver_ops.core import logs",
        ),
        (
            "from .shops import x\nfrom .ops_room import y",
            "from .shops import x\nfrom .ops_room import y",
        ),
        ("x = 'myrooms.ops.logs', 'rooms.opsy.logs'", "x = 'myrooms.ops.logs', 'rooms.opsy.logs'"),
    ],
)
def test_imports_and_names(old, new):
    result, _ = translate(old)
    assert result == new
    assert translate(result)[0] == new  # Nothing is left for a second time.


def test_relative_imports_of_other_packages():
    old = "from ..ops.schedules import CreateSchedule\n"
    assert translate(old, "rooms.migrations")[0] == (
        "from prodserver_ops.scheduling.operations import CreateSchedule\n"
    )
    assert translate(old, "halls.rooms.migrations")[0] == old


def test_own_modules_of_ops_stay():
    old = "from .ops import logs, ours\nfrom .ops.ours import x\ny = 'rooms.ops.ours.x'\n"
    assert translate(old, own=["ours"]) == (
        "from prodserver_ops.core import logs\nfrom .ops import ours\n"
        "from .ops.ours import x\ny = 'rooms.ops.ours.x'\n",
        [],
    )


@pytest.mark.parametrize(
    ("old", "message"),
    [
        ("from .ops.settings import PACKAGE", "`prodserver_ops.conf.defaults` has no `PACKAGE`"),
        ("from .ops.logs import nothing", "`prodserver_ops.core.logs` has no `nothing`"),
        ("from . import ops", "`ops` itself is imported"),
        ("import rooms.ops", "`rooms.ops` is imported"),
        ("from .ops import api\nx = api.errors", "`from prodserver_ops.api.openapi import errors`"),
        ("x = f'{__package__}.ops.logs.Handler'", "write `prodserver_ops.core.logs`"),
    ],
)
def test_what_is_left_is_listed_with_its_line(old, message):
    _, left = translate("# A comment\n" + old)
    assert [line for line, text in left if message in text]


def test_settings(record):
    old = '''\
        """Settings."""

        from .ops import settings as ops
        from .ops.environment import use
        from .ops.web_server import WEB_BACKEND, get_web_arguments


        class Settings(ops.Defaults):
            """Development."""

            SITE_NAME = "Rooms"
            DOMAIN = "example.com"
            X = ops.SCHEMA_CLASS

            def PRODUCTION_PROCESSES(self):
                return {
                    "web": {
                        "BACKEND": WEB_BACKEND,
                        "ARGS": get_web_arguments(self),
                    },
                    "other": {"BACKEND": WEB_BACKEND, "ARGS": get_web_arguments(self) | {"a": 1}},
                }


        __getattr__, __dir__ = use(Settings)
        '''
    text, left = translate(old)
    text = script.change_settings(text, "rooms/settings.py", "rooms", record)
    assert not left
    assert text == dedent('''\
        """Settings."""

        from pathlib import Path

        from prodserver_ops import conf
        from prodserver_ops.conf.environment import use
        from prodserver_ops.conf import processes


        class Settings(conf.Defaults):
            """Development."""

            SITE_NAME = "Rooms"
            DOMAIN = "example.com"
            PACKAGE = "rooms"
            BASE_DIR = Path(__file__).resolve().parent.parent
            BROKER_VARIABLE = "REDIS_URL"
            X = conf.SCHEMA_CLASS

            def PRODUCTION_PROCESSES(self):
                return {
                    "web": processes.granian(self),
                    "other": {"BACKEND": processes.granian(self)["BACKEND"], "ARGS": processes.granian(self)["ARGS"] | {"a": 1}},
                }


        __getattr__, __dir__ = use(Settings)
        ''')
    assert script.change_settings(text, "rooms/settings.py", "rooms", record) == text


def test_settings_after_a_conflict():
    """The import is that of 2.0, but the team has kept its classes."""
    start = "from prodserver_ops import conf\n"
    classes = "class ProdSettings({0}.ProductionDefaults, Settings):\n    X = {0}.SCHEMA_CLASS\n"
    old, new = (start + classes.format(name) for name in ("ops", "conf"))
    assert translate(old) == (new, [])
    # Another module of this name
    assert translate("import ops\n" + old)[0] == "import ops\n" + old
    assert translate(start + "x = ops.restart()\n")[0] == start + "x = ops.restart()\n"


def test_project(record):
    old = dedent("""\
        dependencies = [
            "celery>=5.7,<5.8",
            "markdown>=3",
            "psycopg>=3",
        ]

        [tool.uv]
        package = false

        [tool.ruff]
        line-length = 100

        [tool.mypy]
        exclude = ["^tests/"]

        [[tool.mypy.overrides]] # Strict
        module = "rooms.ops.*"
        extra_checks = true

        [tool.other]
        """)
    before = 'dependencies = [\n    "celery>=5.7,<5.8",\n]\n'
    after = 'dependencies = [\n    "prodserver-ops[api]",\n]\n'
    new = script.change_project(old, record, before, after)
    assert new == dedent("""\
        dependencies = [
            "markdown>=3",
            "prodserver-ops[api]",
            "psycopg>=3",
        ]

        [tool.uv]
        package = false

        [tool.uv.sources]
        prodserver-ops = { path = "vendor/prodserver-ops" }

        [tool.ruff]
        line-length = 100
        extend-exclude = ["vendor"]

        [tool.mypy]
        exclude = ["^tests/", "^vendor/"]

        [tool.other]
        """)
    assert script.change_project(new, record, "", "") == new


def test_image():
    old = "FROM x\nCOPY pyproject.toml uv.lock ./\nRUN uv sync\n"
    new = "FROM x\nCOPY pyproject.toml uv.lock ./\nCOPY vendor vendor\nRUN uv sync\n"
    assert script.change_image(old) == new
    assert script.change_image(new) == new


def test_every_target_is_in_the_library():
    for name, target in script.MODULES.items():
        if name != "access":
            assert script.get_names(target) is not None, name
    for name, target in script.NAMES.items():
        module, _, leaf = target.rpartition(".")
        assert leaf in script.get_names(module), name


def test_a_module_without_a_successor_is_listed():
    _, left = translate("from .ops.leases import Lease\n")
    assert left == [(1, "`rooms.ops.leases.Lease` is not in 2.0")]
