import json
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tsqlora.errors import DataError
from tsqlora.ranks.events import MOST_EVENTS, RankEvent, bounded, rank_changes

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


def test_drops_and_grows_lead_from_before_to_after() -> None:
    before, after = {"a": 4, "b": 4, "c": 4}, {"a": 1, "b": 4, "c": 6}
    drops, grows = rank_changes(before, after)
    assert (drops, grows) == ({"a": 3}, {"c": 2})
    assert {n: before[n] - drops.get(n, 0) + grows.get(n, 0) for n in before} == after
    assert rank_changes(before, before) == ({}, {})


@given(st.lists(st.integers(0, 5), max_size=3 * MOST_EVENTS))
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
