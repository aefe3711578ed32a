import pytest
from hypothesis import given
from hypothesis import strategies as st

from oracles import slow_elalora_rule
from tsqlora.errors import SettingsError
from tsqlora.ranks.baselines import (
    change_phase,
    elalora_moves,
    elalora_steps,
    whole_rank,
)
from tsqlora.ranks.schedule import default_interval

# Few values, so that many are equal.
values = st.one_of(st.integers(0, 3).map(float), st.floats(0, 1))
models = st.dictionaries(st.sampled_from("abcdef"), st.lists(values, min_size=1, max_size=6), min_size=1)


@given(models, st.integers(0, 8), st.integers(0, 4))
def test_elalora_moves_as_its_literal_transcription(scores: dict[str, list[float]], b: int, k: int) -> None:
    moves = elalora_moves(scores, moves=b, offered=k)
    pruned, expanded = slow_elalora_rule(scores, b=b, k=k)
    assert {(layer, j) for layer, which in moves.drops.items() for j in which} == set(pruned)
    assert moves.grows == {layer: expanded.count(layer) for layer in expanded}


@given(models, st.integers(0, 8), st.integers(0, 4))
def test_elalora_keeps_the_sum_of_ranks_and_one_rank_a_layer(scores: dict[str, list[float]], b: int, k: int) -> None:
    moves = elalora_moves(scores, moves=b, offered=k)
    dropped = {layer: len(set(which)) for layer, which in moves.drops.items()}
    assert sum(dropped.values()) == sum(moves.grows.values()) <= b
    assert all(count <= min(k, len(scores[layer]) - 1) for layer, count in dropped.items())


@given(models, st.integers(0, 8))
def test_a_layer_at_rank_one_neither_loses_nor_gains(scores: dict[str, list[float]], b: int) -> None:
    scores = scores | {"one": [0.0], "single": [9.0]}
    moves = elalora_moves(scores, moves=b)
    assert not {"one", "single"} & {*moves.drops, *moves.grows}


def test_where_the_pool_is_small_the_same_triplet_may_go_and_name_its_layer() -> None:
    moves = elalora_moves({"a": [1.0, 2.0]}, moves=4)
    assert (moves.drops, moves.grows) == ({"a": [0]}, {"a": 1})


@given(st.integers(4, 3000))
def test_elalora_moves_strictly_within_its_phase(steps: int) -> None:
    phase = change_phase(steps, method="elalora")
    try:
        due = elalora_steps(steps)
    except SettingsError:
        assert not any(step % default_interval(steps) == 0 for step in range(phase.start + 1, phase.stop))
        return
    assert due == [t for t in range(steps) if phase.start < t < phase.stop and t % default_interval(steps) == 0]


def test_a_run_that_is_too_short_is_refused() -> None:
    with pytest.raises(SettingsError, match=r"3 optimizer steps.*adalora"):
        change_phase(3, method="adalora")
    with pytest.raises(SettingsError, match=r"14 optimizer steps.*ElaLoRA"):
        elalora_steps(14)
    assert elalora_steps(15) == [10]


def test_a_rank_that_is_not_whole_is_refused() -> None:
    assert whole_rank(8.0, "dora") == 8
    with pytest.raises(SettingsError, match=r"ranks\.mean is 2\.5.*dora"):
        whole_rank(2.5, "dora")
