import functools
import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tsqlora.errors import SettingsError
from tsqlora.ranks.allocate import Sensitivity, allocate
from tsqlora.ranks.budget import budget, caps, costs, used
from tsqlora.ranks.events import rank_changes
from tsqlora.ranks.policies import POLICIES, Policy, get_policy, require_bounds

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
    policy: Policy = POLICIES["tsqlora"],
) -> Ranks:
    return policy(
        ranks,
        target=target,
        droppable=ranks if droppable is None else droppable,
        shapes=world.shapes,
        caps=world.caps,
        budget=world.budget,
        moves=moves,
        min_rank=world.min_rank,
    )


def equal_layers(**ranks: int) -> tuple[World, Ranks]:
    """Layers of one shape, all of whose budget is in use."""
    return World(dict.fromkeys(ranks, (20, 20)), 40 * sum(ranks.values())), ranks


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


@given(drawn_worlds())
def test_without_moves_nothing_is_given_up(drawn: Drawn) -> None:
    world, (ranks, target) = built(drawn)
    assert adjusted(world, ranks, target, moves=0) == ranks
    empty = dict.fromkeys(ranks, 0)
    drops, _ = rank_changes(empty, adjusted(world, empty, target, moves=0))
    assert drops == {}


def test_a_move_goes_from_furthest_above_to_furthest_below() -> None:
    world, ranks = equal_layers(a=6, b=8, c=4, d=2)
    target = {"a": 4, "b": 4, "c": 6, "d": 6}
    assert adjusted(world, ranks, target, moves=1) == {"a": 6, "b": 7, "c": 4, "d": 3}
    assert adjusted(world, ranks, target) == {"a": 5, "b": 5, "c": 5, "d": 5}


def test_a_gap_of_one_rank_is_left_alone() -> None:
    world, ranks = equal_layers(a=5, b=3, c=6, d=6)
    target = {"a": 4, "b": 4, "c": 6, "d": 6}
    assert adjusted(world, ranks, target) == ranks


def test_ties_go_by_name() -> None:
    world, ranks = equal_layers(d=6, c=6, b=4, a=4)
    target = {"a": 6, "b": 6, "c": 4, "d": 4}
    assert adjusted(world, ranks, target, moves=1) == {"a": 5, "b": 4, "c": 5, "d": 6}


def test_a_young_slot_is_not_given_up() -> None:
    world, ranks = equal_layers(a=8, b=2, c=2)
    target = {"a": 2, "b": 8, "c": 2}
    old = {"a": 1, "b": 2, "c": 2}
    assert adjusted(world, ranks, target, droppable=old) == {"a": 7, "b": 3, "c": 2}


def test_a_donor_keeps_the_minimum() -> None:
    world, ranks = equal_layers(a=3, b=3)
    after = adjusted(world, ranks, {"a": -3, "b": 8})
    assert after == {"a": 1, "b": 5}


def test_no_layer_receives_beyond_its_cap() -> None:
    world, ranks = equal_layers(a=8, b=7)
    assert adjusted(world, ranks, {"a": 12, "b": 2}) == ranks


def test_a_move_that_cannot_be_paid_is_not_made_at_all() -> None:
    world = World({"wide": (60, 60), "slim": (10, 10)}, 2 * 120 + 8 * 20)
    ranks, target = {"wide": 2, "slim": 8}, {"wide": 4, "slim": 2}
    assert adjusted(world, ranks, target, moves=5) == ranks
    assert adjusted(world, ranks, target, moves=6) == ranks, "six slots would take slim to its target"
    deeper = target | {"slim": 1}
    assert adjusted(world, ranks, deeper, moves=6) == {"wide": 3, "slim": 2}


def test_a_cheaper_layer_may_move_where_a_dear_one_cannot() -> None:
    world = World({"wide": (60, 60), "slim": (10, 10), "thin": (10, 10)}, 120 + 10 * 20)
    ranks, target = {"wide": 1, "slim": 8, "thin": 2}, {"wide": 8, "slim": 4, "thin": 5}
    assert adjusted(world, ranks, target, moves=2) == {"wide": 1, "slim": 6, "thin": 4}


def test_change_from_a_dear_slot_goes_to_whoever_lacks_most() -> None:
    world = World({"wide": (50, 50), "slim": (10, 10), "thin": (10, 10)}, 4 * 100 + 2 * 20)
    ranks, target = {"wide": 4, "slim": 1, "thin": 1}, {"wide": 2, "slim": 5, "thin": 4}
    assert adjusted(world, ranks, target, moves=1) == {"wide": 3, "slim": 4, "thin": 3}


@given(drawn_worlds())
def test_fixed_ranks_stay(drawn: Drawn) -> None:
    world, (ranks, target) = built(drawn)
    assert adjusted(world, ranks, target, policy=POLICIES["fixed"]) == ranks


def test_a_policy_is_a_name_or_a_callable() -> None:
    assert get_policy("tsqlora") is POLICIES["tsqlora"]
    assert get_policy(POLICIES["fixed"]) is POLICIES["fixed"]


def test_an_unknown_policy_lists_the_table() -> None:
    with pytest.raises(SettingsError) as error:
        get_policy("tsqlor")
    choices = ", ".join(sorted(POLICIES))
    assert str(error.value) == f"ranks.policy 'tsqlor' is unknown; did you mean 'tsqlora'? choices: {choices}"


# --- what a policy of one's own is held to ------------------------------------------------


def grow(ranks: Ranks, **_: Any) -> Ranks:
    """A policy whose name errors tell; what it gives is given to `held` beside it."""
    return ranks


def held(answer: Any, *, policy: Any = grow, droppable: Ranks | None = None, **further: Any) -> Ranks:
    """An answer where `wide` is at rank 4 of 8 and `narrow` at 1 of 2, with all of the budget in use."""
    ranks = further.pop("ranks", {"wide": 4, "narrow": 1})
    shapes = {"wide": (20, 20), "narrow": (18, 2)}
    bounds = {"shapes": shapes, "caps": caps(shapes, MAX_RANK), "budget": 180, "min_rank": 1}
    return require_bounds(
        answer, ranks, policy=policy, droppable=ranks if droppable is None else droppable, **(bounds | further)
    )


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        (None, "None; it must return a dict with the rank of every layer"),
        ({"wide": 4}, "layer 'narrow' no rank; give every layer in ranks one"),
        (
            {"wide": 4, "narrow": 1, "other": 1},
            "a rank to layer 'other', which is unknown; give ranks only to the layers in ranks",
        ),
        ({"wide": 3.5, "narrow": 1}, "layer 'wide' rank 3.5; give a whole number, an int"),
        ({"wide": 9, "narrow": 1}, "layer 'wide' rank 9, and its cap is 8; give at most caps[layer]"),
        ({"wide": 3, "narrow": 3}, "layer 'narrow' rank 3, and its cap is 2; give at most caps[layer]"),
        (
            {"wide": 4, "narrow": 0},
            "layer 'narrow' rank 0, and its least is 1; give at least min(min_rank, caps[layer])",
        ),
        (
            {"wide": 4, "narrow": 2},
            "ranks that cost 200 parameters, and the budget is 180; drop slots of other layers for those that grow: "
            "a rank costs inputs + outputs, as shapes has them",
        ),
    ],
)
def test_an_answer_out_of_bounds_is_refused_with_the_policy_the_layer_and_the_bound(answer: Any, text: str) -> None:
    with pytest.raises(SettingsError) as error:
        held(answer)
    assert str(error.value) == f"ranks.policy grow gave {text}"


def test_young_slots_that_a_policy_gives_up_are_refused() -> None:
    with pytest.raises(SettingsError) as error:
        held({"wide": 1, "narrow": 1}, droppable={"wide": 2, "narrow": 1})
    assert str(error.value) == (
        "ranks.policy grow gave layer 'wide' rank 1 in place of 4, and 2 of its slots may be given up now, the others "
        "are too young; take at most droppable[layer]"
    )
    assert held({"wide": 2, "narrow": 1}, droppable={"wide": 2, "narrow": 1}) == {"wide": 2, "narrow": 1}


def test_the_least_rank_is_no_more_than_the_cap() -> None:
    answer = {"wide": 3, "narrow": 2}
    assert held(answer, min_rank=3) == answer
    with pytest.raises(SettingsError, match="layer 'wide' rank 2, and its least is 3"):
        held(answer | {"wide": 2}, min_rank=3)
    nothing = {"wide": 4, "narrow": 0}
    assert held(nothing, min_rank=0) == nothing
    with pytest.raises(SettingsError, match="layer 'narrow' rank -1, and its least is 0"):
        held({"wide": 4, "narrow": -1}, min_rank=0)


def test_a_layer_that_began_out_of_bounds_may_stay_but_go_no_further() -> None:
    above = {"wide": 0, "narrow": 5}
    assert held(above, ranks=above) == above
    assert held({"wide": 1, "narrow": 4}, ranks=above) == {"wide": 1, "narrow": 4}
    with pytest.raises(SettingsError, match="layer 'narrow' rank 6, and its cap is 2"):
        held({"wide": 0, "narrow": 6}, ranks=above)


def test_an_accepted_answer_is_of_plain_ints_in_the_layers_order() -> None:
    found = held({"narrow": np.int64(2), "wide": np.int64(3)})
    assert list(found.items()) == [("wide", 3), ("narrow", 2)]
    assert all(type(rank) is int for rank in found.values())


def test_a_policy_without_a_name_is_told_by_its_class() -> None:
    with pytest.raises(SettingsError, match="policy partial gave None"):
        held(None, policy=functools.partial(grow))


@pytest.mark.parametrize("name", POLICIES)
@given(drawn_worlds(), st.data())
def test_no_policy_of_ours_is_ever_refused(name: str, drawn: Drawn, data: st.DataObject) -> None:
    """Wherever it begins: a PeftModel may bring ranks above what a layer's outputs allow, or below the least."""
    ranks = {n: data.draw(st.integers(0, MAX_RANK)) for n in drawn.shapes}
    droppable = {n: data.draw(st.integers(0, rank)) for n, rank in ranks.items()}
    world = World(drawn.shapes, used(ranks, drawn.shapes) + data.draw(st.integers(0, 40)), drawn.min_rank)
    target = {n: min(data.draw(st.integers(drawn.min_rank, MAX_RANK)), world.caps[n]) for n in ranks}
    after = adjusted(world, ranks, target, droppable=droppable, policy=POLICIES[name])
    assert after == require_bounds(
        after,
        ranks,
        policy=POLICIES[name],
        droppable=droppable,
        shapes=world.shapes,
        caps=world.caps,
        budget=world.budget,
        min_rank=world.min_rank,
    )
