"""Labels as they stand in the rows -> class ids, or target numbers."""

import math
import re
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tsqlora.data.cells import is_missing, refuse_missing
from tsqlora.data.rows import Rows
from tsqlora.errors import DataError


@dataclass(frozen=True, slots=True)
class LabelMap:
    """The classes in the order of their ids: `names[id]` is the label as the data writes it."""

    names: tuple[str | int, ...]

    @classmethod
    def from_rows(cls, values: Iterable[str | int]) -> "LabelMap":
        """The classes among the training labels; text sorts as text, integers as numbers.

        Raises DataError for one class alone, for text beside integers, and for what is neither.

        >>> LabelMap.from_rows([10, 9, 10]).names
        (9, 10)
        >>> LabelMap.from_rows(["10", "9"]).names
        ('10', '9')
        """
        distinct = list(dict.fromkeys(_checked(value) for value in values))
        texts = [value for value in distinct if isinstance(value, str)]
        numbers = [value for value in distinct if isinstance(value, int)]
        if texts and numbers:
            raise DataError(f"labels mix text ({texts[0]!r}) and integers ({numbers[0]}); write all as one kind")
        if len(distinct) < 2:
            raise DataError(f"the training labels hold {_listed(distinct)} and no other class; at least two are needed")
        return cls((*sorted(texts), *sorted(numbers)))

    def id_of(self, value: str | int) -> int:
        """The id of a label; where classes are integers, their text is as good ("3" for 3).

        Raises DataError for a label that is no class.
        """
        name = _checked(value)
        if isinstance(name, str) and isinstance(self.names[0], int) and _is_integer(name):
            name = int(name)
        if name not in self.names:
            raise DataError(
                f"label {reprlib.repr(name)} is not among the training data's classes: {_listed(self.names)}"
            )
        return self.names.index(name)


def distinct_labels(parts: Iterable[Rows], column: str) -> tuple[list[str | int], np.ndarray]:
    """Each label once, in order of first appearance, and which one each row has.

    In a format without types (CSV), labels that are all integers are integers. Raises DataError with file and row for
    a label that is neither text nor an integer, and for text beside integers.
    """
    numbers: dict[str | int, int] = {}
    firsts: dict[type, str] = {}
    found: list[np.ndarray] = []
    typed = True
    for rows in parts:
        typed = rows.typed
        labels = [label_at(rows, i, column) for i in range(len(rows))]
        for i, label in enumerate(labels):
            if type(label) not in firsts:
                firsts[type(label)] = f"{rows.place(i)}: the label {label!r} in column '{column}'"
        found.append(np.array([numbers.setdefault(label, len(numbers)) for label in labels], dtype=np.int32))
    places = np.concatenate(found)
    _require_one_kind(list(numbers), places, firsts)
    return _typed(list(numbers), typed=typed), places


def _require_one_kind(labels: Sequence[str | int], places: np.ndarray, firsts: Mapping[type, str]) -> None:
    integers = int(np.array([isinstance(label, int) for label in labels])[places].sum())
    if not 0 < integers < len(places):
        return
    few = min(integers, len(places) - integers)
    kind, what, others = (int, "an integer", "text") if integers == few else (str, "text", "integers")
    raise DataError(
        f"{firsts[kind]} is {what}, as in {few} of {len(places)} rows, and the others are {others}; write all as one "
        "kind"
    )


def classes_of(values: Iterable[str | int], source: str, column: str) -> LabelMap:
    """`LabelMap.from_rows` of a file's labels; its errors say where."""
    try:
        return LabelMap.from_rows(values)
    except DataError as error:
        raise DataError(f"{source}, column '{column}': {error}") from None


def _typed(values: list[str | int], *, typed: bool) -> list[str | int]:
    if not typed and all(_is_integer(str(value)) for value in values):
        return [int(value) for value in values]
    return values


def encode_labels(rows: Rows, column: str, label_map: LabelMap) -> list[int]:
    """Every row's class id. Raises DataError with file and row for what is no label or no class."""
    refuse_missing(rows, column, "label")
    ids: dict[str | int, int] = {}
    for i in range(len(rows)):
        value = label_at(rows, i, column)
        if value not in ids:
            ids[value] = _id_at(rows, i, value, label_map)
    return [ids[row[column]] for row in rows.rows]


def encode_targets(rows: Rows, column: str) -> list[float]:
    """Every row's target for regression; text that spells a number counts as one.

    Raises DataError with file and row for a target that is missing or no finite number.
    """
    refuse_missing(rows, column, "label")
    return [_target_at(rows, i, column) for i in range(len(rows))]


def are_measures(names: Sequence[str | int]) -> bool:
    """Whether classes are written as numbers with decimals, which may be meant as numbers.

    >>> are_measures(("0.5", "1")), are_measures(("1.0", "2.0")), are_measures(("v1", "1.5"))
    (True, False, False)
    """
    try:
        numbers = [float(name) for name in names]
    except ValueError:
        return False
    return all(map(math.isfinite, numbers)) and not all(number.is_integer() for number in numbers)


def look_alikes(names: Iterable[str | int]) -> list[tuple[str, ...]]:
    """Classes that are one but for case and space around them.

    >>> look_alikes(("news", "sport", "Sport", "sport "))
    [('sport', 'Sport', 'sport ')]
    """
    alike: dict[str, list[str]] = {}
    for name in names:
        if isinstance(name, str):
            alike.setdefault(" ".join(name.split()).casefold(), []).append(name)
    return [tuple(group) for group in alike.values() if len(group) > 1]


def label_at(rows: Rows, i: int, column: str) -> str | int:
    """One row's label.  Raises DataError with file and row for what can be none."""
    value = rows.rows[i].get(column)
    wrong = _what_is_wrong(value)
    if wrong is not None:
        what, cure = wrong
        raise DataError(f"{rows.place(i)}: {what} in column '{column}'; {cure}")
    return value  # pyright: ignore[reportReturnType]


def _id_at(rows: Rows, i: int, value: str | int, label_map: LabelMap) -> int:
    try:
        return label_map.id_of(value)
    except DataError as exc:
        raise DataError(f"{rows.place(i)}: {exc}; correct it, or add the class to the training data") from exc


def _target_at(rows: Rows, i: int, column: str) -> float:
    value = rows.rows[i][column]
    try:
        target = math.nan if isinstance(value, bool) else float(value)  # pyright: ignore[reportArgumentType]
    except (TypeError, ValueError, OverflowError):
        target = math.nan
    if not math.isfinite(target):
        raise DataError(
            f"{rows.place(i)}: label {reprlib.repr(value)} in column '{column}' is no finite number; "
            f"correct it, or set task.type to sequence-classification"
        )
    return target


def _checked(value: Any) -> str | int:
    wrong = _what_is_wrong(value)
    if wrong is not None:
        raise DataError("{}; {}".format(*wrong))
    return value


def _what_is_wrong(value: Any) -> tuple[str, str] | None:
    """What a value that cannot be a class label is, and the cure; None for one that can."""
    if is_missing(value):
        return "no label", "fill it in or leave the row out"
    if isinstance(value, bool):
        return f"the boolean label {value}", "write 0 and 1, or names"
    if isinstance(value, (list, tuple, set)):
        return f"the list {reprlib.repr(value)} as a label", "multi-label classification is not built"
    if not isinstance(value, (str, int)):
        shown = f"the {type(value).__name__} label {reprlib.repr(value)}"
        return shown, "write classes as text or integers, or set task.type to regression"
    return None


def _is_integer(text: str) -> bool:
    """Whether the text is just how an integer is written: no plus, no leading zero."""
    return re.fullmatch(r"0|-?[1-9][0-9]{0,17}", text) is not None


def _listed(names: Sequence[str | int]) -> str:
    shown = ", ".join(reprlib.repr(name) for name in names[:8])
    return f"{shown} and {len(names) - 8} more" if len(names) > 8 else shown
