"""Plans, results and tables in a terminal."""

from collections.abc import Iterable, Mapping, Sequence
from shlex import quote
from typing import Any

from rich.console import Console, Group
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

_BLOCKS_ABREAST = 12
_CLASSES = 20
_CHARACTERS = 240
"""Most characters of a sample."""
_LABEL = {"text": "target tokens", "pair": "target tokens"}
"""What a label is, by the kind of rows, where it is none."""


def say(console: Console, lines: Iterable[str]) -> None:
    """Print lines as they are: names and texts may hold square brackets."""
    for line in lines:
        console.print(line, soft_wrap=True, highlight=False, markup=False)


def show_plan(console: Console, plan: Mapping[str, Any]) -> None:
    """The plan of a dry run."""
    ranks = sorted(set(plan["ranks"].values()))
    columns = ", ".join(str(name) for key, name in plan["columns"].items() if name and key not in ("media", "one_hot"))
    limit = f"; at most {plan['max_length']:,} tokens" if plan["max_length"] else ""
    lines = [
        f"rows        {', '.join(f'{count:,} {name}' for name, count in plan['rows'].items())}",
        f"columns     {columns}{limit}",
        *(f"file        {name}: {dialect}" for name, dialect in plan["files"].items()),
        *([f"classes     {_class_counts(plan['classes'])}"] if plan["classes"] else []),
        f"an epoch    {plan['rows_an_epoch']:,} rows; {plan['epochs']} epochs, {plan['steps']:,} steps",
        f"parameters  {plan['trainable']:,} trainable, of which {plan['budget']:,} are the ranks' budget",
        f"ranks       {len(plan['ranks'])} layers at {' and '.join(map(str, ranks))}",
        f"precision   {'bfloat16 autocast' if plan['bf16'] else 'float32'}",
        *(f"settings    {note}" for note in plan["without_effect"]),
        *(f"note        {note}" for note in plan["notes"]),
    ]
    say(console, lines)
    console.print(_passes_table(plan["passes"]))
    if "samples" in plan:
        say(console, [f"row format  {plan['format']}\n", plan["samples"]])


def _class_counts(classes: Mapping[str, int]) -> str:
    """The number of classes, and the rows of the first ones."""
    shown = ", ".join(f"{_shortened(name)} ({count:,})" for name, count in list(classes.items())[:_CLASSES])
    return f"{len(classes)}: {shown}{' …' if len(classes) > _CLASSES else ''}"


def _passes_table(phases: Mapping[str, Mapping[str, int]]) -> Table:
    table = Table("phase", "rows forward", "rows backward", title="passes", title_justify="left")
    for phase, passes in phases.items():
        table.add_row(phase, f"{passes['forward']:,}", f"{passes['backward']:,}")
    return table


def show_record(console: Console, record: Mapping[str, Any]) -> None:
    """The results of a finished run."""
    table = Table("phase", "seconds", "rows forward", "rows backward", title="cost", title_justify="left")
    for phase, cost in record["cost"].items():
        table.add_row(phase, f"{cost['seconds']:.1f}", f"{cost['forward']:,}", f"{cost['backward']:,}")
    console.print(table)
    show_ranks(console, record["ranks"])
    for split, metrics in record["metrics"].items():
        console.print(f"{split:<11} " + "  ".join(f"{name} {value:.4f}" for name, value in metrics.items()))
    say(console, [f"note: {note}" for note in record["notes"]])
    say(console, [f"adapter     {record['run']}/adapter", f"report      tsqlora report {quote(record['run'])}"])


def show_ranks(console: Console, ranks: Mapping[str, int]) -> None:
    """Ranks that differ as tables; one line otherwise."""
    if len(set(ranks.values())) > 1:
        console.print(ranks_table(ranks))
    elif ranks:
        say(console, [f"ranks       {next(iter(ranks.values()))} in each of {len(ranks)} layers"])


def ranks_table(ranks: Mapping[str, int]) -> Group:
    """Ranks by kind of module and block, a table for every 12 blocks."""
    from tsqlora.reports.page import layer_places  # imports jinja2, which --help does without

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
    shown = {name: f"{value:.4f}" if isinstance(value, float) else value for name, value in numbers.items()}
    say(console, [f"{name:<22} {value}" for name, value in shown.items()])


def show_review(console: Console, result: Mapping[str, Any]) -> None:
    """What a review changed, and how to train on it."""
    show_numbers(console, {name: value for name, value in result.items() if name not in ("notes", "next")})
    say(console, [*(f"note: {note}" for note in result["notes"]), f"next: {result['next']}"])


def show_scores(console: Console, result: Mapping[str, Any]) -> None:
    """The result of `score`: what is in the file, and what to do with it."""
    from tsqlora.quality.reasons import WHY

    file, noise, dropped = result["scores"], result["noise"], result["dropped"]
    draw = "evenly"
    if result["draw"] != "even":
        size = f"{result['effective_sample_size']:,.0f}"
        draw = f"by quality at temperature {result['temperature']:g} (effective sample size {size})"
    lines = [
        f"scores   {file}: {result['rows']:,} rows; {result['held_out']:,} more are held out for validation",
        f"draw     {draw}",
        f"left out {', '.join(f'{count:,} ({WHY[reason]})' for reason, count in dropped.items()) or 'none'}",
        *([f"labels   {_noise_line(noise)}"] if noise else []),
        f"next     tsqlora explain {quote(file)}, or tsqlora select {quote(file)} --fraction 0.5 --out subset.jsonl",
    ]
    say(console, lines)


def _noise_line(noise: Mapping[str, Any]) -> str:
    if noise["evident"]:
        bounds = f" ({noise['low']:.1%} to {noise['high']:.1%})" if noise["high"] < 1 else ""
        return f"about {noise['rate']:.1%} are wrong{bounds}"
    return "no evidence of wrong ones"


def show_explained(console: Console, explained: Mapping[str, Any]) -> None:
    """Rows to look at, list by list, the most urgent first; a row of several lists is shown once."""
    kind, wrong, left_out = (explained[name] for name in ("kind", "likely_wrong_rows", "likely_wrong_left_out"))
    titles, shown = dict[str, str](), set[int]()
    if kind == "class":
        what = "likely wrong labels, which" if explained["evident"] else "no evidence of wrong labels; those that"
        titles["likely_wrong"] = (
            f"{what} the model contradicts with confidence: {wrong:,} in all, {left_out:,} left out"
        )
    elif kind == "pair":
        titles["likely_wrong"] = f"swapped pairs: {wrong:,} in all, {left_out:,} left out"
    titles["suspicious"] = f"most suspicious: highest loss{' within the class' if kind == 'class' else ''}"
    titles |= {"lowest": "lowest quality", "highest": "highest quality"}
    if explained["even"]:
        titles |= {"lowest": "lowest Q (not used: rows were drawn evenly)", "highest": "highest Q"}
    for name, title in titles.items():
        console.print(Text(title, "bold"))
        rows = {sample["id"]: sample for sample in explained[name]}
        if before := [str(row) for row in rows if row in shown]:
            say(console, [f"see above: {', '.join(before)}"])
        for sample in (sample for row, sample in rows.items() if row not in shown):
            head = f"{sample['id']}  Q {sample['quality']:.2f}  {_LABEL.get(kind, 'label')} {_label(sample['label'])}"
            if "predicted" in sample:
                head += f"  model {_label(sample['predicted'])}"
            if "predicted_probability" in sample:
                head += f" {sample['predicted_probability']:.0%}"
            dropped = "" if sample["reason"] == "kept" else f"left out: {sample['why']}  "
            console.print(Text(head))
            body = Text.assemble(_shortened(sample["text"]), "\n", (dropped + _terms(sample["terms"]), "dim"))
            body.overflow = "fold"
            console.print(Padding(body, (0, 0, 0, 2)))
        shown |= rows.keys()
        console.print()


def show_row(console: Console, row: Mapping[str, Any]) -> None:
    """One row: its text, its prediction, and why it is drawn from or left out."""
    unseen = ", by a fit without this row" if row["out_of_sample"] else ""
    lines = {f"row {row['id']}": f"(no text: {row['no_text']})" if row["text"] is None else _shortened(row["text"])}
    lines[_LABEL.get(row["kind"], "label")] = _label(row["label"])
    if "predicted" in row:
        sure = f" {row['predicted_probability']:.0%}" if "predicted_probability" in row else ""
        of_label = f"; the label {row['label_probability']:.0%}" if "label_probability" in row else ""
        lines["prediction"] = f"{_label(row['predicted'])}{sure}{of_label}{unseen}"
    if row["wrong_probability"] is not None:
        lines["wrong label"] = f"with probability {row['wrong_probability']:.0%}"
    elif row["judged"]:
        lines["wrong label"] = "no evidence of wrong labels among these rows, so no probability"
    lines["terms"] = _terms(row["terms"])
    lines["reason"] = row["why"] if row["reason"] in ("kept", "held out") else f"left out: {row['why']}"
    if "question" in row:
        lines["trusted rows"] = row["question"]
    if "drawn" in row:
        lines["drawn"] = f"in {row['drawn']} of {row['epochs']} epochs"
    for name, value in lines.items():
        console.print(Text.assemble((f"{name:<14}", "bold"), value), soft_wrap=True)


def _terms(terms: Mapping[str, float]) -> str:
    return "  ".join(f"{name} {value:.3g}" for name, value in terms.items())


def _label(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else _shortened(str(value))


def _shortened(text: str) -> str:
    """Printable text on one line, without its middle if it is long."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return line if len(line) <= _CHARACTERS else f"{line[: _CHARACTERS - 40]} … {line[-37:]}"


def show_suspects(console: Console, look: Mapping[str, Any]) -> None:
    """The labels that a look doubts most, beside the truth."""
    noise, rows = look["noise"], look["suspects"]
    bounds = f" ({noise['low']:.0%} to {noise['high']:.0%})" if noise["evident"] and noise["high"] < 1 else ""
    evidence = f"{noise['rate']:.0%}{bounds}" if noise["evident"] else "none"
    table = Table(title="likely wrong labels, before any training", title_justify="left")
    for name in ("label", "predicted", "truth"):
        table.add_column(name, min_width=13, no_wrap=True)
    table.add_column("text", no_wrap=True, overflow="ellipsis", max_width=28)
    for row in rows:
        table.add_row(row["label"], row["predicted"], row["true"], row["text"], style="red" if row["wrong"] else "")
    console.print(table)
    wrong = sum(row["wrong"] for row in rows)
    console.print(
        f"{wrong} of these {len(rows)} labels are really wrong. Estimated share of wrong labels: {evidence}. "
        f"{look['left_out_wrong']} of the {look['left_out']} rows left out are really wrong; {look['wrong']} labels "
        "were corrupted.\n",
        highlight=False,
    )


def show_demo(console: Console, result: Mapping[str, Any]) -> None:
    """The demo's two runs side by side."""
    runs: list[Mapping[str, Any]] = result["runs"]
    table = Table("", *(run["name"] for run in runs), title="measured in this run", title_justify="left")
    table.add_row("validation accuracy at step 0", *(f"{run['at_start']:.1%}" for run in runs))
    table.add_row("test accuracy", *(f"{run['test']['accuracy']:.1%}" for run in runs))
    table.add_row("seconds, with look and ranks", *(f"{run['total_seconds']:.1f}" for run in runs))
    table.add_row("training steps", *(f"{run['steps']:,}" for run in runs))
    table.add_row("trainable parameters", *(f"{run['trainable']:,}" for run in runs))
    table.add_row("ranks moved", *(f"{run['moved']:,}" for run in runs))
    console.print(table)
    show_ranks(console, runs[-1]["ranks"])
    say(console, [f"\n{result['verdict']}", *([f"report: {result['report']}"] if result["out"] else [])])
    say(console, ["your own table, with columns text and label: tsqlora audit TABLE.csv --out audit"])


def show_text_audit(console: Console, result: Mapping[str, Any]) -> None:
    """A text audit's findings, worst first, and the next step."""
    fates = ", ".join(f"{count:,} {fate}" for fate, count in result["fates"].items())
    say(console, [f"{result['rows']:,} rows: {fates}; tokens and masks are {result['mask']}"])
    if places := [f"{one['sequence']} of row {one['row']}" for one in result.get("unmatched_places", ())]:
        shown = ", ".join(places[:3]) + (", …" if len(places) > 3 else "")
        say(console, [f"{len(places):,} of the set's sequences have no source row: sequence {shown}"])
    table = Table(title="findings", title_justify="left", expand=True)
    for name in ("severity", "finding", "rows"):
        table.add_column(name, no_wrap=True, justify="right" if name == "rows" else "left")
    table.add_column("cause", ratio=1)
    for finding in result["findings"]:
        places = ", ".join(map(str, finding["places"][:3])) + (", …" if finding["rows"] > 3 else "")
        where = f"row{'s' if finding['rows'] > 1 else ''} {places}"
        cells = (finding["severity"], finding["name"], f"{finding['rows']:,}", f"{finding['cause']} ({where})")
        table.add_row(*map(Text, cells))
    if result["findings"]:
        console.print(table)
        errors = [finding for finding in result["findings"] if finding["severity"] == "error"]
        say(console, [f"{one['name']}, with {t}: {cure}" for one in errors for t, cure in one["cure"].items()])
    else:
        say(console, ["no finding"])
    if lengths := result.get("lengths"):
        shares = f"{lengths['padding']:.0%} of a random batch of {lengths['batch']} is padding"
        say(console, [f"{lengths['median']:,} tokens a row (median), {lengths['longest']:,} at most; {shares}"])
    if "changes" in result:
        changes = [f"{one['name']} {one['before']:,} → {one['now']:,}" for one in result["changes"]]
        say(console, [f"rows by finding, since the baseline: {', '.join(changes) or 'no change'}"])
    if result["answers"] is not None:
        say(console, result["answers"]["says"])
    command = f", export, then: tsqlora audit --apply reviewed.csv --out {quote(result['out'])}"
    review = f"review {result['page']}{command if result['sha256'] else ''}"
    say(console, [f"{result['out']} has ledger.parquet and findings.json, with every row", review])


def show_audit(console: Console, result: Mapping[str, Any]) -> None:
    """An audit's summary, its first suspects, and the next step."""
    head = f"{result['rows']:,} rows, {len(result['classes'])} classes, read by {result['model_name']}"
    say(console, [head, result["summary"]])
    table = Table(title="first suspects", title_justify="left", expand=True)
    for name in ("row", "label", "suggested", *(["wrong"] if result["evident"] else [])):
        table.add_column(name, no_wrap=True, max_width=22)
    table.add_column("text", no_wrap=True, ratio=1)  # the others keep their width, and it has the rest
    for row in result["first"]:
        text = row["text"] if row["token"] is None else f"{row['word']}: {row['text']}"
        table.add_row(
            str(row["row"]),
            *(Text(_shortened(str(row[name]))) for name in ("label", "suggested_label")),
            *([f"{row['wrong_probability']:.0%}"] if result["evident"] else []),
            Text(_shortened("/".join(text.split("/")[-2:]) if result["columns"].get("media") else text)),
        )
    console.print(table)
    pairs, lines = result["duplicates"], [f"note: {note}" for note in result["notes"]]
    if pairs:
        lines.insert(0, f"pairs of near-duplicates with different labels: {pairs:,}, all in the table and on the page")
    checks = f", {result['checks']:,} of them not suspects, as a check" if result["checks"] else ""
    lines += [
        f"{result['suspects']} lists {result['listed']:,} rows{checks}",
        f"review {result['page']}, export, then: tsqlora audit --apply reviewed.csv --out {quote(result['out'])}",
    ]
    say(console, lines)
