"""One pass over a data set gives every sample's terms, exactly, in batches.  METHOD 1.3."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from tsqlora import distributed
from tsqlora.data.batches import sorted_batches
from tsqlora.gradients.eval_mode import eval_mode
from tsqlora.gradients.sites import Site, find_sites
from tsqlora.oom import BatchSplitter, halves, retry_on_oom
from tsqlora.progress import Progress
from tsqlora.quality.exact import require_exact
from tsqlora.quality.journal import Columns, Journal, identity_of
from tsqlora.quality.measure import measured_columns
from tsqlora.quality.reference import Reference, calibrate, measure_reference
from tsqlora.quality.rows import batches_of, lengths_of, reference_rows
from tsqlora.quality.rule import LookRequest, ScoringRule, fitting, needs_gradients
from tsqlora.quality.terms import Term
from tsqlora.tasks.forward import Batch, precision


@dataclass(frozen=True, slots=True, eq=False)
class Measurements:
    """Each term and prediction of every row, in the data set's order, and how they came to be."""

    columns: dict[str, np.ndarray]
    record: dict[str, Any]


def gradient_pass(model: nn.Module, request: LookRequest) -> Measurements:
    """All that the rule measures of every sample, with the model as it is.

    A reference that is a data set of its own is measured first: its mean gradient is what `convergence` compares with.
    """
    dataset, rule, compute = request.dataset, request.rule, request.compute
    own, reference = distributed.together(lambda: reference_rows(rule.reference, dataset, rule.seed))
    lengths = request.rows.lengths
    planned = distributed.together(
        lambda: sorted_batches(lengths_of(dataset) if lengths is None else lengths, compute.batch_size)
    )
    with eval_mode(model), precision(next(model.parameters()).device, compute.autocast, cache=False):
        batches = distributed.together(lambda: list(batches_of(reference, request.collate, compute.batch_size)))
        fitted = fitting(rule.measured(), request.task, rule, batches[0])
        terms = {name: term for name, term in fitted.items() if not term.trusted}
        sites = find_sites(model, rule.scope) if needs_gradients(terms) else {}
        kept = _journal(model, request, terms, batches, own)
        found = _Settle(model, request, reference, sites).reference(kept)
        measurer = _Measurer(model, request, sites, found, terms, set(own))
        columns = _pass(measurer, planned, kept, compute.progress)
    return Measurements(columns, _record(found, own, rule, compute.autocast))


def _journal(
    model: nn.Module, request: LookRequest, terms: Mapping[str, Term], batches: Sequence[Batch], own: Sequence[int]
) -> Journal | None:
    rule, compute = request.rule, request.compute
    if compute.journal is None:
        return None
    settings = {"terms": list(terms), "scope": rule.scope, "calibration": rule.calibration}
    settings |= {"batch size": compute.batch_size, "seed": rule.seed, "autocast": str(compute.autocast)}
    settings |= {"reference": list(own), "task": repr(request.task)}
    return Journal(compute.journal / "terms", identity_of(model, request.rows.hashes or (), batches, settings))


@dataclass(frozen=True, slots=True)
class _Settle:
    """What the reference settles for all other rows: the calibration, its mean gradient and the step size."""

    model: nn.Module
    request: LookRequest
    rows: Sequence[Any]
    sites: Mapping[str, Site]

    def reference(self, journal: Journal | None) -> Reference:
        """As the journal has it, if it has."""
        device = next(self.model.parameters()).device
        known = None if journal is None else journal.reference(device)
        if known is not None:
            return known
        found = distributed.once(lambda: retry_on_oom(self._measured, halves(self.request.compute.batch_size)))
        if journal is not None:
            journal.save_reference(found)
        return found.to(device)

    def _measured(self, size: int) -> Reference:
        task = self.request.task
        batches = list(batches_of(self.rows, self.request.collate, size))
        offsets = calibrate(self.model, batches, task, enabled=self.request.rule.calibration)
        if not self.sites:
            return Reference({}, norm=0.0, eta=0.0, rows=len(self.rows), offsets=offsets)
        require_exact(self.model, batches[0], task, self.sites, offsets)
        found = measure_reference(self.model, batches, task, self.sites, offsets)
        # Through the memory of the machine: another process has another device.
        return found.to(torch.device("cpu")) if distributed.active() else found


@dataclass(frozen=True, slots=True)
class _Measurer:
    model: nn.Module
    request: LookRequest
    sites: Mapping[str, Site]
    reference: Reference
    terms: Mapping[str, Term]
    own: set[int]
    """Rows of the data set that are in the reference."""

    def of(self, indices: np.ndarray) -> Columns:
        batch = self.request.collate([self.request.dataset[int(j)] for j in indices])
        own = torch.tensor([int(j) in self.own for j in indices])
        return measured_columns(self.model, batch, self.request.task, self.sites, self.reference, own, self.terms)


def _pass(
    measurer: _Measurer, batches: Sequence[np.ndarray], journal: Journal | None, progress: Progress | None
) -> dict[str, np.ndarray]:
    """Each term, prediction and label of every row, in the data set's order; several processes share the batches."""
    columns: dict[str, np.ndarray] = {}
    done, rows = 0, len(measurer.request.dataset)
    for first, end, part in () if journal is None else journal.parts():
        _fill(columns, np.concatenate(batches[first:end]), part, rows)
        done = end

    def measure_share() -> list[tuple[np.ndarray, Columns]]:
        mine = distributed.share(batches[done:])
        before = sum(map(len, batches[:done]))
        parts: list[tuple[np.ndarray, Columns]] = []
        portions = BatchSplitter()
        for indices in mine:
            found = portions.of(indices, measurer.of)
            numbers = {name: np.concatenate([part[name] for part in found]) for name in found[0]}
            parts.append((indices, numbers))
            if journal is not None:
                journal.add(numbers)
            before += len(indices)
            if progress is not None:
                progress("scoring", before, before + sum(map(len, mine[len(parts) :])))
        return parts

    for parts in distributed.to_first(distributed.together(measure_share)) or ():
        for indices, numbers in parts:
            _fill(columns, indices, numbers, rows)
    return columns


def _fill(columns: dict[str, np.ndarray], indices: np.ndarray, numbers: Columns, rows: int) -> None:
    """Puts the numbers of some of the rows into their places."""
    for name, value in numbers.items():
        columns.setdefault(name, np.empty((rows, *value.shape[1:]), dtype=value.dtype))[indices] = value


def _record(
    reference: Reference, own: Sequence[int], rule: ScoringRule, autocast: torch.dtype | None
) -> dict[str, Any]:
    return {
        "scope": rule.scope,
        "seed": rule.seed,
        "eta": reference.eta if reference.mean else None,
        "offsets": None if reference.offsets is None else reference.offsets.tolist(),
        "reference_norm": reference.norm if reference.mean else None,
        "reference_rows": reference.rows,
        "reference": list(own),
        "autocast": None if autocast is None else str(autocast).removeprefix("torch."),
    }
