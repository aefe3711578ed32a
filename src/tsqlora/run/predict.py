"""A finished run put to use: its metrics on a labelled file, its predictions or texts on any."""

import os
import warnings
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from scipy.special import softmax
from torch import nn
from transformers import PreTrainedTokenizerBase

from tsqlora.data.columns import Columns
from tsqlora.data.formats import Format
from tsqlora.data.generation import least_prompt, left_out, references, tokenise_generation
from tsqlora.data.labels import LabelMap
from tsqlora.data.prepare import Prepared, Writing, prepare
from tsqlora.data.rows import Rows, Source, column_names, open_split, read_rows
from tsqlora.data.samples import TokenisedSplit
from tsqlora.data.splits import Splits, whole
from tsqlora.data.tokenise import tokenise
from tsqlora.data.write import SHEETS, require_writable, without_formulas, write_rows
from tsqlora.errors import DataError, SettingsError
from tsqlora.interop.files import require_safe
from tsqlora.progress import Progress
from tsqlora.run.config import Config, load_config
from tsqlora.run.reading import read, require_of_task, writing_of
from tsqlora.tasks import GENERATION, Task, get_task, require_answers
from tsqlora.tasks.forward import Collate
from tsqlora.tasks.generation import Generation
from tsqlora.tasks.texts import require_text_metrics, text_metrics
from tsqlora.training.collate import collate_of
from tsqlora.training.load import load_pretrained, positions_of
from tsqlora.training.predict import predict_logits
from tsqlora.training.record import RunRecord
from tsqlora.training.run_dir import ADAPTER_DIR, CONFIG_FILE
from tsqlora.training.write import require_room, token_metrics, write_texts


@dataclass(frozen=True, slots=True)
class Asking:
    """How a model of a task is asked: in which batches and precision, and how much it may write."""

    task: Task
    tokenizer: PreTrainedTokenizerBase
    max_length: int
    batch_size: int
    autocast: torch.dtype | None
    max_new_tokens: int
    beams: int
    positions: int | None
    """Of the model, if its config says so."""

    @property
    def prompt_length(self) -> int:
        """Tokens kept of a prompt: a causal model's positions have room for what it writes, too."""
        if self.positions is None or not (isinstance(self.task, Generation) and self.task.causal):
            return self.max_length
        require_room(self.positions, self.max_new_tokens, longest=least_prompt(self.tokenizer))
        return min(self.max_length, self.positions - self.max_new_tokens)

    def collate(self, model: nn.Module, *, left: bool = False) -> Collate:
        """Batches; with `left` prompts to go on from."""
        return collate_of(self.task, model, self.tokenizer, max_length=self.max_length, left=left)

    def logits(
        self, model: nn.Module, samples: Sequence[dict[str, Any]], *, phase: str, progress: Progress | None
    ) -> np.ndarray:
        """n × k, of a task with one answer a sample."""
        return predict_logits(
            model,
            samples,
            self.collate(model),
            batch_size=self.batch_size,
            autocast=self.autocast,
            phase=phase,
            progress=progress,
        )

    def metrics(
        self, model: nn.Module, samples: Sequence[dict[str, Any]], *, phase: str, progress: Progress | None
    ) -> dict[str, float]:
        """The task's metrics on labelled samples; of generated text those with the targets shown."""
        if isinstance(self.task, Generation):
            return token_metrics(
                model,
                samples,
                self.collate(model),
                self.task,
                batch_size=self.batch_size,
                autocast=self.autocast,
                phase=phase,
                progress=progress,
            )
        logits = self.logits(model, samples, phase=phase, progress=progress)
        return require_answers(self.task, "this metric").metrics(logits, np.array([s["labels"] for s in samples]))

    def prompts(self, rows: Rows, format: Format, *, measured: bool = False) -> TokenisedSplit:
        """What the model goes on from, of each row; `measured` as in `tokenise_generation`."""
        assert isinstance(self.task, Generation)
        return tokenise_generation(
            rows,
            format,
            self.tokenizer,
            max_length=self.prompt_length,
            seq2seq=not self.task.causal,
            with_targets=False,
            measured=measured,
        )

    def texts(self, model: nn.Module, prompts: TokenisedSplit, *, phase: str, progress: Progress | None) -> list[str]:
        """What the model writes on each prompt."""
        assert isinstance(self.task, Generation)
        return write_texts(
            model,
            prompts.samples,
            self.collate(model, left=self.task.causal),
            self.tokenizer,
            self.task,
            max_new_tokens=self.max_new_tokens,
            beams=self.beams,
            batch_size=self.batch_size,
            autocast=self.autocast,
            phase=phase,
            progress=progress,
        )

    def text_metrics(
        self, model: nn.Module, rows: Rows, format: Format, *, progress: Progress | None
    ) -> dict[str, float]:
        """How near the texts that the model writes are to the rows' own; nothing of plain text, which has no target."""
        if format.name == "text":
            return {}
        require_text_metrics()
        prompts = self.prompts(rows, format, measured=True)
        if self.prompt_length < self.max_length:  # what max_length cuts is told where rows are read
            tell_of_cuts(prompts, rows.source, "prompts", self.prompt_length)
        written = self.texts(model, prompts, phase="writing", progress=progress)
        return text_metrics(written, references(rows, format))


def tell_of_cuts(split: TokenisedSplit, source: str, what: str, kept: int) -> None:
    """Warns where rows were cut."""
    if split.truncated:
        warnings.warn(f"{split.truncated} of {len(split)} {what} of {source} were cut to {kept} tokens", stacklevel=3)


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
    def format(self) -> Format | None:
        """How rows become prompts and targets; None for a task with one answer a sample."""
        name = self.record.data.get("format")
        return None if name is None else Format(name, self.columns)

    @property
    def writing(self) -> Writing | None:
        """How a generating model takes its samples."""
        return writing_of(self.config)

    @property
    def max_length(self) -> int:
        """Tokens kept of a sample."""
        return int(self.record.data["max_length"])

    @property
    def collate(self) -> Collate:
        return self.asking.collate(self.model)

    @property
    def asking(self) -> Asking:
        return Asking(
            self.task,
            self.tokenizer,
            self.max_length,
            self.config.training.eval_batch_size,
            torch.bfloat16 if self.record.plan["bf16"] else None,
            self.config.task.max_new_tokens,
            self.config.task.beams,
            positions_of(self.model),
        )

    def prepare(self, splits: Splits) -> Prepared:
        """Splits as samples, with the run's own columns and classes."""
        own = replace(splits, columns=self.columns, labels=self.labels, format=self.format)
        return prepare(own, self.tokenizer, max_length=self.max_length, writing=self.writing)

    def labelled(self, name: str, source: Source, places: np.ndarray | None = None) -> Prepared:
        """The rows of a source (at `places`) as a split, with warnings of what was cut and left out."""
        self.require_columns(source.columns(), source.name, labelled=True)
        splits = whole(name, source, self.columns, self.labels, self.format)
        prepared = self.prepare(splits if places is None else replace(splits, places={name: places}))
        split = prepared.samples[name]
        if out := left_out(split):
            warnings.warn(out, stacklevel=2)
        tell_of_cuts(split, source.name, "texts" if self.format is None else "prompts", self.max_length)
        return prepared

    def unlabelled(self, rows: Rows) -> TokenisedSplit:
        """Rows of any file as samples without labels, with a warning of what was cut."""
        self.require_columns(column_names(rows), rows.source, labelled=False)
        split = tokenise(rows, self.columns, self.tokenizer, max_length=self.max_length, labels=None)
        tell_of_cuts(split, rows.source, "texts", self.max_length)
        return split

    def require_columns(self, names: Collection[str], source: str, *, labelled: bool) -> None:
        """Raises DataError where a file with these columns lacks one that the run was trained on."""
        columns = self.columns
        # A prompt may be without its second part, in every row.
        second = columns.text_pair if self.format is None else None
        for column in (columns.text, second, columns.label if labelled else None):
            if column is not None and column not in names:
                raise DataError(
                    f"{source} has no column '{column}', which the run was trained on; it has {', '.join(names)}"
                )


def open_run(run: Path, overrides: Sequence[str] = ()) -> Trained:
    """Reads a finished run.  Raises DataError for a directory that is none."""
    record = require_finished(run)
    config = load_config(run / CONFIG_FILE, overrides)
    labels = None if record.labels is None else LabelMap(tuple(record.labels))
    require_of_task(config, [override.partition("=")[0] for override in overrides])
    base, task = config.model, get_task(record.task)
    _require_trust(config, run)
    require_safe(run / ADAPTER_DIR)
    pretrained = load_pretrained(
        base.path,
        labels=labels,
        generation=task if isinstance(task, Generation) else None,
        revision=base.revision,
        dtype=base.dtype,
        quantization=base.quantization,
        trust_remote_code=base.trust_remote_code,
    )
    model = PeftModel.from_pretrained(pretrained.model, str(run / ADAPTER_DIR), is_trainable=True)
    if base.quantization is None:  # else it lies where it was packed
        model.to(device_of(config))
    return Trained(config, record, task, model, pretrained.tokenizer, labels)


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
    """The accelerator, if there is one and the config does not ask for the processor, as training chooses."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    by_default = accelerator is None or accelerator.type == "mps"
    if accelerator is None or config.training.further_arguments().get("use_cpu", by_default):
        return torch.device("cpu")
    return accelerator


def evaluate_run(
    run: Path, data: Path | None = None, *, overrides: Sequence[str] = (), progress: Progress | None = None
) -> dict[str, float]:
    """The task's metrics on a labelled file; without one, on the run's test rows, else its validation rows.

    Generated text is measured by writing it.
    """
    record = require_finished(run)
    generates = record.task in GENERATION
    if data is None and not overrides and ("test" in record.metrics or not generates):
        return record.metrics["test" if "test" in record.metrics else "validation"]
    trained = open_run(run, overrides)
    if data is None:
        splits = read(trained.config)
        name = "test" if "test" in splits.sources else "validation"
        prepared = trained.labelled(name, splits.sources[name], splits.places[name])
    else:
        name = "test"
        prepared = trained.labelled(name, open_split(data, split=name))
    samples = prepared.samples[name].samples
    metrics = trained.asking.metrics(trained.model, samples, phase="evaluation", progress=progress)
    if trained.format is None:
        return metrics
    rows = prepared.splits.rows(name)
    return metrics | trained.asking.text_metrics(trained.model, rows, trained.format, progress=progress)


def own_rows(run: Path) -> str:
    """Which rows `evaluate_run` measures where it is given none."""
    record = require_finished(run)
    split = "test" if "test" in record.metrics else "validation"
    return f"the run's {record.plan['rows'][split]:,} {split} rows"


def predict_run(
    run: Path, data: Path, out: Path, *, overrides: Sequence[str] = (), progress: Progress | None = None
) -> int:
    """Writes the file's rows with their `prediction`, and its `probability` for classes; how many.

    They take the place of columns of such a name, so that a file of predictions may be predicted anew.
    """
    require_writable(out)
    trained = open_run(run, overrides)
    rows = read_rows(data, split="test")
    added = _texts(trained, rows, progress) if trained.format is not None else _answers(trained, rows, progress)
    predicted = [{**row, **more} for row, more in zip(rows.rows, added, strict=True)]
    if out.suffix.lower() in SHEETS:
        predicted, cells = without_formulas(predicted)
        if cells:
            warnings.warn(
                f"{cells} cells of {out} begin like a formula and got a ' in front, so that a spreadsheet shows them "
                "as text; .jsonl keeps them as they are",
                stacklevel=2,
            )
    write_rows(out, predicted)
    return len(rows)


def _texts(trained: Trained, rows: Rows, progress: Progress | None) -> list[dict[str, Any]]:
    assert trained.format is not None
    trained.require_columns(column_names(rows), rows.source, labelled=False)
    asking = trained.asking
    prompts = asking.prompts(rows, trained.format)
    tell_of_cuts(prompts, rows.source, "prompts", asking.prompt_length)
    texts = asking.texts(trained.model, prompts, phase="prediction", progress=progress)
    return [{"prediction": text} for text in texts]


def _answers(trained: Trained, rows: Rows, progress: Progress | None) -> list[dict[str, Any]]:
    samples = trained.unlabelled(rows).samples
    logits = trained.asking.logits(trained.model, list(samples), phase="prediction", progress=progress)
    predicted = require_answers(trained.task, "a prediction").predictions(logits)
    if trained.labels is None:
        return [{"prediction": float(value)} for value in predicted]
    names, best = trained.labels.names, softmax(logits.astype(np.float64), axis=1).max(axis=1)
    return [
        {"prediction": names[int(value)], "probability": float(p)} for value, p in zip(predicted, best, strict=True)
    ]
