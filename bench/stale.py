"""Which results are older than the code that decides them.

    python bench/stale.py [--strict]
    python bench/stale.py --repeated worlds FOLDER   # cells of today's code, made with RESULTS=FOLDER

A result holds the commit that made it. It is old if a commit after its oldest part changed one of the files that
decide it; `make check` says so, `make release` fails. Cells that a later commit made again, and whose numbers are
equal, make a result as new as that commit; bench/results/repeated.json names them. What servers do (servers.json) is
not decided by our code; tests hold the doctor to it.
"""

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"
REPEATED = RESULTS / "repeated.json"
CIRCUMSTANCES = {"commit", "versions", "machine", "cost", "processor_seconds", "seconds", "notes"}
"""What a cell that is made again may have otherwise."""
SRC = "src/tsqlora/"
DECIDES = {
    "answers.json": ["auditing/texts/answers.py", "auditing/texts/faults.py"],
    "answers_pairs.json": ["auditing/texts/answers.py", "auditing/texts/faults.py"],
    "faults.json": ["training", "files.py"],
    "fuzz.json": ["rows/readers.py", "adapter", "libs/yaml.py", "auditing/texts/prepared.py"],
    "headstart_controls": ["auditing/head_start.py", "model/linear.py"],
    "judge.json": ["auditing/labels/judge.py", "auditing/labels/label_noise.py", "model/linear.py"],
    "ledger.json": [f"auditing/texts/{name}.py" for name in ("ledger", "among", "raw")],
    "question": ["auditing/labels/question.py", "auditing/labels/judge.py", "model/linear.py"],
    "scale.json": ["rows", "model/passes.py", "auditing/look.py"],
    "worlds": ["auditing/labels", "auditing/head_start.py", "auditing/draw", "training/trusted_last.py"],
}


def git(*words: str) -> str:
    return subprocess.run(["git", "-C", str(ROOT), *words], check=True, capture_output=True, text=True).stdout


def oldest(result: Path) -> str:
    """The commit that made the oldest part of a result, or its cells again; else the one that changed the file last."""
    if repeated := json.loads(REPEATED.read_text()).get(result.name):
        return repeated["commit"]
    files = sorted(result.glob("*.json")) if result.is_dir() else [result]
    named = {match for file in files for match in re.findall(r'"commit": "([0-9a-f]{7,40})', file.read_text())}
    dated = [line for line in git("log", "--format=%H").split() if any(line.startswith(name) for name in named)]
    return dated[-1] if dated else git("log", "-1", "--format=%H", "--", str(result)).strip()


def _numbers(part: Any) -> Any:
    """A part of a cell without its circumstances, numbers to six digits."""
    if isinstance(part, dict):
        return {name: _numbers(one) for name, one in part.items() if name not in CIRCUMSTANCES}
    if isinstance(part, list):
        return [_numbers(one) for one in part]
    return float(f"{part:.6g}") if isinstance(part, float) else part


def repeated(name: str, folder: Path) -> None:
    """Enters cells that were made again, if all of them are equal to those of the result."""
    cells = {path.name: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
    before = {cell: json.loads((RESULTS / name / cell).read_text()) for cell in cells}
    differ = [cell for cell in cells if _numbers(cells[cell]) != _numbers(before[cell])]
    (commit,) = {cell["commit"] for cell in cells.values()}
    if differ or commit.endswith("-dirty"):
        sys.exit(f"of {commit}, these cells differ: {', '.join(differ)}" if differ else f"{commit}: commit first")
    entries = json.loads(REPEATED.read_text()) | {name: {"commit": commit, "cells": list(cells)}}
    REPEATED.write_text(json.dumps(entries, indent=1, sort_keys=True) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--strict", action="store_true")
    parser.add_argument("--repeated", nargs=2, metavar=("RESULT", "FOLDER"))
    request = parser.parse_args()
    if request.repeated:
        return repeated(request.repeated[0], Path(request.repeated[1]))
    if not (ROOT / ".git").exists():
        print("no history is at hand that tells how old results are")
        return
    old = False
    for name, paths in DECIDES.items():
        made, files = oldest(RESULTS / name), [SRC + path for path in paths]
        # What a later commit took back makes nothing old.
        differs = made and git("diff", "--name-only", made, "HEAD", "--", *files)
        later = git("log", "--format=%h", f"{made}..HEAD", "--", *files).split() if differs else []
        if later:
            old = True
            print(f"{name} is of {made[:8]} or later; {len(later)} commits changed what decides it, last {later[0]}")
    if old and request.strict:
        sys.exit("measure these again before a release")


if __name__ == "__main__":
    main()
