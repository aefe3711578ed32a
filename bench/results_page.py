"""Writes docs/results.md and its plots from bench/results/glue/*.json: python bench/results_page.py [--check]

`--check` compares the page alone: plots depend on the version of matplotlib, too.
"""

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tables import markdown

from tsqlora.compare.cells import Entry
from tsqlora.compare.statistics import interval, paired
from tsqlora.compare.table import rows_of

ROOT = Path(__file__).parents[1]
RESULTS, PAGE, PLOTS = ROOT / "bench" / "results" / "glue", ROOT / "docs" / "results.md", ROOT / "docs" / "plots"
TASKS = {"sst2": "SST-2", "mrpc": "MRPC", "stsb": "STS-B", "rte": "RTE", "cola": "CoLA"}
ORDER = (
    "lora+all",
    "lora+random",
    "tsqlora+quality",
    "tsqlora-quality-only+quality",
    "tsqlora-ranks-only+all",
    "adalora+all",
    "elalora+all",
    "eva+all",
)
OURS = "tsqlora"
COLOURS = ("#000000", "#e69f00", "#0072b2", "#56b4e9", "#009e73", "#d55e00", "#cc79a7", "#999933")
"""Told apart by the colour-blind too (Okabe and Ito)."""

BUSY = ("02d971b",)
"""The code of cells that ran beside as many as nine other processes: their seconds say nothing."""

Block = Mapping[str, Any]


def blocks() -> list[Block]:
    """The results, block by block, in the order in which they are shown."""
    found = [json.loads(path.read_text()) for path in RESULTS.glob("*_rank*.json")]
    tasks = list(TASKS)

    def place(block: Block) -> Any:
        about = block["block"]
        return about["equal"], about["rows"], -about["wrong"], about["mean"], tasks.index(about["task"])

    return sorted((b for b in found if b["cells"]), key=place)


def page() -> str:
    """All of docs/results.md."""
    found = blocks()
    shown = [block for block in found if not swept(block)]
    commits = sorted({cell["commit"][:7] for block in found for cell in block["cells"].values()})
    parts = [HEAD.format(commits=", ".join(commits), cells=sum(len(b["cells"]) for b in found))]
    parts.append("## Over tasks\n\n" + OVER_TASKS)
    for kind in kinds(shown):
        parts.append(f"### {title_of(kind)}\n\n{markdown(over_tasks(shown, kind))}")
    parts.append("## Task by task\n\n" + TASK_BY_TASK)
    parts += [f"### {name_of(block)}\n\n{markdown(table(block))}" for block in shown]
    parts.append(f"## Learning rates\n\n{LEARNING_RATES}\n{markdown(rates(found))}")
    parts.append("## Plots\n\n" + "\n\n".join(f"![{alt}](plots/{name}.svg)" for name, alt in PLOTTED.items()) + "\n")
    return "\n".join(parts)


HEAD = """# Results

Made by `make bench-results` from `bench/results/glue/*.json`: {cells} trainings, by the code of {commits}.

Every row is a way to train MiniLM (22.7 million parameters, six blocks) by an adapter in all its linear layers, at the
same number of optimizer steps: four passes over all rows in batches of 16. `+all` trains on every row, `+random` and
`+quality` on half of the rows, drawn anew each epoch, for twice as many epochs. The seed draws the training rows,
which labels are wrong, the head and the batches, so differences are taken seed by seed. ± is a 95 % t-interval over
seeds; where it holds 0 the difference is called noise. Test sets are whole, and decide nothing. Rivals are described in
[rivals.md](rivals.md). Seconds are of one core of a machine on which others worked as well: compare them within a block
and with care; "–" where too many others did. *Passes* count what must be computed, whatever the machine: rows
forward, and twice for rows backward.

MiniLM has seen sentence pairs like those of STS-B and RTE: the numbers compare these methods with each other, and with
no published table.
"""
OVER_TASKS = """\
Differences by task and seed in points of the metric (accuracy; Spearman's correlation for STS-B; Matthews' for CoLA):
their mean over all that both sides have (how many, in brackets), and the worst of them.
"""
TASK_BY_TASK = "Points of the metric. *Seeds* are those that were finished; none was left out.\n"
LEARNING_RATES = """\
Accuracy on 600 validation rows after training on 1,000 clean rows of SST-2, in the mean over seeds (how many, in
brackets); of the rates that most seeds tried the best one is used everywhere.
"""
PLOTTED = {
    "parameters": "Points against LoRA on all rows, by trainable parameters",
    "passes": "Points against LoRA on all rows, by passes",
    "seconds": "Points against LoRA on all rows, by seconds",
    "samples": "Points against LoRA on all rows, by rows used",
}


def swept(block: Block) -> bool:
    """Whether it holds several learning rates of an entry: that is where they were chosen."""
    cells = [cell["cell"] for cell in block["cells"].values()]
    return len({(c["method"], c["policy"], c["seed"]) for c in cells}) < len(cells)


def kinds(found: Iterable[Block]) -> list[tuple[Any, ...]]:
    """What the blocks of several tasks have in common."""
    return list(dict.fromkeys(kind_of(block) for block in found))


def kind_of(block: Block) -> tuple[Any, ...]:
    about = block["block"]
    return about["equal"], about["rows"], about["wrong"], about["mean"]


def title_of(kind: tuple[Any, ...]) -> str:
    equal, rows, wrong, mean = kind
    labels = f"{wrong:.0%} wrong labels" if wrong else "clean labels"
    return f"{rows:,} rows, {labels}, mean rank {mean}" + ("" if equal == "steps" else f", equal {equal}")


def name_of(block: Block) -> str:
    return f"{TASKS[block['block']['task']]}, {title_of(kind_of(block))}"


def by_entry(block: Block) -> dict[str, dict[int, float]]:
    """Points of the metric on test rows, by entry and seed."""
    metric, found = block["block"]["metric"], dict[str, dict[int, float]]()
    for cell in block["cells"].values():
        if "failed" not in cell:
            name = Entry(cell["cell"]["method"], cell["cell"]["policy"]).name
            found.setdefault(name, {})[cell["cell"]["seed"]] = 100 * cell["metrics"]["test"][metric]
    return {name: found[name] for name in sorted(found, key=rank_of)}


def rank_of(name: str) -> tuple[int, str]:
    return (ORDER.index(name) if name in ORDER else len(ORDER)), name


def table(block: Block) -> list[list[str]]:
    """One block: the metric, the difference from LoRA on all rows, in words, and the cost."""
    metric, points = block["block"]["metric"], by_entry(block)
    entries = [Entry(*name.split("+")) for name in points]
    rows = rows_of(entries, list(block["cells"].values()), metric=metric)
    head = ["", metric, "minus `lora+all`", "", "seeds", "trainable", "passes", "seconds"]
    shown = [head]
    for row in rows:
        cells = [c for c in block["cells"].values() if c["cell"]["method"] == row["method"]]
        cells = [c for c in cells if c["cell"]["policy"] == row["policy"] and "failed" not in c]
        difference = row.get("difference")
        shown.append(
            [
                f"`{row['name']}`",
                _points(row["metrics"][metric], scale=100),
                _points(difference, scale=100, sign="+") if difference else "–",
                row["verdict"].replace("lora+all", "`lora+all`"),
                ", ".join(str(seed) for seed in sorted(row["seeds"])),
                f"{row['trainable']:,}",
                f"{np.mean([passes(c) for c in cells]):,.0f}",
                _seconds(cells),
            ]
        )
    return shown


def quiet(cells: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The cells whose seconds mean something."""
    return [cell for cell in cells if cell["commit"][:7] not in BUSY]


def _seconds(cells: Sequence[Mapping[str, Any]]) -> str:
    of = [cell["seconds"] for cell in quiet(cells)]
    return f"{np.mean(of):.0f}" if of else "–"


def over_tasks(found: Sequence[Block], kind: tuple[Any, ...]) -> list[list[str]]:
    """Paired differences over tasks and seeds from LoRA on all rows and on a random half."""
    of = {block["block"]["task"]: by_entry(block) for block in found if kind_of(block) == kind}
    names = sorted({name for entries in of.values() for name in entries}, key=rank_of)
    rows = [["", "tasks", "minus `lora+all`", "worst", "minus `lora+random`", "worst"]]
    for name in names:
        tasks = [task for task in of if name in of[task]]
        row = [f"`{name}`", ", ".join(TASKS[task] for task in tasks)]
        for other in ("lora+all", "lora+random"):
            row += _difference(of, name, other)
        rows.append(row)
    return rows


def summary(*, rows: int, mean: int) -> list[list[str]]:
    """Differences from LoRA on all rows, over tasks and seeds, with wrong labels and clean."""
    found = [block for block in blocks() if not swept(block)]
    shown = [["", *(f"{'20 % wrong labels' if wrong else 'clean'}, points minus LoRA's" for wrong in (0.2, 0.0))]]
    of = {
        wrong: {b["block"]["task"]: by_entry(b) for b in found if kind_of(b) == ("steps", rows, wrong, mean)}
        for wrong in (0.2, 0.0)
    }
    names = {name for tasks in of.values() for entries in tasks.values() for name in entries} - {"lora+all"}
    for name in sorted(names, key=rank_of):
        shown.append([f"`{name}`", *(_difference(of[wrong], name, "lora+all")[0] for wrong in (0.2, 0.0))])
    return shown


def _difference(of: Mapping[str, Mapping[str, Mapping[int, float]]], name: str, other: str) -> tuple[str, str]:
    pairs = [
        points - of[task][other][seed]
        for task in of
        if other in of[task]
        for seed, points in of[task].get(name, {}).items()
        if seed in of[task][other]
    ]
    if name == other or not pairs:
        return "–", "–"
    over = interval(pairs)
    return _points({"mean": over.mean, "half": over.half}, sign="+") + f" ({over.n})", f"{min(pairs):+.1f}"


def _points(value: Mapping[str, Any], *, scale: float = 1.0, sign: str = "") -> str:
    shown = f"{scale * value['mean']:{sign}.1f}"
    return shown if value["half"] is None else f"{shown} ± {scale * value['half']:.1f}"


def passes(cell: Mapping[str, Any]) -> int:
    """Rows forward, and twice for rows backward, evaluation left out."""
    return sum(c["forward"] + 2 * c["backward"] for phase, c in cell["cost"].items() if phase != "evaluation")


def rates(found: Sequence[Block]) -> list[list[str]]:
    """Validation metric by learning rate, where they were chosen."""
    cells = [cell for block in found if swept(block) for cell in block["cells"].values()]
    tried = sorted({cell["cell"]["learning_rate"] for cell in cells})
    rows = [["", *(f"{rate:g}" for rate in tried), "chosen"]]
    names = sorted({Entry(c["cell"]["method"], c["cell"]["policy"]).name for c in cells}, key=rank_of)
    chosen = json.loads((RESULTS / "rates.json").read_text())["rates"] if cells else {}
    for name in names:
        of = dict[float, list[float]]()
        for c in cells:
            if f"{c['cell']['method']}+{c['cell']['policy']}" == name:
                of.setdefault(c["cell"]["learning_rate"], []).append(c["metrics"]["validation"]["accuracy"])
        shown = [f"{100 * sum(of[r]) / len(of[r]):.1f} ({len(of[r])})" if r in of else "–" for r in tried]
        rows.append([f"`{name}`", *shown, f"{chosen[name]:g}"])
    return rows


# -------------------------------------------------------------------------------------- plots


def plot() -> None:
    """Points against LoRA on all rows, a dot a block and entry: the mean over seeds."""
    import matplotlib

    matplotlib.use("svg")
    # The same numbers give the same file.
    matplotlib.rcParams |= {"svg.hashsalt": "tsqlora", "svg.fonttype": "none", "font.size": 10}
    from matplotlib import pyplot

    PLOTS.mkdir(exist_ok=True)
    for name, alt in PLOTTED.items():
        figure, axes = pyplot.subplots(figsize=(7.2, 4.2), layout="constrained")
        for entry, dots in dots_of(name).items():
            colour = COLOURS[rank_of(entry)[0] % len(COLOURS)]
            for wrong, marker in ((0.0, "o"), (0.2, "^")):
                chosen = [(x, y) for x, y, share in dots if bool(share) == bool(wrong)]
                label = f"{entry}, {'20 % wrong' if wrong else 'clean'}"
                if chosen:
                    axes.scatter(*zip(*chosen, strict=True), color=colour, marker=marker, label=label, alpha=0.8)
        axes.axhline(0, color="#777777", linewidth=1)
        axes.set(xlabel=alt.partition("by ")[2], ylabel="points against lora+all")
        if axes.collections:
            axes.legend(fontsize=7, ncols=2, loc="center left", bbox_to_anchor=(1.0, 0.5))
        figure.savefig(PLOTS / f"{name}.svg", metadata={"Date": None})
        pyplot.close(figure)


def dots_of(name: str) -> dict[str, list[tuple[float, float, float]]]:
    """By entry: what it cost, the mean difference by seed, and the share of wrong labels."""
    cost = {
        "parameters": lambda c: c["parameters"]["trainable"],
        "passes": passes,
        "seconds": lambda c: c["seconds"],
        "samples": lambda c: sum(p["backward"] for phase, p in c["cost"].items() if phase in ("warm-up", "training")),
    }[name]
    found: dict[str, list[tuple[float, float, float]]] = {}
    for block in (b for b in blocks() if not swept(b)):
        points = by_entry(block)
        for entry, ours in points.items():
            difference = paired(ours, points.get("lora+all", {}))
            cells = [c for c in block["cells"].values() if f"{c['cell']['method']}+{c['cell']['policy']}" == entry]
            cells = [c for c in (quiet(cells) if name == "seconds" else cells) if "failed" not in c]
            if difference is not None and cells and entry != "lora+all":
                x = float(np.mean([cost(c) for c in cells]))
                found.setdefault(entry, []).append((x, difference.mean, block["block"]["wrong"]))
    return {entry: found[entry] for entry in sorted(found, key=rank_of)}


def main() -> None:
    new = page()
    if "--check" in sys.argv:
        if not PAGE.exists() or PAGE.read_text() != new:
            sys.exit("docs/results.md is not that of bench/results/glue; run make bench-results")
        return
    PAGE.write_text(new)
    plot()


if __name__ == "__main__":
    main()
