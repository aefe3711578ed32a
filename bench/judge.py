"""The table that the judge of labels must pass, and how often its bounds hold (issue 44).

    python bench/judge.py [clean] [uniform] [one] [coverage]

Labels as they are must stay: of each table at most 2 % is left out. A tenth or a fifth of them wrong at random must be
evident in 9 of 10 draws; of a tenth of all rows relabelled as one class the judge must leave out 60 %, with a precision
of 65 %. `coverage` counts how often the share of wrong labels lies inside the bounds, by kind of error.

Features are those of `tsqlora audit`, and wrong labels those of bench/audit.py, set before the rows are drawn, so that
their share differs a little from draw to draw. Results are in bench/results/judge.json; what is there is not run again.
"""

import os
import time
from collections.abc import Iterator
from functools import lru_cache
from typing import Any, NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from audit import features_of, spoilt
from origin import commit, machine, parser_of, read, write
from sklearn.neural_network import MLPClassifier

from tsqlora.quality.judge import judge

ROWS = {"bbc": 4_000, "sst2": 6_920, "mrpc": 4_000, "cola": 8_551, "clinc150": 15_000, "goemotions": 8_000}
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
        *(Case(table, draws=1) for table in ROWS),
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
}
"""`intents in K`: CLINC150's intents merged at random into K classes; `N intents`: its rows of N intents."""


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


def run(case: Case, draw: int) -> dict[str, Any]:
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
                results["cells"][key] = cell = run(case, draw)
                write(request.out, results)
                numbers = (f"{name} {value:.3f}" for name, value in cell.items() if isinstance(value, float))
                print(key, "evident" if cell["evident"] else "not evident", *numbers, flush=True)


if __name__ == "__main__":
    main()
