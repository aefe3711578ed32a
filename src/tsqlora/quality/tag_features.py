"""The inputs of the last linear layer at tagged tokens, on which heads of tags are fitted and tags are audited."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from scipy.special import log_softmax
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from tsqlora.compat.shapes import Float, Int
from tsqlora.gradients.eval_mode import eval_mode
from tsqlora.oom import BatchSplitter, halves, retry_on_oom
from tsqlora.quality.forward_pass import Forward, Head, find_head, hidden_states, recorded
from tsqlora.quality.rows import Dataset, lengths_of
from tsqlora.quality.rule import Compute
from tsqlora.tasks import Task
from tsqlora.tasks.forward import Collate, base_model, model_logits, precision, split_labels
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
    splitter, parts = BatchSplitter(), list[tuple[Tensor, ...]]()
    with eval_mode(model), torch.no_grad(), precision(next(model.parameters()).device, compute.autocast):
        # Rows of like length share a batch, which saves padding.
        by_length = np.argsort(lengths_of([dataset[int(j)] for j in rows]), kind="stable")
        batches = [by_length[first : first + compute.batch_size] for first in range(0, len(rows), compute.batch_size)]

        def read(places: np.ndarray) -> tuple[dict[str, Any], Tensor]:
            return split_labels(collate([dataset[int(rows[j])] for j in places]), model)

        def find(size: int) -> Head | None:
            inputs, _ = read(batches[0][:size])
            return find_head(model, partial(model_logits, model, inputs, task))

        layer = retry_on_oom(find, halves(len(batches[0])))
        if layer is None:
            return None

        def measure(places: np.ndarray) -> tuple[Tensor, ...]:
            inputs, labels = read(places)
            with recorded([layer.linear]) as calls, hidden_states(model if early else None, early=True) as states:
                logits = model_logits(model, {**inputs, **further}, task)
            features = torch.cat([calls[layer.linear][0].float(), *(state.float() for state in states)], dim=-1)
            tagged = labels != IGNORED
            numbers = tagged.cumsum(dim=1) - 1
            if without is not None:
                tagged &= labels != without
            losses = cross_entropy(logits[tagged], labels[tagged], reduction="none")
            place = torch.from_numpy(places).to(labels.device)[tagged.nonzero()[:, 0]]
            return features[tagged].cpu(), labels[tagged], losses.float(), place, numbers[tagged]

        for places in batches:
            parts += splitter.of(places, measure)
    columns = [torch.cat(column).numpy(force=True) for column in zip(*parts, strict=True)]
    order = np.argsort(columns[3], kind="stable")
    return layer, TagFeatures(*(column[order] for column in columns), count=len(rows))
