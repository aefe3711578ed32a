"""Use a finished run: metrics on a labelled file, predictions or generated texts on any file."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from tsqlora.data.labels import require_separable
from tsqlora.data.readers import TABLES
from tsqlora.data.sources import open_table
from tsqlora.data.splits import lacks_of, listed
from tsqlora.data.table import Samples, Table
from tsqlora.data.write import joined, require_writable, save_beside, try_rows, without_formulas, write_rows
from tsqlora.errors import DataError, TsqLoraError
from tsqlora.files import reading, writing
from tsqlora.progress import Progress
from tsqlora.run.finished import FinishedRun, open_run, require_finished
from tsqlora.run.fit import warn_of_cuts
from tsqlora.run.job import hints_of, read


def evaluate_run(
    run: Path, data: Path | None = None, *, overrides: Sequence[str] = (), progress: Progress | None = None
) -> dict[str, float]:
    """The task's metrics on a labelled file; without a file, on the run's test rows, else its validation rows.

    Texts are generated to measure them.
    """
    record = require_finished(run)
    writes = "format" in record.data
    if data is None and not overrides and ("test" in record.metrics or not writes):
        return record.metrics["test" if "test" in record.metrics else "validation"]
    finished = open_run(run, overrides)
    if data is None:
        tables = read(finished.config, labels=record.labels)
        name = "test" if "test" in tables else "validation"
        table = tables[name]
    else:
        name = "test"
        table = finished.complete(open_table(data, split=name, hints=hints_of(finished.config)))
    table = finished.labelled(name, table)
    metrics = finished.predictor.metrics(table.samples, phase="evaluation", progress=progress)
    return metrics | finished.predictor.text_metrics(table, progress=progress)


def own_rows(run: Path) -> str:
    """Name the rows that `evaluate_run` measures without a file."""
    record = require_finished(run)
    split = "test" if "test" in record.metrics else "validation"
    return f"the run's {record.plan['rows'][split]:,} {split} rows"


def predict_run(
    run: Path,
    data: Path,
    out: Path,
    *,
    overrides: Sequence[str] = (),
    progress: Progress | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> int:
    """Write the file's rows with a `prediction`, and a `probability` for classes; return how many rows.

    Several labels, and the tags of tokens, are a list each, in CSV and TSV joined by "|".

    They replace columns of these names, so that a file of predictions may be predicted again. Other columns of Parquet
    stay as they are in Parquet. A row without a text has an empty prediction, and a warning names it.

    Raises DataError if no row has a text, and before any prediction if `out` cannot hold the rows; TsqLoraError, which
    names a file with the predictions, if they cannot be written in the end.
    """
    require_writable(out)
    with writing(out):
        reading(data)  # a model takes a while to load
        finished = open_run(run, overrides)
        table = finished.using(open_table(data, split="test", hints=hints_of(finished.config)))
    if data.is_dir():
        say(f"{data} is a folder, and {table.name} is predicted: {len(table):,} rows")
    finished.require_columns(table, labelled=False)
    is_table = out.suffix.lower() in TABLES
    if is_table and finished.labels is not None and not finished.labels.kind.single:
        require_separable(finished.labels.names, cure="write .jsonl or .parquet")
    parquet = table.path is not None and {table.path.suffix.lower(), out.suffix.lower()} == {".parquet"}
    original = table.path if parquet else None
    own = [dict[str, Any]()] * len(table) if parquet else [row.cells for row in table]
    try_rows(out, own, original=original)
    complete = _with_input(finished, table)
    how = {"logits": partial(_logits, finished, progress), "texts": partial(_texts, finished, progress)}
    added = dict(zip(complete.ids.tolist(), finished.task.predict(complete, **how), strict=True))
    empty = dict.fromkeys(added[int(complete.ids[0])])
    predictions = [added.get(i, empty) for i in range(len(table))]
    shown = [_rounded(one) for one in predictions] if is_table else predictions
    predicted = [{**row, **prediction} for row, prediction in zip(own, shown, strict=True)]
    try:
        if is_table:  # spreadsheets run formulas
            predicted, cells = without_formulas(list(joined(predicted)))
            if cells:
                warnings.warn(
                    f"{cells} cells of {out} start like formulas and got a leading ' that keeps spreadsheets from "
                    "running them; .jsonl leaves them unchanged",
                    stacklevel=2,
                )
        write_rows(out, predicted, original=original)
    except Exception as error:
        numbered = [{"row": row.number, **one} for row, one in zip(table, predictions, strict=True)]
        saved = save_beside(out, numbered)
        raise TsqLoraError(f"{error}; the predictions are in {saved}, a line for each row in order") from error
    return len(table)


def _rounded(prediction: Mapping[str, Any]) -> dict[str, Any]:
    """With probabilities of six significant digits, for readers of tables."""
    if "probability" not in prediction:
        return dict(prediction)
    p = prediction["probability"]
    short = [None if one is None else float(f"{one:.6g}") for one in (p if isinstance(p, list) else [p])]
    return {**prediction, "probability": short if isinstance(p, list) else short[0]}


def _with_input(finished: FinishedRun, table: Table) -> Table:
    """The rows that have an input; a warning names the others."""
    tags = finished.labels is not None and finished.labels.kind.by_token
    lacks = lacks_of(table.columns, table.format, answers=False, tags=tags)
    bad, complete = dict[str, list[int | str]](), list[int]()
    for row in table:
        if (reason := lacks(row)) is None:
            complete.append(row.id)
        else:
            bad.setdefault(reason, []).append(row.number)
    if not complete:
        raise DataError(f"{table.name}: no row has an input to predict: {listed(bad, table.name)}")
    if bad:
        count = f"{len(table) - len(complete):,} of {len(table):,}"
        warnings.warn(f"{table.name}: {count} predictions are empty: {listed(bad, table.name)}", stacklevel=3)
    return replace(table, ids=np.array(complete))


def _texts(finished: FinishedRun, progress: Progress | None, table: Table) -> list[str]:
    predictor = finished.predictor
    prompts = predictor.prompts(table)
    warn_of_cuts(prompts, table.name, "prompts", predictor.prompt_length)
    return predictor.texts(prompts, phase="prediction", progress=progress)


def _logits(finished: FinishedRun, progress: Progress | None, table: Table) -> tuple[np.ndarray, Samples]:
    samples = finished.unlabelled(table)
    return finished.predictor.logits(samples, phase="prediction", progress=progress), samples
