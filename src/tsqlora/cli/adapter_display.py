"""The doctor's report and an export in a terminal."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from tsqlora.cli.display import say

_SHOWN = 6
"""Layers that a list names: the worst."""
_KINDS = 40
"""Most kinds of layers with a line each."""
_NUMBERS = {"rank": "g", "effective": ".1f", "norm": ".3g"}
"""The precision of each number of a layer."""
_STYLES = {"right": "green", "wrong": "red", "refused": "yellow"}


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
    table = Table(box=None, padding=(0, 1, 0, 0))
    for column in ("server", "verdict", "reason, and factor by layer", "fix: --format"):
        table.add_column(column, overflow="fold", ratio=1 if column.startswith("reason") else None)
    for server in report["consumers"]:
        name = Text.assemble(server["name"], (f"\n{server['version']}", "dim"))
        verdict = Text(server["verdict"], style=_STYLES[server["verdict"]])
        table.add_row(name, verdict, Text("\n".join(_reasons(server))), Text(server["mend"] or ""))
    console.print(table)
    right = [server for server, verdict in report["servers"].items() if verdict == "right"]
    say(
        console,
        [f"{len(right)} of {len(report['servers'])} servers read it correctly, in their newest versions here"],
    )
    mends = {server["name"]: server["mend"] for server in report["consumers"]}
    stuck = [server for server in report["servers"] if server not in right and not mends.get(server)]
    if stuck and right:
        say(console, [f"no export helps {', '.join(stuck)}; serve it with {' or '.join(right)}"])
    say(console, _serving({server["name"]: server["serve"] for server in report["consumers"] if server["serve"]}))
    _show_health(console, report["health"])
    say(console, [f"note: {note}" for note in report["notes"]])
    if "template" in report:
        _show_template(console, report["template"])


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


def _show_template(console: Console, report: Mapping[str, Any]) -> None:
    stops = ", ".join(report["stops"])
    lines = [
        f"template     {report['same']} of {report['prompts']} prompts are those of training",
        f"stops        {stops}; behind {report['stops_trained']:.0%} of the trained answers",
    ]
    if first := report["first"]:
        place = f"prompt {first['prompt']}, token {first['at']}"
        lines.append(f"differs      {place}: {first['trained']!r}, this template {first['other']!r}")
    say(console, lines)


def _show_health(console: Console, health: Mapping[str, Any]) -> None:
    from tsqlora.interop.rewrite import layer_kind  # imports numpy, for which `doctor` sets a variable before

    kinds = defaultdict[str, list[Mapping[str, Any]]](list)
    for name, layer in health["layers"].items():
        kinds[layer_kind(name)].append(layer)
    lines = [f"NaN or ∞     {count:,} numbers in {name}" for name, count in health["nonfinite"].items()]
    lines.append(f"unused ranks {health['zero_slots']} zero, {health['duplicate_slots']} duplicate")
    if idle := health["idle_layers"]:
        lines.append(f"idle layers  {len(idle)}: {', '.join(idle[:_SHOWN])}{' …' if len(idle) > _SHOWN else ''}")
    say(console, lines)
    table = Table("layers", "", "rank", "effective", "‖ΔW‖", box=None, padding=(0, 1, 0, 0))
    for kind, layers in list(kinds.items())[:_KINDS]:
        numbers = (_range(sorted(float(f"{one[name]:{form}}") for one in layers)) for name, form in _NUMBERS.items())
        table.add_row(Text(kind, overflow="fold"), f"{len(layers)}", *numbers)
    console.print(table)
    more = f"and {len(kinds) - _KINDS} more kinds; " if len(kinds) > _KINDS else ""
    say(console, [f"{more}--json has every layer"])


def _range(values: Sequence[float]) -> str:
    if not values:
        return "none"
    low, high = values[0], values[-1]
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"
