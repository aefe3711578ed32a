"""Load a finished run from its directory: its model, and what feeds it."""

import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from shlex import quote
from typing import Any

import torch
from peft import PeftModel

from tsqlora.data.chat import Format
from tsqlora.data.labels import LabelMap, are_numbers
from tsqlora.data.rows import Columns, quoted
from tsqlora.data.splits import complete, prepare
from tsqlora.data.table import Samples, Table
from tsqlora.data.tokens import left_out
from tsqlora.errors import DataError, SettingsError
from tsqlora.interop.base import attach
from tsqlora.interop.files import read_adapter
from tsqlora.run.config import Config, load_config
from tsqlora.run.fit import EVAL_BATCH, Predictor, warn_of_cuts
from tsqlora.run.job import Job, format_of, load_model, require_of_task, trained_task
from tsqlora.tasks import Task, get_task
from tsqlora.training.load import Pretrained
from tsqlora.training.record import RunRecord
from tsqlora.training.run_dir import ADAPTER_DIR, CONFIG_FILE

TRUST = "TSQLORA_TRUST_REMOTE_CODE"
"""Environment variable that allows the code of a run's model to run, if its settings need it."""


@dataclass(frozen=True, slots=True)
class FinishedRun:
    """A run's settings and record, and its trained model."""

    config: Config
    record: RunRecord
    pretrained: Pretrained
    model: PeftModel

    @property
    def labels(self) -> LabelMap | None:
        """The classes of training; None for numbers and texts."""
        return labels_of(self.record)

    @property
    def task(self) -> Task:
        """The task, with training's loss."""
        return trained_task(self.config, self.labels)

    @property
    def columns(self) -> Columns:
        """The columns of training."""
        return Columns(**self.record.data["columns"])

    @property
    def format(self) -> Format | None:
        """How rows become prompts and targets; None for a task with one answer a sample."""
        return format_of(self.config, self.record.data.get("format"), self.columns)

    @property
    def max_length(self) -> int:
        """Most tokens of a sample."""
        return int(self.record.data["max_length"])

    @property
    def predictor(self) -> Predictor:
        return Predictor(
            self.model,
            self.task,
            self.pretrained.tokenizer,
            self.max_length,
            batch_size=self.config.training.further_arguments().get("per_device_eval_batch_size", EVAL_BATCH),
            bf16=self.record.plan["bf16"],
            max_new_tokens=self.config.task.max_new_tokens,
            beams=self.config.task.beams,
        )

    def using(self, table: Table) -> Table:
        """A table with the run's columns, classes and format."""
        if self.format is None and are_numbers(self.record.labels):
            table = table.numbered()
        return table.using(self.columns, self.labels, self.format)

    def complete(self, table: Table) -> Table:
        """The complete rows of a file, as in training.  Raises DataError if it lacks a column of the run."""
        table = self.using(table)
        self.require_columns(table, labelled=True)
        tags = self.labels is not None and self.labels.kind.by_token
        return complete(table, self.config.data.max_bad_rows, tags=tags)

    def job(self, tables: Mapping[str, Table]) -> Job:
        """Tokenise tables for the run's model."""
        own = {name: self.using(table) for name, table in tables.items()}
        task, tokenizer = self.task, self.pretrained.tokenizer
        how: dict[str, Any] = {"encode": task.reading.encode, "most": self.config.data.max_bad_rows}
        data = prepare(own, tokenizer, max_length=self.max_length, **how)
        for note in (note for table in data.values() for note in left_out(table.samples)):
            warnings.warn(note, stacklevel=2)
        return Job(self.config, task, self.pretrained, data, self.max_length)

    def labelled(self, name: str, table: Table) -> Table:
        """Labelled rows as a split with samples; warnings tell about rows cut and left out."""
        data = self.job({name: table}).data[name]
        warn_of_cuts(data.samples, table.name, self.task.reading.noun(self.format), self.max_length)
        return data

    def unlabelled(self, table: Table) -> Samples:
        """Rows as samples without labels, with a warning about cuts."""
        reading, tokenizer = self.task.reading, self.pretrained.tokenizer
        samples = reading.encode(list(table), table.columns, tokenizer, max_length=self.max_length, labels=None)
        warn_of_cuts(samples, table.name, reading.noun(self.format), self.max_length)
        return samples

    def require_columns(self, table: Table, *, labelled: bool) -> None:
        """Raises DataError if a file lacks a column of training."""
        columns, names = table.columns, table.names
        # The second part of a prompt is optional.
        second = columns.text_pair if self.format is None else None
        for column in (columns.text, second, columns.label if labelled else None):
            if column is not None and column not in names:
                raise DataError(
                    f"{table.name} has no column '{column}', which the run was trained on; rename the one that "
                    f"holds it to '{column}': {quoted(names)}"
                )


def open_run(run: Path, overrides: Sequence[str] = ()) -> FinishedRun:
    """Load a finished run.  Raises DataError for any other directory."""
    record = require_finished(run)
    config = load_config(run / CONFIG_FILE, overrides, trained=True)
    require_of_task(config, [override.partition("=")[0] for override in overrides])
    require_trust(run, config)
    read_adapter(run / ADAPTER_DIR)  # before the model is loaded
    pretrained = load_model(config, trained_task(config), labels_of(record))
    model = attach(pretrained.model, run / ADAPTER_DIR, trainable=True)
    if config.model.quantization is None:  # a quantised model is on its device already
        model.to(device_of(config))
    return FinishedRun(config, record, replace(pretrained, model=model), model)


def require_trust(run: Path, config: Config) -> None:
    """Raise SettingsError if the run's model has code: a run may be a stranger's, and whoever opens it decides."""
    if config.model.trust_remote_code and os.environ.get(TRUST) != "1":
        raise SettingsError(
            f"{run / CONFIG_FILE} has model.trust_remote_code true, which runs code of {config.model.path}; if you "
            f"trust it, set {TRUST}=1 in the environment"
        )


def labels_of(record: RunRecord) -> LabelMap | None:
    """The classes of a run; None for numbers and texts."""
    return get_task(record.task).reading.classes(record.labels)


def require_finished(run: Path) -> RunRecord:
    """The record of a finished run.  Raises DataError for any other directory."""
    record = RunRecord.load(run)
    if record.status != "finished":
        raise DataError(f"the run in {run} is not finished; `tsqlora train {quote(str(run))} --resume` continues it")
    return record


def device_of(config: Config) -> torch.device:
    """The accelerator, if there is one and the config allows it, as training chooses."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    by_default = accelerator is None or accelerator.type == "mps"
    if accelerator is None or config.training.further_arguments().get("use_cpu", by_default):
        return torch.device("cpu")
    return accelerator
