"""The inputs of the last linear layer at tagged tokens, on which heads of tags are fitted and tags are audited."""

from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import torch
from scipy.special import log_softmax
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import Subset
from transformers import PreTrainedModel

from tsqlora.compat.shapes import Float, Int
from tsqlora.data.batches import sorted_batches
from tsqlora.gradients.eval_mode import eval_mode
from tsqlora.quality.forward_pass import Forward, Head, hidden_states, read_head, recorded
from tsqlora.quality.passes import Columns, run_pass
from tsqlora.quality.rows import Dataset, lengths_of
from tsqlora.quality.rule import Compute
from tsqlora.tasks import Task
from tsqlora.tasks.forward import Batch, Collate, base_model, model_logits, precision, split_labels
from tsqlora.tasks.generation import IGNORED


@dataclass(frozen=True, slots=True, eq=False)
class TagFeatures:
    """The tagged tokens of some rows, in the order of the rows."""

    features: Float[np.ndarray, "n d"]
    tags: Int[np.ndarray, " n"]
    losses: Float[np.ndarray, " n"]
    rows: Int[np.ndarray, " n"]
    """The place of each token's row in the list of rows."""
    numbers: Int[np.ndarray, " n"]
    """The number of each token among the tagged tokens of its row."""
    count: int
    """How many rows these are, those without a tag included."""

    def forward(self, logits: Float[np.ndarray, "n k"] | None) -> Forward:
        """Return the result of a forward pass over the rows: with these logits, else with the model's own."""
        losses = self.losses if logits is None else -log_softmax(logits, axis=1)[np.arange(len(self.tags)), self.tags]
        counts = np.bincount(self.rows, minlength=self.count)
        means = np.bincount(self.rows, losses, minlength=self.count) / counts.clip(1)
        return Forward(counts, means.astype(np.float32))


def tag_features(
    model: nn.Module,
    dataset: Dataset,
    rows: Int[np.ndarray, " m"],
    collate: Collate,
    task: Task,
    compute: Compute,
    *,
    early: bool = False,
    without: int | None = None,
) -> tuple[Head, TagFeatures] | None:
    """Return the last linear layer and its inputs at tagged tokens; None without such a layer.

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
        layer, first = read_head(model, some, longest, collate, task)
        if layer is None:
            return None

        def measure(places: np.ndarray, batch: Batch) -> Columns:
            inputs, labels = split_labels(batch, model)
            with recorded([layer.linear]) as calls, hidden_states(model if early else None, early=True) as states:
                logits = model_logits(model, {**inputs, **further}, task)
            features = torch.cat([calls[layer.linear][0].float(), *(state.float() for state in states)], dim=-1)
            tagged = labels != IGNORED
            numbers = tagged.cumsum(dim=1) - 1
            if without is not None:
                tagged &= labels != without
            losses = cross_entropy(logits[tagged], labels[tagged], reduction="none")
            place = torch.from_numpy(places).to(labels.device)[tagged.nonzero()[:, 0]]
            parts.append((features[tagged].cpu(), labels[tagged], losses.float(), place, numbers[tagged]))
            return {}

        run_pass(model, measure, some, collate, replace(compute, progress=None), lengths=lengths, first=first)
    columns = [torch.cat(column).numpy(force=True) for column in zip(*parts, strict=True)]
    order = np.argsort(columns[3], kind="stable")
    return layer, TagFeatures(*(column[order] for column in columns), count=len(rows))
