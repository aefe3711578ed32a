"""Named random streams: two uses of one seed never share their draws."""

from collections.abc import Mapping
from typing import Literal

import numpy as np

Stream = Literal[
    "row order",
    "quality draw",
    "epoch order",
    "reference rows",
    "sensitivity rows",
    "EVA batches",
    "demo data",
    "head start",
    "head folds",
    "trusted order",
    "trusted model",
    "audit halves",
    "audit review",
]

STREAMS: Mapping[Stream, int] = {
    "row order": 1,
    "quality draw": 2,
    "epoch order": 3,
    "reference rows": 4,
    "sensitivity rows": 5,
    "EVA batches": 6,
    "demo data": 7,
    "head start": 8,
    "head folds": 9,
    "trusted order": 10,
    "trusted model": 11,
    "audit halves": 12,
    "audit review": 13,
}
"""Numbers are never used again: an old run repeats only while its streams keep theirs."""


def stream(name: Stream, seed: int, *place: int) -> np.random.Generator:
    """The generator of one use of a seed; `place` numbers its repetitions, such as epochs.

    `default_rng([seed, k])` will not do: it equals `default_rng([seed, k, 0])`. A spawn key is told from one with a
    zero behind it.
    """
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(STREAMS[name], *place)))
