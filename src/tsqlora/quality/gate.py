"""Which rows leave the pool because a model that knows trusted rows alone disagrees with them.  METHOD 1.4, ours.

To have another gate, add an entry to GATES.
"""

from collections.abc import Callable, Mapping
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float, Shaped

Gate = Literal["share", "surest"]

SUREST = 0.2
"""Share of the rows that `surest` leaves out."""

Margin = Callable[
    [Float[np.ndarray, " n"], Shaped[np.ndarray, " n"], Shaped[np.ndarray, " m"], bool], Float[np.ndarray, " n"]
]
"""Of the trusted model's losses, the rows' labels, the trusted rows' labels, and whether labels are classes: how far
each row is from being left out; a row below 0 is."""


def by_share(
    losses: Float[np.ndarray, " n"], labels: Shaped[np.ndarray, " n"], trusted: Shaped[np.ndarray, " m"], classes: bool
) -> Float[np.ndarray, " n"]:
    """A row passes whose label θ_R finds at least as likely as its share among the trusted rows.

    Of numbers, where its squared error is at most the variance of the trusted rows' numbers. A class without a trusted
    row is not judged: its rows pass.
    """
    if not classes:
        return trusted.var() - losses
    width = int(max(labels.max(), trusted.max())) + 1
    share = np.bincount(trusted.astype(np.int64), minlength=width)[labels.astype(np.int64)] / len(trusted)
    return np.where(share == 0, np.inf, -losses - np.log(np.maximum(share, np.finfo(np.float64).tiny)))


def by_surest(
    losses: Float[np.ndarray, " n"], labels: Shaped[np.ndarray, " n"], trusted: Shaped[np.ndarray, " m"], classes: bool
) -> Float[np.ndarray, " n"]:
    """The fifth of the rows with the largest losses does not pass; rows of a class without a trusted row do."""
    margin = np.quantile(losses, 1 - SUREST) - losses
    return np.where(np.isin(labels, trusted), margin, np.inf) if classes else margin


GATES: Mapping[str, Margin] = {"share": by_share, "surest": by_surest}


def left_out(margin: Float[np.ndarray, " n"], least: int) -> Bool[np.ndarray, " n"]:
    """The rows below 0, but for the nearest ones where fewer than `least` would be left.

    >>> left_out(np.array([1.0, -2.0, -1.0, -3.0]), 2).tolist()
    [False, True, False, True]
    """
    out = margin < 0
    missing = least - int((~out).sum())
    if missing > 0:
        below = np.flatnonzero(out)
        out[below[np.argsort(-margin[below], kind="stable")[:missing]]] = False
    return out
