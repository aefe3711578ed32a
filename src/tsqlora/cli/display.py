"""What a run looks like in a terminal: plans and tables."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from tsqlora.ranks.places import layer_places

_BLOCKS_ABREAST = 12
_STACKED_BELOW = 70
_CLASSES = 20
_TEXT = 240
"""Characters of a sample that are shown."""


def show_plan(console: Console, plan: Mapping[str, Any]) -> None:
    """The plan of a dry run."""
    rows = ", ".join(f"{count:,} {name}" for name, count in plan["rows"].items())
    ranks = sorted(set(plan["ranks"].values()))
    console.print(f"rows        {rows}")
    columns = ", ".join(str(name) for name in plan["columns"].values() if name is not None)
    console.print(f"columns     {columns}; at most {plan['max_length']:,} tokens", markup=False, highlight=False)
    _show_files(console, plan["files"])
    if plan["classes"]:
        # Names are anybody's: they may hold square brackets.
        console.print(f"classes     {_class_counts(plan['classes'])}", markup=False, highlight=False)
    console.print(f"an epoch    {plan['rows_an_epoch']:,} rows; {plan['epochs']} epochs, {plan['steps']:,} steps")
    console.print(f"parameters  {plan['trainable']:,} trainable, of which {plan['budget']:,} are the ranks' budget")
    console.print(f"ranks       {len(plan['ranks'])} layers at {' and '.join(map(str, ranks))}")
    console.print(f"precision   {'bfloat16 autocast' if plan['bf16'] else 'float32'}")
    console.print(f"memory      about {plan['memory_bytes'] / 2**20:,.0f} MiB (a rough estimate)")
    for told in plan["without_effect"]:
        console.print(f"settings    {told}", highlight=False)
    for note in plan["notes"]:
        console.print(f"note        {note}", markup=False, highlight=False)
    console.print(_passes_table(plan["passes"]))
    if "samples" in plan:
        told = f"row format  {plan['format']}; what is trained on is green, between ⟦ and ⟧:\n"
        console.print(told, markup=False)
        samples = Text(plan["samples"])
        samples.highlight_regex(r"(?s)⟦.*?⟧", "green")
        console.print(samples)


def _show_files(console: Console, files: Mapping[str, str]) -> None:
    for name, dialect in files.items():
        console.print(f"file        {name}: {dialect}", soft_wrap=True, markup=False, highlight=False)


def _class_counts(classes: Mapping[str, int]) -> str:
    """How many there are, and the rows of the first."""
    shown = ", ".join(f"{_shortened(name)} ({count:,})" for name, count in list(classes.items())[:_CLASSES])
    return f"{len(classes)}: {shown}{' …' if len(classes) > _CLASSES else ''}"


def show_scoring_plan(console: Console, plan: Mapping[str, Any]) -> None:
    """The plan of a scoring's dry run."""
    console.print(f"rows        {plan['rows']:,} in {plan['batches']:,} batches")
    _show_files(console, plan["files"])
    if plan["held_out"]:
        console.print(f"held out    {plan['held_out']:,} rows for validation, which are not scored")
    console.print(f"memory      about {plan['memory_bytes'] / 2**20:,.0f} MiB (a rough estimate)")
    console.print(f"disk        at most {plan['disk_bytes'] / 2**20:,.0f} MiB of samples while it runs")
    console.print(_passes_table(plan["passes"]))


def _passes_table(phases: Mapping[str, Mapping[str, int]]) -> Table:
    table = Table("phase", "rows forward", "rows backward", title="passes", title_justify="left")
    for phase, passes in phases.items():
        table.add_row(phase, f"{passes['forward']:,}", f"{passes['backward']:,}")
    return table


def show_record(console: Console, record: Mapping[str, Any]) -> None:
    """What a finished run did."""
    table = Table("phase", "seconds", "rows forward", "rows backward", title="cost", title_justify="left")
    for phase, cost in record["cost"].items():
        table.add_row(phase, f"{cost['seconds']:.1f}", f"{cost['forward']:,}", f"{cost['backward']:,}")
    console.print(table)
    console.print(ranks_table(record["ranks"]))
    for split, metrics in record["metrics"].items():
        console.print(f"{split:<11} " + "  ".join(f"{name} {value:.4f}" for name, value in metrics.items()))
    for note in record["notes"]:
        console.print(f"note: {note}", markup=False)
    console.print(f"adapter     {record['run']}/adapter", soft_wrap=True, markup=False)
    console.print(f"report      tsqlora report {record['run']}", soft_wrap=True, markup=False, highlight=False)


def show_allocation(console: Console, arguments: Mapping[str, Any]) -> None:
    """LoraConfig's arguments, as ranks."""
    show_numbers(console, {name: arguments[name] for name in ("out", "r", "lora_alpha")})
    ranks = {name: arguments["rank_pattern"].get(name, arguments["r"]) for name in arguments["target_modules"]}
    console.print(ranks_table(ranks))


def ranks_table(ranks: Mapping[str, int]) -> Group:
    """Ranks as kinds of module × blocks; blocks for which 80 columns have no room follow below."""
    cells = {place: ranks[name] for name, place in layer_places(ranks).items()}
    blocks = list(dict.fromkeys(block for block, _ in cells if block))
    starts = range(0, len(blocks), _BLOCKS_ABREAST)
    tables = [_some_ranks(cells, blocks[start : start + _BLOCKS_ABREAST]) for start in starts]
    if alone := {kind: rank for (block, kind), rank in cells.items() if not block}:
        table = Table("rank", "", box=None, padding=(0, 1, 0, 0))
        for kind, rank in alone.items():
            table.add_row(kind, str(rank))
        tables.append(table)
    return Group(*tables)


def _some_ranks(cells: Mapping[tuple[str, str], int], blocks: Sequence[str]) -> Table:
    table = Table("rank in block", box=None, padding=(0, 1, 0, 0))
    for block in blocks:
        table.add_column(block, justify="right")
    for kind in dict.fromkeys(kind for block, kind in cells if block in blocks):
        table.add_row(kind, *(str(cells.get((block, kind), "")) for block in blocks))
    return table


def show_numbers(console: Console, numbers: Mapping[str, Any]) -> None:
    """Names and values, a line each."""
    for name, value in numbers.items():
        shown = f"{value:.4f}" if isinstance(value, float) else str(value)
        console.print(f"{name:<22} {shown}", soft_wrap=True, highlight=False, markup=False)


def show_explained(console: Console, explained: Mapping[str, Any]) -> None:
    """Samples to look at, list by list."""
    wrong = explained["likely_wrong_rows"]
    titles = {
        "highest": "highest quality",
        "lowest": "lowest quality",
        "suspicious": "most suspicious: highest loss within the class",
        "likely_wrong": f"likely wrong labels: {wrong:,} in all",
    }
    for name, title in titles.items():
        if explained[name]:
            console.print(_samples_table(title, explained[name], console.width))
        else:
            console.print(title, markup=False)
        console.print()


def _samples_table(title: str, samples: Sequence[Mapping[str, Any]], width: int) -> Table:
    """A row a sample; where there is no room for columns, its cells stand below each other."""
    # Texts are anybody's: as Text they hold no markup.
    table = Table(title=Text(title), title_justify="left", box=None, padding=(0, 1, 0, 0))
    if width < _STACKED_BELOW:
        table.show_header = False
        table.add_column(overflow="fold")
        for sample in samples:
            place, q, label, model, text = _sample_cells(sample)
            table.add_row(Text.assemble(place, "  Q ", q, "  label ", label, "  model ", model, "\n", text))
        return table
    table.add_column("id", justify="right")
    table.add_column("Q", justify="right")
    table.add_column("label", overflow="fold", max_width=20)
    table.add_column("model", overflow="fold", max_width=20)
    table.add_column("text, terms", ratio=1, overflow="fold")
    for sample in samples:
        table.add_row(*_sample_cells(sample))
    return table


def _sample_cells(sample: Mapping[str, Any]) -> tuple[Text, ...]:
    said = _label(sample["predicted"]) if "predicted" in sample else "–"
    if "predicted_probability" in sample:
        said += f" {sample['predicted_probability']:.0%}"
    terms = "  ".join(f"{name} {value:.3g}" for name, value in sample["terms"].items())
    dropped = "" if sample["reason"] == "kept" else f"dropped: {sample['reason']}  "
    return (
        Text(str(sample["id"])),
        Text(f"{sample['quality']:.2f}"),
        Text(_label(sample["label"])),
        Text(said),
        Text.assemble(_shortened(sample["text"]), "\n", (dropped + terms, "dim")),
    )


def show_row(console: Console, row: Mapping[str, Any]) -> None:
    """One row: its text, what is predicted for it, and why it is drawn from or left out."""
    unseen = ", by a fit that has not seen the row" if row["out_of_sample"] else ""
    lines = {f"row {row['id']}": "(text not found)" if row["text"] is None else _shortened(row["text"])}
    lines["label"] = _label(row["label"])
    if "predicted" in row:
        sure = f" {row['predicted_probability']:.0%}" if "predicted_probability" in row else ""
        of_label = f"; the label {row['label_probability']:.0%}" if "label_probability" in row else ""
        lines["prediction"] = f"{_label(row['predicted'])}{sure}{of_label}{unseen}"
    if row["wrong_probability"] is not None:
        lines["wrong label"] = f"with a chance of {row['wrong_probability']:.0%}"
    lines["terms"] = "  ".join(f"{name} {value:.3g}" for name, value in row["terms"].items())
    lines["reason"] = row["why"] if row["reason"] == "kept" else f"left out: {row['why']}"
    if "drawn" in row:
        lines["drawn"] = f"in {row['drawn']} of {row['epochs']} epochs"
    for name, value in lines.items():
        console.print(Text.assemble((f"{name:<12}", "bold"), value), soft_wrap=True)


def _label(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else _shortened(str(value))


def _shortened(text: str) -> str:
    """One line of what can be printed, the middle left out where it is long."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return line if len(line) <= _TEXT else f"{line[: _TEXT - 40]} … {line[-37:]}"


def show_suspects(console: Console, looked: Mapping[str, Any]) -> None:
    """The labels that a look doubts most, with the truth."""
    noise, rows = looked["noise"], looked["suspects"]
    evidence = f"{noise['rate']:.0%} ({noise['low']:.0%} to {noise['high']:.0%})" if noise["evident"] else "none"
    table = Table(title="likely wrong labels, before any training", title_justify="left")
    for name in ("label given", "predicted", "truth"):
        table.add_column(name, min_width=13, no_wrap=True)
    table.add_column("text", no_wrap=True, overflow="ellipsis", max_width=28)
    for row in rows:
        table.add_row(row["label"], row["predicted"], row["true"], row["text"], style="red" if row["wrong"] else "")
    console.print(table)
    console.print(
        f"{sum(row['wrong'] for row in rows)} of these {len(rows)} labels are wrong in truth. Estimated share of wrong "
        f"labels: {evidence}. Of the {looked['left_out']} rows left out {looked['left_out_wrong']} are wrong in truth; "
        f"{looked['wrong']} wrong labels were planted.\n",
        highlight=False,
    )


def show_demo(console: Console, result: Mapping[str, Any]) -> None:
    """The demo's comparison, side by side."""
    runs: list[Mapping[str, Any]] = result["runs"]
    table = Table("", *(run["name"] for run in runs), title="measured in this run", title_justify="left")
    table.add_row("test accuracy", *(f"{run['test']['accuracy']:.1%}" for run in runs))
    table.add_row("seconds, look and ranks included", *(f"{run['total_seconds']:.1f}" for run in runs))
    table.add_row("training steps", *(f"{run['steps']:,}" for run in runs))
    table.add_row("trainable parameters", *(f"{run['trainable']:,}" for run in runs))
    table.add_row("ranks moved", *(f"{run['moved']:,}" for run in runs))
    console.print(table)
    console.print(ranks_table(runs[-1]["ranks"]))
    console.print(f"\n{result['verdict']}", highlight=False)
    if result["out"]:
        console.print(f"report: {result['report']}", soft_wrap=True, markup=False, highlight=False)


def show_audit(console: Console, found: Mapping[str, Any]) -> None:
    """What an audit says of the labels, its first suspects, and what to do next."""
    plain: dict[str, Any] = {"highlight": False, "markup": False, "soft_wrap": True}
    console.print(f"{found['rows']:,} rows, {len(found['classes'])} classes, read by {found['model_name']}", **plain)
    console.print(found["summary"], **plain)
    table = Table(title="first suspects", title_justify="left")
    for name, least in (("row", 5), ("label", 14), ("suggested", 14), ("wrong", 5), ("text", 12)):
        table.add_column(name, no_wrap=True, min_width=least, max_width=None if name == "text" else 22)
    for row in found["first"]:
        table.add_row(
            str(row["row"]),
            *(Text(_shortened(str(row[name]))) for name in ("label", "suggested_label")),
            f"{row['wrong_probability']:.0%}",
            Text(_shortened(row["text"])),
        )
    console.print(table)
    if found["duplicates"]:
        console.print(f"{found['duplicates']:,} pairs of near-duplicates have different labels; the page shows them")
    for note in found["notes"]:
        console.print(f"note: {note}", **plain)
    console.print(
        f"{found['listed']:,} rows are listed ({found['checks']:,} of them to check) in {found['suspects']}\n"
        f"review them in {found['page']}, export, then: tsqlora audit --apply reviewed.csv --out {found['out']}",
        **plain,
    )
