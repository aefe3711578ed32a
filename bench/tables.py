"""Writes the tables of docs/ from bench/results/*.json: python bench/tables.py [--check]

A table stands between `<!-- table: NAME -->` and `<!-- end -->`.
"""

import json
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"
MARKED = re.compile(r"(<!-- table: (?P<name>[\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def quality_rules(results: Mapping[str, Any]) -> list[list[str]]:
    """Accuracy minus random's at the same steps, a column a cell; the worst; wrong labels drawn."""
    cells = list(dict.fromkeys((r["data"], r["wrong"], r["seed"]) for r in results["results"].values()))
    cells.sort(key=lambda cell: (cell[1] == 0, cell[0], cell[2]))
    found = {(r["rule"], r["data"], r["wrong"], r["seed"]): r for r in results["results"].values()}
    head = ["rule", *(f"{d} {'20 % wrong' if w else 'clean'}, seed {s}" for d, w, s in cells), "worst", "wrong drawn"]
    rows = [head]
    for rule in dict.fromkeys(r["rule"] for r in results["results"].values()):
        runs = [found.get((rule, *cell)) for cell in cells]
        controls = [found.get(("random", *cell)) for cell in cells]
        gains = [r["accuracy"] - c["accuracy"] if r and c else None for r, c in zip(runs, controls, strict=True)]
        shown = [_shown(rule, r, gain) for r, gain in zip(runs, gains, strict=True)]
        worst = min(gain for gain in gains if gain is not None)
        drawn = [r["wrong_drawn"] for r in runs if r and r["wrong"]]
        rows.append([rule, *shown, f"{100 * worst:+.1f}", f"{np.mean(drawn):.0%}" if drawn else "–"])
    return rows


def _shown(rule: str, run: Mapping[str, Any] | None, gain: float | None) -> str:
    if run is None or gain is None:
        return "–"
    return f"{100 * run['accuracy']:.1f}" if rule == "random" else f"{100 * gain:+.1f}"


def rank_agreement(results: Mapping[str, Any]) -> list[list[str]]:
    """Spearman's correlation of final ranks between seeds, by estimator."""
    rows = [["estimator", "seeds 0, 1", "seeds 0, 2", "seeds 1, 2", "ranks at the end", "slots moved"]]
    for estimator, values in results["spearman"].items():
        runs = [run for key, run in results["runs"].items() if key.startswith(f"{estimator}/")]
        ranks = [rank for run in runs for rank in run["ranks"].values()]
        moved = [sum(run["moved"]) for run in runs]
        rows.append(
            [estimator, *(f"{v:+.2f}" for v in values), f"{min(ranks)} to {max(ranks)}", ", ".join(map(str, moved))]
        )
    return rows


TABLES: dict[str, Callable[[Mapping[str, Any]], list[list[str]]]] = {
    "quality_rules": quality_rules,
    "rank_agreement": rank_agreement,
}


def markdown(rows: list[list[str]]) -> str:
    """Rows as a Markdown table; the first is its head."""
    head, *body = rows
    lines = [head, ["---"] * len(head), *body]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def rendered(text: str) -> str:
    """The text with every marked table made anew."""

    def table(match: re.Match[str]) -> str:
        name = match["name"]
        results = json.loads((RESULTS / f"{name}.json").read_text())
        return f"{match[1]}\n{markdown(TABLES[name](results))}\n{match[3]}"

    return MARKED.sub(table, text)


def main() -> None:
    stale: list[str] = []
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        text = path.read_text()
        if (new := rendered(text)) != text:
            stale.append(path.name)
            if "--check" not in sys.argv:
                path.write_text(new)
    if stale and "--check" in sys.argv:
        sys.exit(f"tables are not those of bench/results: {', '.join(stale)}; run python bench/tables.py")


if __name__ == "__main__":
    main()
