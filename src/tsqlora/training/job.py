"""One job: settings, task, model and rows that fit together, made from settings or from a run's directory."""

import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from shlex import quote
from typing import Any

import numpy as np
from torch import nn
from transformers import set_seed

from tsqlora.adapter.base import attach
from tsqlora.adapter.files import read_adapter
from tsqlora.adapter.lora import LoraAdapter
from tsqlora.auditing.draw.subset import QualitySubset
from tsqlora.auditing.saved_look import devices_of
from tsqlora.errors import DataError, SettingsError, printable
from tsqlora.model.load import Pretrained
from tsqlora.model.named import device_of, load_model, read, require_of_task, trained_task
from tsqlora.model.request import RowNames, ScoringRule, require_terms
from tsqlora.model.terms import published
from tsqlora.progress import Progress
from tsqlora.record import RunRecord
from tsqlora.rows.chat import Format
from tsqlora.rows.datasets import REVIEWED_AS
from tsqlora.rows.labels import LabelMap, are_numbers
from tsqlora.rows.rows import Columns, quoted
from tsqlora.rows.splits import complete, prepare, require_embedded, unmeasured
from tsqlora.rows.table import Samples, Table
from tsqlora.rows.tokens import left_out
from tsqlora.run_dir import ADAPTER_DIR, CONFIG_FILE, adapter_folder, is_run
from tsqlora.sampling import stratum_sizes
from tsqlora.settings import PRESETS, Config, load_config
from tsqlora.tasks import Collate, Task, get_task, has_own_loss
from tsqlora.training.lora import mean_rank, read_start, start_from, wrap
from tsqlora.training.quality_callback import QualityCallback

TRUST = "TSQLORA_TRUST_REMOTE_CODE"
"""Environment variable that allows the code of a run's model to run, if its settings need it."""
_SHOWN = 6
"""Classes in the line about the rows."""


@dataclass(frozen=True, slots=True)
class Job:
    """Everything that a run needs, loaded and checked; the task has training's loss, `data` a table for each split."""

    config: Config
    task: Task
    pretrained: Pretrained
    max_length: int
    data: Mapping[str, Table] = field(default_factory=dict)
    record: RunRecord | None = None
    """Of the finished run that the model is of; its columns and classes are those of every file."""

    # Any: PEFT's model and the model below it.
    @property
    def model(self) -> Any:
        return self.pretrained.model

    @property
    def tokenizer(self) -> Any:
        return self.pretrained.tokenizer

    @property
    def train(self) -> Table:
        """The training rows."""
        return self.data["train"]

    @property
    def trusted(self) -> Samples | None:
        """The rows of data.trusted."""
        return self.data["trusted"].samples if "trusted" in self.data else None

    @property
    def collate(self) -> Collate:
        return self.task.reading.collate(self.model, self.tokenizer, max_length=self.max_length)

    def row_names(self, **about: Any) -> RowNames:
        """The training rows' ids, hashes and lengths, and for the scores' record their file, columns and classes."""
        table, samples = self.train, self.train.samples
        by_token = table.classes is not None and table.classes.kind.by_token
        source = {
            "data": self.config.data.train,
            "columns": asdict(table.columns),
            "classes": None if table.classes is None or by_token else list(table.classes.names),
            "format": "tokens" if by_token else None if table.format is None else table.format.name,
            "hints": asdict(self.config.data.hints),
        }
        return RowNames(samples.ids, samples.hashes, samples.lengths, source | about)

    def with_rows(self, tables: Mapping[str, Table]) -> "Job":
        """The job with these rows, tokenised."""
        how: dict[str, Any] = {"encode": self.task.reading.encode, "most": self.config.data.max_bad_rows}
        return replace(self, data=prepare(tables, self.tokenizer, max_length=self.max_length, **how))

    def with_adapter(self) -> "Job":
        """The job with LoRA in its model, new or from adapter.init_from; with slots where ranks move."""
        adapter, ranks = self.config.adapter, self.config.ranks
        set_seed(self.config.training.seed)
        common: dict[str, Any] = {"dropout": adapter.dropout, "modules_to_save": self.pretrained.new_modules}
        with_slots = partial(published().wrap, max_rank=ranks.max) if ranks.moves else None
        if (start := start_of(self.config)) is not None:
            model = start_from(self.model, start, **common)
            if with_slots is not None:
                with_slots(model)
        else:
            how = {"mean_rank": ranks.mean, "alpha": adapter.alpha, "target_modules": adapter.target_modules}
            model = (with_slots or wrap)(self.model, **how, **common)
        for written in model.peft_config.values():
            written.revision = self.config.model.revision  # of the base, by which PEFT loads it
        return self.with_model(model)

    def on_device(self) -> "Job":
        """The job with its model on its device; one that is packed or spread over several is there."""
        if self.config.model.quantization is None and devices_of(self.model) < 2:
            self.model.to(device_of(self.config))
        return self

    def using(self, table: Table) -> Table:
        """A table with the columns, classes and format of the run."""
        assert self.record is not None
        columns, labels = Columns(**self.record.data["columns"]), labels_of(self.record)
        format = format_of(self.config, self.record.data.get("format"), columns)
        numbered = format is None and are_numbers(self.record.labels)
        return (table.numbered() if numbered else table).using(columns, labels, format)

    def with_files(self, tables: Mapping[str, Table]) -> "Job":
        """The job with labelled rows that are read as in training; warnings name rows that are left out."""
        job = self.with_rows({name: self.using(table) for name, table in tables.items()})
        for note in (note for table in job.data.values() for note in left_out(table.samples)):
            warnings.warn(note, stacklevel=3)
        return job

    def complete(self, table: Table) -> Table:
        """The complete rows of a file, as in training.  Raises DataError if it lacks a column of the run."""
        table = self.using(table)
        require_columns(table, labelled=True)
        tags = table.classes is not None and table.classes.kind.by_token
        return complete(table, self.config.data.max_bad_rows, tags=tags)

    def with_model(self, model: nn.Module) -> "Job":
        """The job with another model."""
        return replace(self, pretrained=replace(self.pretrained, model=model))


# ---------------------------------------------------------------------------------- of settings, or of a directory


def load(
    config: Config,
    *,
    scoring: bool = False,
    labels: Sequence[str | int] | None = None,
    gpus: Sequence[int] = (),
    say: Callable[[str], None] = lambda line: None,
) -> Job:
    """Read the rows and the model, and check that they and the settings fit together.

    `labels` are the classes of a run that goes on.
    `gpus` as in `load_pretrained`. `say` gets a line about the rows before the model loads. Raises UnsupportedError
    for preference rows, unless for `scoring`.
    """
    require_of_task(config)
    task = trained_task(config)
    if not scoring:
        task.reading.require_trained(task.name)
    start = config.adapter.init_from
    if not labels and start is not None and is_run(Path(start)):
        labels = RunRecord.load(Path(start)).labels
    tables = read(config, labels)
    say(described(tables, task))
    job = without_rows(config, tables["train"].classes, gpus=gpus).with_rows(tables)
    if note := unmeasured(job.data):
        warnings.warn(note, stacklevel=2)
    require_embedded(job.data, job.tokenizer, job.model)
    return job


def open_run(run: Path, overrides: Sequence[str] = ()) -> Job:
    """The job of a finished run, with its trained model.  Raises DataError for any other directory."""
    record = require_finished(run)
    config = load_config(run / CONFIG_FILE, overrides, trained=True)
    require_of_task(config, [override.partition("=")[0] for override in overrides])
    require_trust(run, config)
    read_adapter(run / ADAPTER_DIR)  # before the model is loaded
    job = replace(without_rows(config, labels_of(record)), record=record, max_length=int(record.data["max_length"]))
    return job.with_model(attach(job.model, run / ADAPTER_DIR, trainable=True)).on_device()


def without_rows(config: Config, labels: LabelMap | None, *, gpus: Sequence[int] = ()) -> Job:
    """The job with the pretrained model, whose head is for these classes; `gpus` as in `load_pretrained`."""
    task = trained_task(config, labels)
    pretrained = load_model(config, task, labels, gpus=gpus)
    length = task.reading.limit(config.data.max_length, pretrained.tokenizer, pretrained.positions)
    return Job(config, task, pretrained, length)


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


# ---------------------------------------------------------------------------------- the rows


def described(tables: Mapping[str, Table], task: Task) -> str:
    """The rows of every split, their columns, classes and task, in one line."""
    train = tables["train"]
    rows = ", ".join(f"{len(table):,} {name}" for name, table in tables.items())
    used = train.columns if train.format is None else train.format.columns
    names = dict.fromkeys(name for name in (used.system, used.text, used.text_pair, used.label) if name in train.names)
    parts = [f"{train.name}: {rows} rows", f"columns {quoted(names)}"]
    if train.classes is not None:
        classes = train.classes.names
        shown = ", ".join(printable(str(name), 30) for name in classes[:_SHOWN])
        parts.append(f"{len(classes)} classes ({shown}{', …' if len(classes) > _SHOWN else ''})")
    kind = "" if train.format is None else f" of {train.format.name} rows"
    return "; ".join([*parts, f"task {task.name}{kind}"])


def format_of(config: Config, name: str | None, columns: Columns) -> Format | None:
    """The format of this name; None for a task with one answer a sample."""
    data = config.data
    all_named = data.messages or data.text or (data.prompt and data.target)
    return None if name is None else Format(name, columns, whole=not all_named)


def require_columns(table: Table, *, labelled: bool) -> None:
    """Raises DataError if a file lacks a column of training."""
    columns, names = table.columns, table.names
    # The second part of a prompt is optional.
    second = columns.text_pair if table.format is None else None
    for column in (columns.text, second, columns.label if labelled else None):
        if column is not None and column not in names:
            raise DataError(
                f"{table.name} has no column '{column}', which the run was trained on; rename the one that "
                f"holds it to '{column}': {quoted(names)}"
            )


# ---------------------------------------------------------------------------------- an adapter that the run continues


def start_of(config: Config) -> LoraAdapter | None:
    """The adapter that a run continues, if any."""
    path = config.adapter.init_from
    return None if path is None else read_start(adapter_folder(Path(path)))


def with_start(config: Config) -> Config:
    """The config with ranks.mean, ranks.max, adapter.alpha and target_modules of adapter.init_from; idempotent.

    Raises SettingsError if one of them is set to another value. The default counts as unset, since the template of
    `tsqlora init` writes it.
    """
    adapter = start_of(config)
    if adapter is None:
        return config
    mean, largest = mean_rank(adapter), adapter.rank
    scale = next(iter(adapter.targets.values())).scale  # of all the same
    own = {"ranks": {"mean": mean}, "adapter": {"alpha": scale * mean, "target_modules": sorted(adapter.targets)}}
    for section, values in own.items():
        settings = getattr(config, section)
        for key, value in values.items():
            if (set_to := getattr(settings, key)) not in (value, type(settings).model_fields[key].default):
                raise SettingsError(f"{section}.{key} is {set_to}, and adapter.init_from has {value}; remove it")
    if config.ranks.max is not None and config.ranks.max < largest:
        raise SettingsError(f"ranks.max is {config.ranks.max}, and adapter.init_from has a rank of {largest}; raise it")
    return config.model_copy(
        update={section: getattr(config, section).model_copy(update=values) for section, values in own.items()}
    )


def start_notes(config: Config, labels: Sequence[Any] | None) -> list[str]:
    """Notes about the start, for a run's record.

    Raises DataError if the run was trained on other classes, so that its head means something else.
    """
    adapter, path = start_of(config), config.adapter.init_from
    if adapter is None or path is None:
        return []

    def listed(labels: Sequence[Any] | None) -> str:
        return "numbers" if labels is None else ", ".join(map(str, labels))

    notes = [f"continues {path}: {len(adapter.targets)} layers, mean rank {mean_rank(adapter):.3g}"]
    if not adapter.heads():
        notes.append("that adapter has no head: the head is new")
    elif not is_run(Path(path)):
        notes.append(f"its head must be for these classes, in this order: {listed(labels)}")
    elif (before := RunRecord.load(Path(path)).labels) != (None if labels is None else list(labels)):
        raise DataError(
            f"{path} was trained on {listed(before)}, and the rows have {listed(labels)}; give rows of the same ones"
        )
    if adapter.base not in (None, config.model.path):
        notes.append(f"that adapter names {adapter.base} as its base; its layers fit {config.model.path}")
    return notes


# ---------------------------------------------------------------------------------- the method


@dataclass(frozen=True, slots=True)
class Method:
    """The rows that epochs are drawn from, and the callbacks that draw them and move ranks."""

    data: QualitySubset
    quality: QualityCallback
    ranks: Any = None
    """The RankCallback of `tsqlora.paper`, where ranks move."""


def scoring_rule(config: Config) -> ScoringRule:
    """How rows are scored and drawn."""
    q = config.quality
    return ScoringRule(
        weights=PRESETS[q.preset],
        judge=q.preset != "paper",
        seed=config.training.seed,
        head_start=q.head_start,
        select=q.enabled,
    )


def method_of(job: Job, scores_path: Path, progress: Progress | None = None, *, look: Path | None = None) -> Method:
    """The rows that epochs are drawn from, and the callbacks that the config describes, with a look in a folder.

    Raises SettingsError or UnsupportedError for terms that the task lacks, and for a draw that is too small.
    """
    config, samples, rule = job.config, job.train.samples, scoring_rule(job.config)
    data = QualitySubset(
        samples,
        config.quality.fraction,
        config.training.seed,
        trusted=job.trusted,
        lengths=samples.lengths,
        batch_size=config.training.batch_size,
    )
    if job.trusted is not None:
        marks = {row.id: row.cells.get(REVIEWED_AS) == "suspect" for row in job.data["trusted"]}
        data.suspects = np.array([marks.get(int(id), False) for id in job.trusted.ids], dtype=np.bool_)
    if rule.weights is not None and rule.select:
        require_terms(rule.weights, job.task)
        if job.task.reading.judges():
            stratum_sizes(np.unique(samples.labels, return_counts=True)[1], len(data))
    quality = QualityCallback(
        data,
        rule=rule,
        rows=job.row_names(),
        scores_path=scores_path,
        progress=progress,
        collate=job.collate,
        look=look if rule.select or rule.head_start else None,
        task=job.task if has_own_loss(job.task, job.model) else None,
    )
    r, how = config.ranks, {"seed": config.training.seed, "collate": job.collate}
    return Method(data, quality, published().RankCallback(r.interval, min_rank=r.min, **how) if r.moves else None)
