"""Writes docs/research/glue.md and its plots from bench/results/glue/*.json: python bench/results_page.py [--check]

The text is bench/results_page.md.jinja. `--check` compares the page alone: plots depend on the version of matplotlib.
"""

import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import glue
import jinja2
import pandas as pd
from glue_cells import (
    BLOCK,
    BUSY,
    KIND,
    ORDER,
    REFERENCES,
    TASKS,
    Over,
    beside,
    chosen,
    entries_of,
    over,
    shown,
    stored,
)
from markdown_table import NONE, markdown
from results_plots import COSTS, plot

from tsqlora.compare.table import interval, verdict
from tsqlora.reports.comparison import Mean

BENCH = Path(__file__).parent
PAGE = BENCH.parent / "docs" / "research" / "glue.md"
LORA = REFERENCES[0]

Row = dict[str, Any]


def page() -> str:
    """All of docs/research/glue.md."""
    everything = stored()
    cells, swept = shown(everything), everything[everything["sweep"]]
    kinds = [(title_of(of), of) for of in groups(cells, KIND)]
    steps = [(title, of) for title, of in kinds if of["equal"].iloc[0] == "steps"]
    return _template().render(
        verdicts=sum(len(differing(of)) for _, of in steps),
        steps=[{"title": t, "tasks": ", ".join(_tasks(of)), "verdicts": verdicts(of)} for t, of in steps],
        busy=_busy(cells),
        trainable=_range([share for of in groups(cells, BLOCK) for share in shares(of)["share"]], "{:.2f}"),
        left_out=_left_out(everything),
        missing=markdown(rows) if (rows := missing(cells)) else "Every block of the grid is whole.\n",
        kinds=[
            {"title": f"{t} ({', '.join(_tasks(of))})", "table": markdown(over_tasks(of)), "mixed": two_precisions(of)}
            for t, of in steps
        ],
        blocks=[
            {"title": name_of(of), "table": markdown(table(of)), "time": in_time(of), "float32": float32_cells(of)}
            for of in groups(cells, BLOCK)
        ],
        precisions=markdown(precisions(cells)),
        rates=markdown(rates(swept[swept["own_rates"].isna()], chosen()["rates"])),
        block_rates=[
            {"title": name_of(of), "table": markdown(rates(of, of["own_rates"].iloc[0]))}
            for of in groups(swept[swept["own_rates"].notna()], BLOCK)
        ],
        old=int(swept["stale"].sum()),
        cells=len(cells),
        swept=len(swept),
        plots={name: label for name, (label, _) in COSTS.items()},
        commits=", ".join(sorted({*cells["commit"], *swept["commit"]})),
    )


def _template() -> jinja2.Template:
    loader = jinja2.FileSystemLoader(BENCH)
    strict = jinja2.Environment(
        loader=loader, undefined=jinja2.StrictUndefined, trim_blocks=True, keep_trailing_newline=True
    )
    return strict.get_template("results_page.md.jinja")


def groups(cells: pd.DataFrame, by: Sequence[str]) -> list[pd.DataFrame]:
    """The cells in groups, in the page's order."""
    return [of for _, of in cells.groupby(list(by), sort=False)]


def title_of(cells: pd.DataFrame) -> str:
    equal, rows, wrong, mean = cells[KIND].iloc[0]
    labels = f"{wrong:.0%} wrong labels" if wrong else "clean labels"
    return f"{rows:,} rows, {labels}, mean rank {mean}" + ("" if equal == "steps" else f", equal {equal}")


def name_of(cells: pd.DataFrame) -> str:
    return f"{_tasks(cells)[0]}, {title_of(cells)}"


def _tasks(cells: pd.DataFrame) -> list[str]:
    return [TASKS[task] for task in cells["task"].unique()]


# ------------------------------------------------------------------------ what is shown, and what not


def _busy(cells: pd.DataFrame) -> str:
    busy = [commit for commit in BUSY if commit in set(cells["commit"])]
    return f"; those by {', '.join(busy)} are not shown, since they ran beside as many as nine others" if busy else ""


def _left_out(cells: pd.DataFrame) -> str:
    counts = cells.loc[~cells["sweep"], "hidden"].value_counts().sort_index()
    reasons = "; ".join(f"{count} {reason}" for reason, count in counts.items())
    return f" Stored and not shown are {reasons}." if reasons else ""


def missing(cells: pd.DataFrame) -> list[Row]:
    """A row for each unfinished block of the grid: how many of its cells are finished, and the seeds that are not."""
    rows = list[Row]()
    for wrong in glue.GRID_WRONG:
        for task in glue.GRID_TASKS:
            about = {"equal": "steps", "rows": glue.GRID_ROWS, "wrong": wrong, "mean": glue.GRID_MEAN, "task": task}
            of = cells[(cells[list(about)] == pd.Series(about)).all(axis=1)]
            failed = {(cell.entry, cell.seed): cell.failed for cell in of.itertuples()}
            left = {
                entry: [f"{s} (failed)" if (entry, s) in failed else str(s) for s in seeds]
                for entry in ORDER
                if (seeds := [s for s in glue.GRID_SEEDS if failed.get((entry, s), True)])
            }
            if not left:
                continue
            total = len(ORDER) * len(glue.GRID_SEEDS)
            seeds_left = "; ".join(f"`{entry}` {', '.join(seeds)}" for entry, seeds in left.items())
            rows.append(
                {
                    "": name_of(pd.DataFrame([about])),
                    "finished": f"{total - sum(map(len, left.values()))} of {total}",
                    "missing seeds": seeds_left if len(of) else "all",
                }
            )
    return rows


# ----------------------------------------------------------------------------------- over tasks


def differing(cells: pd.DataFrame) -> dict[str, Mean]:
    """Each entry beside LoRA on all rows, where seeds have both."""
    differences = {entry: over(cells, entry, LORA).seeds for entry in entries_of(cells)}
    return {entry: difference for entry, difference in differences.items() if difference}


def verdicts(cells: pd.DataFrame) -> str:
    """Which entries differ from LoRA on all rows by more than noise."""
    of = dict[str, list[str]]()
    for entry, difference in differing(cells).items():
        of.setdefault(verdict(difference, f"`{LORA}`"), []).append(f"`{entry}`")
    ordered = sorted(of, key=lambda name: (not name.startswith("better"), not name.startswith("worse")))
    return ". ".join(f"**{name.capitalize()}**: {', '.join(of[name])}" for name in ordered) or "no seed in common"


def over_tasks(cells: pd.DataFrame) -> list[Row]:
    """Differences over tasks from LoRA on all rows and on a random half."""
    rows = list[Row]()
    share = pd.concat([shares(of) for of in groups(cells, BLOCK)])
    for entry in entries_of(cells):
        row: Row = {"": _named(entry, cells)}
        for reference in REFERENCES:
            between = over(cells, entry, reference)
            row[f"minus `{reference}`"] = _difference(between)
            row[f"tasks, `{reference}`"] = _of_tasks(between)
            if reference == LORA:
                row["worst"] = NONE if between.worst is None else f"{between.worst:+.1f}"
        row["loss"] = _percent(over(cells, entry, LORA, "loss_share"))
        rows.append(row | {"trainable": _range(share.loc[share["entry"] == entry, "share"], "{:.2f}")})
    whole = ", ".join(_tasks(cells))
    return _without(rows, {f"tasks, `{reference}`": whole for reference in REFERENCES})


def _without(rows: list[Row], usual: dict[str, str]) -> list[Row]:
    """The rows without the columns in which every value is the usual one, or none."""
    silent = {name for name, value in usual.items() if all(row[name] in (value, NONE) for row in rows)}
    return [{name: value for name, value in row.items() if name not in silent} for row in rows]


def two_precisions(cells: pd.DataFrame) -> str:
    """How many of the pairs that are subtracted are of two precisions; nothing where none is."""
    counts = list[str]()
    for reference in REFERENCES:
        pairs = beside(cells, reference)
        pairs = pairs[pairs["entry"] != reference]
        if mixed := int(pairs["mixed"].sum()):
            counts.append(f"{mixed} of the {len(pairs)} from `{reference}`")
    if not counts:
        return ""
    return f"\nOne side in bfloat16 and the other in float32: {' and '.join(counts)} differences of a task and seed.\n"


def shares(block: pd.DataFrame) -> pd.DataFrame:
    """Trainable parameters as shares of LoRA's on all rows, where that has a cell."""
    worked = block[~block["failed"]]
    theirs = worked.loc[worked["entry"] == LORA, "trainable"]
    return (
        worked.assign(share=worked["trainable"] / theirs.iloc[0]) if len(theirs) else worked.head(0).assign(share=0.0)
    )


# --------------------------------------------------------------------------------- task by task


def table(block: pd.DataFrame) -> list[Row]:
    """One block: the metric, the difference from LoRA on all rows, loss and seconds."""
    rows = list[Row]()
    for entry in entries_of(block):
        cells = block[block["entry"] == entry]
        worked = cells[~cells["failed"]]
        rows.append(
            {
                "": _named(entry, block),
                block["metric"].iloc[0]: _points(interval([*worked["points"]])) if len(worked) else NONE,
                f"minus `{LORA}`": _bold(over(block, entry, LORA).seeds),
                "loss": _mean(worked["loss"], "{:.3f}"),
                "seeds": _seeds(cells),
                "seconds": _mean(worked["seconds"].dropna(), "{:.0f}", of=len(worked)),
            }
        )
    return _without(rows, {"seeds": ", ".join(map(str, glue.GRID_SEEDS)), "seconds": NONE})


def _bold(difference: Mean | None) -> str:
    """The difference, in bold where it is more than noise."""
    text = _points(difference, sign="+")
    return f"**{text}**" if difference and not verdict(difference, LORA).startswith("within") else text


def in_time(block: pd.DataFrame) -> str:
    """Of a block at equal epochs: what share of LoRA's seconds each way to train took."""
    if block["equal"].iloc[0] != "epochs":
        return ""
    pairs = beside(block, LORA).dropna(subset="time_share")
    shares_of_time = list[str]()
    for entry in entries_of(pairs):
        of = interval([*pairs.loc[pairs["entry"] == entry, "time_share"]])
        half = "" if of.half is None else f" ± {of.half:.2f}"
        if entry != LORA:
            shares_of_time.append(f"`{entry}` {of.mean:.2f}{half} ({_seeds_of(of.n)})")
    if not shares_of_time:
        return ""
    return f"\nSeconds, as a share of `{LORA}`'s of the same seed: {'; '.join(shares_of_time)}.\n"


def float32_cells(block: pd.DataFrame) -> str:
    """How many cells are of another precision than the others; nothing where all are of one."""
    if block["bf16"].nunique() < 2:
        return ""
    return f"\n{(~block['bf16'].astype(bool)).sum()} of {len(block)} cells are of float32, the others of bfloat16.\n"


def precisions(cells: pd.DataFrame) -> list[Row]:
    """The cells that were made in float32, too, beside those of their block."""
    return [
        {
            "": ", ".join(name_of(pd.DataFrame([cell])).split(", ")[::2]),
            "seed": str(cell["seed"]),
            "bfloat16": f"{cell['points']:.1f}",
            "float32": f"{cell['points_wide']:.1f}",
            "difference": f"{cell['points_wide'] - cell['points']:+.1f}",
        }
        for cell in cells.dropna(subset="points_wide").to_dict("records")
    ]


def rates(swept: pd.DataFrame, best: Mapping[str, float]) -> list[Row]:
    """The validation metric in points by learning rate, and the rates that were chosen by it."""

    def accuracy(cells: pd.DataFrame) -> str:
        worked, failed = cells.loc[~cells["failed"], "validation"], int(cells["failed"].sum())
        if worked.empty:
            return f"{failed} failed" if failed else NONE
        return f"{worked.mean():.1f} ({len(worked)}{f'; {failed} failed' if failed else ''})"

    tried = sorted(swept["rate"].unique())
    return [
        {"": f"`{entry}`"}
        | {f"{rate:g}": accuracy(swept[(swept["entry"] == entry) & (swept["rate"] == rate)]) for rate in tried}
        | {"chosen": f"{best[entry]:g}" if entry in best else NONE}
        for entry in entries_of(swept)
    ]


# -------------------------------------------------------------------------------------- wording


def _named(entry: str, cells: pd.DataFrame) -> str:
    """The name of a row, with what a reader of its numbers must know."""
    of = cells[cells["entry"] == entry]
    failed, random = of[of["failed"]], of[~of["failed"] & of["random"]]
    notes = [f"{len(failed)} cell{_s(failed)} failed"] if len(failed) else []
    notes += [f"{len(random)} of {len(of) - len(failed)} drew at random"] if len(random) else []
    return ", ".join([f"`{entry}`", *notes])


def _seeds(cells: pd.DataFrame) -> str:
    of = {failed: [str(seed) for seed in cells.loc[cells["failed"] == failed, "seed"]] for failed in (False, True)}
    failed = [f"seed{_s(of[True])} {', '.join(of[True])} failed"] if of[True] else []
    return "; ".join([", ".join(of[False]), *failed] if of[False] else failed)


def _points(value: Mean | None, sign: str = "") -> str:
    if value is None:
        return NONE
    return f"{value.mean:{sign}.1f}" + ("" if value.half is None else f" ± {value.half:.1f}")


def _difference(between: Over) -> str:
    """The difference, with the number of seeds where it is not the grid's."""
    if not between.seeds:
        return NONE
    n = between.seeds.n
    return _points(between.seeds, sign="+") + ("" if n == len(glue.GRID_SEEDS) else f" ({_seeds_of(n)})")


def _of_tasks(between: Over) -> str:
    return ", ".join(TASKS[task] for task in between.tasks) or NONE


def _percent(share: Over) -> str:
    return f"{_points(share.seeds, sign='+')} %" if share.seeds else NONE


def _mean(values: pd.Series, form: str, of: int | None = None) -> str:
    """The mean; where `of` is more than there are values, also how many."""
    if values.empty:
        return NONE
    return form.format(values.mean()) + (f" ({len(values)})" if of is not None and len(values) < of else "")


def _range(values: Iterable[float], form: str) -> str:
    numbers = [*values]
    return " to ".join(dict.fromkeys(form.format(value) for value in (min(numbers), max(numbers)))) if numbers else NONE


def _s(several: Any) -> str:
    return "" if len(several) == 1 else "s"


def _seeds_of(n: int) -> str:
    return f"{n} seed{'' if n == 1 else 's'}"


def main() -> None:
    new = page()
    if "--check" in sys.argv:
        if not PAGE.exists() or PAGE.read_text() != new:
            sys.exit("docs/research/glue.md is not that of bench/results/glue; run make bench-results")
        return
    PAGE.write_text(new)
    plot()


if __name__ == "__main__":
    main()
