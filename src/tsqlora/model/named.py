"""What settings name: the task, the rows, the pretrained model and its device."""

from collections.abc import Collection, Sequence

import torch
from transformers import set_seed

from tsqlora.errors import SettingsError
from tsqlora.model.load import Pretrained, load_pretrained
from tsqlora.rows.labels import LabelMap, are_numbers
from tsqlora.rows.splits import read_data, without_measured
from tsqlora.rows.table import Table
from tsqlora.settings import Config
from tsqlora.tasks import Task, get_task


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
