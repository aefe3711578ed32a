"""Files -> the samples of every split, with the columns, the labels and what was cut on the way."""

import hashlib
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace

import numpy as np
from transformers import PreTrainedTokenizerBase

from tsqlora.data.cells import is_blank
from tsqlora.data.columns import Columns, find_columns
from tsqlora.data.formats import Format, find_format
from tsqlora.data.generation import left_out, rows_that_fit, tokenise_generation
from tsqlora.data.labels import (
    LabelMap,
    are_measures,
    classes_of,
    encode_labels,
    encode_targets,
    look_alikes,
    read_labels,
)
from tsqlora.data.rows import Rows, column_names, read_splits
from tsqlora.data.split import split_rows, take
from tsqlora.data.tokenise import TokenisedSplit, row_hash, tokenise
from tsqlora.errors import DataError, SettingsError


@dataclass(frozen=True, slots=True)
class Splits:
    """Rows of every split, the columns that are used, and the classes (None for numbers and texts).

    `format` says how rows become prompts and targets where text is generated, and is None elsewhere.
    """

    rows: Mapping[str, Rows]
    columns: Columns
    labels: LabelMap | None
    format: Format | None = None


@dataclass(frozen=True, slots=True)
class Writing:
    """How a generating model takes its samples: the target on a side of its own, or on the prompt's heels."""

    seq2seq: bool
    max_target_length: int | None


@dataclass(frozen=True, slots=True)
class Prepared:
    """Splits as a model takes them."""

    splits: Splits
    samples: Mapping[str, TokenisedSplit]
    notes: tuple[str, ...] = ()
    """What the user should know: rows that were left out, and rows that are in two splits."""

    @property
    def hash(self) -> str:
        """16 hex digits that name the data: of every sample of every split, in order."""
        digest, between = hashlib.sha256(), ""
        for name, split in self.samples.items():
            for h in split.hashes:
                digest.update(f"{between}{name}:{h}".encode())
                between = "\n"
        return digest.hexdigest()[:16]

    def columns(self) -> dict[str, str | None]:
        """Names of the columns used, as the run's record and the scores keep them."""
        return asdict(self.splits.columns)


def read_data(
    train: str,
    validation: str | None,
    test: str | None,
    *,
    text: str | None,
    text_pair: str | None,
    label: str | None,
    classes: bool,
    validation_fraction: float,
    seed: int,
) -> Splits:
    """Rows of train, validation (a seeded share of train where none is given), and test if any.

    A test split beside the training rows that has no label is left out, with a warning: benchmarks keep theirs.
    """
    rows = read_splits(train, validation, test)
    first = rows["train"]
    columns = find_columns(column_names(first), text=text, text_pair=text_pair, label=label, source=first.source)
    if columns.label is None:
        raise DataError(
            f"{first.source} has no label column; name it in data.label. Columns: {', '.join(column_names(first))}"
        )
    if test is None:
        _leave_out_without_labels(rows, columns.label)
    label_map = _classes_of(first, columns.label) if classes else None
    for alike in look_alikes(label_map.names if label_map else ()):
        warnings.warn(
            f"{first.source}: the classes {', '.join(map(repr, alike))} differ in case or spaces alone, and are "
            f"learned as {len(alike)} classes; write them alike if they are one",
            stacklevel=2,
        )
    if not classes:
        encode_targets(first, columns.label)  # a bad row is told before anything is split
    if "validation" not in rows:
        stratum = columns.label if classes else None
        rows["train"], rows["validation"] = split_rows(first, fraction=validation_fraction, seed=seed, label=stratum)
    return Splits({name: rows[name] for name in ("train", "validation", "test") if name in rows}, columns, label_map)


def _classes_of(rows: Rows, column: str) -> LabelMap:
    found = classes_of(read_labels(rows, column), rows.source, column)
    if are_measures(found.names):
        warnings.warn(
            f"{rows.source}: the labels in column '{column}' are numbers with decimals, and each of {len(found.names)} "
            "is learned as a class of its own; set task.type to regression if they are measured",
            stacklevel=3,
        )
    return found


def _leave_out_without_labels(rows: dict[str, Rows], column: str) -> None:
    test = rows.get("test")
    if test is not None and all(is_blank(value := row.get(column)) or value in (-1, "-1") for row in test.rows):
        warnings.warn(f"{test.source} has no labels in column '{column}': it is left out", stacklevel=3)
        del rows["test"]


def read_texts(
    train: str,
    validation: str | None,
    test: str | None,
    *,
    format: str | None,
    prompt: str | None,
    target: str | None,
    messages: str | None,
    text: str | None,
    validation_fraction: float,
    seed: int,
) -> Splits:
    """The same for a generating model: the format is found by the columns of the training rows."""
    rows = read_splits(train, validation, test)
    first = rows["train"]
    found = find_format(
        column_names(first),
        source=first.source,
        format=format,
        prompt=prompt,
        target=target,
        messages=messages,
        text=text,
    )
    if test is None and found.columns.label is not None:
        _leave_out_without_labels(rows, found.columns.label)
    if "validation" not in rows:
        rows["train"], rows["validation"] = split_rows(first, fraction=validation_fraction, seed=seed, label=None)
    ordered = {name: rows[name] for name in ("train", "validation", "test") if name in rows}
    return Splits(ordered, found.columns, None, found)


def prepare(
    splits: Splits, tokenizer: PreTrainedTokenizerBase, *, max_length: int, writing: Writing | None = None
) -> Prepared:
    """Every split tokenised, with encoded labels; for a generating model with targets.

    A row whose target does not fit whole is left out of rows and samples, and a note says so.
    """
    notes: list[str] = []
    if writing is not None:
        fitting = {name: fit_whole(rows, splits, tokenizer, max_length, writing) for name, rows in splits.rows.items()}
        notes = [note for name, rows in splits.rows.items() if (note := left_out(rows, fitting[name]))]
        splits = replace(splits, rows={name: take(rows, fitting[name]) for name, rows in splits.rows.items()})
    notes += _seen_in_training(splits)
    samples = {
        name: encode_split(rows, splits, tokenizer, max_length=max_length, writing=writing)
        for name, rows in splits.rows.items()
    }
    return Prepared(splits, samples, tuple(notes))


def _seen_in_training(splits: Splits) -> list[str]:
    """Rows of other splits that training has, too: of classes and numbers by the text, whatever the label is."""
    used = asdict(splits.columns) | ({"label": None} if splits.format is None else {})
    known = {row_hash(row, used) for row in splits.rows["train"].rows}
    notes = []
    for name, rows in splits.rows.items():
        if name != "train" and (seen := sum(row_hash(row, used) in known for row in rows.rows)):
            notes.append(
                f"{seen} of {len(rows)} {name} rows are training rows, too: what is measured on them says little of "
                "new ones"
            )
    return notes


def fit_whole(
    rows: Rows,
    splits: Splits,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    writing: Writing,
    *,
    may_be_none: bool = False,
) -> np.ndarray:
    """Which rows of a generating model's data have a target that fits."""
    assert splits.format is not None
    return rows_that_fit(
        rows,
        splits.format,
        tokenizer,
        max_length=max_length,
        seq2seq=writing.seq2seq,
        max_target_length=writing.max_target_length,
        may_be_none=may_be_none,
    )


def encode_split(
    rows: Rows,
    splits: Splits,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    writing: Writing | None = None,
    labelled: bool = True,
) -> TokenisedSplit:
    """Rows as samples; without labels or targets where `labelled` is False."""
    if splits.format is None or writing is None:
        return encode(rows, splits.columns, splits.labels, tokenizer, max_length=max_length, labelled=labelled)
    return tokenise_generation(
        rows,
        splits.format,
        tokenizer,
        max_length=max_length,
        seq2seq=writing.seq2seq,
        with_targets=labelled,
        max_target_length=writing.max_target_length,
    )


def encode(
    rows: Rows,
    columns: Columns,
    labels: LabelMap | None,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    labelled: bool = True,
) -> TokenisedSplit:
    """One split as samples; without labels where `labelled` is False."""
    encoded: list[int] | list[float] | None = None
    if labelled:
        assert columns.label is not None
        encoded = encode_targets(rows, columns.label) if labels is None else encode_labels(rows, columns.label, labels)
    return tokenise(rows, columns, tokenizer, max_length=max_length, labels=encoded)


def resolve_max_length(asked: int | None, *, tokenizer_limit: int, positions: int | None) -> int:
    """Tokens kept of a sample: what is asked, else the lesser of the tokenizer's and the model's limit.

    Raises SettingsError where more is asked than the model has positions, or nothing is known.
    """
    limits = [limit for limit in (positions, tokenizer_limit) if limit is not None and limit < 10**9]
    if asked is None:
        if not limits:
            raise SettingsError("neither the model nor its tokenizer names a maximal length; set data.max_length")
        return min(limits)
    if positions is not None and asked > positions:
        raise SettingsError(f"data.max_length {asked} is above the model's {positions} positions; lower it")
    return asked
