"""Labels as rows write them, encoded as class ids, sets of labels, tags, or target numbers."""

import ast
import math
import re
import reprlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from unicodedata import normalize

import numpy as np

from tsqlora.errors import DataError
from tsqlora.rows.rows import Columns, MissingError, Row, find_columns, is_missing, is_one, names_of, one_hot_columns

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
    """The labels of a cell: a list, also as pandas or JSON writes it into a table, or text joined by "|".

    >>> split_labels("joy | love"), split_labels(["joy"]), split_labels(3), split_labels("[0, 3]")
    (['joy', 'love'], ['joy'], [3], [0, 3])
    """
    if not isinstance(cell, str):
        return cell if isinstance(cell, list) else [cell]
    if not re.fullmatch(r"\s*\[.*\]\s*", cell, re.DOTALL):
        return [part.strip() for part in cell.split(SEPARATOR) if part.strip()]
    try:
        # numpy writes no commas, and Python joins two texts that have none between them.
        return [[cell]] if re.search(r"""['"]\s+['"]""", cell) else list(ast.literal_eval(cell.strip()))
    except (ValueError, SyntaxError):
        return [[cell]]  # refused like any label that is no text


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
    "write a list of one text or integer for each token, in JSON lines or Parquet",
    by_token=True,
)
KINDS = {kind.name: kind for kind in (CLASS, SET, TAGS)}


def several_of(rows: Sequence[Mapping[str, Any]], **named: str | None) -> LabelKind | None:
    """Whether a file's first rows have tags, or sets of labels; None for other rows. `named` are columns of settings.

    Tags are lists as long as those of tokens. Sets are lists, text joined by "|" of which a part stands in another
    cell, too, and columns of zeros and ones where some row has not exactly one 1.

    >>> several_of([{"words": ["a"], "ner_tags": [0]}]).name, several_of([{"text": "a", "labels": "[0, 3]"}]).name
    ('tags', 'labels')
    """
    names = names_of(rows)

    def columns(tokens: bool) -> Columns:
        try:
            return find_columns(names, source="", tokens=tokens, **named)
        except DataError:
            return Columns("", None, None)

    words, used = columns(True), columns(False)
    pairs = ((row.get(words.text), row.get(words.label or "")) for row in rows)
    both = [[split_labels(cell) if str(cell).startswith("[") else cell for cell in pair] for pair in pairs]
    if rows and all(isinstance(a, list) and isinstance(b, list) and len(a) == len(b) for a, b in both):
        return TAGS
    if used.label is None:
        flags = one_hot_columns(rows, used, names) if used.text else []
        return SET if flags and any(sum(is_one(row.get(name)) is True for name in flags) != 1 for row in rows) else None
    cells = [cell for row in rows if not is_missing(cell := row.get(used.label))]
    parts = [{*map(str, split_labels(cell))} for cell in {str(cell): cell for cell in cells}.values()]
    times = Counter(label for labels in parts for label in labels)
    joined = any(len(labels) > 1 and max(times[label] for label in labels) > 1 for labels in parts)
    return SET if joined or any(isinstance(cell, list) for cell in cells) else None


@dataclass(frozen=True, slots=True)
class LabelMap:
    """The classes in the order of their ids: `names[id]` is the label as the data writes it."""

    names: tuple[str | int, ...]
    kind: LabelKind = CLASS
    strict: bool = True
    """Refuse a label that is not a class; else it gets the id UNSEEN."""
    spellings: Mapping[str | int, int] = field(default_factory=dict, compare=False)
    """Other spellings of the classes in the training rows, which are read as these, and how often each is written."""


def distinct_labels(
    rows: Iterable[Row], column: str, kind: LabelKind = CLASS, *, typed: bool = True, apart: bool = False
) -> tuple[list[str | int], np.ndarray, dict[str | int, int]]:
    """The distinct labels in order of first appearance, and the number of each row's class; all 0 for several labels.

    Spellings that differ in case, white space or Unicode form alone are one label, the most frequent of them, unless
    they are to stay `apart`; the others are returned with their counts. In a format that is not `typed` (CSV), labels
    that are all integers become integers. Raises DataError with file and row for a label that is neither text nor an
    integer, and for text beside integers.
    """
    written, counts = dict[str | int, int](), Counter[str | int]()

    def number_of(row: Row) -> int:
        for label in (labels := labels_at(row, column, kind)):
            if type(label) is not type(next(iter(written), label)):
                raise DataError(
                    f"{row.place}: the label {label!r} in column '{column}' is {type(label).__name__}, "
                    "unlike earlier labels; write all as text or all as integers"
                )
            written.setdefault(label, len(written))
            counts[label] += 1
        return written[labels[0]] if kind.single else 0

    groups, common = np.fromiter(map(number_of, rows), dtype=np.int32), dict[str | int, str | int]()
    for alike in [] if apart else look_alikes(written):
        # Of two that are as frequent, the one without needless blanks.
        best = max(alike, key=lambda name: (counts[name], name == " ".join(normalize("NFC", str(name)).split())))
        common |= dict.fromkeys(alike, best)
    read = [common.get(label, label) for label in written]
    numbers = [number for label in read if (number := _integer(str(label))) is not None]
    if not typed and len(numbers) == len(read):
        read = [*numbers]  # "1" is "1.0"
    values = {label: place for place, label in enumerate(dict.fromkeys(read))}
    spellings = {label: counts[label] for label, best in common.items() if label != best}
    return list(values), np.array([values[label] for label in read], dtype=np.int32)[groups], spellings


def class_finder(names: Iterable[str | int]) -> Callable[[str | int], str | int | None]:
    """Return a function that finds the class of a label: itself, or the only one that it is another spelling of.

    The text of a number counts as the number, also as pandas writes it.

    >>> find = class_finder(("Pos", "neg"))
    >>> find("neg"), find(" pos"), find("posit"), class_finder((0, 3))("3.0")
    ('neg', 'Pos', None, 3)
    """
    own = {str(name): name for name in names}
    alike = _by_spelling(own.values())

    def find(label: str | int) -> str | int | None:
        text = str(label)
        if text in own:
            return own[text]
        if type(number := own.get(str(_integer(text)))) is int:
            return number
        spelled = alike.get(_folded(text), [])
        return spelled[0] if len(spelled) == 1 else None

    return find


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

    A label may have another spelling than its class (`class_finder`). Raises DataError with file and row for an invalid
    label and for a label that is not a class, where the map is strict.
    """
    numbers = {name: number for number, name in enumerate(label_map.names)}
    find, encoded = class_finder(label_map.names), list[Any]()
    for row in rows:
        ids = list[int]()
        for label in labels_at(row, column, label_map.kind):
            name = find(label)
            if name is None and label_map.strict:
                raise DataError(
                    f"{row.place}: label {reprlib.repr(label)} is not among the training data's classes: "
                    f"{_listed(label_map.names)}; correct it, or add the class to the training data"
                )
            ids.append(UNSEEN if name is None else numbers[name])
        encoded.append(label_map.kind.encoded(ids, len(numbers)))
    return encoded


def encode_targets(rows: Iterable[Row], column: str) -> list[float]:
    """Regression targets of all rows; text that spells a number counts as one.

    Raises DataError with file and rows for targets that are missing or not finite numbers.
    """
    targets, bad = list[float](), list[Row]()
    for row in rows:
        value = row.cells.get(column)
        try:
            target = math.nan if isinstance(value, bool) else float(value)  # pyright: ignore[reportArgumentType]
        except (TypeError, ValueError, OverflowError):
            target = math.nan
        targets.append(target)
        if not math.isfinite(target):
            bad.append(row)
    if bad:
        value = bad[0].cells.get(column)
        cure = "correct it, empty the cell to leave the row out, or set task.type to sequence-classification"
        if isinstance(value, str) and looks_missing(value):
            cure = "empty the cells of rows without a number"
        elif isinstance(value, str) and _number(value) is not None:
            cure = f"decimals need a dot, so write {value.replace(',', '.')}"
        more = f", nor in {len(bad) - 1:,} more rows: {_listed([row.number for row in bad[1:]])}" if bad[1:] else ""
        raise DataError(
            f"{bad[0].place}: label {reprlib.repr(value)} in column '{column}' is not a finite number{more}; {cure}"
        )
    return targets


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


def look_alikes(names: Iterable[str | int]) -> list[tuple[str | int, ...]]:
    """Groups of classes that differ in case, white space and Unicode form alone.

    >>> look_alikes(("news", "sport", "Sport", "sport "))
    [('sport', 'Sport', 'sport ')]
    """
    return [tuple(group) for group in _by_spelling(names).values() if len(group) > 1]


def _by_spelling(names: Iterable[str | int]) -> dict[str, list[str | int]]:
    alike: dict[str, list[str | int]] = {}
    for name in names:
        alike.setdefault(_folded(name), []).append(name)
    return alike


def _folded(name: str | int) -> str:
    """What all spellings of a label share."""
    return " ".join(normalize("NFKC", str(name)).split()).casefold()


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


def _integer(text: str) -> int | None:
    """The integer in its canonical form, or with a zero behind the point: no plus, no leading zero."""
    return int(text.partition(".")[0]) if re.fullmatch(r"(0|-?[1-9][0-9]{0,17})(\.0+)?", text) else None


def _listed(names: Sequence[str | int]) -> str:
    shown = ", ".join(reprlib.repr(name) for name in names[:8])
    return f"{shown} and {len(names) - 8} more" if len(names) > 8 else shown
