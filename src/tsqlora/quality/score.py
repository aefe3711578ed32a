"""One pass over a data set gives every sample's terms, exactly, in batches.  METHOD section 1."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from tsqlora.data.batches import sorted_batches
from tsqlora.errors import SettingsError, UnsupportedError
from tsqlora.gradients.ghost import LayerGradient, layer_gradient
from tsqlora.gradients.lookahead import stepped
from tsqlora.gradients.quiet import quiet
from tsqlora.gradients.sites import Scope, Site, batch_coupled, find_sites
from tsqlora.quality.learned import LearnedTest
from tsqlora.quality.reference import Reference, backward, calibrate, measure_reference
from tsqlora.quality.scores import Scores, from_terms
from tsqlora.quality.terms import Measured, Term, get_terms
from tsqlora.tasks import Task
from tsqlora.tasks.forward import Batch, Collate, model_logits, split_labels, task_of

DEFAULT_WEIGHTS: Mapping[str, float] = {"convergence": 1.0}
"""The worst of two seeds with a fifth of the labels wrong was best with this one: docs/log.md."""
PAPER_TERMS = ("gradient_norm", "loss_reduction", "convergence")
FREE_TERMS = ("cosine", "loss", "el2n")
REFERENCE_ROWS = 512

Progress = Callable[[str, int, int], None]
"""Called with the phase, rows done, rows in all."""


class Dataset(Protocol):
    """What is scored: anything with a length whose rows the collator takes."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


def score(
    model: nn.Module,
    dataset: Dataset,
    collate: Collate,
    *,
    reference: Sequence[int] | Dataset | None = None,
    task: Task | None = None,
    weights: Mapping[str, float] | None = None,
    temperature: float = 1.0,
    terms: Sequence[str] = PAPER_TERMS,
    scope: Scope = "adapter",
    calibration: bool = True,
    batch_size: int = 32,
    seed: int = 0,
    autocast: torch.dtype | None = None,
    hashes: Sequence[str] | None = None,
    record: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> Scores:
    """Every sample's worth to the model as it is now.

    Args:
        model: as it trains; it is left exactly as it was, also after an error.
        dataset: its rows go to `collate`, which gives the model's inputs and `labels`.
        reference: the rows whose mean gradient `convergence` compares with: indices into
            `dataset` (each is then taken out of its own mean), or other samples. By
            default 512 rows of `dataset`, drawn by `seed`.
        task: its loss must be the one that training uses; by default what the model's
            config says (classification, or regression for one label).
        weights: of the terms in Q; a term with a weight is always measured.
        terms: what else to measure. `loss_reduction` costs one more forward pass.
        autocast: compute in this dtype; then terms are good to about three digits, and
            `loss_reduction`, a small difference, is refused.
        record: what else the scores' record should say.

    Raises NotLearnedError for a model at chance, whose scores would rank nothing;
    UnsupportedError naming what cannot be scored exactly; SettingsError.
    """
    weights = dict(DEFAULT_WEIGHTS if weights is None else weights)
    wanted = get_terms(tuple(dict.fromkeys([*terms, *FREE_TERMS, *(n for n, w in weights.items() if w)])))
    if len(dataset) == 0:
        raise SettingsError("there are no rows to score")
    for coupled in batch_coupled(model):
        raise UnsupportedError(f"{coupled} couples the samples of a batch: no sample has a loss of its own")
    if autocast is not None and any(term.lookahead for term in wanted.values()):
        raise SettingsError("loss_reduction is a difference that half precision cannot hold; score in float32")
    own, rows = _reference_rows(reference, dataset, seed)
    report = progress or (lambda *_: None)
    with quiet(model), _autocast(model, autocast):
        sites = find_sites(model, scope)
        batches = list(_batches(rows, collate, batch_size))
        if task is None:
            task = task_of(model)
            _require_own_loss(model, batches[0], task)
        settled = calibrate(model, batches, task, enabled=calibration)
        settled.learned.require()
        mean = measure_reference(model, batches, task, sites, settled)
        measured = _pass(model, dataset, collate, task, sites, mean, settled.offsets, own, wanted, batch_size, report)
    labels = measured.pop("label")
    strata = task.strata(labels)
    return from_terms(
        measured,
        labels=labels,
        stratified=strata is not None,
        weights=weights,
        temperature=temperature,
        record=_record(mean, settled.offsets, settled.learned, own, scope, seed, autocast) | dict(record or {}),
        hashes=hashes,
    )


def reference_indices(rows: int, size: int, seed: int) -> list[int]:
    """The default reference: `size` of the rows, or all of them if there are fewer."""
    rng = np.random.default_rng([seed, 1])
    return sorted(rng.permutation(rows)[:size].tolist())


def _reference_rows(
    reference: Sequence[int] | Dataset | None, dataset: Dataset, seed: int
) -> tuple[list[int], list[Any]]:
    """The reference's indices in the data set (none if it lies outside), and its rows."""
    if reference is None:
        reference = reference_indices(len(dataset), REFERENCE_ROWS, seed)
    if len(reference) < 2:
        raise SettingsError(f"the reference has {len(reference)} rows; it needs at least 2")
    rows = [reference[j] for j in range(len(reference))]
    if not all(isinstance(row, int | np.integer) for row in rows):
        return [], rows
    own = [int(row) for row in rows]
    if len(set(own)) < len(own) or min(own) < 0 or max(own) >= len(dataset):
        raise SettingsError(f"the reference must name different rows from 0 to {len(dataset) - 1}")
    return own, [dataset[j] for j in own]


def _batches(rows: Sequence[Any], collate: Collate, batch_size: int) -> Iterator[Batch]:
    for start in range(0, len(rows), batch_size):
        yield collate(list(rows[start : start + batch_size]))


def _lengths(dataset: Dataset) -> list[int]:
    """Token counts where rows have `input_ids`, else equal lengths: only speed depends on it."""
    rows = (dataset[j] for j in range(len(dataset)))
    return [len(row["input_ids"]) if isinstance(row, Mapping) and "input_ids" in row else 0 for row in rows]


def _pass(
    model: nn.Module,
    dataset: Dataset,
    collate: Collate,
    task: Task,
    sites: Mapping[str, Site],
    reference: Reference,
    offsets: Tensor,
    own: Sequence[int],
    terms: Mapping[str, Term],
    batch_size: int,
    report: Progress,
) -> dict[str, np.ndarray]:
    """Each term and the label of every row, in the data set's order."""
    device = next(model.parameters()).device
    in_reference = torch.zeros(len(dataset), dtype=torch.bool)
    in_reference[list(own)] = True
    columns: dict[str, np.ndarray] = {}
    done = 0
    for indices in sorted_batches(_lengths(dataset), batch_size):
        inputs, labels = split_labels(collate([dataset[int(j)] for j in indices]), device)
        measured = measure(
            model,
            inputs,
            labels,
            task=task,
            sites=sites,
            reference=reference,
            offsets=offsets,
            in_reference=in_reference[torch.as_tensor(indices)].to(device),
            lookahead=any(term.lookahead for term in terms.values()),
        )
        values = {name: term.of(measured) for name, term in terms.items()} | {"label": labels}
        for name, value in values.items():
            column = columns.setdefault(name, np.empty(len(dataset), dtype=value.cpu().numpy().dtype))
            column[indices] = value.cpu().numpy()
        done += len(indices)
        report("scoring", done, len(dataset))
    return columns


def measure(
    model: nn.Module,
    inputs: Batch,
    labels: Tensor,
    *,
    task: Task,
    sites: Mapping[str, Site],
    reference: Reference,
    offsets: Tensor,
    in_reference: Tensor,
    lookahead: bool,
) -> Measured:
    """What one batch's passes say: forward and backward, and for `lookahead` one more forward."""
    gradients: dict[str, LayerGradient] = {}
    norms: list[Tensor] = []
    dots: list[Tensor] = []

    def consume(name: str, a: Tensor, b: Tensor) -> None:
        gradient = layer_gradient(a, b, weight=sites[name].weight, bias=sites[name].bias)
        norms.append(gradient.norm_sq())
        if name in reference.mean:
            dots.append(gradient.dot(reference.mean[name]))
        if lookahead:
            gradients[name] = gradient

    def loss(logits: Tensor, y: Tensor) -> Tensor:
        return task.loss(logits + offsets, y)

    logits, losses, _ = backward(model, inputs, labels, loss, sites, consume)
    norm_sq = torch.stack(norms).sum(0)
    stepped_loss = None
    if lookahead:
        with torch.no_grad(), stepped(sites, gradients, eta=reference.eta, samples=len(labels)):
            stepped_loss = loss(model_logits(model, inputs), labels)
    return Measured(
        logits=logits + offsets,
        labels=labels,
        loss=losses,
        norm_sq=norm_sq,
        dot=_leave_one_out(torch.stack(dots).sum(0), norm_sq, reference.rows, in_reference),
        reference_norm=reference.norm,
        stepped_loss=stepped_loss,
    )


def _leave_one_out(dot: Tensor, norm_sq: Tensor, rows: int, in_reference: Tensor) -> Tensor:
    """⟨g, ḡ⟩, with ḡ free of the sample itself where it is one of the reference's rows."""
    without_itself = (dot - norm_sq / rows) * (rows / (rows - 1))
    return torch.where(in_reference, without_itself, dot)


def _require_own_loss(model: nn.Module, batch: Mapping[str, Any], task: Task) -> None:
    """Refuses a task whose loss is not the mean that the model itself computes."""
    inputs, labels = split_labels(batch, next(model.parameters()).device)
    with torch.no_grad():
        own = getattr(model(**inputs, labels=labels), "loss", None)
        ours = task.loss(model_logits(model, inputs), labels).mean()
    if own is not None and abs(float(own) - float(ours)) > 1e-2 * max(1.0, abs(float(ours))):
        raise UnsupportedError(
            f"the model's own loss on a batch is {float(own):.4f}, the mean of the samples' {task.name} losses is "
            f"{float(ours):.4f}; pass `task` with the loss that training uses"
        )


def _autocast(model: nn.Module, dtype: torch.dtype | None) -> AbstractContextManager[Any]:
    if dtype is None:
        return nullcontext()
    return torch.autocast(next(model.parameters()).device.type, dtype=dtype)


def _record(
    reference: Reference,
    offsets: Tensor,
    test: LearnedTest,
    own: Sequence[int],
    scope: Scope,
    seed: int,
    autocast: torch.dtype | None,
) -> dict[str, Any]:
    return {
        "scope": scope,
        "seed": seed,
        "eta": reference.eta,
        "offsets": offsets.tolist(),
        "reference_norm": reference.norm,
        "reference_rows": reference.rows,
        "reference": list(own),
        "learned": test.to_dict(),
        "autocast": None if autocast is None else str(autocast).removeprefix("torch."),
    }
