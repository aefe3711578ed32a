"""Every setting: its type, bounds, default and one line of description."""

import ast
import copy
import difflib
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator
from pydantic.fields import FieldInfo

from tsqlora.errors import SettingsError
from tsqlora.libs.hub import is_revision
from tsqlora.moved import MOVED, drop_settings
from tsqlora.rows.readers import Hints

# TrainingArguments that another setting decides, or that would break the method, with their cures.
REFUSED_ARGUMENTS: Mapping[str, str] = {
    "num_train_epochs": "set training.epochs",
    "per_device_train_batch_size": "set training.batch_size",
    "output_dir": "give the run directory as --out",
    "resume_from_checkpoint": "give --resume",
    "hub_token": "log in with `hf auth login` or set HF_TOKEN: settings are copied into the run's files",
    "data_seed": "set training.seed, which decides the draws too",
    "train_sampling_strategy": "remove it: the draw decides the order of rows",
    "dataloader_drop_last": "remove it: every drawn row is trained on",
    "dataloader_persistent_workers": "remove it: such workers would repeat the first epoch's draw",
    "remove_unused_columns": "remove it: the task chooses its columns",
}

PresetName = Literal["default", "paper"]

OF_CLASSES = ("sequence-classification", "multi-label-classification", "token-classification")
"""Tasks whose rows are texts with classes, which the embedded model can read."""
TASK_TYPES = (
    *OF_CLASSES,
    "regression",
    "preference",
    "causal-lm",
    "seq2seq",
    "image-classification",
    "audio-classification",
)
"""The names of `tsqlora.tasks.TASKS`, which imports torch."""
CAUSAL_TASKS = ("preference", "causal-lm")
"""Those that an audit of text reads."""

PRESETS: Mapping[PresetName, Mapping[str, float] | None] = {
    "default": None,
    "paper": {"gradient_norm": 1 / 3, "loss_reduction": 1 / 3, "convergence": 1 / 3},
}
"""Weights of the terms of Q (docs/method.md eq. 4).  Without weights, rows are drawn evenly."""


class Section(BaseModel):
    """A mapping of settings: frozen, without unknown keys, silent conversions and empty texts."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, str_min_length=1)

    @model_validator(mode="before")
    @classmethod
    def _null_means_defaults(cls, values: Any) -> Any:
        return {} if values is None else values


def setting(default: Any, description: str, **bounds: Any) -> Any:
    """A field with a default.  A required one is a plain `Field`."""
    return Field(default=default, description=description, **bounds)


def section_of(field: FieldInfo) -> type[Section] | None:
    """The section of a field; None for a setting."""
    kind = field.annotation
    return kind if isinstance(kind, type) and issubclass(kind, Section) else None


class ModelSettings(Section):
    path: str = Field(description="Directory or hub id of the model to adapt.")
    revision: str | None = setting(None, "Branch, tag or commit of a hub model.")
    dtype: Literal["float32", "bfloat16", "float16"] = setting("float32", "Type of the frozen weights.")
    quantization: Literal["4bit", "8bit"] | None = setting(
        None, "Quantise the frozen linear layers with bitsandbytes, 4bit as NF4; they compute in dtype."
    )
    trust_remote_code: bool = setting(False, "Run code from the model's repository.")

    @model_validator(mode="after")
    def _revision_is_not_a_path(self) -> "ModelSettings":
        if self.revision is not None and not is_revision(self.revision):
            raise SettingsError(f"model.revision is {self.revision!r}; give a branch, a tag or a commit")
        return self


class TaskSettings(Section):
    type: str = setting("sequence-classification", f"What the model learns: {', '.join(TASK_TYPES)}.")
    max_new_tokens: int = setting(64, "Most tokens that a generating model writes.", ge=1)
    beams: int = setting(1, "Beams of the search; 1 is greedy.", ge=1)

    @property
    def causal(self) -> bool:
        """Whether the model goes on writing a text."""
        return self.type in CAUSAL_TASKS

    @property
    def of_other_rows(self) -> bool:
        """Whether the rows are no texts with classes; those of a task that is not listed may be anything."""
        return self.type not in OF_CLASSES


class DataSettings(Section):
    train: str = Field(description="Training rows: a file, a directory of splits or of classes of files, or a hub id.")
    validation: str | None = setting(None, "Validation rows; null holds out a share of the training rows.")
    test: str | None = setting(None, "Test rows; null takes those beside data.train, if any.")
    trusted: str | None = setting(None, "Checked rows of the kind that the model must handle well; about 100.")
    text: str | None = setting(None, "Column of the text, or of the path of an image or recording; null detects it.")
    text_pair: str | None = setting(None, "Column of the second text; null detects it, unless data.text is set.")
    label: str | None = setting(None, "Column of the label; null detects it.")
    format: str | None = setting(None, "Row format for text generation; null detects it by the columns.")
    prompt: str | None = setting(None, "Column of the prompt or document; null detects it.")
    target: str | None = setting(None, "Column of the text to generate; null detects it.")
    messages: str | None = setting(None, "Column of a chat's messages; null detects it.")
    max_length: int | None = setting(None, "Most tokens of a sample, or 20 ms steps; null is the model's limit.", ge=1)
    max_bad_rows: float = setting(
        0.05,
        "Share of a file's rows that may lack a text or a label, or be refused by the chat template, and are left out; "
        "0 refuses any, and with 1 an error in all rows stops no training.",
        ge=0,
        le=1,
    )
    delimiter: str | None = setting(
        None, "Character between the columns of CSV files; null detects it.", min_length=1, max_length=1
    )
    encoding: str | None = setting(None, "Encoding of text files, such as cp1252; null detects it.")
    quoting: Literal["quoted", "literal"] | None = setting(
        None, "Whether quotes in CSV files enclose fields or belong to the text; null detects it."
    )
    sheet: str | None = setting(None, "Sheet of a spreadsheet; null takes the only one that has rows.")
    validation_fraction: float = setting(
        0.1, "Share of the training rows to hold out if there are no validation rows.", gt=0, lt=1
    )

    @property
    def hints(self) -> Hints:
        """The settings about how files are written."""
        return Hints(self.delimiter, self.encoding, self.quoting, self.sheet)

    @model_validator(mode="after")
    def _files_can_be_read(self) -> "DataSettings":
        if self.delimiter is not None and self.delimiter in '"\r\n':
            raise SettingsError(f"data.delimiter is {self.delimiter!r}; give a character such as , or ;")
        try:
            "a".encode(self.encoding or "utf-8")  # an empty text would look no codec up
        except (LookupError, ValueError):
            raise SettingsError(
                f"data.encoding is {self.encoding!r}, which Python does not support; give one such as cp1252"
            ) from None
        return self


class QualitySettings(Section):
    enabled: bool = setting(True, "Select rows; false draws the same share at random, with the same head start.")
    fraction: float = setting(0.5, "Share of the rows in an epoch.", gt=0, le=1)
    preset: PresetName = setting(
        "default", "default draws rows evenly, text with trusted rows by density_ratio; paper by the published Q."
    )
    head_start: bool = setting(True, "Fit a new head before the first step.")


class RankSettings(Section):
    policy: Literal["fixed", "tsqlora"] = setting(
        "fixed", "fixed: every layer keeps the mean rank; tsqlora: ranks follow sensitivity."
    )
    mean: float = setting(8.0, "Rank of a uniform LoRA of the same number of parameters.", gt=0, le=65536)
    min: int = setting(1, "Least rank of a layer; 0 may remove it.", ge=0)
    max: int | None = setting(None, "Greatest rank of a layer; null is twice the mean.", ge=1, le=65536)
    interval: int | None = setting(None, "Optimizer steps between changes; null is 1/20 of the run, at least 10.", ge=1)

    @property
    def moves(self) -> bool:
        """Whether ranks move while the model trains."""
        return self.policy != "fixed"

    @model_validator(mode="after")
    def _bounds_leave_room(self) -> "RankSettings":
        if self.min > self.mean:
            raise SettingsError(
                f"ranks.min {self.min} is above ranks.mean {self.mean:g}, the budget; lower it, or raise ranks.mean"
            )
        return self


class AdapterSettings(Section):
    alpha: float = setting(16.0, "The update is scaled by alpha / ranks.mean, at every rank.", gt=0)
    dropout: float = setting(0.0, "Dropout on the adapter's input.", ge=0, lt=1)
    target_modules: str | list[str] = setting(
        "all-linear", "Layers to adapt: names, a pattern, or all-linear.", min_length=1
    )
    init_from: str | None = setting(
        None, "Adapter or run to continue; it decides alpha, target_modules and ranks.mean."
    )


class TrainingSettings(Section):
    """Our own settings, and any further field of `transformers.TrainingArguments`."""

    model_config = ConfigDict(extra="allow")

    epochs: float = setting(6, "Passes over the drawn share of the rows; may be a fraction.", gt=0)
    learning_rate: float = setting(5e-4, "Peak learning rate.", gt=0)
    batch_size: int = setting(16, "Samples of a training batch on each device.", ge=1)
    seed: int = setting(0, "Seed of every random draw.", ge=0, lt=2**32)

    def further_arguments(self) -> dict[str, Any]:
        """The settings that go to `transformers.TrainingArguments` unchanged."""
        return dict(self.model_extra or {})

    @property
    def steps(self) -> int | None:
        """Optimizer steps by max_steps, a field of TrainingArguments; None trains for epochs."""
        return self.further_arguments().get("max_steps")

    @field_validator("epochs")
    @classmethod
    def _whole_epochs_are_integers(cls, epochs: float) -> float:
        return int(epochs) if epochs.is_integer() else epochs

    @model_validator(mode="before")
    @classmethod
    def _null_is_unset(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        # Earlier versions wrote these.
        return {name: x for name, x in values.items() if not (name in ("bf16", "max_steps") and x is None)}

    @model_validator(mode="after")
    def _further_names_exist(self) -> "TrainingSettings":
        names = self.further_arguments()
        for name in sorted(names.keys() & REFUSED_ARGUMENTS.keys()):
            raise SettingsError(f"'training.{name}' cannot be set; {REFUSED_ARGUMENTS[name]}")
        fields = _trainer_arguments() if names else frozenset[str]()
        for name in sorted(names.keys() - fields):
            raise SettingsError(_unknown_training_key(name, fields))
        if self.steps is not None and (type(self.steps) is not int or self.steps < 1):
            raise SettingsError(f"training.max_steps is {self.steps!r}; give a whole number of steps, 1 or more")
        return self


class Config(Section):
    """Every setting of a run."""

    model: ModelSettings = Field(description="The pretrained model.")
    task: TaskSettings = setting(TaskSettings(), "The task.")
    data: DataSettings = Field(description="The rows: JSON lines, CSV, TSV, Parquet, Excel, or from the hub.")
    quality: QualitySettings = setting(QualitySettings(), "Which rows to learn from.")
    ranks: RankSettings = setting(RankSettings(), "The rank of each layer.")
    adapter: AdapterSettings = setting(AdapterSettings(), "The LoRA adapter.")
    training: TrainingSettings = setting(
        TrainingSettings(), "The training; any field of transformers.TrainingArguments may be added."
    )

    @model_validator(mode="before")
    @classmethod
    def _drop_removed_settings(cls, values: Any, info: ValidationInfo) -> Any:
        """Raises SettingsError for a removed setting that is not at its former default, unless the run is `trained`."""
        if isinstance(values, dict):
            values = copy.deepcopy(values)
            drop_settings(values, trained=bool(info.context and info.context.get("trained")))
        return values


def _trainer_arguments() -> frozenset[str]:
    # From its source, since importing it takes seconds.
    source = Path(find_spec("transformers").origin).with_name("training_args.py")  # pyright: ignore
    classes = (node for node in ast.parse(source.read_bytes()).body if isinstance(node, ast.ClassDef))
    own = next(node for node in classes if node.name == "TrainingArguments")
    return frozenset(ast.unparse(node.target) for node in own.body if isinstance(node, ast.AnnAssign))


def _unknown_training_key(name: str, trainer_arguments: frozenset[str]) -> str:
    ours = list(TrainingSettings.model_fields)
    theirs = sorted(trainer_arguments - REFUSED_ARGUMENTS.keys())
    meant = MOVED["elsewhere"].get(name) or next(iter(difflib.get_close_matches(name, [*ours, *theirs], n=1)), None)
    hint = f"did you mean {meant!r}? " if meant else ""
    return (
        f"unknown key 'training.{name}'; {hint}choices: {', '.join(ours)}, or a field of transformers.TrainingArguments"
    )
