"""Plain text, all of which is to be written."""

from tsqlora.data.cells import text_at
from tsqlora.data.columns import Columns
from tsqlora.data.formats.example import Example, Manner
from tsqlora.data.rows import Rows
from tsqlora.errors import UnsupportedError


def read(rows: Rows, i: int, columns: Columns, manner: Manner) -> Example:
    """No prompt; where targets are not read the text is one to go on from."""
    if manner.seq2seq:
        raise UnsupportedError(
            f"{rows.source}: plain text in column '{columns.text}' has no target for a sequence-to-sequence model; "
            "name both columns: data.prompt and data.target"
        )
    text = text_at(rows, i, columns.text)
    return Example("", text) if manner.targets else Example(text, None)
