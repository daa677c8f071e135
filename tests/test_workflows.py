"""zizmor finds nothing in the workflows that ``trials/judges.toml`` does not accept."""

import pytest

from tests.conftest import ROOT
from trials.judges import judge_zizmor, read_accepted


def find(folder):
    """Return the findings that are not accepted."""
    return {("zizmor", *finding) for finding in judge_zizmor(folder)} - read_accepted().keys()


def test_this_repository():
    assert find(ROOT) == set()


@pytest.mark.parametrize(
    "answers", [{}, {"deploy": "dockerfile"}, {"deploy": "systemd", "compose": True}], ids=str
)
def test_generated_services(bake, answers):
    assert find(bake(**answers)) == set()
