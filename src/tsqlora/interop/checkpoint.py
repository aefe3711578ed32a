"""Find the base checkpoint of an adapter and read its modules' shapes, without loading weights."""

import json
import os
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from tsqlora.compat.hub import is_hub_id, is_revision
from tsqlora.errors import SettingsError
from tsqlora.interop.files import is_own
from tsqlora.interop.lora import LoraAdapter

_MOST_CONFIG_BYTES = 1 << 24


def base_path(adapter: LoraAdapter, path: str | None) -> str:
    """The base: the user's `path`, else what the adapter names.  Raises SettingsError if it does not exist."""
    if path is not None:
        return path
    named = adapter.base or ""
    # The name may be hostile: it must not reach other files of this machine.
    # os.path: pathlib raises for names that no file can have.
    if ".." in Path(named).parts or not (os.path.isdir(named) or is_hub_id(named)):
        raise SettingsError(
            f"the adapter's base model ({named!r}) is not on this machine; set --base to a directory or a hub id"
        )
    return named


def revision_of(path: str, adapter: LoraAdapter) -> str:
    """The revision that the adapter names for its own base; main for another base, and by default.

    Raises SettingsError for an invalid revision.
    """
    named = adapter.config.get("revision") if path == adapter.base else None
    if named is not None and not is_revision(named):
        raise SettingsError(f"the adapter names {named!r} as its base's revision, which is invalid; set --base")
    return named or "main"


def base_config(folder: str) -> dict[str, Any]:
    """The base's config.json; empty if it cannot be read."""
    return read_json(Path(folder, "config.json"))


def read_json(path: Path) -> dict[str, Any]:
    """An object in a JSON file; empty if it cannot be read."""
    try:
        read = json.loads(path.read_text(encoding="utf-8")) if path.stat().st_size <= _MOST_CONFIG_BYTES else None
    except (OSError, ValueError, RecursionError):
        return {}
    return read if isinstance(read, dict) else {}


def added_tokens(folder: Path, vocabulary: int | None) -> tuple[str, ...]:
    """The tokens of added_tokens.json that the base's vocabulary has not; all of them if its size is unknown."""
    path = folder / "added_tokens.json"
    ids = read_json(path) if is_own(path, folder) else {}
    return tuple(str(token) for token, number in ids.items() if isinstance(number, int) and number >= (vocabulary or 0))


_SUFFIXES = {
    "SEQ_CLS": "ForSequenceClassification",
    "TOKEN_CLS": "ForTokenClassification",
    "QUESTION_ANS": "ForQuestionAnswering",
    "CAUSAL_LM": "ForCausalLM",
    "SEQ_2_SEQ_LM": "ForConditionalGeneration",
    "FEATURE_EXTRACTION": "Model",
}
"""The end of a class's name in transformers for each task_type of PEFT."""
_FAMILIES = {"bert": "Bert", "roberta": "Roberta", "distilbert": "DistilBert", "mpnet": "MPNet", "deberta": "DebertaV2"}
"""The family of a model by the attribute that holds its body: the first part of an adapter's names."""


def base_class(adapter: LoraAdapter, config: dict[str, Any]) -> str:
    """transformers' class of the model that the adapter was made on, as far as its files say; else empty.

    Args:
        config: the base's config.json, or empty.
    """
    if mapping := adapter.config.get("auto_mapping"):
        return str(mapping.get("base_model_class") or "")
    architectures = config.get("architectures")
    named = architectures[0] if isinstance(architectures, list) and architectures else ""
    own = named if isinstance(named, str) else ""
    suffix = _SUFFIXES.get(adapter.config.get("task_type") or "", "")
    # A model that reads images as well has a class of its own for the task of writing.
    if not suffix or (own and suffix in ("ForCausalLM", "ForConditionalGeneration")):
        return own
    family = re.sub(r"(For[A-Z]\w*|LMHeadModel|PreTrainedModel|Model)$", "", own)
    return (family or _FAMILIES.get(next(iter(adapter.targets), "").partition(".")[0], "")) + suffix


def base_weights(folder: str, targets: Collection[str], kind: str = "weight") -> dict[str, tuple[int, ...]] | None:
    """Each module's shape of its weight, or its bias, from the headers of the base's safetensors files.

    A checkpoint of a body may lack the prefix that the body has below a head, or have one too many: names are returned
    as the adapter's targets have them. None if files or modules are missing.
    """
    if not (shapes := weight_shapes(folder, kind)):
        return None
    first = next(iter(targets), "").partition(".")[0]
    for renamed in (
        shapes,
        {f"{first}.{name}": shape for name, shape in shapes.items()},
        {name.partition(".")[2]: shape for name, shape in shapes.items()},
    ):
        if all(name in renamed for name in targets):
            return renamed
    return None


def weight_shapes(folder: str, kind: str = "weight") -> dict[str, tuple[int, ...]]:
    """The same by the checkpoint's own names; empty if files are missing or broken."""
    shapes: dict[str, tuple[int, ...]] = {}
    try:
        for path in sorted(Path(folder).glob("*.safetensors")):
            with safe_open(path, framework="np") as file:
                for key in file.keys():  # noqa: SIM118  (not a mapping)
                    module, _, leaf = key.rpartition(".")
                    if leaf == kind:
                        shapes[module] = tuple(file.get_slice(key).get_shape())
    except (OSError, SafetensorError):
        return {}
    return shapes
