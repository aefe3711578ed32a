"""Ranks that move from layer to layer, towards the targets of docs/method.md eq. 7: when, how many, and the record.

Warm-up (no change) → adjustment (every `interval` optimizer steps) → freeze.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Integral

from tsqlora.errors import SettingsError
from tsqlora.paper.budget import fill
from tsqlora.record import MOST_EVENTS, RankEvent
from tsqlora.training.lora import Shapes, costs, used

STEP_DIGITS = 9
"""Shares of a run are rounded to this many decimals first, else 0.07 of 100 steps would be 8."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RankSchedule:
    """When ranks move, how many at once, and how closely they follow sensitivity."""

    warmup: float = 0.1
    """The share of the run before the first adjustment."""
    freeze: float = 0.3
    """The share of the run after the last adjustment."""
    moves: int | None = None
    """Slots that may move in the first adjustment, falling to 0 as a cubic; a quarter of the layers if not given."""
    gamma: float = 1.0
    """Ranks follow sensitivity to this power; 0 keeps them uniform."""

    def steps(self, total: int, interval: int) -> range:
        """Numbers of completed optimizer steps after which a run of `total` steps adjusts ranks.

        The first is ⌈warmup · total⌉, but at least `interval`, so that importances exist;
        then every `interval` steps, all before (1 - freeze) · total. Empty if the run is too short. The range's own
        `stop` is where freezing begins.

        Raises SettingsError if a share or the interval is out of range.

        >>> list(RankSchedule(warmup=0.1, freeze=0.3).steps(100, 20))
        [20, 40, 60]
        """
        for name, share in (("warmup", self.warmup), ("freeze", self.freeze)):
            if not 0 <= share < 1:
                raise SettingsError(f"ranks.{name} is {share}; give a share of the run from 0 to below 1")
        if round(self.warmup + self.freeze, STEP_DIGITS) >= 1:
            raise SettingsError(
                f"ranks.warmup {self.warmup} and ranks.freeze {self.freeze} leave no step to adjust ranks in; "
                "together they must be below 1"
            )
        if not (isinstance(interval, Integral) and interval >= 1):
            raise SettingsError(f"ranks.interval is {interval}; give a whole number of optimizer steps, 1 or more")
        first = math.ceil(round(self.warmup * total, STEP_DIGITS))
        return range(max(first, interval), math.ceil(round((1 - self.freeze) * total, STEP_DIGITS)), interval)

    def first_moves(self, layers: int) -> int:
        """Slots of this many layers that may move in the first adjustment."""
        return max(1, layers // 4) if self.moves is None else self.moves


def default_interval(total_steps: int) -> int:
    """Optimizer steps between adjustments of a run of so many: a twentieth of them, at least 10."""
    return max(10, total_steps // 20)


def moves_allowed(step: int, steps: range, *, first: int) -> int:
    """How many slots may be given up at `step`: `first` at the start, falling to 0 as a cubic.

    round(first · (1 - p³)) with p the share of the adjustment phase that is over; 0 outside the
    phase. The fall is as in ElaLoRA's b(t).

    >>> [moves_allowed(step, range(20, 100, 20), first=8) for step in (0, 20, 60, 80, 100)]
    [0, 8, 7, 5, 0]
    """
    if not steps.start <= step < steps.stop:
        return 0
    p = (step - steps.start) / (steps.stop - steps.start)
    return round(first * (1 - p**3))


LEFT_ALONE = 1
"""A layer this close to its target neither gives nor receives in a move."""


def moved_towards(
    target: Mapping[str, int],
    ranks: Mapping[str, int],
    *,
    droppable: Mapping[str, int],
    shapes: Shapes,
    caps: Mapping[str, int],
    budget: int,
    moves: int,
    min_rank: int,
) -> dict[str, int]:
    """The ranks after at most `moves` slots went from layers above target to layers below it.

    A move gives one rank to the layer furthest below its target and is paid for by the layers
    furthest above theirs; ties go by name. It is made if it can be paid in full, else not at all,
    and the next layer below target is tried. No donor falls below `min_rank` or gives more than
    its `droppable`, the slots that are old enough; no layer rises above its entry of `caps`.
    What is then left unspent of the `budget` is handed out by `fill`.

    Repeated with the same target it stops changing: every move shrinks what layers lack, and
    nothing ever takes from a layer that is not above its target.
    """
    now, cost = dict(ranks), costs(shapes)
    spare = {n: min(droppable[n], now[n] - min(min_rank, caps[n])) for n in now}
    unpayable: set[str] = set()
    while True:
        lack = {n: target[n] - now[n] for n in sorted(now) if n not in unpayable and now[n] < caps[n]}
        receiver = max(lack, key=lack.__getitem__, default=None)
        if receiver is None or lack[receiver] <= LEFT_ALONE:
            break
        price, paid = cost[receiver] - (budget - used(now, shapes)), Counter[str]()
        while price > 0:  # slots that donors give up so that so many parameters come free
            excess = {n: now[n] - paid[n] - target[n] for n in sorted(now) if spare[n] > paid[n]}
            donor = max(excess, key=excess.__getitem__, default=None)
            if donor is None or excess[donor] <= LEFT_ALONE or paid.total() >= moves:
                break
            paid[donor] += 1
            price -= cost[donor]
        if price > 0:
            unpayable.add(receiver)
            continue
        now[receiver] += 1
        moves -= paid.total()
        for donor, slots in paid.items():
            now[donor] -= slots
            spare[donor] -= slots
    return fill(now, wishes=target, order=sorted(now), shapes=shapes, caps=caps, budget=budget)


def rank_changes(before: Mapping[str, int], after: Mapping[str, int]) -> tuple[dict[str, int], dict[str, int]]:
    """(drops, grows): how many slots each layer loses or gains; layers without change are left out.

    >>> rank_changes({"query": 4, "key": 4, "value": 4}, {"query": 6, "key": 2, "value": 4})
    ({'key': 2}, {'query': 2})
    """
    change = {layer: after[layer] - rank for layer, rank in before.items()}
    return {name: -by for name, by in change.items() if by < 0}, {name: by for name, by in change.items() if by > 0}


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
