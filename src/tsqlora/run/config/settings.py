"""Every setting, declared once: its type, bounds, default and one line of description.

`template` prints them, and messages about wrong ones are made from them.
"""

import dataclasses
import difflib
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from pydantic.fields import FieldInfo

from tsqlora.compat.hub import is_revision
from tsqlora.errors import SettingsError, nearest
from tsqlora.ranks.budget import default_max_rank

PresetName = Literal["default", "paper"]


PRESETS: Mapping[PresetName, Mapping[str, float]] = {
    "default": {},
    "paper": {"gradient_norm": 1 / 3, "loss_reduction": 1 / 3, "convergence": 1 / 3},
}
"""Weights of the terms of Q (METHOD eq. 4). Without weights, no Q decides."""


class Section(BaseModel):
    """A mapping of settings: frozen, no unknown keys, no silent conversion, no empty text."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, str_min_length=1)

    @model_validator(mode="before")
    @classmethod
    def _nothing_under_it_is_all_defaults(cls, given: Any) -> Any:
        return {} if given is None else given


def setting(default: Any, description: str, **bounds: Any) -> Any:
    """A field with a default. One without is a plain `Field`, and must be set."""
    return Field(default=default, description=description, **bounds)


def section_of(field: FieldInfo) -> type[Section] | None:
    """The section that a field holds; None for a setting."""
    kind = field.annotation
    return kind if isinstance(kind, type) and issubclass(kind, Section) else None


class ModelSettings(Section):
    path: str = Field(description="Directory or hub id of the model to adapt.")
    revision: str | None = setting(None, "Branch, tag or commit of a hub model.")
    dtype: Literal["float32", "bfloat16", "float16"] = setting("float32", "What the frozen weights are loaded as.")
    quantization: Literal["4bit", "8bit"] | None = setting(
        None, "Pack the frozen linear layers by bitsandbytes, 4bit as NF4; they compute in dtype. Null packs none."
    )
    trust_remote_code: bool = setting(False, "Run code that comes with the model.")

    @model_validator(mode="after")
    def _revision_is_no_path(self) -> "ModelSettings":
        if self.revision is not None and not is_revision(self.revision):
            raise SettingsError(f"model.revision is {self.revision!r}; it takes a branch, a tag or a commit")
        return self


class TaskSettings(Section):
    type: str = setting(
        "sequence-classification", "What the model learns: sequence-classification, regression, causal-lm, seq2seq."
    )
    max_new_tokens: int = setting(64, "Tokens that a generating model may write.", ge=1)
    beams: int = setting(1, "Beams of a search; 1 writes greedily.", ge=1)


class DataSettings(Section):
    train: str = Field(description="File, directory of splits, or hub id of the training rows.")
    validation: str | None = setting(None, "The same for validation; null takes a share of the training rows.")
    test: str | None = setting(None, "The same for the final test; null takes that beside data.train, if any.")
    trusted: str | None = setting(
        None,
        "Rows that look like what the model shall be good at; 32 to 200 are enough; they are trained on last.",
    )
    text: str | None = setting(None, "Column of the text; null finds the usual ones.")
    text_pair: str | None = setting(None, "Column of the second text; null finds the usual one if text is null, too.")
    label: str | None = setting(None, "Column of the label; null finds the usual ones.")
    format: str | None = setting(None, "Row format of a generating model's data; null finds it by the columns.")
    prompt: str | None = setting(None, "Column of the prompt or document; null finds the usual ones.")
    target: str | None = setting(None, "Column of the text to be written; null finds the usual ones.")
    messages: str | None = setting(None, "Column of a chat's messages; null finds the usual ones.")
    max_length: int | None = setting(None, "Tokens kept of a sample; null is the model's own limit.", ge=1)
    max_bad_rows: float = setting(
        0.05, "Share of a file's rows that may lack a text or a label, and are left out; 0 refuses any.", ge=0, lt=1
    )
    delimiter: str | None = setting(
        None, "Character between the columns of CSV files; null finds it.", min_length=1, max_length=1
    )
    encoding: str | None = setting(None, "Encoding of text files, such as cp1252; null finds it.")
    packing: bool = setting(False, "Train a causal model on rows that several samples share, each as if alone.")
    validation_fraction: float = setting(
        0.1, "Share of the training rows used where no validation is given.", gt=0, lt=1
    )

    @model_validator(mode="after")
    def _files_can_be_read_so(self) -> "DataSettings":
        if self.delimiter is not None and self.delimiter in '"\r\n':
            raise SettingsError(f"data.delimiter is {self.delimiter!r}; it takes a character such as , or ;")
        try:
            b"".decode(self.encoding or "utf-8")
        except (LookupError, ValueError):
            raise SettingsError(f"data.encoding is {self.encoding!r}, which Python does not know; cp1252?") from None
        return self


class QualitySettings(Section):
    enabled: bool = setting(True, "Select rows; false draws the same share at random, with the same head start.")
    fraction: float = setting(0.5, "Share of the rows that an epoch trains on.", gt=0, le=1)
    preset: PresetName = setting("default", "Where the weights that are not set come from; paper is the published Q.")
    reject: bool | None = setting(
        None, "Leave out rows whose label seems wrong; null does where classes are drawn without weights."
    )
    weights: dict[str, float] = setting(
        {}, "Weights of the terms of Q; where none is above 0, kept rows are drawn equally often."
    )
    temperature: float | None = setting(None, "Of the softmax over Q: small is choosy; null is 1.", gt=0)
    gate: Literal["share", "surest"] | None = setting(
        None, "Leave out rows that a model of the trusted rows alone disagrees with; null leaves out none."
    )
    head_start: bool = setting(True, "Fit a new head before the first step.")
    look_again: bool = setting(True, "Look at all rows again after a third of the steps.")
    resample: bool = setting(True, "Sample fresh rows each epoch; false keeps the first draw.")

    def resolved_weights(self) -> dict[str, float] | None:
        """Weight of each term of Q: what is set, else the preset's; None where all are 0: no Q decides.

        >>> QualitySettings(weights={"gradient_norm": 2.0, "loss": 0.0}).resolved_weights()
        {'gradient_norm': 2.0}
        """
        weights = {term: weight for term, weight in ({**PRESETS[self.preset], **self.weights}).items() if weight}
        return weights or None

    def resolved_temperature(self) -> float:
        """Temperature of the softmax over Q."""
        return 1.0 if self.temperature is None else self.temperature

    def resolved_reject(self) -> bool | None:
        """Whether rows whose label seems wrong are left out; None: of classes, not of numbers."""
        if self.reject is None:
            return None if self.resolved_weights() is None else False
        return self.reject

    @field_validator("weights", mode="before")
    @classmethod
    def _null_is_the_presets(cls, given: Any) -> Any:
        given = {} if given is None else given
        return {term: weight for term, weight in given.items() if weight is not None} if type(given) is dict else given

    @model_validator(mode="after")
    def _terms_exist(self) -> "QualitySettings":
        if self.weights:
            from tsqlora.quality.terms import TERMS  # imports torch

            for term in self.weights.keys() - TERMS.keys():
                raise SettingsError(f"unknown key 'quality.weights.{term}'; {nearest(term, TERMS)}")
        if self.temperature is not None and self.resolved_weights() is None:
            raise SettingsError(
                f"quality.temperature {self.temperature} needs softmax sampling, but all weights are 0; set "
                "quality.weights or quality.preset, or remove it"
            )
        return self


class RankSettings(Section):
    policy: str = setting("fixed", "fixed: every layer keeps the mean rank; tsqlora: ranks follow sensitivity.")
    mean: float = setting(8.0, "Rank of a uniform LoRA of the same number of parameters.", gt=0, le=65536)
    min: int = setting(1, "Least rank of a layer; 0 may remove it.", ge=0)
    max: int | None = setting(None, "Greatest rank of a layer; null is twice the mean.", ge=1, le=65536)
    estimator: str = setting(
        "sampled", "How a layer's sensitivity is measured: sampled, sensitivity, fisher, adapter, uniform, random."
    )
    interval: int | None = setting(None, "Optimizer steps between changes; null is 1/20 of the run, at least 10.", ge=1)

    def resolved_max(self) -> int:
        """Greatest rank of a layer: what is set, else twice the mean, rounded up."""
        return default_max_rank(self.mean) if self.max is None else self.max

    def capacity(self) -> int:
        """The rank that layers are built with: ranks that stay as they are need no room to grow."""
        return math.ceil(self.mean) if self.policy == "fixed" and self.max is None else self.resolved_max()

    @model_validator(mode="after")
    def _bounds_leave_room(self) -> "RankSettings":
        if self.min > self.resolved_max():
            raise SettingsError(
                f"ranks.min {self.min} is above ranks.max {self.resolved_max()}; lower it or raise ranks.max"
            )
        return self


class AdapterSettings(Section):
    alpha: float = setting(16.0, "The update is scaled by alpha / ranks.mean, at every rank.", gt=0)
    dropout: float = setting(0.0, "Dropout on the adapter's input.", ge=0, lt=1)
    target_modules: str | list[str] = setting(
        "all-linear", "Layers to adapt: names, a pattern, or all-linear.", min_length=1
    )
    init_from: str | None = setting(
        None, "Adapter, or run, to go on from; alpha, target_modules and ranks.mean are then its own."
    )


# TrainingArguments that another setting decides, or that would break the method: the cure of each.
REFUSED_ARGUMENTS: Mapping[str, str] = {
    "num_train_epochs": "set training.epochs",
    "per_device_train_batch_size": "set training.batch_size",
    "output_dir": "give the run directory as --out",
    "resume_from_checkpoint": "give --resume",
    "hub_token": "log in with `hf auth login` or set HF_TOKEN: settings are copied into the run's files",
    "data_seed": "set training.seed, which decides the draws too",
    "group_by_length": "leave it out: the order of the rows is the draw's",
    "train_sampling_strategy": "leave it out: the order of the rows is the draw's",
    "dataloader_drop_last": "leave it out: every drawn row is trained on",
    "dataloader_persistent_workers": "leave it out: such workers would keep the first epoch's draw",
    "remove_unused_columns": "leave it out: the columns that a task needs are chosen by the task",
}


class TrainingSettings(Section):
    """What we set, and any further field of `transformers.TrainingArguments`."""

    model_config = ConfigDict(extra="allow")

    epochs: float = setting(6, "Passes over the drawn share of the rows; 0.5 is half of one.", gt=0)
    max_steps: int | None = setting(None, "Optimizer steps; null trains for epochs.", ge=1)
    learning_rate: float = setting(5e-4, "Peak learning rate.", gt=0)
    batch_size: int = setting(16, "Samples of a training batch on each device.", ge=1)
    seed: int = setting(0, "Of every random draw.", ge=0, lt=2**32)

    def further_arguments(self) -> dict[str, Any]:
        """The settings that are handed on to `transformers.TrainingArguments` as they are."""
        return dict(self.model_extra or {})

    @field_validator("epochs")
    @classmethod
    def _whole_epochs_are_written_as_integers(cls, epochs: float) -> float:
        return int(epochs) if epochs.is_integer() else epochs

    @model_validator(mode="before")
    @classmethod
    def _bf16_null_is_not_set(cls, given: Any) -> Any:
        if isinstance(given, dict) and given.get("bf16", 0) is None:  # as version 0.1 wrote it
            return {name: value for name, value in given.items() if name != "bf16"}
        return given

    @model_validator(mode="after")
    def _further_names_are_known(self) -> "TrainingSettings":
        names = self.further_arguments()
        for name in sorted(names.keys() & REFUSED_ARGUMENTS.keys()):
            raise SettingsError(f"'training.{name}' cannot be set; {REFUSED_ARGUMENTS[name]}")
        known = _trainer_arguments() if names else frozenset[str]()
        for name in sorted(names.keys() - known):
            raise SettingsError(_unknown_training_key(name, known))
        return self


class Removed(NamedTuple):
    """A setting that no longer exists: its former default, and where it went or why."""

    default: Any
    why: str


# A file that has one at its former default still loads: the run that it describes is the same.
REMOVED_SETTINGS: Mapping[str, Removed] = {
    "data.max_target_length": Removed(None, "set data.max_length, which targets behind an encoder have too"),
    "quality.warmup": Removed(1.0, "rows are looked at before the first step; remove it"),
    "quality.warmup_limit": Removed(0.5, "rows are looked at before the first step; remove it"),
    "quality.scope": Removed("adapter", "it is an argument of tsqlora.score and QualityCallback; remove it"),
    "quality.reference": Removed(512, "it is an argument of tsqlora.score and QualityCallback; remove it"),
    "quality.calibrate": Removed(True, "it is the argument calibration of tsqlora.score; remove it"),
    "quality.guard": Removed(True, "it is an argument of QualityCallback; remove it"),
    "quality.unbiased": Removed(False, "rows drawn by Q taught less than random rows also with weights; leave it out"),
    "quality.recheck": Removed(False, "a second look for wrong labels did not help; leave it out"),
    "quality.harvest": Removed(False, "terms from training's own passes hardly know wrong labels; use tsqlora score"),
    "ranks.gamma": Removed(1.0, "it is an argument of RankSchedule and tsqlora.allocate; remove it"),
    "ranks.samples": Removed(256, "it is an argument of RankCallback; remove it"),
    "ranks.warmup": Removed(0.1, "it is an argument of RankSchedule; remove it"),
    "ranks.freeze": Removed(0.3, "it is an argument of RankSchedule; remove it"),
    "ranks.moves": Removed(None, "it is an argument of RankSchedule; remove it"),
    "training.eval_batch_size": Removed(64, "set training.per_device_eval_batch_size"),
}


class Config(Section):
    """Every setting of a run."""

    model: ModelSettings = Field(description="The pretrained model.")
    task: TaskSettings = setting(TaskSettings(), "The task.")
    data: DataSettings = Field(description="The rows: JSON lines, CSV, TSV, Parquet, or from the hub.")
    quality: QualitySettings = setting(QualitySettings(), "Which rows are worth learning from.")
    ranks: RankSettings = setting(RankSettings(), "The rank of each layer.")
    adapter: AdapterSettings = setting(AdapterSettings(), "The LoRA adapter.")
    training: TrainingSettings = setting(
        TrainingSettings(), "The training; any field of transformers.TrainingArguments may be added."
    )

    @model_validator(mode="before")
    @classmethod
    def _drop_removed_settings(cls, given: Any) -> Any:
        return without_removed(given)


def without_removed(given: Any, *, any_value: bool = False) -> Any:
    """The mapping without REMOVED_SETTINGS.

    Raises SettingsError for one that has another value than its former default, unless `any_value` allows it.
    """
    for key, removed in REMOVED_SETTINGS.items():
        given = _without(given, key.split("."), None if any_value else removed, key)
    return given


def _without(given: Any, path: Sequence[str], removed: Removed | None, key: str) -> Any:
    name, *inner = path
    if not isinstance(given, dict) or name not in given:
        return given
    if inner:
        return given | {name: _without(given[name], inner, removed, key)}
    if removed is not None and given[name] != removed.default:
        raise SettingsError(f"{key} was removed: {removed.why}")
    return {other: value for other, value in given.items() if other != name}


def _trainer_arguments() -> frozenset[str]:
    # Imported only when needed: it takes seconds.
    from transformers import TrainingArguments

    return frozenset(field.name for field in dataclasses.fields(TrainingArguments))


def _unknown_training_key(name: str, trainer_arguments: frozenset[str]) -> str:
    ours = list(TrainingSettings.model_fields)
    theirs = sorted(trainer_arguments - REFUSED_ARGUMENTS.keys())
    close = difflib.get_close_matches(name, [*ours, *theirs], n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return (
        f"unknown key 'training.{name}'; {hint}choices: {', '.join(ours)}, or a field of transformers.TrainingArguments"
    )
