"""A prompt and its completion, both as they stand."""

from tsqlora.data.cells import text_at
from tsqlora.data.columns import Columns
from tsqlora.data.formats.example import Example, Manner
from tsqlora.data.rows import Rows


def read(rows: Rows, i: int, columns: Columns, manner: Manner) -> Example:
    """Nothing is put between them: a space that belongs there must be in one of the texts."""
    target = text_at(rows, i, columns.label) if manner.targets and columns.label is not None else None
    return Example(text_at(rows, i, columns.text), target)
