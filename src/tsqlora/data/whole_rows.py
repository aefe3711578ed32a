"""The rows of a source that lack nothing, and a note of those that do."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from tsqlora.data.cells import MissingError, lacking
from tsqlora.data.columns import Columns
from tsqlora.data.formats import Format
from tsqlora.data.formats.example import Manner
from tsqlora.data.rows import Rows, Source
from tsqlora.errors import DataError

_SHOWN = 5
"""Rows that a note names for each reason."""


@dataclass(frozen=True, slots=True)
class Whole:
    """The places of the rows that lack nothing, and what to say of the others; None where there are none."""

    places: np.ndarray
    note: str | None


def whole_rows(source: Source, columns: Columns, format: Format | None, *, most: float) -> Whole:
    """The rows that have a text and a label (a prompt and a target); the others may be a share of at most `most`.

    Raises DataError where they are more.
    """
    lacks, count = lacks_of(columns, format), 0
    bad, places = dict[str, list[int]](), list[np.ndarray]()
    for rows in source.chunks():
        reasons = [lacks(rows, i) for i in range(len(rows))]
        for i, reason in enumerate(reasons):
            if reason is not None:
                bad.setdefault(reason, []).append(rows.numbers[i])
        places.append(rows.ids[[reason is None for reason in reasons]])
        count += len(rows)
    whole = np.concatenate(places)
    if (left_out := count - len(whole)) == 0:
        return Whole(whole, None)
    if left_out > most * count:
        raise DataError(
            f"{source.name}: {left_out:,} of {count:,} rows lack something, more than "
            f"data.max_bad_rows ({most:g}) leaves out: {listed(bad, source.name)}; fill them in, or raise it"
        )
    return Whole(whole, f"{source.name}: {left_out:,} of {count:,} rows are left out: {listed(bad, source.name)}")


def listed(bad: Mapping[str, list[int]], source: str) -> str:
    """Each reason with its count and the numbers of the first rows.

    >>> listed({"no text in column 'text'": [4, 9], "no label in column 'label'": [7]}, "a.csv")
    "2 with no text in column 'text' (lines 4, 9), 1 with no label in column 'label' (line 7)"
    """
    unit, parts = "row" if source.endswith((".parquet", ".json", "]")) else "line", []
    for reason, numbers in bad.items():
        shown = ", ".join(map(str, numbers[:_SHOWN])) + (", …" if len(numbers) > _SHOWN else "")
        parts.append(f"{len(numbers):,} with {reason} ({unit}{'s' if len(numbers) > 1 else ''} {shown})")
    return ", ".join(parts)


def lacks_of(columns: Columns, format: Format | None, *, answers: bool = True) -> Callable[[Rows, int], str | None]:
    """What row i lacks, as a function of rows and i; with `answers` also a label or a target. None is nothing."""
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
        except DataError:  # said where rows become samples, by the model's own manner
            pass
        return None

    return lacks
