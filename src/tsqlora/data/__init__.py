"""Files and hub ids -> rows -> tokenised samples.

    rows.py      a file, a directory or a hub id -> Rows, every row with its line number
    jsonl.py  tables.py  utf8.py     how each format is read
    columns.py   which columns hold the text, its pair and the label
    labels.py    labels -> class ids or target numbers
    split.py     a seeded validation split
    tokenise.py  rows -> the samples that a Trainer takes
    formats/     the row formats of generation, one file each; which one a file has
    pieces.py  runs.py       what a row says -> text in pieces -> tokens that meet where the pieces do
    generation.py  collate.py  rows -> samples of which only targets are trained on -> batches
    batches.py   orders in which batches hold samples of like length

Nothing is re-exported: reading rows must not wait for the import of a tokenizer.
"""
