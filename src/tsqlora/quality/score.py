"""Every sample's worth to a model, for any trainer.  METHOD section 1."""

import warnings

from torch import nn

from tsqlora import distributed
from tsqlora.errors import SettingsError, UnsupportedError
from tsqlora.gradients.eval_mode import eval_mode
from tsqlora.oom import halves, retry_on_oom
from tsqlora.quality.exact import require_own_loss
from tsqlora.quality.look import look
from tsqlora.quality.rows import Dataset, require_reference
from tsqlora.quality.rule import PAPER_TERMS, Compute, LookRequest, RowNames, ScoringRule, require_precision
from tsqlora.quality.scorable import require_apart
from tsqlora.quality.scores import Scores, require_names
from tsqlora.quality.subset import equals
from tsqlora.quality.trusted import Trusted
from tsqlora.tasks import Task
from tsqlora.tasks.forward import Collate, each_its_row, task_of


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
) -> Scores:
    """Every sample's worth to the model, with a fitted head where its own is no better than a random one.

    Args:
        model: as it trains; it is left exactly as it was, also after an error.
        dataset: its rows go to `collate`, which gives the model's inputs and `labels`.
        rule: what is measured, and how rows are drawn by it; by default the published terms, and even draws.
        task: its loss must be the one that training uses; by default what the model's
            config says (text generation, classification, or regression for one label).
        rows: ids, hashes and lengths of the rows.
        compute: batch size, precision, journal and progress.
        trusted: rows that look like what the model shall be good at, made as those of the data set.

    Where the model is at chance with any head, its gradients say nothing: a warning says so, and rows are drawn evenly.
    Raises UnsupportedError naming what cannot be scored exactly; SettingsError.
    """
    rule, rows, compute = rule or ScoringRule(terms=PAPER_TERMS), rows or RowNames(), compute or Compute()
    model = distributed.unwrapped(model)
    _require_possible(model, dataset, rule, rows, compute)
    if task is None:
        task = _own_task(model, dataset, each_its_row(collate), compute)
    if trusted is not None and not isinstance(trusted, Trusted):
        trusted = Trusted(trusted, twins=equals(dataset, trusted))
    request = LookRequest(
        dataset=dataset, collate=collate, task=task, rule=rule, rows=rows, compute=compute, trusted=trusted
    )
    found = look(model, request)
    found.undo()
    if found.why_not is not None:
        warnings.warn(f"rows are drawn evenly, and have no terms of gradients: {found.why_not}", stacklevel=2)
    return found.scores


def _own_task(model: nn.Module, dataset: Dataset, collate: Collate, compute: Compute) -> Task:
    """What the model's config says.  Raises UnsupportedError where the model computes another loss itself."""
    task = task_of(model)

    def check(size: int) -> None:
        require_own_loss(model, collate([dataset[j] for j in range(size)]), task)

    with eval_mode(model):
        distributed.together(lambda: retry_on_oom(check, halves(min(compute.batch_size, len(dataset)))))
    return task


def _require_possible(model: nn.Module, dataset: Dataset, rule: ScoringRule, rows: RowNames, compute: Compute) -> None:
    """Raises SettingsError or UnsupportedError for what cannot be scored, before anything is measured."""
    if len(dataset) == 0:
        raise SettingsError("there are no rows to score")
    require_names(len(dataset), hashes=rows.hashes, ids=rows.ids)
    require_apart(model)
    require_precision(rule.measured(), compute.autocast)
    if not isinstance(rule.reference, int):
        require_reference(rule.reference, dataset)
    if compute.journal is not None and rows.hashes is None:
        raise SettingsError("a journal needs hashes: they tell whether the rows are still the same")
    if compute.journal is not None and distributed.active():
        raise UnsupportedError("a journal is kept by one process; leave it out, or score in one process")
