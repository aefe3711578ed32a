"""Judge an adapter before it is served: which servers read it correctly, which export helps, dead slots, NaN.

Only numpy and safetensors read the files: no torch, no base model in memory.
"""

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tsqlora.adapter.checkpoint import BaseFacts, base_facts
from tsqlora.adapter.files import CONFIG, pickles, read_adapter
from tsqlora.adapter.gguf import ARCHITECTURES
from tsqlora.adapter.health import faults, layer_health, nonfinite, vllm_rank
from tsqlora.adapter.lora import UNMERGEABLE, LoraAdapter, shared_by_sides, tied_targets
from tsqlora.adapter.rewrite import universal
from tsqlora.adapter.servers import CONSUMERS, TOWER, Consumer, judge, serve_line, serve_lines
from tsqlora.errors import DataError, Finding, SettingsError, TsqLoraError, UnsupportedError, nearest


def examine(folder: Path, *, server: str | None = None) -> dict[str, Any]:
    """The full report on the adapter in a directory, ready for JSON.

    Args:
        server: NAME or NAME==VERSION, to judge one server; else all.

    Raises SettingsError for an unknown server, DataError if the directory holds no adapter.
    """
    rules, noted = (CONSUMERS, []) if server is None else rule_for(server)
    adapter, base, padded = _read(folder)
    if server is None:
        rules = [rule for rule in rules if not rule.only or base.is_one_of(rule.only)]
    consumers = _judged(rules, folder, adapter, base, padded)
    layers = {name: layer_health(target) for name, target in adapter.targets.items()}
    return {
        "adapter": str(folder),
        "base": adapter.base,
        "base_class": base.name,
        "base_found": base.is_here,
        "rank": adapter.rank,
        "ranks": {name: target.rank for name, target in adapter.targets.items()},
        "scales": {name: target.scale for name, target in adapter.targets.items()},
        "heads": adapter.heads(),
        "variants": adapter.variants(),
        "parameters": adapter.parameters,
        "universal_parameters": None if padded is None else padded.parameters,
        "bytes": sum(path.stat().st_size for path in folder.iterdir() if path.is_file()),
        "max_lora_rank": vllm_rank(adapter.named_rank),
        "servers": {server: consumer["verdict"] for server, consumer in _newest(consumers).items()},
        "consumers": consumers,
        "faults": [{"name": f.name, "cure": f.cure, "layers": f.where} for f in _faults(adapter, base)],
        "health": {
            "nonfinite": nonfinite(adapter),
            "zero_slots": sum(layer.zero for layer in layers.values()),
            "duplicate_slots": sum(layer.duplicate for layer in layers.values()),
            "idle_layers": [name for name, layer in layers.items() if not layer.norm and not layer.nonfinite],
            "layers": {name: asdict(layer) for name, layer in layers.items()},
        },
        "notes": [*_notes(folder, adapter, base), *noted],
    }


def format_for(folder: Path, server: str) -> str:
    """The export format for NAME or NAME==VERSION, whether or not it reads the adapter as it is.

    Raises SettingsError for an unknown server, UnsupportedError if there is none, DataError as `examine`.
    """
    (rule,), _ = rule_for(server)
    adapter, base, padded = _read(folder)
    if (format := mend(rule, adapter, padded, base)) is None:
        if base.resized:
            raise UnsupportedError(f"{base.resized}; name the enlarged base in {CONFIG}")
        what = ", ".join(adapter.variants()) or base.name
        raise UnsupportedError(f"no export of {what} works in {server}; serve it with PEFT")
    return format


def serving(source: Path, out: Path, format: str) -> dict[str, str]:
    """The command of each server for an export of the adapter in `source`."""
    adapter, base, _ = _read(source if format in ("gguf", "merged") else out)
    return serve_lines(adapter, base, out, format)


def served(folder: Path) -> str | None:
    """Which servers serve a classifier, as the adapter or merged, in a line; None for an adapter of another kind."""
    ways, base = ways_to_serve(folder)
    if not base.is_classifier:
        return None
    return "this classifier is served " + "; ".join(f"{way} by {', '.join(servers)}" for way, servers in ways.items())


def ways_to_serve(folder: Path) -> tuple[dict[str, list[str]], BaseFacts]:
    """The servers by the form that they read right: "as it is", "with --format NAME", "not"; and facts of the base."""
    adapter, base, padded = _read(folder)
    rules = [rule for rule in CONSUMERS if not rule.only or base.is_one_of(rule.only)]
    ways: dict[str, list[str]] = {"as it is": []}
    for server, consumer in _newest(_judged(rules, folder, adapter, base, padded)).items():
        form = f"with --format {consumer['mend']}" if consumer["mend"] else "not"
        ways.setdefault("as it is" if consumer["verdict"] == "right" else form, []).append(server)
    return {way: ways[way] for way in sorted(ways, key=lambda way: way == "not") if ways[way]}, base


def faults_in(folder: Path) -> list[str]:
    """The faults of an adapter that was just written, a sentence each."""
    try:
        adapter = read_adapter(folder)
        return [f"{fault.name}: {fault.cure}" for fault in _faults(adapter, base_facts(adapter, folder))]
    except DataError as error:
        return [str(error)]


def _read(folder: Path) -> tuple[LoraAdapter, BaseFacts, LoraAdapter | None]:
    """The adapter, the facts about its base, and the adapter in the universal form, if there is one."""
    adapter = read_adapter(folder)
    base = base_facts(adapter, folder)
    try:
        return adapter, base, universal(adapter, base.shapes, list(base.shapes))
    except TsqLoraError:
        return adapter, base, None


def _faults(adapter: LoraAdapter, base: BaseFacts) -> list[Finding]:
    return faults(adapter, base.weights, tied=base.tied, other=base.other)


def _judged(
    rules: Iterable[Consumer], folder: Path, adapter: LoraAdapter, base: BaseFacts, padded: LoraAdapter | None
) -> list[dict[str, Any]]:
    consumers = []
    for rule in rules:
        judgement = judge(rule, adapter, base)
        right = judgement.verdict == "right"
        consumers.append(
            {
                "name": rule.name,
                "server": rule.server,
                "version": rule.version,
                "date": str(rule.date),
                "source": rule.source,
                "evidence": rule.evidence,
                "reads": rule.file or "the directory",
                "verdict": judgement.verdict,
                "reasons": list(judgement.reasons),
                "factors": dict(judgement.factors),
                "mend": None if right else mend(rule, adapter, padded, base),
                "serve": serve_line(rule, adapter, base, folder, kind="adapter") if right else None,
            }
        )
    return consumers


def _newest(consumers: Sequence[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """What the newest rule of each server says."""
    newest: dict[str, Mapping[str, Any]] = {}
    for consumer in consumers:
        newest.setdefault(consumer["server"], consumer)
    return newest


def rule_for(server: str) -> tuple[Sequence[Consumer], list[str]]:
    """The rule for NAME or NAME==VERSION (the newest by default), and a note if nobody has read that version."""

    def plain(name: str) -> str:
        return re.sub(r"[^a-z0-9]", "", name.lower())  # llama.cpp and llama-cpp are the same

    def numbers(version: str) -> list[int]:
        return [int(part) for part in version.split(".")]

    name, _, version = server.partition("==")
    rules = [consumer for consumer in CONSUMERS if plain(consumer.server) == plain(name)]
    if not rules:
        raise SettingsError(f"--server {server}: {nearest(name.lower(), {c.server.lower() for c in CONSUMERS})}")
    rule = rules[0]
    if version not in ("", "main") and len(rules) > 1:
        if not (digits := re.match(r"v?(\d+(\.\d+)*)", version)):
            raise SettingsError(f"--server {server}: '{version}' is not a version; use one such as {rules[-1].until}")
        parts = numbers(digits[1])
        rule = next(r for r in reversed(rules) if not r.until or parts[: len(numbers(r.until))] <= numbers(r.until))
    if not version or version in rule.version.split(", "):
        return (rule,), []
    return (rule,), [
        f"the source of {rule.server} {version} was not read; the verdict follows {rule.version}, read on {rule.date}"
    ]


def mend(consumer: Consumer, adapter: LoraAdapter, padded: LoraAdapter | None, base: BaseFacts) -> str | None:
    """The export format that this server reads correctly: an adapter if there is one, else the merged model.

    None if PEFT cannot merge the adapter either, or if the server serves no such classifier.
    """
    plain = not (adapter.variants() or adapter.further or base.resized)
    if consumer.server in ("PEFT", "diffusers") and plain:
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
    unmergeable = UNMERGEABLE if base.biased else (*UNMERGEABLE, "lora_bias")
    if shared_by_sides(adapter) or any(adapter.config.get(option) for option in unmergeable):
        return None
    return "merged"


def _notes(folder: Path, adapter: LoraAdapter, base: BaseFacts) -> list[str]:
    notes = []
    if unsafe := pickles(folder):
        notes.append(f"{', '.join(unsafe)} can run code when loaded, and was not opened; delete it")
    if adapter.ignored:
        notes.append(f"{CONFIG} sets {', '.join(adapter.ignored)}, which tsqlora does not know and leaves out")
    if adapter.base is None:
        notes.append("the adapter names no base model, so whoever loads it must know the base")
    elif (Path(adapter.base).is_absolute() or adapter.base.startswith(".")) and not os.path.isdir(adapter.base):
        notes.append(f"its base model is a directory on another machine, {adapter.base}; name a hub id instead")
    if not base.is_here:
        notes.append("no matching base weights are here, so the number of layers is guessed from the adapter's names")
    return notes
