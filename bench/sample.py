"""How large a sample a look needs: rows judged by the look of a sample, and judged together with all rows.

    python bench/sample.py

A tenth of the labels of CLINC150 are set wrong (`bench/judge.py` says how). 3,000 rows are set aside. They are judged
out of fold together with all others, as one look at all rows does, and by the judge of a sample of the others, as
`tsqlora score --look` does. Results are in bench/results/sample.json; what is there is not run again.
"""

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

TABLE, SET_ASIDE, SIZES = "clinc150", 3_000, (1_500, 3_000, 6_000, 12_000)
DRAWS = {"even-0.1": 3}


def run(noise: str, draw: int) -> Iterator[dict[str, Any]]:
    """Yield a result for each size of the sample, and before them that of all rows together."""
    features, right = stored_features(TABLE)
    labels, k = spoilt(features, right, noise, draw), int(right.max()) + 1
    order = np.random.default_rng([draw, 49]).permutation(len(labels))
    aside, others = order[:SET_ASIDE], order[SET_ASIDE:]
    wrong, together = labels[aside] != right[aside], None
    for size in (None, *SIZES):
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
            "settings": {"table": TABLE, "noise": noise, "seed": draw, "sample": size, "set_aside": SET_ASIDE},
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
    for noise, draws in DRAWS.items():
        for draw in range(draws):
            if f"{noise}/{draw}/{SIZES[-1]}" in results["cells"]:
                continue
            for cell in run(noise, draw):
                results["cells"][f"{noise}/{draw}/{cell['settings']['sample'] or 'together'}"] = cell
                write(request.out, results)
                print(noise, draw, {name: cell[name] for name in ("precision", "recall", "agree")}, flush=True)


if __name__ == "__main__":
    main()
