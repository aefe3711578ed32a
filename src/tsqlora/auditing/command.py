"""`tsqlora audit`: list likely label errors of a file in a table and a page for review; nothing is trained."""

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
from torch import nn

from tsqlora.auditing.labels.judge import DOUBT, FEWEST
from tsqlora.auditing.labels.suspects import MOST_CONTRADICTIONS, Audit, audit
from tsqlora.auditing.review_page import audit_page
from tsqlora.errors import SettingsError
from tsqlora.files import digest, write_json, write_text
from tsqlora.model.named import device_of, load_model, read, require_of_task, trained_task
from tsqlora.model.request import Compute, RowNames
from tsqlora.progress import Progress
from tsqlora.rows.batches import IGNORED
from tsqlora.rows.labels import class_finder, join_labels, labels_at, plain_label, require_separable, split_labels
from tsqlora.rows.rows import row_text
from tsqlora.rows.sources import absolute, folder_digest, kind_of, open_table
from tsqlora.rows.splits import prepare
from tsqlora.rows.table import Table
from tsqlora.rows.write import require_place, without_formulas, write_rows
from tsqlora.run_dir import dated
from tsqlora.seeds import stream
from tsqlora.settings import ENCODER, Config, config_of
from tsqlora.tasks import get_task, require_classes

SUSPECTS_FILE, PAGE_FILE, AUDIT_FILE, FINDINGS_FILE = "suspects.csv", "audit.html", "audit.json", "findings.json"
TOKENS = 128
"""Most tokens of a row without data.max_length: the beginning of a text shows its class."""
BATCH_SIZE = 64
LEAST = 100
"""Least rows in the list: without evidence, the first rows show a reader whether more are worth the time."""
FIRST = 10
"""Suspects in the command's output."""


def run_audit(
    source: str,
    *,
    model: str | None = None,
    review: int = 0,
    out: Path | None = None,
    overrides: Sequence[str] = (),
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Audit the training rows of a config, or a data file; write suspects.csv, audit.html and audit.json.

    `review` adds that many rows that are not suspects, drawn from all classes. Raises SettingsError if there is no
    model, and if `out` holds an audit already; UnsupportedError for another task.
    """
    start = time.perf_counter()
    config = config_of(source, model, overrides)
    require_classes(get_task(config.task.type))
    folder = out or dated(f"audit-{Path(source).stem}")
    require_new(folder)
    table, result, notes = audited(config, progress)
    listing = make_listing(result, table, review=review, seed=config.training.seed)
    about = _about(config, table, result, listing, notes)
    page = audit_page(folder, about, listing)
    cells = [
        {
            "row": row["row"],
            **({} if row["token"] is None else {"token": row["token"], "word": row["word"]}),
            **{name: row[name] for name in ("text", "label", "suggested_label")},
            "wrong_probability": "" if row["wrong_probability"] is None else f"{row['wrong_probability']:.4f}",
            "reviewed_label": "",  # for the reader to fill in
            "kind": row["kind"],
            "near_row": row["near"],
        }
        for row in listing
    ]
    write_audit(folder / AUDIT_FILE, about, cells, page)
    return {
        "out": str(folder),
        "page": str(folder / PAGE_FILE),
        "suspects": str(folder / SUSPECTS_FILE),
        **about,
        "first": listing[:FIRST],
        "seconds": time.perf_counter() - start,
    }


def require_new(folder: Path) -> None:
    """Raise SettingsError if a folder holds an audit already, or cannot hold one."""
    if folder.exists() and not folder.is_dir():
        raise SettingsError(f"--out {folder} is a file; name a directory")
    if any((folder / name).exists() for name in (AUDIT_FILE, FINDINGS_FILE, SUSPECTS_FILE)):
        raise SettingsError(f"{folder} holds an audit, maybe with your review; choose another --out")
    require_place(folder / AUDIT_FILE)


def write_audit(record: Path, about: Mapping[str, Any], cells: Sequence[Mapping[str, Any]], page: str) -> None:
    """Write the record of an audit, and beside it suspects.csv and the page."""
    record.parent.mkdir(parents=True, exist_ok=True)
    write_rows(record.parent / SUSPECTS_FILE, without_formulas(cells)[0])
    write_text(record.parent / PAGE_FILE, page, private=True)
    write_json(record, about)


def audited(config: Config, progress: Progress | None) -> tuple[Table, Audit, list[str]]:
    """Audit all training rows, of which none are held out."""
    require_of_task(config)
    table = read(config, holds_out=False)["train"]
    classes = table.classes
    if classes is not None and classes.kind.joint:
        require_separable(classes.names, cure="rename the class")
    task = trained_task(config)
    pretrained = load_model(config, task, classes)
    tokenizer, net = pretrained.tokenizer, cast(nn.Module, pretrained.model).to(device_of(config))
    length = task.reading.limit(config.data.max_length, tokenizer, pretrained.positions)
    length = length if config.data.max_length is not None else min(length, TOKENS)
    table = prepare({"train": table}, tokenizer, max_length=length, encode=task.reading.encode)["train"]
    samples = table.samples
    assert classes is not None
    result = audit(
        net,
        samples,
        task.reading.collate(net, tokenizer, max_length=length),
        classes=classes.names,
        rows=RowNames(ids=samples.ids, lengths=samples.lengths),
        compute=Compute(BATCH_SIZE, progress=progress),
    )
    if result.tokens is not None:
        numbers = dict[int, list[int]]()  # by row those of the tokens of which the tokenizer makes a piece
        for part in table.chunks():
            encoded = task.reading.encode(part, table.columns, tokenizer, max_length=length, labels=None)
            own = ([number for number in sample["labels"] if number != IGNORED] for sample in encoded)
            numbers |= dict(zip((row.id for row in part), own, strict=True))
        both = zip(result.ids.tolist(), result.tokens.tolist(), strict=True)
        result = replace(result, tokens=np.array([numbers[row][j] for row, j in both]))
    without = len(samples) - len(set(result.ids.tolist()))
    notes = {
        f"{samples.truncated} of {len(samples)} texts were cut to {length} tokens; see data.max_length": (
            samples.truncated
        ),
        f"labels not judged, in classes of fewer than {FEWEST} rows: {result.unjudged}": result.unjudged,
        f"copies of an earlier row with the same label, judged once with it: {result.copies:,}": result.copies,
        f"pairs of near-duplicates with different labels: the nearest {MOST_CONTRADICTIONS:,} are listed": (
            len(result.duplicates) == MOST_CONTRADICTIONS
        ),
        f"rows not compared with others for near-duplicates: {result.uncompared:,}, evenly spaced": result.uncompared,
        f"rows not judged, without {'a label' if result.tokens is None else 'an entity'}: {without}": without,
    }
    return table, result, [*table.notes, *(note for note, holds in notes.items() if holds)]


def _about(
    config: Config, table: Table, result: Audit, listing: Sequence[Mapping[str, Any]], notes: Sequence[str]
) -> dict[str, Any]:
    """The content of audit.json: the source, so that corrections match its rows, and the results."""
    names, model, find = result.classes, config.model.path, class_finder(result.classes)
    spellings = {} if table.classes is None else table.classes.spellings
    pairs = [
        {
            "label": names[pair.label],
            "suggested": names[pair.suggested],
            "rows": pair.rows,
            "wrong": pair.wrong if result.evident else None,
        }
        for pair in result.pairs[:30]
    ]
    return {
        "source": absolute(config.data.train) if table.path is None else str(table.path.absolute()),
        "sha256": source_digest(table),
        "hints": asdict(config.data.hints),
        "columns": asdict(table.columns),
        "classes": list(names),
        "answer": None if table.classes is None else table.classes.kind.name,
        "task": config.task.type,
        "model": model,
        "model_name": "the embedded all-MiniLM-L6-v2" if Path(model).parent.name == ENCODER else model,
        "rows": len(table),
        "summary": _summary(result),
        "evident": result.evident,
        "why_not": result.why_not,
        **{name: getattr(result, name) if result.evident else None for name in ("rate", "low", "high")},
        "likely_wrong": result.likely_wrong,
        "expected_wrong": result.expected_wrong,
        "listed": len(listing),
        "checks": sum(row["kind"] == "check" for row in listing),
        "pairs": pairs,
        "duplicates": len(result.duplicates),
        "near_duplicates": [[*pair] for pair in result.duplicates],
        "spellings": [{"written": one, "label": find(one), "rows": rows} for one, rows in spellings.items()],
        "notes": list(notes),
    }


def source_digest(source: Table | str) -> str:
    """SHA-256 of a source's file, or of a folder's listing of media files; of all rows where there is neither."""
    name = source if isinstance(source, str) else source.name
    if os.path.isfile(name):
        return digest(Path(name))
    if os.path.isdir(name) and (kind := kind_of(Path(name))) is not None:
        return folder_digest(Path(name), kind)
    return (open_table(source) if isinstance(source, str) else source).digest()


def _summary(result: Audit) -> str:
    if not result.evident:
        return (
            f"The audit cannot tell whether labels are wrong: {result.why_not}. "
            "The list is only sorted, the most suspicious rows first."
        )
    between = f" ({result.low:.1%} to {result.high:.1%})" if result.high < 1 else ""
    what = "rows" if len(np.unique(result.ids)) == len(result) else "labels"
    wrong = f"about {result.expected_wrong:,.0f} of them wrong (each with a probability above {DOUBT:.0%})"
    share = f"About {result.rate:.1%}" if result.rate >= 0.0005 else "Fewer than 0.1%"
    return f"{share} of the labels are wrong{between}; {result.likely_wrong:,} {what} to look at, {wrong}."


def make_listing(audit: Audit, table: Table, *, review: int, seed: int) -> list[dict[str, Any]]:
    """List the likely wrong rows, at least LEAST, the likeliest first; and behind them, each row once:

    `review` others as checks, all near-duplicates with different labels, pair by pair, and other spellings of classes.

    Of each: `kind` is "suspect", "check", "near-duplicate" or "spelling", `candidates` are labels, the likeliest first,
    `token` is the number of the tag's token in the row, from 0, and `word` that token, which begins at code point
    `start` of the text; `near` is the nearest row that says nearly the same and has another label. Without evidence of
    wrong labels no row has a probability. Where rows have several labels, a label is the whole set, joined by "|".
    """
    # Of a row with several labels, the one that is likeliest wrong; of a sentence, every token.
    order = np.sort(np.unique(audit.ids, return_index=True)[1]) if audit.tokens is None else np.arange(len(audit))
    suspects = min(max(int((order < audit.likely_wrong).sum()), LEAST), len(order))
    checks = suspects + draw_checks(audit.labels[order[suspects:]], review, stream("audit review", seed))
    tokens: list[int | None] = [None] * len(audit) if audit.tokens is None else audit.tokens.tolist()
    keys = list(zip(audit.ids.tolist(), tokens, strict=True))
    place_of = {key: j for j, key in reversed([*enumerate(keys)])}
    near, written = dict[int, int](), _written(table)
    for first, second in audit.duplicates:
        near.setdefault(first, second)
        near.setdefault(second, first)
    kinds = {keys[j]: "suspect" for j in order[:suspects]} | {keys[j]: "check" for j in order[checks]}
    for key in ((row, None) for pair in audit.duplicates for row in pair):
        kinds.setdefault(key, "near-duplicate")
    kinds |= {key: "spelling" for key in written if key not in kinds and key in place_of}
    shown = replace(table, ids=np.array(sorted({row for row, _ in kinds} | near.keys()), dtype=np.int64))
    rows, find, columns = {row.id: row.cells for row in shown}, class_finder(audit.classes), table.columns
    several = table.classes is not None and table.classes.kind.joint

    def labels(row: int) -> list[str]:
        return [str(find(plain_label(one))) for one in split_labels(rows[row][columns.label or ""])]

    def label(j: int, c: int) -> str | int:
        """The label of place j, of several all, if its class were c."""
        if not several:
            return audit.classes[c]
        own, other = str(audit.classes[audit.labels[j]]), str(audit.classes[c])
        return join_labels(list(dict.fromkeys(other if one == own else one for one in labels(keys[j][0]))))

    def listed(key: tuple[int, int | None], kind: str) -> dict[str, Any]:
        (row, token), j = key, place_of.get(key)
        words = [] if token is None else list(map(str, rows[row][columns.text]))
        one: dict[str, Any] = {
            "row": row,
            "text": row_text(rows[row], columns),
            **{"label": "", "suggested_label": "", "wrong_probability": None},
            "kind": kind,
            "candidates": [],
            "token": token,
            "word": "" if token is None else words[token],
            "start": len(" ".join(words[:token])) + 1 if token else 0,
            "near": None if kind == "spelling" else near.get(row),
        }
        if j is not None:  # nothing judges an empty set of labels
            own = int(audit.labels[j])
            others = set(labels(row)) - {str(audit.classes[own])} if several else set[str]()
            classes = [c for c in audit.candidates[j].tolist() if str(audit.classes[c]) not in others]
            one |= {"label": label(j, own), "suggested_label": label(j, int(audit.suggested[j]))}
            one |= {"wrong_probability": float(audit.probability[j]) if audit.evident else None}
            one["candidates"] = [label(j, c) for c in classes]
        if kind == "spelling":
            return one | {"label": written[key], "suggested_label": one["label"], "wrong_probability": None}
        if kind == "near-duplicate" and (twin := place_of.get((near[row], None))) is not None:
            one["suggested_label"] = label(twin, int(audit.labels[twin]))
        return one

    return [listed(key, kind) for key, kind in kinds.items()]


def _written(table: Table) -> dict[tuple[int, int | None], str | int]:
    """The labels, by row and token, that the table writes in another spelling than their class."""
    written, classes = dict[tuple[int, int | None], str | int](), table.classes
    if classes is None or not classes.spellings:
        return written
    for row in table:
        labels = labels_at(row, table.columns.label or "", classes.kind)
        if classes.kind.by_token:
            written |= {(row.id, j): label for j, label in enumerate(labels) if label in classes.spellings}
        elif any(label in classes.spellings for label in labels):
            written[row.id, None] = join_labels(labels) if classes.kind.joint else labels[0]
    return written


def draw_checks(labels: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """Draw `count` places at random, as evenly over the classes as these allow, in random order."""
    order = rng.permutation(len(labels))
    turn = np.empty(len(labels), dtype=np.int64)  # the rank of each row within its class
    for label in np.unique(labels):
        own = order[labels[order] == label]
        turn[own] = np.arange(len(own))
    chosen = order[np.argsort(turn[order], kind="stable")][:count]
    return chosen[rng.permutation(len(chosen))]
