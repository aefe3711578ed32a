"""Settings: YAML in, a frozen typed `Config` out, and back.

Every setting is declared once, below, with its type, bounds, default and one line of
description; `template` prints them, and error messages are made from them.
"""

import dataclasses
import difflib
import math
import os
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from tsqlora.errors import SettingsError, nearest
from tsqlora.hub import is_revision
from tsqlora.yaml12 import MOST_BYTES, YamlProblem, dump_yaml, inline_yaml, load_yaml

# ------------------------------------------------------------------------------ settings

PresetName = Literal["default", "paper"]


class Preset(NamedTuple):
    """The weights of Q (METHOD eq. 4), and whether rows whose label seems wrong are left out (ours)."""

    gradient_norm: float
    loss_reduction: float
    convergence: float
    loss: float
    ifd: float
    reject: bool


PRESETS: Mapping[PresetName, Preset] = {
    "default": Preset(gradient_norm=0.0, loss_reduction=0.0, convergence=0.0, loss=0.0, ifd=0.0, reject=True),
    "paper": Preset(gradient_norm=1 / 3, loss_reduction=1 / 3, convergence=1 / 3, loss=0.0, ifd=0.0, reject=False),
}


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
    test: str | None = setting(None, "The same for the final test; null means none.")
    text: str | None = setting(None, "Column of the text; null finds the usual ones.")
    text_pair: str | None = setting(None, "Column of the second text; null finds the usual ones.")
    label: str | None = setting(None, "Column of the label; null finds the usual ones.")
    format: str | None = setting(None, "Row format of a generating model's data; null finds it by the columns.")
    prompt: str | None = setting(None, "Column of the prompt or document; null finds the usual ones.")
    target: str | None = setting(None, "Column of the text to be written; null finds the usual ones.")
    messages: str | None = setting(None, "Column of a chat's messages; null finds the usual ones.")
    max_length: int | None = setting(None, "Tokens kept of a sample; null is the model's own limit.", ge=1)
    max_target_length: int | None = setting(
        None, "Tokens that a target may have behind an encoder; null is max_length.", ge=1
    )
    packing: bool = setting(False, "Train a causal model on rows that several samples share, each as if alone.")
    validation_fraction: float = setting(
        0.1, "Share of the training rows used where no validation is given.", gt=0, lt=1
    )


class WeightSettings(Section):
    gradient_norm: float | None = setting(None, "Weight of the gradient norm in Q; null is the preset's.")
    loss_reduction: float | None = setting(None, "Weight of the loss reduction in Q; null is the preset's.")
    convergence: float | None = setting(None, "Weight of the convergence term in Q; null is the preset's.")
    loss: float | None = setting(None, "Weight of the loss in Q; null is the preset's.")
    ifd: float | None = setting(
        None, "Weight of the instruction-following difficulty in Q, of causal-lm; null is the preset's."
    )


class QualitySettings(Section):
    enabled: bool = setting(True, "Draw rows by quality; false draws the same share at random.")
    fraction: float = setting(0.5, "Share of the rows that an epoch trains on.", gt=0, le=1)
    preset: PresetName = setting("default", "Where weights and reject come from if not set.")
    reject: bool | None = setting(
        None, "Leave out rows whose label seems wrong, of classes, if there is evidence; null is the preset's."
    )
    weights: WeightSettings = setting(
        WeightSettings(), "Weights of the terms of Q; where all are 0, kept rows are drawn equally often."
    )
    temperature: float | None = setting(None, "Of the softmax over Q: small is choosy; null is 1.", gt=0)
    warmup: float = setting(1.0, "Passes over all rows, drawn at random, before scoring.", gt=0)
    warmup_limit: float = setting(0.5, "Share of the run after which a model still at chance is refused.", gt=0, le=1)
    resample: bool = setting(True, "Draw anew each epoch; false keeps the first draw.")
    scope: Literal["adapter", "full"] = setting(
        "adapter", "Gradients of what trains, or of the full target layers and the head."
    )
    reference: int = setting(512, "Rows whose mean gradient a sample is compared with.", ge=2)
    calibrate: bool = setting(True, "Correct a leaning to one class before scoring.")
    unbiased: bool = setting(
        False, "Weigh rows that a softmax over Q draws, so that the gradient stays that of all kept rows."
    )
    guard: bool = setting(True, "Draw at random where the rows that Q draws would teach less than random ones.")
    recheck: bool = setting(False, "Look for wrong labels again while none are evident and a third of the run is left.")
    harvest: bool = setting(False, "Keep each row's terms as training's own passes show them, in harvest.parquet.")

    def resolved_weights(self) -> dict[str, float] | None:
        """Weight of each term of Q: what is set, else the preset's; None where all are 0: no Q decides.

        >>> QualitySettings(weights=WeightSettings(gradient_norm=2.0)).resolved_weights()
        {'gradient_norm': 2.0, 'loss_reduction': 0.0, 'convergence': 0.0, 'loss': 0.0, 'ifd': 0.0}
        """
        preset = PRESETS[self.preset]._asdict()
        given = self.weights.model_dump()
        weights = {term: preset[term] if weight is None else weight for term, weight in given.items()}
        return weights if any(weights.values()) else None

    def weighted_terms(self) -> list[str]:
        """The terms that decide."""
        return [term for term, weight in (self.resolved_weights() or {}).items() if weight]

    def resolved_temperature(self) -> float:
        """Temperature of the softmax over Q."""
        return 1.0 if self.temperature is None else self.temperature

    def resolved_reject(self) -> bool | None:
        """Whether rows whose label seems wrong are left out; None: of classes, not of numbers."""
        if self.reject is None and PRESETS[self.preset].reject:
            return None if self.resolved_weights() is None else False
        return bool(self.reject)

    @model_validator(mode="after")
    def _weights_have_a_softmax(self) -> "QualitySettings":
        if self.unbiased and self.resolved_weights() is None:
            raise SettingsError(
                "quality.unbiased true is of a softmax over Q, and every weight of Q is 0; set quality.weights or "
                "quality.preset, or leave it out: rows drawn evenly need no weights"
            )
        if self.unbiased and self.harvest:
            raise SettingsError(
                "quality.harvest reads gradients that quality.unbiased weighs; set one of them to false"
            )
        return self

    @model_validator(mode="after")
    def _temperature_has_a_softmax(self) -> "QualitySettings":
        if self.temperature is not None and self.resolved_weights() is None:
            raise SettingsError(
                f"quality.temperature {self.temperature} is of a softmax over Q, and every weight of Q is 0; set "
                "quality.weights or quality.preset, or leave it out"
            )
        return self


class RankSettings(Section):
    policy: str = setting("tsqlora", "How ranks are chosen and change.")
    mean: float = setting(8.0, "Rank of a uniform LoRA of the same number of parameters.", gt=0, le=65536)
    min: int = setting(1, "Least rank of a layer; 0 may remove it.", ge=0)
    max: int | None = setting(None, "Greatest rank of a layer; null is twice the mean.", ge=1, le=65536)
    gamma: float = setting(1.0, "Ranks follow sensitivity to this power; 0 is uniform.", ge=0)
    estimator: str = setting("sampled", "How a layer's sensitivity is measured.")
    samples: int = setting(256, "Rows of the quality sample on which it is measured.", ge=1)
    interval: int | None = setting(None, "Optimizer steps between changes; null is 1/20 of the run, at least 10.", ge=1)
    warmup: float = setting(0.1, "Share of the run before ranks may change.", ge=0, lt=1)
    freeze: float = setting(0.3, "Share of the run at its end without changes.", ge=0, lt=1)
    moves: int | None = setting(None, "Ranks that may move in the first change; null is 1/4 of the layers.", ge=1)

    def resolved_max(self) -> int:
        """Greatest rank of a layer: what is set, else twice the mean, rounded up."""
        return math.ceil(2 * self.mean) if self.max is None else self.max

    @model_validator(mode="after")
    def _bounds_leave_room(self) -> "RankSettings":
        if self.min > self.resolved_max():
            raise SettingsError(
                f"ranks.min {self.min} is above ranks.max {self.resolved_max()}; lower it or raise ranks.max"
            )
        if self.warmup + self.freeze >= 1:
            raise SettingsError(
                f"ranks.warmup {self.warmup} and ranks.freeze {self.freeze} leave no steps in which ranks "
                "change; make their sum less than 1"
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
    "max_steps": "set training.epochs",
    "per_device_train_batch_size": "set training.batch_size",
    "per_device_eval_batch_size": "set training.eval_batch_size",
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

    epochs: int = setting(6, "Passes over the drawn share of the rows, warm-up included.", ge=1)
    learning_rate: float = setting(5e-4, "Peak learning rate.", gt=0)
    batch_size: int = setting(16, "Samples of a training batch on each device.", ge=1)
    eval_batch_size: int = setting(64, "Samples of an evaluation batch.", ge=1)
    bf16: bool | None = setting(None, "Compute in bfloat16; null does where the hardware has it.")
    seed: int = setting(0, "Of every random draw.", ge=0, lt=2**32)

    def further_arguments(self) -> dict[str, Any]:
        """The settings that are handed on to `transformers.TrainingArguments` as they are."""
        return dict(self.model_extra or {})

    @model_validator(mode="after")
    def _further_names_are_known(self) -> "TrainingSettings":
        names = self.further_arguments()
        for name in sorted(names.keys() & REFUSED_ARGUMENTS.keys()):
            raise SettingsError(f"'training.{name}' cannot be set; {REFUSED_ARGUMENTS[name]}")
        known = _trainer_arguments() if names else frozenset[str]()
        for name in sorted(names.keys() - known):
            raise SettingsError(_unknown_training_key(name, known))
        return self


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


# ------------------------------------------------------------------------ load and dump


def load_config(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Config:
    """The settings in a YAML file, checked.

    `overrides` are `key.key=value` with the value in YAML; they win over the file. A relative
    `model.path` or data file is looked for in the working directory, then beside the file, and
    made absolute where found; what is not found is left as it is: a hub id.

    Raises `SettingsError` naming the file (or `--set`), the dotted key, its value and the cure.
    """
    raw = _read(path)
    assignments = [_parse_override(override) for override in overrides]
    for key, value in assignments:
        _assign(raw, key, value)
    # Empty sections in place of absent ones: a missing key is then reported under its full name.
    sections: dict[str, Any] = {name: {} for name in Config.model_fields}
    try:
        config = Config.model_validate(sections | raw)
    except ValidationError as error:
        message = _explain(error.errors(), raw)
        overridden = any(key in message for key, _ in assignments)
        raise SettingsError(f"{'--set' if overridden else path}: {message}") from None
    return _with_absolute_paths(config, Path(path).parent)


def _read(path: str | os.PathLike[str]) -> dict[str, Any]:
    try:
        with open(path, "rb") as file:
            content = file.read(MOST_BYTES + 1)
    except OSError as error:
        raise SettingsError(
            f"{path}: cannot be read ({error.strerror}); 'tsqlora init -o FILE' writes a file to start from"
        ) from None
    try:
        raw = load_yaml(content)
    except YamlProblem as error:
        raise SettingsError(f"{path}: not valid YAML: {error}") from None
    if raw is None:
        return {}
    if not isinstance(raw, dict):
        raise SettingsError(f"{path}: holds a {type(raw).__name__}, not settings; write sections, such as 'model:'")
    return raw


def dump_config(config: Config) -> str:
    """YAML with every setting, which `load_config` reads back to an equal `Config`."""
    return dump_yaml(config.model_dump())


def template(task: str | None = None) -> str:
    """YAML to start from: every setting with its description, type and default; it loads as it is."""
    example = {"model.path": "sentence-transformers/all-MiniLM-L6-v2", "data.train": "train.jsonl"}
    if task is not None:
        example["task.type"] = task
    lines = ["# Settings of a tsqlora run. What is left out has its default.", *_describe(Config, example)]
    return "\n".join(lines) + "\n"


def _describe(section: type[Section], example: Mapping[str, str], prefix: str = "") -> list[str]:
    indent = "  " * prefix.count(".")
    lines: list[str] = []
    for name, field in section.model_fields.items():
        key = f"{prefix}{name}"
        lines += [*([] if prefix else [""]), f"{indent}# {field.description}"]
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, Section):
            lines += [f"{indent}{name}:", *_describe(inner, example, f"{key}.")]
            continue
        default = "required" if field.is_required() else f"default {inline_yaml(field.default)}"
        value = inline_yaml(example.get(key, field.default))
        lines.append(f"{indent}{name}: {value}  # {_allowed(field)}; {default}")
    return lines


def _with_absolute_paths(config: Config, beside: Path) -> Config:
    data = config.data
    files = {name: _locate(getattr(data, name), beside) for name in ("train", "validation", "test")}
    model = config.model.model_copy(update={"path": _locate(config.model.path, beside)})
    adapter = config.adapter.model_copy(update={"init_from": _locate(config.adapter.init_from, beside)})
    return config.model_copy(update={"model": model, "adapter": adapter, "data": data.model_copy(update=files)})


def _locate(path: str | None, beside: Path) -> str | None:
    if path is None:
        return None
    # os.path, not pathlib: exists() of the latter raises for names that no file can have.
    here = (candidate for candidate in (path, os.path.join(beside, path)) if os.path.exists(candidate))
    found = next(here, None)
    return path if found is None else os.path.abspath(found)


# ------------------------------------------------------------------------------ overrides


_MOST_DOTS = 9


def _parse_override(override: str) -> tuple[str, Any]:
    key, equals, text = override.partition("=")
    if not equals or not all(key.split(".")) or key.count(".") > _MOST_DOTS:
        raise SettingsError(f"--set: {override!r} is not key.key=value, such as quality.fraction=0.3")
    try:
        return key, load_yaml(text)
    except YamlProblem as error:
        raise SettingsError(f"--set: the value of {override!r} is not YAML ({error}); put it in quotes") from None


def _assign(raw: dict[str, Any], key: str, value: object) -> None:
    *sections, name = key.split(".")
    here = raw
    for depth, section in enumerate(sections, start=1):
        if here.get(section) is None:
            here[section] = {}
        here = here[section]
        if not isinstance(here, dict):
            parent = ".".join(sections[:depth])
            raise SettingsError(f"--set: unknown key {key!r}; {parent!r} has no settings under it")
    here[name] = value


# ------------------------------------------------------------------------------- messages


def _explain(errors: Sequence[ErrorDetails], raw: Mapping[str, Any]) -> str:
    """What is most worth telling of a failed validation, with its dotted key.

    A mistyped key comes first: it is often why another is missing.
    """
    for error in errors:
        if error["type"] == "extra_forbidden":
            return _unknown_key(error["loc"])
    missing = [".".join(map(str, error["loc"])) for error in errors if error["type"] == "missing"]
    if missing:
        return f"{' and '.join(missing)} must be set; 'tsqlora init' prints an example"
    raised = errors[0].get("ctx", {}).get("error")
    if isinstance(raised, SettingsError):
        return str(raised)
    return _wrong_value(*_field_at(errors[0]["loc"]), raw)


def _unknown_key(loc: Sequence[int | str]) -> str:
    *sections, name = map(str, loc)
    section: type[Section] = Config
    for part in sections:
        section = _section_of(section.model_fields[part])
    return f"unknown key {'.'.join([*sections, name])!r}; {nearest(name, section.model_fields)}"


def _wrong_value(key: str, field: FieldInfo, raw: Mapping[str, Any]) -> str:
    value: Any = raw
    for part in key.split("."):
        value = value[part]
    shown = repr(value) if isinstance(value, str) else inline_yaml(value)
    if _is_section(field):
        return f"{key} is {shown}; it takes settings under it: {', '.join(_section_of(field).model_fields)}"
    unquoted = isinstance(value, int | float) and str in _members(field.annotation)
    hint = ", in quotes" if unquoted else ", not empty" if value in ("", []) else ""
    return f"{key} is {shown}; it takes {_allowed(field)}{hint}"


def _field_at(loc: Sequence[int | str]) -> tuple[str, FieldInfo]:
    """The setting that an error is about; pydantic appends union members and list positions."""
    names = [str(loc[0])]
    field = Config.model_fields[names[0]]
    for part in map(str, loc[1:]):
        if not _is_section(field):
            break
        names.append(part)
        field = _section_of(field).model_fields[part]
    return ".".join(names), field


def _is_section(field: FieldInfo) -> bool:
    return isinstance(field.annotation, type) and issubclass(field.annotation, Section)


def _section_of(field: FieldInfo) -> type[Section]:
    assert isinstance(field.annotation, type)
    assert issubclass(field.annotation, Section)
    return field.annotation


_WORDS = {
    str: "text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    list[str]: "a list of texts",
    types.NoneType: "null",
}
_BOUNDS = {Gt: ("gt", ">"), Ge: ("ge", ">="), Lt: ("lt", "<"), Le: ("le", "<=")}


def _allowed(field: FieldInfo) -> str:
    """What a setting takes, in words: 'a number > 0 and <= 1, or null'."""
    first, *others = [_in_words(member) for member in _members(field.annotation)]
    bounds = [
        f"{symbol} {getattr(bound, attribute)}"
        for kind, (attribute, symbol) in _BOUNDS.items()
        for bound in field.metadata
        if isinstance(bound, kind)
    ]
    first = " ".join([first, " and ".join(bounds)]).strip()
    return ", or ".join([first, *others])


def _members(annotation: Any) -> tuple[Any, ...]:
    is_union = get_origin(annotation) in (Union, types.UnionType)
    return get_args(annotation) if is_union else (annotation,)


def _in_words(annotation: Any) -> str:
    if get_origin(annotation) is Literal:
        return " or ".join(map(str, get_args(annotation)))
    return _WORDS[annotation]


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
