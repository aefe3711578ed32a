"""Commands that choose rows for any trainer: score, explain, select, audit."""

from pathlib import Path
from shlex import quote
from typing import Annotated, Any

import typer

from tsqlora.cli import console
from tsqlora.cli.console import Json, Set, Source
from tsqlora.cli.runs import require_inputs
from tsqlora.errors import SettingsError

FORMAT = ("format", "prompt", "target", "messages", "text")
"""The settings of `data` that name the columns of texts."""


def score(
    source: Source,
    out: Annotated[Path, typer.Option(help="Parquet file to write.")],
    look: Annotated[
        Path | None, typer.Option(metavar="LOOK", help="Score a file of rows by a folder of `tsqlora look`.")
    ] = None,
    set_: Set = None,
    as_json: Json = False,
) -> None:
    """Score every training row: with a config's model and a fitted head, or with the weights of a run.

    It measures the terms that the rule weighs; the default rule takes one forward pass. The paper's
    three terms (--set quality.preset=paper) take four times as long.
    Without data.validation a tenth of the rows is held out, as in training.
    For a RUN and another file (--set data.train=...) every row is scored.
    Rows are read in chunks. OUT.partial has the progress until the end, and the
    same command resumes an interrupted scoring.

    With --look, name a file of rows in place of CONFIG. Each row is scored alone, by the head and the
    judge of the look: a labelled row gets its loss, a prediction, and the probability that its label is
    wrong; a text its loss, and the probability that its answer does not fit. Parts of a large table can
    be scored anywhere; `tsqlora select` draws from all of them.

    Example: tsqlora score tsq.yaml --out scores.parquet

    Example: tsqlora score part-007.jsonl --look LOOK --out parts/007.parquet
    """
    from tsqlora.settings import load_config

    if look is not None:
        from tsqlora.rows.sources import require_source

        require_source(str(source))
        if set_:
            raise SettingsError("--set cannot be used with --look, which has the settings of the look; leave it out")
        from tsqlora.training.look import score_by_look

        with console.progress() as display:
            scores = score_by_look(str(source), look, out, progress=display.progress)
        result = {"scores": str(out), "rows": len(scores), "kept": int(scores.kept.sum()), "dropped": scores.dropped}
        console.show({**result, "missing": scores.record.about["missing"]}, as_json, "show_numbers")
        return

    if source.suffix == ".parquet" and source.is_file():
        raise SettingsError(f"{source} is neither CONFIG nor RUN; `tsqlora explain {quote(str(source))}` shows scores")
    if not source.is_dir():
        require_inputs(load_config(source, set_ or []))
    from tsqlora.training.score import score_rows  # after these checks, since torch takes seconds to import

    with console.progress() as display:
        scores = score_rows(source, out, overrides=set_ or [], progress=display.progress)
    names = ("draw", "weights", "temperature", "effective_sample_size", "noise", "reference_rows", "eta")
    record = {name: getattr(scores.record, name) for name in names}
    result = {"scores": str(out), "rows": len(scores), "kept": int(scores.kept.sum()), "dropped": scores.dropped}
    result["held_out"] = scores.record.held_out
    console.show({**result, **record}, as_json, "show_scores")


def explain(
    source: Annotated[Path, typer.Argument(metavar="RUN|SCORES", help="Output of `train` or `score`.")],
    row: Annotated[int | None, typer.Option(metavar="N", min=0, help="The row's number in its file, from 0.")] = None,
    samples: Annotated[
        int, typer.Option(metavar="N", min=1, help="Without --row: number of best, worst and suspicious rows.")
    ] = 5,
    data: Annotated[Path | None, typer.Option(help="The scored file, if it was moved.")] = None,
    as_json: Json = False,
) -> None:
    """Explain why a training row was drawn, left out or suspected; without --row, list the rows to look at first.

    Example: tsqlora explain run --row 17

    Example: tsqlora explain scores.parquet --samples 10
    """
    from tsqlora.auditing.reasons import explain, explain_source, scores_of

    if row is None:
        console.show(explain(scores_of(source), samples, data=data), as_json, "show_explained")
    else:
        console.show(explain_source(source, row, data=data), as_json, "show_row")


def select(
    scores: Annotated[
        Path, typer.Argument(metavar="SCORES", help="Output of `tsqlora score`; or a folder or a pattern of parts.")
    ],
    out: Annotated[Path, typer.Option(help="File to write: .jsonl, .csv, .tsv or .parquet.")],
    fraction: Annotated[float, typer.Option(help="Share of the rows, above 0 and at most 1.")],
    seed: Annotated[int, typer.Option(help="Seed of the draw.", min=0)] = 0,
    data: Annotated[
        Path | None, typer.Option(help="The scored file, whose rows are written; for parts, the folder of their files.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Draw rows by their scores, and write them for any trainer.

    Example: tsqlora select scores.parquet --fraction 0.3 --data train.jsonl --out subset.jsonl
    """
    from tsqlora.auditing.draw.select import select_rows

    rows = select_rows(scores, out, fraction=fraction, seed=seed, data=data)
    console.show({"out": str(out), "rows": rows}, as_json, "show_numbers")


def audit(
    source: Annotated[
        str | None, typer.Argument(metavar="CONFIG|DATA", help="A YAML file, or rows: labelled, or texts.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="Directory or hub id; by default the config's, or MiniLM.")] = None,
    review: Annotated[int, typer.Option(metavar="N", min=0, help="Add N rows that are not suspects, as a check.")] = 0,
    out: Annotated[
        Path | None, typer.Option(help="Directory to write; by default a dated one under runs/, or the audit's.")
    ] = None,
    apply: Annotated[
        Path | None, typer.Option(metavar="CSV", help="Reviewed table: write the rows with its corrections.")
    ] = None,
    eval_: Annotated[
        str | None,
        typer.Option("--eval", metavar="FILE", help="For text: evaluation rows, to find among the training rows."),
    ] = None,
    chat_template: Annotated[Path | None, typer.Option(help="For text: a Jinja file, in place of the model's.")] = None,
    prepared: Annotated[Path | None, typer.Option(metavar="DIR", help="A set that a trainer has prepared.")] = None,
    data: Annotated[str | None, typer.Option(help="With --prepared: the source rows.")] = None,
    baseline: Annotated[
        Path | None, typer.Option(metavar="JSON", help="For text: an earlier findings.json, to show what changed.")
    ] = None,
    drop_findings: Annotated[
        str | None,
        typer.Option(metavar="NAMES", help="For text: move rows with these findings to quarantine.jsonl."),
    ] = None,
    no_model: Annotated[
        bool, typer.Option("--no-model", help="For text: check only the tokens; the model reads no answers.")
    ] = False,
    all_: Annotated[bool, typer.Option("--all", help="For text: read every answer, not those of 2,000 rows.")] = False,
    strict: Annotated[
        bool, typer.Option("--strict", help="For text: exit with 4 on a finding that is an error.")
    ] = False,
    set_: Set = None,
    as_json: Json = False,
) -> None:
    """Show what is wrong with rows before any training: likely label errors, or what becomes of each row of text.

    For labelled rows, write a table and a page for review. With --apply, write the rows with
    your corrections, and the reviewed ones as trusted.jsonl, for data.trusted.

    For chats, instructions and preferences, write the ledger (what --model would be trained on, row by
    row) and findings, each with its rows and cure. With --apply, write clean.jsonl and quarantine.jsonl.

    Example: tsqlora audit train.csv --review 100 --out audit

    Example: tsqlora audit chats.jsonl --model M --eval test.jsonl --out audit
    """
    _require_one(source, apply, drop_findings, prepared, out)
    of_text = {"--eval": eval_, "--no-model": no_model, "--all": all_, "--strict": strict, "--baseline": baseline}
    of_raw = {"--chat-template": chat_template}
    from tsqlora.settings import NO_TOKENIZER, config_of, is_yaml, text_config

    if apply or drop_findings:
        others = {"--data": data, "--model": model, "--review": review}
        _refuse({**of_text, **of_raw, **others}, "to apply a review, which only needs --out")
        if not all(override.startswith("data.encoding=") for override in set_ or []):
            raise SettingsError("--apply only applies a review; remove each --set but data.encoding")
        encoding = config_of(str(apply), ".", set_ or []).data.encoding
        _apply(apply or out or Path(), drop_findings, out, as_json, encoding)
        return
    from tsqlora.libs.hub import require_model
    from tsqlora.rows.sources import require_source

    if model is not None:
        require_model(model)
    for further in filter(None, (eval_, data if prepared else None)):
        require_source(further)
    if is_yaml(str(source)):
        require_inputs(config_of(str(source), model, set_ or []))
    elif prepared is None:
        require_source(str(source))
    config = None if prepared is not None else text_config(str(source), model, set_ or [])
    if config is None and prepared is None:
        cure = "leave it out, or add --set task.type=causal-lm for an audit of answers"
        _refuse({**of_text, **of_raw, "--data": data}, "in an audit of labels", cure)
        from tsqlora.auditing.command import run_audit  # after these checks, since torch takes seconds to import

        with console.progress() as display:
            options = {"model": model, "review": review, "out": out, "overrides": set_ or []}
            result = run_audit(str(source), **options, progress=display.progress)
        console.show(result, as_json, "show_audit")
        return
    options = {"evaluation": eval_, "baseline": baseline, "answers": not no_model, "every": all_, "prepared": prepared}
    if config is None:
        _refuse({**of_raw, "--review": review, "--set": set_}, "in an audit of a prepared set")
    else:
        _refuse({"--data": data, "--review": review}, "in an audit of text")
        model, data = config.model.path, config.data.train
        options["named"] = {name: getattr(config.data, name) for name in FORMAT}
        options |= {"max_length": config.data.max_length, "hints": config.data.hints, "chat_template": chat_template}
        options |= {"batch": config.training.batch_size, "trust_remote_code": config.model.trust_remote_code}
    if model is None:
        raise SettingsError(NO_TOKENIZER)
    from tsqlora.auditing.texts.command import audit_text
    from tsqlora.run_dir import dated

    folder = out or dated(f"audit-{(prepared or Path(str(data))).stem}")
    with console.progress() as display:
        result = audit_text(data, model=model, out=folder, progress=display.progress, tell=display.say, **options)
    console.show(result, as_json, "show_text_audit")
    if strict and any(finding["severity"] == "error" for finding in result["findings"]):
        raise typer.Exit(4)


def _require_one(
    source: str | None, apply: Path | None, drop_findings: str | None, prepared: Path | None, out: Path | None
) -> None:
    """Raise SettingsError unless there is one thing to audit, or one audit to apply."""
    sources = [one for one in (source, prepared, apply or drop_findings) if one]
    if not sources:
        raise SettingsError("audit needs rows (a CONFIG or DATA), --prepared DIR, or a review with --apply")
    if len(sources) == 1:
        return
    later = f"--apply {quote(str(apply))}" if apply else f"--drop-findings {quote(drop_findings or '')}"
    folder = quote(str(out or "AUDIT"))
    line = (
        f"tsqlora audit {quote(str(source or prepared))} --out {folder}, and then: tsqlora audit {later} --out {folder}"
    )
    why = f"{later.split()[0]} needs an earlier audit; type {line}"
    if not (apply or drop_findings):
        later, why = "--prepared", f"type `tsqlora audit --prepared {quote(str(prepared))} --data {quote(str(source))}`"
    raise SettingsError(f"{'DATA' if source else '--prepared'} and {later.split()[0]} do not go together; {why}")


def apply(
    review: Annotated[
        Path, typer.Argument(metavar="CSV|DIR", help="A reviewed table, or the directory of an audit of text.")
    ],
    drop: Annotated[
        str | None, typer.Option(metavar="NAMES", help="For text: quarantine the rows with these findings.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Directory to write; by default the audit's.")] = None,
    as_json: Json = False,
) -> None:
    """Write the rows of an audit as you reviewed them.

    Of labels: the rows with your corrections, and the reviewed ones as trusted.jsonl, for data.trusted.
    Of text: clean.jsonl and quarantine.jsonl.

    Example: tsqlora apply audit/reviewed.csv

    Example: tsqlora apply audit --drop duplicate,empty_answer --out clean
    """
    _apply(review, drop, out, as_json)


def _apply(review: Path, drop: str | None, out: Path | None, as_json: bool, encoding: str | None = None) -> None:
    from tsqlora.auditing.review import apply_review

    names = [name.strip() for name in (drop or "").split(",") if name.strip()]
    console.show(apply_review(review, out, drop=names, encoding=encoding), as_json, "show_review")


def _refuse(options: dict[str, Any], what: str, cure: str = "leave it out") -> None:
    """Raise SettingsError for options that are given and have no effect."""
    if idle := [name for name, value in options.items() if value]:
        raise SettingsError(f"{', '.join(idle)} cannot be used {what}; {cure}")
