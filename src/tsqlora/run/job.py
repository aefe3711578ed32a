"""What a run is made of: settings, task, model and rows, loaded and checked, and the model's rank slots."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import set_seed

from tsqlora.adapter.init_from import start_from
from tsqlora.adapter.wrap import wrap
from tsqlora.data.batches import PackedCollator, packed_collator
from tsqlora.data.labels import LabelMap
from tsqlora.data.prepare import Prepared, prepare, resolve_max_length
from tsqlora.data.splits import Splits
from tsqlora.errors import SettingsError
from tsqlora.quality.rule import require_terms
from tsqlora.run.config import Config
from tsqlora.run.reading import hints_of, read, require_of_task, trained_task, writing_of
from tsqlora.run.start import start_of
from tsqlora.tasks import Task
from tsqlora.tasks.forward import Collate
from tsqlora.tasks.generation import Generation
from tsqlora.training.collate import collate_of
from tsqlora.training.fit import Inputs
from tsqlora.training.load import Pretrained, load_pretrained


@dataclass(frozen=True, slots=True)
class Job:
    """Everything that a run needs, loaded and checked; the task has the loss that training uses."""

    config: Config
    task: Task
    pretrained: Pretrained
    data: Prepared
    max_length: int

    @property
    def collate(self) -> Collate:
        return collate_of(self.task, self.pretrained.model, self.pretrained.tokenizer, max_length=self.max_length)

    @property
    def packed(self) -> PackedCollator | None:
        """The collator of training, where samples share rows."""
        if not self.config.data.packing:
            return None
        return packed_collator(self.pretrained.tokenizer, max_length=self.max_length)

    @property
    def inputs(self) -> Inputs:
        """What `fit` makes batches of."""
        return Inputs(self.task, self.pretrained.tokenizer, self.collate, self.data.samples["validation"], self.packed)

    @property
    def scored_rows(self) -> dict[str, Any]:
        """Describe the rows in the scores' record: where they are, their columns, and what the labels' numbers mean."""
        splits = self.data.splits
        return {
            "data": self.config.data.train,
            "columns": self.data.columns(),
            "classes": None if splits.labels is None else list(splits.labels.names),
            "format": None if splits.format is None else splits.format.name,
            "hints": asdict(hints_of(self.config)),
        }


def load(config: Config, *, folder: Path | None = None) -> Job:
    """Read the rows and the model, and check that they and the settings fit together.

    `folder` is where samples are kept on disk; None for a temporary one.
    """
    task, splits, pretrained, length = read_with_model(config)
    data = prepare(splits, pretrained.tokenizer, max_length=length, writing=writing_of(config), folder=folder)
    return Job(config, task, pretrained, data, length)


def read_with_model(config: Config) -> tuple[Task, Splits, Pretrained, int]:
    """The task, where its rows are, the model, and how many tokens a sample may have; samples are not made yet."""
    require_of_task(config)
    task, splits = trained_task(config), read(config)
    pretrained = load_model(config, task, splits.labels)
    length = resolve_max_length(
        config.data.max_length, tokenizer_limit=pretrained.tokenizer.model_max_length, positions=pretrained.positions
    )
    return task, splits, pretrained, length


def require_scoring(config: Config) -> None:
    """Raises SettingsError, before anything is loaded, where the config has no scores."""
    if not config.quality.enabled:
        raise SettingsError("quality.enabled is false: there is nothing to score; set it to true")
    require_terms(config.quality.resolved_weights() or {}, trained_task(config))


def load_model(config: Config, task: Task, labels: LabelMap | None) -> Pretrained:
    """Load the pretrained model, with a head for these classes."""
    base = config.model
    set_seed(config.training.seed)
    return load_pretrained(
        base.path,
        labels=labels,
        generation=task if isinstance(task, Generation) else None,
        revision=base.revision,
        dtype=base.dtype,
        quantization=base.quantization,
        trust_remote_code=base.trust_remote_code,
    )


def with_slots(config: Config, pretrained: Pretrained) -> PeftModel:
    """Add LoRA at its first ranks, or at those of adapter.init_from, to the pretrained model in place."""
    adapter, ranks = config.adapter, config.ranks
    set_seed(config.training.seed)
    common: dict[str, Any] = {
        "max_rank": ranks.capacity(),
        "dropout": adapter.dropout,
        "modules_to_save": pretrained.new_modules,
    }
    if (start := start_of(config)) is not None:
        model = start_from(pretrained.model, start, **common)
    else:
        model = wrap(
            pretrained.model,
            mean_rank=ranks.mean,
            alpha=adapter.alpha,
            target_modules=adapter.target_modules,
            **common,
        )
    for written in model.peft_config.values():
        written.revision = config.model.revision  # of the base, by which PEFT loads it
    return model
