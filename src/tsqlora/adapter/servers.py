"""Judge an adapter by the rules of servers.toml: what a server multiplies each update by, refuses or leaves out."""

import math
import re
import tomllib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from importlib import resources
from pathlib import Path
from shlex import quote
from typing import Any, Literal

from tsqlora.adapter.checkpoint import BaseFacts
from tsqlora.adapter.gguf import FILE
from tsqlora.adapter.health import VLLM_RANKS, vllm_rank
from tsqlora.adapter.lora import LoraAdapter, Target, tied_targets
from tsqlora.adapter.rewrite import layer_kind, partners, served_rank
from tsqlora.errors import Finding

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
    findings = [*_findings(consumer, adapter, base)]
    if refused := [finding.cause for finding in findings if finding.severity == "refused"]:
        return Judgement("refused", tuple(refused), {})
    left_out = {name for finding in findings for name in finding.where}
    # The universal form shares one target among all layers that it fills up: look at each once.
    different = {id(target): target for target in adapter.targets.values()}
    idle = {number for number, t in different.items() if t.rank == 0 or not (t.a.any() and t.b.any())}
    factors = {}
    for name, target in adapter.targets.items():
        if target.scale and id(target) not in idle:
            factor = 0.0 if name in left_out else SCALES[consumer.scale](adapter, target) / target.scale
            if not math.isclose(factor, 1.0, rel_tol=1e-6):
                factors[name] = factor
    reasons = [finding.cause for finding in findings]
    if scaled := [factor for factor in factors.values() if factor]:
        low, high = min(scaled), max(scaled)
        span = f"{low:.3g} times" if math.isclose(low, high, rel_tol=1e-3) else f"{low:.3g} to {high:.3g} times"
        reasons.append(f"{len(scaled)} of {len(adapter.targets)} layers at {span} their scale")
    return Judgement("wrong" if reasons else "right", tuple(reasons), factors)


def _findings(consumer: Consumer, adapter: LoraAdapter, base: BaseFacts) -> Iterator[Finding]:
    """What the rule says against the adapter, the base's class first."""

    def finding(name: str, verdict: Literal["wrong", "refused"], cause: str, *where: str) -> Finding:
        return Finding(name, verdict, where, cause)

    named = base.name and not base.name.startswith("For")
    if base.is_one_of(consumer.bases) or (named and consumer.takes and not base.is_one_of(consumer.takes)):
        yield finding("base", "refused", f"takes no LoRA on {'a model ' * base.name.startswith('For')}{base.name}")
    lasts = {name.rpartition(".")[2] for name in adapter.targets if layer_kind(name) != name}
    if consumer.layers and (other := sorted(lasts.difference(consumer.layers))):
        yield finding("layers", "refused", f"takes no LoRA on layers named {', '.join(other)}")
    for name in consumer.checks:
        if name in REFUSED and (cause := REFUSED[name](adapter, base)):
            yield finding(name, "refused", cause)
        elif name in MISREAD and (misread := MISREAD[name](adapter, base)):
            yield finding(name, "wrong", *misread)
    experts = adapter.experts()
    halves = [name.removesuffix(".base_layer") for name in experts]
    alone = next((name for name, half in zip(experts, halves, strict=True) if halves.count(half) < 2), None)
    if consumer.experts and alone is not None:
        cause = f"needs gate_up_proj and down_proj of {alone}, but one of them has no adapter"
        yield finding("experts", "refused", cause)
    elif consumer.experts and experts and not base.is_one_of(consumer.experts):
        cause = f"takes gate and up of experts as interleaved, but for {', '.join(consumer.experts)}"
        yield finding("experts", "wrong", cause)
    variants = {variant: variant.split("=")[0] for variant in adapter.variants()}
    if refused := [variant for variant, option in variants.items() if option in consumer.refuses]:
        yield finding("variants", "refused", f"does not take {', '.join(refused)}")
    heads = adapter.heads()
    rule = "ignored" if all(any(part in head for part in consumer.drops) for head in heads) else consumer.heads
    one = len(heads) == 1 and heads[0].rpartition(".")[2] in ("classifier", "score") and rule.startswith("one")
    if heads and rule == "ignored":
        yield finding("heads", "wrong", f"does not load saved modules: {', '.join(heads)}")
    elif heads and rule and not one:
        but = "" if rule == "refused" else f" but {rule}"
        yield finding("heads", "refused", f"takes no saved modules{but}: {', '.join(heads)}")
    ignored = [v for v, option in variants.items() if option not in (*consumer.refuses, *consumer.reads)]
    if ignored and "all" not in consumer.reads:
        yield finding("variants", "wrong", f"ignores {', '.join(ignored)}")


# ------------------------------------------------------------------------------------ scales


def _alpha_by(*, own_rank: bool, rslora: bool = True) -> Callable[[LoraAdapter, Target], float]:
    """lora_alpha over r or the layer's own rank; over its root if the server supports rsLoRA."""

    def scale(adapter: LoraAdapter, target: Target) -> float:
        rank = target.rank if own_rank else adapter.config["r"]
        root = rslora and adapter.config.get("use_rslora")
        return adapter.config.get("lora_alpha", 8) / (math.sqrt(rank) if root else rank)

    return scale


SCALES: Mapping[str, Callable[[LoraAdapter, Target], float]] = {
    "own": lambda adapter, target: target.scale,
    "alpha / r": _alpha_by(own_rank=False),
    "alpha / r, no rsLoRA": _alpha_by(own_rank=False, rslora=False),
    "alpha / own rank": _alpha_by(own_rank=True),
    # An alpha of 0 means none.
    "llama.cpp": lambda adapter, target: _alpha_by(own_rank=True, rslora=False)(adapter, target) or 1.0,
}

# ------------------------------------------------------------------------------------ checks

TOWER = re.compile(r"(^|\.)(visual|vision\w*|audio\w*|image\w*|multi_modal_projector|embed_vision|embed_audio)\.")
"""Parts of a model that reads more than texts: no layers of its language model."""

LLAMA = re.compile(
    r"model\.layers\.\d+\.(self_attn\.(q|k|v|qkv|o)_proj|mlp\.(gate_proj|up_proj|down_proj|c_fc|c_proj))"
)
"""Layers of Llama and the like, under the names by which TGI looks them up in an adapter."""


def _rank_zero(adapter: LoraAdapter, base: BaseFacts) -> str | None:
    empty = [name for name, target in adapter.targets.items() if target.rank == 0]
    return f"{empty[0]} has rank 0" if empty else None


def _patterns(adapter: LoraAdapter, base: BaseFacts) -> str | None:
    for pattern, setting in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha")):
        for key, value in (adapter.config.get(pattern) or {}).items():
            common = adapter.config.get(setting, 8)
            if value != common:
                return f"{pattern} gives {key} {value:g}, but {setting} is {common:g}"
    return None


def _other_tensors(adapter: LoraAdapter, base: BaseFacts) -> str | None:
    names = sorted(name for name in adapter.further if not name.endswith((".lora_A.weight", ".lora_B.weight")))
    return f"stops at a tensor other than A and B: {names[0]}" if names else None


def _pattern_of_names(adapter: LoraAdapter, base: BaseFacts) -> str | None:
    """A regular expression in place of a list, as unsloth writes for models that read images."""
    named = adapter.config.get("target_modules")
    is_pattern = isinstance(named, str) and named not in ("all", "all-linear")
    return "takes no pattern as target_modules" if is_pattern else None


def _large_rank(adapter: LoraAdapter, base: BaseFacts) -> str | None:
    rank, largest = adapter.named_rank, VLLM_RANKS[-1]
    return f"rank {rank} is above {largest}, the largest --max-lora-rank" if rank > largest else None


def _more_labels(adapter: LoraAdapter, base: BaseFacts) -> str | None:
    for name, head in adapter.saved.items():
        labels = head.shape[0] if name.endswith(("score.weight", "classifier.weight")) else 0
        if base.labels is not None and labels > base.labels:
            return f"its head has {labels} classes, the base {base.labels}; it needs --max-lora-cls-labels {labels}"
    return None


def _rank_r(adapter: LoraAdapter, base: BaseFacts) -> str | None:
    rank = adapter.config["r"]
    others = [(name, target.rank) for name, target in adapter.targets.items() if target.rank != rank]
    return f"{others[0][0]} has rank {others[0][1]}, but its buffers have r = {rank}" if others else None


def _partners(adapter: LoraAdapter, base: BaseFacts) -> str | None:
    for name in adapter.targets:
        if absent := [partner for partner in partners(name) if partner not in adapter.targets]:
            return f"stacks {name} with {absent[0].rpartition('.')[2]}, which has no adapter"
    return None


def _one_rank(adapter: LoraAdapter, base: BaseFacts) -> str | None:
    ranks = {target.rank for target in adapter.targets.values()}
    return f"needs one rank for all layers; they have {min(ranks)} to {max(ranks)}" if len(ranks) > 1 else None


def _one_rank_per_kind(adapter: LoraAdapter, base: BaseFacts) -> str | None:
    ranks = {(layer_kind(name), served_rank(target.rank)) for name, target in adapter.targets.items()}
    mixed = sorted(kind for kind, count in Counter(kind for kind, _ in ranks).items() if count > 1)
    return f"stacks the layers of a kind, but {mixed[0]} has several ranks" if mixed else None


def _tied(adapter: LoraAdapter, base: BaseFacts) -> str | None:
    names = tied_targets(adapter) if base.tied else []
    return f"takes no adapter on {names[0]}, whose weight another layer of the base shares" if names else None


REFUSED: Mapping[str, Callable[[LoraAdapter, BaseFacts], str | None]] = {
    "added tokens": lambda _, base: f"takes no added tokens: {', '.join(base.added[:3])}" if base.added else None,
    "vocabulary": lambda _, base: f"{base.resized}; serve the enlarged base" if base.resized else None,
    "rank 0": _rank_zero,
    "rank r": _rank_r,
    "large rank": _large_rank,
    "one rank": _one_rank,
    "one rank per kind": _one_rank_per_kind,
    "patterns": _patterns,
    "partners": _partners,
    "tied": _tied,
    "other tensors": _other_tensors,
    "pattern of names": _pattern_of_names,
    "labels": _more_labels,
}
"""Checks for what a server refuses: the reason, or None."""


def _left_out(adapter: LoraAdapter, reason: str, is_read: Callable[[str], Any]) -> tuple[str, ...] | None:
    names = [name for name in adapter.targets if not is_read(name)]
    return (f"{reason} {names[0]}", *names) if names else None


def _every_layer(adapter: LoraAdapter, base: BaseFacts) -> tuple[str, ...] | None:
    lacks = {kind: [name for name in names if name not in adapter.targets] for kind, names in base.layers.items()}
    if not (missing := [name for names in lacks.values() for name in names]):
        return None
    dropped = [name for name in adapter.targets if lacks.get(layer_kind(name))]
    return (f"{missing[0]} has no adapter, so no layer of its kind gets one", *dropped)


def _padded_rank(adapter: LoraAdapter, base: BaseFacts) -> tuple[str, ...] | None:
    rank, kinds = adapter.config["r"], {layer_kind(name) for name in adapter.targets}
    if rank == served_rank(rank) or len(kinds) == 1:
        return None
    return (
        f"pads rank {rank} to {served_rank(rank)}, and scales all kinds of layers but the first by alpha over that",
    )


MISREAD: Mapping[str, Callable[[LoraAdapter, BaseFacts], tuple[str, ...] | None]] = {
    "every layer": _every_layer,
    "padded rank": _padded_rank,
    "other names": lambda adapter, _: _left_out(adapter, "puts no adapter on", LLAMA.fullmatch),
    "outside blocks": lambda adapter, _: _left_out(adapter, "puts no adapter on", lambda n: layer_kind(n) != n),
    "towers": lambda adapter, _: _left_out(
        adapter, "puts adapters on the language model alone, so not on", lambda name: not TOWER.search(name)
    ),
}
"""Checks for what a server leaves out or scales wrongly: the reason, and the layers that get no update; or None."""


def _read_rules() -> tuple[Consumer, ...]:
    text = resources.files("tsqlora.adapter").joinpath("servers.toml").read_text(encoding="utf-8")
    rules: list[dict[str, Any]] = tomllib.loads(text)["rules"]
    return tuple(Consumer(**rule) for rule in rules)


CONSUMERS = _read_rules()

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


def serve_lines(adapter: LoraAdapter, base: BaseFacts, folder: Path, format: str) -> dict[str, str]:
    """The command of each server that serves an export in this format right, by its newest rule."""
    kind = format if format in ("gguf", "merged") else "adapter"
    lines = dict[str, str]()
    for consumer in (one for one in CONSUMERS if not one.until):
        line = serve_line(consumer, adapter, base, folder, kind=kind)
        if line and (kind != "adapter" or judge(consumer, adapter, base).verdict == "right"):
            lines[consumer.server] = line
    return lines
