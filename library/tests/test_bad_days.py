"""Short forms of trials/bad_days.py."""

import importlib.util
from pathlib import Path

import pytest
import services

PATH = Path(__file__).resolve().parent.parent.parent / "trials" / "bad_days.py"

pytestmark = pytest.mark.slow


@pytest.fixture
def trial(request, monkeypatch):
    """The module of the trial; skips without its servers."""
    for name in (services.RABBITMQ, services.POSTGRESQL):
        try:
            services.check(name)
        except services.Unavailable as error:
            if request.config.getoption("--require-services"):
                pytest.fail(str(error))
            pytest.skip(str(error))
    monkeypatch.syspath_prepend(str(PATH.parent))
    spec = importlib.util.spec_from_file_location("bad_days", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_nobody_reads_the_log(trial):
    found = trial.play_log(requests=48)
    assert trial.PLAYS["log"][1](found), found


def test_a_drill_restores_a_backup_and_leaves_nothing(trial):
    found = trial.play_drill(["intact, SQL with gzip"], recipients=10)
    assert trial.PLAYS["drill"][1](found), found
