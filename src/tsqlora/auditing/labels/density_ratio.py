"""How much likelier a text is among trusted rows than in the pool: their density ratio.  Ours.

After importance resampling (DSIR, Xie et al. 2023), except that it only ranks the rows: a ridge fit on hidden states
tells trusted rows from the pool, and each row is judged by a fit without it. First the part of the hidden states that
follows the length of a text in the pool is subtracted: a set collected apart differs in length.
"""

from itertools import chain

import numpy as np
from scipy.stats import mannwhitneyu
from sklearn.preprocessing import StandardScaler

from tsqlora.errors import TsqLoraError
from tsqlora.libs.shapes import Bool, Float, Shaped
from tsqlora.model.passes import empty
from tsqlora.model.ridge import ROWS_AT_ONCE, ROWS_TO_CHOOSE, fit_classes, fit_ridge

LEAST_TRUSTED = 8
"""Fewer trusted rows do not show where others lie."""
LEVEL = 0.025
"""Trusted rows differ from the pool if their ratios are larger at this one-sided level."""


def log_density_ratio(
    pool: Float[np.ndarray, "n d"],
    trusted: Float[np.ndarray, "m d"],
    twins: Bool[np.ndarray, " n"] | None = None,
    *,
    lengths: tuple[Shaped[np.ndarray, " n"], Shaped[np.ndarray, " m"]] | None = None,
) -> tuple[Float[np.ndarray, " n"] | None, str]:
    """Return log p(row | trusted) − log p(row | pool) for every row of the pool, up to a constant.

    None and the reason for too few trusted rows, or where a fit cannot tell those that it has not seen from the pool.
    `twins` are copies of trusted rows: they are no part of the pool, and only predicted. `lengths` are tokens of each
    row of the pool and each trusted one, which count nothing then. Raises TsqLoraError for hidden
    states that are not finite.
    """
    if len(trusted) < LEAST_TRUSTED:
        return None, f"{len(trusted)} trusted rows are too few to tell which texts are like them; give {LEAST_TRUSTED}"
    both, n = _standardised(pool, trusted), len(pool)
    if lengths is not None:
        _remove_length(both, np.log(np.maximum(np.concatenate(lengths), 1)), n)
    fitted = np.ones(len(both), dtype=np.bool_)
    if twins is not None:
        fitted[:n] = ~twins
    labels = np.repeat([0, 1], [n, len(trusted)])[fitted]
    ridge = fit_classes(both if fitted.all() else both[fitted], labels, 2)
    ratio = np.empty(len(both), dtype=np.float32)
    ratio[fitted] = ridge.left_out[:, 1] - ridge.left_out[:, 0]
    if not fitted.all():
        ratio[~fitted] = np.diff(ridge.predict(both[~fitted]), axis=1)[:, 0]
    test = mannwhitneyu(ratio[n:], ratio[:n][fitted[:n]], alternative="greater")
    if test.pvalue < LEVEL:
        return ratio[:n], ""
    return None, "hidden states do not separate trusted rows from the others"


def _standardised(pool: Float[np.ndarray, "n d"], trusted: Float[np.ndarray, "m d"]) -> Float[np.ndarray, "rows d"]:
    """The rows of both in deviations of the pool: a few features of a language model are far larger than the others."""
    scaler, n = StandardScaler(), len(pool)
    parts = [slice(first, first + ROWS_AT_ONCE) for first in range(0, n, ROWS_AT_ONCE)]
    for some in chain([trusted], (pool[rows] for rows in parts)):
        if not np.isfinite(some).all():
            raise TsqLoraError("hidden states of some texts are not finite; score in float32")
    for rows in parts:
        scaler.partial_fit(pool[rows].astype(np.float64))
    both = empty((n + len(trusted), pool.shape[1]), np.dtype(np.float32))
    for rows in parts:
        both[:n][rows] = scaler.transform(pool[rows].astype(np.float64))
    both[n:] = scaler.transform(trusted.astype(np.float64))
    return both


def _remove_length(both: Float[np.ndarray, "rows d"], length: Float[np.ndarray, " rows"], n: int) -> None:
    """Subtract what a ridge fit on the first n rows, the pool, predicts of each feature from the length.

    Ridge: rows without any part along the length would depend on each other, and a fit without one would know it.
    """
    some = np.linspace(0, n - 1, min(n, ROWS_TO_CHOOSE)).astype(int)
    if np.ptp(length[some]) == 0:
        return
    ridge = fit_ridge(length[some, None], both[some])
    for first in range(0, len(both), ROWS_AT_ONCE):
        rows = slice(first, first + ROWS_AT_ONCE)
        both[rows] -= ridge.predict(length[rows, None])
