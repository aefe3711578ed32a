"""Preferences: the DPO loss of a chosen and a rejected answer, as TRL's DPOTrainer has it (Rafailov et al., 2023)."""

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from tsqlora.compat.shapes import Float, Int
from tsqlora.tasks.generation import Generation

CAUSAL = Generation("causal-lm", causal=True)
"""The task of writing an answer."""


@dataclass(frozen=True, slots=True)
class Preference:
    """−log σ(β·m), where m is the model's log-ratio of the two answers minus that of the reference model.

    The reference is the model as it stands before training. There m is 0, and every loss is ln 2.
    """

    name: ClassVar[str] = "preference"
    answer: ClassVar[str] = "pair"
    headline: ClassVar[str] = "loss"
    measured: ClassVar[tuple[str, ...]] = ("loss",)

    beta: float = 0.1

    def margins(self, logits: Float[Tensor, "m t v"], targets: Int[Tensor, "m t"]) -> Float[Tensor, "n 1"]:
        """Return log p(chosen) − log p(rejected) of n = m/2 pairs, whose answers are neighbouring rows."""
        tokens = (CAUSAL.targets(targets) >= 0).sum(1)
        losses = (CAUSAL.loss(logits, targets) * tokens).unflatten(0, (-1, 2))
        return losses[:, 1:] - losses[:, :1]

    def loss(self, logits: Float[Tensor, "n 1"], labels: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
        """Return each pair's loss; the logits are m, and the labels count target tokens."""
        return F.softplus(-self.beta * logits.squeeze(1))

    def batch_loss(self, losses: Float[Tensor, " n"], labels: Int[Tensor, " n"]) -> Float[Tensor, ""]:
        """Return the mean over pairs."""
        return losses.mean()
