"""Choices: every pair of values occurs in a combination, and the combinations work."""

import itertools
import os

import pytest

from tests.conftest import require_server
from trials import pairs

COMBINATIONS = pairs.make_combinations()


def test_each_supported_pair_occurs_in_a_combination():
    choices, refused = pairs.read_choices(), pairs.read_unsupported()
    missing = [
        pair
        for (one, values), (other, others) in itertools.combinations(choices.items(), 2)
        for pair in ({one: x, other: y} for x in values for y in others)
        if pair not in refused and not any(pair.items() <= c.items() for c in COMBINATIONS)
    ]
    assert missing == []
    assert not any(row.items() <= c.items() for row in refused for c in COMBINATIONS)


@pytest.mark.parametrize("index", range(len(COMBINATIONS)))
def test_combination_is_generated_and_passes_ruff(index):
    results = pairs.run_trial(index, COMBINATIONS[index], pairs.FAST_STEPS)
    assert len(results) == len(pairs.FAST_STEPS) and not isinstance(results[-1], str), results[-1]


@pytest.mark.slow
@pytest.mark.parametrize("index", pairs.choose_sample(int(os.environ.get("PAIRS", "1"))))
def test_combination_works(request, index):
    for name, port in (("PostgreSQL", 5432), ("RabbitMQ", 5672), ("Redis", 6379)):
        require_server(request, name, port, f"see {name}'s documentation")
    results = pairs.run_trial(index, COMBINATIONS[index])
    assert len(results) == len(pairs.STEPS) and not isinstance(results[-1], str), results[-1]
