"""The rows that are scored, and those among them that are the reference."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from tsqlora.errors import SettingsError
from tsqlora.seeds import stream
from tsqlora.tasks.forward import Batch, Collate
from tsqlora.tasks.generation import IGNORED

REFERENCE_ROWS = 512


@runtime_checkable  # for beartype, which checks annotations while tests run
class Dataset(Protocol):
    """What is scored: anything with a length whose rows the collator takes."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


def reference_indices(rows: int, size: int, seed: int) -> list[int]:
    """The default reference: `size` of the rows, or all of them if there are fewer."""
    rng = stream("reference rows", seed)
    return sorted(rng.permutation(rows)[:size].tolist())


def reference_rows(
    reference: int | Sequence[int] | Dataset, dataset: Dataset, seed: int
) -> tuple[list[int], list[Any]]:
    """The places in the data set of what is in the reference, and the reference's rows."""
    if isinstance(reference, int):
        reference = reference_indices(len(dataset), reference, seed)
    own = require_reference(reference, dataset)
    if own is not None:
        return own, [dataset[j] for j in own]
    rows = [reference[j] for j in range(len(reference))]
    return _own_places(rows, dataset), rows


def require_reference(reference: Sequence[int] | Dataset, dataset: Dataset) -> list[int] | None:
    """The places that the reference names; None where it is samples.  Raises SettingsError where it cannot be one."""
    if len(reference) < 2:
        raise SettingsError(f"the reference has {len(reference)} rows; it needs at least 2")
    rows = [reference[j] for j in range(len(reference))]
    if not all(isinstance(row, int | np.integer) for row in rows):
        return None
    own = [int(row) for row in rows]
    if len(set(own)) < len(own) or min(own) < 0 or max(own) >= len(dataset):
        raise SettingsError(f"the reference must name different rows from 0 to {len(dataset) - 1}")
    return own


def _own_places(rows: Sequence[Any], dataset: Dataset) -> list[int]:
    """Places in the data set of samples that are among these rows: the same object, or one that holds the same."""
    objects, known = {id(row) for row in rows}, {held(row) for row in rows} - {None}
    return [j for j in range(len(dataset)) if id(row := dataset[j]) in objects or held(row) in known]


LABELS = ("label", "labels", "label_ids")


def input_of(row: Any) -> tuple[Any, ...] | None:
    """What a row holds beside its label: of text that is written the tokens of the prompt."""
    if not isinstance(row, Mapping):
        return None
    ids, labels = row.get("input_ids"), row.get("labels")
    if ids is None:
        return held({name: value for name, value in row.items() if name not in LABELS})
    if labels is not None and np.ndim(labels) == 1 and len(labels) == len(ids):
        prompt = np.asarray(ids)[np.asarray(labels) == IGNORED]
        # Of plain text the first token is no target either: it follows from nothing.
        return held({"input_ids": prompt if len(prompt) > 1 else ids})
    return held({"input_ids": ids})


def held(row: Any) -> tuple[Any, ...] | None:
    """What a row of numbers and texts holds, so that it can be found again; None where that cannot be told."""
    if not isinstance(row, Mapping):
        return None
    try:
        values = [(str(name), np.asarray(value)) for name, value in sorted(row.items())]
    except (TypeError, ValueError, RuntimeError):  # ragged, or on another device
        return None
    if any(value.dtype == object for _, value in values):
        return None
    return tuple((name, value.dtype.str, value.shape, value.tobytes()) for name, value in values)


def batches_of(rows: Sequence[Any], collate: Collate, batch_size: int) -> Iterator[Batch]:
    """The rows in batches, in their order."""
    for start in range(0, len(rows), batch_size):
        yield collate(list(rows[start : start + batch_size]))


def lengths_of(dataset: Dataset) -> list[int]:
    """Token counts where rows have `input_ids`, else equal lengths: only speed depends on it."""
    rows = (dataset[j] for j in range(len(dataset)))
    return [len(row["input_ids"]) if isinstance(row, Mapping) and "input_ids" in row else 0 for row in rows]
