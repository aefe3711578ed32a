"""Writes docs/research/glue.md from bench/results/glue/*.json: python bench/results_page.py [--check]

The text is bench/results_page.md.jinja.
"""

import json
import math
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import glue
import harness
import jinja2
import pandas as pd
from markdown_table import NONE, markdown
from scipy import stats

BENCH = Path(__file__).parent
PAGE = BENCH.parent / "docs" / "research" / "glue.md"
TASKS = {"sst2": "SST-2", "mrpc": "MRPC", "stsb": "STS-B", "rte": "RTE", "cola": "CoLA"}
ORDER = [harness.entry(name).name for name in glue.ENTRIES.split(",")]
LORA = "lora+all"
KIND = ["rows", "wrong", "mean"]
"""What blocks of several tasks have in common."""
BLOCK = [*KIND, "task"]
Row = dict[str, Any]


def page() -> str:
    """All of docs/research/glue.md."""
    cells = stored()
    kinds = groups(cells, KIND)
    loader = jinja2.FileSystemLoader(BENCH)
    strict = jinja2.Environment(
        loader=loader, undefined=jinja2.StrictUndefined, trim_blocks=True, keep_trailing_newline=True
    )
    return strict.get_template("results_page.md.jinja").render(
        verdicts=sum(len(differing(of)) for of in kinds),
        trainable=_range(share for of in groups(cells, BLOCK) for share in shares(of)["share"]),
        kinds=[
            {"title": title_of(of), "tasks": ", ".join(_tasks(of)), "verdicts": verdicts(of), "table": over_tasks(of)}
            for of in kinds
        ],
        blocks=[{"title": f"{_tasks(of)[0]}, {title_of(of)}", "table": table(of)} for of in groups(cells, BLOCK)],
        rates=rates(cells),
        cells=len(cells),
        commits=", ".join(sorted(set(cells["commit"]))),
    )


def stored() -> Any:
    """Every cell, in the order of the page: few rows first, wrong labels first, then tasks, entries and seeds."""
    rows = list[Row]()
    for path in glue.RESULTS.glob("*_rank*.json"):
        stored = json.loads(path.read_text())
        about, cells = stored["block"], stored["cells"].values()
        rows += [_row(about, cell) for cell in cells if cell["cell"]["seed"] != glue.CHOOSING]
    place = {"task": list(TASKS).index, "entry": rank_of, "wrong": lambda w: -w}
    key = lambda column: column.map(place[column.name]) if column.name in place else column  # noqa: E731
    return pd.DataFrame(rows).sort_values([*BLOCK, "entry", "seed"], key=key, kind="stable").reset_index(drop=True)


def _row(block: Row, cell: Row) -> Row:
    """What the page needs of a cell; test metrics in points."""
    test = cell["metrics"].get("test", {})
    return {
        **{name: block[name] for name in (*BLOCK, "metric")},
        "entry": glue.entry_of(cell),
        "seed": cell["cell"]["seed"],
        "rate": cell["cell"]["learning_rate"],
        "failed": "failed" in cell,
        "points": 100 * test[block["metric"]] if test else None,
        "loss": test.get("loss"),
        "trainable": cell.get("parameters", {}).get("trainable"),
        "random": cell.get("quality", {}).get("random") is not None,
        "commit": (cell["commit"] or "unknown")[:7],
    }


def rank_of(entry: str) -> tuple[int, str]:
    return (ORDER.index(entry) if entry in ORDER else len(ORDER)), entry


def groups(cells: Any, by: Sequence[str]) -> list[Any]:
    """The cells in groups, in the page's order."""
    return [of for _, of in cells.groupby(list(by), sort=False)]


def entries_of(cells: Any) -> list[str]:
    return sorted(cells["entry"].unique(), key=rank_of)


def title_of(cells: Any) -> str:
    rows, wrong, mean = cells[KIND].iloc[0]
    labels = f"{wrong:.0%} wrong labels" if wrong else "clean labels"
    return f"{rows:,.0f} rows, {labels}, mean rank {mean:g}"


def _tasks(cells: Any) -> list[str]:
    return [TASKS[task] for task in cells["task"].unique()]


# --------------------------------------------------------------------------------- differences


class Mean(NamedTuple):
    """A mean over n seeds and the half width of its 95 % interval; None for one seed."""

    mean: float
    half: float | None
    n: int


def interval(values: Sequence[float]) -> Mean:
    """Student's t-interval of the mean of at least one value."""
    n = len(values)
    half = float(stats.t.ppf(0.975, n - 1) * stats.sem(values)) if n > 1 else None
    return Mean(math.fsum(values) / n, half, n)


def verdict(difference: Mean, other: str) -> str:
    """The difference in words; it needs three seeds, since one or two may agree by chance."""
    if difference.half is None or difference.n < 3:
        return f"{difference.n} seed{'s' if difference.n > 1 else ''}: too few to tell from {other}"
    if abs(difference.mean) <= difference.half:
        return f"within noise of {other}"
    return f"{'better' if difference.mean > 0 else 'worse'} than {other}"


def beside(cells: Any, reference: str) -> Any:
    """Each cell that worked beside the reference's of the same block and seed, where there is one.

    Adds `gain` in points and `loss_share` in percent.
    """
    worked = cells[~cells["failed"]]
    theirs = worked.loc[worked["entry"] == reference, [*BLOCK, "seed", "points", "loss"]]
    pairs = worked.merge(theirs, on=[*BLOCK, "seed"], suffixes=("", "_theirs"))
    gain, loss = pairs["points"] - pairs["points_theirs"], pairs["loss"] / pairs["loss_theirs"]
    return pairs.assign(gain=gain, loss_share=100 * (loss - 1))


def over(cells: Any, entry: str, reference: str, what: str = "gain") -> tuple[Mean | None, float | None]:
    """One entry minus another, of blocks of one kind: the mean, and the lowest of one task and seed.

    Seeds are draws, tasks are not: the interval is over seeds, each the mean over the tasks that both sides have.
    """
    worked = cells[~cells["failed"]]
    both = [set(worked.loc[worked["entry"] == name, "task"]) for name in (entry, reference)]
    tasks = [task for task in TASKS if task in both[0] & both[1]]
    if not tasks or entry == reference:
        return None, None
    pairs = beside(cells, reference)
    table = pairs[pairs["entry"] == entry].pivot(index="seed", columns="task", values=what)
    table = table.reindex(columns=tasks).dropna()
    return (None, None) if table.empty else (interval([*table.mean(axis=1)]), float(table.min().min()))


def differing(cells: Any) -> dict[str, Mean]:
    """Each entry compared with LoRA on all rows, where seeds have both."""
    differences = {entry: over(cells, entry, LORA)[0] for entry in entries_of(cells)}
    return {entry: difference for entry, difference in differences.items() if difference}


def verdicts(cells: Any) -> str:
    """Which entries differ from LoRA on all rows by more than noise."""
    of = dict[str, list[str]]()
    for entry, difference in differing(cells).items():
        of.setdefault(verdict(difference, f"`{LORA}`"), []).append(f"`{entry}`")
    ordered = sorted(of, key=lambda name: (not name.startswith("better"), not name.startswith("worse")))
    return ". ".join(f"**{name.capitalize()}**: {', '.join(of[name])}" for name in ordered) or "no seed in common"


def shares(block: Any) -> Any:
    """Trainable parameters as shares of LoRA's on all rows, where that has a cell."""
    worked = block[~block["failed"]]
    theirs = worked.loc[worked["entry"] == LORA, "trainable"]
    return worked.assign(share=worked["trainable"] / theirs.iloc[0] if len(theirs) else None).dropna(subset="share")


# -------------------------------------------------------------------------------------- tables


def over_tasks(cells: Any) -> str:
    """Differences over tasks from LoRA on all rows."""
    rows, share = list[Row](), pd.concat([shares(of) for of in groups(cells, BLOCK)])
    for entry in entries_of(cells):
        (gain, worst), (loss, _) = over(cells, entry, LORA), over(cells, entry, LORA, "loss_share")
        rows.append(
            {
                "": _named(entry, cells),
                f"minus `{LORA}`": _points(gain, sign="+"),
                "worst": NONE if worst is None else f"{worst:+.1f}",
                "loss": _points(loss, sign="+", unit=" %"),
                "trainable": _range(share.loc[share["entry"] == entry, "share"]),
            }
        )
    return markdown(rows)


def table(block: Any) -> str:
    """One block: the metric, the difference from LoRA on all rows, and the loss."""
    rows = list[Row]()
    for entry in entries_of(block):
        worked = block[(block["entry"] == entry) & ~block["failed"]]
        gain, _ = over(block, entry, LORA)
        text = _points(gain, sign="+")
        rows.append(
            {
                "": _named(entry, block),
                block["metric"].iloc[0]: _points(interval([*worked["points"]])) if len(worked) else NONE,
                f"minus `{LORA}`": f"**{text}**" if gain and not verdict(gain, LORA).startswith("within") else text,
                "loss": f"{worked['loss'].mean():.3f}" if len(worked) else NONE,
                "seeds": ", ".join(map(str, worked["seed"])),
            }
        )
    seeds = ", ".join(map(str, glue.GRID_SEEDS))
    silent = ["seeds"] if all(row["seeds"] == seeds for row in rows) else []
    return markdown(pd.DataFrame(rows).drop(columns=silent))


def rates(cells: Any) -> str:
    """The learning rate of each entry, by kind of block and task."""
    of = cells.drop_duplicates([*BLOCK, "entry"])
    where = [f"{rows:,} rows, {TASKS[task]}" for rows, task in zip(of["rows"], of["task"], strict=True)]
    table = (
        of.assign(where=where).drop_duplicates(["where", "entry"]).pivot(index="entry", columns="where", values="rate")
    )
    table = table.reindex(index=entries_of(of), columns=list(dict.fromkeys(where))).map("{:g}".format)
    return markdown(table.replace("nan", NONE).rename(index="`{}`".format).rename_axis("").reset_index())


# -------------------------------------------------------------------------------------- wording


def _named(entry: str, cells: Any) -> str:
    """The name of a row, with what a reader of its numbers must know."""
    of = cells[cells["entry"] == entry]
    failed, random = of[of["failed"]], of[~of["failed"] & of["random"]]
    notes = [f"{len(failed)} cell{'s' * (len(failed) > 1)} failed"] if len(failed) else []
    notes += [f"{len(random)} of {len(of) - len(failed)} drew at random"] if len(random) else []
    return ", ".join([f"`{entry}`", *notes])


def _points(value: Mean | None, sign: str = "", unit: str = "") -> str:
    """The mean and its interval, with the number of seeds where it is not the grid's."""
    if value is None:
        return NONE
    seeds = "" if not sign or value.n == len(glue.GRID_SEEDS) else f" ({value.n} seed{'s' * (value.n != 1)})"
    return f"{value.mean:{sign}.1f}" + ("" if value.half is None else f" ± {value.half:.1f}") + unit + seeds


def _range(values: Iterable[float]) -> str:
    numbers = [*values]
    ends = (min(numbers), max(numbers)) if numbers else ()
    return " to ".join(dict.fromkeys(f"{value:.2f}" for value in ends)) or NONE


def main() -> None:
    new = page()
    if "--check" not in sys.argv:
        PAGE.write_text(new)
    elif not PAGE.exists() or PAGE.read_text() != new:
        sys.exit("docs/research/glue.md is not that of bench/results/glue; run python bench/results_page.py")


if __name__ == "__main__":
    main()
