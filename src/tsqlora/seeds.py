"""Named random streams: two uses of one seed never share their draws."""

from collections.abc import Mapping
from typing import Literal, get_args

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
    "audit folds",
    "held-out rows",
]

STREAMS: Mapping[Stream, int] = {name: number for number, name in enumerate(get_args(Stream), start=1)}
"""A stream's number is its place: append new names only, since an old run repeats only while numbers stay."""


def stream(name: Stream, seed: int, *place: int) -> np.random.Generator:
    """Return the generator for one use of a seed; `place` numbers its repetitions, such as epochs.

    A spawn key, because `default_rng([seed, k])` equals `default_rng([seed, k, 0])`.
    """
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(STREAMS[name], *place)))
