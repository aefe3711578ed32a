"""The reference model's part in the loss of preference pairs: its log-ratios, measured once per row."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import nn

from tsqlora.compat.shapes import Float, Int
from tsqlora.quality.forward_pass import Forward, forward_pass
from tsqlora.quality.rows import Dataset
from tsqlora.quality.rule import LookRequest


@dataclass(frozen=True, slots=True, eq=False)
class Pairs:
    """Rows with the log-ratio of the reference model, as `reference`."""

    rows: Dataset
    reference: Float[np.ndarray, " n"]
    tokens: Int[np.ndarray, " n"]
    """Target tokens of both answers."""

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> Mapping[str, Any]:
        return {**self.rows[i], "reference": float(self.reference[i])}

    def forward(self) -> Forward:
        """Return the result of a forward pass of the reference model itself."""
        return Forward(self.tokens, np.full(len(self), math.log(2), dtype=np.float32))


def with_reference(model: nn.Module, request: LookRequest) -> LookRequest:
    """Take the model as it stands for the reference, and measure its log-ratios of all rows in a forward pass."""

    def measured(dataset: Dataset, **options: Any) -> Pairs:
        forward, _ = forward_pass(model, dataset, request.collate, task=request.task, **options)
        assert forward.logits is not None
        return Pairs(dataset, forward.logits[:, 0], forward.labels)

    compute, trusted = request.compute, request.trusted
    pool = measured(request.dataset, compute=compute, rows=request.rows)
    if trusted is not None:
        trusted = replace(trusted, rows=measured(trusted.rows, compute=replace(compute, parts=None, progress=None)))
    return replace(request, dataset=pool, trusted=trusted)
