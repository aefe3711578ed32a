"""The cost of ranks, and the budget in parameters.

One rank of a layer with i inputs and o outputs costs i + o parameters: a row of A and a
column of B.
"""

import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from heapq import heapify, heappop, heappush

from tsqlora.errors import SettingsError

Shapes = Mapping[str, tuple[int, int]]
"""(i, o) of each layer: inputs, outputs."""

FLOAT_ERROR = 1e-15
"""Relative error that a float and one product with it may have: a few units in the last place."""

REMAINDER_DIGITS = 9
"""Wishes are compared to this many decimals, so that rounding does not break ties."""


def costs(shapes: Shapes) -> dict[str, int]:
    """Parameters that one rank costs in each layer: c = i + o.

    >>> costs({"query": (64, 32)})
    {'query': 96}
    """
    return {layer: i + o for layer, (i, o) in shapes.items()}


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


def budget(mean_rank: float, shapes: Shapes) -> int:
    """Parameters that a uniform LoRA of rank `mean_rank` would have: ⌊r̄ Σ c⌋, docs/method.md eq. 7.

    Float error does not count: 0.29 of 100 parameters are 29, though the product is 28.999….

    Raises SettingsError if `mean_rank` is not a finite number above 0.

    >>> budget(2.5, {"query": (64, 32), "key": (64, 32)})
    480
    """
    if not (mean_rank > 0 and math.isfinite(mean_rank)):
        raise SettingsError(f"ranks.mean is {mean_rank}; give the mean rank as a number above 0")
    product = mean_rank * sum(costs(shapes).values())
    whole = round(product)
    return whole if math.isclose(product, whole, rel_tol=FLOAT_ERROR) else math.floor(product)


def used(ranks: Mapping[str, int], shapes: Shapes) -> int:
    """Parameters that these ranks cost: Σ r c.

    >>> used({"query": 3}, {"query": (64, 32)})
    288
    """
    cost = costs(shapes)
    return sum(rank * cost[layer] for layer, rank in ranks.items())


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
