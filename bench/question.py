"""The question to the pool (METHOD 1.2), alone: does the pool contradict the trusted rows?  One world and seed a file.

    python bench/question.py [--worlds clean,shortcut] [--seeds 30,31]

The pool without a held-out part H trains as it does before trusted rows would come last: 308 of 440 steps of 16 rows,
even draws, rank 8, MiniLM. Then the losses of the trusted rows R and of H are compared, within classes and weighted by
R's shares of them; the pool contradicts R where z is 2 or more. H is 400 random rows of the pool, in no fit and no
step: as they are, and as the judge keeps them, out of fold. A finished cell is not run again.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
import worlds
from origin import ROOT, commit, machine, parser_of, stored
from torch import nn
from transformers import AutoTokenizer, DataCollatorWithPadding
from worlds import RATE, STEPS, World, by_label, draw, features_of, table, tokens_of, write_rows

from tsqlora.auditing.labels.question import measured, standard_errors
from tsqlora.auditing.labels.suspects import audit_of
from tsqlora.model.request import Compute
from tsqlora.record import versions
from tsqlora.settings import Config
from tsqlora.tasks import get_task
from tsqlora.training.command import train
from tsqlora.training.job import open_run

RESULTS = Path(os.environ.get("RESULTS", ROOT / "bench" / "results" / "question"))
TRUSTED, FEW, HELD_OUT, BEFORE = 128, 32, 400, 308
DOUBT = 0.2
"""Probability of a wrong label from which a row of H is left out."""
WARMUP = 0.06
POOLS = Path(tempfile.mkdtemp(prefix="question-"))


def into_one(seed: int, trusted: int) -> World:
    """SST-2, where a tenth of the rows have the label 1, whatever they are."""
    here, rng = table("sst2", seed, trusted), np.random.default_rng([seed, 10])
    moved = {*rng.permutation([j for j, row in enumerate(here.train) if row["label"] == 0])[:200].tolist()}
    return replace(here, train=[{**row, "label": 1} if j in moved else row for j, row in enumerate(here.train)])


def balanced(seed: int, trusted: int) -> World:
    """SST-2 in the shares 85 : 15, and trusted rows in equal ones."""
    rows, _, test, rng = draw("sst2", seed, 0, pool=6000)
    often, seldom = ([row for row in rows if row["label"] == label] for label in (1, 0))
    pool = [*often[:1700], *seldom[:300]]
    checked = [*often[1700:][: trusted // 2], *seldom[300:][: trusted // 2]]
    pool, checked = ([part[j] for j in rng.permutation(len(part))] for part in (pool, checked))
    return World(pool, checked, test, by_label(test), 0)


def styled(seed: int, trusted: int) -> World:
    """Clean SST-2, and trusted rows as others write: a first word, capitals, and a final stop."""
    here = table("sst2", seed, trusted)
    other = [{**row, "text": f"Review: {row['text'].strip().capitalize()}."} for row in here.trusted]
    return replace(here, trusted=other)


def reviewed(seed: int, trusted: int) -> World:
    """Clean SST-2, and as trusted rows those that an audit suspects most, which a reviewer found right."""
    here = table("sst2", seed, 0)
    first = {*audit_of(*features_of(here.train)).ids[:trusted].tolist()}
    chosen = [row for j, row in enumerate(here.train) if j in first]
    return replace(here, train=[row for j, row in enumerate(here.train) if j not in first], trusted=chosen)


def wrong(share: float) -> Callable[[int, int], World]:
    return lambda seed, trusted: table("sst2", seed, trusted, noise=share)


def of_bbc(seed: int, trusted: int) -> World:
    """Two topics of BBC news: 600 rows with the trusted ones."""
    pool, checked, test, _ = draw("bbc", seed, trusted, pool=600 - trusted)
    return World(pool, checked, test, by_label(test), 0, "bbc")


def of_table(name: str) -> Callable[[int, int], World]:
    return lambda seed, trusted: table(name, seed, trusted)


WORLDS: dict[str, Callable[[int, int], World]] = {
    "clean": of_table("sst2"),
    "clean-mrpc": of_table("mrpc"),
    "clean-bbc": of_bbc,
    "clean-cola": of_table("cola"),
    "clean-stsb": of_table("stsb"),
    "wrong20": wrong(0.2),
    "wrong40": wrong(0.4),
    "one10": into_one,
    "balanced": balanced,
    "styled": styled,
    "careless": lambda seed, trusted: worlds.careless(of_table("sst2"), seed, trusted),
    "reviewed": reviewed,
    "shortcut": worlds.shortcut,
    "both": lambda seed, trusted: worlds.shortcut(seed, trusted, noise=0.2),
    "weak": worlds.weak,
    "overlap": worlds.overlap,
}


def samples_of(rows: Sequence[worlds.Row], kind: str) -> list[dict[str, Any]]:
    """The rows, tokenised."""
    tokenizer, names = AutoTokenizer.from_pretrained(worlds.MODEL), sorted({str(row["label"]) for row in rows})
    return [
        {
            **tokenizer(row["text"], row.get("text_pair"), truncation=True, max_length=tokens_of(row)),
            "labels": float(row["label"]) if kind == "regression" else names.index(str(row["label"])),
        }
        for row in rows
    ]


def trained(pool: list[worlds.Row], here: World, kind: str, seed: int) -> nn.Module:
    """Train on the pool as far as the question; worlds that differ in their trusted rows alone share the run."""
    folder = POOLS / hashlib.sha256(json.dumps([seed, pool]).encode()).hexdigest()
    if not folder.exists():
        folder.mkdir()
        write_rows(folder / "train.jsonl", pool)
        write_rows(folder / "validation.jsonl", worlds.split(here.table, "validation")[:100])
        first = round(WARMUP * STEPS)  # the schedule of all steps, as far as it goes
        rest = (STEPS - BEFORE) / (STEPS - first)
        training = {
            "max_steps": BEFORE,
            "learning_rate": RATE,
            "batch_size": 16,
            "seed": seed,
            "warmup_steps": first,
            "lr_scheduler_type": "polynomial",
            "lr_scheduler_kwargs": {"lr_end": RATE * rest, "power": 1.0},
            "save_strategy": "no",
        }
        about = {
            "model": {"path": worlds.MODEL},
            "task": {"type": kind},
            "data": {part: f"{folder}/{part}.jsonl" for part in ("train", "validation")}
            | {"max_length": tokens_of(here.train[0])},
            "quality": {"fraction": 0.5},
            "training": training,
        }
        train(Config.model_validate(about), folder / "run")
    return open_run(folder / "run").model


def run(world: str, seed: int) -> dict[str, Any]:
    here = WORLDS[world](seed, TRUSTED)
    kind = "regression" if any(isinstance(row["label"], float) for row in here.train) else "sequence-classification"
    order = np.random.default_rng([seed, 62]).permutation(len(here.train))
    p_wrong = np.zeros(len(order))
    if kind != "regression":
        audit = audit_of(*features_of(here.train))
        p_wrong[audit.ids] = audit.probability if audit.evident else 0.0
    size = min(HELD_OUT, len(order) // 5 if len(order) < 1000 else HELD_OUT)
    as_it_is = order[:size]
    unsuspected = np.array([j for j in order if p_wrong[j] <= DOUBT])[:size]
    out = {*as_it_is.tolist(), *unsuspected.tolist()}
    pool = [row for j, row in enumerate(here.train) if j not in out]
    model = trained(pool, here, kind, seed)
    parts = {"R": here.trusted, "H": [here.train[j] for j in as_it_is], "kept": [here.train[j] for j in unsuspected]}
    collate, compute = DataCollatorWithPadding(AutoTokenizer.from_pretrained(worlds.MODEL)), Compute(32)
    seen = {
        part: measured(model, samples_of(rows, kind), collate, get_task(kind), compute) for part, rows in parts.items()
    }

    def z(count: int, part: str) -> float:
        few = {name: getattr(seen["R"], name)[:count] for name in ("loss", "classes")}
        return standard_errors(replace(seen["R"], **few), seen[part])

    return {
        "settings": {"world": world, "seed": seed, "trusted": TRUSTED, "few": FEW, "held_out": size, "rate": RATE},
        "z": {part: {str(count): z(count, part) for count in (TRUSTED, FEW)} for part in ("H", "kept")},
        "loss": {part: float(of.loss.mean()) for part, of in seen.items()},
        "accuracy": {part: None if kind == "regression" else of.metric for part, of in seen.items()},
        "losses": {part: np.round(of.loss, 4).tolist() for part, of in seen.items()},
        "labels": {part: [row["label"] for row in rows] for part, rows in parts.items()},
        "versions": versions(),
        "machine": machine(),
        "commit": commit(),
    }


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--worlds", default=",".join(WORLDS))
    parser.add_argument("--seeds", default=",".join(map(str, range(30, 40))))
    request = parser.parse_args()
    torch.set_num_threads(1)
    for seed in map(int, request.seeds.split(",")):
        for world in request.worlds.split(","):
            cell = stored(RESULTS / f"{world}.{seed}.json", partial(run, world, seed))
            zs = " ".join(f"{part} {z['128']:.1f} ({z['32']:.1f})" for part, z in cell["z"].items())
            print(f"{world}, seed {seed}: {zs}; accuracy {cell['accuracy']}", flush=True)


if __name__ == "__main__":
    main()
