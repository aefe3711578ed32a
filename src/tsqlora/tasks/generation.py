"""Text generation: mean cross-entropy over the target tokens of each sample."""

from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from tsqlora.compat.shapes import Bool, Float, Int
from tsqlora.compat.torch import upcast

IGNORED = -100
"""The label of a token that is not a target."""
CHUNK = 2**22
"""Logits that are in float32 at a time."""


@dataclass(frozen=True, slots=True)
class TokenCounts:
    """Token-level results of teacher forcing for n samples."""

    loss: Float[Tensor, " n"]
    """Summed over tokens, so that batches add up."""
    right: Int[Tensor, " n"]
    """Tokens that have the largest logit."""
    tokens: Int[Tensor, " n"]


@dataclass(frozen=True, slots=True)
class Generation:
    """The mean loss over a sample's target tokens, independent of its length.

    With `causal` the logits at a token predict the next one, as in a decoder-only model; else the token itself, as in
    an encoder-decoder. Training averages over all tokens of a batch, as transformers' Trainer does, so that long
    targets weigh more than short ones.
    """

    name: str
    causal: bool
    label_smoothing: float = 0.0
    answer: ClassVar[str] = "text"
    headline: ClassVar[str] = "token_accuracy"
    measured: ClassVar[tuple[str, ...]] = ("loss", "perplexity", "token_accuracy")

    def loss(self, logits: Float[Tensor, "n t v"], labels: Int[Tensor, "n t"]) -> Float[Tensor, " n"]:
        """Return the mean over target tokens per sample; 0 for a sample without targets.

        The backward pass overwrites the logits with their gradient: with a large vocabulary both do not fit in memory.
        """
        targets = self.targets(labels)
        losses = cast(Tensor, cast(Any, _TokenLosses).apply(logits, targets, self.label_smoothing))
        return losses.sum(1) / (targets != IGNORED).sum(1).clamp_min(1)

    def targets(self, labels: Int[Tensor, "n t"]) -> Int[Tensor, "n t"]:
        """Return the target of the logits at each token; IGNORED where there is none."""
        return F.pad(labels[:, 1:], (0, 1), value=IGNORED) if self.causal else labels

    def batch_loss(self, losses: Float[Tensor, " n"], labels: Int[Tensor, "n t"]) -> Float[Tensor, ""]:
        """Return the mean over all target tokens of the batch."""
        tokens = (self.targets(labels) != IGNORED).sum(1)
        return (losses * tokens).sum() / tokens.sum().clamp_min(1)

    @torch.no_grad()
    def count(self, logits: Float[Tensor, "n t v"], labels: Int[Tensor, "n t"]) -> TokenCounts:
        """Return each sample's summed loss, correct tokens and tokens."""
        targets = self.targets(labels)
        flat, target = logits.flatten(0, 1), targets.flatten()
        losses, right = upcast(flat.new_zeros(len(target))), torch.zeros_like(target)
        for rows in _chunks(target != IGNORED, flat.shape[1]):
            z = upcast(flat[rows])
            losses[rows] = F.cross_entropy(z, target[rows], reduction="none")
            right[rows] = (z.argmax(1) == target[rows]).long()
        tokens = (targets != IGNORED).sum(1)
        return TokenCounts(losses.view_as(targets).sum(1), right.view_as(targets).sum(1), tokens)


class _TokenLosses(torch.autograd.Function):
    """Cross-entropy per token, 0 without a target; only a chunk of tokens is in float32 at a time."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, smoothing: float) -> Tensor:
        flat, target = logits.flatten(0, 1), targets.flatten()
        losses = upcast(flat.new_zeros(len(target)))
        for rows in _chunks(target != IGNORED, flat.shape[1]):
            losses[rows] = F.cross_entropy(
                upcast(flat[rows]), target[rows], reduction="none", label_smoothing=smoothing
            )
        ctx.save_for_backward(logits, targets)
        ctx.smoothing = smoothing
        return losses.view_as(targets)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        logits, targets = ctx.saved_tensors
        (grad,) = grad_outputs
        flat, target, smoothing = logits.flatten(0, 1), targets.flatten(), ctx.smoothing
        grad = grad.flatten()
        for rows in _chunks(target != IGNORED, flat.shape[1]):
            p = upcast(flat[rows]).softmax(1)
            p.sub_(smoothing / p.shape[1])
            p.scatter_add_(1, target[rows][:, None], p.new_full((len(rows), 1), smoothing - 1))
            flat[rows] = (p * grad[rows][:, None]).to(flat.dtype)
        flat[target == IGNORED] = 0
        return flat.view_as(logits), None, None


def _chunks(mask: Bool[Tensor, " m"], vocabulary: int) -> tuple[Int[Tensor, " c"], ...]:
    """Split the positions in the mask so that each part has at most CHUNK logits."""
    rows = mask.nonzero().squeeze(1)
    return rows.split(max(1, CHUNK // vocabulary)) if len(rows) else ()
