"""Judge an adapter before it is served: who reads it right, what mends it, what its numbers say.

Reads files with numpy and safetensors alone: no torch, no base model in memory.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tsqlora.errors import SettingsError, TsqLoraError, nearest
from tsqlora.interop.checkpoint import base_config, base_path, base_weights
from tsqlora.interop.files import pickles, read_adapter
from tsqlora.interop.gguf import ARCHITECTURES
from tsqlora.interop.health import layer_health, nonfinite, vllm_rank
from tsqlora.interop.lora import LoraAdapter
from tsqlora.interop.rewrite import Shape, layer_kind, partners, universal
from tsqlora.interop.servers import CONSUMERS, Consumer, Layers, judge

_BY_PEFT = ("PEFT", "diffusers")
_MOST_BLOCKS = 1000
"""A number in a name above this is nobody's block."""
_MOST_IMPLIED = 100_000
"""Modules; more are nobody's model."""


def examine(folder: Path, *, server: str | None = None) -> dict[str, Any]:
    """Everything that can be said of the adapter in a directory, ready for JSON.

    Args:
        server: NAME or NAME==VERSION: the only consumer to judge; else all.

    Raises SettingsError for an unknown server, DataError for what is no adapter.
    """
    rules, unseen = (CONSUMERS, []) if server is None else rule_for(server)
    adapter = read_adapter(folder)
    base = _base(adapter)
    there = _shapes(adapter, base)
    shapes = _implied(adapter) if there is None else there
    model_type = None if base is None else base_config(base).get("model_type")
    layers = _layers(adapter, shapes)
    mended = _universal(adapter, shapes)
    consumers = []
    for consumer in rules:
        finding = judge(consumer, adapter, layers)
        consumers.append(
            {
                "name": consumer.name,
                "version": consumer.version,
                "source": consumer.source,
                "evidence": consumer.evidence,
                "reads": consumer.file or "the directory",
                "verdict": finding.verdict,
                "reasons": list(finding.reasons),
                "factors": dict(finding.factors),
                "mend": None if finding.verdict == "right" else mend(consumer, adapter, mended, layers, model_type),
            }
        )
    ranks = {name: target.rank for name, target in adapter.targets.items()}
    return {
        "adapter": str(folder),
        "base": adapter.base,
        "base_found": there is not None,
        "rank": adapter.rank,
        "ranks": ranks,
        "scales": {name: target.scale for name, target in adapter.targets.items()},
        "heads": adapter.heads(),
        "variants": adapter.variants(),
        "parameters": adapter.parameters,
        "universal_parameters": None if mended is None else mended.parameters,
        "bytes": sum(path.stat().st_size for path in folder.iterdir() if path.is_file()),
        "max_lora_rank": vllm_rank(max(adapter.rank, adapter.config["r"])),
        "consumers": consumers,
        "health": _health(adapter),
        "notes": _notes(folder, adapter, found=there is not None) + unseen,
    }


def rule_for(server: str) -> tuple[tuple[Consumer], list[str]]:
    """The rule that holds for NAME or NAME==VERSION, by default the newest, and a note if that version was not read."""
    name, _, version = server.partition("==")
    rules = [consumer for consumer in CONSUMERS if _plain(consumer.server) == _plain(name)]
    if not rules:
        raise SettingsError(f"--server {server}: {nearest(name.lower(), {c.server.lower() for c in CONSUMERS})}")
    rule = rules[0]
    if version not in ("", "main") and len(rules) > 1:
        if not (digits := re.match(r"v?(\d+(\.\d+)*)", version)):
            raise SettingsError(f"--server {server}: '{version}' is no version; give one such as {rules[-1].until}")
        asked = _numbers(digits[1])
        rule = next(r for r in reversed(rules) if not r.until or asked[: len(_numbers(r.until))] <= _numbers(r.until))
    if not version or version in rule.version.split(", "):
        return (rule,), []
    return (rule,), [f"{rule.server} {version} was not read: it is judged by the rule of {rule.version}"]


def _plain(name: str) -> str:
    """llama.cpp and llama-cpp are one."""
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _numbers(version: str) -> list[int]:
    return [int(part) for part in version.split(".")]


def mend(
    consumer: Consumer, adapter: LoraAdapter, padded: LoraAdapter | None, layers: Layers, model_type: str | None
) -> str:
    """The format that this consumer reads right: an adapter's where there is one, else the merged model."""
    plain = not (adapter.variants() or adapter.further)
    if consumer.name in _BY_PEFT and plain:
        return "peft"
    if consumer.name == "llama.cpp":
        return "gguf" if plain and not adapter.heads() and model_type in (None, *ARCHITECTURES) else "merged"
    if padded is None or judge(consumer, padded, layers).verdict != "right":
        return "merged"
    return "universal"


def _universal(adapter: LoraAdapter, shapes: Mapping[str, Shape]) -> LoraAdapter | None:
    try:
        return universal(adapter, shapes, list(shapes))
    except TsqLoraError:
        return None


def _shapes(adapter: LoraAdapter, folder: str | None) -> dict[str, Shape] | None:
    """The base's modules that are of the adapter's kinds or their partners, if its files are on this machine."""
    weights = None if folder is None else base_weights(folder, adapter.targets)
    if weights is None:
        return None
    kinds = {layer_kind(name): target for name, target in adapter.targets.items()}
    beside = {layer_kind(partner) for name in adapter.targets for partner in partners(name)}
    shapes = {}
    for name, shape in weights.items():
        if (target := kinds.get(layer_kind(name))) is not None:
            sizes = (target.inputs, target.outputs)
            # Conv1D and Embedding have their inputs first, Linear has them last.
            turned = tuple(reversed(shape)) if sizes != shape else shape
            shapes[name] = Shape(target.kind, *turned) if len(shape) == 2 else Shape(target.kind, *sizes)
        elif layer_kind(name) in beside and len(shape) == 2:
            shapes[name] = Shape("linear", shape[1], shape[0])
    return shapes


def _base(adapter: LoraAdapter) -> str | None:
    """The base's directory, if it is on this machine."""
    try:
        path = base_path(adapter, None)
    except SettingsError:
        return None
    return path if os.path.isdir(path) else None


def _implied(adapter: LoraAdapter) -> dict[str, Shape]:
    """The modules that the adapter's own names imply: each kind in as many blocks as any kind has, and partners."""
    shapes = {name: Shape(target.kind, target.inputs, target.outputs) for name, target in adapter.targets.items()}
    # Names with several numbers (experts in layers) do not tell how many there are of each.
    kinds = {kind: shape for name, shape in shapes.items() if (kind := layer_kind(name)).count("*") == 1}
    blocks = 1 + max((int(part) for name in shapes for part in name.split(".") if part.isdigit()), default=0)
    if blocks <= _MOST_BLOCKS and blocks * len(kinds) <= _MOST_IMPLIED:
        shapes = {kind.replace("*", str(j)): shape for kind, shape in kinds.items() for j in range(blocks)} | shapes
    # As wide as what it is stacked with; really it may be narrower.
    beside = {partner: shape for name, shape in shapes.items() for partner in partners(name)}
    return beside | shapes


def _layers(adapter: LoraAdapter, shapes: Mapping[str, Shape]) -> dict[str, list[str]]:
    kinds: dict[str, list[str]] = {layer_kind(name): [] for name in adapter.targets}
    for name in shapes:
        if layer_kind(name) in kinds:
            kinds[layer_kind(name)].append(name)
    return kinds


def _health(adapter: LoraAdapter) -> dict[str, Any]:
    layers = {name: layer_health(target) for name, target in adapter.targets.items()}
    return {
        "nonfinite": nonfinite(adapter),
        "zero_slots": sum(layer.zero for layer in layers.values()),
        "duplicate_slots": sum(layer.duplicate for layer in layers.values()),
        "idle_layers": [name for name, layer in layers.items() if not layer.norm and not layer.nonfinite],
        "layers": {name: asdict(layer) for name, layer in layers.items()},
    }


def _notes(folder: Path, adapter: LoraAdapter, *, found: bool) -> list[str]:
    notes = []
    if unsafe := pickles(folder):
        notes.append(f"{', '.join(unsafe)} would run code when loaded, and was not opened; delete it")
    if adapter.base is None:
        notes.append("it names no base model: who loads it must know which")
    elif not found and (Path(adapter.base).is_absolute() or adapter.base.startswith(".")):
        notes.append(f"its base model is a directory of another machine, {adapter.base}; name a hub id instead")
    if not found:
        notes.append("how many layers the base has is taken from the adapter's own names")
    return notes
