"""Which results are older than the code that decides them: python bench/stale.py [--strict]

A result holds the commit that made it. It is old if a commit after its oldest part changed one of the files that
decide it; `make check` says so, `make release` fails.
"""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
SRC = "src/tsqlora/"
DECIDES = {
    "answers.json": ["text/answers.py", "text/faults.py"],
    "answers_pairs.json": ["text/answers.py", "text/faults.py"],
    "faults.json": ["training", "files.py", "run/train.py", "run/fit.py"],
    "fuzz.json": ["data/readers.py", "interop", "compat/yaml.py", "text/prepared.py"],
    "headstart_controls": ["quality/head_start.py", "quality/linear_head.py"],
    "judge.json": ["quality/judge.py", "quality/label_noise.py", "quality/linear_head.py"],
    "ledger.json": ["text/ledger.py", "text/among.py", "text/raw.py", "text/reconcile.py"],
    "scale.json": ["data", "quality/passes.py", "quality/look.py"],
    "servers.json": ["interop/servers.toml", "interop/servers.py", "interop/files.py"],
    "worlds": ["quality/judge.py", "quality/head_start.py", "quality/epochs.py", "training/trusted_last.py"],
}


def git(*words: str) -> str:
    return subprocess.run(["git", "-C", str(ROOT), *words], check=True, capture_output=True, text=True).stdout


def oldest(result: Path) -> str:
    """The commit of the oldest part of a result: its own, else the one that changed the file last."""
    files = sorted(result.glob("*.json")) if result.is_dir() else [result]
    named = {match for file in files for match in re.findall(r'"commit": "([0-9a-f]{7,40})', file.read_text())}
    dated = [line for line in git("log", "--format=%H").split() if any(line.startswith(name) for name in named)]
    return dated[-1] if dated else git("log", "-1", "--format=%H", "--", str(result)).strip()


def main() -> None:
    if not (ROOT / ".git").exists():
        print("no history is at hand that tells how old results are")
        return
    old = False
    for name, paths in DECIDES.items():
        made = oldest(ROOT / "bench" / "results" / name)
        later = (
            git("log", "--format=%h", f"{made}..HEAD", "--", *(SRC + path for path in paths)).split() if made else []
        )
        if later:
            old = True
            print(
                f"bench/results/{name} is of {made[:7]} or later; {len(later)} commits after it changed what decides it"
            )
    if old and "--strict" in sys.argv:
        sys.exit("measure these again before a release")


if __name__ == "__main__":
    main()
