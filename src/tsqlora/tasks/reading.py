"""Rows that reach a model as a text, or as an image or a recording; other tasks change what differs."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from torch import nn

from tsqlora.data.batches import collator
from tsqlora.data.chat import Format
from tsqlora.data.labels import CLASS
from tsqlora.data.media import MediaCollator, encode_files
from tsqlora.data.rows import Columns, find_columns
from tsqlora.data.tokens import tokenise
from tsqlora.tasks.forward import model_logits
from tsqlora.tasks.task import Collate, Reading

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


TEXTS = Reading(
    auto="AutoModelForSequenceClassification",
    pipeline="text-classification",
    find=find_labelled,
    encode=tokenise,
    collate=pad,
    logits=model_logits,
    label=CLASS,
    problem_type="single_label_classification",
    foreign=OF_TEXTS,
)
"""A text, or two, with a class."""


def files(media: str) -> Reading:
    """Images or recordings with a class, which a processor reads in place of a tokenizer."""

    def decode(model: nn.Module, processor: Any, *, max_length: int) -> Collate:
        gray = getattr(model.config, "num_channels", 3) == 1
        return MediaCollator(processor, media, max_length, gray)

    length = {"data.max_length": None} if media == "image" else {}
    return replace(
        TEXTS,
        auto=f"AutoModelFor{media.capitalize()}Classification",
        pipeline=f"{media}-classification",
        find=partial(find_labelled, media=media),
        encode=encode_files,
        collate=decode,
        media=media,
        foreign={**OF_TEXTS, "data.text_pair": None, **length},
    )
