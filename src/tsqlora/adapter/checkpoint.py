"""An adapter's base by its files: config.json and the headers of its weights.  No torch, no weights in memory."""

import os
import re
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from tsqlora.adapter.config import read_object
from tsqlora.adapter.files import is_own
from tsqlora.adapter.lora import LoraAdapter
from tsqlora.adapter.rewrite import Shape, layer_kind, partners
from tsqlora.errors import SettingsError
from tsqlora.libs.hub import cached_model, is_hub_id, is_revision

_MOST_BLOCKS = 1000
"""A larger number in a name is no number of a block."""
_MOST_IMPLIED = 100_000
"""Modules; no model has more."""

Sizes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class BaseFacts:
    """What can be determined of an adapter's base model.

    Attributes:
        shapes: its modules of the adapter's kinds, and those that a server stacks with them.
        is_here: they are the base's own; else the adapter's names imply them.
        layers: its modules by each of the adapter's kinds of layer.
        model_type: from its config; None without one.
        tied: its head shares the weight of its embedding.
        biased: the adapter's layers have biases in it; True without its weights.
        name: transformers' class of it with the adapter's task; without a config the family may be missing, as in
            "ForSequenceClassification".
        added: tokens of the adapter's added_tokens.json beyond the base's vocabulary.
        other: embeddings and heads of the adapter with another number of tokens than the base, and that number.
        resized: the first of them in words; or empty.
        unfit: why no server can put the adapter on it: the fault, and the layers.
        labels: classes of a head that transformers makes by its config; None without one.
    """

    shapes: Mapping[str, Shape]
    is_here: bool = False
    layers: Mapping[str, Sequence[str]] = field(default_factory=dict)
    model_type: str | None = None
    tied: bool = False
    biased: bool = True
    name: str = ""
    added: Sequence[str] = ()
    other: Sequence[tuple[str, int]] = ()
    resized: str = ""
    unfit: Mapping[str, Sequence[str]] = field(default_factory=dict)
    labels: int | None = None

    @property
    def is_classifier(self) -> bool:
        return self.name.endswith("Classification")

    def is_one_of(self, patterns: Sequence[str], *, perhaps: bool = False) -> bool:
        """Whether its class matches one of the patterns; `perhaps`: also if only its family is unknown."""
        unknown = perhaps and self.name.startswith("For")
        return any(fnmatchcase(self.name, p) or (unknown and p.endswith(self.name)) for p in patterns)


def base_facts(adapter: LoraAdapter, source: Path) -> BaseFacts:
    """Read the base that an adapter names, if it is on this machine; `source` is the adapter's directory."""
    try:
        path = base_path(adapter, None)
        folder = path if os.path.isdir(path) else cached_model(path, revision_of(path, adapter))
    except SettingsError:
        folder = None
    config = {} if folder is None else _read(Path(folder, "config.json"))
    weights, biases = ({}, {}) if folder is None else weight_sizes(folder)
    # Where config.json leaves it out, transformers ties.
    tied = bool(config) and config.get("tie_word_embeddings", True)
    own = as_adapted(weights, adapter.targets, tied=tied)
    shapes = _implied(adapter) if own is None else _shapes(adapter, own)
    layers: dict[str, list[str]] = {layer_kind(name): [] for name in adapter.targets}
    for name in shapes:
        if (kind := layer_kind(name)) in layers:
            layers[kind].append(name)
    size = config.get("vocab_size")
    other = _resized(adapter, size) if isinstance(size, int) else []
    ids = _read(added) if is_own(added := source / "added_tokens.json", source) else {}
    beyond = size if isinstance(size, int) else 0
    labels = len(named) if isinstance(named := config.get("id2label"), dict) else config.get("num_labels", 2)
    return BaseFacts(
        shapes,
        own is not None,
        layers,
        config.get("model_type"),
        tied=tied,
        biased=own is None or as_adapted(biases, adapter.targets) is not None,
        name=base_class(adapter, config),
        added=tuple(str(token) for token, number in ids.items() if isinstance(number, int) and number >= beyond),
        other=other,
        resized=f"{other[0][0]} has {other[0][1]:,} tokens, the base {size:,}" if other else "",
        # Packed weights have other shapes.
        unfit=unfit(adapter, {} if "quantization_config" in config else own or weights, {name for name, _ in other}),
        labels=labels if config and isinstance(labels, int) else None,
    )


def base_path(adapter: LoraAdapter, path: str | None) -> str:
    """The base: the user's `path`, else what the adapter names.  Raises SettingsError if it does not exist."""
    if path is not None:
        return path
    if not (named := adapter.base):
        raise SettingsError("the adapter names no base model; set --base to a directory or a hub id")
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


def _read(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty if there is none."""
    with suppress(OSError, ValueError):
        return read_object(path)
    return {}


SUFFIXES = {
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


def base_class(adapter: LoraAdapter, config: Mapping[str, Any]) -> str:
    """transformers' class of the model that the adapter was made on, as far as its files say; else empty.

    Args:
        config: the base's config.json, or empty.
    """
    if adapter.config.get("auto_mapping"):
        return adapter.made_on
    architectures = config.get("architectures")
    named = architectures[0] if isinstance(architectures, list) and architectures else ""
    own = named if isinstance(named, str) else ""
    suffix = SUFFIXES.get(adapter.config.get("task_type") or "", "")
    # A model that reads images as well has a class of its own for the task of writing.
    if not suffix or (own and suffix in ("ForCausalLM", "ForConditionalGeneration")):
        return own
    family = re.sub(r"(For[A-Z]\w*|LMHeadModel|PreTrainedModel|Model)$", "", own)
    return (family or _FAMILIES.get(next(iter(adapter.targets), "").partition(".")[0], "")) + suffix


def weight_sizes(folder: str) -> tuple[Sizes, Sizes]:
    """The shape of each module's weight and bias in the safetensors files; empty if they are missing or broken."""
    shapes: dict[str, dict[str, tuple[int, ...]]] = {"weight": {}, "bias": {}}
    try:
        for path in sorted(Path(folder).glob("*.safetensors")):
            with safe_open(path, framework="np") as file:
                for key in file.keys():  # noqa: SIM118  (not a mapping)
                    module, _, leaf = key.rpartition(".")
                    if leaf in shapes:
                        shapes[leaf][module] = tuple(file.get_slice(key).get_shape())
    except (OSError, SafetensorError):
        return {}, {}
    return shapes["weight"], shapes["bias"]


def as_adapted(sizes: Sizes, targets: Collection[str], *, tied: bool = False) -> Sizes | None:
    """The checkpoint's modules by the names that the adapter's targets have; None if targets are missing.

    A checkpoint of a body may lack the prefix that the body has below a head, or have one too many. One of `tied`
    weights has the head's as the embedding's alone.
    """
    embedding = next((sizes[name] for name in sizes if in_block(name) in ("embed_tokens", "wte", "shared")), None)
    heads = {name: embedding for name in targets if name.endswith("lm_head")} if tied and embedding else {}
    first = next((name for name in targets if name not in heads), "").partition(".")[0]
    for renamed in (
        sizes,
        {f"{first}.{name}": size for name, size in sizes.items()},
        {name.partition(".")[2]: size for name, size in sizes.items()},
    ):
        if sizes and all(name in renamed or name in heads for name in targets):
            return {**heads, **renamed}
    return None


def _resized(adapter: LoraAdapter, size: int) -> list[tuple[str, int]]:
    """Embeddings and heads of the adapter with another number of tokens than `size`, and that number."""
    rows = {name: t.shape[0] for name, t in adapter.weights().items() if name.endswith(("embed_tokens", "lm_head"))}
    rows |= {n: t.shape[0] for n, t in adapter.base_layers.items() if "embed_tokens" in n or "lm_head" in n}
    rows |= {name: target.inputs for name, target in adapter.targets.items() if target.kind == "embedding"}
    rows |= {name: target.outputs for name, target in adapter.targets.items() if name.endswith("lm_head")}
    return [(name, count) for name, count in rows.items() if count != size]


def unfit(adapter: LoraAdapter, weights: Sizes, resized: Collection[str] = ()) -> dict[str, list[str]]:
    """The layers of other sizes than the base's, but for those `resized`, or that it has none of them, by fault."""
    # transformers renames what stands before the blocks of some checkpoints; towers may have layers of one name.
    shapes = dict[str, list[tuple[int, ...]]]()
    for name, shape in weights.items():
        shapes.setdefault(in_block(name), []).append(shape)
    if shapes and adapter.targets and not any(in_block(name) in shapes for name in adapter.targets):
        return {"no key matches the base": []}
    sizes = {name: (target.outputs, target.inputs) for name, target in adapter.targets.items() if target.rank}
    sizes |= {name: t.shape for name, t in adapter.weights().items() if "embed" in name or "lm_head" in name}
    different = [
        f"{name} is {' × '.join(map(str, size))}, the base's {' × '.join(map(str, its[0]))}"
        for name, size in sizes.items()
        if name not in resized
        if (its := shapes.get(in_block(name))) and all(len(one) == 2 and sorted(one) != sorted(size) for one in its)
    ]
    return {"shapes differ from the base": different} if different else {}


def in_block(name: str) -> str:
    """The name of a layer from the number of its block on; without a number its last part.

    >>> in_block("model.language_model.layers.3.mlp.up_proj"), in_block("lm_head")
    ('3.mlp.up_proj', 'lm_head')
    """
    parts = name.split(".")
    return ".".join(parts[next((j for j, part in enumerate(parts) if part.isdigit()), -1) :])


def _shapes(adapter: LoraAdapter, sizes: Sizes) -> dict[str, Shape]:
    """The base's modules of the adapter's kinds, and their partners."""
    kinds = {layer_kind(name): target for name, target in adapter.targets.items()}
    beside = {layer_kind(partner) for name in adapter.targets for partner in partners(name)}
    shapes = {}
    for name, size in sizes.items():
        if (target := kinds.get(layer_kind(name))) is not None:
            own = (target.inputs, target.outputs)
            # Conv1D and Embedding store inputs first, Linear stores them last.
            turned = tuple(reversed(size)) if own != size else size
            shapes[name] = Shape(target.kind, *turned) if len(size) == 2 else Shape(target.kind, *own)
        elif layer_kind(name) in beside and len(size) == 2:
            shapes[name] = Shape("linear", size[1], size[0])
    return shapes


def _implied(adapter: LoraAdapter) -> dict[str, Shape]:
    """The modules that the adapter's names imply: every kind in every block, and the partners."""
    shapes = {name: Shape(target.kind, target.inputs, target.outputs) for name, target in adapter.targets.items()}
    # Names with several numbers (experts in layers) do not show how many there are of each.
    kinds = {kind: shape for name, shape in shapes.items() if (kind := layer_kind(name)).count("*") == 1}
    blocks = 1 + max((int(part) for name in shapes for part in name.split(".") if part.isdigit()), default=0)
    if blocks <= _MOST_BLOCKS and blocks * len(kinds) <= _MOST_IMPLIED:
        shapes = {kind.replace("*", str(j)): shape for kind, shape in kinds.items() for j in range(blocks)} | shapes
    # Assume a partner's width to be that of the layer that it is stacked with.
    return {partner: shape for name, shape in shapes.items() for partner in partners(name)} | shapes
