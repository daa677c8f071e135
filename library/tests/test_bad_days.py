"""Short forms of trials/bad_days.py."""

import pytest
import services

pytestmark = pytest.mark.slow


@pytest.fixture
def trial(load_trial):
    """The module of the trial; skips without its servers."""
    return load_trial("bad_days", services.RABBITMQ, services.POSTGRESQL)


def test_nobody_reads_the_log(trial):
    found = trial.play_log(requests=48)
    assert trial.PLAYS["log"][1](found), found


def test_a_drill_restores_a_backup_and_leaves_nothing(trial):
    names = [
        "intact, SQL with gzip",
        "another check constraint",
        "half of a table with keys of text",
    ]
    found = trial.play_drill(names, recipients=10)
    assert trial.PLAYS["drill"][1](found), found
