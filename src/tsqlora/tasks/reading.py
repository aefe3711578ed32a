"""How rows reach a model: as a text, or as an image or a recording; other tasks change what differs."""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeVar

import numpy as np
from torch import Tensor, nn
from transformers import AutoFeatureExtractor, AutoImageProcessor, AutoTokenizer, PreTrainedTokenizerBase

from tsqlora.errors import SettingsError, UnsupportedError
from tsqlora.libs.transformers import load, without_named_files
from tsqlora.rows.batches import collator
from tsqlora.rows.chat import Format
from tsqlora.rows.labels import CLASS, LabelKind, LabelMap
from tsqlora.rows.media import MediaCollator, as_paths, encode_files
from tsqlora.rows.rows import Columns, find_columns
from tsqlora.rows.splits import Find, resolve_max_length
from tsqlora.rows.tokens import Encode, least_prompt, tokenise
from tsqlora.tasks.forward import Collate, model_logits

T = TypeVar("T")


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Reading:
    """How rows become batches, and which model takes them.

    Others call its methods; what it holds of a task is read in tasks/ alone.
    """

    auto: str
    """The class of transformers that loads the model."""
    pipeline: str | None
    """The Hub's name for what such a model does."""
    find: Find
    encode: Encode
    collate: Callable[..., Collate]
    """Takes the model, its tokenizer or processor, and `max_length`."""
    logits: Callable[[nn.Module, Mapping[str, Tensor]], Tensor]
    """Runs the model on inputs: n × k, or n × t × k where every token has logits."""
    processor: Callable[..., Any]
    """Loads the tokenizer, image processor or feature extractor of a checkpoint, with the model's config."""
    label: LabelKind | None = None
    """What a cell holds of the classes; None for numbers and texts."""
    problem_type: str | None = None
    """By which a model of transformers chooses its own loss."""
    settings: tuple[str, ...] = ("text", "text_pair", "label")
    """The settings of `data` that `find` takes."""
    foreign: Mapping[str, str | None] = field(default_factory=dict)
    """Settings without effect, each with the one to set in its place."""
    trainer: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of the Trainer that such rows need."""
    media: str | None = None
    """ "image" or "audio" where a row is a file."""
    whole: bool = False
    """Whether the checkpoint must have every weight: no head is new."""
    causal: bool = False
    """Whether the logits at a token predict the next one."""
    hidden_terms: Mapping[str, float] = field(default_factory=dict)
    """The terms of hidden states that such rows have, with the weights by which trusted rows draw, if none are set."""
    usual: tuple[str, ...] = ("text", "label")
    """Names that a row's columns may have."""
    why_even: str | None = None
    """Why all rows are alike before training, where the loss compares the model with itself as it was then: such rows
    are scored, and another trains."""

    def noun(self, format: Format | None) -> str:
        """What a note calls the part of a row that may be cut."""
        return "recordings" if self.media else "texts" if format is None or format.name == "text" else "prompts"

    def limit(self, setting: int | None, tokenizer: Any, positions: int | None, most: int = 10**12) -> int:
        """Most tokens of a sample; of a recording its most steps, 0 for all, as for images."""
        if self.media is not None:
            return setting or 0
        limit = min(tokenizer.model_max_length, most)
        return resolve_max_length(setting, tokenizer_limit=limit, positions=positions)

    def rows(self, data: Any, *, holds_out: bool) -> dict[str, Any]:
        """The arguments of `read_data` by the settings of `data`; rows that are only scored are never held out."""
        columns = {name: getattr(data, name) for name in self.settings}
        holds_out = holds_out and self.why_even is None
        return {"find": self.find, "columns": columns, "label": self.label, "holds_out": holds_out}

    def by_path(self, rows: Any, folder: str) -> Any:
        """The rows of a `datasets.Dataset`, with paths in place of the images or recordings that the model reads."""
        if self.media is None:
            return rows
        os.mkdir(folder)
        return as_paths(rows, self.media, folder)

    def require_trained(self, task: str) -> None:
        """Raise UnsupportedError for rows that are scored alone."""
        if self.why_even is not None:
            raise UnsupportedError(
                f"task.type {task} is scored, not trained: select rows with tsqlora.select (or `tsqlora score` and "
                "`tsqlora select`), and train on them with TRL's DPOTrainer"
            )

    def referenced(self, request: T, measure: Callable[[T], T]) -> T:
        """The request for a look, with the model's own losses on the rows where the loss compares with them."""
        return request if self.why_even is None else measure(request)

    def units(self, *, of_rows: T, of_tokens: T) -> T:
        """Choose by what heads are fitted on and judges judge: the label of a row, or the tag of each of its tokens."""
        return of_tokens if self.label is not None and self.label.by_token else of_rows

    def classes(self, names: Sequence[Any] | None, **how: Any) -> LabelMap | None:
        """The classes of these names, where rows have some."""
        return None if names is None or self.label is None else LabelMap(tuple(names), self.label, **how)

    def classes_of(self, config: Any, cells: Iterable[Any]) -> LabelMap | None:
        """The classes of a model's config, by name or number as the cells have them."""
        if self.label is None:
            return None
        first, heads = self.label.parts(next((cell for cell in cells if cell), 0))[0], config.id2label
        return self.classes([str(heads[j]) if isinstance(first, str) else j for j in range(len(heads))])

    def lacking(self, labels: Iterable[np.ndarray], config: Any) -> int:
        """How many classes of a model these encoded labels lack."""
        if self.label is None:
            return 0
        present = self.label.present([*labels])
        return max(getattr(config, "num_labels", present) - present, 0)

    def judges(self) -> bool:
        """Whether a fit on other rows judges the label of a row: one class of several."""
        return self.label is not None and self.label.single

    def strata(self, labels: np.ndarray) -> np.ndarray | None:
        """The class of each row, by which draws are stratified and fits judge; None where a row has not exactly one."""
        return labels if self.judges() else None

    def prompt_limit(self, length: int, tokenizer: Any, positions: int | None, new: int) -> int:
        """Most tokens of a prompt: the positions of a causal model must also hold the text that it writes."""
        if positions is None or not self.causal:
            return length
        require_room(positions, new, longest=least_prompt(tokenizer))
        return min(length, positions - new)

    def head(self, names: Sequence[Any] | None) -> dict[str, Any]:
        """The fields of a config for a new head for these classes, or for a number; none where no head is new."""
        if self.whole:
            return {}
        texts = ["LABEL_0"] if names is None else [str(name) for name in names]
        ids = {name: number for number, name in enumerate(texts)}
        return {"id2label": dict(enumerate(texts)), "label2id": ids, "problem_type": self.problem_type}

    def base_arguments(self, names: Sequence[Any] | None) -> dict[str, Any]:
        """The arguments of `from_pretrained` for a base with such a head; others follow from the number of labels."""
        if self.whole:
            return {}
        sets = {"problem_type": self.problem_type} if self.label is not None and self.label.joint else {}
        return {"num_labels": 1 if names is None else len(names), **sets}

    def require_base(self, config: Any, path: str, task: str) -> None:
        """Raise SettingsError for the config of a decoder behind an encoder where it must stand alone, and reverse."""
        behind_encoder = bool(getattr(config, "is_encoder_decoder", False))
        if self.whole and behind_encoder == self.causal:
            other = "seq2seq" if behind_encoder else "causal-lm"
            kind = "has an encoder and a decoder" if behind_encoder else "is a decoder alone"
            raise SettingsError(f"model.path {path!r} {kind}, and task.type is {task}; set it to {other}")

    def require_weights(self, missing: Iterable[str], path: str) -> None:
        """Raise SettingsError for a model that would generate text with weights that nobody trained."""
        if self.whole and (lacking := sorted({*missing})):
            raise SettingsError(
                f"model.path {path!r} lacks {len(lacking)} weights of a model that generates text ({lacking[0]}); give "
                "one that was trained to generate text"
            )


def require_room(positions: int | None, new: int, *, longest: int = 1) -> None:
    """Raise SettingsError where a prompt and the new tokens are more than the model has positions for."""
    if positions is not None and longest + new > positions:
        raise SettingsError(
            f"a prompt of {longest} tokens and {new} new ones are more than the model's {positions} positions; lower "
            "task.max_new_tokens or data.max_length"
        )


OF_TEXTS: Mapping[str, str | None] = {
    "data.format": None,
    "data.prompt": "data.text",
    "data.target": "data.label",
    "data.messages": "data.text",
    "task.max_new_tokens": None,
    "task.beams": None,
}
"""Settings for texts to write alone, with those for labels in their place."""
WITHOUT_SMOOTHING: Mapping[str, str | None] = {**OF_TEXTS, "training.label_smoothing_factor": None}


def find_labelled(names: Sequence[str], *, source: str, **settings: Any) -> tuple[Columns, Format | None]:
    """Choose the columns of rows with a label, as `find_columns`."""
    return find_columns(names, source=source, **settings), None


def pad(model: nn.Module, tokenizer: Any, *, max_length: int, tags: bool = False) -> Collate:
    """Pad to a multiple of 8 tokens where the model has so many positions."""
    positions = getattr(model.config, "max_position_embeddings", None)
    return collator(tokenizer, max_length=max_length, positions=positions, tags=tags)


def load_tokenizer(path: str, config: Any, *, generates: bool = False, **how: Any) -> PreTrainedTokenizerBase:
    """Load the tokenizer, with a padding token that the config names too.

    Raises SettingsError for a checkpoint without one, and for one with neither a padding nor an end token.
    """
    files = {name: how[name] for name in ("revision", "trust_remote_code")}
    tokenizer = load(AutoTokenizer, path, **how, **without_named_files(path, **files))
    # Without its files transformers makes a tokenizer to which every word is unknown.
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        raise SettingsError(f"model.path {path!r} holds no tokenizer; save the model's own there")
    # A causal model reads its class at the last token that is not padding.
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token is None:
        raise SettingsError(f"the tokenizer in model.path {path!r} has neither a padding nor an end token; set one")
    # By its config's number, whatever the tokenizer pads with.
    text = config.get_text_config()
    if not generates or text.pad_token_id is None:
        text.pad_token_id = tokenizer.pad_token_id
    return tokenizer


TEXTS = Reading(
    auto="AutoModelForSequenceClassification",
    pipeline="text-classification",
    find=find_labelled,
    encode=tokenise,
    collate=pad,
    logits=model_logits,
    processor=load_tokenizer,
    label=CLASS,
    problem_type="single_label_classification",
    foreign=OF_TEXTS,
)
"""A text, or two, with a class."""


def files(media: str) -> Reading:
    """Images or recordings with a class, which a processor reads in place of a tokenizer."""

    def decode(model: nn.Module, processor: Any, *, max_length: int) -> Collate:
        return MediaCollator(processor, media, max_length, getattr(model.config, "num_channels", 3) == 1)

    kind: Any = {"image": AutoImageProcessor, "audio": AutoFeatureExtractor}[media]
    length = {"data.max_length": None} if media == "image" else {}
    return replace(
        TEXTS,
        auto=f"AutoModelFor{media.capitalize()}Classification",
        pipeline=f"{media}-classification",
        find=partial(find_labelled, media=media),
        encode=encode_files,
        collate=decode,
        processor=lambda path, config, **how: load(kind, path, **how),
        media=media,
        foreign={**OF_TEXTS, "data.text_pair": None, **length},
        trainer={"remove_unused_columns": False},  # the model takes none of a file's columns; the collator decodes them
    )
