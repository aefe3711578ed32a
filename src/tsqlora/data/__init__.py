"""Files and hub ids -> rows -> tokenised samples.

    rows.py          a file, a directory or a hub id -> its rows in chunks, every row with its line number
    readers.py  dialect.py           how each file format is read; how a text file is written: encoding, delimiter
    whole_rows.py    the rows that lack nothing, and a note of the others
    cells.py         what a row's cells hold: nothing, text; the hash that names a row
    columns.py  labels.py            which columns hold text and label; labels -> class ids or target numbers
    formats/         the row formats of generation: which one a file has, how a row becomes prompt and target or a chat
    splits.py        files -> the places of each split's rows, the columns and the classes
    tokenise.py      rows with one answer -> samples
    generation.py  target_tokens.py  rows of texts -> samples of which only targets are trained on
    prepare.py  samples.py           splits -> samples in an Arrow file, the only place where rows become a data set
    trusted.py       trusted rows against those that measure, and against training rows that repeat them
    batches.py       the order of samples, and padded or packed batches of them
    write.py         rows -> a file; some rows of a file as they stand

Nothing is re-exported: reading rows must not wait for the import of a tokenizer.
"""
