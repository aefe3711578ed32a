"""Trusted rows last, or mixed in at equal exposure? Decides the rule of METHOD 1.2; one cell a file.

    python bench/trusted_order.py [--worlds shortcut,weak,both,clean] [--trusted 128,32] [--seeds 10,11,12,13,14]

Every way has the same pool, head, learning rate and number of optimizer steps. `last` trains on trusted rows in the
last 30 % of the steps, `last20` in at most 20 passes, `mix` and `mix20` draw as many trusted rows as these, spread over
all epochs, `today` draws each of them once an epoch. It ran at ec5d948, and runs only there: later versions have no
`quality.trusted_last`.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["TSQLORA_CACHE"] = ""  # of ec5d948

import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from origin import ROOT, commit, machine, parser_of, stored
from worlds import MODEL, RATE, STEPS, WORLDS, World, by_label, draw, predictions, split, write_rows

from tsqlora.quality.epochs import EpochPlan, trusted_steps
from tsqlora.run.config import Config
from tsqlora.run.train import train
from tsqlora.training import looks
from tsqlora.training.record import versions

RESULTS = ROOT / "bench" / "results" / "trusted_order"
WAYS = ("last", "last20", "mix", "mix20", "today")
BATCH, PASSES = 16, 20
TASKS = {"stsb": "regression", "goemotions": "multi-label-classification", "wnut17": "token-classification"}
METRIC = {"stsb": "pearson", "goemotions": "micro_f1", "wnut17": "span_f1"}


def rows_of(way: str, trusted: int) -> int:
    """Trusted rows that a run reads, where the way says."""
    steps = trusted_steps(STEPS, trusted, BATCH)
    return BATCH * (min(steps, PASSES * trusted // BATCH) if way.endswith("20") else steps)


def use(way: str, trusted: int) -> None:
    share = rows_of(way, trusted) / (STEPS * BATCH)
    looks.trusted_steps = lambda total, trusted, rows_a_step: rows_of(way, trusted) // BATCH
    of_epoch = EpochPlan._trusted_of

    def mixed(self: EpochPlan, epoch: int) -> int:
        if self.trusted_from is None and way.startswith("mix"):
            return round(self.size * share)
        return of_epoch(self, epoch)

    EpochPlan._trusted_of = mixed


def world_of(name: str, seed: int, trusted: int) -> World:
    if name in WORLDS and name != "intents":
        return WORLDS[name](seed, trusted)
    table = "clinc150" if name == "intents" else name
    pool, checked, test, _ = draw(table, seed, trusted, pool=4000 if name == "intents" else 2000)
    test = test[:1000]
    return World(pool, checked, test, by_label(test) if "label" in test[0] else ["all"] * len(test), 0, table)


def run(name: str, way: str, seed: int, trusted: int) -> dict[str, Any]:
    here = world_of(name, seed, trusted)
    use(way, trusted)
    training = {"max_steps": STEPS, "learning_rate": RATE, "batch_size": BATCH, "seed": seed, "warmup_steps": 0.06}
    training |= {"save_strategy": "no"}
    quality = {"fraction": here.fraction, "trusted_last": way.startswith("last")}
    begun = time.process_time()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        parts = {"train": here.train, "test": here.test, "trusted": here.trusted}
        for part, rows in {**parts, "validation": split(here.table, "validation")[:100]}.items():
            write_rows(folder / f"{part}.jsonl", rows)
        files = {part: f"{folder}/{part}.jsonl" for part in (*parts, "validation")}
        values: dict[str, Any] = {"model": {"path": MODEL}, "data": {**files, "max_length": 64}, "quality": quality}
        values |= {"training": training} | ({"task": {"type": TASKS[name]}} if name in TASKS else {})
        record = train(Config.model_validate(values), folder / "run")
        metrics, groups = record.metrics["test"], {}
        if name not in TASKS:
            labels = predictions(folder / "run", folder / "test.jsonl", folder / "predicted.jsonl")
            right = np.array([a == row["label"] for a, row in zip(labels, here.test, strict=True)])
            groups = {g: float(right[[x == g for x in here.groups]].mean()) for g in sorted(set(here.groups))}
    score = metrics[METRIC.get(name, "accuracy")]
    return {
        "settings": {"world": name, "way": way, "seed": seed, "trusted": trusted, "training": training}
        | {"quality": quality, "pool": len(here.train), "rows": rows_of(way, trusted)},
        "score": score,
        "worst": min(groups.values()) if len(groups) in (2, 4) else None,
        "loss": metrics["loss"],
        "head": (record.quality.get("looks") or [{}])[0].get("head_start"),
        "kept": (record.quality.get("looks") or [{}])[0].get("kept"),
        "seconds": time.process_time() - begun,
        "versions": versions(),
        "machine": machine(),
        "commit": commit(),
    }


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--worlds", default="shortcut,weak,both,clean")
    parser.add_argument("--trusted", default="128,32")
    parser.add_argument("--seeds", default="10,11,12,13,14")
    parser.add_argument("--ways", default="last,mix,today,last20,mix20")
    request = parser.parse_args()
    torch.set_num_threads(1)
    keep = EpochPlan._trusted_of
    for seed in map(int, request.seeds.split(",")):
        for trusted in map(int, request.trusted.split(",")):
            for world in request.worlds.split(","):
                for way in request.ways.split(","):
                    if way.endswith("20") and rows_of(way, trusted) == rows_of(way[:-2], trusted):
                        continue
                    path = RESULTS / f"{world}.{way}.{trusted}.{seed}.json"
                    result = stored(path, partial(run, world, way, seed, trusted))
                    EpochPlan._trusted_of = keep
                    numbers = [result[name] for name in ("score", "worst", "loss", "seconds")]
                    print(world, way, trusted, seed, *numbers, flush=True)


if __name__ == "__main__":
    main()
