"""Few rows, hardly learned: are labels called wrong that are right, and are those found that are wrong?

    python bench/reject_small.py [--seeds 0,1,2] [--out bench/results/reject_small.json]

MiniLM, uniform LoRA r 8, `training.learning_rate`'s default, a schedule of four passes; after each of the first three
`quality/label_noise.py` says what it would leave out, and so does its version of 2026-11-26, which took the classes'
constants as they calibrate the logits before these are scaled.  No test rows: nothing is trained on what is left.
"""

import argparse
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
from origin import commit, machine
from selection import BATCH, calibrated, prepare, stored, train_epoch
from selection_data import Cell
from selection_rules import Draw
from transformers import get_scheduler

from tsqlora.files import write_json
from tsqlora.quality import reject as today
from tsqlora.run.config.settings import TrainingSettings
from tsqlora.training.record import versions

OLDER = "fc60900"
TASKS, ROWS, WRONG, PASSES, OF = ("bbc", "sst2"), (100, 200, 400), (0.0, 0.2), 3, 4
RATE = TrainingSettings().learning_rate


def older() -> Any:
    """The rule as it was at the commit OLDER."""
    shown = ["git", "show", f"{OLDER}:src/tsqlora/quality/reject.py"]
    source = subprocess.run(shown, check=True, capture_output=True, text=True, cwd=Path(__file__).parent).stdout
    module = types.ModuleType("older_reject")
    sys.modules[module.__name__] = module  # dataclasses look their module up
    exec(source, module.__dict__)
    return module


def run(cell: Cell, rows: int, rules: dict[str, Any], shared: Path) -> list[dict[str, Any]]:
    """What each rule would leave out after each pass over the cell's first rows."""
    bench = prepare(cell, shared, passes=OF)
    bench.train, bench.bad = bench.train[:rows], bench.bad[:rows]
    for group in bench.optimizer.param_groups:
        group.update(lr=RATE, initial_lr=RATE)
    bench.schedule = get_scheduler("linear", bench.optimizer, 0, -(-rows // BATCH) * OF)
    found = []
    for epoch in range(PASSES):
        train_epoch(bench, epoch, Draw(np.arange(rows)))
        logits = calibrated(bench)
        right = float((logits.argmax(1) == bench.labels).mean())
        found.append({"fitted": right} | {name: _left_out(rule, logits, bench) for name, rule in rules.items()})
    return found


def _left_out(rule: Any, logits: np.ndarray, bench: Any) -> dict[str, Any]:
    mask, noise = rule.reject(logits, bench.labels)
    return {
        "evident": bool(noise.evident),
        "rate": float(noise.rate),
        "statistic": float(noise.statistic),
        "rejected": float(mask.mean()),
        "precision": float(bench.bad[mask].mean()) if mask.any() else None,
        "recall": float(mask[bench.bad].mean()) if bench.bad.any() else None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--shared", type=Path, default=Path(__file__).parents[1].parent / "shared")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "reject_small.json")
    args = parser.parse_args()
    rules = {"today": today, "older": older()}
    for seed in map(int, args.seeds.split(",")):
        for task in TASKS:
            for wrong in WRONG:
                for rows in ROWS:
                    name = f"{task}/seed {seed}/wrong {wrong:g}/{rows} rows"
                    if name in (known := stored(args.out)):
                        continue
                    passes = run(Cell(task, seed, wrong), rows, rules, args.shared)
                    cell = {"task": task, "seed": seed, "wrong": wrong, "rows": rows, "commit": commit()}
                    known[name] = cell | {"passes": passes}
                    about = {"learning_rate": RATE, "older": OLDER, "machine": machine()}
                    write_json(args.out, {"versions": versions(), **about, "results": known})
                    print(name, flush=True)


if __name__ == "__main__":
    main()
