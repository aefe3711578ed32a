"""Apply a look to rows with labels that it was not taken at, each by itself."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.functional import linear

from tsqlora import distributed
from tsqlora.auditing.labels.judge import judged_features
from tsqlora.auditing.look import predictions
from tsqlora.auditing.saved_look import SavedLook
from tsqlora.auditing.scores import PREDICTIONS, Scores, from_terms
from tsqlora.errors import SettingsError, UnsupportedError
from tsqlora.model.forward import ACTIVATIONS, Forward, Head, forward_pass
from tsqlora.model.modules import plain_name
from tsqlora.model.request import Compute, RowNames
from tsqlora.rows.datasets import Dataset
from tsqlora.rows.labels import UNSEEN
from tsqlora.tasks import Batch, Collate, Task, answers_of

MISSING = "duplicates and leaks do not show in a single row: `tsqlora audit` finds them among all rows"


def columns_of_rows(
    model: nn.Module,
    look: SavedLook,
    dataset: Dataset,
    collate: Collate,
    labels: np.ndarray,
    *,
    task: Task,
    rows: RowNames,
    compute: Compute,
) -> dict[str, np.ndarray]:
    """Return the columns of `tsqlora.apply` for the rows of a data set with these labels, and the labels."""
    distributed.require_whole(model)
    answers = answers_of(task)
    if answers is None:
        raise UnsupportedError(
            f"a look applies only to rows with one label each, and the task is {task.name}; score all rows together: "
            "tsqlora score CONFIG"
        )
    judges, single = look.verdict is not None, task.reading.judges()
    last = look.scores.predictions["logits"].shape[1] - 1 if single else 0

    def usable(some: list[Any]) -> Batch:
        batch = collate(some)
        return {**batch, "labels": batch["labels"].clamp(0, last)} if single else batch

    forward, head = forward_pass(
        distributed.unwrapped(model), dataset, usable, task=task, compute=compute, rows=rows, mean=judges
    )
    logits, clamped = _logits(look, forward, head), forward.labels
    unseen = clamped != labels if single else np.zeros(len(clamped), np.bool_)
    columns = {"labels": np.where(unseen, UNSEEN, clamped) if single else clamped}
    columns["loss"] = task.loss(torch.from_numpy(logits), torch.from_numpy(clamped)).numpy()
    if look.verdict is not None:
        logits, wrong = look.verdict.of(judged_features(forward), clamped)
        columns |= {"wrong_probability": wrong} if look.verdict.evident else {}
    columns |= predictions(logits.astype(np.float32), clamped, answers)
    columns = _with_own(columns, look.scores, rows.hashes)
    for name in columns.keys() & {"loss", "label_probability", "wrong_probability"} if unseen.any() else ():
        columns[name][unseen] = np.nan
    doubt = 1.0 if look.verdict is None else look.verdict.doubt[clamped]
    wrong = columns.get("wrong_probability", np.zeros(len(clamped))) > doubt
    columns["reason"] = np.select([unseen, wrong], ["unseen class", "confident negative"], "kept")
    return columns


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
            "quality.preset, or score all rows together: tsqlora score CONFIG"
        )
    reasons, loss = columns["reason"], columns["loss"].astype(np.float64)
    scores = from_terms(
        {"loss": np.nan_to_num(loss)},
        labels=columns["labels"],
        stratified=task.reading.judges(),
        weights=look.rule.q,
        temperature=1.0,
        even=True,
        record={
            **rows.about,
            "noise": look.summary["noise"],
            "out_of_sample": True,
            "answers": look.scores.record.answers,
            "look_folder": str(look.path),
            "missing": MISSING,
        },
        hashes=rows.hashes,
        ids=rows.ids,
        predictions={name: columns[name] for name in PREDICTIONS if name in columns},
    )
    for reason in sorted({*reasons.tolist()} - {"kept"}):
        scores = scores.drop(reasons == reason, reason, part=True)
    return replace(scores, terms={"loss": loss})
