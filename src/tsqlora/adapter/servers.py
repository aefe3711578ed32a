"""Judge an adapter by the rules of servers.toml: what a server multiplies each update by, refuses or leaves out."""

import math
import re
import tomllib
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from importlib import resources
from pathlib import Path
from shlex import quote
from typing import Literal

from tsqlora.adapter.checkpoint import BaseFacts
from tsqlora.adapter.gguf import FILE
from tsqlora.adapter.health import VLLM_RANKS, vllm_rank
from tsqlora.adapter.lora import LoraAdapter, Target, tied_targets
from tsqlora.adapter.rewrite import layer_kind, partners, served_rank
from tsqlora.errors import SettingsError, nearest

NAME = "adapter"
"""The adapter's name on a server."""


@dataclass(frozen=True, slots=True)
class Consumer:
    """One rule for one reader of adapters; servers.toml describes the fields."""

    server: str
    version: str
    date: date
    source: str
    evidence: str
    rule: str
    scale: str
    checks: Sequence[str] = ()
    heads: str = ""
    drops: Sequence[str] = ()
    refuses: Sequence[str] = ()
    reads: Sequence[str] = ()
    file: str = ""
    until: str = ""
    bases: Sequence[str] = ()
    takes: Sequence[str] = ()
    layers: Sequence[str] = ()
    serves: Sequence[str] = ()
    only: Sequence[str] = ()
    experts: Sequence[str] = ()
    serve: str = ""
    merged: str = ""
    template: str = ""

    @property
    def name(self) -> str:
        """The server, and up to which version of it."""
        return f"{self.server} to {self.until}" if self.until else self.server

    def ignores(self, heads: Collection[str]) -> bool:
        """Whether it leaves out all of these saved modules without a word."""
        return self.heads == "ignored" or all(any(part in head for part in self.drops) for head in heads)


@dataclass(frozen=True, slots=True)
class Judgement:
    """How a server reads one adapter.

    Attributes:
        factors: by layer, the factor by which its update is wrong; 0 for a layer that is left out.
    """

    verdict: Literal["right", "wrong", "refused"]
    reasons: tuple[str, ...]
    factors: Mapping[str, float]


def judge(consumer: Consumer, adapter: LoraAdapter, base: BaseFacts) -> Judgement:
    """Right, wrong or refused, and why.  A layer whose update is zero cannot be wrong."""
    if refused := tuple(_refusals(consumer, adapter, base)):
        return Judgement("refused", refused, {})
    misread = [*_misreadings(consumer, adapter, base)]
    left_out = {name for _, names in misread for name in names}
    # The universal form shares one target among all layers that it fills up: look at each once.
    different = {id(target): target for target in adapter.targets.values()}
    idle = {number for number, t in different.items() if t.rank == 0 or not (t.a.any() and t.b.any())}
    factors = {}
    for name, target in adapter.targets.items():
        if target.scale and id(target) not in idle:
            factor = 0.0 if name in left_out else _scale(consumer.scale, adapter, target) / target.scale
            if not math.isclose(factor, 1.0, rel_tol=1e-6):
                factors[name] = factor
    reasons = [reason for reason, _ in misread]
    if scaled := [factor for factor in factors.values() if factor]:
        low, high = min(scaled), max(scaled)
        span = f"{low:.3g} times" if math.isclose(low, high, rel_tol=1e-3) else f"{low:.3g} to {high:.3g} times"
        reasons.append(f"{len(scaled)} of {len(adapter.targets)} layers at {span} their scale")
    return Judgement("wrong" if reasons else "right", tuple(reasons), factors)


def _scale(how: str, adapter: LoraAdapter, target: Target) -> float:
    """What a server multiplies BA by."""
    alpha, r, rank = adapter.config.get("lora_alpha", 8), adapter.config["r"], target.rank
    rslora = adapter.config.get("use_rslora")
    match how:
        case "own":
            return target.scale
        case "alpha / r":
            return alpha / (math.sqrt(r) if rslora else r)
        case "alpha / r, no rsLoRA":
            return alpha / r
        case "alpha / own rank":
            return alpha / (math.sqrt(rank) if rslora else rank)
        case "llama.cpp":
            return alpha / rank or 1.0  # an alpha of 0 means none
        case _:
            raise KeyError(how)


def _refusals(consumer: Consumer, adapter: LoraAdapter, base: BaseFacts) -> Iterator[str]:
    """Why a server refuses the adapter, the base's class first."""
    yield from (": ".join([fault, *layers[:1]]) for fault, layers in base.unfit.items())
    named = base.name and not base.name.startswith("For")
    if base.is_one_of(consumer.bases) or (named and consumer.takes and not base.is_one_of(consumer.takes)):
        yield f"takes no LoRA on {'a model ' * base.name.startswith('For')}{base.name}"
    lasts = {name.rpartition(".")[2] for name in adapter.targets if layer_kind(name) != name}
    if consumer.layers and (other := sorted(lasts.difference(consumer.layers))):
        yield f"takes no LoRA on layers named {', '.join(other)}"
    yield from filter(None, (_refusal(check, adapter, base) for check in consumer.checks))
    halves = Counter(name.removesuffix(".base_layer") for name in adapter.experts())
    if consumer.experts and (alone := [name for name, count in halves.items() if count < 2]):
        yield f"needs gate_up_proj and down_proj of {alone[0]}, but one of them has no adapter"
    # A setting without a tensor changes no update, but may be refused by the config alone.
    variants, setting = adapter.variants(), adapter.config.get("bias") or "none"
    if adapter.bias != setting:
        variants.append(f"bias={setting}")
    if refused := [variant for variant in variants if variant.split("=")[0] in consumer.refuses]:
        yield f"does not take {', '.join(refused)}"
    heads = adapter.heads()
    one = consumer.heads.startswith("one") and len(heads) == 1
    one = one and heads[0].rpartition(".")[2] in ("classifier", "score")
    if consumer.heads and not one and not consumer.ignores(heads):
        but = "" if consumer.heads == "refused" else f" but {consumer.heads}"
        yield f"takes no saved modules{but}: {', '.join(heads)}"


def _refusal(check: str, adapter: LoraAdapter, base: BaseFacts) -> str | None:
    """Why a server with this check refuses the adapter; None if it does not."""
    config, targets, r = adapter.config, adapter.targets, adapter.config["r"]
    ranks = {name: target.rank for name, target in targets.items()}
    match check:
        case "added tokens" if base.added:
            return f"takes no added tokens: {', '.join(base.added[:3])}"
        case "vocabulary" if base.resized:
            return f"{base.resized}; serve the enlarged base"
        case "rank 0" if empty := [name for name, rank in ranks.items() if rank == 0]:
            return f"{empty[0]} has rank 0"
        case "rank r" if other := [name for name, rank in ranks.items() if rank != r]:
            return f"{other[0]} has rank {ranks[other[0]]}, but its buffers have r = {r}"
        case "large rank" if adapter.named_rank > VLLM_RANKS[-1]:
            return f"rank {adapter.named_rank} is above {VLLM_RANKS[-1]}, the largest --max-lora-rank"
        case "one rank" if len({*ranks.values()}) > 1:
            return f"needs one rank for all layers; they have {min(ranks.values())} to {max(ranks.values())}"
        case "one rank per kind":
            different = {(layer_kind(name), served_rank(rank)) for name, rank in ranks.items()}
            served = Counter(kind for kind, _ in different)
            if mixed := sorted(kind for kind, count in served.items() if count > 1):
                return f"stacks the layers of a kind, but {mixed[0]} has several ranks"
        case "patterns":
            for pattern, setting in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha")):
                common = config.get(setting, 8)
                for key, value in (config.get(pattern) or {}).items():
                    if value != common:
                        return f"{pattern} gives {key} {value:g}, but {setting} is {common:g}"
        case "partners" if gaps := [(name, one) for name in targets for one in partners(name) if one not in targets]:
            return f"stacks {gaps[0][0]} with {gaps[0][1].rpartition('.')[2]}, which has no adapter"
        case "tied" if base.tied and (shared := tied_targets(adapter)):
            return f"takes no adapter on {shared[0]}, whose weight another layer of the base shares"
        case "other tensors" if names := sorted(name for name in adapter.further if not name.endswith(_A_AND_B)):
            return f"stops at a tensor other than A and B: {names[0]}"
        case "pattern of names":  # a regular expression, as unsloth writes for models that read images
            if isinstance(named := config.get("target_modules"), str) and named not in ("all", "all-linear"):
                return "takes no pattern as target_modules"
        case "labels" if base.labels is not None:
            heads = [t.shape[0] for n, t in adapter.saved.items() if n.endswith(("score.weight", "classifier.weight"))]
            if more := [labels for labels in heads if labels > base.labels]:
                needs = f"it needs --max-lora-cls-labels {more[0]}"
                return f"its head has {more[0]} classes, the base {base.labels}; {needs}"
    return None


_A_AND_B = (".lora_A.weight", ".lora_B.weight")

TOWER = re.compile(r"(^|\.)(visual|vision\w*|audio\w*|image\w*|multi_modal_projector|embed_vision|embed_audio)\.")
"""Parts of a model that reads more than texts: no layers of its language model."""

LLAMA = re.compile(
    r"model\.layers\.\d+\.(self_attn\.(q|k|v|qkv|o)_proj|mlp\.(gate_proj|up_proj|down_proj|c_fc|c_proj))"
)
"""Layers of Llama and the like, under the names by which TGI looks them up in an adapter."""


def _misreadings(consumer: Consumer, adapter: LoraAdapter, base: BaseFacts) -> Iterator[tuple[str, Collection[str]]]:
    """What a server leaves out or scales wrongly, and the layers that get no update."""
    targets, r = adapter.targets, adapter.config["r"]
    for check in consumer.checks:
        match check:
            case "every layer":
                lacks = {kind: [name for name in names if name not in targets] for kind, names in base.layers.items()}
                if missing := [name for names in lacks.values() for name in names]:
                    dropped = [name for name in targets if lacks.get(layer_kind(name))]
                    yield f"{missing[0]} has no adapter, so no layer of its kind gets one", dropped
            case "padded rank" if r != served_rank(r) and len({layer_kind(name) for name in targets}) != 1:
                to = served_rank(r)
                yield f"pads rank {r} to {to}, and scales all kinds of layers but the first by alpha over that", ()
            case "other names" if names := [name for name in targets if not LLAMA.fullmatch(name)]:
                yield f"puts no adapter on {names[0]}", names
            case "outside blocks" if names := [name for name in targets if layer_kind(name) == name]:
                yield f"puts no adapter on {names[0]}", names
            case "towers" if names := [name for name in targets if TOWER.search(name)]:
                yield f"puts adapters on the language model alone, so not on {names[0]}", names
    if consumer.experts and adapter.experts() and not base.is_one_of(consumer.experts):
        yield f"takes gate and up of experts as interleaved, but for {', '.join(consumer.experts)}", ()
    if (heads := adapter.heads()) and consumer.ignores(heads):
        yield f"does not load saved modules: {', '.join(heads)}", ()
    ignored = [variant for variant in adapter.variants() if variant.split("=")[0] not in consumer.reads]
    if ignored and "all" not in consumer.reads:
        yield f"ignores {', '.join(ignored)}", ()


_RULES = resources.files("tsqlora.adapter").joinpath("servers.toml").read_text(encoding="utf-8")
CONSUMERS = tuple(Consumer(**rule) for rule in tomllib.loads(_RULES)["rules"])


def rules_on(base: BaseFacts) -> list[Consumer]:
    """The rules that are listed for a base; of a server's the newest comes first."""
    return [rule for rule in CONSUMERS if not rule.only or base.is_one_of(rule.only)]


def rule_for(server: str) -> tuple[Consumer, list[str]]:
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
        return rule, []
    read = f"the verdict follows {rule.version}, read on {rule.date}"
    return rule, [f"the source of {rule.server} {version} was not read; {read}"]


# ---------------------------------------------------------------------------------- commands


def serve_line(consumer: Consumer, adapter: LoraAdapter, base: BaseFacts, folder: Path, *, kind: str) -> str | None:
    """The command for what lies in a folder; None if this server does not serve it.

    The server may lack the base; a classifier has a command for its merged model alone, where the server has such.

    Args:
        kind: "adapter", which was judged right; "gguf" or "merged".
    """
    command, rank = (consumer.merged if kind == "merged" else consumer.serve), vllm_rank(adapter.named_rank)
    if (kind == "adapter" and consumer.file) or (kind == "gguf" and not consumer.file) or not command:
        return None
    if consumer.only and not base.is_one_of(consumer.only):
        return None
    if base.is_classifier and not (kind == "merged" and base.is_one_of(consumer.serves, perhaps=True)):
        return None
    writes = adapter.config.get("task_type") == "CAUSAL_LM" or base.name.endswith("ForCausalLM")
    if (rank is None and "{rank}" in command) or not (base.is_classifier or writes):
        return None
    template = folder / "chat_template.jinja"
    words = {"base": adapter.base or "BASE", "adapter": f"{NAME}={folder}", "file": str(folder / FILE)}
    words |= {"merged": str(folder), "template": str(template), "rank": str(rank)}
    whole = f"{command} {consumer.template}" if template.is_file() else command
    return whole.strip().format(**{name: quote(word) for name, word in words.items()})
