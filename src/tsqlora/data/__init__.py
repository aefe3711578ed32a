"""Read files and hub data sets, and tokenise their rows.

    rows.py          a file, a directory or a hub id: its rows in chunks, each with its line number
    readers.py  dialect.py           file formats; encoding and delimiter of a text file
    cells.py         missing values, texts, and the hash that identifies a row
    columns.py  labels.py            the columns of text and label; labels as class ids or numbers
    formats/         row formats of generation: detect one, read a row as prompt and target or as a chat
    splits.py        the complete rows of each split, columns and classes
    tokenise.py      rows with one answer: samples
    generation.py  target_tokens.py  rows of texts: samples with loss on targets alone
    prepare.py  samples.py           splits: samples in an Arrow file; trusted rows apart from those that measure
    batches.py       the order of samples, and padded or packed batches
    write.py  copies.py              write rows; copy rows of a file as they stand

Nothing is re-exported: reading rows must not import a tokenizer.
"""
