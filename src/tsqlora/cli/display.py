"""Plans, results, the doctor's report and tables in a terminal; imported where they are shown, as rich is slow to."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from shlex import quote
from typing import Any

from rich.console import Console
from rich.padding import Padding
from rich.table import Column, Table
from rich.text import Text

from tsqlora.auditing.page import layer_places
from tsqlora.errors import few

_BLOCKS_ABREAST = 12
_CLASSES = 20
_CHARACTERS = 240
"""Most characters of a sample."""
_LABEL = {"text": "target tokens", "pair": "target tokens"}
"""What a label is, by the kind of rows, where it is none."""


_PLAIN: Mapping[str, Any] = {"box": None, "padding": (0, 1, 0, 0)}
"""The look of a table without lines."""
_SHOWN = 6
"""Layers that a list names: the worst."""
_KINDS = 40
"""Most kinds of layers with a line each."""
_NUMBERS = {"rank": "g", "effective": ".1f", "norm": ".3g"}
"""The precision of each number of a layer."""
_STYLES = {"right": "green", "wrong": "red", "refused": "yellow"}


def say(console: Console, lines: Iterable[str]) -> None:
    """Print lines as they are: names and texts may hold square brackets."""
    for line in lines:
        console.print(line, soft_wrap=True, highlight=False, markup=False)


def print_table(
    console: Console,
    head: Sequence[str | Column],
    rows: Iterable[Sequence[str | Text]],
    title: str | None = None,
    **how: Any,
) -> None:
    """Print a table with its title on the left; `how` are further arguments of rich's."""
    table = Table(*head, title=title, title_justify="left", **how)
    for row in rows:
        table.add_row(*row)
    console.print(table)


def show_plan(console: Console, plan: Mapping[str, Any]) -> None:
    """The plan of a dry run."""
    ranks = sorted(set(plan["ranks"].values()))
    counts = [f"{_shortened(name)} ({count:,})" for name, count in (plan["classes"] or {}).items()]
    columns = ", ".join(str(name) for key, name in plan["columns"].items() if name and key not in ("media", "one_hot"))
    limit = f"; at most {plan['max_length']:,} tokens" if plan["max_length"] else ""
    lines = [
        f"rows        {', '.join(f'{count:,} {name}' for name, count in plan['rows'].items())}",
        f"columns     {columns}{limit}",
        *(f"file        {name}: {dialect}" for name, dialect in plan["files"].items()),
        *(
            [f"classes     {len(counts)}: {', '.join(counts[:_CLASSES])}{' …' * (len(counts) > _CLASSES)}"]
            if counts
            else []
        ),
        f"an epoch    {plan['rows_an_epoch']:,} rows; {plan['epochs']} epochs, {plan['steps']:,} steps",
        f"parameters  {plan['trainable']:,} trainable, of which {plan['budget']:,} are the ranks' budget",
        f"ranks       {len(plan['ranks'])} layers at {' and '.join(map(str, ranks))}",
        f"precision   {'bfloat16 autocast' if plan['bf16'] else 'float32'}",
        *(f"settings    {note}" for note in plan["without_effect"]),
        *(f"note        {note}" for note in plan["notes"]),
    ]
    say(console, lines)
    rows = [(phase, f"{one['forward']:,}", f"{one['backward']:,}") for phase, one in plan["passes"].items()]
    print_table(console, ("phase", "rows forward", "rows backward"), rows, "passes")
    if "samples" in plan:
        say(console, [f"row format  {plan['format']}\n", plan["samples"]])


def show_record(console: Console, record: Mapping[str, Any]) -> None:
    """The results of a finished run."""
    rows = [
        (phase, f"{cost['seconds']:.1f}", f"{cost['forward']:,}", f"{cost['backward']:,}")
        for phase, cost in record["cost"].items()
    ]
    print_table(console, ("phase", "seconds", "rows forward", "rows backward"), rows, "cost")
    show_ranks(console, record["ranks"])
    for split, metrics in record["metrics"].items():
        console.print(f"{split:<11} " + "  ".join(f"{name} {value:.4f}" for name, value in metrics.items()))
    say(console, [f"note: {note}" for note in record["notes"]])
    say(console, [f"adapter     {record['run']}/adapter", f"report      tsqlora report {quote(record['run'])}"])


def show_ranks(console: Console, ranks: Mapping[str, int]) -> None:
    """Ranks that differ by kind of module and block, a table for every 12 blocks; one line otherwise."""
    if len(set(ranks.values())) < 2:
        say(console, [f"ranks       {rank} in each of {len(ranks)} layers" for rank in set(ranks.values())])
        return
    cells = {place: str(ranks[name]) for name, place in layer_places(ranks).items()}
    blocks = list(dict.fromkeys(block for block, _ in cells if block))
    for start in range(0, len(blocks), _BLOCKS_ABREAST):
        abreast = blocks[start : start + _BLOCKS_ABREAST]
        kinds = dict.fromkeys(kind for block, kind in cells if block in abreast)
        head = ["rank in block", *(Column(block, justify="right") for block in abreast)]
        rows = [(kind, *(cells.get((block, kind), "") for block in abreast)) for kind in kinds]
        print_table(console, head, rows, **_PLAIN)
    if alone := [(kind, rank) for (block, kind), rank in cells.items() if not block]:
        print_table(console, ("rank", ""), alone, **_PLAIN)


def show_numbers(console: Console, numbers: Mapping[str, Any]) -> None:
    """Names and values, a line each."""
    shown = {name: f"{value:.4f}" if isinstance(value, float) else value for name, value in numbers.items()}
    say(console, [f"{name:<22} {value}" for name, value in shown.items()])


def show_review(console: Console, result: Mapping[str, Any]) -> None:
    """What a review changed, and how to train on it."""
    show_numbers(console, {name: value for name, value in result.items() if name not in ("notes", "next")})
    notes = (f"note: {note}" for note in result.get("notes", ()))
    say(console, [*notes, *([f"next: {result['next']}"] if "next" in result else [])])


def show_scores(console: Console, result: Mapping[str, Any]) -> None:
    """The result of `score`: what is in the file, and what to do with it."""
    from tsqlora.auditing.reasons import WHY

    file, noise, dropped = result["scores"], result["noise"], result["dropped"]
    draw = "evenly"
    if result["draw"] != "even":
        size = f"{result['effective_sample_size']:,.0f}"
        draw = f"by quality at temperature {result['temperature']:g} (effective sample size {size})"
    labels = "no evidence of wrong ones"
    if noise and noise["evident"]:
        bounds = f" ({noise['low']:.1%} to {noise['high']:.1%})" if noise["high"] < 1 else ""
        labels = f"about {noise['rate']:.1%} are wrong{bounds}"
    lines = [
        f"scores   {file}: {result['rows']:,} rows; {result['held_out']:,} more are held out for validation",
        f"draw     {draw}",
        f"left out {', '.join(f'{count:,} ({WHY[reason]})' for reason, count in dropped.items()) or 'none'}",
        *([f"labels   {labels}"] if noise else []),
        f"next     tsqlora explain {quote(file)}, or tsqlora select {quote(file)} --fraction 0.5 --out subset.jsonl",
    ]
    say(console, lines)


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
    head = [Column(name, min_width=13, no_wrap=True) for name in ("label", "predicted", "truth")]
    head.append(Column("text", no_wrap=True, overflow="ellipsis", max_width=28))
    cells = [
        [Text(row[name], "red" if row["wrong"] else "") for name in ("label", "predicted", "true", "text")]
        for row in rows
    ]
    print_table(console, head, cells, "likely wrong labels, before any training")
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
    rows = {
        "validation accuracy at step 0": [f"{run['at_start']:.1%}" for run in runs],
        "test accuracy": [f"{run['test']['accuracy']:.1%}" for run in runs],
        "seconds, with look and ranks": [f"{run['total_seconds']:.1f}" for run in runs],
        "training steps": [f"{run['steps']:,}" for run in runs],
        "trainable parameters": [f"{run['trainable']:,}" for run in runs],
        "ranks moved": [f"{run['moved']:,}" for run in runs],
    }
    head = ["", *(run["name"] for run in runs)]
    print_table(console, head, [(name, *cells) for name, cells in rows.items()], "measured in this run")
    show_ranks(console, runs[-1]["ranks"])
    say(console, [f"\n{result['verdict']}", *([f"report: {result['report']}"] if result["out"] else [])])
    say(console, ["your own table, with columns text and label: tsqlora audit TABLE.csv --out audit"])


def show_text_audit(console: Console, result: Mapping[str, Any]) -> None:
    """A text audit's findings, worst first, and the next step."""
    fates = ", ".join(f"{count:,} {fate}" for fate, count in result["fates"].items())
    say(console, [f"{result['rows']:,} rows: {fates}; tokens and masks are {result['mask']}"])
    if places := [f"{one['sequence']} of row {one['row']}" for one in result.get("unmatched_places", ())]:
        say(console, [f"{len(places):,} of the set's sequences have no source row: sequence {few(places, 3)}"])
    head = [Column(name, no_wrap=True) for name in ("severity", "finding", "rows")] + [Column("cause", ratio=1)]
    head[2].justify, rows = "right", list[tuple[str, ...]]()
    for finding in result["findings"]:
        where = f"row{'s' if finding['rows'] > 1 else ''} {few(finding['places'], 3)}"
        cause = finding["cause"] if f"({where}: " in finding["cause"] else f"{finding['cause']} ({where})"
        rows.append((finding["severity"], finding["name"], f"{finding['rows']:,}", cause))
    if rows:
        print_table(console, head, rows, "findings", expand=True)
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
    command = f", export, then: tsqlora apply reviewed.csv --out {quote(result['out'])}"
    review = f"review {result['page']}{command if result['sha256'] else ''}"
    say(console, [f"{result['out']} has ledger.parquet and findings.json, with every row", review])


def show_audit(console: Console, result: Mapping[str, Any]) -> None:
    """An audit's summary, its first suspects, and the next step."""
    columns = {name: value for name, value in result["columns"].items() if value}
    texts = " and ".join(columns[name] for name in ("text", "text_pair") if name in columns)
    head = f"{result['rows']:,} rows, {len(result['classes'])} classes of {columns['label']}; "
    head += f"{texts} read by {result['model_name']}"
    say(console, [head, result["summary"]])
    names = ("row", "label", "suggested", *(["wrong"] if result["evident"] else []))
    head = [Column(name, no_wrap=True, max_width=22) for name in names]
    head.append(Column("text", no_wrap=True, ratio=1))  # the others keep their width, and it has the rest
    rows = list[tuple[str, ...]]()
    for row in result["first"]:
        text = row["text"] if row["token"] is None else f"{row['word']}: {row['text']}"
        text = "/".join(text.split("/")[-2:]) if result["columns"].get("media") else text
        chance = [f"{row['wrong_probability']:.0%}"] if result["evident"] else []
        labels = (_shortened(str(row[name])) for name in ("label", "suggested_label"))
        rows.append((str(row["row"]), *labels, *chance, _shortened(text)))
    print_table(console, head, rows, "first suspects", expand=True)
    pairs, lines = result["duplicates"], [f"note: {note}" for note in result["notes"]]
    if pairs:
        lines.insert(0, f"pairs of near-duplicates with different labels: {pairs:,}, all in the table and on the page")
    checks = f", {result['checks']:,} of them not suspects, as a check" if result["checks"] else ""
    lines += [
        f"{result['suspects']} lists {result['listed']:,} rows{checks}",
        f"review {result['page']}, export, then: tsqlora apply reviewed.csv --out {quote(result['out'])}",
    ]
    say(console, lines)


def show_export(console: Console, report: Mapping[str, Any]) -> None:
    """The exported files, and their difference from the source."""
    lines = [f"wrote {report['out']}: {report['format']}, {report['bytes']:,} bytes"]
    if "rank" in report:
        lines.append(f"rank         {report['rank']}, {report['targets']} layers")
    if report.get("max_lora_rank"):
        lines.append(f"vLLM needs   --max-lora-rank {report['max_lora_rank']}")
    cut = report["truncation"]
    compared = "from the cut adapter" if cut else "from its source"
    if (gap := report["update_difference"]) is not None:
        lines.append(
            f"compared     ΔW differs {compared} by {gap:.2g} at most, "
            f"{report['relative_difference']:.2g} of a layer's largest"
        )
    if report["logits_difference"] is not None:
        lines.append(
            f"compared     logits differ {compared} by {report['logits_difference']:.2g} at most, the largest is "
            f"{report['largest_logit']:.3g}"
        )
    if half := report["bfloat16"]:
        lines.append(
            f"bfloat16     logits differ by {half['merged']:.2%} from PEFT's in float32; the base's own by "
            f"{half['base']:.2%}"
        )
    lines += _serving(report["serve"])
    lines += [f"note: {note}" for note in report["notes"]]
    if cut:
        lost = report["logits_lost"]
        moves = "" if lost is None else f", which moves logits by {lost:.2g} at most"
        lines.append(f"truncated    {len(cut)} layers{moves}; the greatest losses:")
        worst = sorted(cut.items(), key=lambda item: -item[1])[:_SHOWN]
        lines += [f"  {error:.1%} of ‖ΔW‖  {name}" for name, error in worst]
    say(console, lines)


def show_check(console: Console, report: Mapping[str, Any]) -> None:
    """What a server answered, compared with PEFT."""
    if report["server"] is None:
        stopped = f"{report['stopped_peft']:.0%} of {report['prompts']} answers stop by themselves, as PEFT writes them"
        say(console, [f"{stopped}; --server-url compares those of a server"])
        return
    lines = [
        f"{report['verdict']}: {report['model']} on {report['server']}, {report['prompts']} prompts",
        f"same         {report['same']:.0%} of the answers in their first 16 tokens",
        f"stopped      {report['stopped']:.0%} by themselves; with PEFT {report['stopped_peft']:.0%}",
    ]
    if report["same"] < 1:
        lines.append(f"differ       {report['by_template']} by the prompt, {report['by_weights']} by the weights")
    if report["base_answered"]:
        lines.append("the base answered, not the adapter: name the adapter with --served-name")
    if (tokens := report["prompt_tokens"]) and "at" in tokens:
        lines.append(
            f"prompt       differs at token {tokens['at']}: {tokens['trained']!r}, served {tokens['served']!r}"
        )
    if example := report["example"]:
        lines += [f"served       {example['served'][:200]!r}", f"PEFT         {example['peft'][:200]!r}"]
    say(console, lines)


def show_doctor(console: Console, report: Mapping[str, Any]) -> None:
    """The servers that read the adapter correctly, and its numerical health."""
    ranks, scales = sorted(report["ranks"].values()), sorted(set(report["scales"].values()))
    universal = report["universal_parameters"]
    lines = [
        f"adapter      {report['adapter']}",
        f"base         {report['base'] or 'not named'}" + (f", {report['base_class']}" if report["base_class"] else ""),
        f"layers       {len(ranks)}, rank {_range(ranks)}, scale {_range(scales)}",
        f"size         {report['bytes']:,} bytes, {report['parameters']:,} parameters"
        + (f"; {universal:,} in the universal form" if universal else ""),
        f"vLLM needs   --max-lora-rank {report['max_lora_rank'] or '(more than it supports)'}",
    ]
    if more := [*report["heads"], *report["variants"]]:
        lines.append(f"besides LoRA {', '.join(more)}")
    lines += [f"{fault['name']}: {fault['cure']}{_listed(fault['layers'])}" for fault in report["faults"]]
    say(console, lines)
    head = [
        Column(name, overflow="fold") for name in ("server", "verdict", "reason, and factor by layer", "fix: --format")
    ]
    head[2].ratio = 1
    rows = [
        (
            Text.assemble(server["name"], (f"\n{server['version']}", "dim")),
            Text(server["verdict"], style=_STYLES[server["verdict"]]),
            "\n".join(_reasons(server)),
            server["mend"] or "",
        )
        for server in report["consumers"]
    ]
    print_table(console, head, rows, **_PLAIN)
    right = [server for server, verdict in report["servers"].items() if verdict == "right"]
    lines = (
        [f"{len(right)} of {len(report['servers'])} servers read it correctly, in their newest versions here"]
        if len(report["consumers"]) > 1
        else []  # the verdict on one server stands above
    )
    mends = {server["name"]: server["mend"] for server in report["consumers"]}
    stuck = [server for server in report["servers"] if server not in right and not mends.get(server)]
    if stuck and right:
        lines.append(f"no export helps {', '.join(stuck)}; serve it with {' or '.join(right)}")
    say(console, lines + _serving({one["name"]: one["serve"] for one in report["consumers"] if one["serve"]}))
    _show_health(console, report["health"])
    say(console, [f"note: {note}" for note in report["notes"]])
    if template := report.get("template"):
        lines = [
            f"template     {template['same']} of {template['prompts']} prompts are those of training",
            f"stops        {', '.join(template['stops'])}; behind {template['stops_trained']:.0%} of trained answers",
        ]
        if first := template["first"]:
            place = f"prompt {first['prompt']}, token {first['at']}"
            lines.append(f"differs      {place}: {first['trained']!r}, this template {first['other']!r}")
        say(console, lines)


def _serving(commands: Mapping[str, str]) -> list[str]:
    return [f"{server:<12} {command}" for server, command in commands.items()]


def _reasons(server: Mapping[str, Any]) -> list[str]:
    alike = defaultdict[str, list[str]](list)
    for name, factor in sorted(server["factors"].items(), key=lambda item: -abs(item[1] - 1)):
        alike[f"{factor:.3g}"].append(name)
    lines = [
        f"× {factor}  {names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''}"
        for factor, names in alike.items()
    ]
    more = [f"and {len(lines) - _SHOWN} other factors"] if len(lines) > _SHOWN else []
    return [*server["reasons"], *lines[:_SHOWN], *more]


def _listed(names: Sequence[str]) -> str:
    return f" ({', '.join(names[:_SHOWN])}{' …' if len(names) > _SHOWN else ''})" if names else ""


def _show_health(console: Console, health: Mapping[str, Any]) -> None:
    from tsqlora.adapter.rewrite import layer_kind  # imports numpy, for which `doctor` sets a variable before

    kinds = defaultdict[str, list[Mapping[str, Any]]](list)
    for name, layer in health["layers"].items():
        kinds[layer_kind(name)].append(layer)
    lines = [f"NaN or ∞     {count:,} numbers in {name}" for name, count in health["nonfinite"].items()]
    lines.append(f"unused ranks {health['zero_slots']} zero, {health['duplicate_slots']} duplicate")
    if idle := health["idle_layers"]:
        lines.append(f"idle layers  {len(idle)}: {', '.join(idle[:_SHOWN])}{' …' if len(idle) > _SHOWN else ''}")
    say(console, lines)
    rows = [
        (
            Text(kind, overflow="fold"),
            str(len(layers)),
            *(_range(sorted(float(f"{one[name]:{form}}") for one in layers)) for name, form in _NUMBERS.items()),
        )
        for kind, layers in list(kinds.items())[:_KINDS]
    ]
    print_table(console, ("layers", "", "rank", "effective", "‖ΔW‖"), rows, **_PLAIN)
    more = f"and {len(kinds) - _KINDS} more kinds; " if len(kinds) > _KINDS else ""
    say(console, [f"{more}--json has every layer"])


def _range(values: Sequence[float]) -> str:
    if not values:
        return "none"
    low, high = values[0], values[-1]
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"
