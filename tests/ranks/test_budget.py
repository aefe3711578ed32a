from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tsqlora.errors import SettingsError
from tsqlora.ranks.budget import budget, caps, costs, fill, used

SHAPES = {"query": (64, 32), "head": (64, 2)}

shapes_of_layers = st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=8).map(
    lambda sizes: {f"layer.{k}": size for k, size in enumerate(sizes)}
)


def test_a_rank_costs_inputs_plus_outputs() -> None:
    assert costs(SHAPES) == {"query": 96, "head": 66}
    assert used({"query": 3, "head": 0}, SHAPES) == 288


def test_no_cap_is_above_the_smaller_side() -> None:
    assert caps(SHAPES, 8) == {"query": 8, "head": 2}
    assert caps(SHAPES, 1) == {"query": 1, "head": 1}


@given(shapes_of_layers, st.integers(1, 64))
def test_the_budget_is_what_a_uniform_rank_uses(shapes: dict[str, tuple[int, int]], rank: int) -> None:
    assert budget(float(rank), shapes) == used(dict.fromkeys(shapes, rank), shapes)


@pytest.mark.parametrize(("mean_rank", "expected"), [(0.7, 7), (2.5, 25), (8.0, 80), (0.29, 2), (1.1, 11), (0.01, 0)])
def test_parts_of_a_parameter_are_dropped(mean_rank: float, expected: int) -> None:
    assert budget(mean_rank, {"a": (6, 4)}) == expected


@given(st.integers(1, 10**9), shapes_of_layers)
def test_a_mean_rank_found_by_division_loses_nothing(total: int, shapes: dict[str, tuple[int, int]]) -> None:
    assert budget(total / sum(costs(shapes).values()), shapes) == total


@given(st.integers(1, 10**7), shapes_of_layers)
def test_a_mean_rank_in_decimals_is_taken_exactly(thousandths: int, shapes: dict[str, tuple[int, int]]) -> None:
    assert budget(thousandths / 1000, shapes) == thousandths * sum(costs(shapes).values()) // 1000


@pytest.mark.parametrize("mean_rank", [0.0, -1.0, float("nan"), float("inf")])
def test_a_mean_rank_that_is_no_number_above_zero_is_refused(mean_rank: float) -> None:
    with pytest.raises(SettingsError, match=r"ranks\.mean is"):
        budget(mean_rank, SHAPES)


@given(shapes_of_layers, st.integers(0, 600), st.data())
def test_filling_leaves_nothing_that_buys_a_rank(
    shapes: dict[str, tuple[int, int]], total: int, data: st.DataObject
) -> None:
    wishes = {layer: data.draw(st.floats(-5, 20)) for layer in shapes}
    limits = caps(shapes, 6)
    empty = dict.fromkeys(shapes, 0)
    ranks = fill(empty, wishes=wishes, order=list(shapes), shapes=shapes, caps=limits, budget=total)
    left = total - used(ranks, shapes)
    assert left >= 0
    assert all(ranks[n] == limits[n] or cost > left for n, cost in costs(shapes).items())


def test_filling_goes_by_remainder_then_by_the_given_order() -> None:
    shapes = dict.fromkeys("abc", (1, 1))
    limits = dict.fromkeys("abc", 4)
    start = {"a": 1, "b": 1, "c": 1}
    wishes = {"a": 1.5, "b": 1.5 + 1e-12, "c": Fraction(19, 10)}

    def filled(order: str, total: int) -> dict[str, int]:
        return fill(start, wishes=wishes, order=order, shapes=shapes, caps=limits, budget=total)

    assert filled("abc", 8) == {"a": 1, "b": 1, "c": 2}
    assert filled("abc", 10) == {"a": 2, "b": 1, "c": 2}
    assert filled("cba", 10) == {"a": 1, "b": 2, "c": 2}


def test_filling_passes_over_a_layer_that_is_too_dear() -> None:
    shapes, limits = {"wide": (50, 50), "slim": (5, 5)}, {"wide": 4, "slim": 4}
    wishes = {"wide": 4.0, "slim": 0.0}
    ranks = fill({"wide": 0, "slim": 0}, wishes=wishes, order=["wide", "slim"], shapes=shapes, caps=limits, budget=120)
    assert ranks == {"wide": 1, "slim": 2}
