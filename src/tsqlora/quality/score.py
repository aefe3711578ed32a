"""One pass over a data set gives every sample's terms, exactly, in batches.  METHOD section 1."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from tsqlora import distributed
from tsqlora.data.batches import sorted_batches
from tsqlora.errors import SettingsError, UnsupportedError
from tsqlora.gradients.eval_mode import eval_mode
from tsqlora.gradients.sites import Site, find_sites, require_float64
from tsqlora.oom import BatchSplitter, halves, retry_on_oom
from tsqlora.progress import Progress
from tsqlora.quality.exact import require_exact, require_own_loss
from tsqlora.quality.journal import Columns, Journal, identity_of
from tsqlora.quality.label_noise import reject as reject_labels
from tsqlora.quality.learned import LearnedTest
from tsqlora.quality.measure import measured_columns
from tsqlora.quality.reference import Reference, calibrate, measure_reference
from tsqlora.quality.rows import Dataset, batches_of, lengths_of, reference_rows
from tsqlora.quality.rule import (
    PAPER_TERMS,
    RowNames,
    ScoringRule,
    fitting,
    needs_gradients,
    of_classes,
    require_precision,
)
from tsqlora.quality.scorable import require_apart
from tsqlora.quality.scores import PREDICTIONS, Scores, from_terms, require_names
from tsqlora.quality.terms import Term
from tsqlora.tasks import Task
from tsqlora.tasks.forward import Batch, Collate, each_its_row, precision, task_of


@dataclass(frozen=True, slots=True)
class Compute:
    """How scores are computed; what they say does not depend on it but for rounding."""

    batch_size: int = 32
    """Samples of a pass."""
    autocast: torch.dtype | None = None
    """Compute in this dtype; then terms are good to about two digits, and `loss_reduction`, a small difference, is
    refused."""
    journal: Path | None = None
    """A folder in which what is measured is kept. If the process ends before it is done, the same call goes on there
    and gives the same scores; delete it when they are saved. It needs the rows' hashes."""
    progress: Progress | None = None
    """Called with (phase, rows done, rows in all)."""

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise SettingsError(f"batch_size is {self.batch_size}; it must be at least 1")


def score(
    model: nn.Module,
    dataset: Dataset,
    collate: Collate,
    *,
    rule: ScoringRule | None = None,
    task: Task | None = None,
    rows: RowNames | None = None,
    compute: Compute | None = None,
) -> Scores:
    """Every sample's worth to the model as it is now.

    Args:
        model: as it trains; it is left exactly as it was, also after an error.
        dataset: its rows go to `collate`, which gives the model's inputs and `labels`.
        rule: what is measured, and how rows are drawn by it; by default the published terms, and even draws.
        task: its loss must be the one that training uses; by default what the model's
            config says (text generation, classification, or regression for one label).
        rows: ids, hashes and lengths of the rows.
        compute: batch size, precision, journal and progress.

    Raises NotLearnedError for a model at chance, whose scores would rank nothing;
    UnsupportedError naming what cannot be scored exactly; SettingsError.
    """
    rule, rows, compute = rule or ScoringRule(terms=PAPER_TERMS), rows or RowNames(), compute or Compute()
    model = distributed.unwrapped(model)
    _require_possible(model, dataset, rule, rows, compute)
    collate, batch_size = each_its_row(collate), compute.batch_size
    own, reference = distributed.together(lambda: reference_rows(rule.reference, dataset, rule.seed))
    planned = distributed.together(
        lambda: sorted_batches(lengths_of(dataset) if rows.lengths is None else rows.lengths, batch_size)
    )
    report = compute.progress or (lambda *_: None)
    with eval_mode(model), precision(next(model.parameters()).device, compute.autocast, cache=False):
        wanted = rule.measured()
        sites = find_sites(model, rule.scope) if needs_gradients(wanted) else {}
        batches = distributed.together(lambda: list(batches_of(reference, collate, batch_size)))

        def in_batches(size: int) -> list[Batch]:
            return batches if size == batch_size else list(batches_of(reference, collate, size))

        if task is None:
            task = own_task = task_of(model)
            retry_on_oom(lambda size: require_own_loss(model, in_batches(size)[0], own_task), halves(batch_size))
        wanted = fitting(wanted, task, rule, batches[0])
        kept = None
        if compute.journal is not None:
            settings = {"terms": list(wanted), "scope": rule.scope, "calibration": rule.calibration}
            settings |= {"batch size": batch_size, "seed": rule.seed, "autocast": str(compute.autocast)}
            settings |= {"reference": own, "task": repr(task)}
            kept = Journal(compute.journal, identity_of(model, rows.hashes or (), batches, settings))
        found, test = _settle(model, in_batches, batch_size, task, sites, rule.calibration, kept)
        measured = _pass(model, dataset, collate, task, sites, found, own, wanted, planned, kept, report)
    labels = measured.pop("label")
    predicted = {name: measured.pop(name) for name in PREDICTIONS if name in measured}
    scores = from_terms(
        measured,
        labels=labels,
        stratified=of_classes(task, labels),
        weights=rule.q,
        even=rule.even,
        temperature=rule.temperature,
        record=_record(found, test, own, rule, compute.autocast) | dict(rows.about),
        hashes=rows.hashes,
        ids=rows.ids,
        predictions=predicted,
    )
    return without_suspects(scores) if rule.rejects(scores.stratified) else scores


def _require_possible(model: nn.Module, dataset: Dataset, rule: ScoringRule, rows: RowNames, compute: Compute) -> None:
    """Raises SettingsError or UnsupportedError for what cannot be scored, before anything is measured."""
    if len(dataset) == 0:
        raise SettingsError("there are no rows to score")
    require_names(len(dataset), hashes=rows.hashes, ids=rows.ids)
    require_apart(model)
    require_float64(next(model.parameters()).device)
    require_precision(rule.measured(), compute.autocast)
    if compute.journal is not None and rows.hashes is None:
        raise SettingsError("a journal needs hashes: they tell whether the rows are still the same")
    if compute.journal is not None and distributed.active():
        raise UnsupportedError("a journal is kept by one process; leave it out, or score in one process")


def without_suspects(scores: Scores) -> Scores:
    """The scores without rows whose label seems wrong; all rows where there is no evidence of wrong labels."""
    mask, noise = reject_labels(scores.predictions["logits"], scores.labels)
    noted = replace(scores, record={**scores.record, "noise": noise.to_dict()})
    return noted.drop(mask, "confident negative") if mask.any() else noted


def learned_on(model: nn.Module, rows: Sequence[Any], collate: Collate, *, task: Task, batch_size: int) -> LearnedTest:
    """Whether the model is ready to score: the test on these rows that `score` begins with."""
    with eval_mode(model):
        return calibrate(model, batches_of(rows, each_its_row(collate), batch_size), task, enabled=False).learned


def _settle(
    model: nn.Module,
    in_batches: Callable[[int], list[Batch]],
    batch_size: int,
    task: Task,
    sites: Mapping[str, Site],
    calibration: bool,
    journal: Journal | None,
) -> tuple[Reference, LearnedTest]:
    """The reference, and the test that the model has learned; as the journal has them, if it has."""
    device = next(model.parameters()).device
    known = None if journal is None else journal.reference(device)
    if known is not None:
        return known

    def settle(size: int) -> tuple[Reference, LearnedTest]:
        batches = in_batches(size)
        settled = calibrate(model, batches, task, enabled=calibration)
        settled.learned.require()
        if sites:
            require_exact(model, batches[0], task, sites, settled.offsets)
            found = measure_reference(model, batches, task, sites, settled.offsets)
        else:
            found = Reference({}, norm=0.0, eta=0.0, rows=settled.learned.rows, offsets=settled.offsets)
        # Through the memory of the machine: another process has another device.
        return found.to(torch.device("cpu")) if distributed.active() else found, settled.learned

    found, test = distributed.once(lambda: retry_on_oom(settle, halves(batch_size)))
    if journal is not None:
        journal.save_reference(found, test)
    return found.to(device), test


def _pass(
    model: nn.Module,
    dataset: Dataset,
    collate: Collate,
    task: Task,
    sites: Mapping[str, Site],
    reference: Reference,
    own: Sequence[int],
    terms: Mapping[str, Term],
    batches: Sequence[np.ndarray],
    journal: Journal | None,
    report: Progress,
) -> dict[str, np.ndarray]:
    """Each term, prediction and label of every row, in the data set's order; several processes share the batches."""
    in_reference = torch.zeros(len(dataset), dtype=torch.bool)
    in_reference[list(own)] = True
    columns: dict[str, np.ndarray] = {}
    done = 0
    for first, end, part in () if journal is None else journal.parts():
        _fill(columns, np.concatenate(batches[first:end]), part, len(dataset))
        done = end

    def measure_share() -> list[tuple[np.ndarray, Columns]]:
        mine = distributed.share(batches[done:])
        before = sum(map(len, batches[:done]))
        parts: list[tuple[np.ndarray, Columns]] = []
        portions = BatchSplitter()

        def numbers_of(indices: np.ndarray) -> Columns:
            batch, own_rows = collate([dataset[int(j)] for j in indices]), in_reference[torch.as_tensor(indices)]
            return measured_columns(model, batch, task, sites, reference, own_rows, terms)

        for indices in mine:
            found = portions.of(indices, numbers_of)
            numbers = {name: np.concatenate([part[name] for part in found]) for name in found[0]}
            parts.append((indices, numbers))
            if journal is not None:
                journal.add(numbers)
            before += len(indices)
            report("scoring", before, before + sum(map(len, mine[len(parts) :])))
        return parts

    for parts in distributed.gathered(distributed.together(measure_share)):
        for indices, numbers in parts:
            _fill(columns, indices, numbers, len(dataset))
    # A journal's part has them in an order of its own.
    return {name: columns[name] for name in (*terms, *PREDICTIONS, "label") if name in columns}


def _fill(columns: dict[str, np.ndarray], indices: np.ndarray, numbers: Columns, rows: int) -> None:
    """Puts the numbers of some of the rows into their places."""
    for name, value in numbers.items():
        columns.setdefault(name, np.empty((rows, *value.shape[1:]), dtype=value.dtype))[indices] = value


def _record(
    reference: Reference,
    test: LearnedTest,
    own: Sequence[int],
    rule: ScoringRule,
    autocast: torch.dtype | None,
) -> dict[str, Any]:
    return {
        "scope": rule.scope,
        "seed": rule.seed,
        "eta": reference.eta if reference.mean else None,
        "offsets": None if reference.offsets is None else reference.offsets.tolist(),
        "reference_norm": reference.norm if reference.mean else None,
        "reference_rows": reference.rows,
        "reference": list(own),
        "learned": test.to_dict(),
        "autocast": None if autocast is None else str(autocast).removeprefix("torch."),
    }
