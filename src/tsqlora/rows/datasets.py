"""Rows to score: their content, lengths and batches, and the rows of the reference."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, cast, runtime_checkable

import numpy as np

from tsqlora.errors import SettingsError
from tsqlora.rows.batches import IGNORED
from tsqlora.rows.table import Samples, length_of, lengths_in
from tsqlora.seeds import stream

REFERENCE_ROWS = 512


@runtime_checkable  # for beartype, which checks annotations while tests run
class Dataset(Protocol):
    """Anything with a length whose rows the collator accepts."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


def reference_rows(
    reference: int | Sequence[int] | Dataset, dataset: Dataset, seed: int
) -> tuple[list[int], list[Any]]:
    """Return the positions in the data set of the reference's rows, and these rows.

    Of a number it draws as many rows, or all of them if there are fewer.
    """
    if isinstance(reference, int):
        reference = sorted(stream("reference rows", seed).permutation(len(dataset))[:reference].tolist())
    own = require_reference(reference, dataset)
    if own is not None:
        return own, [dataset[j] for j in own]
    rows = [reference[j] for j in range(len(reference))]
    # Samples of the reference that are in the data set: the same objects, or equal content.
    objects, contents = {id(row) for row in rows}, {content_of(row) for row in rows} - {None}
    return [j for j in range(len(dataset)) if id(row := dataset[j]) in objects or content_of(row) in contents], rows


def require_reference(reference: Sequence[int] | Dataset, dataset: Dataset) -> list[int] | None:
    """Return the row numbers of the reference; None if it has samples.  Raises SettingsError for an invalid one."""
    if len(reference) < 2:
        raise SettingsError(f"the reference has {len(reference)} rows; it needs at least 2")
    rows = [reference[j] for j in range(len(reference))]
    if not all(isinstance(row, int | np.integer) for row in rows):
        return None
    own = [int(row) for row in rows]
    if len(set(own)) < len(own) or min(own) < 0 or max(own) >= len(dataset):
        raise SettingsError(f"the reference must have distinct row numbers from 0 to {len(dataset) - 1}")
    return own


LABELS = ("label", "labels", "label_ids")
BESIDE_TOKENS = (*LABELS, "input_ids", "attention_mask", "token_type_ids")
REVIEWED_AS = "reviewed_as"
"""The field of a trusted row that says why it was reviewed: as a "suspect", or drawn at random as a "check"."""
WIDE = {"i": np.int64, "u": np.int64, "f": np.float64}
"""The type in which numbers are compared, by their kind."""
NUMBERS = ("idx", "id", "index")
"""Columns that number the rows of public data sets: two rows of one input have different numbers."""


def input_of(row: Any) -> tuple[Any, ...] | None:
    """Return a row's content without its label and number: for generation the tokens of the prompt."""
    if not isinstance(row, Mapping):
        return None
    if "content" in row:  # a file: two copies have different paths
        return content_of({"content": row["content"]})
    if "input_ids" not in row:
        inputs = {name: value for name, value in row.items() if name not in (*LABELS, REVIEWED_AS)}
        return content_of({name: value for name, value in inputs.items() if name not in NUMBERS} or inputs)
    prompt = prompt_of(row)
    beside = {name: value for name, value in row.items() if name not in BESIDE_TOKENS and _is_input(value)}
    return content_of(beside | {"input_ids": row["input_ids"] if prompt is None else prompt})


def _is_input(value: Any) -> bool:
    """Whether a column beside the tokens is an image, places on a page or the like: tables, or fractions in a row."""
    try:
        values = np.asarray(value)
    except (TypeError, ValueError, RuntimeError):  # ragged, or on another device
        return False
    return values.ndim > 1 or (values.ndim == 1 and values.dtype.kind == "f")


def prompt_of(row: Any) -> np.ndarray | None:
    """Return the tokens of a causal model's row that it is not trained on; None for plain text and other tasks."""
    ids, labels = (row.get("input_ids"), row.get("labels")) if isinstance(row, Mapping) else (None, None)
    if ids is None or labels is None or np.ndim(labels) != 1 or len(labels) != len(ids):
        return None
    ids, labels = np.asarray(ids), np.asarray(labels)
    trained = labels != IGNORED
    # A single ignored token means plain text, whose first token is never a target; labels that are no tokens are tags.
    return ids[~trained] if (~trained).sum() > 1 and np.array_equal(labels[trained], ids[trained]) else None


def has_answer(row: Any) -> bool:
    """Whether a row is trained on a text, of which an input may have several right ones."""
    if prompt_of(row) is not None:
        return True
    ids, labels = (row.get("input_ids"), row.get("labels")) if isinstance(row, Mapping) else (None, None)
    if ids is None or labels is None or np.ndim(labels) != 1 or len(labels) in (0, len(ids)):
        return False
    # Tags are as many as tokens, and several labels are 0 or 1.
    return np.asarray(labels).dtype.kind in "iu" and bool(np.max(labels) > 1)


def content_of(row: Any) -> tuple[Any, ...] | None:
    """Return a row's numbers and texts as a hashable value; None where they have none.

    Numbers are of one width, so that rows that were tokenised into int32 equal those in int64.
    """
    if not isinstance(row, Mapping):
        return None
    try:
        values = [(str(name), np.asarray(value)) for name, value in sorted(row.items())]
    except (TypeError, ValueError, RuntimeError):  # ragged, or on another device
        return None
    if any(value.dtype == object for _, value in values):
        return None
    wide = ((name, value.astype(WIDE.get(value.dtype.kind, value.dtype), copy=False)) for name, value in values)
    return tuple((name, value.dtype.str, value.shape, value.tobytes()) for name, value in wide)


def lengths_of(dataset: Dataset) -> Sequence[int]:
    """Return token counts of rows in memory or of a datasets.Dataset, else zeros; only speed depends on them."""
    if isinstance(dataset, Samples):
        return dataset.lengths
    if isinstance(dataset, list | tuple):
        return [length_of(r) if isinstance(r, Mapping) and {"input_ids", "length"} & {*r} else 0 for r in dataset]
    from datasets import Dataset as Table  # seconds to import

    columns = dataset.column_names if isinstance(dataset, Table) else ()
    if not (lengths := [name for name in ("length", "input_ids") if name in columns]):
        return [0] * len(dataset)
    table = cast(Table, dataset).select_columns(lengths[0]).with_format("arrow")[:]  # other columns may be files
    return [n if isinstance(n, int) else 0 for n in lengths_in(table)]
