"""Units: what heads are fitted on and judges judge, a row's label, each label of a set, or each tagged token."""

from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import torch
from scipy.special import log_softmax
from torch import Tensor
from torch.nn import Module
from torch.nn.functional import cross_entropy
from torch.utils.data import Subset
from transformers import PreTrainedModel

from tsqlora.libs.shapes import Bool, Float, Int, Shaped
from tsqlora.model.eval_mode import eval_mode
from tsqlora.model.forward import Forward, Head, hidden_states, read_head, recorded
from tsqlora.model.passes import Columns, run_pass
from tsqlora.model.request import Compute
from tsqlora.rows.batches import IGNORED, sorted_batches
from tsqlora.rows.datasets import Dataset, lengths_of
from tsqlora.tasks import Batch, Collate, Task
from tsqlora.tasks.forward import base_model, precision, split_labels


@dataclass(frozen=True, slots=True, eq=False)
class Units:
    """The units of some rows, in the order of the rows."""

    features: Float[np.ndarray, "n d"]
    labels: Int[np.ndarray, " n"]
    """Numbers below `width`."""
    rows: Int[np.ndarray, " n"]
    """The place of each unit's row in the list of rows."""
    width: int
    count: int
    """How many rows these are, those without a unit included."""
    excluded: Bool[np.ndarray, "n k"] | None = None
    """The other labels of the unit's row."""
    losses: Float[np.ndarray, " n"] | None = None
    """Of the model's own head, of tokens."""
    numbers: Int[np.ndarray, " n"] | None = None
    """The number of each token among the tagged tokens of its row."""

    @property
    def groups(self) -> Int[np.ndarray, " n"] | None:
        """The rows, where units of one row give each other away."""
        return None if self.excluded is None and self.numbers is None else self.rows

    def forward(self, logits: Float[np.ndarray, "n k"] | None) -> Forward:
        """Return the result of a forward pass over rows of tokens: with these logits, else with the model's own."""
        every = np.arange(len(self.labels))
        losses = self.losses if logits is None else -log_softmax(logits, axis=1)[every, self.labels]
        counts = np.bincount(self.rows, minlength=self.count)
        means = np.bincount(self.rows, losses, minlength=self.count) / counts.clip(1)
        return Forward(counts, means.astype(np.float32))


def units_of(features: Float[np.ndarray, "n d"], labels: Shaped[np.ndarray, "n *k"], width: int | None = None) -> Units:
    """Return the labels of rows as units; of n × k of 0 and 1, every 1 is one."""
    if labels.ndim == 1:
        width = int(labels.max()) + 1 if width is None else width
        return Units(features, labels, np.arange(len(labels)), width, len(labels))
    rows, own = np.nonzero(labels > 0.5)
    others = labels[rows] > 0.5
    others[np.arange(len(own)), own] = False
    return Units(features[rows], own, rows, labels.shape[1], len(labels), others)


def token_units(
    model: Module,
    dataset: Dataset,
    rows: Int[np.ndarray, " m"],
    collate: Collate,
    *,
    task: Task,
    compute: Compute,
    early: bool = False,
    without: int | None = None,
) -> tuple[Head, Units] | None:
    """Return the last linear layer, and the tagged tokens with its inputs; None without such a layer.

    With `early` followed by the hidden states after a third of the layers, which know the word itself better. Tokens
    with the tag `without` are left out.
    """
    deep = early and isinstance(base_model(model), PreTrainedModel)
    further: dict[str, Any] = {"output_hidden_states": True} if deep else {}
    parts: list[tuple[Tensor, ...]] = []
    with eval_mode(model), torch.no_grad(), precision(next(model.parameters()).device, compute.autocast):
        lengths, some = lengths_of(dataset), Subset(cast(Any, dataset), rows.tolist())
        lengths = [lengths[j] for j in rows]
        longest = sorted_batches(lengths, compute.batch_size)[0]
        layer, first = read_head(model, some, longest, collate, task, dimensions=3)
        if layer is None:
            return None

        def measure(places: np.ndarray, batch: Batch) -> Columns:
            inputs, labels = split_labels(batch, model)
            with recorded([layer.linear]) as calls, hidden_states(model if early else None, early=True) as states:
                logits = task.reading.logits(model, {**inputs, **further})
            features = torch.cat([calls[layer.linear][0].float(), *(state.float() for state in states)], dim=-1)
            tagged = labels != IGNORED
            numbers = tagged.cumsum(dim=1) - 1
            if without is not None:
                tagged &= labels != without
            losses = cross_entropy(logits[tagged], labels[tagged], reduction="none")
            place = torch.from_numpy(places).to(labels.device)[tagged.nonzero()[:, 0]]
            parts.append((features[tagged].cpu(), labels[tagged], place, losses.float(), numbers[tagged]))
            return {}

        run_pass(model, measure, some, collate, replace(compute, progress=None), lengths=lengths, first=first)
    columns = [torch.cat(column).numpy(force=True) for column in zip(*parts, strict=True)]
    order = np.argsort(columns[2], kind="stable")
    features, labels, places, losses, numbers = (column[order] for column in columns)
    width = layer.linear.out_features
    return layer, Units(features, labels, places, width, len(rows), losses=losses, numbers=numbers)
