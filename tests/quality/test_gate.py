"""Gates by numbers that can be computed by hand."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tsqlora.errors import SettingsError
from tsqlora.quality.gate import GATES, Gate, by_share, by_surest, left_out
from tsqlora.quality.rule import ScoringRule


def test_a_label_passes_if_it_is_at_least_as_likely_as_its_share_of_the_trusted_rows() -> None:
    likelihood = np.array([0.8, 0.7, 0.3, 0.2, 0.001])
    margin = by_share(-np.log(likelihood), np.array([0, 0, 1, 1, 2]), np.array([0, 0, 0, 1]), True)
    # Shares 3/4 and 1/4; nothing is trusted of class 2, so that its row is not judged.
    np.testing.assert_allclose(margin[:4], np.log(likelihood[:4] / [0.75, 0.75, 0.25, 0.25]))
    assert margin[4] == np.inf


def test_a_number_passes_if_its_squared_error_is_at_most_the_trusted_rows_variance() -> None:
    margin = by_share(np.array([0.9, 1.0, 1.1]), np.zeros(3), np.array([1.0, 3.0]), False)
    np.testing.assert_allclose(margin, [0.1, 0.0, -0.1])


@pytest.mark.parametrize("classes", [True, False])
def test_the_surest_fifth_does_not_pass_but_for_classes_without_a_trusted_row(classes: bool) -> None:
    losses, labels = np.arange(10.0), np.array([0] * 9 + [1])
    out = by_surest(losses, labels, np.array([0, 0]), classes) < 0
    assert np.flatnonzero(out).tolist() == ([8] if classes else [8, 9])


def test_of_too_few_rows_the_nearest_to_passing_follow() -> None:
    margin = np.array([1.0, -2.0, -1.0, -3.0, np.inf])
    assert [np.flatnonzero(left_out(margin, least)).tolist() for least in (2, 3, 4, 5)] == [[1, 2, 3], [1, 3], [3], []]


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=30), st.data())
def test_enough_rows_are_left_and_no_row_leaves_before_one_farther_below(
    margins: list[float], data: st.DataObject
) -> None:
    margin, least = np.array(margins), data.draw(st.integers(0, len(margins)))
    out = left_out(margin, least)
    assert (~out).sum() >= least
    assert not out[margin >= 0].any()
    if out.any() and (~out).sum() > max(least, (margin >= 0).sum()):
        pytest.fail("more rows are left than pass or are needed")
    assert not out.any() or margin[out].max() <= margin[~out].min(initial=np.inf)


@pytest.mark.parametrize("gate", GATES)
def test_a_gate_without_trusted_rows_is_refused(gate: Gate) -> None:
    with pytest.raises(SettingsError, match=gate):
        ScoringRule(gate=gate).require_trusted(False)
