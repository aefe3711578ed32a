"""Which added tokens a model has never trained, by their embedding rows: slices of a file, or a model's own."""

from collections.abc import Callable, Collection, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open

from tsqlora.compat.deepspeed import is_partitioned
from tsqlora.compat.hub import cached_model
from tsqlora.compat.shapes import Float

ROWS = 512
"""Rows of other tokens, evenly spaced, that show what is usual."""
ALIKE = 0.1
"""Distance of two rows, or of a row and the mean of the usual ones, relative to the usual norm, below which a row is
one that `resize_token_embeddings` has made."""
OUTLYING = 2.0
"""How far a norm is below the 1st, or above the 99th, percentile of the usual ones to be outlying."""
NAMES = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight", "tok_embeddings.weight")

Read = Callable[[Sequence[int]], Float[np.ndarray, "n d"]]


def untrained_tokens(model: Any, added: Collection[int]) -> frozenset[int]:
    """Return those of the added tokens whose embedding row looks never trained, and that will not be trained.

    `model` is a directory or hub id, of which single rows are read if its weights are on this machine; or a model,
    whose adapter may train rows.
    """
    if not isinstance(model, str | Path):
        embedding = model.get_input_embeddings()
        if any(p.requires_grad or is_partitioned(p) for p in embedding.parameters()):
            return frozenset()
        weight = embedding.weight
        return looks_untrained(lambda ids: weight[list(ids)].detach().float().cpu().numpy(), len(weight), added)
    folder = model if Path(model).is_dir() else cached_model(str(model), "main")
    for path in sorted(Path(folder).glob("*.safetensors")) if folder else ():
        with safe_open(path, framework="pt") as tensors:
            if name := next(filter(lambda name: name.endswith(NAMES), tensors.keys()), None):
                part = tensors.get_slice(name)
                read = partial(_rows_of, part)
                return looks_untrained(read, part.get_shape()[0], added)
    return frozenset()


def _rows_of(part: Any, ids: Sequence[int]) -> Float[np.ndarray, "n d"]:
    return np.stack([part[j].float().numpy() for j in ids])


def looks_untrained(read: Read, size: int, added: Collection[int]) -> frozenset[int]:
    """Return the added tokens below `size` whose row is a copy of another's, near the mean, or of outlying norm."""
    own = np.array(sorted(j for j in added if 0 <= j < size), np.int64)
    others = [j for j in np.unique(np.linspace(0, size - 1, ROWS).astype(int)).tolist() if j not in {*own.tolist()}]
    if not len(own) or len(others) < 2:
        return frozenset()
    rows, usual = read(own.tolist()), read(others)
    norms, mean = np.linalg.norm(usual, axis=1), usual.mean(axis=0)
    near = ALIKE * np.median(norms)
    alike = np.linalg.norm(rows - mean, axis=1) < near
    for j, row in enumerate(rows):
        alike[j] |= (np.linalg.norm(rows - row, axis=1) < near).sum() > 1
    low, high = np.quantile(norms, [0.01, 0.99])
    length = np.linalg.norm(rows, axis=1)
    return frozenset(own[alike | (length * OUTLYING < low) | (length > high * OUTLYING)].tolist())
