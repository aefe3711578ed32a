"""Commands that choose rows and ranks for any trainer: score, explain, select, allocate, audit."""

from pathlib import Path
from shlex import quote
from typing import Annotated

import typer

from tsqlora.cli import console
from tsqlora.cli.console import Json, Set, Source
from tsqlora.cli.display import (
    show_allocation,
    show_audit,
    show_explained,
    show_numbers,
    show_review,
    show_row,
    show_scores,
)
from tsqlora.cli.progress_bars import Display
from tsqlora.cli.runs import require_inputs
from tsqlora.errors import SettingsError
from tsqlora.files import write_json, writing


def score(
    source: Source,
    out: Annotated[Path, typer.Option(help="Parquet file to write.")],
    set_: Set = None,
    as_json: Json = False,
) -> None:
    """Score every training row: with a config's model and a fitted head, or with the weights of a run.

    Without data.validation a tenth of the rows is held out, as in training.
    For a RUN and another file (--set data.train=...) every row is scored.
    Rows are read in chunks. OUT.partial has the progress until the end, and the
    same command resumes an interrupted scoring.

    Example: tsqlora score tsq.yaml --out scores.parquet
    """
    from tsqlora.run.config import load_config

    if source.suffix == ".parquet" and source.is_file():
        raise SettingsError(f"{source} is neither CONFIG nor RUN; `tsqlora explain {quote(str(source))}` shows scores")
    if not source.is_dir():
        require_inputs(load_config(source, set_ or []))
    from tsqlora.run.score import score_rows  # after these checks, since torch takes seconds to import

    with Display(console.stderr) as display:
        scores = score_rows(source, out, overrides=set_ or [], progress=display.progress)
    names = ("draw", "weights", "temperature", "effective_sample_size", "noise", "reference_rows", "eta")
    record = {name: getattr(scores.record, name) for name in names}
    result = {"scores": str(out), "rows": len(scores), "kept": int(scores.kept.sum()), "dropped": scores.dropped}
    result["held_out"] = scores.record.held_out
    console.show({**result, **record}, as_json, show_scores)


def explain(
    source: Annotated[Path, typer.Argument(metavar="RUN|SCORES", help="Output of `train` or `score`.")],
    row: Annotated[int | None, typer.Option(metavar="N", min=0, help="The row's number in its file, from 0.")] = None,
    samples: Annotated[
        int, typer.Option(metavar="N", min=1, help="Without --row: number of best, worst and suspicious rows.")
    ] = 5,
    data: Annotated[Path | None, typer.Option(help="The scored file, if it was moved.")] = None,
    as_json: Json = False,
) -> None:
    """Explain why a training row was drawn, gated or suspected; without --row, list the rows to look at first.

    Example: tsqlora explain run --row 17

    Example: tsqlora explain scores.parquet --samples 10
    """
    from tsqlora.run.explain import explain_samples, explain_source

    if row is None:
        console.show(explain_samples(source, samples, data=data), as_json, show_explained)
    else:
        console.show(explain_source(source, row, data=data), as_json, show_row)


def select(
    scores: Annotated[Path, typer.Argument(metavar="SCORES", help="Output of `tsqlora score`.")],
    out: Annotated[Path, typer.Option(help="File to write: .jsonl, .csv, .tsv or .parquet.")],
    fraction: Annotated[float, typer.Option(help="Share of the rows, above 0 and at most 1.")],
    seed: Annotated[int, typer.Option(help="Seed of the draw.", min=0)] = 0,
    data: Annotated[Path | None, typer.Option(help="The scored file, whose rows are written.")] = None,
    as_json: Json = False,
) -> None:
    """Draw a quality sample by scores and write its rows, for any trainer.

    Example: tsqlora select scores.parquet --fraction 0.3 --data train.jsonl --out subset.jsonl
    """
    from tsqlora.quality.select import select_rows

    rows = select_rows(scores, out, fraction=fraction, seed=seed, data=data)
    console.show({"out": str(out), "rows": rows}, as_json, show_numbers)


def allocate(
    source: Source,
    out: Annotated[Path, typer.Option(help="JSON file to write.")],
    set_: Set = None,
    as_json: Json = False,
) -> None:
    """Allocate ranks by sensitivity, and write them as arguments of PEFT's LoraConfig.

    Example: tsqlora allocate tsq.yaml --out ranks.json
    """
    from tsqlora.data.write import require_place
    from tsqlora.run.config import load_config

    require_place(out)
    with writing(out):
        if not source.is_dir():
            require_inputs(load_config(source, set_ or []))
        from tsqlora.run.allocate import allocate_ranks  # after these checks, since torch takes seconds to import

        with Display(console.stderr) as display:
            arguments = allocate_ranks(source, overrides=set_ or [], progress=display.progress)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(out, arguments)
    console.show({"out": str(out), **arguments}, as_json, show_allocation)


def audit(
    source: Annotated[str | None, typer.Argument(metavar="CONFIG|DATA", help="A YAML file, or labelled rows.")] = None,
    model: Annotated[str | None, typer.Option(help="Directory or hub id; by default the config's, or MiniLM.")] = None,
    review: Annotated[int, typer.Option(metavar="N", min=0, help="Add N rows that are not suspects, as a check.")] = 0,
    deep: Annotated[
        bool, typer.Option("--deep", help="Fine-tune in three folds: slower, and finds more where classes are few.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option(help="Directory to write; by default a dated one under runs/, or the audit's.")
    ] = None,
    apply: Annotated[
        Path | None, typer.Option(metavar="CSV", help="Reviewed table: write the rows with its corrections.")
    ] = None,
    set_: Set = None,
    as_json: Json = False,
) -> None:
    """List likely label errors before any training, as a table and as a page for review.

    With --apply, write the rows as your reviewed table corrects them, and the
    reviewed ones as trusted.jsonl, for data.trusted.

    Example: tsqlora audit train.csv --review 100 --out audit
    """
    if (source is None) == (apply is None):
        raise SettingsError("audit needs rows (a CONFIG or DATA), or a reviewed table with --apply")
    if apply is not None:
        from tsqlora.run.config import load_config
        from tsqlora.run.review import apply_review

        others = [override for override in set_ or [] if not override.startswith("data.encoding=")]
        if model is not None or review or deep or others:
            raise SettingsError(
                "--apply only corrects labels; remove --model, --review, --deep and each --set but data.encoding"
            )
        sections = {"model": {"path": "."}, "data": {"train": str(apply)}}
        encoding = load_config(None, set_ or [], sections=sections).data.encoding
        console.show(apply_review(apply, out, encoding=encoding), as_json, show_review)
        return
    from tsqlora.compat.hub import require_model
    from tsqlora.data.sources import require_source
    from tsqlora.run.config import load_config

    if model is not None:
        require_model(model)
    if Path(str(source)).suffix.lower() in (".yaml", ".yml"):
        named = {} if model is None else {"model": {"path": model}}
        require_inputs(load_config(source, set_ or [], sections=named))
    else:
        require_source(str(source))
    from tsqlora.run.audit import run_audit  # after these checks, since torch takes seconds to import

    with Display(console.stderr) as display:
        options = {"model": model, "review": review, "deep": deep, "out": out, "overrides": set_ or []}
        result = run_audit(str(source), **options, progress=display.progress)
    console.show(result, as_json, show_audit)
