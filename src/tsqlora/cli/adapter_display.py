"""What was exported, and what the doctor found, in a terminal."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

_SHOWN = 6
"""Layers that are named one by one; of more, the worst are."""
_LAYERS = 40
"""Layers that have a line each; more are shown by their kind."""
_STYLES = {"right": "green", "wrong": "red", "refused": "yellow"}


def show_export(console: Console, report: Mapping[str, Any]) -> None:
    """What was written, and by how much it differs from its source."""
    lines = [f"wrote {report['out']}: {report['format']}, {report['bytes']:,} bytes"]
    if "rank" in report:
        lines.append(f"rank         {report['rank']}, {report['targets']} layers")
    if report.get("max_lora_rank"):
        lines.append(f"vLLM needs   --max-lora-rank {report['max_lora_rank']}")
    if (gap := report["update_difference"]) is not None:
        lines.append(f"compared     ΔW within {gap:.2g}, {report['relative_difference']:.2g} of a layer's largest")
    if report["logits_difference"] is not None:
        lines.append(f"compared     logits within {report['logits_difference']:.2g}, of {report['largest_logit']:.3g}")
    if report.get("pushed"):
        lines.append(f"pushed       {report['pushed']}")
    lines += [f"note: {note}" for note in report["notes"]]
    _say(console, lines)
    if cut := report["truncation"]:
        _say(console, [f"truncated    {len(cut)} layers, of which these lose most:"])
        worst = sorted(cut.items(), key=lambda item: -item[1])[:_SHOWN]
        _say(console, [f"  {error:.1%} of ‖ΔW‖  {name}" for name, error in worst])


def show_doctor(console: Console, report: Mapping[str, Any]) -> None:
    """Who reads the adapter right, and what its numbers say."""
    ranks = report["ranks"].values()
    scales = sorted(set(report["scales"].values()))
    _say(
        console,
        [
            f"adapter      {report['adapter']}",
            f"base         {report['base'] or 'not named'}",
            f"layers       {len(ranks)}, rank {_range(sorted(ranks))}, scale {_range(scales)}",
            f"size         {report['bytes']:,} bytes, {report['parameters']:,} parameters"
            + (f"; {report['universal_parameters']:,} in the universal form" if report["universal_parameters"] else ""),
            f"vLLM needs   --max-lora-rank {report['max_lora_rank'] or 'beyond what it has'}",
        ],
    )
    if more := [*report["heads"], *report["variants"]]:
        _say(console, [f"more than BA {', '.join(more)}"])
    table = Table(box=None, padding=(0, 1, 0, 0))
    for column in ("read by", "verdict", "why, and by what factor", "mended by"):
        table.add_column(column, overflow="fold", ratio=1 if column.startswith("why") else None)
    for found in report["consumers"]:
        name = Text.assemble(found["name"], (f"\n{found['version']}", "dim"))
        verdict = Text(found["verdict"], style=_STYLES[found["verdict"]])
        table.add_row(name, verdict, Text("\n".join(_why(found))), Text(found["mend"] or ""))
    console.print(table)
    _show_health(console, report["health"])
    _say(console, [f"note: {note}" for note in report["notes"]])


def _why(found: Mapping[str, Any]) -> list[str]:
    factors: Mapping[str, float] = found["factors"]
    worst = sorted(factors.items(), key=lambda item: -abs(item[1] - 1))[:_SHOWN]
    shown = [f"× {factor:.3g}  {name}" for name, factor in worst]
    left = len(factors) - len(shown)
    return [*found["reasons"], *shown, *([f"and {left} more"] if left else [])]


def _show_health(console: Console, health: Mapping[str, Any]) -> None:
    layers: Mapping[str, Mapping[str, Any]] = health["layers"]
    lines = [f"NaN or ∞     {count:,} numbers in {name}" for name, count in health["nonfinite"].items()]
    lines.append(f"dead slots   {health['zero_slots']} zero, {health['duplicate_slots']} double")
    if idle := health["idle_layers"]:
        lines.append(f"idle layers  {len(idle)}: {', '.join(idle[:_SHOWN])}{' …' if len(idle) > _SHOWN else ''}")
    _say(console, lines)
    if len(layers) > _LAYERS:
        _by_kind(console, layers)
        return
    table = Table("layer", "rank", "effective", "‖ΔW‖", box=None, padding=(0, 1, 0, 0))
    for name, layer in layers.items():
        table.add_row(
            Text(name, overflow="fold"), str(layer["rank"]), f"{layer['effective']:.1f}", f"{layer['norm']:.3g}"
        )
    console.print(table)


def _by_kind(console: Console, layers: Mapping[str, Mapping[str, Any]]) -> None:
    from tsqlora.interop.rewrite import layer_kind

    kinds: dict[str, list[Mapping[str, Any]]] = {}
    for name, layer in layers.items():
        kinds.setdefault(layer_kind(name), []).append(layer)
    table = Table("kind of layer", "layers", "rank", "effective", "‖ΔW‖", box=None, padding=(0, 1, 0, 0))
    for kind, members in kinds.items():
        spans = [
            _range(sorted(float(f"{layer[key]:.3g}") for layer in members)) for key in ("rank", "effective", "norm")
        ]
        table.add_row(Text(kind, overflow="fold"), str(len(members)), *spans)
    console.print(table)
    _say(console, ["--json has every layer"])


def _range(values: Sequence[float]) -> str:
    low, high = values[0], values[-1]
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"


def _say(console: Console, lines: Sequence[str]) -> None:
    for line in lines:
        console.print(line, soft_wrap=True, highlight=False, markup=False)
