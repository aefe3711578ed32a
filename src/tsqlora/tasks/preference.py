"""Preferences: the DPO loss of a chosen and a rejected answer, as TRL's DPOTrainer has it (Rafailov et al., 2023)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch.nn.functional as F
from torch import Tensor, nn

from tsqlora.libs.shapes import Float, Int
from tsqlora.rows.batches import GenerationCollator, PairCollator
from tsqlora.rows.chat import Format, pair_format
from tsqlora.rows.rows import Columns
from tsqlora.rows.tokens import tokenise_pairs
from tsqlora.tasks.forward import Collate
from tsqlora.tasks.generation import Generation, pad_texts
from tsqlora.tasks.reading import OF_TEXTS

CAUSAL = Generation("causal-lm", causal=True)
"""The task of writing an answer."""


def find_pairs(names: Sequence[str], *, source: str) -> tuple[Columns, Format | None]:
    """Choose the columns of rows with a chosen and a rejected answer, which have fixed names."""
    format = pair_format(names, source=source)
    return format.columns, format


def pad_pairs(model: nn.Module, tokenizer: Any, *, max_length: int) -> Collate:
    """Pad both answers alike."""
    return PairCollator(cast(GenerationCollator, pad_texts(model, tokenizer, max_length=max_length)))


def log_ratios(model: nn.Module, inputs: Mapping[str, Tensor]) -> Float[Tensor, "n 1"]:
    """Return log p(chosen) − log p(rejected), minus that of the reference model."""
    texts = {name: inputs[name].flatten(0, 1) for name in ("input_ids", "attention_mask")}
    return log_ratio(CAUSAL.reading.logits(model, texts), inputs["targets"].flatten(0, 1)) - inputs["reference"]


def log_ratio(logits: Float[Tensor, "m t v"], targets: Int[Tensor, "m t"]) -> Float[Tensor, "n 1"]:
    """Return log p(chosen) − log p(rejected) of n = m/2 pairs, whose answers are neighbouring rows."""
    losses = (CAUSAL.loss(logits, targets) * (CAUSAL.targets(targets) >= 0).sum(1)).unflatten(0, (-1, 2))
    return losses[:, 1:] - losses[:, :1]


PAIRS = replace(
    CAUSAL.reading,
    pipeline=None,
    find=find_pairs,
    encode=tokenise_pairs,
    collate=pad_pairs,
    logits=log_ratios,
    settings=(),
    foreign=dict.fromkeys((*OF_TEXTS, "data.label", "data.text_pair", "data.text")),
    hidden_terms={},
    why_even="the DPO loss of every pair is ln 2 before training, so pairs are drawn evenly",
)


@dataclass(frozen=True, slots=True)
class Preference:
    """−log σ(β·m), where m is the model's log-ratio of the two answers minus that of the reference model.

    The reference is the model as it stands before training. There m is 0, and every loss is ln 2.
    """

    name = "preference"
    headline = "loss"
    measured = ("loss",)
    reading = PAIRS

    beta: float = 0.1

    def loss(self, logits: Float[Tensor, "n 1"], labels: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
        """Return each pair's loss; the logits are m, and the labels count target tokens."""
        return F.softplus(-self.beta * logits.squeeze(1))

    def batch_loss(self, losses: Float[Tensor, " n"], labels: Int[Tensor, " n"]) -> Float[Tensor, ""]:
        """Return the mean over pairs."""
        return losses.mean()

    def metrics(self, *_: Any, **how: Any) -> dict[str, float]:
        return {}  # pairs are only scored

    evaluate = metrics

    def predict(self, *_: Any, **how: Any) -> list[dict[str, Any]]:
        return []
