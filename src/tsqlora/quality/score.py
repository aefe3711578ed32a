"""Score every sample for a model, with any trainer."""

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from tsqlora import distributed
from tsqlora.errors import SettingsError, UnsupportedError, of_loaded_model
from tsqlora.gradients.eval_mode import eval_mode
from tsqlora.gradients.sites import batch_coupled, find_sites
from tsqlora.oom import halves, retry_on_oom
from tsqlora.quality.exact import require_exact, require_own_loss
from tsqlora.quality.gradient_pass import measured_columns
from tsqlora.quality.look import look
from tsqlora.quality.reference import Reference
from tsqlora.quality.rows import Dataset, require_reference
from tsqlora.quality.rule import (
    PAPER_TERMS,
    Compute,
    LookRequest,
    RowNames,
    ScoringRule,
    needs_gradients,
    require_precision,
    terms_of_batch,
)
from tsqlora.quality.scores import Scores, require_row_names
from tsqlora.quality.subset import equals
from tsqlora.quality.trusted import Trusted
from tsqlora.tasks import Task
from tsqlora.tasks.forward import Collate, each_its_row, precision, task_of
from tsqlora.tasks.preference import Preference


@of_loaded_model
def score(
    model: nn.Module,
    dataset: Dataset,
    collate: Collate,
    *,
    rule: ScoringRule | None = None,
    task: Task | None = None,
    rows: RowNames | None = None,
    compute: Compute | None = None,
    trusted: Trusted | Dataset | None = None,
    fraction: float = 1.0,
) -> Scores:
    """Score every sample for the model, with a fitted head where its own is no better than a random one.

    Args:
        model: the model to train; it is left unchanged, also after an error.
        dataset: its rows go to `collate`, which returns the model's inputs and `labels`.
        rule: terms to measure and how to draw rows; by default the published terms and even draws.
        task: its loss must equal that of training; by default it follows from the model's config
            (text generation, regression for one label, else classification).
        rows: ids, hashes and lengths of the rows.
        compute: batch size, precision, journal and progress.
        trusted: rows that represent what the model should be good at, in the format of the data set.
        fraction: share of the rows that a draw needs: pairs that look swapped are dropped only beyond it.

    If the model is at chance with any head, its gradients carry no information: score warns and draws rows evenly.
    Raises UnsupportedError naming what cannot be scored exactly; SettingsError.
    """
    rule, rows, compute = rule or ScoringRule(terms=PAPER_TERMS), rows or RowNames(), compute or Compute()
    model = distributed.unwrapped(model)
    if len(dataset) == 0:
        raise SettingsError("there are no rows to score")
    require_row_names(len(dataset), hashes=rows.hashes, ids=rows.ids)
    _require_separable(model)
    require_precision(rule.measured(), compute.autocast)
    if not isinstance(rule.reference, int):
        require_reference(rule.reference, dataset)
    if compute.journal is not None and rows.hashes is None:
        raise SettingsError("a journal needs hashes, to recognise the same rows; pass rows=RowNames(hashes=...)")
    if compute.journal is not None and distributed.active():
        raise UnsupportedError("a journal works with one process only; remove it, or score in one process")
    task = task or _own_task(model, dataset, collate, compute)
    if trusted is not None and not isinstance(trusted, Trusted):
        trusted = Trusted(trusted, twins=equals(dataset, trusted))
    request = LookRequest(
        dataset=dataset,
        collate=collate,
        task=task,
        rule=rule,
        rows=rows,
        compute=compute,
        trusted=trusted,
        fraction=fraction,
    )
    result = look(model, request)
    result.undo()
    if isinstance(task, Preference) and result.scores.even:
        even = "the DPO loss of every pair is ln 2 before training, so pairs are drawn evenly; give trusted rows"
        gate = result.scores.record.gate
        warnings.warn(even if gate is None else str(gate["why_not"]), stacklevel=3)
    if result.why_not is not None:
        warnings.warn(f"rows are drawn evenly, and have no terms of gradients: {result.why_not}", stacklevel=3)
    return result.scores


def _own_task(model: nn.Module, dataset: Dataset, collate: Collate, compute: Compute) -> Task:
    """The task that the model's config names, whose loss is the model's own."""
    task, safe = task_of(model), each_its_row(collate)

    def check(size: int) -> None:
        require_own_loss(model, safe([dataset[j] for j in range(size)]), task)

    with eval_mode(model):
        distributed.together(lambda: retry_on_oom(check, halves(min(compute.batch_size, len(dataset)))))
    return task


def require_scorable(
    model: nn.Module,
    rows: Sequence[Any],
    collate: Collate,
    *,
    task: Task,
    own_loss: bool = False,
    rule: ScoringRule,
    autocast: torch.dtype | None = None,
) -> None:
    """Raise the errors that `score` would raise for the model, the task and these few rows, before a look.

    With `own_loss` the task was inferred from the model's config, and its loss must equal the model's own. Costs a
    forward pass over the rows, and their exactness check if a term needs gradients. The model is left unchanged.
    """
    model = distributed.unwrapped(model)
    _require_separable(model)
    require_precision(rule.measured(), autocast)
    rule.require_texts(task)
    collate = each_its_row(collate)
    with eval_mode(model), precision(next(model.parameters()).device, autocast, cache=False):
        # In one batch: only a batch shows whether samples share a row.
        terms = terms_of_batch(rule, task, collate(list(rows)))
        sites = find_sites(model) if needs_gradients(terms) else {}
        free = {name: term for name, term in terms.items() if not (term.gradient or term.later)}

        def check(size: int) -> None:
            batch, empty = collate(list(rows[:size])), Reference({}, norm=0.0, eta=0.0, rows=size, offsets=None)
            if own_loss:
                require_own_loss(model, batch, task)
            measured_columns(model, batch, task, {}, empty, torch.zeros(size, dtype=torch.bool), free)
            if sites:
                require_exact(model, batch, task, sites, None)

        retry_on_oom(check, halves(len(rows)))


def _require_separable(model: nn.Module) -> None:
    """Raise UnsupportedError for a model that is sharded, or that couples the samples of a batch."""
    if any(map(distributed.is_sharded, model.parameters())):
        raise UnsupportedError("the model's weights are sharded over processes (FSDP); score before fully_shard")
    if coupled := batch_coupled(model):
        raise UnsupportedError(
            f"{coupled[0]} couples the samples of a batch, so that no sample has its own loss; replace it"
        )
