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
    "answers.json": ["auditing/texts/answers.py", "auditing/texts/faults.py"],
    "answers_pairs.json": ["auditing/texts/answers.py", "auditing/texts/faults.py"],
    "faults.json": ["training", "files.py"],
    "fuzz.json": ["rows/readers.py", "adapter", "libs/yaml.py", "auditing/texts/prepared.py"],
    "headstart_controls": ["auditing/head_start.py", "model/linear.py"],
    "judge.json": ["auditing/labels/judge.py", "auditing/labels/label_noise.py", "model/linear.py"],
    "ledger.json": [f"auditing/texts/{name}.py" for name in ("ledger", "among", "raw")],
    "question": ["auditing/labels/question.py", "auditing/labels/judge.py", "model/linear.py"],
    "scale.json": ["rows", "model/passes.py", "auditing/look.py"],
    "servers.json": ["adapter/servers.toml", "adapter/servers.py", "adapter/files.py"],
    "worlds": ["auditing/labels", "auditing/head_start.py", "auditing/draw", "training/trusted_last.py"],
}
BEFORE = {
    "adapter": "interop",
    "auditing/labels": "quality",
    "auditing/draw": "quality",
    "auditing/texts": "text",
    "auditing": "quality",
    "libs": "compat",
    "model/linear.py": "quality/linear_head.py",
    "model": "quality",
    "rows": "data",
}
"""Where these files were before the commit whose packages are doors."""
EQUAL = {"5253a12b"}
"""Commits whose golden runs equal those before them (scripts/golden.py): they make nothing old."""


def git(*words: str) -> str:
    return subprocess.run(["git", "-C", str(ROOT), *words], check=True, capture_output=True, text=True).stdout


def oldest(result: Path) -> str:
    """The commit of the oldest part of a result: its own, else the one that changed the file last."""
    files = sorted(result.glob("*.json")) if result.is_dir() else [result]
    named = {match for file in files for match in re.findall(r'"commit": "([0-9a-f]{7,40})', file.read_text())}
    dated = [line for line in git("log", "--format=%H").split() if any(line.startswith(name) for name in named)]
    return dated[-1] if dated else git("log", "-1", "--format=%H", "--", str(result)).strip()


def _both(path: str) -> tuple[str, str]:
    """Where a file is, and where it was."""
    new = next((new for new in BEFORE if path.startswith(new)), "")
    return path, path.replace(new, BEFORE.get(new, ""), 1)


def main() -> None:
    if not (ROOT / ".git").exists():
        print("no history is at hand that tells how old results are")
        return
    old = False
    for name, paths in DECIDES.items():
        made = oldest(ROOT / "bench" / "results" / name)
        files = [SRC + path for one in paths for path in _both(one)]
        # What a later commit took back makes nothing old.
        differs = made and git("diff", "--name-only", made, "HEAD", "--", *files)
        changed = git("log", "--format=%H", f"{made}..HEAD", "--", *files).split() if differs else []
        later = [commit for commit in changed if commit[:8] not in EQUAL]
        if later:
            old = True
            print(
                f"bench/results/{name} is of {made[:7]} or later; {len(later)} commits after it changed what decides it"
            )
    if old and "--strict" in sys.argv:
        sys.exit("measure these again before a release")


if __name__ == "__main__":
    main()
