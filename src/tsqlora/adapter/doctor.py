"""What is to be known of an adapter before it is served: who reads it right, what mends it, what its numbers say."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tsqlora.adapter.base import base_path, base_skeleton, module_shapes
from tsqlora.adapter.consumers import CONSUMERS, Consumer, Layers, judge
from tsqlora.adapter.files import pickles, read_adapter
from tsqlora.adapter.health import broken, health, vllm_rank
from tsqlora.adapter.lora import LoraAdapter
from tsqlora.adapter.rewrite import Shape, layer_kind, universal
from tsqlora.errors import SettingsError, TsqLoraError

_BY_PEFT = ("PEFT", "diffusers")


def examine(folder: Path) -> dict[str, Any]:
    """Everything that can be said of the adapter in a directory, ready for JSON.  Raises DataError for what is none."""
    adapter = read_adapter(folder)
    shapes, found = _shapes(adapter)
    layers = _layers(adapter, shapes)
    mended = _universal(adapter, shapes)
    consumers = []
    for consumer in CONSUMERS:
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
                "mend": None if finding.verdict == "right" else mend(consumer, adapter, mended, layers),
            }
        )
    ranks = {name: target.rank for name, target in adapter.targets.items()}
    return {
        "adapter": str(folder),
        "base": adapter.base,
        "base_found": found,
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
        "notes": _notes(folder, adapter, found),
    }


def mend(consumer: Consumer, adapter: LoraAdapter, padded: LoraAdapter | None, layers: Layers) -> str:
    """The format that this consumer reads right: an adapter's where there is one, else the merged model."""
    plain = not (adapter.variants() or adapter.further)
    if consumer.name in _BY_PEFT and plain:
        return "peft"
    if consumer.name == "llama.cpp":
        return "gguf" if plain and not adapter.heads() else "merged"
    if padded is None or judge(consumer, padded, layers).verdict != "right":
        return "merged"
    return "universal"


def _universal(adapter: LoraAdapter, shapes: Mapping[str, Shape]) -> LoraAdapter | None:
    try:
        return universal(adapter, shapes, list(shapes))
    except TsqLoraError:
        return None


def _shapes(adapter: LoraAdapter) -> tuple[dict[str, Shape], bool]:
    """The base's modules, if it is on this machine; else those that the adapter's own names imply."""
    try:
        path = base_path(adapter, None)
        if Path(path).is_dir():
            return module_shapes(base_skeleton(path, adapter)), True
    except SettingsError:
        pass
    shapes = {name: Shape(target.kind, target.inputs, target.outputs) for name, target in adapter.targets.items()}
    numbers = {part for name in shapes for part in name.split(".") if part.isdigit()}
    implied = {}
    for name, shape in shapes.items():
        parts = name.split(".")
        places = [j for j, part in enumerate(parts) if part.isdigit()]
        # Names with several numbers (experts in layers) do not tell how many there are of each.
        for number in range(max(map(int, numbers)) + 1) if len(places) == 1 else ():
            implied[".".join([*parts[: places[0]], str(number), *parts[places[0] + 1 :]])] = shape
    return implied | shapes, False


def _layers(adapter: LoraAdapter, shapes: Mapping[str, Shape]) -> dict[str, list[str]]:
    kinds: dict[str, list[str]] = {layer_kind(name): [] for name in adapter.targets}
    for name in shapes:
        if layer_kind(name) in kinds:
            kinds[layer_kind(name)].append(name)
    return kinds


def _health(adapter: LoraAdapter) -> dict[str, Any]:
    layers = health(adapter)
    return {
        "nonfinite": {name: layer.nonfinite for name, layer in layers.items() if layer.nonfinite} | broken(adapter),
        "zero_slots": sum(layer.zero for layer in layers.values()),
        "duplicate_slots": sum(layer.duplicate for layer in layers.values()),
        "idle_layers": [name for name, layer in layers.items() if not layer.norm and not layer.nonfinite],
        "layers": {name: asdict(layer) for name, layer in layers.items()},
    }


def _notes(folder: Path, adapter: LoraAdapter, found: bool) -> list[str]:
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
