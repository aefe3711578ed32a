"""The table that the judge of labels must pass, how often its bounds hold, and how well it orders the rows.

    python bench/judge.py [clean] [uniform] [one] [coverage] [order]

Labels as they are must stay: of each table at most 2 % is left out. A tenth or a fifth of them wrong at random must be
evident in 9 of 10 draws; of a tenth of all rows relabelled as one class the judge must leave out 60 %, with a precision
of 65 %. `coverage` counts how often the share of wrong labels lies inside the bounds, by kind of error. `order` gives
the average precision of the audit's order, of self-confidence (cleanlab's order) on the same out-of-fold logits, and of
the judge with one distribution of wrong labels always. ATIS, banking and SMS are read from clones (`CLONES`).

Features are those of `tsqlora audit`, read once and kept under ~/.cache/tsqlora-bench. Wrong labels are set before the
rows are drawn, so that their share differs a little from draw to draw:

- `even-RATE`: rows at random get any other class;
- `drawn-RATE`: rows at random get any class, their own included;
- `pairs-RATE`: each class loses rows to one certain other;
- `one-RATE`: this share of all rows, of the other classes, gets one class;
- `weak-RATE`: the labels of a weak model, a logistic regression on a twentieth of the rows and 16 principal
  components, where it is surest and wrong; where that is too few, where it is nearest to being wrong.

Results are in bench/results/judge.json; what is there is not run again.
"""

import csv
import json
import os
import subprocess
import time
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from origin import ROOT, commit, machine, parser_of, read, write
from scipy.special import log_softmax
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score
from sklearn.model_selection import train_test_split
from sklearn.neural_network import MLPClassifier
from sklearn.preprocessing import StandardScaler
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding

from tsqlora.auditing.command import BATCH_SIZE, ENCODER, TOKENS
from tsqlora.auditing.labels import label_noise
from tsqlora.auditing.labels.judge import Judgement, judge, judge_logits
from tsqlora.auditing.labels.suspects import audit_of_judgement
from tsqlora.model.forward import forward_pass
from tsqlora.model.request import Compute
from tsqlora.tasks import get_task
from tsqlora.training.demo import bbc_news, package_folder

SHARED = ROOT / ".." / "shared" / "data"
FEATURES = Path.home() / ".cache" / "tsqlora-bench"
CLONES = {
    "atis": "howl-anderson/ATIS_dataset",
    "banking": "PolyAI-LDN/task-specific-datasets",
    "sms": "justmarkham/pycon-2016-tutorial",
}
"""Repositories of GitHub; FEATURES / NAME.git is the git directory of each."""
ITERATIONS = 400

ROWS = {"bbc": 4_000, "sst2": 6_920, "mrpc": 4_000, "cola": 8_551, "clinc150": 15_000, "goemotions": 8_000}
ROWS |= dict.fromkeys(CLONES, 20_000)
"""Rows of each table that are read, at most: all of them."""
XOR_ROWS, XOR_WIDTH, XOR_SPREAD = 3_000, 16, 0.5


class Case(NamedTuple):
    table: str
    noise: str = "none"
    rows: int = 15_000
    draws: int = 10


UNIFORM = ("even-0.1", "even-0.2")
KINDS = ("even-0.05", *UNIFORM, "pairs-0.1", "pairs-0.2", "one-0.1", "one-0.2", "weak-0.2")
CASES: dict[str, list[Case]] = {
    "clean": [
        *(Case(table, draws=1) for table in ("bbc", "sst2", "mrpc", "cola", "clinc150", "goemotions")),
        *(Case(f"intents in {k}", rows=5_000, draws=3) for k in (2, 3, 5, 10)),
        Case("2 intents", draws=5),
        Case("xor", draws=3),
        Case("xor, trained", draws=3),
    ],
    "uniform": [Case(table, noise, 6_000) for table in ("bbc", "clinc150") for noise in UNIFORM],
    "one": [Case("bbc", "one-0.1"), Case("6 intents", "one-0.1"), Case("clinc150", "one-0.1", 6_000, 5)],
    "coverage": [
        Case(table, noise, 2_000)
        for table in ("bbc", "sst2", "clinc150")
        for noise in KINDS
        if not (table == "sst2" and noise.startswith("pairs"))  # of two classes the same as `even`
    ],
    "order": [
        *(
            Case(table, f"even-{rate}", 6_000, 1)
            for table in ("bbc", "sst2", "mrpc", "cola", "goemotions", "clinc150", *CLONES)
            for rate in (0.01, 0.03, 0.1)
        ),
        Case("atis", "drawn-0.05", draws=1),
        *(Case(table, f"one-{rate}", 6_000, 1) for table in ("bbc", "atis", "banking") for rate in (0.03, 0.05)),
    ],
}
"""`intents in K`: CLINC150's intents merged at random into K classes; `N intents`: its rows of N intents."""


def rows_of(table: str, most: int) -> tuple[list[list[str]], np.ndarray]:
    """Texts, or pairs of texts, and labels as numbers; drawn with one seed for all, as files are sorted by class.

    Of GoEmotions the rows with one label.
    """
    if table == "bbc":
        rows = [([text], label) for text, label in bbc_news()]
    elif table in CLONES:
        rows = [([text], label) for text, label in cloned(table)]
    else:
        lines = [
            row
            for row in map(json.loads, (SHARED / table / "train.jsonl").read_text().splitlines())
            if len(row.get("labels", ["one"])) == 1
        ]
        labels = [row["labels"][0] if "labels" in row else row["label"] for row in lines]
        texts = [[row["text"], *([row["text_pair"]] if "text_pair" in row else [])] for row in lines]
        rows = list(zip(texts, labels, strict=True))
    some = np.sort(np.random.default_rng(30).permutation(len(rows))[:most])
    return [rows[j][0] for j in some], np.unique([rows[j][1] for j in some], return_inverse=True)[1]


def cloned(table: str) -> list[tuple[str, Any]]:
    """Texts and labels of the training rows of a clone."""

    def lines(path: str) -> list[str]:
        words = ["git", "--git-dir", str(FEATURES / f"{table}.git"), "show", f"HEAD:{path}"]
        return subprocess.run(words, check=True, capture_output=True, text=True).stdout.splitlines()

    if table == "banking":
        return [(row["text"], row["category"]) for row in csv.DictReader(lines("banking_data/train.csv"))]
    if table == "sms":
        return [(text, label) for label, _, text in (line.partition("\t") for line in lines("data/sms.tsv")) if text]
    folder = "data/raw_data/ms-cntk-atis/atis"
    words = lines(f"{folder}.dict.vocab.csv")
    texts = [[words[int(j)] for j in line.split()][1:-1] for line in lines(f"{folder}.train.query.csv")]
    return list(zip(map(" ".join, texts), map(int, lines(f"{folder}.train.intent.csv")), strict=True))


def features_of(table: str, most: int) -> tuple[np.ndarray, np.ndarray]:
    """What the head is given and the mean hidden states of each row, at most so many, and its label as it is."""
    path = FEATURES / f"{table}-{most}-{TOKENS}.npz"
    if not path.exists():
        texts, labels = rows_of(table, most)
        encoder = package_folder(ENCODER) / "model"
        tokenizer = AutoTokenizer.from_pretrained(encoder)
        model = AutoModelForSequenceClassification.from_pretrained(encoder, num_labels=int(labels.max()) + 1)
        samples = [
            {**tokenizer(*text, truncation=True, max_length=TOKENS), "labels": int(label)}
            for text, label in zip(texts, labels, strict=True)
        ]
        collate, compute = DataCollatorWithPadding(tokenizer), Compute(BATCH_SIZE)
        seen, _ = forward_pass(
            model, samples, collate, task=get_task("sequence-classification"), compute=compute, mean=True
        )
        parts = [part for part in (seen and seen.features, seen and seen.mean) if part is not None]
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(path, features=np.concatenate(parts, axis=1, dtype=np.float32), labels=labels)
    with np.load(path) as stored:
        return stored["features"], stored["labels"]


def spoilt(features: np.ndarray, labels: np.ndarray, noise: str, seed: int) -> np.ndarray:
    """The labels, some of them set wrong."""
    kind, _, rate = noise.partition("-")
    rng, n, k = np.random.default_rng([seed, 30]), len(labels), int(labels.max()) + 1
    rows = rng.permutation(n)[: round(float(rate or 0) * n)]
    others = (labels + rng.integers(1, k, n)) % k
    if kind == "drawn":
        others = rng.integers(k, size=n)
    if kind == "pairs":
        ring = rng.permutation(k)  # each class loses to the next one
        others = ring[(np.argsort(ring)[labels] + 1) % k]
    if kind == "one":
        others = np.full(n, rng.integers(k))
        rows = rng.permutation(np.flatnonzero(labels != others))[: len(rows)]
    if kind == "weak":
        parts = np.asarray(StandardScaler().fit_transform(PCA(16, random_state=seed).fit_transform(features)))
        basis, _ = train_test_split(np.arange(n), train_size=0.05, stratify=labels, random_state=seed)
        probabilities = (
            LogisticRegression(max_iter=ITERATIONS).fit(parts[basis], labels[basis]).predict_log_proba(parts)
        )
        own = probabilities[np.arange(n), labels]
        probabilities[np.arange(n), labels] = -np.inf
        others, rows = probabilities.argmax(axis=1), np.argsort(own - probabilities.max(axis=1))[: len(rows)]
    wrong = labels.copy()
    wrong[rows] = others[rows]
    return wrong


@lru_cache(maxsize=1)
def stored_features(table: str) -> tuple[np.ndarray, np.ndarray]:
    return features_of(table, ROWS[table])


def xor(rng: np.random.Generator, *, trained: bool) -> tuple[np.ndarray, np.ndarray]:
    """Two classes, each of two opposite clusters, which no line separates.

    Trained: the last feature is the log odds by a hidden layer that was trained on these rows, as a model whose head
    is trained has it.
    """
    signs = rng.choice([-1, 1], size=(XOR_ROWS, 2))
    features = XOR_SPREAD * rng.standard_normal((XOR_ROWS, XOR_WIDTH))
    features[:, :2] += signs
    labels = (features[:, :2].prod(axis=1) > 0).astype(int)
    if trained:
        model = MLPClassifier(32, early_stopping=True, random_state=0).fit(features, labels)
        p = np.asarray(model.predict_proba(features)).clip(1e-6)
        features = np.column_stack([features, np.log(p[:, 1] / p[:, 0])])
    return features.astype(np.float32), labels


def table_of(name: str, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    if name.startswith("xor"):
        return xor(rng, trained="trained" in name)
    if name in ROWS:
        return stored_features(name)
    features, labels = stored_features("clinc150")
    order = rng.permutation(labels.max() + 1)
    if name.startswith("intents in "):
        return features, order[labels] % int(name.rpartition(" ")[2])
    chosen = np.isin(labels, order[: int(name.partition(" ")[0])])
    return features[chosen], np.unique(labels[chosen], return_inverse=True)[1]


def orders(judgement: Judgement, labels: np.ndarray, wrong: np.ndarray) -> dict[str, float]:
    """Average precision of the audit's order, of self-confidence, and of each distribution of wrong labels."""

    def of(judgement: Judgement) -> float:
        return float(average_precision_score(wrong[audit_of_judgement(judgement, labels).ids], -np.arange(len(wrong))))

    own = log_softmax(judgement.logits.astype(np.float64), axis=1)[np.arange(len(labels)), labels]
    result = {"order": of(judgement), "self_confidence": float(average_precision_score(wrong, -own))}
    before = label_noise.LESS_GAIN, label_noise.GAIN
    gains = {"uniform": (np.inf, np.inf), "frequency": (-np.inf, np.inf), "fitted": (np.inf, -np.inf)}
    try:
        for name, both in gains.items():
            label_noise.LESS_GAIN, label_noise.GAIN = both
            result[name] = of(judge_logits(judgement.logits, labels))
    finally:
        label_noise.LESS_GAIN, label_noise.GAIN = before
    return result


def run(case: Case, draw: int, part: str) -> dict[str, Any]:
    rng = np.random.default_rng([draw, 44])
    features, right = table_of(case.table, rng)
    labels = spoilt(features, right, case.noise, draw)
    some = np.sort(rng.permutation(len(labels))[: case.rows])
    features, wrong, labels = features[some], labels[some] != right[some], labels[some]
    begun = time.process_time()
    judgement = judge(features, labels, int(right.max()) + 1)
    seconds = time.process_time() - begun
    left_out = judgement.left_out
    hits = int((left_out & wrong).sum())
    return {
        "settings": {"table": case.table, "noise": case.noise, "seed": draw},
        "rows": len(labels),
        "classes": int(right.max()) + 1,
        "wrong": float(wrong.mean()),
        "evident": judgement.evident,
        "why_not": judgement.why_not,
        "rate": judgement.rate,
        "low": judgement.low,
        "high": judgement.high,
        "left_out": float(left_out.mean()),
        "precision": hits / int(left_out.sum()) if wrong.any() and left_out.any() else None,
        "recall": hits / int(wrong.sum()) if wrong.any() else None,
        **(orders(judgement, labels, wrong) if part == "order" else {}),
        "processor_seconds": round(seconds, 2),
        "commit": commit(),
    }


def cells(part: str) -> Iterator[tuple[str, Case, int]]:
    for draw in range(max(case.draws for case in CASES[part])):  # the first of each case first
        for case in CASES[part]:
            if draw < case.draws:
                yield f"{part}/{case.table}/{case.noise}/{draw}", case, draw


def main() -> None:
    parser = parser_of(__doc__, "judge")
    parser.add_argument("parts", nargs="*", default=list(CASES))
    request = parser.parse_args()
    torch.set_num_threads(1)
    results = {"machine": machine(), "cells": {}} | read(request.out)
    for part in request.parts:
        for key, case, draw in cells(part):
            if key not in results["cells"]:
                results["cells"][key] = cell = run(case, draw, part)
                write(request.out, results)
                numbers = (f"{name} {value:.3f}" for name, value in cell.items() if isinstance(value, float))
                print(key, "evident" if cell["evident"] else "not evident", *numbers, flush=True)


if __name__ == "__main__":
    main()
