"""Load what a run needs: settings, task, model and rows, checked against each other; and add the adapter."""

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import set_seed

from tsqlora.adapter.wrap import plain_lora, start_from, wrap
from tsqlora.data.labels import LabelMap
from tsqlora.data.prepare import prepare, require_embedded, resolve_max_length
from tsqlora.data.readers import Hints
from tsqlora.data.splits import read_data
from tsqlora.data.table import Table
from tsqlora.errors import SettingsError, UnsupportedError
from tsqlora.quality.rule import require_terms
from tsqlora.run.config import Config
from tsqlora.run.start import start_of
from tsqlora.tasks import MEDIA, Task, get_task
from tsqlora.tasks.forward import Collate
from tsqlora.tasks.generation import Generation
from tsqlora.tasks.preference import CAUSAL, Preference
from tsqlora.training.fit import Inputs
from tsqlora.training.load import Pretrained, collate_of, embeddings_of, load_pretrained

_OF_ANSWERS: dict[str, str | None] = {"data.label": "data.target", "data.text_pair": "data.prompt"}
"""Settings for classes and numbers alone, with those for texts in their place."""
_OF_TEXTS: dict[str, str | None] = {
    "data.format": None,
    "data.prompt": "data.text",
    "data.target": "data.label",
    "data.messages": "data.text",
    "task.max_new_tokens": None,
    "task.beams": None,
}
"""Settings for texts alone, with those for classes and numbers in their place."""


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
        return collate_of(self.task, self.pretrained.model, self.pretrained.tokenizer, max_length=self.max_length)

    @property
    def inputs(self) -> Inputs:
        """What `fit` makes batches of."""
        return Inputs(self.task, self.pretrained.tokenizer, self.collate, self.data["validation"].samples)

    @property
    def scored_rows(self) -> dict[str, Any]:
        """Describe the rows in the scores' record: their file and columns, and the names of class ids."""
        table, by_word = self.train, self.task.answer == "tags"
        return {
            "data": self.config.data.train,
            "columns": asdict(table.columns),
            "classes": None if table.classes is None or by_word else list(table.classes.names),
            "format": "tokens" if by_word else None if table.format is None else table.format.name,
            "hints": asdict(hints_of(self.config)),
        }


def load(config: Config, *, folder: Path | None = None, scoring: bool = False) -> Job:
    """Read the rows and the model, and check that they and the settings fit together.

    `folder` holds rows and samples on disk; None is a temporary one. Raises UnsupportedError for preference rows,
    unless for `scoring`.
    """
    require_of_task(config)
    if config.task.type == Preference.name and not scoring:
        raise UnsupportedError(
            f"task.type {Preference.name} is scored, not trained: select rows with tsqlora.select (or `tsqlora score` "
            "and `tsqlora select`), and train on them with TRL's DPOTrainer"
        )
    tables = read(config, folder)
    classes = tables["train"].classes
    task = trained_task(config, classes)
    pretrained = load_model(config, task, classes)
    length = max_length_of(config, pretrained)
    data = prepare(tables, pretrained.tokenizer, max_length=length, seq2seq=task.name == "seq2seq", folder=folder)
    if config.task.type not in MEDIA:
        require_embedded(data, pretrained.tokenizer, embeddings_of(pretrained.model))
    return Job(config, task, pretrained, data, length)


def max_length_of(config: Config, pretrained: Pretrained) -> int:
    """Most tokens of a sample; of a recording its most steps, 0 for all, as for images."""
    if config.task.type in MEDIA:
        return config.data.max_length or 0
    limit = pretrained.tokenizer.model_max_length
    return resolve_max_length(config.data.max_length, tokenizer_limit=limit, positions=pretrained.positions)


def read(config: Config, folder: Path | None = None) -> dict[str, Table]:
    """Read the rows of every split; `folder` as in `load`."""
    data, answer = config.data, get_task(config.task.type).answer
    names = ("format", "prompt", "target", "messages", "text") if answer == "text" else ("text", "text_pair", "label")
    names = () if answer == "pair" else names
    media = {"media": MEDIA[config.task.type]} if config.task.type in MEDIA else {}
    return read_data(
        data.train,
        data.validation,
        data.test,
        answer=answer,
        columns={name: getattr(data, name) for name in names} | media,
        validation_fraction=data.validation_fraction,
        seed=config.training.seed,
        trusted=data.trusted,
        max_bad_rows=data.max_bad_rows,
        hints=hints_of(config),
        folder=folder,
    )


def hints_of(config: Config) -> Hints:
    """The settings about text files."""
    return Hints(config.data.delimiter, config.data.encoding)


def trained_task(config: Config, labels: LabelMap | None = None) -> Task:
    """The task, with training's loss, and for metrics of tags their names."""
    smoothing = config.training.further_arguments().get("label_smoothing_factor", 0)
    tags = {"tags": labels.names} if labels is not None and labels.answer == "tags" else {}
    return get_task(config.task.type, **({"label_smoothing": smoothing} if smoothing else {}), **tags)


def require_of_task(config: Config, keys: Collection[str] | None = None) -> None:
    """Raises SettingsError for a setting that the task does not read, unless at its default; of `keys` if given."""
    task = get_task(config.task.type)
    foreign = dict(_OF_ANSWERS if task.answer == "text" else _OF_TEXTS)
    if task.answer == "pair":  # its columns have fixed names
        foreign = dict.fromkeys((*foreign, *_OF_ANSWERS, "data.text"))
    if task.answer in ("number", "labels") and config.training.further_arguments().get("label_smoothing_factor"):
        raise SettingsError(
            f"training.label_smoothing_factor smooths classes and tokens, and task.type is {task.name}; remove it"
        )
    if task.answer == "tags" or task.name in MEDIA:
        foreign["data.text_pair"] = None
    if task.name == "image-classification":
        foreign["data.max_length"] = None
    for key, own in foreign.items():
        section, name = key.split(".")
        settings = getattr(config, section)
        if (keys is None or key in keys) and getattr(settings, name) != type(settings).model_fields[name].default:
            cure = "remove it" if own is None else f"set {own}, or remove it"
            raise SettingsError(f"{key} has no effect for {task.name}; {cure}")


def require_scoring(config: Config) -> None:
    """Raises SettingsError, before anything is loaded, if the config has no scores."""
    if not config.quality.enabled:
        raise SettingsError("quality.enabled is false, so there is nothing to score; set it to true")
    require_terms(config.quality.resolved_weights() or {}, trained_task(config))


def load_model(config: Config, task: Task, labels: LabelMap | None) -> Pretrained:
    """Load the pretrained model, with a head for these classes."""
    base = config.model
    set_seed(config.training.seed)
    return load_pretrained(
        base.path,
        labels=labels,
        generation=CAUSAL if isinstance(task, Preference) else task if isinstance(task, Generation) else None,
        media=MEDIA.get(task.name),
        revision=base.revision,
        dtype=base.dtype,
        quantization=base.quantization,
        trust_remote_code=base.trust_remote_code,
    )


def with_adapter(config: Config, pretrained: Pretrained) -> PeftModel:
    """Add LoRA to the pretrained model in place, new or from adapter.init_from; with slots where ranks move."""
    adapter, ranks = config.adapter, config.ranks
    set_seed(config.training.seed)
    common: dict[str, Any] = {"dropout": adapter.dropout, "modules_to_save": pretrained.new_modules}
    slots: dict[str, Any] = {"max_rank": ranks.max} if ranks.moves else {}
    if (start := start_of(config)) is not None:
        model = start_from(pretrained.model, start, **common)
        if ranks.moves:
            wrap(model, **slots)
    else:
        model = (wrap if ranks.moves else plain_lora)(
            pretrained.model,
            mean_rank=ranks.mean,
            depth=None if ranks.depth == "all" else ranks.depth,
            alpha=adapter.alpha,
            target_modules=adapter.target_modules,
            **slots,
            **common,
        )
    for written in model.peft_config.values():
        written.revision = config.model.revision  # of the base, by which PEFT loads it
    return model
