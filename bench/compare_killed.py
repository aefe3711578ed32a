"""`tsqlora compare` on SST-2, killed again and again, beside one that is left alone: is every number the same?

    python bench/compare_killed.py [--rows 200] [--kills 3] [--seed 0] [--shared ../shared]

Three methods and two seeds on prepared rows, a fifth of their labels wrong, and the full test set. The command, in a
process of its own, is sent SIGKILL at a random moment and given again, until it ends. A cell that was finished when the
kill came must still be the file that it was, and in the end every cell must say what it says where nothing was killed,
but for seconds and memory. The result is bench/results/compare_killed.json.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from glue import Block, config_of, labels_of, write_data
from origin import machine

from tsqlora.compare.cells import CELLS_DIR
from tsqlora.compare.comparison import TABLE_FILE
from tsqlora.compare.run import commit
from tsqlora.files import write_json

METHODS, SEEDS = "lora,adalora,tsqlora", "0,1"
RESULTS = Path(__file__).parent / "results" / "compare_killed.json"
DIFFER = ("seconds", "peak_memory_bytes")
"""In a cell and in the table: what two runs of the same have not in common."""


def start(settings: Path, out: Path) -> subprocess.Popen[bytes]:
    """The command as a user gives it; what it says goes into a file beside its directory."""
    command = [str(Path(sys.executable).with_name("tsqlora")), "compare", str(settings)]
    with open(f"{out}.log", "ab") as log:
        return subprocess.Popen(
            [*command, "--methods", METHODS, "--seeds", SEEDS, "--out", str(out)], stdout=log, stderr=log
        )


def require_ended(process: subprocess.Popen[bytes], out: Path) -> None:
    """Waits; ends with what the command said where it failed."""
    if process.wait() != 0:
        raise SystemExit(f"compare failed:\n{Path(f'{out}.log').read_text()[-2000:]}")


def finished(out: Path) -> dict[str, int]:
    """Each cell's file, and when it was written, in nanoseconds."""
    return {path.name: path.stat().st_mtime_ns for path in sorted((out / CELLS_DIR).glob("*.json"))}


def killed(settings: Path, out: Path, kills: int, longest: float, rng: random.Random) -> list[dict[str, Any]]:
    """Runs the command to its end, with so many kills between; where each of them came."""
    found, before = list[dict[str, Any]](), dict[str, int]()
    while len(found) < kills:
        process, seconds = start(settings, out), rng.uniform(0, longest)
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        else:
            break  # all was done before
        cells = finished(out)
        assert cells == cells | before, "a finished cell was written again"
        found.append({"seconds": round(seconds, 1), "finished cells": len(cells)})
        before = cells
        print(f"killed after {seconds:.0f} s with {len(cells)} cells finished", flush=True)
    require_ended(start(settings, out), out)
    assert finished(out) == finished(out) | before, "a finished cell was written again"
    return found


def timeless(value: Any) -> Any:
    """A cell or a table without what two runs have not in common."""
    if isinstance(value, Mapping):
        return {name: timeless(inner) for name, inner in value.items() if name not in DIFFER}
    return [timeless(inner) for inner in value] if isinstance(value, list) else value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, default=Path(__file__).parents[2] / "shared")
    parser.add_argument("--rows", type=int, default=200)
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0, help="Of the moments of the kills.")
    args = parser.parse_args()
    block = Block("sst2", args.rows, 0.2, 4)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        write_data(block, args.seed, args.shared, place)
        config_of(block, place)
        settings, alone, other = place / "settings.yaml", place / "alone", place / "killed"
        begun = time.perf_counter()
        require_ended(start(settings, alone), alone)
        seconds = time.perf_counter() - begun
        print(f"left alone: {seconds:.0f} s", flush=True)
        kills = killed(settings, other, args.kills, 0.5 * seconds, random.Random(args.seed))
        read = {
            out: {name: json.loads((out / CELLS_DIR / name).read_text()) for name in finished(out)}
            for out in (alone, other)
        }
        rows = {split: len(labels_of(place / f"{split}.jsonl")) for split in ("train", "validation", "test")}
        tables = [json.loads((out / TABLE_FILE).read_text()) for out in (alone, other)]
    cell = next(iter(read[alone].values()))
    result = {
        "command": f"tsqlora compare settings.yaml --methods {METHODS} --seeds {SEEDS}",
        "rows": rows,
        "cells": len(read[alone]),
        "kills": kills,
        "same": {
            "cells": timeless(read[alone]) == timeless(read[other]),
            "table": timeless(tables[0]["table"]) == timeless(tables[1]["table"]),
        },
        "seed": args.seed,
        "commit": commit(),
        "versions": cell["versions"],
        "machine": machine(),
    }
    write_json(RESULTS, result)
    print(json.dumps(result["same"]))


if __name__ == "__main__":
    main()
