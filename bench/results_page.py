"""Writes docs/results.md and its plots from bench/results/glue/*.json: python bench/results_page.py [--check]

`--check` compares the page alone: plots depend on the version of matplotlib, too.
"""

import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import glue
import numpy as np
from results_plots import COSTS, PLOTS, plot
from results_shown import (
    BUSY,
    ORDER,
    TASKS,
    Block,
    Cell,
    Over,
    at_random,
    blocks,
    by_entry,
    chosen,
    commit_of,
    hidden,
    in_float32_too,
    is_bf16,
    kind_of,
    kinds,
    loss_shares,
    measured,
    of_kind,
    over,
    pairs,
    passes,
    quiet,
    rank_of,
    seed_of,
    sweep,
    time_shares,
    trainable,
    worked,
)
from tables import markdown

from tsqlora.compare.cells import Entry
from tsqlora.compare.statistics import Interval, interval, verdict
from tsqlora.compare.table import rows_of

PAGE = PLOTS.parent / "results.md"
REFERENCES = ("lora+all", "lora+random")


def page() -> str:
    """All of docs/results.md."""
    found, swept = blocks(), sweep()
    cells = [cell for block in found for cell in block["cells"].values()]
    verdicts = sum(len(_beside(of_kind(found, kind))) for kind in kinds(found) if kind[0] == "steps")
    parts = [f"# Results\n\n{IN_SHORT.format(verdicts=verdicts)}\n{in_short(found)}"]
    parts.append("## How to read it\n\n" + READ.format(busy=_busy(cells), trainable=_trainable_of(found)))
    parts.append(f"## What is missing\n\n{MISSING}{_left_out()}\n{markdown(missing(found))}")
    parts.append("## Over tasks\n\n" + OVER_TASKS)
    for kind in kinds(found):
        parts.append(f"### {title_of(kind)}\n\n{markdown(over_tasks(found, kind))}{of_two_precisions(found, kind)}")
    parts.append("## Task by task\n\n" + TASK_BY_TASK)
    parts += [f"### {name_of(block)}\n\n{markdown(table(block))}{in_time(block)}{in_float32(block)}" for block in found]
    parts.append(f"## Precision\n\n{PRECISION}\n{markdown(precisions(found))}")
    old = sum(map(glue.stale, swept))
    parts.append(f"## Learning rates\n\n{LEARNING_RATES.format(cells=len(swept), old=old)}\n{markdown(rates(swept))}")
    images = (f"![Points against LoRA on all rows, by {label}](plots/{name}.svg)" for name, (label, _) in COSTS.items())
    parts.append(f"## Plots\n\n{PLOTTED}\n" + "\n\n".join(images) + "\n")
    commits = ", ".join(sorted({commit_of(cell) for cell in (*cells, *swept)}))
    parts.append("## Where it comes from\n\n" + ORIGIN.format(cells=len(cells), swept=len(swept), commits=commits))
    return "\n".join(parts)


IN_SHORT = """\
Is it better than LoRA? Points of the metric over LoRA on all rows at equal optimizer steps and mean rank, in the mean
over the tasks in brackets, with the 95 % interval over seeds; then by how many percent the test loss is higher, which
says what the metric of classes does not: how sure a model is of what it gets wrong. Of {verdicts} such intervals one in
twenty leaves out 0 by chance. What is missing below is not in it.
"""
READ = """\
Every row is a way to train MiniLM (22.7 million parameters, six blocks) by an adapter in all its linear layers, at the
same mean rank and number of optimizer steps: four passes over all rows in batches of 16. `+all` trains on every row,
`+random` and `+quality` on half of the rows, drawn anew each epoch, for twice as many epochs. Where no label seems
wrong `+quality` draws at random, as `+random` does: how many cells did is said beside the name. Such a cell is not
always `lora+random`'s: each way to train has the learning rate that validation chose for it ([below](#learning-rates)),
and `tsqlora` moves ranks as well; which of the two makes a difference these cells do not tell. `tsqlora-quality-only`
has `lora+random`'s learning rate, and where it drew at random it is that control with a pass of scoring.

The seed draws the training rows, which labels are wrong, the head and the batches, so differences are taken seed by
seed. ± is a 95 % t-interval over seeds; where it holds 0 the difference is called noise. Test sets are whole, and
decide nothing.

*Trainable* parameters are those at the end, a range where seeds differ: layers of other shapes cost more a rank, so
where ranks moved they are {trainable} of LoRA's on the same task. Rivals are described in [rivals.md](rivals.md).
Blocks of *equal epochs* give every way as many epochs as half of the rows need for those steps, so that `+all` takes
twice as many. Which rows `tsqlora` left out there was decided before 0243dc9 (see below): that moves their points a
little, and their seconds not. Their seconds are of two cores and nothing beside; those of other blocks are of one core
of a machine on which others worked as well: compare them within a block and with care{busy}.
*Passes* count what must be computed, whatever the machine: rows forward, and twice for rows backward.

MiniLM has seen sentence pairs like those of STS-B and RTE: the numbers compare these methods with each other, and with
no published table.
"""
MISSING = """\
The grid is four tasks, clean and with 20 % wrong labels, eight ways to train, three seeds each. A cell is shown if it
has the learning rate that is chosen now and its code makes today's numbers. Not shown are therefore all cells before
fa65ce3 (batches were padded otherwise, which moved every number a little), those of `+quality` before af1cb08, and
those before 0243dc9 in which rows were left out (other rows were, then); each is replaced when it is run anew. Shown
are `+quality` cells of older code in which no label was evident: today's question was asked of states like theirs,
where it leaves out nothing either, and not of each of them; and cells of c47e939, before the fit's last two changes,
which in states like theirs move at most 7 rows of 2,000 ([log.md](log.md)). A block of the grid is shown once each way
to train has all three seeds: cells of others lie in `bench/results/glue/unfinished`.

Not measured here: CoLA; mean ranks 2 and 8; 500 and 1,000 rows (but to choose learning rates); full fine-tuning,
rsLoRA, DoRA, ElaLoRA as released; the policies `loss`, `el2n`, `gradnorm` and `infobatch`. `tsqlora compare` runs all
of these. [Which rows](quality.md) has rules and rank 8 by another bench, [models that write](generation.md) summaries
of XSum and SciTLDR, on few rows and without a sweep."""
OVER_TASKS = """\
Differences in points of the metric (accuracy; Spearman's correlation for STS-B): of each seed the mean over the *tasks*
that both sides have, and of these the mean over the seeds that have all those tasks (how many, in brackets; "–" where
none has). *Worst* is the lowest of one task and seed among them. Rows of other tasks cannot be
ranked beside each other. *Loss* is by how many percent the test loss is higher, in the mean over tasks: a metric of
classes does not see how sure a model is of what it gets wrong, and the loss does.
"""
TASK_BY_TASK = """\
Points of the metric, and the loss on test rows (cross-entropy; of STS-B the squared error). *Seeds* are those that are
finished, and those that failed; seconds are of those that ran beside nothing else (how many, in brackets, if not all).
"""
LEARNING_RATES = """\
Accuracy on 600 validation rows after training on 1,000 clean rows of SST-2, in the mean over seeds (how many, in
brackets); of the rates that most seeds tried the best one is used everywhere. {cells} trainings, {old} of them by older
code, which made other numbers: those were not run anew.
"""
PRECISION = """\
Cells are of bfloat16 autocast where the machine that made them has it, else of float32: which, is said below each
table. Settings and rows are the same, so both count; where LoRA on all rows was made in both, a cell is compared with
the one of its own precision. Those are:
"""
ORIGIN = """\
Made by `make bench-results` from `bench/results/glue/*.json`: {cells} trainings, and {swept} that chose learning rates,
by the code of {commits}.
"""
PLOTTED = """\
A dot is a way to train in a block at equal steps: its mean over the seeds that it and LoRA on all rows have; by
seconds, over those in which neither ran beside other work. Rows that are trained on are as many for all at equal
steps, but for the last batch of an epoch: how many of them are distinct was not counted.
"""


def _busy(cells: Sequence[Cell]) -> str:
    found = [commit for commit in BUSY if commit in map(commit_of, cells)]
    return f'; "–" stands for those by {", ".join(found)}, which ran beside as many as nine others' if found else ""


def _trainable_of(found: Iterable[Block]) -> str:
    return _range([share for block in found for shares in shares_of(block).values() for share in shares], "{:.2f}")


def _left_out() -> str:
    """How many cells are stored and not shown, and why."""
    cells = [cell for block in measured() for cell in block["cells"].values()]
    why = Counter(hidden(cell, chosen()["rates"]) for cell in cells)
    found = [f"{count} {reason}" for reason, count in sorted(why.items(), key=str) if reason is not None]
    return f" Stored and not shown are {'; '.join(found)}.\n" if found else "\n"


def in_float32(block: Block) -> str:
    """Which of its cells are of another precision than the others; nothing where all are of one."""
    if len({is_bf16(cell) for cell in block["cells"].values()}) < 2:
        return ""
    seeds = {name: [seed_of(c) for c in cells if not is_bf16(c)] for name, cells in by_entry(block).items()}
    named = [f"`{name}` (seed{'s' * (len(of) > 1)} {', '.join(map(str, of))})" for name, of in seeds.items() if of]
    return f"\nIn float32, the others in bfloat16: {'; '.join(named)}.\n"


def in_time(block: Block) -> str:
    """Of a block at equal epochs: what share of the reference's seconds each way to train took."""
    if block["block"]["equal"] != "epochs":
        return ""
    reference = REFERENCES[0]
    shares = {name: [*time_shares(block, name, reference).values()] for name in by_entry(block) if name != reference}
    told = [f"`{name}` {_times(interval(of))} ({_seeds_of(len(of))})" for name, of in shares.items() if of]
    return f"\nSeconds, as a share of `{reference}`'s of the same seed: {'; '.join(told)}.\n" if told else ""


def precisions(found: Sequence[Block]) -> list[list[str]]:
    """The cells that were made in float32, too, beside those of their block."""
    rows = [["", "seed", "bfloat16", "float32", "difference"]]
    for block in found:
        for (name, seed), cell in sorted(in_float32_too(block).items()):
            before = next(c for c in by_entry(block)[name] if seed_of(c) == seed)
            both = [100 * c["metrics"]["test"][block["block"]["metric"]] for c in (before, cell)]
            rows.append([name_of(block), str(seed), *(f"{p:.1f}" for p in both), f"{both[1] - both[0]:+.1f}"])
    return rows


def missing(found: Sequence[Block]) -> list[list[str]]:
    """A row a block of the grid: how many of its cells are finished, and the seeds that are not."""
    rows = [["", "finished", "missing seeds"]]
    for wrong in glue.GRID_WRONG:
        for task in glue.GRID_TASKS:
            block = {"block": asdict(glue.Block(task, glue.GRID_ROWS, wrong, glue.GRID_MEAN))}
            of = by_entry(of_kind(found, kind_of(block)).get(task, {"cells": {}}))
            left = {name: _not_finished(of.get(name, ())) for name in ORDER}
            total = len(ORDER) * len(glue.GRID_SEEDS)
            done = total - sum(map(len, left.values()))
            told = "; ".join(f"`{name}` {', '.join(seeds)}" for name, seeds in left.items() if seeds)
            rows.append([name_of(block), f"{done} of {total}", (told or "–") if of else "all"])
    return rows


def _not_finished(cells: Iterable[Cell]) -> list[str]:
    seeds = {seed_of(cell): "failed" in cell for cell in cells}
    return [f"{s} (failed)" if s in seeds else str(s) for s in glue.GRID_SEEDS if seeds.get(s, True)]


def title_of(kind: tuple[Any, ...]) -> str:
    equal, rows, wrong, mean = kind
    labels = f"{wrong:.0%} wrong labels" if wrong else "clean labels"
    return f"{rows:,} rows, {labels}, mean rank {mean}" + ("" if equal == "steps" else f", equal {equal}")


def name_of(block: Block) -> str:
    return f"{TASKS[block['block']['task']]}, {title_of(kind_of(block))}"


# ------------------------------------------------------------------------------- task by task


def table(block: Block) -> list[list[str]]:
    """One block: the metric, the difference from LoRA on all rows, in words, and the cost."""
    metric, of = block["block"]["metric"], by_entry(block)
    # The first is what others are compared with, also where it has no cell.
    compared = [Entry(*name.split("+")) for name in dict.fromkeys((REFERENCES[0], *of))]
    head = ["", metric, "minus `lora+all`", "", "loss", "over `lora+all`'s", "seeds", "trainable", "passes", "seconds"]
    shown = [head]
    for row in rows_of(compared, list(block["cells"].values()), metric=metric):
        name, cells = row["name"], worked(of.get(row["name"], ()))
        beside = over({"": block}, name, REFERENCES[0]).seeds
        if name in of:
            told = verdict(beside, REFERENCES[0]) if "difference" in row else row["verdict"]
            shown.append(
                [
                    _named(name, [block]),
                    _points(row["metrics"][metric], scale=100) if cells else "–",
                    _points(asdict(beside), sign="+") if beside else "–",
                    told.replace("lora+all", "`lora+all`"),
                    f"{row['metrics']['loss']['mean']:.3f}" if cells else "–",
                    _percent(over({"": block}, name, REFERENCES[0], loss_shares)),
                    _seeds(row),
                    _range([trainable(cell) for cell in cells], "{:,}"),
                    f"{np.mean([passes(cell) for cell in cells]):,.0f}" if cells else "–",
                    _seconds(cells),
                ]
            )
    return shown


def _seeds(row: Mapping[str, Any]) -> str:
    told = [", ".join(map(str, sorted(row["seeds"])))] if row["seeds"] else []
    if row["failed"]:
        told.append(f"seed{_s(row['failed'])} {', '.join(map(str, sorted(row['failed'])))} failed")
    return "; ".join(told)


def _seconds(cells: Sequence[Cell]) -> str:
    """Their mean over those that ran beside nothing else; how many, where that is not all."""
    alone = [cell["seconds"] for cell in quiet(cells)]
    return (f"{np.mean(alone):.0f}" + (f" ({len(alone)})" if len(alone) < len(cells) else "")) if alone else "–"


def _range(values: Sequence[float], form: str) -> str:
    ends = list(dict.fromkeys(form.format(value) for value in (min(values), max(values)))) if values else []
    return " to ".join(ends) or "–"


def _points(value: Mapping[str, Any], *, scale: float = 1.0, sign: str = "") -> str:
    shown = f"{scale * value['mean']:{sign}.1f}"
    return shown if value["half"] is None else f"{shown} ± {scale * value['half']:.1f}"


def _percent(share: Over) -> str:
    return f"{_points(asdict(share.seeds), sign='+')} %" if share.seeds else "–"


def _times(share: Interval) -> str:
    return f"{share.mean:.2f}" + ("" if share.half is None else f" ± {share.half:.2f}")


def _s(several: Sequence[Any]) -> str:
    return "" if len(several) == 1 else "s"


# --------------------------------------------------------------------------------- over tasks


def over_tasks(found: Sequence[Block], kind: tuple[Any, ...]) -> list[list[str]]:
    """Differences over tasks from LoRA on all rows and on a random half."""
    of = of_kind(found, kind)
    columns = (column for other in REFERENCES for column in (f"minus `{other}`", "tasks", "worst"))
    rows = [["", *columns, "loss, over `lora+all`'s"]]
    for name in _names(of.values()):
        row = [_named(name, of.values())]
        for other in REFERENCES:
            difference = over(of, name, other)
            row += [*_told(difference), "–" if difference.worst is None else f"{difference.worst:+.1f}"]
        rows.append([*row, _percent(over(of, name, REFERENCES[0], loss_shares))])
    return rows


def of_two_precisions(found: Sequence[Block], kind: tuple[Any, ...]) -> str:
    """How many of the pairs that are subtracted are of two precisions; nothing where none is."""
    said = []
    for other in REFERENCES:
        of = [(b, name) for b in of_kind(found, kind).values() for name in by_entry(b) if name != other]
        beside = [pair for block, name in of for pair in pairs(block, name, other).values()]
        if mixed := sum(is_bf16(ours) != is_bf16(theirs) for ours, theirs in beside):
            said.append(f"{mixed} of the {len(beside)} from `{other}`")
    if not said:
        return ""
    return f"\nOne side in bfloat16 and the other in float32: {' and '.join(said)} differences of a task and seed.\n"


def in_short(found: Sequence[Block]) -> str:
    """At equal steps, a line a kind: which ways to train differ from LoRA on all rows by more than noise."""
    told = ((kind, of_kind(found, kind)) for kind in kinds(found) if kind[0] == "steps")
    return "".join(f"- *{title_of(kind)}* ({', '.join(TASKS[t] for t in of)}): {_verdicts(of)}.\n" for kind, of in told)


def _beside(of: Mapping[str, Block]) -> dict[str, Interval]:
    """Each way to train beside LoRA on all rows, where seeds have both."""
    found = {name: over(of, name, REFERENCES[0]).seeds for name in _names(of.values())}
    return {name: difference for name, difference in found.items() if difference}


def _verdicts(of: Mapping[str, Block]) -> str:
    groups = dict[str, list[str]]()
    for name, difference in _beside(of).items():
        told = f"`{name}` {_bounds(difference)}, loss {_percent(over(of, name, REFERENCES[0], loss_shares))}"
        groups.setdefault(verdict(difference, "`lora+all`"), []).append(told)
    first = ("better", "worse")  # what is noise comes last
    ordered = sorted(groups, key=lambda told: [not told.startswith(word) for word in first])
    return ". ".join(f"**{told.capitalize()}**: {'; '.join(groups[told])}" for told in ordered) or "no seed in common"


def _bounds(of: Interval) -> str:
    """Two decimals, so that a bound near 0 has its sign."""
    return f"{of.mean:+.2f}" + ("" if of.half is None else f" ({of.low:+.2f} to {of.high:+.2f})")


def summary(*, rows: int, mean: int) -> list[list[str]]:
    """Differences from LoRA on all rows over tasks, with wrong labels and clean; parameters as a share of LoRA's."""
    found = blocks()
    of = {wrong: of_kind(found, ("steps", rows, wrong, mean)) for wrong in (0.2, 0.0)}
    all_blocks = [block for by_task in of.values() for block in by_task.values()]
    names = [name for name in _names(all_blocks) if name != REFERENCES[0]]
    shares = [[share for block in all_blocks for share in shares_of(block).get(name, ())] for name in names]
    columns = [
        ["", *(_named(name, all_blocks) for name in names)],
        ["trainable, of LoRA's", *(_range(of_name, "{:.2f}") for of_name in shares)],
    ]
    for label, by_task in zip(("20 % wrong labels", "clean"), of.values(), strict=True):
        columns += _columns(f"{label}, points minus LoRA's", [over(by_task, name, REFERENCES[0]) for name in names])
    return [list(row) for row in zip(*columns, strict=True)]


def _columns(head: str, found: Sequence[Over]) -> list[list[str]]:
    """The differences and their tasks; tasks and seeds that all have in common stand in the head."""
    told = [_told(difference) for difference in found]
    known = [difference.seeds for difference in found if difference.seeds]
    if len(known) == len(found) and len({(of, seeds.n) for (_, of), seeds in zip(told, known, strict=True)}) == 1:
        head = f"{head} ({told[0][1]}; {_seeds_of(known[0].n)})"
        return [[head, *(_points(asdict(seeds), sign="+") for seeds in known)]]
    return [[head, *(points for points, _ in told)], ["tasks", *(of for _, of in told)]]


def shares_of(block: Block) -> dict[str, list[float]]:
    """Trainable parameters by entry, as shares of LoRA's on all rows; of nothing where that has no cell."""
    of = by_entry(block)
    theirs = [trainable(cell) for cell in worked(of.get(REFERENCES[0], ()))]
    return {name: [trainable(cell) / theirs[0] for cell in worked(cells)] for name, cells in of.items() if theirs}


def _names(found: Iterable[Block]) -> list[str]:
    return sorted({name for block in found for name in by_entry(block)}, key=rank_of)


def _named(name: str, found: Iterable[Block]) -> str:
    """The name of a row, with what a reader of its numbers must know."""
    cells = [cell for block in found for cell in by_entry(block).get(name, ())]
    failed, random = [cell for cell in cells if "failed" in cell], [cell for cell in worked(cells) if at_random(cell)]
    said = [f"{len(failed)} cell{_s(failed)} failed"] if failed else []
    said += [f"{len(random)} of {len(worked(cells))} drew at random"] if random else []
    return "".join([f"`{name}`", *(f", {what}" for what in said)])


def _told(difference: Over) -> tuple[str, str]:
    seeds, tasks = difference.seeds, ", ".join(TASKS[task] for task in difference.tasks) or "–"
    if seeds is None:
        return "–", tasks
    return f"{_points(asdict(seeds), sign='+')} ({_seeds_of(seeds.n)})", tasks


def _seeds_of(n: int) -> str:
    return f"{n} seed{'' if n == 1 else 's'}"


# ----------------------------------------------------------------------------- learning rates


def rates(swept: Sequence[Cell]) -> list[list[str]]:
    """Validation accuracy by learning rate, where they were chosen."""
    tried = sorted({cell["cell"]["learning_rate"] for cell in swept})
    rows = [["", *(f"{rate:g}" for rate in tried), "chosen"]]
    for name in sorted(set(map(glue.entry_of, swept)), key=rank_of):
        of = [cell for cell in swept if glue.entry_of(cell) == name]
        shown = [_accuracy([cell for cell in of if cell["cell"]["learning_rate"] == rate]) for rate in tried]
        rate = chosen()["rates"].get(name)
        rows.append([f"`{name}`", *shown, "–" if rate is None else f"{rate:g}"])
    return rows


def _accuracy(cells: Sequence[Cell]) -> str:
    found = [100 * cell["metrics"]["validation"]["accuracy"] for cell in worked(cells)]
    failed = len(cells) - len(found)
    if not found:
        return f"{failed} failed" if failed else "–"
    return f"{np.mean(found):.1f} ({len(found)}{f'; {failed} failed' if failed else ''})"


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
