"""Commands that compare methods and show what runs did: compare, report."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from tsqlora.cli import console
from tsqlora.cli.display import show_numbers
from tsqlora.cli.options import ConfigFile, Json, Set
from tsqlora.cli.progress_bars import Display
from tsqlora.errors import SettingsError


def compare(
    config: ConfigFile,
    methods: Annotated[
        str,
        typer.Option(metavar="A,B", help="METHOD or METHOD+POLICY, with commas; lora+head: LoRA, head start alone."),
    ],
    seeds: Annotated[str, typer.Option(metavar="0,1,2", help="Of every random draw; a cell each.")] = "0,1,2",
    out: Annotated[Path, typer.Option(help="Directory of the cells; goes on where it was.")] = Path("comparison"),
    equal: Annotated[str, typer.Option(help="What all share: steps or epochs.")] = "steps",
    lr_sweep: Annotated[
        str, typer.Option(metavar="LR,LR", help="Learning rates to choose from, for each method, on validation rows.")
    ] = "",
    lr: Annotated[
        list[str] | None, typer.Option(metavar="METHOD=LR", help="The learning rate of a method; repeatable.")
    ] = None,
    metric: Annotated[str | None, typer.Option(help="What is compared; the task's own by default.")] = None,
    set_: Set = None,
    as_json: Json = False,
) -> None:
    """Methods side by side at equal cost, seed by seed: is it better than LoRA, on your data?

    A comparison that was cut off goes on when the same command is given again,
    and more methods and seeds may be added.

    Example: tsqlora compare tsq.yaml --methods lora,lora+random,tsqlora --seeds 0,1,2 --out comparison
    """
    from tsqlora.compare.comparison import compare as run_all
    from tsqlora.compare.table import show_comparison
    from tsqlora.reports.write import write_report
    from tsqlora.run.config import load_config

    settings = load_config(config, set_ or [])
    with Display(console.stderr) as display:
        result = run_all(
            settings,
            _listed(methods),
            seeds=[_number(seed, int, "--seeds") for seed in _listed(seeds)],
            out=out,
            equal=equal,  # type: ignore[arg-type]  (an unknown one is refused there)
            sweep=[_number(rate, float, "--lr-sweep") for rate in _listed(lr_sweep)],
            rates=_rates_of(lr or []),
            metric=metric,
            progress=display.progress,
            say=display.say,
        )
    try:
        result["report"] = str(write_report(out))
    except SettingsError as error:  # hours of training are not lost for want of plotly
        result["report"] = None
        console.note(f"no report: {error}; then: tsqlora report {out}")
    console.show(result, as_json, show_comparison)


def report(
    directory: Annotated[
        Path, typer.Argument(metavar="RUN|COMPARISON", help="A run's directory, or what `tsqlora compare` made.")
    ],
    out: Annotated[Path | None, typer.Option(help="HTML file to write; else report.html in the directory.")] = None,
    control: Annotated[
        Path | None, typer.Option(metavar="RUN", help="Another run, against whose metric this one's is shown.")
    ] = None,
    watch: Annotated[
        bool, typer.Option("--watch", help="Serve the page on this machine alone, and keep it up to date.")
    ] = False,
    port: Annotated[int | None, typer.Option(help="Of --watch; else any that is free.")] = None,
    as_json: Json = False,
) -> None:
    """One page of what a run or a comparison did and why, from its directory alone; it opens anywhere, offline.

    With --watch it follows a run that is training, until Ctrl-C.

    Example: tsqlora report run
    """
    if watch:
        from tsqlora.reports.watch import serve

        if out is not None:
            raise SettingsError("--watch serves the page and writes none; leave out --out")

        def say(text: str) -> None:
            console.show({"watch": text}, as_json, show_numbers)

        serve(directory, port=port or 0, control=control, say=say)
        return
    if port is not None:
        raise SettingsError("--port is of --watch; give both, or leave it out")
    from tsqlora.reports.write import write_report

    written = write_report(directory, out, control=control)
    console.show({"report": str(written), "bytes": written.stat().st_size}, as_json, show_numbers)


def _listed(text: str) -> list[str]:
    """The parts between commas."""
    return [part.strip() for part in text.split(",") if part.strip()]


def _number(text: str, kind: Callable[[str], Any], option: str) -> Any:
    try:
        return kind(text)
    except ValueError:
        raise SettingsError(f"{option}: '{text}' is not a number") from None


def _rates_of(given: Sequence[str]) -> dict[str, float]:
    found = dict[str, float]()
    for one in given:
        method, _, rate = one.partition("=")
        if method in found:
            raise SettingsError(f"--lr {method} is given twice; leave out one")
        found[method] = _number(rate, float, f"--lr {method}")
    return found
