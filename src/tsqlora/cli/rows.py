"""Commands that choose rows and ranks for any trainer: score, explain, select, allocate."""

from pathlib import Path
from typing import Annotated

import typer

from tsqlora.cli import console
from tsqlora.cli.display import show_allocation, show_audit, show_explained, show_numbers, show_row, show_scoring_plan
from tsqlora.cli.options import Json, Set, Source
from tsqlora.cli.progress_bars import Display
from tsqlora.errors import SettingsError
from tsqlora.files import write_json


def score(
    source: Source,
    out: Annotated[Path | None, typer.Option(help="Parquet file to write.")] = None,
    set_: Set = None,
    drop: Annotated[
        list[str] | None,
        typer.Option(metavar="KIND", help="Kind of rows that is never drawn: duplicate, outlier; repeatable."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan, score nothing.")] = False,
    as_json: Json = False,
) -> None:
    """Scores every training row: with a fitted head on a config's model, or by the weights of a run.

    Without data.validation a tenth of the rows is held out, as in training.
    Of a RUN and another file (--set data.train=...) every row is scored.
    Rows are never all in memory. A scoring that was cut off goes on when the
    same command is given again: what it has is kept in OUT.partial until it is
    done.

    Example: tsqlora score tsq.yaml --out scores.parquet
    """
    from tsqlora.run.score import plan_scoring, score_rows

    if source.suffix == ".parquet" and source.is_file():
        raise SettingsError(f"{source} is no CONFIG and no RUN; `tsqlora explain {source}` shows what scores say")
    if dry_run:
        console.show(plan_scoring(source, overrides=set_ or [], drop=drop or []), as_json, show_scoring_plan)
        return
    if out is None:
        raise SettingsError("score writes a file; name it: --out scores.parquet")
    with Display(console.stderr) as display:
        scores = score_rows(source, out, overrides=set_ or [], drop=drop or [], progress=display.progress)
    # Of gradients nothing is known where the model is at chance.
    names = ("eta", "effective_sample_size", "reference_rows", "weights", "temperature", "scope")
    counts = {"rows": len(scores), "kept": int(scores.kept.sum()), "held_out": scores.record.held_out}
    record = {name: getattr(scores.record, name) for name in names}
    console.show({"scores": str(out), **counts, **record}, as_json, show_numbers)


def explain(
    source: Annotated[Path, typer.Argument(metavar="RUN|SCORES", help="What `train` or `score` wrote.")],
    row: Annotated[int | None, typer.Option(metavar="N", min=0, help="The row's number in its file, from 0.")] = None,
    samples: Annotated[
        int, typer.Option(metavar="N", min=1, help="Without --row: so many best, worst and most suspicious rows.")
    ] = 5,
    data: Annotated[Path | None, typer.Option(help="The scored file, where it is not found.")] = None,
    as_json: Json = False,
) -> None:
    """Says why a training row was drawn, gated or suspected; without --row, shows the rows to look at first.

    Example: tsqlora explain run --row 17

    Example: tsqlora explain scores.parquet --samples 10
    """
    from tsqlora.run.explain import explain_samples, explain_source

    if row is None:
        console.show(explain_samples(source, samples, data=data), as_json, show_explained)
    else:
        console.show(explain_source(source, row, data=data), as_json, show_row)


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
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(out, arguments)
    console.show({"out": str(out), **arguments}, as_json, show_allocation)


def audit(
    source: Annotated[str | None, typer.Argument(metavar="CONFIG|DATA", help="A YAML file, or labelled rows.")] = None,
    model: Annotated[str | None, typer.Option(help="Directory or hub id; else the config's, or MiniLM.")] = None,
    review: Annotated[int, typer.Option(metavar="N", min=0, help="Add N rows to check that are no suspects.")] = 0,
    out: Annotated[
        Path | None, typer.Option(help="Directory to write into; else a dated one under runs/, or the audit's.")
    ] = None,
    apply: Annotated[
        Path | None, typer.Option(metavar="CSV", help="Write the rows as this reviewed table corrects them.")
    ] = None,
    set_: Set = None,
    as_json: Json = False,
) -> None:
    """Finds likely wrong labels, before any training: a table, and a page to go through them.

    With --apply the table that you reviewed corrects the rows; those that you
    reviewed become trusted.jsonl, which data.trusted takes.

    Example: tsqlora audit train.csv --review 100 --out audit
    """
    if (source is None) == (apply is None):
        raise SettingsError("audit takes rows (a CONFIG or DATA), or else a reviewed table: --apply suspects.csv")
    if apply is not None:
        from tsqlora.run.review import apply_review

        if model is not None or review or set_:
            raise SettingsError("--apply only corrects labels; leave out --model, --review and --set")
        console.show(apply_review(apply, out), as_json, show_numbers)
        return
    from tsqlora.run.audit import run_audit

    with Display(console.stderr) as display:
        found = run_audit(
            str(source), model=model, review=review, out=out, overrides=set_ or [], progress=display.progress
        )
    console.show(found, as_json, show_audit)
