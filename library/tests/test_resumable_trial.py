"""A short form of trials/resumable.py: workers of resumable imports are killed and deployed."""

import pytest
import services

pytestmark = pytest.mark.slow

#: PGMQ delivers the message of a lost worker again after 40 seconds: only the trial waits for it.
BROKERS = (services.RABBITMQ, services.REDIS)


@pytest.mark.parametrize("broker", BROKERS)
def test_no_row_is_lost_and_each_kill_repeats_at_most_one_step(broker, load_trial):
    trial = load_trial("resumable", broker, services.POSTGRESQL)
    result = trial.run(broker, kills=8, deploys=1, rows=400)
    assert trial.is_good(result), result
    assert (result["kills"], result["deploys"]) == (8, 1)
