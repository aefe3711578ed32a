import random
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tsqlora.errors import SettingsError
from tsqlora.paper.budget import Sensitivity, allocate, budget, caps, costs, shares, used
from tsqlora.training.lora import uniform_ranks

shapes_of_layers = st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=8).map(
    lambda sizes: {f"layer.{k}": size for k, size in enumerate(sizes)}
)


@given(st.integers(1, 10**9), shapes_of_layers)
def test_a_mean_rank_found_by_division_loses_nothing(total: int, shapes: dict[str, tuple[int, int]]) -> None:
    assert budget(total / sum(costs(shapes).values()), shapes) == total


@given(st.integers(1, 10**7), shapes_of_layers)
def test_a_mean_rank_in_decimals_is_taken_exactly(thousandths: int, shapes: dict[str, tuple[int, int]]) -> None:
    assert budget(thousandths / 1000, shapes) == thousandths * sum(costs(shapes).values()) // 1000


sizes = st.tuples(st.integers(1, 40), st.integers(1, 40))
grid_values = st.integers(0, 2000).map(lambda k: k / 16)
any_values = st.floats(0, allow_nan=False, allow_infinity=False)
mean_ranks = st.integers(8, 64).map(lambda k: k / 8)
gammas = st.sampled_from([0.0, 0.5, 1.0, 2.0])


@st.composite
def sensitivities(draw: st.DrawFn, *, values: st.SearchStrategy[float], one_shape: bool = False) -> Sensitivity:
    layers = [f"layer.{k}" for k in range(draw(st.integers(1, 8)))]
    size = draw(sizes)
    shapes = {layer: size if one_shape else draw(sizes) for layer in layers}
    return Sensitivity({layer: draw(values) for layer in layers}, shapes)


def by_hand(values: Mapping[str, float], shape: tuple[int, int] = (8, 8)) -> Sensitivity:
    return Sensitivity(values, dict.fromkeys(values, shape))


def replaced(sensitivity: Sensitivity, values: Mapping[str, float]) -> Sensitivity:
    return Sensitivity(values, sensitivity.shapes)


def slow_shares(
    weights: Mapping[str, float],
    *,
    costs: Mapping[str, int],
    low: Mapping[str, int],
    high: Mapping[str, int],
    budget: int,
) -> dict[str, float]:
    """The slow twin: bisection on the water level, in plain floats."""

    def at(level: float) -> dict[str, float]:
        return {n: min(max(level * w, low[n]), high[n]) for n, w in weights.items()}

    below, above = 0.0, 1e6
    for _ in range(200):
        middle = (below + above) / 2
        if sum(share * costs[n] for n, share in at(middle).items()) <= budget:
            below = middle
        else:
            above = middle
    return at(below)


@given(sensitivities(values=any_values), mean_ranks, gammas, st.integers(0, 1), st.integers(8, 16))
def test_budget_and_bounds_hold_and_nothing_affordable_is_left(
    sensitivity: Sensitivity, mean_rank: float, gamma: float, min_rank: int, max_rank: int
) -> None:
    shapes = sensitivity.shapes
    ranks = allocate(sensitivity, mean_rank=mean_rank, min_rank=min_rank, max_rank=max_rank, gamma=gamma)
    limits = caps(shapes, max_rank)
    left = budget(mean_rank, shapes) - used(ranks, shapes)
    assert left >= 0
    assert all(min(min_rank, limits[n]) <= ranks[n] <= limits[n] for n in shapes)
    assert all(ranks[n] == limits[n] or cost > left for n, cost in costs(shapes).items())
    assert list(ranks) == list(shapes)


@given(sensitivities(values=st.integers(0, 5).map(float)), mean_ranks, gammas, st.randoms(use_true_random=False))
def test_the_order_of_the_layers_does_not_count(
    sensitivity: Sensitivity, mean_rank: float, gamma: float, rng: random.Random
) -> None:
    names = list(sensitivity.shapes)
    rng.shuffle(names)
    values = {n: sensitivity.values[n] for n in names}
    shuffled = Sensitivity(values, {n: sensitivity.shapes[n] for n in names})
    expected = allocate(sensitivity, mean_rank=mean_rank, gamma=gamma)
    assert allocate(shuffled, mean_rank=mean_rank, gamma=gamma) == expected


@given(sensitivities(values=grid_values), mean_ranks, gammas, st.floats(1e-12, 1e12))
def test_the_scale_of_the_sensitivities_does_not_count(
    sensitivity: Sensitivity, mean_rank: float, gamma: float, scale: float
) -> None:
    scaled = replaced(sensitivity, {n: value * scale for n, value in sensitivity.values.items()})
    expected = allocate(sensitivity, mean_rank=mean_rank, gamma=gamma)
    assert allocate(scaled, mean_rank=mean_rank, gamma=gamma) == expected


@given(st.integers(1, 30), st.integers(1, 30), st.floats(1e-9, 1e9))
def test_whole_shares_stay_whole_under_rounding_noise(a: int, b: int, scale: float) -> None:
    sensitivity = by_hand({"a": a * scale, "b": b * scale, "c": a * scale}, shape=(99, 99))
    ranks = allocate(sensitivity, mean_rank=(2 * a + b) / 3, max_rank=99)
    assert ranks == {"a": a, "b": b, "c": a}


@given(sensitivities(values=any_values, one_shape=True), mean_ranks, gammas)
def test_a_more_sensitive_layer_of_the_same_shape_never_gets_fewer(
    sensitivity: Sensitivity, mean_rank: float, gamma: float
) -> None:
    ranks = allocate(sensitivity, mean_rank=mean_rank, gamma=gamma)
    upwards = sorted(ranks, key=lambda n: (sensitivity.values[n], ranks[n]))
    assert [ranks[n] for n in upwards] == sorted(ranks.values())


@given(st.data())
@settings(max_examples=60)
def test_shares_equal_a_bisection(data: st.DataObject) -> None:
    sensitivity = data.draw(sensitivities(values=st.integers(0, 50).map(lambda k: k / 50)))
    weights = dict(sensitivity.values)
    weights["layer.0"] = 1.0
    cost, high = costs(sensitivity.shapes), caps(sensitivity.shapes, 12)
    least = data.draw(st.integers(0, 3))
    low = {n: min(least, cap) for n, cap in high.items()}
    cheapest = sum(low[n] * cost[n] for n in cost)
    total = cheapest + data.draw(st.integers(0, 400))
    exact = shares(weights, costs=cost, low=low, high=high, budget=total)
    slow = slow_shares(weights, costs=cost, low=low, high=high, budget=total)
    assert {n: float(share) for n, share in exact.items()} == pytest.approx(slow, abs=1e-6)


@pytest.mark.parametrize(
    ("values", "options", "expected"),
    [
        ({"a": 1, "b": 2, "c": 3}, {"mean_rank": 4}, {"a": 2, "b": 4, "c": 6}),
        # What a capped layer cannot take goes to the others.
        ({"a": 100, "b": 2, "c": 1}, {"mean_rank": 4, "max_rank": 6}, {"a": 6, "b": 4, "c": 2}),
        # Ties go to the more sensitive layer, then by name.
        ({"b": 1, "a": 1}, {"mean_rank": 2.5}, {"b": 2, "a": 3}),
        ({"a": 1, "b": 1.5}, {"mean_rank": 2.5, "gamma": 0}, {"a": 2, "b": 3}),
        # A layer without sensitivity gets the minimum.
        ({"a": 1, "b": 1, "dead": 0}, {"mean_rank": 3, "max_rank": 8}, {"a": 4, "b": 4, "dead": 1}),
        ({"a": 1, "b": 1, "dead": 0}, {"mean_rank": 3, "max_rank": 8, "min_rank": 0}, {"a": 5, "b": 4, "dead": 0}),
        # The default maximum is twice the mean.
        ({"a": 1e9, "b": 1}, {"mean_rank": 2.5}, {"a": 4, "b": 1}),
        ({"a": 1e9, "b": 1, "c": 1}, {"mean_rank": 2.5}, {"a": 5, "b": 1, "c": 1}),
        # At every cap, budget stays unspent.
        ({"a": 5, "b": 1}, {"mean_rank": 50}, {"a": 8, "b": 8}),
    ],
)
def test_ranks_by_hand(values: dict[str, float], options: dict[str, float], expected: dict[str, int]) -> None:
    sensitivity = by_hand({layer: float(value) for layer, value in values.items()})
    assert allocate(sensitivity, **options) == expected  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"mean_rank": 0.0}, "ranks.mean is 0.0"),
        ({"mean_rank": float("nan")}, "ranks.mean is nan"),
        ({"mean_rank": float("inf")}, "ranks.mean is inf"),
        ({"mean_rank": 2.0, "min_rank": -1}, "ranks.min is -1"),
        ({"mean_rank": 2.0, "min_rank": 0, "max_rank": 0}, "ranks.max is 0"),
        ({"mean_rank": 2.0, "min_rank": 3, "max_rank": 2}, "ranks.max is 2.*ranks.min, 3"),
        ({"mean_rank": 8.5, "max_rank": 4}, "ranks.mean 8.5 is above ranks.max 4"),
        ({"mean_rank": 2.0, "gamma": -1.0}, "ranks.gamma is -1.0"),
        ({"mean_rank": 2.0, "gamma": float("nan")}, "ranks.gamma is nan"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(SettingsError, match=words):
        allocate(by_hand({"a": 1.0}), **options)


def test_a_minimum_of_zero_is_the_cure_of_a_budget_that_is_too_small() -> None:
    sensitivity = by_hand({f"layer.{k}": 1.0 for k in range(24)}, shape=(32, 32))
    with pytest.raises(SettingsError, match=r"budget 1,200 is below the 1,536 .*24 layers.*ranks\.min to 0"):
        allocate(sensitivity, mean_rank=0.78125)
    assert used(allocate(sensitivity, mean_rank=0.78125, min_rank=0), sensitivity.shapes) == 1152


@pytest.mark.parametrize(
    ("values", "shapes", "words"),
    [
        ({}, {}, "no layers"),
        ({"a": 1.0}, {"a": (1, 1), "b": (1, 1)}, "'b' has no sensitivity"),
        ({"a": 1.0, "b": 1.0}, {"a": (1, 1)}, "'b' has no shape"),
        ({"a": -0.5}, {"a": (1, 1)}, "'a' is -0.5"),
        ({"a": float("nan")}, {"a": (1, 1)}, "'a' is nan"),
        ({"a": 1.0}, {"a": (0, 4)}, r"'a' has shape \(0, 4\)"),
    ],
)
def test_a_sensitivity_that_cannot_be_is_refused(
    values: dict[str, float], shapes: dict[str, tuple[int, int]], words: str
) -> None:
    with pytest.raises(SettingsError, match=words):
        Sensitivity(values, shapes)


@given(sensitivities(values=st.just(0.0)), mean_ranks, st.integers(1, 40))
def test_plain_loras_ranks_are_those_of_equal_sensitivities_also_if_all_are_zero(
    zero: Sensitivity, mean_rank: float, capacity: int
) -> None:
    bounds = {"mean_rank": min(mean_rank, capacity), "min_rank": 0, "max_rank": capacity}
    plain = uniform_ranks(zero.shapes, bounds["mean_rank"], capacity)
    for equal in (zero, replaced(zero, dict.fromkeys(zero.shapes, 1.0))):
        assert allocate(equal, **bounds) == plain
