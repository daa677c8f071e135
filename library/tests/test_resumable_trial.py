"""A short form of trials/resumable.py: workers of resumable imports are killed and deployed."""

import importlib.util
from pathlib import Path

import pytest
import services

PATH = Path(__file__).resolve().parent.parent.parent / "trials" / "resumable.py"

pytestmark = pytest.mark.slow

#: PGMQ delivers the message of a lost worker again after 40 seconds: only the trial waits for it.
BROKERS = (services.RABBITMQ, services.REDIS)


def load():
    spec = importlib.util.spec_from_file_location("resumable_trial", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("broker", BROKERS)
def test_no_row_is_lost_and_each_kill_repeats_at_most_one_step(broker, request):
    for name in (broker, services.POSTGRESQL):
        try:
            services.check(name)
        except services.Unavailable as error:
            if request.config.getoption("--require-services"):
                pytest.fail(str(error))
            pytest.skip(str(error))
    trial = load()
    result = trial.run(broker, kills=8, deploys=1, rows=400)
    assert trial.is_good(result), result
    assert (result["kills"], result["deploys"]) == (8, 1)
