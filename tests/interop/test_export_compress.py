"""Ranks by singular values lose least of the update at their parameters."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tsqlora.interop.lora import LoraAdapter, Target
from tsqlora.interop.rewrite import ranks_for, truncate


def target(singular: list[float], inputs: int, outputs: int, scale: float = 1.0) -> Target:
    """A target whose BA has these singular values."""
    r = len(singular)
    return Target(np.eye(r, inputs), np.eye(outputs, r) * singular, scale)


def test_ranks_by_hand() -> None:
    # Worth by parameter, of 20 and 10 parameters a slot: 100/20, 1/20 against 4/10, 0.01/10.
    adapter = LoraAdapter({"r": 2}, {"large": target([10, 1], 10, 10), "small": target([2, 0.1], 5, 5)})
    assert ranks_for(adapter, 1) == {"large": 1, "small": 1}
    assert ranks_for(adapter, 0.7) == {"large": 1, "small": 0}
    assert ranks_for(adapter, 2) == {"large": 2, "small": 2}
    # A scale of 10 makes 4 into 400, and 0.01 into 1: 0.1 by parameter, above the 0.05 of large's second.
    adapter = LoraAdapter({"r": 2}, {"large": target([10, 1], 10, 10), "small": target([2, 0.1], 5, 5, scale=10)})
    assert ranks_for(adapter, 5 / 3) == {"large": 1, "small": 2}
    # 9 of 20 parameters are worth less than 6.25 of 10.
    adapter = LoraAdapter({"r": 1}, {"large": target([3], 10, 10), "small": target([2.5], 5, 5)})
    assert ranks_for(adapter, 2 / 3) == {"large": 0, "small": 1}


@given(
    values=st.lists(st.lists(st.floats(0.1, 10), min_size=3, max_size=3), min_size=3, max_size=3),
    mean=st.sampled_from((0.5, 1.0, 1.7, 2.5)),
)
def test_nothing_of_equal_cost_loses_less(values: list[list[float]], mean: float) -> None:
    adapter = LoraAdapter({"r": 3}, {str(j): target(row, 4, 4) for j, row in enumerate(values)})
    ranks = ranks_for(adapter, mean)
    assert sum(ranks.values()) == math.floor(3 * mean)

    def lost(ranks: dict[str, int]) -> float:
        return sum(sum(v * v for v in sorted(values[int(name)], reverse=True)[rank:]) for name, rank in ranks.items())

    others = (dict(zip(ranks, choice, strict=True)) for choice in itertools.product(range(4), repeat=3))
    best = min(lost(other) for other in others if sum(other.values()) == sum(ranks.values()))
    assert lost(ranks) == pytest.approx(best, rel=1e-5)


def test_a_layer_that_loses_all_is_gone() -> None:
    adapter = LoraAdapter({"r": 2}, {"a": target([3, 2], 4, 4), "b": target([1, 0.5], 4, 4)})
    cut, errors = truncate(adapter, ranks_for(adapter, 1))
    assert list(cut.targets) == ["a"]
    assert errors == {"b": 1.0}
