"""The question to the pool: does it teach something else than the trusted rows?  (docs/method.md)

Before the steps that trusted rows could have, the losses of the trusted rows are compared with those of a part of the
pool that was held out. Neither was in a fit or in a step, so that a difference is one of what they teach.
"""

from typing import Any

import numpy as np
import torch
from torch import nn

from tsqlora import distributed
from tsqlora.auditing.draw.subset import inputs_of
from tsqlora.libs.shapes import Bool, Float, Int
from tsqlora.model.eval_mode import eval_mode
from tsqlora.model.linear import row_losses
from tsqlora.model.passes import Columns, run_pass
from tsqlora.model.request import Compute, LookRequest
from tsqlora.rows.datasets import Dataset
from tsqlora.sampling import draw
from tsqlora.seeds import stream
from tsqlora.tasks import Batch, Collate, Task, answers_of
from tsqlora.tasks.forward import split_labels

HELD_OUT = 0.1
"""Share of the pool that is held out."""
MOST_HELD_OUT, LEAST_HELD_OUT = 400, 10
FEWEST = 5
"""Rows of a class from which one may be held out."""
ENOUGH_TRUSTED = 32
"""With 16 trusted rows one of three trials learned the reverse of a shortcut; with 32 none did."""
CONTRADICTED = 2.0
"""Standard errors by which the loss of trusted rows is above the pool's where the pool contradicts them."""


def why_unasked(
    trusted: Dataset, suspects: Bool[np.ndarray, " m"], task: Task, model: nn.Module, collate: Collate
) -> str | None:
    """Return why there is no question to the pool, so that trusted rows are mixed in; None if there is.

    Texts and pairs have none; and trusted rows that lack a class, alone, would make the model forget it.
    """
    if not task.reading.head(None):  # that is new
        return f"the question is one for classes, numbers and tags, and the task is {task.name}"
    if (counted := int((~suspects).sum())) < ENOUGH_TRUSTED:
        besides = f" besides the {suspects.sum()} that were reviewed as suspects" * bool(suspects.any())
        return f"the question to the pool needs {ENOUGH_TRUSTED} trusted rows{besides}, and there are {counted}"
    with eval_mode(model):  # reading rows may draw random numbers, as augmentation does
        labels = (collate([trusted[j]])["labels"].numpy(force=True) for j in range(len(trusted)))
        lacking = task.reading.lacking(labels, getattr(model, "config", None))
    return f"they lack {lacking} of the classes, which training on them alone would unlearn" if lacking else None


def held_out(request: LookRequest, labels: Int[np.ndarray, " n"] | None) -> Bool[np.ndarray, " n"]:
    """Return the rows that are in no fit and in no step before the question, by class where rows have one.

    These are a tenth of the pool's different inputs, at most 400, with all their copies; none of a small pool.
    """
    rows, own = len(request.dataset), ~request.twins
    if request.first is not None:
        return request.first.left_out_as("held out")
    if not request.asks:
        return np.zeros(rows, dtype=np.bool_)
    inputs = inputs_of(request.dataset)
    may = own & (inputs == np.arange(rows))  # the first of its copies
    if labels is not None:
        may &= np.bincount(labels[may], minlength=labels.max() + 1)[labels] >= FEWEST
    size = min(int(may.sum() * HELD_OUT), MOST_HELD_OUT)
    if size < LEAST_HELD_OUT:
        return np.zeros(rows, dtype=np.bool_)
    strata = None if labels is None else np.where(may, labels, -1)
    if strata is not None and len(np.unique(strata)) > size:
        strata = None
    rng = stream("held-out rows", request.rule.seed)
    chosen = draw(np.zeros(rows), size=size, temperature=1.0, rng=rng, strata=strata, kept=may)
    return np.isin(inputs, chosen) & own


def measured(
    model: nn.Module, rows: Dataset, collate: Collate, task: Task, compute: Compute
) -> tuple[Float[np.ndarray, " n"], Int[np.ndarray, " n"], float | None]:
    """Return plain losses of rows, their classes, 0 where they have none, and where a row has one answer the metric.

    Without dropout; every process measures all rows, since a sharded model needs all processes.
    """
    answers = answers_of(task)

    def measure(_: np.ndarray, batch: Batch) -> Columns:
        inputs, labels = split_labels(batch, model)
        logits = task.reading.logits(model, inputs)
        columns = {"logits": logits, "labels": labels} if answers is not None else {"loss": task.loss(logits, labels)}
        return {name: value.numpy(force=True) for name, value in columns.items()}

    with torch.no_grad():
        columns = run_pass(model, measure, rows, collate, compute)
    if answers is None:
        return columns["loss"].astype(np.float64), np.zeros(len(rows), np.int64), None
    logits, labels = columns["logits"], columns["labels"]
    loss = row_losses(logits.astype(np.float64), labels, answers.link)
    classes = task.reading.strata(labels)
    classes = np.zeros(len(rows), np.int64) if classes is None else classes
    return loss, classes, task.metrics(logits, labels).get(task.headline)


def standard_errors(
    trusted: Float[np.ndarray, " m"],
    trusted_classes: Int[np.ndarray, " m"],
    pool: Float[np.ndarray, " n"],
    pool_classes: Int[np.ndarray, " n"],
) -> float:
    """Return how far the trusted rows' mean loss is above the pool's, in standard errors.

    Losses are compared within classes, weighted by the trusted rows' shares. A class that the held-out rows lack does
    not count; one with a single row has the variance of all.
    """

    def variance(loss: np.ndarray, whole: np.ndarray) -> float:
        return float((loss if len(loss) > 1 else whole).var(ddof=1)) / len(loss)

    difference = squared = 0.0
    for name in np.intersect1d(trusted_classes, pool_classes):
        ours, theirs = trusted[trusted_classes == name], pool[pool_classes == name]
        share = len(ours) / len(trusted)
        difference += share * (ours.mean() - theirs.mean())
        squared += share**2 * (variance(ours, trusted) + variance(theirs, pool))
    return float(difference / np.sqrt(squared)) if squared != 0 else 0.0  # nan stays


def ask(
    model: nn.Module, trusted: Dataset, pool: Dataset, collate: Collate, task: Task, compute: Compute
) -> dict[str, Any]:
    """Return the answer of these held-out rows of the pool, the same in every process, as plain JSON."""
    parts = {
        name: measured(model, rows, collate, task, compute) for name, rows in (("trusted", trusted), ("pool", pool))
    }
    z = standard_errors(*parts["trusted"][:2], *parts["pool"][:2])
    if not np.isfinite(z):
        return distributed.from_first({"why_not": "losses are not finite", "contradicted": False})
    answer: dict[str, Any] = {"standard_errors": z, "contradicted": z >= CONTRADICTED}
    for name, (loss, *_) in parts.items():
        answer |= {f"{name}_rows": len(loss), f"{name}_loss": float(loss.mean())}
    metrics = {f"{name}_metric": metric for name, (*_, metric) in parts.items()}
    if all(value is not None and np.isfinite(value) for value in metrics.values()):
        answer |= {**metrics, "metric": task.headline}
    return distributed.from_first(answer)
