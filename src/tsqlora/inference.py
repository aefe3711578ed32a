"""A finished run put to use: its metrics on a labelled file, its predictions on any."""

import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from scipy.special import softmax
from torch import nn
from transformers import DataCollatorWithPadding, PreTrainedTokenizerBase

from tsqlora.adapter.files import require_safe
from tsqlora.config import Config, load_config
from tsqlora.data.batches import collator
from tsqlora.data.columns import Columns
from tsqlora.data.labels import LabelMap
from tsqlora.data.prepare import Prepared, Splits, encode, prepare
from tsqlora.data.rows import Rows, column_names, read_rows
from tsqlora.data.tokenise import TokenisedSplit
from tsqlora.data.write import SHEETS, require_writable, without_formulas, write_rows
from tsqlora.errors import DataError, SettingsError
from tsqlora.quality.score import Progress
from tsqlora.record import RunRecord
from tsqlora.tasks import Task, get_task
from tsqlora.tasks.forward import Collate
from tsqlora.training.load import load_pretrained
from tsqlora.training.predict import predict_logits
from tsqlora.training.run_dir import ADAPTER_DIR, CONFIG_FILE

TRUST = "TSQLORA_TRUST_REMOTE_CODE"
"""Variable of the environment that lets the code of a run's model be run, where its settings ask for it."""


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

    @property
    def max_length(self) -> int:
        """Tokens kept of a sample."""
        return int(self.record.data["max_length"])

    @property
    def collate(self) -> DataCollatorWithPadding:
        positions = getattr(self.model.config, "max_position_embeddings", None)
        return collator(self.tokenizer, max_length=self.max_length, positions=positions)

    def prepare(self, splits: Splits) -> Prepared:
        """Splits as samples, with the run's own classes."""
        return prepare(replace(splits, labels=self.labels), self.tokenizer, max_length=self.max_length)

    def logits(self, samples: TokenisedSplit, *, phase: str, progress: Progress | None) -> np.ndarray:
        """n × k."""
        return predict_logits(
            self.model,
            samples.samples,
            self.collate,
            batch_size=self.config.training.eval_batch_size,
            autocast=torch.bfloat16 if self.record.plan["bf16"] else None,
            phase=phase,
            progress=progress,
        )

    def encode(self, rows: Rows, *, labelled: bool) -> TokenisedSplit:
        """Rows of any file as samples."""
        _require_columns(rows, self.columns, labelled=labelled)
        return encode(rows, self.columns, self.labels, self.tokenizer, max_length=self.max_length, labelled=labelled)


def open_run(run: Path, overrides: Sequence[str] = ()) -> Trained:
    """Reads a finished run.  Raises DataError for a directory that is none."""
    record = require_finished(run)
    config = load_config(run / CONFIG_FILE, overrides)
    labels = None if record.labels is None else LabelMap(tuple(record.labels))
    base = config.model
    _require_trust(config, run)
    require_safe(run / ADAPTER_DIR)
    pretrained = load_pretrained(
        base.path,
        labels=labels,
        revision=base.revision,
        dtype=base.dtype,
        trust_remote_code=base.trust_remote_code,
    )
    model = PeftModel.from_pretrained(pretrained.model, str(run / ADAPTER_DIR), is_trainable=True)
    model.to(device_of(config))
    return Trained(config, record, get_task(record.task), model, pretrained.tokenizer, labels)


def _require_trust(config: Config, run: Path) -> None:
    """A run may be a stranger's: whether code of its model is run is for whoever opens it to say."""
    if config.model.trust_remote_code and os.environ.get(TRUST) != "1":
        raise SettingsError(
            f"{run / CONFIG_FILE} has model.trust_remote_code true, which runs code that comes with "
            f"{config.model.path}; if you trust it, set {TRUST}=1 in the environment"
        )


def require_finished(run: Path) -> RunRecord:
    """The record of a finished run; DataError for any other directory."""
    record = RunRecord.load(run)
    if record.status != "finished":
        raise DataError(f"the run in {run} is not finished; `tsqlora train --resume` goes on with it")
    return record


def device_of(config: Config) -> torch.device:
    """The accelerator, if there is one and the config does not ask for the processor."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None or config.training.further_arguments().get("use_cpu"):
        return torch.device("cpu")
    return accelerator


def evaluate_run(run: Path, data: Path | None = None, *, progress: Progress | None = None) -> dict[str, float]:
    """The task's metrics on a labelled file; without one, on the run's test rows, else its validation rows."""
    if data is None:
        measured = require_finished(run).metrics
        return measured["test"] if "test" in measured else measured["validation"]
    trained = open_run(run)
    samples = trained.encode(read_rows(data, split="test"), labelled=True)
    logits = trained.logits(samples, phase="evaluation", progress=progress)
    return trained.task.metrics(logits, np.array([sample["labels"] for sample in samples.samples]))


def predict_run(run: Path, data: Path, out: Path, *, progress: Progress | None = None) -> int:
    """Writes the file's rows with their `prediction`, and its `probability` for classes; how many."""
    require_writable(out)
    trained = open_run(run)
    rows = read_rows(data, split="test")
    logits = trained.logits(trained.encode(rows, labelled=False), phase="prediction", progress=progress)
    predicted = trained.task.predictions(logits)
    if trained.labels is None:
        added = [{"prediction": float(value)} for value in predicted]
    else:
        names, best = trained.labels.names, softmax(logits.astype(np.float64), axis=1).max(axis=1)
        added = [
            {"prediction": names[int(value)], "probability": float(p)} for value, p in zip(predicted, best, strict=True)
        ]
    predicted_rows = [{**row, **more} for row, more in zip(rows.rows, added, strict=True)]
    if out.suffix.lower() in SHEETS:
        predicted_rows, cells = without_formulas(predicted_rows)
        if cells:
            warnings.warn(
                f"{cells} cells of {out} begin like a formula and got a ' in front, so that a spreadsheet shows them "
                "as text; .jsonl keeps them as they are",
                stacklevel=2,
            )
    write_rows(out, predicted_rows)
    return len(rows)


def measure_split(
    model: nn.Module,
    samples: Sequence[dict[str, Any]],
    collate: Collate,
    task: Task,
    *,
    batch_size: int,
    autocast: torch.dtype | None,
    phase: str,
    progress: Progress | None,
) -> dict[str, float]:
    """The task's metrics on labelled samples."""
    logits = predict_logits(
        model, samples, collate, batch_size=batch_size, autocast=autocast, phase=phase, progress=progress
    )
    return task.metrics(logits, np.array([s["labels"] for s in samples]))


def _require_columns(rows: Rows, columns: Columns, *, labelled: bool) -> None:
    names = column_names(rows)
    for column in (columns.text, columns.text_pair, columns.label if labelled else None):
        if column is not None and column not in names:
            raise DataError(
                f"{rows.source} has no column '{column}', which the run was trained on; it has {', '.join(names)}"
            )
