"""The same readers as bench/fuzz.py, with bytes that atheris (libFuzzer) chooses by the branches that they reach.

    python bench/fuzz_guided.py settings [--runs 20000]

Settings, JSON, CSV and Parquet are a file's bytes; an adapter's settings and weights are parted by three dashes.
What a case may do is what bench/fuzz.py says. Counts go to bench/results/fuzz.json, under "guided"; the corpus that
grew is kept in bench/.cache/fuzz, so that a run goes on where it was.
"""

import argparse
import json
import os
import sys
import tempfile
from collections import Counter
from pathlib import Path

from tsqlora.files import write_json

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

import atheris
import peft  # noqa: F401  (before ours, so that it is not instrumented)
import torch

with atheris.instrument_imports(include=["tsqlora", "yaml", "json"]):
    from hostile import BYTES, TARGETS, case_of_bytes
from watch import attempt

ROOT = Path(__file__).parents[1]
CORPORA = ROOT / "bench" / ".cache" / "fuzz" / "corpora"
OUT = ROOT / "bench" / "results" / "fuzz.json"
EVERY = 500
"""Cases after which counts are written down: libFuzzer ends the process itself."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", choices=list(BYTES))
    parser.add_argument("--runs", type=int, default=20_000)
    parser.add_argument("--out", type=Path, default=OUT)
    given = parser.parse_args()
    torch.set_num_threads(1)
    corpus = CORPORA / given.target
    corpus.mkdir(parents=True, exist_ok=True)
    for number, sound in enumerate(BYTES[given.target]):
        (corpus / f"sound-{number}").write_bytes(sound)
    folder = Path(tempfile.mkdtemp(dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
    counts: Counter[str] = Counter()
    _, run = TARGETS[given.target]
    found = json.loads(given.out.read_text()) if given.out.exists() else {"targets": {}}
    before = Counter(found.get("guided", {}).get(given.target, {}))

    def one(content: bytes) -> None:
        outcome = attempt(run, case_of_bytes(given.target, content), folder)
        counts[outcome.kind] += 1
        if outcome.broken:
            print(outcome, flush=True)
        if counts.total() % EVERY == 0:
            found.setdefault("guided", {})[given.target] = dict(before + counts)
            write_json(given.out, found)

    atheris.Setup([sys.argv[0], f"-runs={given.runs}", "-max_len=4096", "-verbosity=0", str(corpus)], one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
