"""Rows for tests: those of a file, and of a file that does not exist."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tsqlora.rows.readers import SNIFF, Hints
from tsqlora.rows.rows import Row
from tsqlora.rows.sources import open_table
from tsqlora.rows.table import Table, samples_of, table_of
from tsqlora.tasks import Task, get_task

TASK_OF = {
    "class": "sequence-classification",
    "labels": "multi-label-classification",
    "tags": "token-classification",
    "number": "regression",
    "text": "causal-lm",
    "pair": "preference",
}


def task_for(answer: str) -> Task:
    """The task whose rows have such an answer."""
    return get_task(TASK_OF[answer])


def read_as(answer: str) -> dict[str, Any]:
    """Arguments of `read_data`."""
    reading = task_for(answer).reading
    return {"find": reading.find, "label": reading.label, "holds_out": reading.why_even is None}


def cells_of(source: str | Path, *, split: str | None = None, hints: Hints = SNIFF) -> tuple[dict[str, Any], ...]:
    """The cells of every row of a file, or of one split of a directory or hub data set."""
    return tuple(row.cells for row in open_table(source, split=split, hints=hints))


def rows_of(*cells: dict[str, Any], first: int = 7) -> list[Row]:
    """The rows of a file that does not exist; `first` is the line of the first one."""
    return [Row(row, "train.jsonl", first + j, j) for j, row in enumerate(cells)]


def table_with(samples: Sequence[dict[str, Any]]) -> Table:
    """A table whose rows were tokenised into these samples."""
    table = table_of("train.jsonl", ((j + 1, {"text": "a", "label": 0}) for j in range(len(samples))))
    return replace(table, samples=samples_of(samples, ("h",) * len(samples), 0, table.ids))


def names_of(rows: Sequence[Row]) -> tuple[str, ...]:
    """Every column that some row has, in order of first appearance."""
    return tuple(dict.fromkeys(name for row in rows for name in row.cells))
