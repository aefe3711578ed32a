"""The command line: parses, calls, shows."""

import json
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from tsqlora.cli import console
from tsqlora.cli.adapter_display import show_doctor, show_export
from tsqlora.cli.display import (
    Display,
    show_allocation,
    show_demo,
    show_numbers,
    show_plan,
    show_record,
    show_scores,
    show_scoring_plan,
)
from tsqlora.errors import SettingsError, TsqLoraError, printable
from tsqlora.files import write_json

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    epilog="Every command has an example in its --help, and takes --debug to show where an error arose.",
    help="Picks the samples worth learning from, gives each layer the LoRA rank it needs.",
)
INTERRUPTED = 130
INTERRUPTION = "interrupted; a training goes on with --resume, a scoring or comparison when it is called again"

Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout, all else on stderr.")]
Set = Annotated[list[str] | None, typer.Option("--set", metavar="K.K=VALUE", help="Overrides a setting; repeatable.")]
ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG", help="A YAML file; `tsqlora init` writes one.")]
Source = Annotated[Path, typer.Argument(metavar="CONFIG|RUN", help="A YAML file, or a run's directory.")]
Adapter = Annotated[Path, typer.Argument(metavar="RUN|ADAPTER", help="A run's directory, or an adapter's.")]
Base = Annotated[str | None, typer.Option(help="The adapter's base model: a directory or a hub id.")]
Dtype = Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; else as it is.")]
NewTokens = Annotated[int | None, typer.Option(help="Tokens that may be written; else task.max_new_tokens.", min=1)]
Beams = Annotated[int | None, typer.Option(help="Beams of the search; else task.beams.", min=1)]
Run = Annotated[Path, typer.Argument(metavar="RUN", help="A run's directory.")]


def main() -> None:
    """Runs the command line; an error becomes one or two lines and an exit code."""
    debug = "--debug" in sys.argv
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"] or ["--help"]
    # Under torchrun or accelerate every process runs this: the first one speaks.
    console.stdout.quiet = console.stderr.quiet = os.environ.get("RANK", "0") != "0"
    with warnings.catch_warnings():
        console.quieten_libraries(debug=debug)
        code = _run(arguments, debug=debug)
    sys.exit(code)


def _run(arguments: list[str], *, debug: bool) -> int:
    """The exit code."""
    try:
        # What typer ends has a number already: --help and Ctrl-C.
        code = app(arguments, standalone_mode=False) or 0
        if code == INTERRUPTED:
            console.note(INTERRUPTION)
        return code
    except typer.TyperException as error:
        console.error(f"{error.format_message().rstrip('.?')}; `tsqlora --help` and `tsqlora COMMAND --help` show how")
        return error.exit_code
    except TsqLoraError as error:
        console.error(str(error), debug=debug)
        return error.exit_code
    except Exception as error:
        said = str(error).strip()
        what = printable(f"{type(error).__name__}: {said.splitlines()[0] if said else 'without a word'}")
        console.error(f"{what}; --debug shows where", debug=debug)
        return 1


def _show_version(value: bool) -> None:
    if value:
        from importlib.metadata import version

        print(f"tsqlora {version('tsqlora')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    pass


@app.command()
def demo(
    out: Annotated[Path | None, typer.Option(help="Keep the runs here; else a temporary directory.")] = None,
    seed: Annotated[int, typer.Option(help="Of every random draw.", min=0)] = 0,
    as_json: Json = False,
) -> None:
    """The main job on an embedded model and data: three trainings side by side, with wrong labels to find.

    Example: tsqlora demo --out demo-runs
    """
    from tsqlora.run.demo import run_demo

    with Display(console.stderr) as display:
        result = run_demo(out, seed=seed, progress=display.progress, say=display.say)
    console.show(result, as_json, show_demo)


@app.command()
def init(
    output: Annotated[Path | None, typer.Option("-o", "--output", help="File to write; else stdout.")] = None,
    task: Annotated[str | None, typer.Option(help="The task's type.")] = None,
    as_json: Json = False,
) -> None:
    """Writes a YAML file with every setting, its type and its default.

    Example: tsqlora init -o tsq.yaml --task regression
    """
    from tsqlora.data.write import require_place
    from tsqlora.run.config import template
    from tsqlora.tasks import get_task

    if task is not None:
        get_task(task)
    if output is None:
        print(json.dumps({"yaml": template(task)}) if as_json else template(task), end="\n" if as_json else "")
        return
    if output.exists():
        raise SettingsError(f"{output} exists already; name another file")
    require_place(output)
    output.write_text(template(task), encoding="utf-8")
    console.note(f"wrote {output}; set model.path and data.train, then: tsqlora train {output}")
    if as_json:
        print(json.dumps({"out": str(output)}))


@app.command()
def train(
    config: ConfigFile,
    set_: Set = None,
    out: Annotated[Path, typer.Option(help="The run's directory.")] = Path("run"),
    init_from: Annotated[
        str | None, typer.Option(metavar="RUN|ADAPTER", help="Go on from this adapter; --set adapter.init_from=…")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on where the run stopped; start if it never began.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan, train nothing.")] = False,
    as_json: Json = False,
) -> None:
    """Trains: warm-up, scores, ranks, quality draws; writes an adapter that plain PEFT loads.

    Example: tsqlora train tsq.yaml --set quality.fraction=0.3 --out run
    """
    from tsqlora.run import train as pipeline
    from tsqlora.run.config import load_config
    from tsqlora.training.run_dir import require_free

    start = [] if init_from is None else [f"adapter.init_from={json.dumps(init_from, ensure_ascii=False)}"]
    settings = load_config(config, [*(set_ or []), *start])
    if dry_run:
        console.show(pipeline.dry_run(settings), as_json, show_plan)
        try:
            require_free(out, resume=resume)
        except SettingsError as taken:
            console.note(f"the run itself would be refused: {taken}")
        if resume:
            console.note("this is the plan of the whole run; --resume does what is left of it")
        return
    with Display(console.stderr) as display:
        record = pipeline.train(settings, out, resume=resume, progress=display.progress)
    console.show({"run": str(out), **record.to_dict()}, as_json, show_record)


@app.command()
def score(
    source: Annotated[Path, typer.Argument(metavar="CONFIG|RUN|SCORES", help="Scores only to explain them.")],
    out: Annotated[Path | None, typer.Option(help="Parquet file to write.")] = None,
    set_: Set = None,
    drop: Annotated[
        list[str] | None,
        typer.Option(metavar="KIND", help="Kind of rows that is never drawn: duplicate, outlier; repeatable."),
    ] = None,
    explain: Annotated[
        int | None, typer.Option(metavar="N", help="Show the N best, worst and most suspicious samples.")
    ] = None,
    data: Annotated[Path | None, typer.Option(help="The scored file, where --explain does not find it.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan, score nothing.")] = False,
    as_json: Json = False,
) -> None:
    """Scores every training row: after a config's warm-up, or by the weights of a run.

    Without data.validation a tenth of the rows is held out, as in training.
    Of a RUN and another file (--set data.train=...) every row is scored.
    Rows are never all in memory. A scoring that was cut off goes on when the
    same command is given again: what it has is kept in OUT.partial until it is
    done.

    Example: tsqlora score tsq.yaml --out scores.parquet --explain 10
    """
    from tsqlora.quality.explain import explain as explain_samples
    from tsqlora.quality.scores import Scores
    from tsqlora.run import score as scoring

    if data is not None and explain is None:
        raise SettingsError(
            "--data is where --explain N finds the scored rows; rows to score are named by --set data.train=FILE"
        )
    known = source.suffix == ".parquet" and source.is_file()
    if explain is not None and explain < 1:
        raise SettingsError(f"--explain {explain}: it must be at least 1")
    if known and explain is None:
        raise SettingsError(f"{source} has scores already; give --explain N to look at them")
    if known and (drop or set_ or out):
        raise SettingsError(f"{source} has scores already: --drop, --set and --out are for a CONFIG or a RUN")
    if dry_run:
        plan = scoring.plan_scoring(source, overrides=set_ or [], drop=drop or [])
        console.show(plan, as_json, show_scoring_plan)
        return
    if known:
        out, scores = source, Scores.load(source)
    elif out is None:
        raise SettingsError("score writes a file; name it: --out scores.parquet")
    else:
        with Display(console.stderr) as display:
            scores = scoring.score_rows(source, out, overrides=set_ or [], drop=drop or [], progress=display.progress)
    keep = ("eta", "effective_sample_size", "reference_rows", "weights", "temperature", "scope")
    result = {"scores": str(out), "rows": len(scores), "kept": int(scores.kept.sum())}
    result["held_out"] = scores.record.get("held_out", 0)
    result |= {k: scores.record[k] for k in keep}
    if explain is not None:
        result["explained"] = explain_samples(scores, explain, data=data)
    console.show(result, as_json, show_scores)


@app.command()
def select(
    scores: Annotated[Path, typer.Argument(metavar="SCORES", help="What `tsqlora score` wrote.")],
    out: Annotated[Path, typer.Option(help="File to write: .jsonl, .csv, .tsv or .parquet.")],
    fraction: Annotated[float, typer.Option(help="Share of the rows, above 0 and at most 1.")],
    seed: Annotated[int, typer.Option(help="Of the draw.", min=0)] = 0,
    data: Annotated[Path | None, typer.Option(help="The scored file: its rows are written.")] = None,
    as_json: Json = False,
) -> None:
    """Draws a quality sample from scores and writes its rows, for any trainer.

    Example: tsqlora select scores.parquet --fraction 0.3 --data train.jsonl --out subset.jsonl
    """
    from tsqlora.quality.select import select_rows

    rows = select_rows(scores, out, fraction=fraction, seed=seed, data=data)
    console.show({"out": str(out), "rows": rows}, as_json, show_numbers)


@app.command()
def allocate(
    source: Source,
    out: Annotated[Path, typer.Option(help="JSON file to write.")],
    set_: Set = None,
    as_json: Json = False,
) -> None:
    """Ranks by sensitivity, as arguments of PEFT's LoraConfig.

    Example: tsqlora allocate tsq.yaml --out ranks.json
    """
    from tsqlora.data.write import require_place
    from tsqlora.run.allocate import allocate_ranks

    require_place(out)
    with Display(console.stderr) as display:
        arguments = allocate_ranks(source, overrides=set_ or [], progress=display.progress)
    write_json(out, arguments)
    console.show({"out": str(out), **arguments}, as_json, show_allocation)


@app.command()
def evaluate(
    run: Run,
    data: Annotated[Path | None, typer.Option(help="A labelled file; else the run's own test or validation.")] = None,
    max_new_tokens: NewTokens = None,
    beams: Beams = None,
    as_json: Json = False,
) -> None:
    """The task's metrics; generated text is measured by writing it.

    Example: tsqlora evaluate run --data test.jsonl --json
    """
    from tsqlora.run.predict import evaluate_run, own_rows

    with Display(console.stderr) as display:
        metrics = evaluate_run(run, data, overrides=_writing(max_new_tokens, beams), progress=display.progress)
    console.show(metrics, as_json, show_numbers)
    if data is None:
        console.note(f"measured on {own_rows(run)}; --data FILE measures on others")


@app.command()
def predict(
    run: Run,
    data: Annotated[Path, typer.Option(help="File of rows; they need no label.")],
    out: Annotated[Path, typer.Option(help="File to write: .jsonl, .csv, .tsv or .parquet.")],
    max_new_tokens: NewTokens = None,
    beams: Beams = None,
    as_json: Json = False,
) -> None:
    """Writes the file's rows with a prediction each: a class, a number, or a text.

    New columns are `prediction` and, of classes, `probability`; columns of such
    a name are replaced.

    Example: tsqlora predict run --data new.jsonl --out predicted.jsonl
    """
    from tsqlora.run.predict import predict_run

    with Display(console.stderr) as display:
        rows = predict_run(run, data, out, overrides=_writing(max_new_tokens, beams), progress=display.progress)
    console.show({"out": str(out), "rows": rows}, as_json, show_numbers)


@app.command()
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
        from tsqlora.report.watch import serve

        if out is not None:
            raise SettingsError("--watch serves the page and writes none; leave out --out")

        def say(text: str) -> None:
            console.show({"watch": text}, as_json, show_numbers)

        serve(directory, port=port or 0, control=control, say=say)
        return
    if port is not None:
        raise SettingsError("--port is of --watch; give both, or leave it out")
    from tsqlora.report.write import write_report

    written = write_report(directory, out, control=control)
    console.show({"report": str(written), "bytes": written.stat().st_size}, as_json, show_numbers)


@app.command()
def compare(
    config: ConfigFile,
    methods: Annotated[str, typer.Option(metavar="A,B", help="METHOD or METHOD+POLICY, with commas.")],
    seeds: Annotated[str, typer.Option(metavar="0,1,2", help="Of every random draw; a cell each.")] = "0,1,2",
    out: Annotated[Path, typer.Option(help="Directory of the cells; goes on where it was.")] = Path("comparison"),
    policies: Annotated[str, typer.Option(metavar="A,B", help="Ways to choose rows; every method with each.")] = "",
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
    from tsqlora.compare.methods import crossed
    from tsqlora.compare.table import show_comparison
    from tsqlora.report.write import write_report
    from tsqlora.run.config import load_config

    settings = load_config(config, set_ or [])
    with Display(console.stderr) as display:
        result = run_all(
            settings,
            crossed(_listed(methods), _listed(policies)),
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


@app.command()
def export(
    source: Adapter,
    format: Annotated[str, typer.Option(help="peft, universal, gguf or merged.")],
    out: Annotated[Path, typer.Option(help="Directory to write.")],
    base: Base = None,
    dtype: Dtype = None,
    max_rank: Annotated[int | None, typer.Option(metavar="R", help="Cut every layer to this rank by SVD.")] = None,
    mean_rank: Annotated[
        float | None, typer.Option(metavar="R", help="Cut to a uniform rank's parameters, where least is lost.")
    ] = None,
    push_to_hub: Annotated[
        str | None, typer.Option(metavar="REPO", help="Upload it in the end; a new repository is private.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Writes an adapter, ours or any PEFT LoRA, in the format that its server reads, and compares it with its source.

    peft: the smallest. universal: one rank and alpha for all layers, right in
    every server. gguf: for llama.cpp. merged: a plain transformers model. What
    differs by more than rounding is an error, and nothing is written.

    Example: tsqlora export run --format universal --out adapter-for-vllm
    """
    from tsqlora.run import export as exporting

    done = exporting.export(
        source,
        out,
        format=format,
        base=base,
        dtype=dtype,
        max_rank=max_rank,
        mean_rank=mean_rank,
        push_to_hub=push_to_hub,
    )
    console.show(done, as_json, show_export)


@app.command()
def merge(
    source: Adapter,
    out: Annotated[Path, typer.Option(help="Directory to write.")],
    base: Base = None,
    dtype: Dtype = None,
    as_json: Json = False,
) -> None:
    """Writes base and adapter as one plain transformers model, with its head and tokenizer.

    Example: tsqlora merge run --out model
    """
    from tsqlora.run import export as exporting

    console.show(exporting.export(source, out, format="merged", base=base, dtype=dtype), as_json, show_export)


@app.command()
def doctor(source: Adapter, as_json: Json = False) -> None:
    """Says which servers read an adapter right, what mends it for the others, and what its numbers look like.

    Example: tsqlora doctor adapter --json
    """
    from tsqlora.interop.doctor import examine
    from tsqlora.training.run_dir import adapter_folder

    console.show(examine(adapter_folder(source)), as_json, show_doctor)


def _writing(max_new_tokens: int | None, beams: int | None) -> list[str]:
    """Settings that are given as options."""
    given = {"task.max_new_tokens": max_new_tokens, "task.beams": beams}
    return [f"{name}={value}" for name, value in given.items() if value is not None]


adapters = typer.Typer(help="Works on an adapter itself.", rich_markup_mode="rich")
app.add_typer(adapters, name="adapter")


@adapters.command()
def compress(
    source: Adapter,
    out: Annotated[Path, typer.Option(help="Directory to write.")],
    mean_rank: Annotated[float, typer.Option(metavar="R", help="As many parameters as a uniform LoRA of this rank.")],
    by: Annotated[
        str, typer.Option(help="singular: by the update alone; curvature: by its effect on a run's own rows.")
    ] = "singular",
    base: Base = None,
    as_json: Json = False,
) -> None:
    """Allots a trained adapter's ranks anew: fewer parameters, and each layer keeps what it loses most without.

    Example: tsqlora adapter compress run --mean-rank 4 --out smaller
    """
    from tsqlora.run import export as exporting

    console.show(exporting.compress(source, out, mean_rank=mean_rank, by=by, base=base), as_json, show_export)


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


if __name__ == "__main__":
    main()
