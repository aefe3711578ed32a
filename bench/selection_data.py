"""The cells of bench/selection.py: which rows, how many labels are wrong, which rows test."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tsqlora.run.demo import bbc_news, flip

PASSES = 4
"""Steps of a run, warm-up included, in passes over all rows: 8 epochs of halves."""
TASKS: dict[str, dict[str, int]] = {
    "sst2": {"rows": 2000, "max_length": 64},
    "cola": {"rows": 2000, "max_length": 64},
    # So that 925 of the 2,125 articles remain for the test.
    "bbc": {"rows": 1200, "max_length": 48},
    "mrpc": {"rows": 2000, "max_length": 96},
    "rte": {"rows": 2000, "max_length": 96},
    "stsb": {"rows": 2000, "max_length": 96},
}
# Nothing is tuned on them, and the test set alone has some hundred rows.
TEST_SPLITS = {"rte": ("test", "validation"), "cola": ("test", "validation")}


@dataclass(frozen=True, slots=True)
class Cell:
    task: str
    seed: int
    wrong: float
    fraction: float = 0.5

    @property
    def name(self) -> str:
        return f"{self.task}/seed {self.seed}/wrong {self.wrong:g}/fraction {self.fraction:g}"

    @property
    def epochs(self) -> int:
        return round(PASSES / self.fraction)


def read(cell: Cell, shared: Path) -> tuple[list[Any], list[Any], list[Any], list[Any]]:
    """Training texts (pairs) and true labels, test texts and labels."""
    rng = np.random.default_rng([cell.seed, 20])
    rows = TASKS[cell.task]["rows"]
    if cell.task == "bbc":
        articles = [((text,), topic) for text, topic in bbc_news()]
        order = rng.permutation(len(articles))
        train, test = [articles[j] for j in order[:rows]], [articles[j] for j in order[rows:]]
    else:
        pool = _split(shared, cell.task, "train")
        train = [pool[j] for j in rng.permutation(len(pool))[:rows]]
        test = [pair for split in TEST_SPLITS.get(cell.task, ("test",)) for pair in _split(shared, cell.task, split)]
    return [t for t, _ in train], [y for _, y in train], [t for t, _ in test], [y for _, y in test]


def _split(shared: Path, task: str, split: str) -> list[tuple[tuple[str, ...], Any]]:
    lines = (shared / "data" / task / f"{split}.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    return [(tuple(r[c] for c in ("text", "text_pair") if c in r), r["label"]) for r in rows]


def given_labels(cell: Cell, true: list[Any], names: list[Any]) -> list[Any]:
    """What training sees: the share `cell.wrong` of the labels replaced by another."""
    if not cell.wrong:
        return list(true)
    kind = type(names[0])
    return [kind(label) for label in flip(names, true, cell.wrong, np.random.default_rng([cell.seed, 21]))]
