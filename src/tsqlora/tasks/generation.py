"""Text generation: each sample's mean cross-entropy over its target tokens."""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, cast

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tsqlora.compat.torch import upcast

IGNORED = -100
"""The label of a token that is not trained on."""

CHUNK = 2**22
"""Entries of logits that exist in float32 at a time."""


@dataclass(frozen=True, slots=True)
class TokenCounts:
    """What teacher forcing says of each of n samples' target tokens."""

    loss: Float[Tensor, " n"]
    """Sum over the tokens, so that it adds up."""
    right: Int[Tensor, " n"]
    """Tokens to which the model gives the largest logit."""
    tokens: Int[Tensor, " n"]


@dataclass(frozen=True, slots=True)
class Generation:
    """The mean over a sample's target tokens, so that its length does not decide (METHOD, notation).

    `causal`: the logits at a token are of the next one, as decoders alone have them; else of the token
    itself, as a decoder behind an encoder has them.  Training takes the mean over all tokens of a batch, as
    transformers' Trainer does: there a long target counts for more than a short one.
    """

    name: str
    causal: bool
    label_smoothing: float = 0.0
    answer: ClassVar[Literal["class", "number", "text"]] = "text"
    headline: ClassVar[str] = "token_accuracy"
    measured: ClassVar[tuple[str, ...]] = ("loss", "perplexity", "token_accuracy")

    def loss(self, logits: Float[Tensor, "n t v"], labels: Int[Tensor, "n t"]) -> Float[Tensor, " n"]:
        """The mean over the target tokens, one number a sample; 0 of a sample without any.

        In its backward pass the gradient takes the place of the logits, which are worth nothing afterwards: of a large
        vocabulary there is no room for both.
        """
        targets = self.targets(labels)
        losses = cast(Tensor, cast(Any, _TokenLosses).apply(logits, targets, self.label_smoothing))
        return losses.sum(1) / (targets != IGNORED).sum(1).clamp_min(1)

    def targets(self, labels: Int[Tensor, "n t"]) -> Int[Tensor, "n t"]:
        """What the logits at each token are to say; IGNORED where nothing."""
        return F.pad(labels[:, 1:], (0, 1), value=IGNORED) if self.causal else labels

    def batch_loss(self, losses: Float[Tensor, " n"], labels: Int[Tensor, "n t"]) -> Float[Tensor, ""]:
        """What training makes of the samples' losses: the mean over all target tokens."""
        tokens = (self.targets(labels) != IGNORED).sum(1)
        return (losses * tokens).sum() / tokens.sum().clamp_min(1)

    @torch.no_grad()
    def count(self, logits: Float[Tensor, "n t v"], labels: Int[Tensor, "n t"]) -> TokenCounts:
        """Each sample's loss, right tokens and tokens, as sums."""
        targets = self.targets(labels)
        flat, wanted = logits.flatten(0, 1), targets.flatten()
        losses, right = upcast(flat.new_zeros(len(wanted))), torch.zeros_like(wanted)
        for rows in _chunks(wanted != IGNORED, flat.shape[1]):
            z = upcast(flat[rows])
            losses[rows] = F.cross_entropy(z, wanted[rows], reduction="none")
            right[rows] = (z.argmax(1) == wanted[rows]).long()
        tokens = (targets != IGNORED).sum(1)
        return TokenCounts(losses.view_as(targets).sum(1), right.view_as(targets).sum(1), tokens)


def without_prompt(
    input_ids: Int[Tensor, "n t"], labels: Int[Tensor, "n t"]
) -> tuple[dict[str, Int[Tensor, "n u"]], Int[Tensor, "n u"]]:
    """The target tokens alone, moved to the front, and their labels; of the first one nothing says what it follows.

    >>> without_prompt(torch.tensor([[5, 6, 7, 8]]), torch.tensor([[-100, -100, 7, 8]]))[0]["input_ids"]
    tensor([[7, 8]])
    """
    target = labels != IGNORED
    counts = target.sum(1)
    order = (~target).long().argsort(dim=1, stable=True)[:, : int(counts.max())]
    mask = torch.arange(order.shape[1], device=labels.device) < counts[:, None]
    return {"input_ids": input_ids.gather(1, order), "attention_mask": mask.long()}, labels.gather(1, order)


class _TokenLosses(torch.autograd.Function):
    """Cross-entropy of every token, 0 where there is no target; float32 exists for a chunk of the tokens at a time."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, smoothing: float) -> Tensor:
        flat, wanted = logits.flatten(0, 1), targets.flatten()
        losses = upcast(flat.new_zeros(len(wanted)))
        for rows in _chunks(wanted != IGNORED, flat.shape[1]):
            losses[rows] = F.cross_entropy(
                upcast(flat[rows]), wanted[rows], reduction="none", label_smoothing=smoothing
            )
        ctx.save_for_backward(logits, targets)
        ctx.smoothing = smoothing
        return losses.view_as(targets)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        logits, targets = ctx.saved_tensors
        (grad,) = grad_outputs
        flat, wanted, smoothing = logits.flatten(0, 1), targets.flatten(), ctx.smoothing
        grad = grad.flatten()
        for rows in _chunks(wanted != IGNORED, flat.shape[1]):
            p = upcast(flat[rows]).softmax(1)
            p.sub_(smoothing / p.shape[1])
            p.scatter_add_(1, wanted[rows][:, None], p.new_full((len(rows), 1), smoothing - 1))
            flat[rows] = (p * grad[rows][:, None]).to(flat.dtype)
        flat[wanted == IGNORED] = 0
        return flat.view_as(logits), None, None


def _chunks(wanted: Bool[Tensor, " m"], vocabulary: int) -> tuple[Int[Tensor, " c"], ...]:
    """Places of the tokens that are wanted, so many at a time that their logits are a chunk."""
    rows = wanted.nonzero().squeeze(1)
    return rows.split(max(1, CHUNK // vocabulary)) if len(rows) else ()
