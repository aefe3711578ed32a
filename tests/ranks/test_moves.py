import random
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tsqlora.errors import SettingsError
from tsqlora.ranks.allocate import Sensitivity, allocate
from tsqlora.ranks.budget import budget, caps, costs, used
from tsqlora.ranks.events import rank_changes
from tsqlora.ranks.moves import moved_towards, require_policy

MAX_RANK = 8
PLENTY = 1000

Ranks = dict[str, int]
Sizes = dict[str, tuple[int, int]]


@dataclass(frozen=True)
class World:
    """Layers, and what their ranks must keep to."""

    shapes: Sizes
    budget: int
    min_rank: int = 1

    @property
    def caps(self) -> Ranks:
        return caps(self.shapes, MAX_RANK)


@dataclass(frozen=True)
class Drawn:
    """What hypothesis draws; `built` makes a world of it.

    Two steps, because beartype picks the items it checks with `random`, and hypothesis allows that
    in a test but not in a strategy: no function of ours may be called there.
    """

    shapes: Sizes
    mean_rank: float
    min_rank: int
    values: list[dict[str, float]]


@st.composite
def drawn_worlds(draw: st.DrawFn, *, allocations: int = 2, one_shape: bool = False) -> Drawn:
    layers = [f"layer.{k}" for k in range(draw(st.integers(1, 7)))]
    sizes = st.tuples(st.integers(1, 30), st.integers(1, 30))
    size = draw(sizes)
    shapes = {n: size if one_shape else draw(sizes) for n in layers}
    mean_rank, min_rank = draw(st.integers(8, 48)) / 8, draw(st.integers(0, 1))
    values = [{n: draw(st.integers(0, 99)) / 8 for n in layers} for _ in range(allocations)]
    return Drawn(shapes, mean_rank, min_rank, values)


def built(drawn: Drawn) -> tuple[World, list[Ranks]]:
    """The world, and several allocations within its budget: present ranks and targets."""
    world = World(drawn.shapes, budget(drawn.mean_rank, drawn.shapes), drawn.min_rank)
    measured = [Sensitivity(values, drawn.shapes, "drawn", 1) for values in drawn.values]
    bounds = {"min_rank": drawn.min_rank, "max_rank": MAX_RANK}
    return world, [allocate(one, mean_rank=drawn.mean_rank, **bounds) for one in measured]


def adjusted(
    world: World,
    ranks: Ranks,
    target: Ranks,
    *,
    moves: int = PLENTY,
    droppable: Ranks | None = None,
) -> Ranks:
    return moved_towards(
        target,
        ranks,
        droppable=ranks if droppable is None else droppable,
        shapes=world.shapes,
        caps=world.caps,
        budget=world.budget,
        moves=moves,
        min_rank=world.min_rank,
    )


def check_laws(world: World, before: Ranks, after: Ranks, *, moves: int, droppable: Ranks) -> None:
    left = world.budget - used(after, world.shapes)
    assert left >= 0
    assert all(after[n] == world.caps[n] or cost > left for n, cost in costs(world.shapes).items())
    assert all(min(world.min_rank, world.caps[n]) <= after[n] <= world.caps[n] for n in after)
    drops, _ = rank_changes(before, after)
    assert sum(drops.values()) <= moves
    assert all(count <= droppable[n] for n, count in drops.items())
    assert list(after) == list(before)


@given(drawn_worlds(allocations=5), st.data())
def test_the_laws_hold_after_each_of_many_adjustments(drawn: Drawn, data: st.DataObject) -> None:
    world, (ranks, *targets) = built(drawn)
    for target in targets:
        moves = data.draw(st.integers(0, 12))
        droppable = {n: data.draw(st.integers(0, ranks[n])) for n in ranks}
        after = adjusted(world, ranks, target, moves=moves, droppable=droppable)
        check_laws(world, ranks, after, moves=moves, droppable=droppable)
        ranks = after


@given(drawn_worlds(), st.integers(0, 12))
def test_no_layer_is_taken_below_a_target_it_was_above(drawn: Drawn, moves: int) -> None:
    world, (ranks, target) = built(drawn)
    after = adjusted(world, ranks, target, moves=moves)
    drops, _ = rank_changes(ranks, after)
    assert all(after[n] > target[n] for n in drops)


@given(drawn_worlds(), st.integers(0, 12), st.randoms(use_true_random=False))
def test_the_order_of_the_layers_does_not_count(drawn: Drawn, moves: int, rng: random.Random) -> None:
    world, (ranks, target) = built(drawn)
    names = list(ranks)
    rng.shuffle(names)
    shuffled = World({n: world.shapes[n] for n in names}, world.budget, world.min_rank)
    expected = adjusted(world, ranks, target, moves=moves)
    assert adjusted(shuffled, {n: ranks[n] for n in names}, {n: target[n] for n in names}, moves=moves) == expected
    assert adjusted(world, ranks, target, moves=moves) == expected


@given(drawn_worlds(), st.integers(1, 12))
def test_the_same_target_again_and_again_stops_changing(drawn: Drawn, moves: int) -> None:
    world, (ranks, target) = built(drawn)
    lacked = None
    while True:
        after = adjusted(world, ranks, target, moves=moves)
        if after == ranks:
            break
        lacks = sum(max(0, target[n] - after[n]) for n in after)
        assert lacked is None or lacks < lacked, "each further change brings layers nearer to the target"
        ranks, lacked = after, lacks
    assert adjusted(world, ranks, target, moves=moves) == ranks


@given(drawn_worlds(one_shape=True))
@settings(max_examples=60)
def test_with_enough_moves_no_move_is_left_to_make(drawn: Drawn) -> None:
    world, (ranks, target) = built(drawn)
    after = adjusted(world, ranks, target)
    gaps = [target[n] - after[n] for n in after]
    assert max(gaps) <= 1 or min(gaps) >= -1


@given(drawn_worlds(), st.integers(0, 12))
def test_at_the_target_nothing_changes(drawn: Drawn, moves: int) -> None:
    world, (_, target) = built(drawn)
    assert adjusted(world, target, target, moves=moves) == target


WIDE, SLIM = (60, 60), (10, 10)


def equal_layers(**ranks: int) -> tuple[World, Ranks]:
    """Layers of one shape, all of whose budget is in use."""
    return World(dict.fromkeys(ranks, (20, 20)), 40 * sum(ranks.values())), ranks


def unequal_layers(shapes: Sizes, **ranks: int) -> tuple[World, Ranks]:
    return World(shapes, used(ranks, shapes)), ranks


TWO = {"wide": WIDE, "slim": SLIM}
FOUR = equal_layers(a=6, b=8, c=4, d=2)


@pytest.mark.parametrize(
    ("begin", "target", "options", "expected"),
    [
        # A move goes from furthest above to furthest below; ties go by name.
        (FOUR, {"a": 4, "b": 4, "c": 6, "d": 6}, {"moves": 1}, {"a": 6, "b": 7, "c": 4, "d": 3}),
        (FOUR, {"a": 4, "b": 4, "c": 6, "d": 6}, {}, {"a": 5, "b": 5, "c": 5, "d": 5}),
        (
            equal_layers(d=6, c=6, b=4, a=4),
            {"a": 6, "b": 6, "c": 4, "d": 4},
            {"moves": 1},
            {"a": 5, "b": 4, "c": 5, "d": 6},
        ),
        # A gap of one rank is left alone.
        (equal_layers(a=5, b=3), {"a": 4, "b": 4}, {}, {"a": 5, "b": 3}),
        # Young slots stay, a donor keeps the minimum, no layer receives beyond its cap.
        (
            equal_layers(a=8, b=2, c=2),
            {"a": 2, "b": 8, "c": 2},
            {"droppable": {"a": 1, "b": 2, "c": 2}},
            {"a": 7, "b": 3, "c": 2},
        ),
        (equal_layers(a=3, b=3), {"a": -3, "b": 8}, {}, {"a": 1, "b": 5}),
        (equal_layers(a=8, b=7), {"a": 12, "b": 2}, {}, {"a": 8, "b": 7}),
        # A move that cannot be paid is not made at all: six slots would take slim to its target.
        (unequal_layers(TWO, wide=2, slim=8), {"wide": 4, "slim": 2}, {"moves": 5}, {"wide": 2, "slim": 8}),
        (unequal_layers(TWO, wide=2, slim=8), {"wide": 4, "slim": 2}, {"moves": 6}, {"wide": 2, "slim": 8}),
        (unequal_layers(TWO, wide=2, slim=8), {"wide": 4, "slim": 1}, {"moves": 6}, {"wide": 3, "slim": 2}),
        # A cheaper layer may move where a dear one cannot; change from a dear slot goes to whoever lacks most.
        (
            unequal_layers(TWO | {"thin": SLIM}, wide=1, slim=8, thin=2),
            {"wide": 8, "slim": 4, "thin": 5},
            {"moves": 2},
            {"wide": 1, "slim": 6, "thin": 4},
        ),
        (
            unequal_layers({"wide": (50, 50), "slim": SLIM, "thin": SLIM}, wide=4, slim=1, thin=1),
            {"wide": 2, "slim": 5, "thin": 4},
            {"moves": 1},
            {"wide": 3, "slim": 4, "thin": 3},
        ),
    ],
)
def test_moves_by_hand(begin: tuple[World, Ranks], target: Ranks, options: dict[str, Any], expected: Ranks) -> None:
    world, ranks = begin
    assert adjusted(world, ranks, target, **options) == expected


def test_an_unknown_policy_names_the_nearest() -> None:
    with pytest.raises(SettingsError, match=r"ranks\.policy 'tsqlor' .*'tsqlora'"):
        require_policy("tsqlor")


@given(drawn_worlds(), st.data())
def test_bounds_hold_wherever_ranks_begin(drawn: Drawn, data: st.DataObject) -> None:
    """A PeftModel may bring ranks above what a layer's outputs allow, or below the least: they go no further."""
    ranks = {n: data.draw(st.integers(0, MAX_RANK)) for n in drawn.shapes}
    droppable = {n: data.draw(st.integers(0, rank)) for n, rank in ranks.items()}
    world = World(drawn.shapes, used(ranks, drawn.shapes) + data.draw(st.integers(0, 40)), drawn.min_rank)
    target = {n: min(data.draw(st.integers(drawn.min_rank, MAX_RANK)), world.caps[n]) for n in ranks}
    after = adjusted(world, ranks, target, droppable=droppable)
    assert used(after, world.shapes) <= world.budget
    for n, now in ranks.items():
        assert max(min(world.min_rank, world.caps[n], now), now - droppable[n]) <= after[n] <= max(world.caps[n], now)
