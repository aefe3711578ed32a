"""How large a sample a look needs: rows judged by the look of a sample, and judged together with all rows.

    python bench/sample.py

A tenth of the labels of CLINC150, and of made rows of 50 classes, are set wrong (`bench/judge.py` says how). 3,000 rows
are set aside. They are judged out of fold together with all others, as one look at all rows does, and by the judge of a
sample of the others, as `tsqlora score --look` does. Results are in bench/results/sample.json; what is there is not run
again.
"""

import itertools
import os
import time
from collections.abc import Iterator
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from judge import spoilt, stored_features
from origin import commit, machine, parser_of, read, write

from tsqlora.quality.judge import DOUBT, judge

SET_ASIDE, NOISE, DRAWS = 3_000, "even-0.1", 3
SIZES = {"clinc150": (1_500, 3_000, 6_000, 12_000), "made": (1_500, 3_000, 6_000, 12_000, 25_000, 50_000)}
MADE_ROWS, CLASSES, WIDTH, SPREAD = 53_000, 50, 64, 4.0
"""Made rows: a class is a normal cloud around its mean, and means are as far apart as SPREAD says."""


def made(draw: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng([draw, 58])
    labels = rng.integers(CLASSES, size=MADE_ROWS)
    means = SPREAD / np.sqrt(WIDTH) * rng.standard_normal((CLASSES, WIDTH))
    return (means[labels] + rng.standard_normal((MADE_ROWS, WIDTH))).astype(np.float32), labels


def run(table: str, noise: str, draw: int) -> Iterator[dict[str, Any]]:
    """Yield a result for each size of the sample, and before them that of all rows together."""
    features, right = made(draw) if table == "made" else stored_features(table)
    labels, k = spoilt(features, right, noise, draw), int(right.max()) + 1
    order = np.random.default_rng([draw, 49]).permutation(len(labels))
    aside, others = order[:SET_ASIDE], order[SET_ASIDE:]
    wrong, together = labels[aside] != right[aside], None
    for size in (None, *SIZES[table]):
        begun, some = time.process_time(), others[:size]
        rows = np.concatenate([aside, some]) if size is None else some
        judgement = judge(features[rows], labels[rows], k)
        assert judgement.verdict is not None
        if size is None:
            logits, p = judgement.logits[:SET_ASIDE], judgement.p_wrong[:SET_ASIDE]
        else:
            logits, p = judgement.verdict.of(features[aside], labels[aside])
        left_out = (p > DOUBT) & judgement.evident
        together = left_out if together is None else together
        hits = int((left_out & wrong).sum())
        yield {
            "settings": {"table": table, "noise": noise, "seed": draw, "sample": size, "set_aside": SET_ASIDE},
            "evident": judgement.evident,
            "precision": hits / max(int(left_out.sum()), 1),
            "recall": hits / int(wrong.sum()),
            "agree": float((left_out == together).mean()),
            "accuracy": float((logits.argmax(axis=1) == right[aside]).mean()),
            "unjudged": float((~judgement.verdict.judged[labels[aside]]).mean()),
            "processor_seconds": round(time.process_time() - begun, 2),
            "commit": commit(),
        }


def main() -> None:
    request = parser_of(__doc__, "sample").parse_args()
    torch.set_num_threads(1)
    results = {"machine": machine(), "cells": {}} | read(request.out)
    for table, draw in itertools.product(SIZES, range(DRAWS)):
        key = f"{table}/{NOISE}/{draw}"
        if f"{key}/{SIZES[table][-1]}" in results["cells"]:
            continue
        for cell in run(table, NOISE, draw):
            results["cells"][f"{key}/{cell['settings']['sample'] or 'together'}"] = cell
            write(request.out, results)
            print(key, {name: cell[name] for name in ("sample", "precision", "recall", "agree") if name in cell})


if __name__ == "__main__":
    main()
