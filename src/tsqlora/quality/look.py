"""The look at the rows before the first step: so far its head start.  METHOD 1."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from tsqlora import distributed
from tsqlora.data.batches import sorted_batches
from tsqlora.gradients.eval_mode import eval_mode
from tsqlora.progress import Progress
from tsqlora.quality.features import Head, features_of, find_head, recorded
from tsqlora.quality.head_start import HeadStart, fit_start, install
from tsqlora.quality.linear_head import Kind, row_losses
from tsqlora.quality.rows import Dataset, lengths_of
from tsqlora.seeds import stream
from tsqlora.tasks import Task
from tsqlora.tasks.classification import Classification
from tsqlora.tasks.forward import Batch, Collate, each_its_row, model_logits, precision, split_labels
from tsqlora.tasks.regression import Regression

ROWS_TO_FIT = 50_000
"""A head is fitted on at most so many rows, drawn evenly: more hardly change it, and their features need not fit."""

Columns = dict[str, np.ndarray]


def start_head(
    model: nn.Module,
    rows: Dataset,
    collate: Collate,
    *,
    task: Task,
    batch_size: int = 32,
    seed: int = 0,
    autocast: torch.dtype | None = None,
    lengths: Sequence[int] | None = None,
    progress: Progress | None = None,
) -> HeadStart | None:
    """Fit the task's last linear layer on the features that it is given, and install it where it is better.

    One forward pass without dropout over the rows, at most 50,000 of them. None where there is nothing to fit: a model
    that writes text, a frozen head, or one whose last layer is not linear. Several processes share the pass; the first
    one fits.
    """
    if not isinstance(task, Classification | Regression):
        return None
    model, collate = distributed.unwrapped(model), each_its_row(collate)
    chosen = np.sort(stream("head start", seed).permutation(len(rows))[:ROWS_TO_FIT])
    sizes = np.asarray(lengths_of(rows) if lengths is None else lengths)[chosen]
    batches = [chosen[places] for places in sorted_batches([int(size) for size in sizes], batch_size)]
    device = next(model.parameters()).device
    with eval_mode(model), torch.no_grad(), precision(device, autocast, cache=False):
        head = _find(model, collate([rows[int(j)] for j in batches[0]]), task)
        if head is None:
            return None
        mine = distributed.together(lambda: _pass(model, rows, collate, task, head, batches, progress))
    columns = _in_order([part for parts in distributed.gathered(mine) for part in parts])
    start = distributed.once(lambda: _fit(columns, task, head, seed))
    if start.replaces:
        install(head, start)
    return start


def _find(model: nn.Module, batch: Batch, task: Task) -> Head | None:
    inputs, _ = split_labels(batch, model)
    return find_head(model, lambda: model_logits(model, inputs, task))


def _pass(
    model: nn.Module,
    rows: Dataset,
    collate: Collate,
    task: Task,
    head: Head,
    batches: Sequence[np.ndarray],
    progress: Progress | None,
) -> list[tuple[np.ndarray, Columns]]:
    """Features, logits and labels of this process's batches."""
    parts: list[tuple[np.ndarray, Columns]] = []
    mine, done = distributed.share(batches), 0
    layers = [layer for layer in (head.linear, head.dense) if layer is not None]
    for indices in mine:
        inputs, labels = split_labels(collate([rows[int(j)] for j in indices]), model)
        with recorded(layers) as seen:
            logits = model_logits(model, inputs, task)
        columns = {"features": features_of(seen, head.linear, logits), "logits": logits, "labels": labels}
        if head.dense is not None:
            columns["dense"] = seen[head.dense][0]
        parts.append((indices, {name: _numpy(value) for name, value in columns.items()}))
        done += len(indices)
        if progress is not None:
            progress("look", done, sum(map(len, mine)))
    return parts


def _in_order(parts: list[tuple[np.ndarray, Columns]]) -> Columns:
    order = np.argsort(np.concatenate([indices for indices, _ in parts]), kind="stable")
    return {name: np.concatenate([columns[name] for _, columns in parts])[order] for name in parts[0][1]}


def _fit(columns: Columns, task: Task, head: Head, seed: int) -> HeadStart:
    weights = task.class_weights if isinstance(task, Classification) else None
    kind: Kind = "classes" if isinstance(task, Classification) else "numbers"
    return fit_start(
        columns["features"],
        columns["labels"],
        row_losses(columns["logits"].astype(np.float64), columns["labels"], kind),
        kind=kind,
        width=head.linear.out_features,
        intercept=head.linear.bias is not None,
        class_weights=None if weights is None else weights.numpy(force=True),
        dense_inputs=columns.get("dense"),
        activation=head.activation,
        rng=lambda: stream("head folds", seed),
    )


def _numpy(values: Tensor) -> np.ndarray:
    return (values.float() if values.is_floating_point() else values).numpy(force=True)
