"""A finished run put to use: its metrics on a labelled file, its predictions on any."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from scipy.special import softmax
from torch import nn
from transformers import DataCollatorWithPadding, PreTrainedTokenizerBase

from tsqlora.config import Config, load_config
from tsqlora.data.columns import Columns
from tsqlora.data.labels import LabelMap
from tsqlora.data.prepare import encode
from tsqlora.data.rows import Rows, column_names, read_rows
from tsqlora.data.write import require_writable, write_rows
from tsqlora.errors import DataError
from tsqlora.quality.score import Progress
from tsqlora.record import RunRecord
from tsqlora.tasks import Task, get_task
from tsqlora.tasks.forward import Collate
from tsqlora.training.load import load_pretrained
from tsqlora.training.predict import predict_logits
from tsqlora.training.run_dir import ADAPTER_DIR, CONFIG_FILE


@dataclass(frozen=True, slots=True)
class Trained:
    """A run read back: its model, and what is needed to feed it."""

    config: Config
    record: RunRecord
    task: Task
    model: PeftModel
    tokenizer: PreTrainedTokenizerBase
    labels: LabelMap | None

    @property
    def columns(self) -> Columns:
        """The columns that the run was trained on."""
        return Columns(**self.record.data["columns"])

    def logits(self, rows: Rows, *, labelled: bool, progress: Progress | None) -> tuple[np.ndarray, np.ndarray | None]:
        """n × k logits, and the encoded labels where `labelled`."""
        _require_columns(rows, self.columns, labelled=labelled)
        samples = encode(
            rows,
            self.columns,
            self.labels,
            self.tokenizer,
            max_length=int(self.record.data["max_length"]),
            labelled=labelled,
        )
        logits = predict_logits(
            self.model,
            samples.samples,
            DataCollatorWithPadding(self.tokenizer),
            batch_size=self.config.training.eval_batch_size,
            autocast=torch.bfloat16 if self.record.plan["bf16"] else None,
            phase="evaluation" if labelled else "prediction",
            progress=progress,
        )
        return logits, np.array([s["labels"] for s in samples.samples]) if labelled else None


def open_run(run: Path) -> Trained:
    """Reads a finished run.  Raises DataError for a directory that is none."""
    record = RunRecord.load(run)
    config = load_config(run / CONFIG_FILE)
    labels = None if record.labels is None else LabelMap(tuple(record.labels))
    base = config.model
    pretrained = load_pretrained(
        base.path,
        labels=labels,
        revision=base.revision,
        dtype=base.dtype,
        trust_remote_code=base.trust_remote_code,
    )
    model = PeftModel.from_pretrained(pretrained.model, str(run / ADAPTER_DIR), is_trainable=True)
    return Trained(config, record, get_task(record.task), model, pretrained.tokenizer, labels)


def evaluate_run(run: Path, data: Path | None = None, *, progress: Progress | None = None) -> dict[str, float]:
    """The task's metrics on a labelled file; without one, on the run's test rows, else its validation rows."""
    if data is None:
        measured = RunRecord.load(run).metrics
        return measured["test"] if "test" in measured else measured["validation"]
    trained = open_run(run)
    logits, labels = trained.logits(read_rows(data, split="test"), labelled=True, progress=progress)
    assert labels is not None
    return trained.task.metrics(logits, labels)


def predict_run(run: Path, data: Path, out: Path, *, progress: Progress | None = None) -> int:
    """Writes the file's rows with their `prediction`, and its `probability` for classes; how many."""
    require_writable(out)
    trained = open_run(run)
    rows = read_rows(data, split="test")
    logits, _ = trained.logits(rows, labelled=False, progress=progress)
    predicted = trained.task.predictions(logits)
    written: list[dict[str, Any]] = []
    probabilities = softmax(logits.astype(np.float64), axis=1)
    for row, value, p in zip(rows.rows, predicted, probabilities, strict=True):
        if trained.labels is None:
            written.append({**row, "prediction": float(value)})
        else:
            written.append({**row, "prediction": trained.labels.names[int(value)], "probability": float(p.max())})
    write_rows(out, written)
    return len(written)


def measure_split(
    model: nn.Module,
    samples: Sequence[dict[str, Any]],
    collate: Collate,
    task: Task,
    *,
    batch_size: int,
    autocast: torch.dtype | None,
    progress: Progress | None,
) -> dict[str, float]:
    """The task's metrics on labelled samples."""
    logits = predict_logits(model, samples, collate, batch_size=batch_size, autocast=autocast, progress=progress)
    return task.metrics(logits, np.array([s["labels"] for s in samples]))


def _require_columns(rows: Rows, columns: Columns, *, labelled: bool) -> None:
    names = column_names(rows)
    for column in (columns.text, columns.text_pair, columns.label if labelled else None):
        if column is not None and column not in names:
            raise DataError(
                f"{rows.source} has no column '{column}', which the run was trained on; it has {', '.join(names)}"
            )
