"""Commands that make and use a run: demo, init, train, evaluate, predict."""

import json
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated

import typer

from tsqlora.cli import console
from tsqlora.cli.console import Json, Run, Set
from tsqlora.errors import SettingsError

if TYPE_CHECKING:
    from tsqlora.settings import Config


def demo(
    out: Annotated[Path | None, typer.Option(help="Directory for the runs; by default a temporary one.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of every random draw.", min=0)] = 0,
    as_json: Json = False,
) -> None:
    """Run the main job on an embedded model and data: find wrong labels, then compare two trainings.

    Example: tsqlora demo --out demo-runs
    """
    from tsqlora.training.demo import run_demo

    with console.progress() as display:
        first = {} if as_json else {"show": lambda look: console.show(look, False, "show_suspects")}
        result = run_demo(out, seed=seed, progress=display.progress, say=display.say, **first)
    console.show(result, as_json, "show_demo")


def init(
    output: Annotated[Path | None, typer.Option("-o", "--output", help="File to write; by default stdout.")] = None,
    task: Annotated[str | None, typer.Option(help="Value of task.type, such as causal-lm; the file lists all.")] = None,
    as_json: Json = False,
) -> None:
    """Write a YAML file with every setting, its type and its default.

    Example: tsqlora init -o tsq.yaml --task regression
    """
    from tsqlora.rows.write import require_place
    from tsqlora.settings import template

    if task is not None:
        from tsqlora.tasks import get_task  # imports torch

        get_task(task)
    if output is None:
        print(json.dumps({"yaml": template(task)}) if as_json else template(task), end="\n" if as_json else "")
        return
    if output.exists():
        raise SettingsError(f"{output} exists; name another file")
    require_place(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(template(task), encoding="utf-8")
    console.note(f"wrote {output}; set model.path and data.train, then: tsqlora train {quote(str(output))}")
    if as_json:
        print(json.dumps({"out": str(output)}))


def train(
    config: Annotated[
        Path | None,
        typer.Argument(metavar="CONFIG|RUN", help="A YAML file, or a run to resume; or --model and --data."),
    ] = None,
    model: Annotated[str | None, typer.Option(metavar="M", help="model.path: a directory or hub id.")] = None,
    data: Annotated[str | None, typer.Option(metavar="F", help="data.train: a file, directory or hub id.")] = None,
    set_: Set = None,
    out: Annotated[Path | None, typer.Option(help="Run directory; by default runs/DATE-NAME.")] = None,
    look: Annotated[
        Path | None, typer.Option(metavar="LOOK", help="A folder of `tsqlora look`, in place of a look.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue an interrupted run; start if there is none.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan, train nothing.")] = False,
    as_json: Json = False,
) -> None:
    """Look at all rows, train LoRA on the selected ones, and write an adapter that plain PEFT loads.

    Columns with usual names are detected: text and label, prompt and completion.

    Example: tsqlora train --model sentence-transformers/all-MiniLM-L6-v2 --data rows.csv

    Example: tsqlora train tsq.yaml --set quality.fraction=0.3 --out run

    Example: tsqlora train run --resume
    """
    from tsqlora.rows.readers import SUFFIXES, suffix_of
    from tsqlora.rows.sources import first_rows
    from tsqlora.run_dir import CONFIG_FILE, dated, is_run, require_free
    from tsqlora.settings import load_config

    has_rows = config is not None and suffix_of(config) in {*SUFFIXES} - {".json"}
    if config is not None and config.is_dir():
        has_rows = not is_run(config) and data is None and bool(first_rows(config))
        if not has_rows and not is_run(config):
            raise SettingsError(f"{config} holds no run that has begun to train; name its CONFIG, a YAML file")
        config, out = (config, out) if has_rows else (config / CONFIG_FILE, out or config)
    if config is not None and data is None and has_rows:
        console.note(f"{config} holds rows, not settings, and is read as --data")
        config, data = None, str(config)
    named = {"model.path": model, "data.train": data}
    overrides = [f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in named.items() if value is not None]
    overrides += set_ or []
    if config is None and not overrides:
        raise SettingsError("train needs a CONFIG, or --model and --data; `tsqlora init` writes a CONFIG")
    settings = load_config(config, overrides)
    if not resume:  # a finished run needs neither
        require_inputs(settings)
    from tsqlora.training import command as pipeline  # after this check, since torch takes seconds to import

    look = None if look is None else look.absolute()
    run = out or dated(settings.data.train if config is None else str(config), resume=resume)
    if dry_run:
        console.show(pipeline.dry_run(settings, look), as_json, "show_plan")
        try:
            require_free(run, resume=resume)
        except SettingsError as taken:
            console.note(f"the run would be refused: {taken}")
        if resume:
            console.note("this is the plan of the whole run; --resume continues it")
        return
    with console.progress() as display:
        how = {"resume": resume, "progress": display.progress, "say": display.say}
        record = pipeline.train(settings, run, look=look, **how)
    console.show({"run": str(run), **record.to_dict()}, as_json, "show_record")


def look(
    source: Annotated[str, typer.Argument(metavar="CONFIG|DATA", help="A YAML file, or rows.")],
    out: Annotated[Path, typer.Option(metavar="LOOK", help="Directory to write.")],
    model: Annotated[str | None, typer.Option(metavar="M", help="model.path: a directory or hub id.")] = None,
    set_: Set = None,
    as_json: Json = False,
) -> None:
    """Look at all rows, and save scores and head in a folder, for a training that shards the model.

    Start it as one process, or with torchrun as several. The model may be the one to be trained, in
    4 bits (--set model.quantization=4bit), or a smaller one with the same tokenizer (--model), whose
    head is left out.

    Example: tsqlora look tsq.yaml --out LOOK

    Example: tsqlora look rows.csv --model sentence-transformers/all-MiniLM-L6-v2 --out LOOK
    """
    from tsqlora.settings import config_of

    settings = config_of(source, model, set_ or [])
    require_inputs(settings)
    from tsqlora.training.look import look_at  # after this check, since torch takes seconds to import

    with console.progress() as display:
        saved = look_at(settings, out, progress=display.progress)
    result = {"look": str(out), **saved.summary}
    console.show({**result, "head": sorted(saved.head), "model": saved.about["model"]}, as_json, "show_numbers")
    if not as_json:
        whose = "" if model is None else f" --model {quote(model)}"
        console.note(f"tsqlora train {quote(source)}{whose} --look {quote(str(out))} trains with it, by any launcher")


def require_inputs(settings: "Config") -> None:
    """Raise an error that names a model or data file that does not exist, before torch is imported."""
    from tsqlora.libs.hub import require_model
    from tsqlora.rows.sources import require_source

    require_model(settings.model.path)
    for source in (settings.data.train, settings.data.validation, settings.data.test, settings.data.trusted):
        if source is not None:
            require_source(source)


def evaluate(
    run: Run,
    data: Annotated[Path | None, typer.Option(help="A labelled file; by default the run's test or validation.")] = None,
    set_: Set = None,
    as_json: Json = False,
) -> None:
    """Measure the task's metrics; a model that writes text generates it for them.

    Example: tsqlora evaluate run --data test.jsonl --json
    """
    from tsqlora.training.predict import evaluate_run, own_rows

    with console.progress() as display:
        metrics = evaluate_run(run, data, overrides=set_ or [], progress=display.progress)
    console.show(metrics, as_json, "show_numbers")
    if data is None:
        console.note(f"measured on {own_rows(run)}; --data FILE measures another file")


def predict(
    run: Run,
    data: Annotated[Path, typer.Option(help="File of rows; they need no label.")],
    out: Annotated[Path, typer.Option(help="File to write: .jsonl, .csv, .tsv or .parquet.")],
    set_: Set = None,
    as_json: Json = False,
) -> None:
    """Write the file's rows with a prediction each: a class, a number, or a text.

    The new columns `prediction` and, for classes, `probability` replace columns
    of these names; others stay as they are. The command first checks that --out can hold
    the rows. If writing fails later, the predictions are in a file next to it.

    Example: tsqlora predict run --data new.jsonl --out predicted.jsonl
    """
    from tsqlora.training.predict import predict_run

    with console.progress() as display:
        options = {"overrides": set_ or [], "progress": display.progress, "say": display.say}
        rows = predict_run(run, data, out, **options)
    console.show({"out": str(out), "rows": rows}, as_json, "show_numbers")
