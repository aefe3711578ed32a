"""Cells that hold nothing, told all at once: whoever cleans a file wants to know how many there are."""

import math
from typing import Any

from tsqlora.data.rows import Rows
from tsqlora.errors import DataError

_SHOWN = 5


def is_missing(value: Any) -> bool:
    """Whether a cell holds nothing: null, NaN, or text of spaces alone."""
    blank = isinstance(value, str) and not value.strip()
    return value is None or blank or (isinstance(value, float) and math.isnan(value))


def refuse_missing(rows: Rows, column: str, what: str) -> None:
    """Raises DataError with the place of the first row that has nothing in the column, and how many have."""
    missing = [i for i, row in enumerate(rows.rows) if is_missing(row.get(column))]
    if len(missing) == 1:
        raise DataError(f"{rows.place(missing[0])}: no {what} in column '{column}'; fill it in or leave the row out")
    if missing:
        numbers = ", ".join(str(rows.numbers[i]) for i in missing[1 : _SHOWN + 1])
        more = ", …" if len(missing) > _SHOWN + 1 else ""
        raise DataError(
            f"{rows.place(missing[0])}: no {what} in column '{column}', nor in {len(missing) - 1} more rows "
            f"({numbers}{more}); fill them in or leave the rows out"
        )
