"""Ranks from sensitivities, under a budget in parameters: docs/method.md eq. 7.

Shares r = clip(λ S^gamma, min, max) with one water level λ for all layers, such that Σ r c is the budget; then whole
ranks by largest remainder. One rank of a layer with i inputs and o outputs costs c = i + o parameters: a row of A and a
column of B.
"""

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from heapq import heapify, heappop, heappush

from tsqlora.errors import SettingsError
from tsqlora.training.lora import Shapes, budget, costs, used

REMAINDER_DIGITS = 9
"""Wishes are compared to this many decimals, so that rounding does not break ties."""


def caps(shapes: Shapes, max_rank: int) -> dict[str, int]:
    """Highest rank that makes sense in each layer: min(max_rank, i, o), docs/method.md eq. 7.

    >>> caps({"query": (64, 32), "head": (64, 2)}, 8)
    {'query': 8, 'head': 2}
    """
    return {layer: min(max_rank, i, o) for layer, (i, o) in shapes.items()}


def default_max_rank(mean_rank: float, *, least: int = 1) -> int:
    """Highest rank of a layer unless one is set: twice the mean, rounded up, and no less than `least`.

    >>> default_max_rank(2.2), default_max_rank(2.2, least=6)
    (5, 6)
    """
    return max(math.ceil(2 * mean_rank), least)


def fill(
    ranks: Mapping[str, int],
    *,
    wishes: Mapping[str, int | float | Fraction],
    order: Sequence[str],
    shapes: Shapes,
    caps: Mapping[str, int],
    budget: int,
) -> dict[str, int]:
    """Hand out the rest of the budget, one rank at a time.

    Each rank goes to the layer with the largest `wishes` - rank among those below their cap
    whose cost fits in what is left; ties go to the layer that stands first in `order`, which
    names every layer. So no layer below its cap costs as little as what stays unspent.

    >>> names, wishes = ["query", "key"], {"query": 1.2, "key": 1.8}
    >>> shapes, limits = dict.fromkeys(names, (4, 4)), dict.fromkeys(names, 4)
    >>> ranks = dict.fromkeys(names, 1)
    >>> fill(ranks, wishes=wishes, order=names, shapes=shapes, caps=limits, budget=24)
    {'query': 1, 'key': 2}
    """
    filled, cost = dict(ranks), costs(shapes)
    left = budget - used(ranks, shapes)

    def wish(layer: str) -> float:
        return round(float(wishes[layer] - filled[layer]), REMAINDER_DIGITS)

    queue = [(-wish(layer), place, layer) for place, layer in enumerate(order)]
    heapify(queue)
    while queue:
        _, place, layer = heappop(queue)
        # What is left only shrinks, so a layer that does not fit now never will: it is not put back.
        if filled[layer] < caps[layer] and cost[layer] <= left:
            filled[layer] += 1
            left -= cost[layer]
            heappush(queue, (-wish(layer), place, layer))
    return filled


@dataclass(frozen=True, slots=True)
class Sensitivity:
    """How much the loss depends on each layer, docs/method.md eq. 6, and how it was measured.

    `values` and `shapes` (inputs, outputs) have the same layers; only the ratios of the values
    count. `samples` is the number of samples in the mean.

    Raises SettingsError if there is no layer, if the layers of the two differ, or if a value is
    negative or not finite.
    """

    values: Mapping[str, float]
    shapes: Shapes
    samples: int = 0

    def __post_init__(self) -> None:
        if not self.shapes:
            raise SettingsError("sensitivity has no layers; name at least one target layer")
        for layer in sorted(self.values.keys() ^ self.shapes.keys()):
            lacks = "shape" if layer in self.values else "sensitivity"
            raise SettingsError(f"layer '{layer}' has no {lacks}; give every layer a value and a shape")
        for layer, value in self.values.items():
            if not (value >= 0 and math.isfinite(value)):
                raise SettingsError(f"sensitivity of layer '{layer}' is {value}; it must be finite and 0 or more")
            if min(self.shapes[layer]) < 1:
                raise SettingsError(
                    f"layer '{layer}' has shape {self.shapes[layer]}; inputs and outputs must be 1 or more"
                )


def allocate(
    sensitivity: Sensitivity,
    *,
    mean_rank: float,
    min_rank: int = 1,
    max_rank: int | None = None,
    gamma: float = 1.0,
) -> dict[str, int]:
    """Rank of each layer, as proportional to its sensitivity as the budget and bounds allow.

    The parameters used are at most those of a uniform LoRA of rank `mean_rank`, and what stays
    unspent buys no rank in any layer below its maximum, min(`max_rank`, i, o). The result depends
    neither on the layers' order nor on the scale of the sensitivities. `max_rank` is twice
    `mean_rank` rounded up, and at least `min_rank`, unless given; `gamma` tempers, 0 is uniform.
    If every sensitivity is 0, all layers share equally. docs/method.md eq. 7.

    Raises SettingsError if an option is out of range or `min_rank` costs more than the budget.

    >>> shapes = {"query": (8, 8), "key": (8, 8)}
    >>> allocate(Sensitivity({"query": 3.0, "key": 1.0}, shapes), mean_rank=4)
    {'query': 6, 'key': 2}
    """
    shapes, total = sensitivity.shapes, budget(mean_rank, sensitivity.shapes)
    most = default_max_rank(mean_rank, least=min_rank) if max_rank is None else max_rank
    if min_rank < 0:
        raise SettingsError(f"ranks.min is {min_rank}; give 0 or more")
    if most < max(1, min_rank):
        raise SettingsError(f"ranks.max is {most}; give 1 or more, and no less than ranks.min, {min_rank}")
    if mean_rank > most:
        raise SettingsError(f"ranks.mean {mean_rank} is above ranks.max {most}; raise ranks.max or lower ranks.mean")
    if not (gamma >= 0 and math.isfinite(gamma)):
        raise SettingsError(f"ranks.gamma is {gamma}; give a number of 0 or more, 0 is uniform")
    high = caps(shapes, most)
    low = {layer: min(min_rank, cap) for layer, cap in high.items()}
    if (least := used(low, shapes)) > total:
        raise SettingsError(
            f"budget {total:,} is below the {least:,} parameters that rank {min_rank} needs in {len(low)} layers; "
            "raise ranks.mean or set ranks.min to 0"
        )
    largest = max(sensitivity.values.values())
    weights = {layer: (value / largest) ** gamma if largest else 1.0 for layer, value in sensitivity.values.items()}
    wishes = shares(weights, costs=costs(shapes), low=low, high=high, budget=total)
    return fill(
        {layer: math.floor(wishes[layer]) for layer in shapes},
        wishes=wishes,
        order=sorted(shapes, key=lambda layer: (-sensitivity.values[layer], layer)),
        shapes=shapes,
        caps=high,
        budget=total,
    )


def shares(
    weights: Mapping[str, float],
    *,
    costs: Mapping[str, int],
    low: Mapping[str, int],
    high: Mapping[str, int],
    budget: int,
) -> dict[str, Fraction]:
    """Ranks before rounding: clip(λ w, low, high), with λ such that Σ share · cost = budget.

    Exact: spending is piecewise linear in λ and bends where a layer leaves `low` or reaches
    `high`. So λ lies on the straight line between two neighbouring bends. A layer of weight 0 stays
    at `low`; if the others cannot spend the budget they are all at `high`. At least one weight must
    be above 0, and `low` within the budget. docs/method.md eq. 7.

    >>> one, eight = {"a": 1, "b": 1}, {"a": 8, "b": 8}
    >>> [float(r) for r in shares({"a": 1.0, "b": 0.25}, costs=one, low=one, high=eight, budget=9).values()]
    [7.2, 1.8]
    """
    w = {layer: Fraction(weight) for layer, weight in weights.items()}

    def at(level: Fraction) -> dict[str, Fraction]:
        return {n: min(max(level * w[n], Fraction(low[n])), Fraction(high[n])) for n in w}

    def spent(level: Fraction) -> Fraction:
        return sum((share * costs[n] for n, share in at(level).items()), Fraction(0))

    bends = sorted({bound[n] / w[n] for n in w if w[n] for bound in (low, high)})
    k = bisect_left(bends, budget, key=spent)
    if k == len(bends):
        return at(bends[-1])
    if k == 0:
        return at(bends[0])
    left, right = bends[k - 1], bends[k]
    slope = (spent(right) - spent(left)) / (right - left)
    return at(left + (budget - spent(left)) / slope)
