"""Apply a look to rows that it was not taken at: a pure function of a batch, for any engine."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from tsqlora import distributed
from tsqlora.errors import SettingsError, UnsupportedError
from tsqlora.gradients.sites import plain_name
from tsqlora.quality.forward_pass import ACTIVATIONS, Forward, Head, forward_pass
from tsqlora.quality.judge import DOUBT
from tsqlora.quality.look import predictions
from tsqlora.quality.rows import Dataset
from tsqlora.quality.rule import Compute, RowNames
from tsqlora.quality.saved_look import SavedLook
from tsqlora.quality.scores import PREDICTIONS, Scores, from_terms
from tsqlora.tasks import Batch, Collate, Task, task_of

MISSING = "duplicates and leaks are no property of a row: `tsqlora audit` finds them among all rows"


def apply(
    model: nn.Module, look: SavedLook | str | Path, batch: Batch, *, hashes: Sequence[str] | None = None
) -> dict[str, np.ndarray]:
    """Return columns of scores for the rows of a collated batch, without any other row.

    These are `loss`, with the fitted head, and of classes `predicted`, `predicted_probability`, `label_probability`,
    and `wrong_probability` where the look has a judge. The model is the one that took the look, with its own head; it
    is left unchanged. A row of the look, by its hash, gets the columns of the look, which come from fits without it.

    Raises UnsupportedError for a task without a row of logits for each sample, and for a model that is sharded.
    """
    look = look if isinstance(look, SavedLook) else SavedLook.load(look)
    n = len(batch["labels"])

    def some(rows: Sequence[int]) -> dict[str, Tensor]:
        return {name: values[list(rows)] for name, values in batch.items()}

    names = RowNames(hashes=hashes, lengths=[0] * n)
    return columns_of_rows(model, look, range(n), some, task=task_of(model), rows=names, compute=Compute(max(n, 1)))


def columns_of_rows(
    model: nn.Module,
    look: SavedLook,
    dataset: Dataset,
    collate: Collate,
    *,
    task: Task,
    rows: RowNames,
    compute: Compute,
) -> dict[str, np.ndarray]:
    """Return the columns of `apply` for the rows of a data set, and their labels."""
    distributed.require_whole(model)
    if task.answers is None or task.reading.has_reference:
        raise UnsupportedError(
            f"a look is applied to rows with a label each, and the task is {task.name}; score all rows together: "
            "tsqlora score CONFIG"
        )
    judges = look.verdict is not None
    forward, head = forward_pass(
        distributed.unwrapped(model), dataset, collate, task=task, compute=compute, rows=rows, mean=judges
    )
    logits, labels = _logits(look, forward, head), forward.labels
    columns = {"labels": labels, "loss": task.loss(torch.from_numpy(logits), torch.from_numpy(labels)).numpy()}
    wrong = np.zeros(len(labels))
    if look.verdict is not None:
        parts = [part for part in (forward.features, forward.mean) if part is not None]
        logits, wrong = look.verdict.of(np.concatenate(parts, axis=1, dtype=np.float32), labels)
    columns |= predictions(logits.astype(np.float32), labels, task.answers)
    if look.verdict is not None and look.verdict.evident:
        columns["wrong_probability"] = wrong
    return _with_own(columns, look.scores, rows.hashes)


def _logits(look: SavedLook, forward: Forward, head: Head | None) -> np.ndarray:
    """Logits with the head of the look; the model's own where the look kept it."""
    assert forward.logits is not None
    if not look.head:
        return forward.logits.astype(np.float32)
    assert head is not None
    assert forward.features is not None
    features, last = torch.from_numpy(forward.features).float(), plain_name(head.name)
    layers = {name.rpartition(".")[0] for name in look.head}
    for layer in sorted(layers, key=lambda layer: layer == last):  # the dense layer first
        inputs = features
        if layer != last:
            assert forward.dense is not None
            inputs = torch.from_numpy(forward.dense).float()
        outputs = linear(inputs, look.head[f"{layer}.weight"], look.head.get(f"{layer}.bias"))
        features = outputs if layer == last else ACTIVATIONS[head.activation](outputs)
    return features.numpy()


def _with_own(columns: dict[str, np.ndarray], scores: Scores, hashes: Sequence[str] | None) -> dict[str, np.ndarray]:
    """Replace the columns of rows that the look has seen by those of the look, from fits without these rows."""
    if hashes is None or scores.hashes is None:
        return columns
    places = {name: j for j, name in enumerate(scores.hashes)}
    both = [(j, places[name]) for j, name in enumerate(hashes) if name in places]
    here, there = np.array(both, dtype=np.int64).reshape(-1, 2).T
    own: Mapping[str, np.ndarray] = {"loss": scores.terms["loss"], **scores.predictions}
    for name in columns.keys() & own.keys() & {"loss", *PREDICTIONS}:
        columns[name][here] = own[name][there]
    return columns


def scores_of_rows(columns: Mapping[str, np.ndarray], look: SavedLook, rows: RowNames, *, task: Task) -> Scores:
    """Return scores of the rows: even draws without those that the judge calls wrong.

    Raises SettingsError for a rule with weights, which standardise terms over all rows.
    """
    if look.rule.weights is not None:
        raise SettingsError(
            f"the look in {look.path} draws by Q, which compares all rows with each other; take one without "
            "quality.weights and quality.preset, or score all rows together: tsqlora score CONFIG"
        )
    record: dict[str, Any] = {**rows.about, "noise": look.summary["noise"], "out_of_sample": True}
    scores = from_terms(
        {"loss": columns["loss"].astype(np.float64)},
        labels=columns["labels"],
        stratified=task.reading.stratified,
        weights=look.rule.q,
        temperature=1.0,
        even=True,
        record={**record, "look_folder": str(look.path), "missing": MISSING},
        hashes=rows.hashes,
        ids=rows.ids,
        predictions={name: columns[name] for name in PREDICTIONS if name in columns},
    )
    wrong = columns.get("wrong_probability", np.zeros(len(scores))) > DOUBT
    return scores.drop(wrong, "confident negative") if wrong.any() else scores
