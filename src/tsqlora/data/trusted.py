"""Trusted rows: none that measures is among them."""

from collections.abc import Iterable
from dataclasses import asdict, replace

import numpy as np

from tsqlora.data.cells import row_hash, sample_hash
from tsqlora.data.generation import inputs
from tsqlora.data.rows import Rows
from tsqlora.data.splits import MEASURED, Splits
from tsqlora.errors import DataError


def numbers_of(hashes: Iterable[str]) -> np.ndarray:
    """Hashes of 16 hex digits as numbers."""
    return np.array([int(name, 16) for name in hashes], dtype=np.uint64)


def input_numbers(rows: Rows, splits: Splits) -> np.ndarray:
    """A number for the input of each row: the text with its pair, or what its answer goes on from; no label."""
    if splits.format is not None:
        return numbers_of(sample_hash(text, "", "") for text in inputs(rows, splits.format))
    unlabelled = asdict(splits.columns) | {"label": None}
    return numbers_of(row_hash(row, unlabelled) for row in rows.rows)


def apart(splits: Splits) -> tuple[Splits, tuple[str, ...]]:
    """The splits without trusted rows whose input a row of MEASURED has, too; a note says how many these were.

    Raises DataError where no trusted row is left.
    """
    if "trusted" not in splits.sources:
        return splits, ()
    measured = [_of_split(splits, name) for name in MEASURED if name in splits.sources]
    seen = np.isin(_of_split(splits, "trusted"), np.concatenate(measured))
    if not seen.any():
        return splits, ()
    source = splits.sources["trusted"].name
    if seen.all():
        raise DataError(
            f"{source}: the input of every row is also in validation or test rows, so that no trusted row is left; "
            "name other rows in data.trusted, or others in data.validation and data.test"
        )
    note = f"{seen.sum()} of {len(seen)} trusted rows are left out: validation or test rows have the same input"
    return replace(splits, places={**splits.places, "trusted": splits.places["trusted"][~seen]}), (note,)


def _of_split(splits: Splits, name: str) -> np.ndarray:
    return np.concatenate([input_numbers(rows, splits) for rows in splits.chunks(name)])
