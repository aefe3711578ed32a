"""How long rows are: a histogram, the padding of random batches, and what packing would save."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np


def lengths_of(lengths: Sequence[int], batch: int, limit: int) -> dict[str, Any] | None:
    """Summarise the tokens of rows; rows without tokens do not count, and None is of no rows.

    `padding` is the share of padding tokens in batches of random rows, and `packed` the least number of rows of
    `limit` tokens that hold all.

    >>> lengths_of([10, 30, 0], 2, 40)["padding"]
    0.333
    """
    tokens = np.array([length for length in lengths if length])
    if not len(tokens):
        return None
    order = np.random.default_rng(0).permutation(tokens)
    parts = np.split(order, range(batch, len(order), batch))
    padded = sum(len(part) * int(part.max()) for part in parts)
    edges = [0, *(2**k for k in range(4, math.ceil(math.log2(tokens.max() + 1)) + 1))]
    counts, _ = np.histogram(tokens, edges if len(edges) > 1 else [0, 16])
    return {
        "rows": len(tokens),
        "median": int(np.median(tokens)),
        "longest": int(tokens.max()),
        "histogram": [{"below": below, "rows": int(count)} for below, count in zip(edges[1:], counts, strict=False)],
        "batch": batch,
        "padding": round(1 - int(tokens.sum()) / padded, 3),
        "packed": math.ceil(int(tokens.sum()) / max(limit, int(tokens.max()))),
    }
