"""Text generation: mean cross-entropy over the target tokens of each sample."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tsqlora.libs.shapes import Bool, Float, Int
from tsqlora.libs.torch import double, upcast
from tsqlora.rows.batches import IGNORED, MULTIPLE, GenerationCollator, generation_collator
from tsqlora.rows.chat import Format, find_format
from tsqlora.rows.rows import Columns
from tsqlora.rows.tokens import tokenise_generation
from tsqlora.tasks.forward import Batch, Collate, base_model, model_logits
from tsqlora.tasks.reading import Reading, load_tokenizer

CHUNK = 2**22
"""Logits that are in float32 at a time."""


def find_texts(names: Sequence[str], *, source: str, **settings: Any) -> tuple[Columns, Format | None]:
    """Choose the columns of rows of text, as `find_format`."""
    format = find_format(names, source=source, **settings)
    return format.columns, format


def pad_texts(
    model: nn.Module, tokenizer: Any, *, max_length: int, seq2seq: bool = False, prompts: bool = False
) -> Collate:
    """Pad to a multiple of 8 tokens where the model has so many positions; `prompts` to go on from on the left.

    What a decoder behind an encoder reads is the target, one token late.
    """
    longest, positions = -(-max_length // MULTIPLE) * MULTIPLE, getattr(model.config, "max_position_embeddings", None)
    multiple = MULTIPLE if positions is None or longest <= positions else 1
    padded = generation_collator(tokenizer, seq2seq=seq2seq, multiple=multiple, left=prompts and not seq2seq)
    return WithDecoderInputs(padded, base_model(model)) if seq2seq else padded


@dataclass(frozen=True, slots=True)
class WithDecoderInputs:
    """Batches of a model behind an encoder: what its decoder reads is the target, one token late.

    The model makes them itself of labels, which scoring keeps for itself.
    """

    padded: GenerationCollator
    model: Any

    def __call__(self, samples: Sequence[dict[str, Any]]) -> Batch:
        batch = self.padded(samples)
        if "labels" not in batch:
            return batch
        return {**batch, "decoder_input_ids": self.model.prepare_decoder_input_ids_from_labels(labels=batch["labels"])}


CAUSAL_TEXTS = Reading(
    auto="AutoModelForCausalLM",
    pipeline="text-generation",
    find=find_texts,
    encode=partial(tokenise_generation, seq2seq=False),
    collate=pad_texts,
    logits=partial(model_logits, dimensions=3, own_dtype=True),
    processor=partial(load_tokenizer, generates=True),
    settings=("format", "prompt", "target", "messages", "text"),
    foreign={"data.label": "data.target", "data.text_pair": "data.prompt"},
    trainer={"prediction_loss_only": True},  # logits of texts have a vocabulary for every token
    hidden_terms={"density_ratio": 4.0},  # choosy, since few rows that miss the point do harm
    usual=("prompt", "completion"),
    whole=True,
    causal=True,
)
"""A prompt, and the text to write after it."""
SEQ2SEQ = replace(
    CAUSAL_TEXTS,
    auto="AutoModelForSeq2SeqLM",
    pipeline=None,
    encode=partial(tokenise_generation, seq2seq=True),
    collate=partial(pad_texts, seq2seq=True),
    logits=partial(model_logits, dimensions=3, own_dtype=True),
    causal=False,
)


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
    headline = "token_accuracy"
    measured = ("loss", "perplexity", "token_accuracy")

    @property
    def reading(self) -> Reading:
        return CAUSAL_TEXTS if self.causal else SEQ2SEQ

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
    def count(self, logits: Float[Tensor, "n t v"], labels: Int[Tensor, "n t"]) -> dict[str, Tensor]:
        """Return each sample's summed `loss`, `right` tokens, which have the largest logit, and `tokens`."""
        targets = self.targets(labels)
        flat, target = logits.flatten(0, 1), targets.flatten()
        losses, right = upcast(flat.new_zeros(len(target))), torch.zeros_like(target)
        for rows in _chunks(target != IGNORED, flat.shape[1]):
            z = upcast(flat[rows])
            losses[rows] = F.cross_entropy(z, target[rows], reduction="none")
            right[rows] = (z.argmax(1) == target[rows]).long()
        loss = double(losses.view_as(targets).sum(1))
        return {"loss": loss, "right": right.view_as(targets).sum(1), "tokens": (targets != IGNORED).sum(1)}

    def evaluate(self, samples: Any, *, summed: Callable[..., Mapping[str, float]], **_: Any) -> dict[str, float]:
        """Return loss (mean over all target tokens), perplexity (its exponential) and token_accuracy."""
        sums = summed(samples, self.count)
        tokens = max(sums["tokens"], 1)
        loss = sums["loss"] / tokens
        return {"loss": loss, "perplexity": math.exp(min(loss, 700)), "token_accuracy": sums["right"] / tokens}

    def metrics(self, *_: Any) -> dict[str, float]:
        return {}  # `count` sees the logits of a batch

    def predict(self, table: Any, *, texts: Callable[[Any], list[str]], **_: Any) -> list[dict[str, Any]]:
        """Return the written text."""
        return [{"prediction": text} for text in texts(table)]


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
