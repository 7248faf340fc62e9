"""The campaign against what is compiled, in small."""

import pytest

from campaigns.compiled import run


@pytest.mark.long
def test_sanitizers_object_to_nothing_and_results_are_the_references(compiles: bool) -> None:
    if not compiles:
        pytest.skip("there is no C++ compiler here")
    tally = run(seed=0, count=60, seconds=900)
    assert tally.failures == ()
    assert tally.refused > 0
    assert tally.tried == tally.refused + tally.unchanged == 60
