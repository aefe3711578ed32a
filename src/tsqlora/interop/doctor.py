"""Judge an adapter before it is served: which servers read it correctly, which export helps, dead slots, NaN.

Only numpy and safetensors read the files: no torch, no base model in memory.
"""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from tsqlora.compat.hub import cached_model
from tsqlora.errors import DataError, SettingsError, TsqLoraError, UnsupportedError, nearest
from tsqlora.interop.checkpoint import (
    added_tokens,
    base_class,
    base_config,
    base_path,
    base_weights,
    revision_of,
    weight_shapes,
)
from tsqlora.interop.files import CONFIG, pickles, read_adapter
from tsqlora.interop.gguf import ARCHITECTURES
from tsqlora.interop.health import (
    DIFFERENT,
    RESIZED,
    Fault,
    faults,
    layer_health,
    nonfinite,
    resized,
    vllm_rank,
)
from tsqlora.interop.lora import UNMERGEABLE, LoraAdapter, shared_by_sides, tied_targets
from tsqlora.interop.rewrite import Shape, layer_kind, partners, universal
from tsqlora.interop.servers import CONSUMERS, TOWER, BaseFacts, Consumer, judge
from tsqlora.interop.serving import serve_line, serve_lines

_BY_PEFT = ("PEFT", "diffusers")
_MOST_BLOCKS = 1000
"""A larger number in a name is no number of a block."""
_MOST_IMPLIED = 100_000
"""Modules; no model has more."""


def examine(folder: Path, *, server: str | None = None) -> dict[str, Any]:
    """The full report on the adapter in a directory, ready for JSON.

    Args:
        server: NAME or NAME==VERSION, to judge one server; else all.

    Raises SettingsError for an unknown server, DataError if the directory holds no adapter.
    """
    rules, notes = (CONSUMERS, []) if server is None else rule_for(server)
    adapter = read_adapter(folder)
    of_base, base, mended = _context(folder, adapter)
    consumers = []
    for consumer in rules:
        if server is None and consumer.only and not base.is_one_of(consumer.only):
            continue
        judgement = judge(consumer, adapter, base)
        consumers.append(
            {
                "name": consumer.name,
                "server": consumer.server,
                "version": consumer.version,
                "date": str(consumer.date),
                "source": consumer.source,
                "evidence": consumer.evidence,
                "reads": consumer.file or "the directory",
                "verdict": judgement.verdict,
                "reasons": list(judgement.reasons),
                "factors": dict(judgement.factors),
                "mend": None if judgement.verdict == "right" else mend(consumer, adapter, mended, base),
                "serve": serve_line(consumer, adapter, base, folder, kind="adapter")
                if judgement.verdict == "right"
                else None,
            }
        )
    ranks = {name: target.rank for name, target in adapter.targets.items()}
    return {
        "adapter": str(folder),
        "base": adapter.base,
        "base_class": base.name,
        "base_found": of_base is not None,
        "rank": adapter.rank,
        "ranks": ranks,
        "scales": {name: target.scale for name, target in adapter.targets.items()},
        "heads": adapter.heads(),
        "variants": adapter.variants(),
        "parameters": adapter.parameters,
        "universal_parameters": None if mended is None else mended.parameters,
        "bytes": sum(path.stat().st_size for path in folder.iterdir() if path.is_file()),
        "max_lora_rank": vllm_rank(adapter.named_rank),
        "servers": {server: consumer["verdict"] for server, consumer in _newest(consumers).items()},
        "consumers": consumers,
        "faults": [asdict(fault) for fault in faults_of(adapter)],
        "health": _health(adapter),
        "notes": _notes(folder, adapter, has_base=of_base is not None) + notes,
    }


def format_for(folder: Path, server: str) -> str:
    """The export format for NAME or NAME==VERSION, whether or not it reads the adapter as it is.

    Raises SettingsError for an unknown server, UnsupportedError if there is none, DataError as `examine`.
    """
    (rule,), _ = rule_for(server)
    adapter = read_adapter(folder)
    _, base, mended = _context(folder, adapter)
    if (format := mend(rule, adapter, mended, base)) is None:
        if base.resized:
            raise UnsupportedError(f"{base.resized}; name the enlarged base in {CONFIG}")
        what = ", ".join(adapter.variants()) or base.name
        raise UnsupportedError(f"no export of {what} works in {server}; serve it with PEFT")
    return format


def serving(source: Path, out: Path, format: str) -> dict[str, str]:
    """The command of each server for an export of the adapter in `source`."""
    written = source if format in ("gguf", "merged") else out
    adapter = read_adapter(written)
    return serve_lines(adapter, _context(written, adapter)[1], out, format)


def _newest(consumers: Sequence[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """What the newest rule of each server says."""
    newest: dict[str, Mapping[str, Any]] = {}
    for consumer in consumers:
        newest.setdefault(consumer["server"], consumer)
    return newest


def served(folder: Path) -> str | None:
    """Which servers serve a classifier, as the adapter or merged, in a line; None for an adapter of another kind."""
    report = examine(folder)
    if not report["base_class"].endswith("Classification"):
        return None
    how: dict[str, list[str]] = {"as it is by": [], "with --format merged by": [], "not by": []}
    for server, consumer in _newest(report["consumers"]).items():
        merged = "with --format merged by" if consumer["mend"] else "not by"
        how["as it is by" if consumer["verdict"] == "right" else merged].append(server)
    return "this classifier is served " + "; ".join(f"{what} {', '.join(of)}" for what, of in how.items() if of)


def _context(source: Path, adapter: LoraAdapter) -> tuple[dict[str, Shape] | None, BaseFacts, LoraAdapter | None]:
    """The base's shapes if it is on this machine, the facts about it, and the adapter in the universal form."""
    folder = _base(adapter)
    of_base = _shapes(adapter, folder)
    shapes = _implied(adapter) if of_base is None else of_base
    facts = _facts(source, adapter, shapes, folder)
    if folder is not None and of_base is not None:
        facts = replace(facts, biased=base_weights(folder, adapter.targets, "bias") is not None)
    return of_base, facts, _universal(adapter, shapes)


def rule_for(server: str) -> tuple[tuple[Consumer], list[str]]:
    """The rule for NAME or NAME==VERSION (the newest by default), and a note if nobody has read that version."""
    name, _, version = server.partition("==")
    rules = [consumer for consumer in CONSUMERS if _plain(consumer.server) == _plain(name)]
    if not rules:
        raise SettingsError(f"--server {server}: {nearest(name.lower(), {c.server.lower() for c in CONSUMERS})}")
    rule = rules[0]
    if version not in ("", "main") and len(rules) > 1:
        if not (digits := re.match(r"v?(\d+(\.\d+)*)", version)):
            raise SettingsError(f"--server {server}: '{version}' is not a version; use one such as {rules[-1].until}")
        parts = _numbers(digits[1])
        rule = next(r for r in reversed(rules) if not r.until or parts[: len(_numbers(r.until))] <= _numbers(r.until))
    if not version or version in rule.version.split(", "):
        return (rule,), []
    return (rule,), [
        f"the source of {rule.server} {version} was not read; the verdict follows {rule.version}, read on {rule.date}"
    ]


def _plain(name: str) -> str:
    """A name without punctuation: llama.cpp and llama-cpp are the same."""
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _numbers(version: str) -> list[int]:
    return [int(part) for part in version.split(".")]


def mend(consumer: Consumer, adapter: LoraAdapter, padded: LoraAdapter | None, base: BaseFacts) -> str | None:
    """The export format that this server reads correctly: an adapter if there is one, else the merged model.

    None if PEFT cannot merge the adapter either, or if the server serves no such classifier.
    """
    plain = not (adapter.variants() or adapter.further or base.resized)
    if consumer.server in _BY_PEFT and plain:
        return "peft"
    if consumer.server == "llama.cpp":
        readable = base.model_type in (None, *ARCHITECTURES) and not (base.tied and tied_targets(adapter))
        readable = readable and not any(map(TOWER.search, adapter.targets))
        if plain and readable and not adapter.heads():
            return "gguf"
    elif padded is not None and judge(consumer, padded, base).verdict == "right":
        return "universal"
    if base.resized or (base.is_classifier and not base.is_one_of(consumer.serves, perhaps=True)):
        return None
    if shared_by_sides(adapter):
        return None
    unmergeable = UNMERGEABLE if base.biased else (*UNMERGEABLE, "lora_bias")
    return None if any(adapter.config.get(option) for option in unmergeable) else "merged"


def _universal(adapter: LoraAdapter, shapes: Mapping[str, Shape]) -> LoraAdapter | None:
    try:
        return universal(adapter, shapes, list(shapes))
    except TsqLoraError:
        return None


def _shapes(adapter: LoraAdapter, folder: str | None) -> dict[str, Shape] | None:
    """The base's modules of the adapter's kinds and their partners; None without the base's files on this machine."""
    weights = None if folder is None else base_weights(folder, adapter.targets)
    if weights is None:
        return None
    kinds = {layer_kind(name): target for name, target in adapter.targets.items()}
    beside = {layer_kind(partner) for name in adapter.targets for partner in partners(name)}
    shapes = {}
    for name, shape in weights.items():
        if (target := kinds.get(layer_kind(name))) is not None:
            sizes = (target.inputs, target.outputs)
            # Conv1D and Embedding store inputs first, Linear stores them last.
            turned = tuple(reversed(shape)) if sizes != shape else shape
            shapes[name] = Shape(target.kind, *turned) if len(shape) == 2 else Shape(target.kind, *sizes)
        elif layer_kind(name) in beside and len(shape) == 2:
            shapes[name] = Shape("linear", shape[1], shape[0])
    return shapes


def _base(adapter: LoraAdapter) -> str | None:
    """The base's directory, if it is on this machine or in the hub's cache."""
    try:
        path = base_path(adapter, None)
        return path if os.path.isdir(path) else cached_model(path, revision_of(path, adapter))
    except SettingsError:
        return None


def _implied(adapter: LoraAdapter) -> dict[str, Shape]:
    """The modules that the adapter's names imply: every kind in every block, and the partners."""
    shapes = {name: Shape(target.kind, target.inputs, target.outputs) for name, target in adapter.targets.items()}
    # Names with several numbers (experts in layers) do not show how many there are of each.
    kinds = {kind: shape for name, shape in shapes.items() if (kind := layer_kind(name)).count("*") == 1}
    blocks = 1 + max((int(part) for name in shapes for part in name.split(".") if part.isdigit()), default=0)
    if blocks <= _MOST_BLOCKS and blocks * len(kinds) <= _MOST_IMPLIED:
        shapes = {kind.replace("*", str(j)): shape for kind, shape in kinds.items() for j in range(blocks)} | shapes
    # Assume a partner's width to be that of the layer that it is stacked with.
    beside = {partner: shape for name, shape in shapes.items() for partner in partners(name)}
    return beside | shapes


def _facts(source: Path, adapter: LoraAdapter, shapes: Mapping[str, Shape], folder: str | None) -> BaseFacts:
    kinds: dict[str, list[str]] = {layer_kind(name): [] for name in adapter.targets}
    for name in shapes:
        if layer_kind(name) in kinds:
            kinds[layer_kind(name)].append(name)
    config = {} if folder is None else base_config(folder)
    # Where config.json leaves it out, transformers ties.
    tied = bool(config) and config.get("tie_word_embeddings", True)
    size = config.get("vocab_size")
    size = size if isinstance(size, int) else None
    added, other = added_tokens(source, size), resized(adapter, size)
    resize = f"{other[0][0]} has {other[0][1]:,} tokens, the base {size:,}" if other else ""
    facts = BaseFacts(kinds, config.get("model_type"), tied=tied, name=base_class(adapter, config), added=added)
    labels = len(named) if isinstance(named := config.get("id2label"), dict) else config.get("num_labels", 2)
    return replace(facts, resized=resize, labels=labels if config and isinstance(labels, int) else None)


def faults_in(folder: Path) -> list[str]:
    """The faults of an adapter that was just written, a sentence each."""
    try:
        return [f"{fault.name}: {fault.cure}" for fault in faults_of(read_adapter(folder))]
    except DataError as error:
        return [str(error)]


def faults_of(adapter: LoraAdapter) -> list[Fault]:
    """Why the adapter does nothing, or does not fit its base, if that is on this machine."""
    folder = _base(adapter)
    config = {} if folder is None else base_config(folder)
    packed = folder is None or "quantization_config" in config  # its weights have other shapes
    tied = bool(config) and config.get("tie_word_embeddings", True)
    result = faults(adapter, {} if folder is None or packed else weight_shapes(folder), tied=tied)
    size = config.get("vocab_size")
    other = resized(adapter, size if isinstance(size, int) else None)
    if other and not any(fault.name == DIFFERENT for fault in result):
        result.append(Fault(DIFFERENT, RESIZED, tuple(f"{name} has {rows:,} tokens" for name, rows in other)))
    return result


def _health(adapter: LoraAdapter) -> dict[str, Any]:
    layers = {name: layer_health(target) for name, target in adapter.targets.items()}
    return {
        "nonfinite": nonfinite(adapter),
        "zero_slots": sum(layer.zero for layer in layers.values()),
        "duplicate_slots": sum(layer.duplicate for layer in layers.values()),
        "idle_layers": [name for name, layer in layers.items() if not layer.norm and not layer.nonfinite],
        "layers": {name: asdict(layer) for name, layer in layers.items()},
    }


def _notes(folder: Path, adapter: LoraAdapter, *, has_base: bool) -> list[str]:
    notes = []
    if unsafe := pickles(folder):
        notes.append(f"{', '.join(unsafe)} can run code when loaded, and was not opened; delete it")
    if adapter.ignored:
        notes.append(f"{CONFIG} sets {', '.join(adapter.ignored)}, which tsqlora does not know and leaves out")
    if adapter.base is None:
        notes.append("the adapter names no base model, so whoever loads it must know the base")
    elif (Path(adapter.base).is_absolute() or adapter.base.startswith(".")) and not os.path.isdir(adapter.base):
        notes.append(f"its base model is a directory on another machine, {adapter.base}; name a hub id instead")
    if not has_base:
        notes.append("no matching base weights are here, so the number of layers is guessed from the adapter's names")
    return notes
