"""Labels as they stand in the rows -> class ids, or target numbers."""

import math
import re
import reprlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from tsqlora.data.cells import MissingError, is_missing
from tsqlora.data.rows import Rows
from tsqlora.errors import DataError


@dataclass(frozen=True, slots=True)
class LabelMap:
    """The classes in the order of their ids: `names[id]` is the label as the data writes it."""

    names: tuple[str | int, ...]


def distinct_labels(parts: Iterable[Rows], column: str) -> tuple[list[str | int], np.ndarray]:
    """Each label once, in order of first appearance, and which one each row has.

    In a format without types (CSV), labels that are all integers are integers. Raises DataError with file and row for
    a label that is neither text nor an integer, and for text beside integers.
    """
    numbers: dict[str | int, int] = {}
    kinds = set[type]()
    found: list[np.ndarray] = []
    typed = True
    for rows in parts:
        typed = rows.typed
        labels = [label_at(rows, i, column) for i in range(len(rows))]
        for i, label in enumerate(labels):
            kinds.add(type(label))
            if len(kinds) > 1:
                raise DataError(
                    f"{rows.place(i)}: the label {label!r} in column '{column}' is {type(label).__name__}, "
                    "unlike those before; write all as text or all as integers"
                )
        found.append(np.array([numbers.setdefault(label, len(numbers)) for label in labels], dtype=np.int32))
    integers = not typed and all(_is_integer(str(value)) for value in numbers)
    return [int(value) if integers else value for value in numbers], np.concatenate(found)


def classes_of(labels: Iterable[str | int], source: str, column: str) -> LabelMap:
    """The classes among training labels of one kind; text sorts as text, integers as numbers.

    >>> classes_of([10, 9], "a.csv", "label").names, classes_of(["10", "9"], "a.csv", "label").names
    ((9, 10), ('10', '9'))
    """
    names = tuple(sorted(labels))
    if len(names) < 2:
        raise DataError(f"{source}, column '{column}': {_listed(names)} is the only class; at least two are needed")
    return LabelMap(names)


def encode_labels(rows: Rows, column: str, label_map: LabelMap) -> list[int]:
    """Every row's class id; where classes are integers, their text is as good ("3" for 3).

    Raises DataError with file and row for what is no label or no class.
    """
    ids = {name: number for number, name in enumerate(label_map.names)}
    integers, found = isinstance(label_map.names[0], int), list[int]()
    for i in range(len(rows)):
        label = label_at(rows, i, column)
        if integers and isinstance(label, str) and _is_integer(label):
            label = int(label)
        if label not in ids:
            raise DataError(
                f"{rows.place(i)}: label {reprlib.repr(label)} is not among the training data's classes: "
                f"{_listed(label_map.names)}; correct it, or add the class to the training data"
            )
        found.append(ids[label])
    return found


def encode_targets(rows: Rows, column: str) -> list[float]:
    """Every row's target for regression; text that spells a number counts as one.

    Raises DataError with file and row for a target that is missing or no finite number.
    """
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
    if is_missing(value):
        raise MissingError(rows.place(i), f"no label in column '{column}'")
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise DataError(
            f"{rows.place(i)}: the {type(value).__name__} {reprlib.repr(value)} as a label in column '{column}'; "
            "write classes as text or integers, or set task.type to regression for numbers"
        )
    return value


def _target_at(rows: Rows, i: int, column: str) -> float:
    value = rows.rows[i].get(column)
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


def _is_integer(text: str) -> bool:
    """Whether the text is just how an integer is written: no plus, no leading zero."""
    return re.fullmatch(r"0|-?[1-9][0-9]{0,17}", text) is not None


def _listed(names: Sequence[str | int]) -> str:
    shown = ", ".join(reprlib.repr(name) for name in names[:8])
    return f"{shown} and {len(names) - 8} more" if len(names) > 8 else shown
