"""Live days by their numbers, one after another: how many hold every law.

    python bench/days.py --days 5000 --log LOG

A day is one of tests/days. The log, outside the repository, has a line for each day; a day that it has is not lived
again, so the command may be stopped at any time. Counts of the log are in bench/results/days.json.
"""

import json
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from origin import ROOT, commit, machine, parser_of, write

sys.path.insert(0, str(ROOT / "tests"))  # before this folder, whose days.py is this file


def lines_of(log: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()] if log.exists() else []


def live_days(numbers: range, log: Path) -> None:
    """Append a line for each day that the log lacks."""
    from days.day import day
    from days.frozen import lived

    there = {line["day"] for line in lines_of(log)}
    with log.open("a", encoding="utf-8") as file:
        for number in numbers:
            if number in there:
                continue
            one, start = day(number), time.process_time()
            try:
                seen = lived(one)
                broken, unlucky = seen.broken, seen.unlucky
            except Exception as error:  # of the day itself
                broken, unlucky = [f"the day cannot be lived: {type(error).__name__}: {error}"], []
            seconds = round(time.process_time() - start, 2)
            parts = {
                "kind": one.kind,
                "door": one.door,
                "family": one.family if one.of_texts else None,
                "file": one.file,
            }
            line = {
                "day": number,
                **parts,
                "broken": broken,
                "unlucky": unlucky,
                "seconds": seconds,
                "commit": commit(),
            }
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
            file.flush()


def summary_of(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """Counts of days, of those that broke a law, and by door."""
    return {
        "days": len(lines),
        "numbers": [min(line["day"] for line in lines), max(line["day"] for line in lines)],
        "broken": {str(line["day"]): line["broken"][0] for line in lines if line["broken"]},
        "without_skill": sum(bool(line["unlucky"]) for line in lines),
        "doors": dict(sorted(Counter(line["door"] for line in lines).items())),
        "kinds": dict(sorted(Counter(line["kind"] for line in lines).items())),
        "families": dict(sorted(Counter(line["family"] for line in lines if line["family"]).items())),
        "files": dict(sorted(Counter(line["file"] for line in lines).items())),
        "processor_seconds": round(sum(line["seconds"] for line in lines)),
        "commits": dict(Counter(line["commit"] for line in lines)),
        "commit": commit(),
        "machine": machine(),
    }


def main() -> None:
    parser = parser_of(__doc__, "days")
    parser.add_argument("--days", type=int, default=5_000)
    parser.add_argument("--start", type=int, default=0, help="the first number")
    parser.add_argument("--log", type=Path, required=True, help="a file outside the repository, which grows")
    arguments = parser.parse_args()
    numbers = range(arguments.start, arguments.start + arguments.days)
    live_days(numbers, arguments.log)
    write(arguments.out, summary_of([line for line in lines_of(arguments.log) if line["day"] in numbers]))


if __name__ == "__main__":
    main()
