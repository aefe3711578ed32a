"""A YAML file to start from: every setting with its description, type and default."""

import types
from collections.abc import Mapping
from typing import Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic.fields import FieldInfo

from tsqlora.compat.yaml import dump_yaml
from tsqlora.run.config.settings import Config, Section, section_of

_MODELS = {
    "image-classification": "google/vit-base-patch16-224-in21k",
    "audio-classification": "facebook/hubert-large-ll60k",
    "causal-lm": "HuggingFaceTB/SmolLM2-135M",
    "preference": "HuggingFaceTB/SmolLM2-135M",
    "seq2seq": "google/flan-t5-small",
}
"""Example models of tasks that the default example does not fit."""


def template(task: str | None = None) -> str:
    """The file that `tsqlora init` writes; it loads as it is."""
    model = _MODELS.get(task or "", "sentence-transformers/all-MiniLM-L6-v2")
    data = "train" if (task or "").startswith(("image", "audio")) else "train.jsonl"
    example = {"model.path": model, "data.train": data}
    if task is not None:
        example["task.type"] = task
    lines = ["# Settings of a tsqlora run. A setting that is missing has its default.", *_describe(Config, example)]
    return "\n".join(lines) + "\n"


def _describe(section: type[Section], example: Mapping[str, str], prefix: str = "") -> list[str]:
    indent = "  " * prefix.count(".")
    lines: list[str] = []
    for name, field in section.model_fields.items():
        key = f"{prefix}{name}"
        lines += [*([] if prefix else [""]), f"{indent}# {field.description}"]
        if (inner := section_of(field)) is not None:
            lines += [f"{indent}{name}:", *_describe(inner, example, f"{key}.")]
            continue
        default = "required" if field.is_required() else f"default {dump_yaml(field.default, inline=True)}"
        value = dump_yaml(example.get(key, field.default), inline=True)
        lines.append(f"{indent}{name}: {value}  # {allowed(field)}; {default}")
    return lines


_WORDS = {
    str: "text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    list[str]: "a list of texts",
    dict[str, float]: "a number for each term",
    types.NoneType: "null",
}
_BOUNDS = {Gt: ("gt", ">"), Ge: ("ge", ">="), Lt: ("lt", "<"), Le: ("le", "<=")}


def allowed(field: FieldInfo) -> str:
    """The values of a setting in words: 'a number > 0 and <= 1, or null'."""
    is_union = get_origin(field.annotation) in (Union, types.UnionType)
    members: tuple[Any, ...] = get_args(field.annotation) if is_union else (field.annotation,)
    first, *others = [
        " or ".join(map(str, get_args(member))) if get_origin(member) is Literal else _WORDS[member]
        for member in members
    ]
    bounds = [
        f"{symbol} {getattr(bound, attribute)}"
        for kind, (attribute, symbol) in _BOUNDS.items()
        for bound in field.metadata
        if isinstance(bound, kind)
    ]
    return ", or ".join([" ".join([first, " and ".join(bounds)]).strip(), *others])
