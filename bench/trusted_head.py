"""Whether a look can tell that trusted rows alone are enough: how well a head predicts them that never saw them.

    python bench/trusted_head.py

For each world of `bench/worlds.py` and each seed a head is fitted on the frozen features of the trusted rows, and its
out-of-fold loss on them compared with that of the pool's head. Results are in bench/results/trusted_head.json;
what is there is not run again.
"""

import itertools
from typing import Any

import numpy as np
import torch
from origin import commit, machine, parser_of, read, write
from worlds import WORLDS, features_of

from tsqlora.quality.linear_head import fit_head, row_losses

CASES = {"shortcut": 128, "both": 128, "weak": 128, "clean": 128, "overlap": 128, "shortcut-bbc": 32}
SEEDS = range(20, 23)


def run(world: str, trusted: int, seed: int) -> dict[str, Any]:
    here, rng = WORLDS[world](seed, trusted), np.random.default_rng(seed)
    features, labels = features_of([*here.trusted, *here.train])
    width = int(labels.max()) + 1
    few, pool = (features[:trusted], labels[:trusted]), (features[trusted:], labels[trusted:])
    fit = fit_head(*few, link="softmax", width=width, rng=rng)
    of_pool = fit_head(*pool, link="softmax", width=width, rng=rng).head.logits(few[0])
    losses = row_losses(of_pool.astype(np.float64), few[1], "softmax")[fit.rows]
    return {
        "loss": fit.loss,
        "loss_of_pool": float(losses.mean()),
        "accuracy_of_pool": float((of_pool.argmax(1) == few[1]).mean()),
        "better": bool(fit.better_than(losses)),
    }


def main() -> None:
    request = parser_of(__doc__, "trusted_head").parse_args()
    torch.set_num_threads(1)
    results = {"machine": machine(), "cells": {}} | read(request.out) | {"settings": CASES}
    for (world, trusted), seed in itertools.product(CASES.items(), SEEDS):
        key = f"{world}/{trusted}/{seed}"
        if key not in results["cells"]:
            results["cells"][key] = {**run(world, trusted, seed), "commit": commit()}
            write(request.out, results)
            print(key, results["cells"][key], flush=True)


if __name__ == "__main__":
    main()
