"""Judge an adapter by the rules of servers.toml: what a server multiplies each update by, refuses or leaves out."""

import math
import re
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from fnmatch import fnmatchcase
from importlib import resources
from typing import Any, Literal

from tsqlora.interop.health import VLLM_RANKS
from tsqlora.interop.lora import LoraAdapter, Target, tied_targets
from tsqlora.interop.rewrite import layer_kind, partners, served_rank

Verdict = Literal["right", "wrong", "refused"]


@dataclass(frozen=True, slots=True)
class BaseFacts:
    """What can be determined of an adapter's base model.

    Attributes:
        layers: its modules of each of the adapter's kinds of layer.
        model_type: from its config; None without one.
        tied: its head shares the weight of its embedding.
        biased: the adapter's layers have biases in it; True without its weights.
        name: transformers' class of it with the adapter's task; without a config the family may be missing, as in
            "ForSequenceClassification".
        added: tokens of the adapter's added_tokens.json beyond the base's vocabulary.
        resized: an embedding of the adapter with another number of tokens than the base has, in words; or empty.
        labels: classes of a head that transformers makes by its config; None without one.
    """

    layers: Mapping[str, Sequence[str]]
    model_type: str | None = None
    tied: bool = False
    biased: bool = True
    name: str = ""
    added: Sequence[str] = ()
    resized: str = ""
    labels: int | None = None

    @property
    def is_classifier(self) -> bool:
        return self.name.endswith("Classification")

    def is_one_of(self, patterns: Sequence[str], *, perhaps: bool = False) -> bool:
        """Whether its class matches one of the patterns; `perhaps`: also if only its family is unknown."""
        unknown = perhaps and self.name.startswith("For")
        return any(fnmatchcase(self.name, p) or (unknown and p.endswith(self.name)) for p in patterns)


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


@dataclass(frozen=True, slots=True)
class Problem:
    """Why a server refuses an adapter or reads it wrongly; nothing of the layers in `left_out` is applied."""

    verdict: Verdict
    reason: str
    left_out: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Judgement:
    """How a server reads one adapter.

    Attributes:
        factors: by layer, the factor by which its update is wrong; 0 for a layer that is left out.
    """

    verdict: Verdict
    reasons: tuple[str, ...]
    factors: Mapping[str, float]


def judge(consumer: Consumer, adapter: LoraAdapter, base: BaseFacts) -> Judgement:
    """Right, wrong or refused, and why.  A layer whose update is zero cannot be wrong."""
    problems = _problems(consumer, adapter, base)
    if refused := [problem.reason for problem in problems if problem.verdict == "refused"]:
        return Judgement("refused", tuple(refused), {})
    left_out = {name for problem in problems for name in problem.left_out}
    # The universal form shares one target among all layers that it fills up: look at each once.
    different = {id(target): target for target in adapter.targets.values()}
    idle = {number for number, target in different.items() if _is_idle(target)}
    factors = {}
    for name, target in adapter.targets.items():
        if target.scale and id(target) not in idle:
            factor = 0.0 if name in left_out else SCALES[consumer.scale](adapter, target) / target.scale
            if not math.isclose(factor, 1.0, rel_tol=1e-6):
                factors[name] = factor
    reasons = [problem.reason for problem in problems]
    if scaled := [factor for factor in factors.values() if factor]:
        reasons.append(f"{len(scaled)} of {len(adapter.targets)} layers at {_span(scaled)} their scale")
    return Judgement("wrong" if reasons else "right", tuple(reasons), factors)


def _problems(consumer: Consumer, adapter: LoraAdapter, base: BaseFacts) -> list[Problem]:
    checks = [_base_class(consumer, base), _layers(consumer, adapter)]
    checks += [CHECKS[name](adapter, base) for name in consumer.checks]
    checks.append(_experts(consumer, adapter, base) if consumer.experts else None)
    variants = {variant: variant.split("=")[0] for variant in adapter.variants()}
    refused = [variant for variant, option in variants.items() if option in consumer.refuses]
    checks.append(Problem("refused", f"does not take {', '.join(refused)}") if refused else None)
    heads = adapter.heads()
    dropped = all(any(part in head for part in consumer.drops) for head in heads)
    checks.append(_heads("ignored" if dropped else consumer.heads, heads))
    if "all" not in consumer.reads:
        ignored = [v for v, option in variants.items() if option not in (*consumer.refuses, *consumer.reads)]
        checks.append(Problem("wrong", f"ignores {', '.join(ignored)}") if ignored else None)
    return [problem for problem in checks if problem]


def _base_class(consumer: Consumer, base: BaseFacts) -> Problem | None:
    named = base.name and not base.name.startswith("For")
    if not base.is_one_of(consumer.bases) and not (named and consumer.takes and not base.is_one_of(consumer.takes)):
        return None
    return Problem("refused", f"takes no LoRA on {base.name if base.name[:3] != 'For' else f'a model {base.name}'}")


def _layers(consumer: Consumer, adapter: LoraAdapter) -> Problem | None:
    names = [name for name in adapter.targets if layer_kind(name) != name]
    if not consumer.layers or all(name.rpartition(".")[2] in consumer.layers for name in names):
        return None
    other = sorted({last for name in names if (last := name.rpartition(".")[2]) not in consumer.layers})
    return Problem("refused", f"takes no LoRA on layers named {', '.join(other)}")


def _experts(consumer: Consumer, adapter: LoraAdapter, base: BaseFacts) -> Problem | None:
    if not (names := adapter.experts()):
        return None
    for name in names:
        if f"{name}.base_layer" not in names and not (name.endswith(".base_layer") and name[:-11] in names):
            return Problem("refused", f"needs gate_up_proj and down_proj of {name}, but one of them has no adapter")
    if base.is_one_of(consumer.experts):
        return None
    return Problem("wrong", f"takes gate and up of experts as interleaved, but for {', '.join(consumer.experts)}")


def _heads(rule: str, heads: Sequence[str]) -> Problem | None:
    classifier = len(heads) == 1 and heads[0].rpartition(".")[2] in ("classifier", "score")
    if not heads or not rule or (rule.startswith("one") and classifier):
        return None
    names = ", ".join(heads)
    if rule == "ignored":
        return Problem("wrong", f"does not load saved modules: {names}")
    return Problem("refused", f"takes no saved modules{'' if rule == 'refused' else ' but ' + rule}: {names}")


def _is_idle(target: Target) -> bool:
    return target.rank == 0 or not (target.a.any() and target.b.any())


def _span(factors: Sequence[float]) -> str:
    low, high = min(factors), max(factors)
    return f"{low:.3g} times" if math.isclose(low, high, rel_tol=1e-3) else f"{low:.3g} to {high:.3g} times"


# ------------------------------------------------------------------------------------ scales


def _alpha_by(*, own_rank: bool, rslora: bool = True) -> Callable[[LoraAdapter, Target], float]:
    """lora_alpha over r or the layer's own rank; over its root if the server supports rsLoRA."""

    def scale(adapter: LoraAdapter, target: Target) -> float:
        rank = target.rank if own_rank else adapter.config["r"]
        root = rslora and adapter.config.get("use_rslora")
        return adapter.config.get("lora_alpha", 8) / (math.sqrt(rank) if root else rank)

    return scale


def _llama_cpp(adapter: LoraAdapter, target: Target) -> float:
    return _alpha_by(own_rank=True, rslora=False)(adapter, target) or 1.0  # an alpha of 0 means none


SCALES: Mapping[str, Callable[[LoraAdapter, Target], float]] = {
    "own": lambda adapter, target: target.scale,
    "alpha / r": _alpha_by(own_rank=False),
    "alpha / r, no rsLoRA": _alpha_by(own_rank=False, rslora=False),
    "alpha / own rank": _alpha_by(own_rank=True),
    "llama.cpp": _llama_cpp,
}

# ------------------------------------------------------------------------------------ checks


def _rank_zero(adapter: LoraAdapter, base: BaseFacts) -> Problem | None:
    empty = [name for name, target in adapter.targets.items() if target.rank == 0]
    return Problem("refused", f"{empty[0]} has rank 0") if empty else None


def _patterns(adapter: LoraAdapter, base: BaseFacts) -> Problem | None:
    for pattern, setting in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha")):
        for key, value in (adapter.config.get(pattern) or {}).items():
            common = adapter.config.get(setting, 8)
            if value != common:
                return Problem("refused", f"{pattern} gives {key} {value:g}, but {setting} is {common:g}")
    return None


def _other_tensors(adapter: LoraAdapter, base: BaseFacts) -> Problem | None:
    names = sorted(name for name in adapter.further if not name.endswith((".lora_A.weight", ".lora_B.weight")))
    return Problem("refused", f"stops at a tensor other than A and B: {names[0]}") if names else None


TOWER = re.compile(r"(^|\.)(visual|vision\w*|audio\w*|image\w*|multi_modal_projector|embed_vision|embed_audio)\.")
"""Parts of a model that reads more than texts: no layers of its language model."""


def _towers(adapter: LoraAdapter, base: BaseFacts) -> Problem | None:
    if not (names := tuple(name for name in adapter.targets if TOWER.search(name))):
        return None
    return Problem("wrong", f"puts adapters on the language model alone, so not on {names[0]}", names)


def _added_tokens(adapter: LoraAdapter, base: BaseFacts) -> Problem | None:
    return Problem("refused", f"takes no added tokens: {', '.join(base.added[:3])}") if base.added else None


def _pattern_of_names(adapter: LoraAdapter, base: BaseFacts) -> Problem | None:
    """A regular expression in place of a list, as unsloth writes for models that read images."""
    if isinstance(named := adapter.config.get("target_modules"), str) and named not in ("all", "all-linear"):
        return Problem("refused", "takes no pattern as target_modules")
    return None


def _vocabulary(adapter: LoraAdapter, base: BaseFacts) -> Problem | None:
    return Problem("refused", f"{base.resized}; serve the enlarged base") if base.resized else None


def _large_rank(adapter: LoraAdapter, base: BaseFacts) -> Problem | None:
    if (rank := adapter.named_rank) <= VLLM_RANKS[-1]:
        return None
    return Problem("refused", f"rank {rank} is above {VLLM_RANKS[-1]}, the largest --max-lora-rank")


def _more_labels(adapter: LoraAdapter, base: BaseFacts) -> Problem | None:
    for name, head in adapter.saved.items():
        labels = head.shape[0] if name.endswith(("score.weight", "classifier.weight")) else 0
        if base.labels is not None and labels > base.labels:
            why = f"its head has {labels} classes, the base {base.labels}; it needs --max-lora-cls-labels {labels}"
            return Problem("refused", why)
    return None


def _rank_r(adapter: LoraAdapter, base: BaseFacts) -> Problem | None:
    rank = adapter.config["r"]
    for name, target in adapter.targets.items():
        if target.rank != rank:
            return Problem("refused", f"{name} has rank {target.rank}, but its buffers have r = {rank}")
    return None


def _partners(adapter: LoraAdapter, base: BaseFacts) -> Problem | None:
    for name in adapter.targets:
        if absent := [partner for partner in partners(name) if partner not in adapter.targets]:
            return Problem("refused", f"stacks {name} with {absent[0].rpartition('.')[2]}, which has no adapter")
    return None


def _one_rank(adapter: LoraAdapter, base: BaseFacts) -> Problem | None:
    ranks = {target.rank for target in adapter.targets.values()}
    if len(ranks) < 2:
        return None
    return Problem("refused", f"needs one rank for all layers; they have {min(ranks)} to {max(ranks)}")


def _one_rank_per_kind(adapter: LoraAdapter, base: BaseFacts) -> Problem | None:
    ranks: dict[str, set[int]] = {}
    for name, target in adapter.targets.items():
        ranks.setdefault(layer_kind(name), set()).add(served_rank(target.rank))
    mixed = sorted(kind for kind, of_kind in ranks.items() if len(of_kind) > 1)
    return Problem("refused", f"stacks the layers of a kind, but {mixed[0]} has several ranks") if mixed else None


def _every_layer(adapter: LoraAdapter, base: BaseFacts) -> Problem | None:
    targets: dict[str, list[str]] = {}
    for name in adapter.targets:
        targets.setdefault(layer_kind(name), []).append(name)
    missing, dropped = [], []
    for kind, names in base.layers.items():
        if absent := [name for name in names if name not in adapter.targets]:
            missing += absent
            dropped += targets.get(kind, [])
    if not missing:
        return None
    return Problem("wrong", f"{missing[0]} has no adapter, so no layer of its kind gets one", tuple(dropped))


LLAMA = re.compile(
    r"model\.layers\.\d+\.(self_attn\.(q|k|v|qkv|o)_proj|mlp\.(gate_proj|up_proj|down_proj|c_fc|c_proj))"
)
"""Layers of Llama and the like, under the names by which TGI looks them up in an adapter."""


def _other_names(adapter: LoraAdapter, base: BaseFacts) -> Problem | None:
    names = tuple(name for name in adapter.targets if not LLAMA.fullmatch(name))
    return Problem("wrong", f"puts no adapter on {names[0]}", names) if names else None


def _outside_blocks(adapter: LoraAdapter, base: BaseFacts) -> Problem | None:
    names = tuple(name for name in adapter.targets if layer_kind(name) == name)
    return Problem("wrong", f"puts no adapter on {names[0]}", names) if names else None


def _tied(adapter: LoraAdapter, base: BaseFacts) -> Problem | None:
    if base.tied and (names := tied_targets(adapter)):
        return Problem("refused", f"takes no adapter on {names[0]}, whose weight another layer of the base shares")
    return None


def _padded_rank(adapter: LoraAdapter, base: BaseFacts) -> Problem | None:
    rank, kinds = adapter.config["r"], {layer_kind(name) for name in adapter.targets}
    if rank == served_rank(rank) or len(kinds) == 1:
        return None
    why = f"pads rank {rank} to {served_rank(rank)}, and scales all kinds of layers but the first by alpha over that"
    return Problem("wrong", why)


CHECKS: Mapping[str, Callable[[LoraAdapter, BaseFacts], Problem | None]] = {
    "added tokens": _added_tokens,
    "rank 0": _rank_zero,
    "rank r": _rank_r,
    "large rank": _large_rank,
    "one rank": _one_rank,
    "one rank per kind": _one_rank_per_kind,
    "every layer": _every_layer,
    "padded rank": _padded_rank,
    "patterns": _patterns,
    "partners": _partners,
    "other names": _other_names,
    "outside blocks": _outside_blocks,
    "tied": _tied,
    "other tensors": _other_tensors,
    "pattern of names": _pattern_of_names,
    "vocabulary": _vocabulary,
    "towers": _towers,
    "labels": _more_labels,
}


def _read_rules() -> tuple[Consumer, ...]:
    text = resources.files("tsqlora.interop").joinpath("servers.toml").read_text(encoding="utf-8")
    rules: list[dict[str, Any]] = tomllib.loads(text)["rules"]
    return tuple(Consumer(**rule) for rule in rules)


CONSUMERS = _read_rules()
