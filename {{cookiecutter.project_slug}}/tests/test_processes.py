"""Processes: all run under ``python manage.py prodserver``."""

import re
from pathlib import Path

import pytest
from django.core.management import CommandError

from {{ cookiecutter.project_slug }}.management.commands.prodserver import Command

PROCESSES = ["web", "worker", "beat"]


def test_the_settings_and_the_procfile_name_the_same(settings):
    procfile = (Path(settings.BASE_DIR) / "Procfile").read_text()
    assert list(settings.PRODUCTION_PROCESSES) == PROCESSES
    assert re.findall(r"^(\w+): python manage.py prodserver \1$", procfile, re.M) == PROCESSES


def test_a_list_of_them_can_be_printed(capsys):
    Command().run_from_argv(["manage.py", "prodserver", "--list"])
    assert capsys.readouterr().out.split() == PROCESSES


@pytest.mark.parametrize(
    ("name", "problem"), [("cron", "unknown process 'cron'"), (None, "no process named")]
)
def test_a_bad_name_is_told_with_the_good_ones(name, problem):
    with pytest.raises(CommandError, match=f"{problem}; the processes are: web, worker, beat"):
        Command().start_process(name)


def test_an_empty_port_means_the_default(settings):
    address = settings.PRODUCTION_PROCESSES["web"]["ARGS"]["bind"]
    assert re.fullmatch(r"[\d.]+:\d+", address)
