"""Markdown tables, and the numbers in them."""

from collections.abc import Iterable, Mapping
from typing import Any

import pandas as pd

NONE = "–"


def markdown(rows: pd.DataFrame | Iterable[Mapping[str, Any]]) -> str:
    """A table of these rows; the columns are those of the first.

    Not `DataFrame.to_markdown`: that pads cells to the widest, so that one new row changes every line of a diff.
    """
    frame = rows if isinstance(rows, pd.DataFrame) else pd.DataFrame(rows)
    head, *lines = [
        f"| {' | '.join(line)} |\n" for line in [list(frame.columns), *frame.fillna(NONE).astype(str).values.tolist()]
    ]
    return "".join([head, f"|{'---|' * len(frame.columns)}\n", *lines])
