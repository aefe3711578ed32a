"""InfoBatch: of rows that are learned already only some, weighted up for the others.

After Qin et al. (2024). Ours: how many are left out is what the size of a draw asks for, and there is no last
phase on all rows.
"""

import numpy as np
from jaxtyping import Float, Int


def info_batch(
    losses: Float[np.ndarray, " n"], *, size: int, rng: np.random.Generator
) -> tuple[Int[np.ndarray, " m"], Float[np.ndarray, " m"]]:
    """`size` rows and their weights: those of at least the mean loss, then as many of the others, at random, as fit.

    The others have the weight that makes up for those left out, others / taken; where rows of
    high loss do not fit, only they are drawn, at random, with weight 1.
    """
    above = losses >= losses.mean()
    high, low = (rng.permutation(np.flatnonzero(rows)) for rows in (above, ~above))
    high = high[:size]
    taken = low[: size - len(high)]
    weights = np.ones(len(high) + len(taken))
    if len(taken):
        weights[len(high) :] = len(low) / len(taken)
    return np.concatenate([high, taken]), weights
