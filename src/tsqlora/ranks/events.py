"""A change of ranks at one adjustment, as a value that can be saved."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from tsqlora.errors import DataError


def rank_changes(before: Mapping[str, int], after: Mapping[str, int]) -> tuple[dict[str, int], dict[str, int]]:
    """(drops, grows): how many slots each layer loses or gains; layers without change are left out.

    >>> rank_changes({"query": 4, "key": 4, "value": 4}, {"query": 6, "key": 2, "value": 4})
    ({'key': 2}, {'query': 2})
    """
    change = {layer: after[layer] - rank for layer, rank in before.items()}
    drops = {layer: -delta for layer, delta in change.items() if delta < 0}
    grows = {layer: delta for layer, delta in change.items() if delta > 0}
    return drops, grows


@dataclass(frozen=True, slots=True)
class RankEvent:
    """One decision about the ranks, as in run.json.

    `step` counts completed optimizer steps, `reason` is start or adjustment, `ranks`
    hold from here on, `target` and `sensitivity` are what they were decided from, `moved` is
    the number of slots given up, `used` and `budget` are in parameters.
    """

    step: int
    reason: str
    ranks: Mapping[str, int]
    target: Mapping[str, int]
    sensitivity: Mapping[str, float]
    moved: int
    used: int
    budget: int

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts and numbers, ready for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "RankEvent":
        """Inverse of `to_dict`; DataError if a field is missing."""
        try:
            return cls(**{field.name: data[field.name] for field in fields(cls)})
        except KeyError as error:
            raise DataError(f"saved rank event has no {error}; the file is cut off or from another version") from None


MOST_EVENTS = 1000
"""Events of a run in run.json; each has three numbers per layer."""


def bounded(events: Sequence[RankEvent]) -> list[RankEvent]:
    """At most MOST_EVENTS: if there are more, merge every second one into the next. The first and the last stay."""
    if len(events) <= MOST_EVENTS:
        return list(events)
    remaining: list[RankEvent] = []
    moved = 0
    for j, event in enumerate(events):
        moved += event.moved
        if j % 2 == 0 or j == len(events) - 1:
            remaining.append(replace(event, moved=moved))
            moved = 0
    return remaining
