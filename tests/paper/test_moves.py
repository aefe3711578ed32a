import json
import random
from dataclasses import dataclass, replace
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tsqlora.errors import DataError, SettingsError
from tsqlora.paper.budget import Sensitivity, allocate, budget, caps, costs, used
from tsqlora.paper.moves import (
    MOST_EVENTS,
    RankEvent,
    RankSchedule,
    bounded,
    moved_towards,
    moves_allowed,
    rank_changes,
)


def steps_of(total: int, interval: int, warmup: float, freeze: float) -> range:
    return RankSchedule(warmup=warmup, freeze=freeze).steps(total, interval)


@pytest.mark.parametrize(
    ("run", "expected"),
    [
        # The first waits for warm-up and for one interval.
        ((100, 20, 0.25, 0.3), [25, 45, 65]),
        ((100, 20, 0.0, 0.3), [20, 40, 60]),
        # The last is strictly before the freeze.
        ((10, 1, 0.7, 0.1), [7, 8]),
        ((80, 20, 0.1, 0.0), [20, 40, 60]),
        # A short run has none.
        ((10, 20, 0.1, 0.1), []),
    ],
)
def test_steps_by_hand(run: tuple[int, int, float, float], expected: list[int]) -> None:
    assert list(steps_of(*run)) == expected


def test_float_error_shifts_no_step() -> None:
    assert 0.07 * 100 > 7, "the trap"
    assert steps_of(100, 1, 0.07, 0.1).start == 7
    assert (1 - 0.42) * 50 > 29, "the trap"
    assert steps_of(50, 1, 0.1, 0.42).stop == 29
    assert steps_of(300, 1, 1 / 3, 1 / 3) == range(100, 200)


@pytest.mark.parametrize(
    ("interval", "warmup", "freeze", "words"),
    [
        (1, -0.1, 0.1, r"ranks\.warmup is -0.1"),
        (1, 0.1, 1.0, r"ranks\.freeze is 1.0"),
        (1, float("nan"), 0.1, r"ranks\.warmup is nan"),
        (1, 0.9, 0.1, r"ranks\.warmup 0.9 and ranks\.freeze 0.1"),
        (0, 0.1, 0.1, r"ranks\.interval is 0"),
    ],
)
def test_a_schedule_that_cannot_be_is_refused(interval: int, warmup: float, freeze: float, words: str) -> None:
    with pytest.raises(SettingsError, match=words):
        steps_of(9, interval, warmup, freeze)


def test_moves_fall_as_a_cubic_and_are_none_outside_the_adjustment_phase() -> None:
    steps = range(100, 200, 10)
    assert [moves_allowed(step, steps, first=1000) for step in steps] == [
        1000, 999, 992, 973, 936, 875, 784, 657, 488, 271,
    ]  # fmt: skip
    assert [moves_allowed(step, steps, first=8) for step in (0, 99, 200, 210)] == [0, 0, 0, 0]
    assert moves_allowed(20, range(20, 10, 5), first=8) == 0


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
    measured = [Sensitivity(values, drawn.shapes) for values in drawn.values]
    bounds = {"min_rank": drawn.min_rank, "max_rank": MAX_RANK}
    return world, [allocate(one, mean_rank=drawn.mean_rank, **bounds) for one in measured]


def adjusted(
    world: World, ranks: Ranks, target: Ranks, *, moves: int = PLENTY, droppable: Ranks | None = None
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


@given(drawn_worlds(allocations=4), st.data(), st.randoms(use_true_random=False))
def test_the_laws_hold_after_each_of_many_adjustments(drawn: Drawn, data: st.DataObject, rng: random.Random) -> None:
    world, (ranks, *targets) = built(drawn)
    names = list(ranks)
    rng.shuffle(names)
    shuffled = World({n: world.shapes[n] for n in names}, world.budget, world.min_rank)
    for target in targets:
        moves = data.draw(st.integers(0, 12))
        droppable = {n: data.draw(st.integers(0, ranks[n])) for n in ranks}
        after = adjusted(world, ranks, target, moves=moves, droppable=droppable)
        check_laws(world, ranks, after, moves=moves, droppable=droppable)
        drops, _ = rank_changes(ranks, after)
        assert all(after[n] > target[n] for n in drops), "nothing is taken below a target that it was above"
        others, goals = ({n: of[n] for n in names} for of in (ranks, target))
        assert adjusted(shuffled, others, goals, moves=moves, droppable=droppable) == after
        assert adjusted(world, target, target, moves=moves) == target
        ranks = after


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


@given(drawn_worlds(one_shape=True))
@settings(max_examples=60)
def test_with_enough_moves_no_move_is_left_to_make(drawn: Drawn) -> None:
    world, (ranks, target) = built(drawn)
    after = adjusted(world, ranks, target)
    gaps = [target[n] - after[n] for n in after]
    assert max(gaps) <= 1 or min(gaps) >= -1


WIDE, SLIM = (60, 60), (10, 10)


def equal_layers(**ranks: int) -> tuple[World, Ranks]:
    """Layers of one shape, all of whose budget is in use."""
    return World(dict.fromkeys(ranks, (20, 20)), 40 * sum(ranks.values())), ranks


def unequal_layers(shapes: Sizes, **ranks: int) -> tuple[World, Ranks]:
    return World(shapes, used(ranks, shapes)), ranks


TWO = {"wide": WIDE, "slim": SLIM}


@pytest.mark.parametrize(
    ("begin", "target", "options", "expected"),
    [
        # A move goes from furthest above to furthest below; ties go by name.
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


EVENT = RankEvent(
    step=50,
    reason="adjustment",
    ranks={"query": 6, "key": 2},
    target={"query": 7, "key": 1},
    sensitivity={"query": 0.75, "key": 0.25},
    moved=2,
    used=512,
    budget=520,
)


@given(st.lists(st.integers(0, 5), max_size=3 * MOST_EVENTS))
@example([1, 2, 3] * MOST_EVENTS)
@settings(max_examples=20)
def test_events_are_bounded_and_every_moved_slot_is_counted(moves: list[int]) -> None:
    events: list[RankEvent] = []
    for step, moved in enumerate(moves):
        events = bounded([*events, replace(EVENT, step=step, moved=moved)])
    assert len(events) <= MOST_EVENTS
    assert sum(event.moved for event in events) == sum(moves)
    steps = [event.step for event in events]
    assert steps == sorted(set(steps))
    if moves:
        assert steps[0] == 0
        assert steps[-1] == len(moves) - 1
    if len(moves) <= MOST_EVENTS:
        assert [event.moved for event in events] == moves


def test_an_event_survives_json_unless_a_field_is_missing() -> None:
    saved = json.loads(json.dumps(EVENT.to_dict()))
    assert RankEvent.from_dict(saved) == EVENT
    del saved["moved"]
    with pytest.raises(DataError, match="'moved'"):
        RankEvent.from_dict(saved)
