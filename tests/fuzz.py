"""Random, damaged and malicious files for everything that reads files: no traceback, no hang, nothing else touched.

    python tests/fuzz.py [--targets settings,doctor] [--cases 100000] [--out FILE]

A case is files in a directory (hostile.py): one in 20 is drawn by hypothesis, the others are variations of it.
The reader may read it, or refuse it with one of our errors, in two lines. Failures are: any other exception; more than
a second of the processor; a file that is opened for writing or changed outside of the case's directory, a process that
is not our own Python, a socket, a pickle (watch.py). Chunks of 1,000 cases are drawn by their number and counted
when they are done, so that a run goes on where it was; the cases of failures are kept in bench/.cache/fuzz.
"""

import argparse
import json
import os
import pickle
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from random import Random
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

import hypothesis
import torch
from hypothesis import HealthCheck, Phase, given
from transformers import TrainingArguments

from hostile import TARGETS, Case, varied
from tsqlora.files import write_json
from tsqlora.record import versions
from watch import attempt

sys.path.append(str(Path(__file__).parents[1] / "bench"))

from origin import commit

ROOT = Path(__file__).parents[1]
CACHE = ROOT / "bench" / ".cache" / "fuzz"
DRAWN = 50
"""Cases of a chunk that hypothesis draws."""
VARIED = 19
"""Variations of each: its bytes and words changed at random."""


def run_chunk(target: str, number: int, folder: Path) -> dict[str, Any]:
    """Counts of one chunk's outcomes, and what was broken, once for each place."""
    strategy, run = TARGETS[target]
    counts: Counter[str] = Counter()
    broken: dict[str, Any] = {}
    slowest = 0.0
    random = Random(number)

    @hypothesis.seed(number)
    @hypothesis.settings(
        max_examples=DRAWN,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def one(drawn: Case) -> None:
        nonlocal slowest
        for case in [drawn, *(varied(drawn, random) for _ in range(VARIED))]:
            outcome = attempt(run, case, folder)
            counts[outcome.kind] += 1
            slowest = max(slowest, outcome.seconds)
            key = f"{outcome.kind}: {outcome.message.split(': ')[0]}"
            if outcome.broken and key not in broken:
                broken[key] = {"target": target, "kind": outcome.kind, "message": outcome.message}
                _keep(case, broken[key])

    one()
    return {"counts": dict(counts), "slowest": slowest, "broken": broken}


def _keep(case: Any, about: Mapping[str, Any]) -> None:
    CACHE.mkdir(parents=True, exist_ok=True)
    name = f"{about['target']}-{abs(hash(about['message'])):x}.pickle".replace("/", "_").replace(" ", "")
    (CACHE / name).write_bytes(pickle.dumps((dict(about), case)))


def add(state: dict[str, Any], chunk: Mapping[str, Any]) -> None:
    for kind, count in chunk["counts"].items():
        state["outcomes"][kind] = state["outcomes"].get(kind, 0) + count
    state["cases"] = sum(state["outcomes"].values())
    state["chunks"] += 1
    state["slowest_seconds"] = round(max(state["slowest_seconds"], chunk["slowest"]), 3)
    for key, about in chunk["broken"].items():
        state["broken"].setdefault(key, about["message"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", default=",".join(TARGETS))
    parser.add_argument("--cases", type=int, default=100_000, help="of each target")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "fuzz.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    TrainingArguments("x", report_to="none")  # what is imported late makes its caches now
    targets = options.targets.split(",")
    now, here = {"versions": versions() | {"hypothesis": hypothesis.__version__}}, (commit() or "unknown")[:7]
    results = json.loads(options.out.read_text()) if options.out.exists() else {"engine": "hypothesis", "targets": {}}
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
        while waiting := [t for t in targets if results["targets"].get(t, {"cases": 0})["cases"] < options.cases]:
            target = min(waiting, key=lambda t: results["targets"].get(t, {"cases": 0})["cases"])
            new = {"commit": here, "cases": 0, "chunks": 0, "outcomes": {}, "slowest_seconds": 0.0, "broken": {}}
            state = results["targets"].setdefault(target, new)
            add(state, run_chunk(target, state["chunks"], Path(folder)))
            write_json(options.out, results | now)
            print(target, state["cases"], state["outcomes"], flush=True)


if __name__ == "__main__":
    main()
