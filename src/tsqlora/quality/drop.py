"""Kinds of rows that need not be drawn from, as a table: scores -> a mask of rows.

To have another, add its reason to REASONS and an entry to DROPS.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Bool

from tsqlora.errors import SettingsError, nearest
from tsqlora.quality.duplicates import near_duplicates, require_datasketch
from tsqlora.quality.scores import Scores

FAR = 5.0
"""Robust standard deviations of the logarithm of the gradient's norm, beyond which a row is an outlier."""

Texts = Callable[[], Iterator[str]]
"""Reads the text of every scored row, in order."""

Drop = Callable[[Scores, Texts, Path], Bool[np.ndarray, " n"]]
"""Of scores, their rows' texts, and a file that may be written: which rows to drop."""


def outliers(scores: Scores) -> Bool[np.ndarray, " n"]:
    """Rows whose gradient is far larger than is usual in their class.  [ours]

    In logarithms, since norms of a model that has learned spread over orders of magnitude. A
    class without spread has none.
    """
    norms = scores.terms["gradient_norm"].astype(np.float64)
    logs = np.log(np.maximum(norms, np.finfo(np.float64).tiny))
    groups = np.zeros(len(scores), dtype=np.int64) if scores.strata is None else scores.strata
    out = np.zeros(len(scores), dtype=np.bool_)
    for group in np.unique(groups):
        rows = groups == group
        centred = logs[rows] - np.median(logs[rows])
        spread = 1.4826 * np.median(np.abs(centred))
        out[rows] = (centred > FAR * spread) & (spread > 0)
    return out


def duplicates(scores: Scores, texts: Texts, scratch: Path) -> Bool[np.ndarray, " n"]:
    """Rows like a better one; a row that is dropped already is worse than any."""
    return near_duplicates(texts(), np.where(scores.kept, scores.quality, -np.inf), scratch)


DROPS: dict[str, Drop] = {
    "duplicate": duplicates,
    "outlier": lambda scores, texts, scratch: outliers(scores),
}


def drop_rows(scores: Scores, kinds: Sequence[str], texts: Texts, scratch: Path) -> Scores:
    """The scores with the rows of these kinds dropped; a row of two kinds has the first as its reason."""
    require_drops(kinds)
    for kind in dict.fromkeys(kinds):
        scores = scores.drop(DROPS[kind](scores, texts, scratch), kind)
    return scores


def require_drops(kinds: Sequence[str]) -> None:
    """Raises SettingsError for an unknown kind, UnsupportedError for one whose package is missing."""
    for kind in kinds:
        if kind not in DROPS:
            raise SettingsError(f"--drop {kind}: unknown; {nearest(kind, DROPS)}")
    if "duplicate" in kinds:
        require_datasketch()
