"""Who reads a PEFT adapter, and what each makes of it: one table of rules, with what they were read in.

A rule says what a consumer multiplies BA of a layer with, and what it refuses or leaves out.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from tsqlora.interop.lora import LoraAdapter, Target
from tsqlora.interop.rewrite import layer_kind, partners, served_rank

Verdict = Literal["right", "wrong", "refused"]
Layers = Mapping[str, Sequence[str]]
"""The modules that the base has of each of the adapter's kinds of layer, as far as that is known."""


@dataclass(frozen=True, slots=True)
class Problem:
    """Something that a consumer does not take, or takes wrongly."""

    verdict: Verdict
    reason: str
    left_out: tuple[str, ...] = ()
    """Layers of which nothing is applied."""


Check = Callable[[LoraAdapter, Layers], Problem | None]


@dataclass(frozen=True, slots=True)
class Consumer:
    """One reader of adapters.

    Attributes:
        server: what it is called; a server whose versions differ has several rules, the newest first.
        version, source: what the rule was read in. `evidence`: C its own code was run, S read in
            its source, I an issue or pull request, R reasoned from the code and not run.
        rule: what it does, in a line.
        scale: what it multiplies BA of a target with.
        checks: what it refuses or leaves out, the gravest first.
        file: what it reads, where that is not the directory itself.
        until: the last version that the rule holds for, where a later one does otherwise: "0.31" is all of 0.31.
    """

    server: str
    version: str
    source: str
    evidence: str
    rule: str
    scale: Callable[[LoraAdapter, Target], float]
    checks: tuple[Check, ...]
    file: str = ""
    until: str = ""

    @property
    def name(self) -> str:
        """The server, and up to which version of it."""
        return f"{self.server} to {self.until}" if self.until else self.server


@dataclass(frozen=True, slots=True)
class Finding:
    """What one consumer makes of one adapter.

    Attributes:
        factors: by layer, what the update comes out multiplied by, where that is not 1; 0 for a layer left out.
    """

    verdict: Verdict
    reasons: tuple[str, ...]
    factors: Mapping[str, float]


def judge(consumer: Consumer, adapter: LoraAdapter, layers: Layers) -> Finding:
    """Right, wrong or refused, and why.  A layer whose update is zero cannot be wrong."""
    problems = [problem for check in consumer.checks if (problem := check(adapter, layers))]
    if refused := [problem.reason for problem in problems if problem.verdict == "refused"]:
        return Finding("refused", tuple(refused), {})
    gone = {name for problem in problems for name in problem.left_out}
    factors = {}
    # Each once: the universal form has one target for all layers that it fills up.
    different = {id(target): target for target in adapter.targets.values()}
    idle = {number for number, target in different.items() if _is_idle(target)}
    for name, target in adapter.targets.items():
        if target.scale and id(target) not in idle:
            factor = 0.0 if name in gone else consumer.scale(adapter, target) / target.scale
            if not math.isclose(factor, 1.0, rel_tol=1e-6):
                factors[name] = factor
    reasons = [problem.reason for problem in problems]
    if scaled := [factor for factor in factors.values() if factor]:
        reasons.append(f"{len(scaled)} of {len(adapter.targets)} layers at {_span(scaled)} their scale")
    return Finding("wrong" if reasons else "right", tuple(reasons), factors)


def _is_idle(target: Target) -> bool:
    return target.rank == 0 or not (target.a.any() and target.b.any())


def _span(factors: Sequence[float]) -> str:
    low, high = min(factors), max(factors)
    return f"{low:.3g} times" if math.isclose(low, high, rel_tol=1e-3) else f"{low:.3g} to {high:.3g} times"


# ------------------------------------------------------------------------------------ scales


def _own(adapter: LoraAdapter, target: Target) -> float:
    return target.scale


def _alpha_by(*, own: bool, rslora: bool = True) -> Callable[[LoraAdapter, Target], float]:
    """lora_alpha of the config over r, or over the layer's own rank; the root of that for rsLoRA where it is known."""

    def scale(adapter: LoraAdapter, target: Target) -> float:
        rank = target.rank if own else adapter.config["r"]
        root = rslora and adapter.config.get("use_rslora")
        return adapter.config.get("lora_alpha", 8) / (math.sqrt(rank) if root else rank)

    return scale


_global, _global_without_rslora = _alpha_by(own=False), _alpha_by(own=False, rslora=False)


def _llama_cpp(adapter: LoraAdapter, target: Target) -> float:
    return _alpha_by(own=True, rslora=False)(adapter, target) or 1.0  # it takes an alpha of 0 for none


# ------------------------------------------------------------------------------------ checks


def _rank_zero(adapter: LoraAdapter, layers: Layers) -> Problem | None:
    empty = [name for name, target in adapter.targets.items() if target.rank == 0]
    return Problem("refused", f"{empty[0]} has rank 0") if empty else None


def _patterns(adapter: LoraAdapter, layers: Layers) -> Problem | None:
    for pattern, setting in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha")):
        for key, value in (adapter.config.get(pattern) or {}).items():
            common = adapter.config.get(setting, 8)
            if value != common:
                return Problem("refused", f"{pattern} gives {key} {value:g}, and {setting} is {common:g}")
    return None


def _refuses(*options: str) -> Check:
    """Refuses an adapter with one of these variants, by the name of PEFT's option."""

    def check(adapter: LoraAdapter, layers: Layers) -> Problem | None:
        found = [variant for variant in adapter.variants() if variant.split("=")[0] in options]
        return Problem("refused", f"takes no {', '.join(found)}") if found else None

    return check


def _leaves_out_all_but(*options: str) -> Check:
    """Reads A and B and nothing of what makes a variant of LoRA, these excepted."""

    def check(adapter: LoraAdapter, layers: Layers) -> Problem | None:
        found = [variant for variant in adapter.variants() if variant.split("=")[0] not in options]
        return Problem("wrong", f"knows nothing of {', '.join(found)}") if found else None

    return check


def _heads(verdict: Verdict, why: str) -> Check:
    def check(adapter: LoraAdapter, layers: Layers) -> Problem | None:
        heads = adapter.heads()
        return Problem(verdict, f"{why}: {', '.join(heads)}") if heads else None

    return check


_NO_HEADS = _heads("wrong", "loads no saved modules")


def _stray_tensors(adapter: LoraAdapter, layers: Layers) -> Problem | None:
    names = sorted(adapter.further)
    return Problem("refused", f"stops at a tensor that is no A or B: {names[0]}") if names else None


def _heads_but_a_classifiers(adapter: LoraAdapter, layers: Layers) -> Problem | None:
    heads = adapter.heads()
    if len(heads) <= 1 and {name.rpartition(".")[2] for name in heads} <= {"classifier", "score"}:
        return None
    return Problem("refused", f"takes no saved modules but one classifier or score: {', '.join(heads)}")


def _other_than_r(adapter: LoraAdapter, layers: Layers) -> Problem | None:
    rank = adapter.config["r"]
    for name, target in adapter.targets.items():
        if target.rank != rank:
            return Problem("refused", f"{name} has rank {target.rank}, and its buffers have r, {rank}")
    return None


def _without_partner(adapter: LoraAdapter, layers: Layers) -> Problem | None:
    for name in adapter.targets:
        if absent := [partner for partner in partners(name) if partner not in adapter.targets]:
            return Problem("refused", f"stacks {name} with {absent[0].rpartition('.')[2]}, which has no adapter")
    return None


def _unequal_ranks(adapter: LoraAdapter, layers: Layers) -> Problem | None:
    ranks = {target.rank for target in adapter.targets.values()}
    if len(ranks) == 1:
        return None
    return Problem("refused", f"one rank for all, and here are {min(ranks)} to {max(ranks)}")


def _unequal_ranks_of_a_kind(adapter: LoraAdapter, layers: Layers) -> Problem | None:
    padded: dict[str, set[int]] = {}
    for name, target in adapter.targets.items():
        padded.setdefault(layer_kind(name), set()).add(served_rank(target.rank))
    kinds = sorted(kind for kind, ranks in padded.items() if len(ranks) > 1)
    return Problem("refused", f"stacks the layers of a kind, and {kinds[0]} has several ranks") if kinds else None


def _missing_layers(adapter: LoraAdapter, layers: Layers) -> Problem | None:
    dropped, missing = [], []
    targets: dict[str, list[str]] = {}
    for name in adapter.targets:
        targets.setdefault(layer_kind(name), []).append(name)
    for kind, names in layers.items():
        absent = [name for name in names if name not in adapter.targets]
        missing += absent
        dropped += targets.get(kind, []) if absent else []
    if not missing:
        return None
    return Problem("wrong", f"{missing[0]} has no adapter, so that no layer of its kind gets one", tuple(dropped))


def _embeddings(adapter: LoraAdapter, layers: Layers) -> Problem | None:
    found = tuple(name for name, target in adapter.targets.items() if target.kind == "embedding")
    return Problem("wrong", f"puts no adapter on {found[0]}", found) if found else None


def _padded_rank(adapter: LoraAdapter, layers: Layers) -> Problem | None:
    rank, kinds = adapter.config["r"], {layer_kind(name) for name in adapter.targets}
    if rank == served_rank(rank) or len(kinds) == 1:
        return None
    why = f"pads rank {rank} to {served_rank(rank)}, and scales all kinds of layers but the first by alpha over that"
    return Problem("wrong", why)


_VLLM_REFUSES = (
    "use_dora",
    "bias",
    "lora_bias",
    "init_lora_weights",
    "alora_invocation_tokens",
    "layer_replication",
    "use_bdlora",
    "use_qalora",
)
_SGLANG_CHECKS = (_refuses("use_dora"), _NO_HEADS, _leaves_out_all_but("use_dora"))

CONSUMERS = (
    Consumer(
        "PEFT",
        "0.21.2",
        "peft/tuners/lora/model.py, layer.py",
        "S",
        "rank_pattern and alpha_pattern; alpha / r, with rsLoRA alpha / √r",
        _own,
        (_rank_zero,),
    ),
    Consumer(
        "vLLM",
        "0.32.0, 0.33.0",
        "vllm/lora/peft_helper.py, lora_model.py",
        "C",
        "rank_pattern and alpha_pattern, as PEFT; no DoRA, no biases, no PiSSA and the like; of saved modules one "
        "classifier or score",
        _own,
        (
            _rank_zero,
            _refuses(*_VLLM_REFUSES),
            _heads_but_a_classifiers,
            _leaves_out_all_but(*_VLLM_REFUSES),
        ),
    ),
    Consumer(
        "vLLM",
        "0.31.0",
        "vllm/lora/peft_helper.py, lora_model.py; issue 59799, pull request 59801",
        "C, I",
        "lora_alpha / r for every layer, without a warning; no DoRA, no biases; of saved modules one classifier or "
        "score",
        _global,
        (_refuses("use_dora", "bias"), _heads_but_a_classifiers, _leaves_out_all_but("use_dora", "bias")),
        until="0.31",
    ),
    Consumer(
        "vLLM",
        "0.30.0",
        "vllm/lora/peft_helper.py, lora_model.py",
        "C",
        "as 0.31, but no saved modules at all",
        _global,
        (
            _refuses("use_dora", "bias"),
            _heads("refused", "takes no saved modules"),
            _leaves_out_all_but("use_dora", "bias"),
        ),
        until="0.30",
    ),
    Consumer(
        "SGLang",
        "main, 0ceb81f",
        "sglang/srt/lora/lora_config.py, lora_manager.py; sglang issue 40835",
        "S, I",
        "refuses patterns that change a rank or an alpha; lora_alpha / r also with rsLoRA; stacks q, k, v and gate, "
        "up: needs v with q, q with k and v, gate with up; no DoRA",
        _global_without_rslora,
        (_patterns, _without_partner, *_SGLANG_CHECKS),
    ),
    Consumer(
        "SGLang",
        "0.5.23",
        "sglang/srt/lora/lora.py, lora_config.py, mem_pool.py",
        "C, S",
        "as main, but fails at a rank that is not r, and passes over alpha_pattern without a warning",
        _global_without_rslora,
        (_other_than_r, _without_partner, *_SGLANG_CHECKS),
        until="0.5.23",
    ),
    Consumer(
        "llama.cpp",
        "0b03ada, 215841f",
        "convert_lora_to_gguf.py, src/llama-adapter.h",
        "S",
        "lora_alpha / the layer's own rank, also with rsLoRA; the converter stops at any other tensor",
        _llama_cpp,
        (_heads("refused", "its converter stops at saved modules"), _stray_tensors, _leaves_out_all_but()),
        "its GGUF file",
    ),
    Consumer(
        "TGI",
        "45d95bd",
        "text_generation_server/adapters/lora.py; lorax_server/utils/sgmv.py",
        "S, R",
        "lora_alpha / r for every layer; one rank a kind of layer, and every layer must have it; pads to 8 or 16·k and "
        "then scales by the padded rank; no embeddings",
        _global,
        (
            _unequal_ranks_of_a_kind,
            _missing_layers,
            _embeddings,
            _padded_rank,
            _NO_HEADS,
            _leaves_out_all_but(),
        ),
    ),
    Consumer(
        "MLX",
        "mlx-lm 0367286",
        "mlx_lm/tuner/utils.py",
        "S, R",
        "one rank and one scale for all layers",
        _global,
        (_unequal_ranks, _NO_HEADS, _leaves_out_all_but()),
        "converted weights",
    ),
    Consumer(
        "diffusers",
        "2026-08, with 14409",
        "diffusers/utils/peft_utils.py; pull request 14409",
        "S, I",
        "through PEFT; before, mixed ranks without alphas were scaled wrongly",
        _own,
        (_rank_zero,),
    ),
    Consumer(
        "TensorRT-LLM",
        "007e181",
        "tensorrt_llm/lora_manager.py; issue 1668",
        "S, I",
        "lora_alpha / the layer's own rank, with rsLoRA its root; takes DoRA",
        _alpha_by(own=True),
        (_NO_HEADS, _leaves_out_all_but("use_dora")),
    ),
)
"""Sources are paths in the projects' repositories, at the commit named in `version`."""


def rules_table() -> list[str]:
    """The table as lines of Markdown."""
    lines = ["| consumer | read in | rule | source | evidence |", "| --- | --- | --- | --- | --- |"]
    cells = ((c.name + (f" ({c.file})" if c.file else ""), c.version, c.rule, c.source, c.evidence) for c in CONSUMERS)
    return [*lines, *(f"| {' | '.join(row)} |" for row in cells)]
