"""Files -> which rows each split has, with the columns and the labels; no row stays in memory."""

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Literal

import numpy as np

from tsqlora.data.cells import is_missing, row_text
from tsqlora.data.columns import Columns, find_columns
from tsqlora.data.dialect import PLAIN, SNIFF, Hints
from tsqlora.data.formats import Format, find_format
from tsqlora.data.labels import LabelMap, are_measures, classes_of, distinct_labels, encode_targets, look_alikes
from tsqlora.data.rows import ORDER, Rows, Source, open_splits
from tsqlora.data.whole_rows import whole_rows
from tsqlora.errors import DataError

MEASURED = ("validation", "test")
"""The splits that are not trained on, but measured on."""

Answer = Literal["class", "number", "text"]
"""What a row's label is."""


@dataclass(frozen=True, slots=True)
class Splits:
    """Where the rows of each split are, and how they are read.

    Args:
        sources: the source of each split; a validation split without a file of its own has the training rows'.
        places: the rows of each split in its source, ascending from 0.
        labels: the classes; None for numbers and texts.
        format: how rows become prompts and targets where text is generated; None elsewhere.
        notes: rows that were left out, and files whose encoding is only likely.
    """

    sources: Mapping[str, Source]
    places: Mapping[str, np.ndarray]
    columns: Columns
    labels: LabelMap | None
    format: Format | None = None
    notes: tuple[str, ...] = ()

    def chunks(self, split: str) -> Iterator[Rows]:
        """The rows of a split in order, few at a time."""
        return self.sources[split].chunks(self.places[split])

    def rows(self, split: str) -> Rows:
        """The rows of a split, all in memory."""
        return self.sources[split].read(self.places[split])

    def texts(self, split: str) -> Iterator[str]:
        """The text of every row of a split: a line for each of a pair's two, and for the target."""
        columns = asdict(self.columns)
        target = self.columns.label if self.format is not None else None
        for rows in self.chunks(split):
            for row in rows.rows:
                yield row_text(row, columns) + ("" if target is None else f"\n{row.get(target)}")

    @property
    def dialects(self) -> dict[str, str]:
        """How each file is written that is a table or not UTF-8."""
        found = {source.name: source.dialect for source in self.sources.values()}
        return {name: str(dialect) for name, dialect in found.items() if dialect != PLAIN}

    @property
    def held_out(self) -> int:
        """Rows of the training file that are the validation split."""
        held = self.sources.get("validation") is self.sources["train"]
        return len(self.places["validation"]) if held else 0


def read_data(
    train: str,
    validation: str | None,
    test: str | None,
    *,
    answer: Answer,
    columns: Mapping[str, str | None],
    validation_fraction: float,
    seed: int,
    trusted: str | None = None,
    max_bad_rows: float = 0.0,
    hints: Hints = SNIFF,
) -> Splits:
    """The splits train, trusted if named, validation (a seeded share of train where none is given), and test if any.

    `columns` are the options of `find_format` where the answer is text, of `find_columns` elsewhere. Every row is read
    and every label checked; rows that lack a text or a label are left out, with a warning, up to the share
    `max_bad_rows` of a split. A test split beside the training rows that has no label is left out, with a warning:
    benchmarks keep theirs. Raises DataError with file and row.
    """
    sources = open_splits(train, validation, test, trusted, hints)
    first = sources["train"]
    format = find_format(first.columns(), source=first.name, **columns) if answer == "text" else None
    found = format.columns if format else find_columns(first.columns(), source=first.name, **columns)
    if found.label is None and format is None:
        raise DataError(
            f"{first.name} has no label column; name it in data.label. Columns: {', '.join(first.columns())}"
        )
    if test is None and "test" in sources and _lacks_labels(sources["test"], found.label):
        warnings.warn(f"{sources['test'].name} has no labels in column '{found.label}': it is left out", stacklevel=2)
        del sources["test"]
    places, notes = _whole(sources, found, format, max_bad_rows)
    labels, groups = _labels(first, places["train"], found, answer)
    if "validation" not in sources:
        out = held_out(groups, fraction=validation_fraction, seed=seed, source=first.name)
        sources["validation"] = first
        places |= {"train": places["train"][~out], "validation": places["train"][out]}
    ordered = [name for name in ORDER if name in sources]
    return Splits({n: sources[n] for n in ordered}, {n: places[n] for n in ordered}, found, labels, format, notes)


def whole(
    name: str, source: Source, columns: Columns, labels: LabelMap | None, format: Format | None, max_bad_rows: float
) -> Splits:
    """A split of all rows of a source that lack nothing, by columns, classes and a format that are known."""
    places, notes = _whole({name: source}, columns, format, max_bad_rows)
    return Splits({name: source}, places, columns, labels, format, notes)


def _whole(
    sources: Mapping[str, Source], columns: Columns, format: Format | None, most: float
) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
    """The places of each source's rows that lack nothing, and notes of the others, of which a warning is given."""
    found = {name: whole_rows(source, columns, format, most=most) for name, source in sources.items()}
    left_out = [one.note for one in found.values() if one.note is not None]
    for note in left_out:
        warnings.warn(note, stacklevel=4)
    unsure = (source.dialect.note(source.name) for source in sources.values())
    notes = dict.fromkeys([*(note for note in unsure if note is not None), *left_out])
    return {name: one.places for name, one in found.items()}, tuple(notes)


def _lacks_labels(source: Source, column: str | None) -> bool:
    if column is None:
        return False
    values = (row.get(column) for rows in source.chunks() for row in rows.rows)
    return all(is_missing(value) or value in (-1, "-1") for value in values)


def _labels(source: Source, places: np.ndarray, columns: Columns, answer: Answer) -> tuple[LabelMap | None, np.ndarray]:
    """The classes of the rows at these places, and the number of each row's; all alike where labels are no classes."""
    parts, column = source.chunks(places), columns.label
    if answer == "number" and column is not None:
        for rows in parts:
            encode_targets(rows, column)
    if answer != "class" or column is None:
        return None, np.zeros(len(places), dtype=np.int32)
    values, groups = distinct_labels(parts, column)
    classes = classes_of(values, source.name, column)
    if are_measures(classes.names):
        warnings.warn(
            f"{source.name}: the labels in column '{column}' are numbers with decimals, and each of "
            f"{len(classes.names)} is learned as a class of its own; set task.type to regression if they are measured",
            stacklevel=3,
        )
    for alike in look_alikes(classes.names):
        warnings.warn(
            f"{source.name}: the classes {', '.join(map(repr, alike))} differ in case or spaces alone, and are "
            f"learned as {len(alike)} classes; write them alike if they are one",
            stacklevel=3,
        )
    return classes, groups


def held_out(groups: np.ndarray, *, fraction: float, seed: int, source: str) -> np.ndarray:
    """Whether each row is for validation: a random `fraction` of them; `groups` numbers each row's class.

    Each class gives its share, by largest remainder, and keeps at least one row for training. Both sides have at least
    one row; the same groups and seed give the same split. Raises DataError where the rows are too few.
    """
    sizes = np.bincount(groups).tolist()
    # A class that left training altogether would be unknown to the model that is validated.
    most = [size - 1 for size in sizes]
    if sum(most) < 1:
        raise DataError(f"{source} has too few rows to split off a validation set; name one in data.validation")
    # No stream of `seeds`: other draws would put rows that an older run held out among those it trained on.
    rng = np.random.default_rng(seed)
    out = np.zeros(len(groups), dtype=np.bool_)
    for group, count in enumerate(_quotas(sizes, most, fraction)):
        out[rng.permutation(np.flatnonzero(groups == group))[:count]] = True
    return out


def _quotas(sizes: Sequence[int], most: Sequence[int], fraction: float) -> list[int]:
    """Rows that each group gives: floors of the shares, the rest by largest remainder."""
    shares = [size * fraction for size in sizes]
    quotas = [min(math.floor(share), limit) for share, limit in zip(shares, most, strict=True)]
    total = min(max(1, round(sum(shares))), sum(most))
    while sum(quotas) < total:
        open_groups = [j for j in range(len(sizes)) if quotas[j] < most[j]]
        quotas[max(open_groups, key=lambda j: shares[j] - quotas[j])] += 1
    return quotas
