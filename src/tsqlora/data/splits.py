"""Decide which rows each split has, with columns and labels; leave out incomplete rows, and keep none in memory."""

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial

import numpy as np

from tsqlora.data.cells import MissingError, is_missing, lacking, text_at
from tsqlora.data.columns import Columns, find_columns, quoted
from tsqlora.data.dialect import PLAIN, SNIFF, Hints
from tsqlora.data.formats import Format, find_format, pair_format
from tsqlora.data.formats.chats import Manner
from tsqlora.data.labels import LabelMap, are_measures, classes_of, distinct_labels, encode_targets, look_alikes
from tsqlora.data.media import require_reader, why_unread
from tsqlora.data.rows import ORDER, Rows, Source, open_splits
from tsqlora.errors import DataError

MEASURED = ("validation", "test")
"""The splits that training only measures."""

Lacks = Callable[[Rows, int], str | None]
"""What row i lacks, in words; None for nothing."""
_SHOWN = 5
"""Rows that a note lists for each reason."""


@dataclass(frozen=True, slots=True)
class Splits:
    """Where the rows of each split are, and how to read them.

    Args:
        sources: the source of each split; a held-out validation split has that of the training rows.
        places: the rows of each split in its source, ascending from 0.
        labels: the classes; None for numbers and texts.
        format: how rows become prompts and targets for text generation; None for other tasks.
        notes: rows that were left out, and files whose encoding is a guess.
    """

    sources: Mapping[str, Source]
    places: Mapping[str, np.ndarray]
    columns: Columns
    labels: LabelMap | None
    format: Format | None = None
    notes: tuple[str, ...] = ()

    def chunks(self, split: str) -> Iterator[Rows]:
        """The rows of a split in order, a chunk at a time."""
        return self.sources[split].chunks(self.places[split])

    def rows(self, split: str) -> Rows:
        """The rows of a split, all in memory."""
        return self.sources[split].read(self.places[split])

    @property
    def dialects(self) -> dict[str, str]:
        """The dialect of each file that is a table or not UTF-8."""
        dialects = {source.name: source.dialect for source in self.sources.values()}
        return {name: str(dialect) for name, dialect in dialects.items() if dialect != PLAIN}

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
    answer: str,
    columns: Mapping[str, str | None],
    validation_fraction: float,
    seed: int,
    trusted: str | None = None,
    max_bad_rows: float = 0.0,
    hints: Hints = SNIFF,
) -> Splits:
    """Read the splits: train, trusted if named, validation (a seeded share of train if not named), and test if any.

    `answer` is that of the task. `columns` are options of `find_format` if it is text, of `find_columns` if it is a
    label; pairs have none, and none are held out. Every row is read and every label checked. Rows without a text or a
    label are left out, with a warning, up to the share `max_bad_rows` of a split. A test split beside the training rows
    that has no labels is left out, with a warning: benchmarks keep theirs secret. Raises DataError with file and row.
    """
    sources = open_splits(train, validation, test, trusted, hints)
    first = sources["train"]
    format = None
    if answer in ("text", "pair"):
        find = pair_format if answer == "pair" else find_format
        format = find(first.columns(), source=first.name, **columns)
    used = (
        format.columns
        if format
        else find_columns(first.columns(), source=first.name, tokens=answer == "tags", **columns)
    )
    sources = {name: source.with_files(asdict(used)) for name, source in sources.items()}
    first = sources["train"]
    if used.label is None and format is None:
        raise DataError(
            f"{first.name} has no label column; set data.label to one of its columns: {quoted(first.columns())}; or "
            "set task.type to causal-lm, for a model that writes text"
        )
    if test is None and "test" in sources and _lacks_labels(sources["test"], used.label):
        warnings.warn(f"{sources['test'].name} has no labels in column '{used.label}' and is left out", stacklevel=2)
        del sources["test"]
    places, notes = _complete(sources, used, lacks_of(used, format, tags=answer == "tags"), max_bad_rows)
    labels, groups = _labels(first, places["train"], used, answer)
    if "validation" not in sources and answer != "pair":  # pairs are only scored, all of them
        out = held_out(groups, fraction=validation_fraction, seed=seed, source=first.name)
        sources["validation"] = first
        places |= {"train": places["train"][~out], "validation": places["train"][out]}
    ordered = [name for name in ORDER if name in sources]
    return Splits({n: sources[n] for n in ordered}, {n: places[n] for n in ordered}, used, labels, format, notes)


def one_split(
    name: str, source: Source, columns: Columns, labels: LabelMap | None, format: Format | None, max_bad_rows: float
) -> Splits:
    """A single split of all complete rows of a source, with given columns, classes and format."""
    tags = labels is not None and labels.answer == "tags"
    places, notes = _complete({name: source}, columns, lacks_of(columns, format, tags=tags), max_bad_rows)
    return Splits({name: source}, places, columns, labels, format, notes)


def _complete(
    sources: Mapping[str, Source], columns: Columns, lacks: Lacks, most: float
) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
    """The places of each source's complete rows, and notes about the others, which are warnings too."""
    results = {name: _complete_rows(source, columns, lacks, most=most) for name, source in sources.items()}
    left_out = [note for _, note in results.values() if note is not None]
    for note in left_out:
        warnings.warn(note, stacklevel=4)
    unsure = (source.dialect.note(source.name) for source in sources.values())
    notes = dict.fromkeys([*(note for note in unsure if note is not None), *left_out])
    return {name: places for name, (places, _) in results.items()}, tuple(notes)


def _complete_rows(source: Source, columns: Columns, lacks: Lacks, *, most: float) -> tuple[np.ndarray, str | None]:
    """Places of the rows with text and label (or prompt and target), and a note about the others.

    Raises DataError if the others are more than the share `most`.
    """
    count = 0
    bad, places = dict[str, list[int | str]](), list[np.ndarray]()
    for rows in source.chunks():
        reasons = [lacks(rows, i) for i in range(len(rows))]
        for i, reason in enumerate(reasons):
            if reason is not None:
                bad.setdefault(reason, []).append(rows.numbers[i])
        places.append(rows.ids[[reason is None for reason in reasons]])
        count += len(rows)
    complete = np.concatenate(places)
    if (left_out := count - len(complete)) == 0:
        return complete, None
    if left_out > most * count:
        require_columns(source, columns, bad)
        raise DataError(
            f"{source.name}: {left_out:,} of {count:,} rows are incomplete, more than data.max_bad_rows ({most:g}) "
            f"allows: {listed(bad, source.name)}; fill them in, or raise it"
        )
    return complete, f"{source.name}: {left_out:,} of {count:,} rows are left out: {listed(bad, source.name)}"


def require_columns(source: Source, columns: Columns, bad: Iterable[str]) -> None:
    """Raise DataError if one of these reasons is a column that no row has."""
    names = source.columns()
    for column in (columns.text, columns.text_pair, columns.label):
        if column is not None and column not in names and any(f"column '{column}'" in reason for reason in bad):
            raise DataError(
                f"{source.name} has no column '{column}', which the training rows have; rename one of its columns: "
                f"{quoted(names)}"
            )


def listed(bad: Mapping[str, list[int | str]], source: str) -> str:
    """Each reason with its count and the numbers, or files, of the first rows.

    >>> listed({"no text in column 'text'": [4, 9], "no label in column 'label'": [7]}, "a.csv")
    "2 with no text in column 'text' (lines 4, 9), 1 with no label in column 'label' (line 7)"
    """
    line, parts = "row" if source.endswith((".parquet", ".json", "]")) else "line", []
    for reason, numbers in bad.items():
        unit = "file" if isinstance(numbers[0], str) else line
        shown = ", ".join(map(str, numbers[:_SHOWN])) + (", …" if len(numbers) > _SHOWN else "")
        parts.append(f"{len(numbers):,} with {reason} ({unit}{'s' if len(numbers) > 1 else ''} {shown})")
    return ", ".join(parts)


def lacks_of(columns: Columns, format: Format | None, *, answers: bool = True, tags: bool = False) -> Lacks:
    """A function of rows and i that says what row i lacks, with `answers` also a label or target; None for nothing.

    With `tags` a row lacks something, too, if it has not one tag for each token.
    """
    if columns.media:
        require_reader(columns.media)
        return partial(_lacks_file, columns=columns, answers=answers)
    if tags:
        return partial(_lacks_tags, columns=columns, answers=answers)
    if format is None:
        used = {columns.text: "text", columns.text_pair: "text", columns.label if answers else None: "label"}
        needed = {column: what for column, what in used.items() if column is not None}
        return lambda rows, i: lacking(rows.rows[i], needed)
    target = {} if columns.label is None or not answers else {columns.label: "target"}

    def lacks(rows: Rows, i: int) -> str | None:
        try:
            format.read(rows, i, Manner(seq2seq=False, chat=False, targets=answers))
        except MissingError as error:
            return lacking(rows.rows[i], target) or error.what
        except DataError:  # tokenising raises it again, in the model's own manner
            pass
        return None

    return lacks


def _lacks_file(rows: Rows, i: int, *, columns: Columns, answers: bool) -> str | None:
    row, media = rows.rows[i], columns.media or ""
    needed = {columns.text: "file"} | ({columns.label: "label"} if answers and columns.label else {})
    return lacking(row, needed) or why_unread(text_at(rows, i, columns.text), media)


def _lacks_tags(rows: Rows, i: int, *, columns: Columns, answers: bool) -> str | None:
    tokens, tags = (rows.rows[i].get(name) for name in (columns.text, columns.label or ""))
    if is_missing(tokens) or tokens == []:
        return f"no tokens in column '{columns.text}'"
    if not answers:
        return None
    if is_missing(tags):
        return f"no tags in column '{columns.label}'"
    if isinstance(tokens, list) and isinstance(tags, list) and len(tokens) != len(tags):
        return "unequal numbers of tokens and tags"
    return None  # reading anything but lists raises an error


def _lacks_labels(source: Source, column: str | None) -> bool:
    if column is None:
        return False
    values = (row.get(column) for rows in source.chunks() for row in rows.rows)
    return all(is_missing(value) or value in (-1, "-1") for value in values)


def _labels(source: Source, places: np.ndarray, columns: Columns, answer: str) -> tuple[LabelMap | None, np.ndarray]:
    """The classes of the rows at these places, and the number of each row's class; all 0 without a single class."""
    parts, column = source.chunks(places), columns.label
    if answer == "number" and column is not None:
        for rows in parts:
            encode_targets(rows, column)
    if answer in ("number", "text", "pair") or column is None:
        return None, np.zeros(len(places), dtype=np.int32)
    values, groups = distinct_labels(parts, column, answer)
    classes = classes_of(values, source.name, column, answer)
    if are_measures(classes.names):
        warnings.warn(
            f"{source.name}: the labels in column '{column}' are numbers with decimals, and each of "
            f"{len(classes.names)} becomes a class; set task.type to regression if they are measurements",
            stacklevel=3,
        )
    if answer == "tags" and isinstance(classes.names[0], int):
        warnings.warn(
            f"{source.name}: the tags in column '{column}' are numbers without names, so span_f1 counts equal "
            "neighbours as spans, also those outside; write names, with O for outside",
            stacklevel=3,
        )
    if classes.names[0] == -1 and 0 in classes.names:
        warnings.warn(
            f"{source.name}: the label -1 in column '{column}' is a class like any other; remove its rows if it means "
            "no label",
            stacklevel=3,
        )
    for alike in look_alikes(classes.names):
        warnings.warn(
            f"{source.name}: the classes {', '.join(map(repr, alike))} differ in case or spaces alone and count as "
            f"{len(alike)} classes; write them alike if they are one",
            stacklevel=3,
        )
    return classes, groups


def held_out(groups: np.ndarray, *, fraction: float, seed: int, source: str) -> np.ndarray:
    """Draw a random `fraction` of the rows for validation, as a mask; `groups` numbers each row's class.

    Each class gives its share, by largest remainder, and keeps at least one row for training. Both sides have at least
    one row; the same groups and seed give the same split. Raises DataError if there are too few rows.
    """
    sizes = np.bincount(groups).tolist()
    # A class without training rows would be unknown to the model that is validated.
    most = [size - 1 for size in sizes]
    if sum(most) < 1:
        raise DataError(f"{source} has too few rows to hold out validation rows; set data.validation")
    # Not a stream of `seeds`: other draws would move validation rows of older runs into training.
    rng = np.random.default_rng(seed)
    out = np.zeros(len(groups), dtype=np.bool_)
    for group, count in enumerate(_quotas(sizes, most, fraction)):
        out[rng.permutation(np.flatnonzero(groups == group))[:count]] = True
    return out


def _quotas(sizes: Sequence[int], most: Sequence[int], fraction: float) -> list[int]:
    """Rows that each group gives: floors of the shares, then the largest remainders."""
    shares = [size * fraction for size in sizes]
    quotas = [min(math.floor(share), limit) for share, limit in zip(shares, most, strict=True)]
    total = min(max(1, round(sum(shares))), sum(most))
    while sum(quotas) < total:
        open_groups = [j for j in range(len(sizes)) if quotas[j] < most[j]]
        quotas[max(open_groups, key=lambda j: shares[j] - quotas[j])] += 1
    return quotas
