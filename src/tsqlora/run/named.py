"""What settings name: the task, the rows, the pretrained model and its device."""

from collections.abc import Collection, Mapping, Sequence

import torch
from transformers import set_seed

from tsqlora.data.chat import Format
from tsqlora.data.labels import LabelMap, are_numbers
from tsqlora.data.rows import Columns, quoted
from tsqlora.data.splits import read_data, without_measured
from tsqlora.data.table import Table
from tsqlora.errors import DataError, SettingsError, printable
from tsqlora.run.config import Config
from tsqlora.tasks import Task, get_task
from tsqlora.training.load import Pretrained, load_pretrained

_SHOWN = 6
"""Classes in the line about the rows."""


def trained_task(config: Config, labels: LabelMap | None = None) -> Task:
    """The task, with training's loss, and for metrics the names of the classes."""
    smoothing = config.training.further_arguments().get("label_smoothing_factor", 0)
    names = () if labels is None else labels.names
    return get_task(config.task.type, classes=names, **({"label_smoothing": smoothing} if smoothing else {}))


def require_of_task(config: Config, keys: Collection[str] | None = None) -> None:
    """Raises SettingsError for a setting that the task does not read, unless at its default; of `keys` if given."""
    task = get_task(config.task.type)
    for key, own in task.reading.foreign.items():
        section, name = key.split(".")
        settings = getattr(config, section)
        field, value = type(settings).model_fields.get(name), getattr(settings, name, None)
        changed = value and (field is None or value != field.default)  # None: a field of TrainingArguments
        if changed and (keys is None or key in keys):
            cure = "remove it" if own is None else f"set {own}, or remove it"
            raise SettingsError(f"{key} has no effect for {task.name}; {cure}")


def read(
    config: Config,
    labels: Sequence[str | int] | None = None,
    *,
    holds_out: bool = True,
) -> dict[str, Table]:
    """Read the rows of every split; `labels` are the classes of a run, `holds_out` as in `read_data`."""
    data, task = config.data, get_task(config.task.type)
    tables = read_data(
        data.train,
        data.validation,
        data.test,
        **task.reading.rows(data, holds_out=holds_out),
        validation_fraction=data.validation_fraction,
        seed=config.training.seed,
        trusted=data.trusted,
        max_bad_rows=data.max_bad_rows,
        hints=data.hints,
        numbers=labels is not None and are_numbers(labels),
    )
    return without_measured(tables)


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


def load_model(config: Config, task: Task, labels: LabelMap | None, *, gpus: Sequence[int] = ()) -> Pretrained:
    """Load the pretrained model, with a head for these classes."""
    base = config.model
    set_seed(config.training.seed)
    return load_pretrained(
        base.path,
        task,
        labels=labels,
        revision=base.revision,
        dtype=base.dtype,
        quantization=base.quantization,
        trust_remote_code=base.trust_remote_code,
        gpus=gpus,
    )


def device_of(config: Config) -> torch.device:
    """The accelerator, if there is one and the config allows it, as training chooses."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    by_default = accelerator is None or accelerator.type == "mps"
    if accelerator is None or config.training.further_arguments().get("use_cpu", by_default):
        return torch.device("cpu")
    return accelerator
