"""Read a run's directory, in bounded size, and render its page; the same run gives the same bytes."""

import math
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from shlex import quote
from typing import Any

import numpy as np

from tsqlora.adapter.doctor import ways_to_serve
from tsqlora.auditing.page import Table, render
from tsqlora.auditing.reasons import WHY, evident, likely_wrong, lists_of, named, texts_or_why
from tsqlora.auditing.scores import REASONS, Scores
from tsqlora.errors import DataError, SettingsError
from tsqlora.files import reading
from tsqlora.libs.yaml import dump_yaml, load_yaml
from tsqlora.record import MOST_EVENTS, RunRecord, look_sentences
from tsqlora.run_dir import ADAPTER_DIR, CONFIG_FILE, RECORD_FILE, SCORES_FILE
from tsqlora.training.report import figures

MOST_CLASSES, CONFUSED = 20, 20
"""Classes of a map of confusions, and lines of its table."""
LOGGED = 60
"""Rows of the table of the log."""
_NAMED = (("model", "path"), ("data", "train"))
"""Settings whose last part heads the page."""
OF_A_KIND = 100
"""Rows per list; at most a third of all rows."""
LONGEST = 500
"""Characters of a text on the page."""
LISTS = {"suspicious": "most suspicious", "highest": "highest Q", "lowest": "lowest Q"}
EVIDENT, DOUBTED = "likely wrong", "contradicted"
"""The mark of rows that the model contradicts with confidence, by whether there is evidence of wrong labels."""
PHRASES = {EVIDENT: "likely wrong label", DOUBTED: "the model contradicts the label"}


@dataclass(frozen=True, slots=True)
class Samples:
    """The rows to look at, as values for the page; `without_texts` is why texts are missing, or None.

    `label` is the heading of the labels, "target tokens" for text. `reasons` counts all rows by reason. `doubt` marks
    the rows for which the model predicts another class with confidence.
    """

    rows: list[dict[str, Any]]
    lists: list[str]
    label: str
    terms: tuple[str, ...]
    all: int
    reasons: dict[str, int]
    doubt: str
    without_texts: str | None


def choose_samples(scores: Scores, texts: Sequence[str] | None = None) -> Samples:
    """The most suspicious rows and those of highest and lowest Q, each list in its order.

    If all rows have the same Q, there are no lists of it. Raises SettingsError if there is not one text
    per row.
    """
    chosen = lists_of(scores, min(OF_A_KIND, math.ceil(len(scores) / 3)))
    same = np.ptp(scores.quality) == 0
    lists = {
        title: chosen[name].tolist()
        for name, title in LISTS.items()
        if name in chosen and (name == "suspicious" or not same)
    }
    order = list(dict.fromkeys(j for rows in lists.values() for j in rows))
    if texts is not None and len(texts) != len(scores):
        raise SettingsError(f"{len(texts)} texts for {len(scores)} scored rows; pass one text per row, in order")
    shown, why = texts_or_why(scores, order) if texts is None else ({j: str(texts[j]) for j in order}, None)
    predicted = bool(scores.stratified and scores.predictions)
    wrong = likely_wrong(scores) if predicted else np.zeros(len(scores), dtype=np.bool_)
    doubt = EVIDENT if evident(scores) else DOUBTED
    predictions, sure = (scores.predictions.get(name) for name in ("predicted", "predicted_probability"))
    rows, columns = list[dict[str, Any]](), (scores.quality, scores.probability, *scores.terms.values())
    for j in order:
        text, reason = shown.get(j), REASONS[int(scores.reason_codes[j])]
        if text is not None and len(text) > LONGEST:
            end = LONGEST // 3  # the end of a generation sample is its target
            text = f"{text[: LONGEST - end - 3]} … {text[-end:]}"
        marks = [name for name, own in lists.items() if j in own] + [doubt] * bool(wrong[j])
        phrases = [PHRASES.get(mark, mark) for mark in marks]
        prediction = "" if predictions is None else _label(scores, predictions[j])
        row = {
            "id": int(scores.row_ids[j]),
            "text": text,
            "label": _label(scores, scores.labels[j]),
            "prediction": prediction if sure is None else f"{prediction} ({sure[j]:.0%})",
            "doubt": bool(wrong[j]),
            "numbers": [float(values[j]) for values in columns],
            # The page's filters that show this row, and why it is shown.
            "marks": marks + ["left out"] * (reason != "kept"),
            "why": ", ".join(phrases + [f"left out: {WHY[reason]}"] * (reason != "kept")),
        }
        rows.append(row)
    return Samples(
        rows=rows,
        lists=[*lists],
        label="label" if scores.record.format is None else "target tokens",
        terms=tuple(scores.terms),
        all=len(scores),
        reasons={name: int((scores.reason_codes == code).sum()) for code, name in enumerate(REASONS)},
        doubt=doubt,
        without_texts=why,
    )


def _label(scores: Scores, value: Any) -> str:
    label = named(scores, value)
    if isinstance(label, list):
        return ", ".join(map(str, label)) or "none"
    return f"{label:.4g}" if isinstance(label, float) else str(label)


def run_page(run: Path, script: str, texts: Sequence[str] | None = None) -> str:
    """Read run.json, config.yaml, scores.parquet and, if it still exists, the file of the training rows; render them.

    `script` as in `render`; `texts` are the scored rows' texts, if the scores do not name their source. For a training
    in the user's own Trainer, run.json has the settings.  Raises DataError if the directory is no run or cannot be
    read.
    """
    record, name = RunRecord.load(run), run.resolve().name
    if record.settings:
        settings, config = dump_yaml(record.settings), record.settings
    else:
        settings, config = read_config(run / CONFIG_FILE)
    # A Trainer's output_dir may hold the scores of an earlier training.
    scored = (record.quality.get("enabled") or not record.settings) and (run / SCORES_FILE).exists()
    scores = Scores.load(run / SCORES_FILE) if scored else None
    servers = dict[str, list[str]]()
    with suppress(DataError):  # of an adapter that cannot be read: `tsqlora doctor`, which the page names, says why
        servers = ways_to_serve(run / ADAPTER_DIR)[0] if (run / ADAPTER_DIR).is_dir() else {}
    base, rows = (str(config.get(s, {}).get(k)).rstrip("/").split("/")[-1] for s, k in _NAMED)
    evaluated = next((e for e in reversed(record.history) if any(n.startswith("eval_") for n in e)), {})
    epochs, drawn = record.plan.get("epochs", 0), _drawn(record, scores)
    return render(
        "run.html",
        script=script,
        figures=[figure for part in drawn.values() for figure in part],
        dark=figures.DARK,
        frames=figures.rank_frames(record.plan["ranks"], record.rank_events),
        drawn=drawn,
        title=f"{name}: report of a run",
        name=name,
        about=f"{record.task} · {base} on {rows} · seed {record.seed}",
        settings=settings,
        record=record,
        plan=record.plan,
        samples=None if scores is None else choose_samples(scores, texts),
        missing=_missing(record, config, scored=scores is not None),
        servers=servers,
        scored=scored_at(record),
        epochs="1 epoch" if epochs == 1 else f"{epochs} epochs",
        looks_text=look_sentences(record.quality),
        why=WHY,
        command=f"tsqlora train {quote(name)}/config.yaml --out {quote(name)}-again",
        tables=_tables(record),
        losses=[entry for entry in record.history if "eval_loss" in entry],
        evaluated={n.removeprefix("eval_"): value for n, value in evaluated.items() if n.startswith("eval_")},
        written=f"{datetime.fromtimestamp(record.now['time'], UTC):%H:%M:%S} UTC" if record.now else None,
        **_ranks(record),
    )


def read_config(path: Path) -> tuple[str, dict[str, Any]]:
    """The text and the settings of a run's config.yaml.  Raises DataError for any other file."""
    reading(path)
    try:
        text = path.read_text(encoding="utf-8")
        config = dict(load_yaml(text))
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; copy the run's settings beside {RECORD_FILE}") from None
    except (ValueError, TypeError) as error:
        raise DataError(f"{path}: no settings of a run ({str(error).splitlines()[0]})") from None
    data = config.get("data")
    for name, path in data.items() if isinstance(data, dict) else ():
        if name in ("train", "trusted", "validation", "test") and path is not None:
            reading(str(path))
    return text, config


def _missing(record: RunRecord, config: dict[str, Any], *, scored: bool) -> dict[str, str]:
    """Why the page lacks scores, a log or moves of ranks."""
    running, missing = record.status != "finished", dict[str, str]()
    if not scored and not record.quality.get("enabled"):
        why = "there was no QualityCallback" if record.settings else "quality.enabled is false"
        missing["scores"] = f"Rows were not scored: {why}, so every draw was random."
    elif not scored and running:
        missing["scores"] = "Rows are not scored yet; this happens before the first step."
    elif not scored:
        missing["scores"] = f"The directory has no {SCORES_FILE}, so the page has no rows."
    if not record.history:
        no_log = "logging_strategy is no, or logging_steps is above the number of steps"
        missing["history"] = "Nothing is logged yet." if running else f"The run logged no losses: {no_log}."
    if not record.rank_events and config.get("ranks") is None:
        missing["events"] = "Ranks did not change: there was no RankCallback."
    elif not record.rank_events and config["ranks"].get("policy") == "fixed":
        missing["events"] = "Ranks never moved: ranks.policy is fixed."
    elif not record.rank_events:
        why = "Ranks never moved; the notes on this page say why."
        missing["events"] = "Ranks have not moved yet." if running else why
    return missing


def _drawn(record: RunRecord, scores: Scores | None) -> dict[str, list[figures.Drawn]]:
    """The figures of each part of the page."""
    labels, events = record.labels or [], record.rank_events
    measured, few = [event for event in events if event.sensitivity], len(labels) <= MOST_CLASSES
    return {
        "confusions": [figures.confusion_map(labels, record.confusions)] if record.confusions and few else [],
        "curves": figures.curves(record.history, looks=scored_at(record), events=events) if record.history else [],
        "ranks": [figures.rank_map(record.plan["ranks"], events)] if events else [],
        "sensitivity": figures.sensitivity_maps(measured) if measured else [],
        "distributions": [] if scores is None else figures.histograms(scores),
    }


def scored_at(record: RunRecord) -> list[int]:
    """Steps after which rows were scored."""
    if "looks" in record.quality:
        return [look["step"] for look in record.quality["looks"] if "kept" in look]
    scores = record.quality.get("scores", {})
    if "step" in scores:
        return [int(scores["step"])]
    return [round(scores["epoch"] * record.plan["steps"] / record.plan["epochs"])] if "epoch" in scores else []


def _ranks(record: RunRecord) -> dict[str, Any]:
    """How often ranks were adjusted, and the layers that gained and lost most, if any."""
    first, last, events = record.plan["ranks"], record.ranks, record.rank_events
    change = {layer: rank - first.get(layer, 0) for layer, rank in last.items()}
    layers = (
        [max(change, key=lambda n: change[n]), min(change, key=lambda n: change[n])] if any(change.values()) else []
    )
    return {
        # Beyond MOST_EVENTS, only every second event is recorded.
        "looks": f"{'at least ' if len(events) > MOST_EVENTS // 2 else ''}{len(events):,} times",
        "most_frames": figures.FRAMES,
        "extremes": [{"layer": layer, "first": first.get(layer, 0), "last": last[layer]} for layer in layers],
    }


def _tables(record: RunRecord) -> dict[str, Table]:
    grid, events = figures.Grid(list(record.plan["ranks"])), [e for e in record.rank_events if e.sensitivity]
    ranks = [
        [kind, *("" if rank is None else rank for rank in ranks)]
        for kind, ranks in zip(grid.kinds, grid.rows(record.ranks), strict=True)
    ]
    first, last = (figures.shares(events[j]) if events else {} for j in (0, -1))
    shares = [[layer, f"{first.get(layer, 0):.2f}", f"{share:.2f}"] for layer, share in last.items()]
    cost = [
        [name, f"{phase.seconds:,.1f}", f"{phase.forward:,}", f"{phase.backward:,}", f"{phase.tokens:,}"]
        for name, phase in record.cost.items()
    ]
    metrics = [[split, n, f"{value:.4f}"] for split, values in record.metrics.items() for n, value in values.items()]
    history = figures.thinned(record.history, LOGGED)
    labels, rows = record.labels or [], Counter[int]()
    for label, _, count in record.confusions:
        rows[label] += count
    mixed = sorted((one for one in record.confusions if one[0] != one[1]), key=lambda one: -one[2])
    confused = [[labels[a], labels[b], f"{n:,}", f"{n / rows[a]:.0%}"] for a, b, n in mixed[:CONFUSED]]
    names = list(dict.fromkeys(n for entry in history for n in entry if n not in ("step", "epoch")))
    log = [[f"{entry['step']:,}", *(f"{entry[n]:.4g}" if n in entry else "" for n in names)] for entry in history]
    return {
        "confusions": Table("Most confused", ["class", "predicted", "rows", "of the class"], confused, texts=[1]),
        "history": Table("Log", ["step", *names], log),
        "ranks": Table("Rank by block", ["kind", *grid.blocks], ranks),
        "sensitivity": Table("Share in percent", ["layer", "first", "last"], shares),
        "cost": Table("Cost by phase", ["phase", "seconds", "rows forward", "rows backward", "tokens"], cost),
        "metrics": Table("Metrics", ["rows", "metric", "value"], metrics, texts=[1]),
        "versions": Table("Versions", ["library", "version"], list(record.versions.items()), texts=[1]),
    }
