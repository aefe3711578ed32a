"""Scores of rows, without a training: a look that leaves the model as it was."""

import warnings

from torch import nn

from tsqlora import distributed
from tsqlora.auditing.draw.subset import equals
from tsqlora.auditing.look import look, require_own_loss, require_separable
from tsqlora.auditing.scores import Scores, require_row_names
from tsqlora.errors import SettingsError, of_loaded_model
from tsqlora.model.eval_mode import eval_mode
from tsqlora.model.oom import halves, retry_on_oom
from tsqlora.model.request import Compute, LookRequest, RowNames, ScoringRule, require_precision
from tsqlora.model.terms import published
from tsqlora.rows.datasets import Dataset, require_reference
from tsqlora.tasks import Collate, Task, task_of
from tsqlora.tasks.forward import each_its_row


def scoring_request(
    model: nn.Module,
    dataset: Dataset,
    collate: Collate,
    *,
    rule: ScoringRule,
    task: Task | None,
    rows: RowNames,
    compute: Compute,
    trusted: Dataset | None,
) -> LookRequest:
    """Check what `score` was given, and return it as a request; the task follows from the model if it is None."""
    model = distributed.unwrapped(model)
    if len(dataset) == 0:
        raise SettingsError("there are no rows to score")
    require_row_names(len(dataset), hashes=rows.hashes, ids=rows.ids)
    require_separable(model)
    require_precision(rule.measured(), compute.autocast)
    if not isinstance(rule.reference, int):
        require_reference(rule.reference, dataset)
    if compute.parts is not None and rows.hashes is None:
        raise SettingsError("finished parts need hashes of the rows; pass rows=RowNames(hashes=...)")
    if task is None:  # that of the model's config, whose loss is the model's own
        own_task, safe = task_of(model), each_its_row(collate)

        def check(size: int) -> None:
            require_own_loss(model, safe([dataset[j] for j in range(size)]), own_task)

        with eval_mode(model):
            distributed.together(lambda: retry_on_oom(check, halves(min(compute.batch_size, len(dataset)))))
        task = own_task
    return LookRequest(
        dataset=dataset,
        collate=collate,
        task=task,
        rule=rule,
        rows=rows,
        compute=compute,
        trusted=trusted,
        excluded=None if trusted is None else equals(dataset, trusted),
    )


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
    trusted: Dataset | None = None,
) -> Scores:
    """Score every sample for the model, with a fitted head where its own is no better than a random one.

    Args:
        model: the model to train; it is left unchanged, also after an error.
        dataset: its rows go to `collate`, which returns the model's inputs and `labels`.
        rule: terms to measure and how to draw rows; by default the published terms and even draws.
        task: its loss must equal that of training; by default it follows from the model's config
            (text generation, regression for one label, else classification).
        rows: ids, hashes and lengths of the rows.
        compute: batch size, precision, progress, and a folder for finished parts.
        trusted: rows that represent what the model should be good at, in the format of the data set.

    If the model is at chance with any head, its gradients carry no information: score warns and draws rows evenly.
    Raises UnsupportedError naming what cannot be scored exactly; SettingsError.
    """
    request = scoring_request(
        model,
        dataset,
        collate,
        rule=rule or ScoringRule(terms=published().PAPER_TERMS),
        task=task,
        rows=rows or RowNames(),
        compute=compute or Compute(),
        trusted=trusted,
    )
    result = look(model, request)
    result.undo()
    why_even = request.task.reading.why_even if result.scores.even else None
    unready = result.why_not and f"rows are drawn evenly, and have no terms of gradients: {result.why_not}"
    for why in filter(None, (why_even, unready, result.scores.caution)):
        warnings.warn(why, stacklevel=3)
    return result.scores
