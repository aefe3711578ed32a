"""Labels as rows write them, encoded as class ids, sets of labels, tags, or target numbers."""

import math
import re
import reprlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any
from unicodedata import normalize

import numpy as np

from tsqlora.data.rows import MissingError, Row, is_missing
from tsqlora.errors import DataError

SEPARATOR = "|"
"""Between the labels of a cell of text."""
UNSEEN = -1
"""The id of a label that is not a class."""
NEARLY_ALL = 0.9
"""Share of the classes that are written as numbers where the column holds measurements."""
OUTSIDE = "O"
"""The tag of a token outside of every entity."""


def join_labels(cell: Any) -> Any:
    """The inverse of `split_labels`, as text, None as ""; a cell that is no list of labels stays as it is.

    >>> join_labels(["joy", "love"]), join_labels([0.9, None]), join_labels(3)
    ('joy|love', '0.9|', 3)
    """
    plain = isinstance(cell, list) and all(part is None or isinstance(part, str | int | float) for part in cell)
    return SEPARATOR.join("" if part is None else str(part) for part in cell) if plain else cell


def require_separable(names: Iterable[str | int], *, cure: str) -> None:
    """Raise DataError for a class that a cell with several labels would split."""
    for name in names:
        if SEPARATOR in str(name):
            raise DataError(
                f"the class '{name}' holds '{SEPARATOR}', which stands between the labels of a cell of CSV or TSV; "
                f"{cure}"
            )


@dataclass(frozen=True, slots=True)
class LabelKind:
    """What a cell holds of the classes: one of them, a set of them, or one for each token of the row."""

    name: str
    parts: Callable[[Any], list[Any]]
    """The labels of a cell."""
    encoded: Callable[[list[int], int], Any]
    """A row's class ids, of that many classes, as the label of its sample."""
    cure: str
    """What to write in place of a cell that holds no label."""
    single: bool = False
    """A row has exactly one class, so that splits and draws are stratified and a fit judges it."""
    joint: bool = False
    """A row's labels are one set, which may be empty, and is shown whole."""
    by_token: bool = False
    """A row has a label for each of its tokens."""

    def present(self, labels: Sequence[np.ndarray]) -> int:
        """How many classes some encoded labels have."""
        if self.joint:
            return int((np.concatenate(labels) > 0.5).any(axis=0).sum())
        return len({label for part in labels for label in part.flatten().tolist() if label >= 0})


def split_labels(cell: Any) -> list[Any]:
    """The labels of a cell.

    >>> split_labels("joy | love"), split_labels(["joy"]), split_labels(3)
    (['joy', 'love'], ['joy'], [3])
    """
    if isinstance(cell, str):
        # A list that pandas wrote as text is refused like any label that is no text.
        written = re.fullmatch(r"""\[\s*['"].*\]\s*""", cell)
        return [[cell]] if written else [part.strip() for part in cell.split(SEPARATOR) if part.strip()]
    return cell if isinstance(cell, list) else [cell]


CLASS = LabelKind(
    "class",
    lambda cell: [cell],
    lambda ids, count: ids[0],
    "write classes as text or integers; for numbers set task.type to regression, for lists to "
    "multi-label-classification",
    single=True,
)
SET = LabelKind(
    "labels",
    split_labels,
    lambda ids, count: [float(k in ids) for k in range(count)],
    'write labels as a list of texts or integers, or as text joined by "|"',
    joint=True,
)
TAGS = LabelKind(
    "tags",
    lambda cell: cell if isinstance(cell, list) else [[cell]],  # refused like any label that is no text
    lambda ids, count: ids,
    "write a list of one text or integer for each token",
    by_token=True,
)
KINDS = {kind.name: kind for kind in (CLASS, SET, TAGS)}


@dataclass(frozen=True, slots=True)
class LabelMap:
    """The classes in the order of their ids: `names[id]` is the label as the data writes it."""

    names: tuple[str | int, ...]
    kind: LabelKind = CLASS
    strict: bool = True
    """Refuse a label that is not a class; else it gets the id UNSEEN."""


def distinct_labels(
    rows: Iterable[Row], column: str, kind: LabelKind = CLASS, *, typed: bool = True
) -> tuple[list[str | int], np.ndarray]:
    """The distinct labels in order of first appearance, and the number of each row's class; all 0 for several labels.

    In a format that is not `typed` (CSV), labels that are all integers become integers. Raises DataError with file and
    row for a label that is neither text nor an integer, and for text beside integers.
    """
    numbers: dict[str | int, int] = {}

    def number_of(row: Row) -> int:
        for label in (labels := labels_at(row, column, kind)):
            if type(label) is not type(next(iter(numbers), label)):
                raise DataError(
                    f"{row.place}: the label {label!r} in column '{column}' is {type(label).__name__}, "
                    "unlike earlier labels; write all as text or all as integers"
                )
            numbers.setdefault(label, len(numbers))
        return numbers[labels[0]] if kind.single else 0

    groups = np.fromiter(map(number_of, rows), dtype=np.int32)
    if typed or not all(_is_integer(str(value)) for value in numbers):
        return list(numbers), groups
    values = dict[int, int]()  # "1" is "1.0"
    places = [values.setdefault(_integer(str(value)), len(values)) for value in numbers]
    return list(values), np.array(places, dtype=np.int32)[groups]


def classes_of(labels: Iterable[str | int], source: str, column: str, kind: LabelKind = CLASS) -> LabelMap:
    """Sort distinct training labels into classes: text as text, integers as numbers.

    >>> classes_of([10, 9], "a.csv", "label").names, classes_of(["10", "9"], "a.csv", "label").names
    ((9, 10), ('10', '9'))
    """
    names = tuple(sorted(labels))
    if len(names) < 2:
        raise DataError(f"{source}, column '{column}': {_listed(names)} is the only class; give rows of at least two")
    return LabelMap(names, kind)


def encode_labels(rows: Iterable[Row], column: str, label_map: LabelMap) -> list[Any]:
    """The class id of each row; for several labels a list of a 0.0 or 1.0 for each class; for tags a list of ids.

    If classes are integers, their text counts too ("3" for 3). Raises DataError with file and row for an invalid label
    and for a label that is not a class, where the map is strict.
    """
    numbers = {name: number for number, name in enumerate(label_map.names)}
    integers, encoded = isinstance(label_map.names[0], int), list[Any]()
    for row in rows:
        ids = list[int]()
        for label in labels_at(row, column, label_map.kind):
            label = _integer(label) if integers and isinstance(label, str) and _is_integer(label) else label
            if label not in numbers and label_map.strict:
                raise DataError(
                    f"{row.place}: label {reprlib.repr(label)} is not among the training data's classes: "
                    f"{_listed(label_map.names)}; correct it, or add the class to the training data"
                )
            ids.append(numbers.get(label, UNSEEN))
        encoded.append(label_map.kind.encoded(ids, len(numbers)))
    return encoded


def encode_targets(rows: Iterable[Row], column: str) -> list[float]:
    """Regression targets of all rows; text that spells a number counts as one.

    Raises DataError with file and row for a target that is missing or not a finite number.
    """
    targets = list[float]()
    for row in rows:
        value = row.cells.get(column)
        try:
            target = math.nan if isinstance(value, bool) else float(value)  # pyright: ignore[reportArgumentType]
        except (TypeError, ValueError, OverflowError):
            target = math.nan
        if not math.isfinite(target):
            raise DataError(
                f"{row.place}: label {reprlib.repr(value)} in column '{column}' is not a finite number; {_cure(value)}"
            )
        targets.append(target)
    return targets


def _cure(value: Any) -> str:
    """What to do about a value that is no target."""
    if isinstance(value, str) and looks_missing(value):
        return "empty the cells of rows without a number"
    if isinstance(value, str) and _number(value) is not None:
        return f"decimals need a dot, so write {value.replace(',', '.')}"
    return "correct it, or set task.type to sequence-classification"


def are_measures(names: Sequence[str | int]) -> bool:
    """Whether nearly all classes are written as numbers, some with decimals, and may be meant for regression.

    >>> are_measures(("0.5", "1")), are_measures(("1,5", "2")), are_measures(("1.0", "2")), are_measures(("v", "1.5"))
    (True, True, False, False)
    """
    return mostly_numbers(names) and not all((_number(name) or 0.0).is_integer() for name in names)


def mostly_numbers(names: Sequence[str | int]) -> bool:
    """Whether nine of ten classes are written as numbers.

    >>> mostly_numbers((1, "2,5")), mostly_numbers(("v1", "1.5"))
    (True, False)
    """
    return sum(_number(name) is not None for name in names) >= NEARLY_ALL * len(names)


def _number(name: str | int) -> float | None:
    """The number that a class is written as, with a decimal point or comma."""
    try:
        number = float(str(name).replace(",", "."))
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def looks_missing(name: str | int) -> bool:
    """Whether a class is written as what others write for no label.

    >>> looks_missing("N/A"), looks_missing("no")
    (True, False)
    """
    return str(name).strip().lower() in ("n/a", "na", "null", "none", "nan")


def are_numbers(classes: Sequence[str | int] | None) -> bool:
    """Whether labels are read as numbers where a data set has names for them: of targets, and of a run's integers.

    >>> are_numbers(None), are_numbers((0, 1)), are_numbers(("bad", "good"))
    (True, True, False)
    """
    return classes is None or isinstance(next(iter(classes), None), int)


def look_alikes(names: Iterable[str | int]) -> list[tuple[str, ...]]:
    """Groups of classes that differ in case, white space and Unicode form alone.

    >>> look_alikes(("news", "sport", "Sport", "sport "))
    [('sport', 'Sport', 'sport ')]
    """
    alike: dict[str, list[str]] = {}
    for name in names:
        if isinstance(name, str):
            alike.setdefault(" ".join(normalize("NFKC", name).split()).casefold(), []).append(name)
    return [tuple(group) for group in alike.values() if len(group) > 1]


def labels_at(row: Row, column: str, kind: LabelKind) -> list[str | int]:
    """The label of a row; or its labels: a list, which may be empty, or text joined by "|"; or the list of its tags.

    Raises DataError with file and row for a value that cannot be a label.
    """
    value = row.cells.get(column)
    if is_missing(value):
        raise MissingError(row.place, f"no label in column '{column}'")
    values = [plain_label(label) for label in kind.parts(value)]
    for label in values:
        if not isinstance(label, str | int):
            raise DataError(
                f"{row.place}: column '{column}' holds the {type(label).__name__} {reprlib.repr(label)} as a "
                f"label; {kind.cure}"
            )
        if kind.joint and is_missing(label):
            raise DataError(f"{row.place}: column '{column}' holds an empty label; remove it")
    return values


def plain_label(label: Any) -> Any:
    """True and False as text, as in CSV files, and whole numbers as integers, since a gap makes pandas write 1.0.

    >>> plain_label(True), plain_label(1.0), plain_label(0.5), plain_label("a")
    ('True', 1, 0.5, 'a')
    """
    if isinstance(label, bool):
        return str(label)
    return int(label) if isinstance(label, float) and label.is_integer() else label


def _is_integer(text: str) -> bool:
    # The canonical form alone, or that with a zero behind the point: no plus, no leading zero.
    return re.fullmatch(r"(0|-?[1-9][0-9]{0,17})(\.0+)?", text) is not None


def _integer(text: str) -> int:
    return int(text.partition(".")[0])


def _listed(names: Sequence[str | int]) -> str:
    shown = ", ".join(reprlib.repr(name) for name in names[:8])
    return f"{shown} and {len(names) - 8} more" if len(names) > 8 else shown
