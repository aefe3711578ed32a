"""Load what a run needs: settings, task, model and rows, checked against each other; and add the adapter."""

import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from types import ModuleType
from typing import Any

from peft import PeftModel
from transformers import set_seed

from tsqlora.data.chat import Format
from tsqlora.data.labels import LabelMap, are_numbers
from tsqlora.data.readers import Hints
from tsqlora.data.rows import Columns, quoted
from tsqlora.data.splits import prepare, read_data, require_embedded, unmeasured, without_measured
from tsqlora.data.table import Table
from tsqlora.errors import SettingsError, printable
from tsqlora.quality.rule import require_terms
from tsqlora.run.config import PRESETS, Config
from tsqlora.run.start import start_labels, start_of
from tsqlora.tasks import Collate, Task, get_task
from tsqlora.training.fit import Inputs
from tsqlora.training.load import Pretrained, load_pretrained
from tsqlora.training.lora import start_from, wrap

_SHOWN = 6
"""Classes in the line about the rows."""


@dataclass(frozen=True, slots=True)
class Job:
    """Everything that a run needs, loaded and checked; the task has training's loss, `data` a table for each split."""

    config: Config
    task: Task
    pretrained: Pretrained
    data: Mapping[str, Table]
    max_length: int

    @property
    def train(self) -> Table:
        """The training rows."""
        return self.data["train"]

    @property
    def collate(self) -> Collate:
        pretrained = self.pretrained
        return self.task.reading.collate(pretrained.model, pretrained.tokenizer, max_length=self.max_length)

    @property
    def inputs(self) -> Inputs:
        """What `fit` makes batches of."""
        return Inputs(self.task, self.pretrained.tokenizer, self.collate, self.data["validation"].samples)

    @property
    def scored_rows(self) -> dict[str, Any]:
        """Describe the rows in the scores' record: their file and columns, and the names of class ids."""
        table = self.train
        by_token = table.classes is not None and table.classes.kind.by_token
        return {
            "data": self.config.data.train,
            "columns": asdict(table.columns),
            "classes": None if table.classes is None or by_token else list(table.classes.names),
            "format": "tokens" if by_token else None if table.format is None else table.format.name,
            "hints": asdict(hints_of(self.config)),
        }


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
    tables = read(config, labels)
    say(described(tables, task))
    classes = tables["train"].classes
    task = trained_task(config, classes)
    pretrained = load_model(config, task, classes, gpus=gpus)
    length = task.reading.limit(config.data.max_length, pretrained.tokenizer, pretrained.positions)
    how: dict[str, Any] = {"encode": task.reading.encode, "most": config.data.max_bad_rows}
    data = prepare(tables, pretrained.tokenizer, max_length=length, **how)
    if note := unmeasured(data):
        warnings.warn(note, stacklevel=2)
    require_embedded(data, pretrained.tokenizer, pretrained.model)
    return Job(config, task, pretrained, data, length)


def read(
    config: Config,
    labels: Sequence[str | int] | None = None,
    *,
    holds_out: bool = True,
) -> dict[str, Table]:
    """Read the rows of every split; `labels` as in `load`, `holds_out` as in `read_data`."""
    data, task, labels = config.data, get_task(config.task.type), labels or start_labels(config)
    tables = read_data(
        data.train,
        data.validation,
        data.test,
        **task.reading.rows(data, holds_out=holds_out),
        validation_fraction=data.validation_fraction,
        seed=config.training.seed,
        trusted=data.trusted,
        max_bad_rows=data.max_bad_rows,
        hints=hints_of(config),
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


def hints_of(config: Config) -> Hints:
    """The settings about text files."""
    return config.data.hints


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


def require_scoring(config: Config) -> None:
    """Raises SettingsError, before anything is loaded, if the config has no scores."""
    if not config.quality.enabled:
        raise SettingsError("quality.enabled is false, so there is nothing to score; set it to true")
    require_terms(PRESETS[config.quality.preset] or {}, trained_task(config))


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


def published() -> ModuleType:
    """The wing of the published method, imported only where a setting asks for it."""
    from tsqlora import paper

    return paper


def with_adapter(config: Config, pretrained: Pretrained) -> PeftModel:
    """Add LoRA to the pretrained model in place, new or from adapter.init_from; with slots where ranks move."""
    adapter, ranks = config.adapter, config.ranks
    set_seed(config.training.seed)
    common: dict[str, Any] = {"dropout": adapter.dropout, "modules_to_save": pretrained.new_modules}
    with_slots = partial(published().wrap, max_rank=ranks.max) if ranks.moves else None
    if (start := start_of(config)) is not None:
        model = start_from(pretrained.model, start, **common)
        if with_slots is not None:
            with_slots(model)
    else:
        model = (with_slots or wrap)(
            pretrained.model,
            mean_rank=ranks.mean,
            alpha=adapter.alpha,
            target_modules=adapter.target_modules,
            **common,
        )
    for written in model.peft_config.values():
        written.revision = config.model.revision  # of the base, by which PEFT loads it
    return model
