"""A document and its summary."""

from tsqlora.data.cells import text_at
from tsqlora.data.columns import Columns
from tsqlora.data.formats.example import Example, Manner
from tsqlora.data.rows import Rows

# Radford et al. (2019), GPT-2: what makes a language model summarise.
ASK = "\n\nTL;DR:"


def read(rows: Rows, i: int, columns: Columns, manner: Manner) -> Example:
    """The document and "TL;DR:", then the summary; a sequence-to-sequence model reads the document alone.

    The space between them is the summary's: most tokenizers know words with the space before them.
    """
    document = text_at(rows, i, columns.text)
    summary = text_at(rows, i, columns.label) if manner.targets and columns.label is not None else None
    if manner.seq2seq:
        return Example(document, summary)
    return Example(document + ASK, None if summary is None else f" {summary}")
