"""Ranks where capacity binds: which layers should have the rank, where there is too little of it?

    python bench/capacity.py [--means 1,2] [--methods uniform,mlps] [--seeds 0,1,2]

stories260K learns the text of SciTLDR's papers: 300 steps of 16 rows at mean ranks 1 and 2, three learning rates each
on the first seed, the best of them on the others. `full` trains every weight. All have the same parameters but `full`.
Each cell is a file in bench/results/capacity, and a cell that is there is not run again.
"""

import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from origin import ROOT, commit, machine, parser_of, stored
from transformers import set_seed

from tsqlora.compare.methods import POLICIES, build
from tsqlora.run.config import Config
from tsqlora.run.fit import arguments, predictor_of
from tsqlora.run.job import load
from tsqlora.training.fit import Method, fit
from tsqlora.training.record import RunRecord, versions

SHARED = ROOT / ".." / "shared"
RESULTS = Path(os.environ.get("RESULTS", ROOT / "bench" / "results" / "capacity"))
STEPS, BATCH, TOKENS, LETTERS = 300, 16, 128, 250
RATES = (1e-2, 3e-2, 6e-2)
FULL_RATES = (1e-3, 3e-3, 1e-2)
MLPS = ["gate_proj", "up_proj", "down_proj"]
SHARE_OF_MLPS = 708 / 1156
"""Of the parameters of rank 1 in all layers: a block of stories260K has 448 in its attention and 708 in its MLP."""
NEVER, MOVES = 10**6, {"policy": "tsqlora"}
METHODS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "uniform": ("lora", {}, {}),
    "mlps": ("tsqlora", {"policy": "fixed"}, {"target_modules": MLPS}),
    "sensitivity": ("tsqlora", {**MOVES, "interval": NEVER}, {}),
    "random": ("tsqlora", {**MOVES, "interval": NEVER}, {}),
    "moves": ("tsqlora", MOVES, {}),
    "adalora": ("adalora", {}, {}),
    "elalora": ("elalora", {}, {}),
    "eva": ("eva", {}, {}),
    "full": ("full", {}, {}),
}
"""Of each the method of `compare`, and its settings of `ranks` and `adapter`."""


def write_rows(folder: Path) -> None:
    for split, most in (("train", None), ("validation", 200), ("test", 400)):
        lines = (SHARED / "data" / "scitldr" / f"{split}.jsonl").read_text().splitlines()[:most]
        texts = [{"text": json.loads(line)["document"][:LETTERS]} for line in lines]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts))


def run(method: str, mean: float, rate: float, seed: int) -> dict[str, Any]:
    kind, ranks, adapter = METHODS[method]
    own_mean = mean / SHARE_OF_MLPS if method == "mlps" else mean
    with tempfile.TemporaryDirectory() as folder:
        write_rows(Path(folder))
        settings: dict[str, Any] = {
            "model": {"path": str(SHARED / "models" / "stories260K")},
            "task": {"type": "causal-lm"},
            "data": {split: f"{folder}/{split}.jsonl" for split in ("train", "validation", "test")}
            | {"max_length": TOKENS, "format": "text"},
            "ranks": {"mean": own_mean, **ranks},
            "adapter": {"alpha": 2 * own_mean, **adapter},
            "training": {"epochs": 3, "learning_rate": rate, "batch_size": BATCH, "seed": seed, "warmup_steps": 0.06},
        }
        settings["training"] |= {"save_strategy": "no", "max_steps": STEPS}
        config = Config.model_validate(settings)
        job = load(config)
        args = arguments(config, Path(folder) / "run")
        record = RunRecord("running", seed, job.task.name, None, {"hash": job.data.hash}, {})
        begun = time.process_time()
        chosen = POLICIES["all"](job, Path(folder) / "scores.parquet", None)
        set_seed(seed)
        built, moved = build(job, kind, steps=STEPS)
        if moved is not None and method == "random":
            moved.options["estimator"] = "random"
        fit(built.model, args, Method(chosen.data, None, moved), job.inputs, record, also=list(built.callbacks))
        seconds = time.process_time() - begun
        loss = {
            split: predictor_of(job, built.model, args).metrics(
                job.data.samples[split].samples, phase=split, progress=None
            )["loss"]
            for split in ("validation", "test")
        }
    del settings["data"], settings["model"]
    return {
        "settings": {"method": method, "mean": mean, "rate": rate, "seed": seed, **settings},
        "validation": loss["validation"],
        "test": loss["test"],
        "parameters": built.trainable(),
        "processor_seconds": seconds,
        "versions": versions(),
        "machine": machine(),
        "commit": commit(),
    }


def cell(method: str, mean: float, rate: float, seed: int) -> dict[str, Any]:
    path = RESULTS / f"{method}.{mean:g}.{rate:g}.{seed}.json"
    return stored(path, lambda: run(method, mean, rate, seed))


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--means", default="1,2")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--seeds", default="0,1,2")
    request = parser.parse_args()
    torch.set_num_threads(1)
    seeds = [int(seed) for seed in request.seeds.split(",")]
    for mean in map(float, request.means.split(",")):
        for method in request.methods.split(","):
            rates = FULL_RATES if method == "full" else RATES
            first = {rate: cell(method, mean, rate, seeds[0]) for rate in rates}
            best = min(rates, key=lambda rate: first[rate]["validation"])
            losses = [cell(method, mean, best, seed)["test"] for seed in seeds]
            print(method, mean, best, np.round(losses, 4), f"{first[best]['processor_seconds']:.0f} s", flush=True)


if __name__ == "__main__":
    main()
