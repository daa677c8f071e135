"""The command ``add``: what it refuses, and the files that it changes.

``tests/test_additions.py`` of the template adds one of each kind to generated services.
"""

import sys
from pathlib import Path
from types import ModuleType

import pytest
from django.core.management import CommandError, call_command

from prodserver_ops.console import additions


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["task", "Write"], "'Write' is not a valid name"),
        (["task", "write__report"], "'write__report' is not a valid name"),
        (["task", "wörter"], "'wörter' is not a valid name"),
        (["task", "1st"], "'1st' is not a valid name"),
        (["task", "x" * 41], "at most 40"),
        (["task", "lambda"], "'lambda' is a word of Python"),
        (["task", "write", "--app", "auth"], "'auth' is not an app of this service"),
        (["task", "write", "--app", "nothing"], "'nothing' is not an app of this service"),
        (["task", "write", "--crontab", "0 3 * * *"], "--crontab is only for"),
        (["task", "locks"], "tests/test_locks.py exists already"),
        (["schedule", "write", "--crontab", "61 3 * * *"], "'61 3 * * *' is not a valid crontab"),
        (["schedule", "write", "--crontab", "daily"], "'daily' is not a valid crontab"),
        (["schedule", "deliveries_resume"], "a migration has the schedule 'deliveries-resume'"),
        (["app", "json"], "'json' is the name of a Python module or app"),
        (["app", "dummy"], "'dummy' is the name of a Python module or app"),
        (["app", "rooms", "--app", "dummy"], "--app is not for an app"),
        (["process", "worker"], "a process with the name 'worker'"),
        (["process", "release"], "a process with the name 'release'"),
        (["process", "migrate"], "a management command 'migrate'"),
    ],
    ids=str,
)
def test_what_cannot_be_added_is_refused_with_one_line_and_nothing_is_written(
    settings, monkeypatch, arguments, problem
):
    settings.BASE_DIR = Path(__file__).parent.parent
    monkeypatch.setattr(additions.Files, "write", lambda files: pytest.fail(str(files.texts)))
    with pytest.raises(CommandError) as raised:
        call_command("add", *arguments)
    assert problem in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.fixture
def files(settings, tmp_path):
    settings.BASE_DIR = tmp_path
    return additions.Files()


def test_imports_go_below_the_docstring_and_are_not_repeated(files, tmp_path):
    module = tmp_path / "tasks.py"
    module.write_text('"""Tasks."""\n\nfrom __future__ import annotations\n\nimport os\n\nX = os\n')
    imports = ["import os", "from celery import shared_task"]
    files.append(module, "def work(): ...\n", "work", imports)
    files.write()
    text = module.read_text()
    assert text.count("import os") == 1
    assert text.index("__future__") < text.index("celery") < text.index("X = os")
    assert text.endswith("\n\n\ndef work(): ...\n")


def test_a_name_that_a_module_has_is_refused(files, tmp_path):
    module = tmp_path / "tasks.py"
    for text in ("def work(): ...\n", "from other import work\n", "work = 1\n"):
        module.write_text(text)
        with pytest.raises(additions.Refused, match="has work already"):
            files.append(module, "def work(): ...\n", "work", [])


def test_a_module_with_a_syntax_error_is_refused(files, tmp_path):
    (tmp_path / "tasks.py").write_text("def\n")
    with pytest.raises(additions.Refused, match=r"^tasks\.py:1: "):
        files.append(tmp_path / "tasks.py", "", "work", [])


@pytest.mark.parametrize(
    "text",
    ['INSTALLED_APPS = ["a", "b"]\n', "INSTALLED_APPS = get_apps()\n", 'APPS = [\n    "a",\n]\n'],
)
def test_settings_without_a_place_are_refused(files, tmp_path, settings, monkeypatch, text):
    module = ModuleType("settings")
    module.__file__ = str(tmp_path / "settings.py")
    (tmp_path / "settings.py").write_text(text)
    monkeypatch.setitem(sys.modules, settings.SETTINGS_MODULE, module)
    with pytest.raises(additions.Refused, match=r"^settings\.py: no place was found"):
        additions.insert_setting(files, "INSTALLED_APPS", '"rooms",', after="a")
