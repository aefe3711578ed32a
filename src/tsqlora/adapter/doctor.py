"""Judge an adapter before it is served: which servers read it correctly, which export helps, what is wrong with it.

Only numpy and safetensors read the files: no torch, no base model in memory.
"""

import os
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from tsqlora.adapter.checkpoint import BaseFacts, base_facts, in_block
from tsqlora.adapter.files import CONFIG, pickles, read_adapter
from tsqlora.adapter.gguf import ARCHITECTURES
from tsqlora.adapter.health import layer_health, nonfinite, vllm_rank
from tsqlora.adapter.lora import UNMERGEABLE, LoraAdapter, shared_by_sides, tied_targets
from tsqlora.adapter.rewrite import universal
from tsqlora.adapter.servers import CONSUMERS, TOWER, Consumer, judge, rule_for, rules_on, serve_line
from tsqlora.errors import DataError, Finding, TsqLoraError, UnsupportedError


def examine(folder: Path, *, server: str | None = None) -> dict[str, Any]:
    """The full report on the adapter in a directory, ready for JSON.

    Args:
        server: NAME or NAME==VERSION, to judge one server; else all.

    Raises SettingsError for an unknown server, DataError if the directory holds no adapter.
    """
    rule, noted = (None, []) if server is None else rule_for(server)
    adapter, base, padded = _read(folder)
    consumers = [_judged(one, folder, adapter, base, padded) for one in ([rule] if rule else rules_on(base))]
    newest = dict[str, str]()
    for consumer in consumers:
        newest.setdefault(consumer["server"], consumer["verdict"])
    if broken := nonfinite(adapter):  # `export` refuses it, and whoever loads it answers with nothing
        consumers = [one | {"mend": None, "serve": None} for one in consumers]
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
        "servers": newest,
        "consumers": consumers,
        "faults": [{"name": f.name, "cure": f.cure, "layers": f.where} for f in faults(adapter, base)],
        "health": {
            "nonfinite": broken,
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
    rule, _ = rule_for(server)
    adapter, base, padded = _read(folder)
    if (format := mend(rule, adapter, padded, base)) is None:
        for fault in base.unfit:
            raise UnsupportedError(f"{fault}: {CURES[fault]}")
        if base.resized:
            raise UnsupportedError(f"{base.resized}; name the enlarged base in {CONFIG}")
        what = ", ".join(adapter.variants()) or base.name
        raise UnsupportedError(f"no export of {what} works in {server}; serve it with PEFT")
    return format


def serving(source: Path, out: Path, format: str) -> dict[str, str]:
    """The command of each server that serves an export of the adapter in `source` right, by its newest rule."""
    kind = format if format in ("gguf", "merged") else "adapter"
    folder = out if kind == "adapter" else source
    adapter = read_adapter(folder)
    base, lines = base_facts(adapter, folder), dict[str, str]()
    for rule in (rule for rule in CONSUMERS if not rule.until):
        line = serve_line(rule, adapter, base, out, kind=kind)
        if line and (kind != "adapter" or judge(rule, adapter, base).verdict == "right"):
            lines[rule.server] = line
    return lines


def served(folder: Path) -> str | None:
    """Which servers serve a classifier, as the adapter or merged, in a line; None for an adapter of another kind."""
    ways, base = ways_to_serve(folder)
    if not base.is_classifier:
        return None
    return "this classifier is served " + "; ".join(f"{way} by {', '.join(servers)}" for way, servers in ways.items())


def ways_to_serve(folder: Path) -> tuple[dict[str, list[str]], BaseFacts]:
    """The servers by the form that they read right: "as it is", "with --format NAME", "not"; and facts of the base."""
    adapter, base, padded = _read(folder)
    ways: dict[str, list[str]] = {"as it is": [], "not": []}
    for rule in (rule for rule in rules_on(base) if not rule.until):
        way = "as it is"
        if judge(rule, adapter, base).verdict != "right":
            way = f"with --format {format}" if (format := mend(rule, adapter, padded, base)) else "not"
        ways.setdefault(way, []).append(rule.server)
    return {way: ways[way] for way in sorted(ways, key=lambda way: way == "not") if ways[way]}, base


def faults_in(folder: Path) -> list[str]:
    """The faults of an adapter that was just written, a sentence each."""
    try:
        adapter = read_adapter(folder)
        return [f"{fault.name}: {fault.cure}" for fault in faults(adapter, base_facts(adapter, folder))]
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


def _judged(
    rule: Consumer, folder: Path, adapter: LoraAdapter, base: BaseFacts, padded: LoraAdapter | None
) -> dict[str, Any]:
    """What a server does with the adapter, ready for JSON."""
    judgement = judge(rule, adapter, base)
    right = judgement.verdict == "right"
    return {
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


def mend(consumer: Consumer, adapter: LoraAdapter, padded: LoraAdapter | None, base: BaseFacts) -> str | None:
    """The export format that this server reads correctly: an adapter if there is one, else the merged model.

    None if PEFT cannot merge the adapter either, if it does not fit the base, or the server serves no such classifier.
    """
    if base.unfit:
        return None
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


CURES = {
    "not finite": "training diverged: take an earlier checkpoint, or train at a lower learning rate",
    "every update is zero": "it was not trained, or was saved before training; check that lora_B gets a gradient and a "
    "learning rate",
    "a trained module is not in the file": "it was trained, but not saved; save the adapter with the PEFT model's "
    "save_pretrained",
    "tied weights were saved twice": "the base has one weight for both, and {how}, or train with PEFT's "
    "ensure_weight_tying",
    "no key matches the base": "it was trained on another model; name that one as the base",
    "shapes differ from the base": "it was trained on a base of another size; if the vocabulary was enlarged before "
    "training (resize_token_embeddings), save that base and name it",
}
"""Every fault of an adapter that can be read, with its cure."""


def faults(adapter: LoraAdapter, base: BaseFacts) -> list[Finding]:
    """Why the adapter does nothing, or breaks its base."""
    layers, how = dict[str, Iterable[str]](), ""
    if counts := nonfinite(adapter):
        layers["not finite"] = counts
    elif adapter.is_zero:
        layers["every update is zero"] = ()
    if absent := _not_in_file(adapter):
        layers["a trained module is not in the file"] = absent
    saved = adapter.weights()
    pair = {name: t for name, t in saved.items() if in_block(name) in ("embed_tokens", "lm_head", "wte")}
    if base.tied and len(pair) == 2:
        one, copy = pair.values()
        same = one.dtype == copy.dtype and np.array_equal(one.raw, copy.raw)
        apart = "they were trained apart: `tsqlora export --format merged` keeps both"
        how = "the copies are the same: save one of them" if same else apart
        layers["tied weights were saved twice"] = pair
    if base.other:
        layers["shapes differ from the base"] = [f"{name} has {rows:,} tokens" for name, rows in base.other]
    layers |= base.unfit
    return [Finding(name, "fault", tuple(where), cure=CURES[name].format(how=how)) for name, where in layers.items()]


def _not_in_file(adapter: LoraAdapter) -> list[str]:
    """What the config says was trained beside the layers, but has no tensor."""
    present = adapter.whole()
    named = [name for name in adapter.config.get("modules_to_save") or () if name not in present]
    # PEFT always names two heads of a classifier, of which a model has at most one.
    absent = [name for name in named if not (present and name in ("classifier", "score"))]
    if adapter.config.get("trainable_token_indices") and not any("trainable_tokens" in key for key in adapter.further):
        absent.append("trainable_token_indices")
    return absent
