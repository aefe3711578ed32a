"""Multi-label classification: any of k labels per sample, binary cross-entropy of each."""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from scipy.special import expit
from torch import Tensor

from tsqlora.libs.shapes import Bool, Float
from tsqlora.libs.torch import double
from tsqlora.rows.labels import SET
from tsqlora.rows.table import Table
from tsqlora.tasks.classification import FLOOR
from tsqlora.tasks.reading import TEXTS, WITHOUT_SMOOTHING
from tsqlora.tasks.task import Link, Logits, evaluate

BISECTIONS = 60
"""Halvings of the interval that holds an offset, which leave rounding alone."""


@dataclass(frozen=True, eq=False, slots=True)
class MultiLabel:
    """The mean of k binary cross-entropies; labels are n × k of 0 and 1."""

    name = "multi-label-classification"
    headline = "micro_f1"
    measured = ("micro_f1", "macro_f1", "accuracy", "loss")
    reading = replace(TEXTS, label=SET, problem_type="multi_label_classification", foreign=WITHOUT_SMOOTHING)
    link: ClassVar[Link] = "sigmoid"
    evaluate = evaluate
    class_weights = None

    def loss(self, logits: Float[Tensor, "n k"], labels: Float[Tensor, "n k"]) -> Float[Tensor, " n"]:
        """Return each sample's mean over the labels; the mean over samples is transformers' loss."""
        return F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype), reduction="none").mean(1)

    def batch_loss(self, losses: Float[Tensor, " n"], labels: Float[Tensor, "n k"]) -> Float[Tensor, ""]:
        """Return the mean."""
        return losses.mean()

    def chance(self, labels: Float[Tensor, "n k"], width: int) -> Float[Tensor, " k"]:
        """Return the log odds of each label's frequency, in float64; ±log(1e-12) for a label that is constant."""
        frequencies = double(labels).mean(0)
        return torch.log(frequencies + FLOOR) - torch.log(1 - frequencies + FLOOR)

    def offsets(self, logits: Float[Tensor, "n k"], labels: Float[Tensor, "n k"]) -> Float[Tensor, " k"]:
        """Return constants that, added to the logits, make each label's mean probability equal its frequency.

        They minimise the mean loss on these rows. A constant label, for which no finite offset exists, keeps 0.
        """
        z, frequencies = double(logits), double(labels).mean(0)
        inner = (frequencies > 0) & (frequencies < 1)
        odds = torch.logit(torch.where(inner, frequencies, 0.5))
        # Even the smallest logit has at least this probability at `high`, and the largest at most at `low`.
        low, high = odds - z.amax(0), odds - z.amin(0)
        for _ in range(BISECTIONS):
            middle = (low + high) / 2
            above = torch.sigmoid(z + middle).mean(0) > frequencies
            low, high = torch.where(above, low, middle), torch.where(above, middle, high)
        return torch.where(inner, (low + high) / 2, 0.0).to(logits)

    def metrics(self, logits: Float[np.ndarray, "n k"], labels: Float[np.ndarray, "n k"]) -> dict[str, float]:
        """Return micro_f1, macro_f1 over labels that occur or are predicted, accuracy of whole sets, and mean loss."""
        predicted, true = self.predictions(logits), labels > 0.5
        both, either = 2 * (predicted & true).sum(axis=0), predicted.sum(axis=0) + true.sum(axis=0)
        used = either > 0
        return {
            "micro_f1": float(both.sum() / max(either.sum(), 1)),
            "macro_f1": float((both[used] / either[used]).mean()) if used.any() else 0.0,
            "accuracy": float((predicted == true).all(axis=1).mean()),
            "loss": float(self.loss(torch.from_numpy(logits).double(), torch.from_numpy(labels)).mean()),
        }

    def predictions(self, logits: Float[np.ndarray, "n k"]) -> Bool[np.ndarray, "n k"]:
        """Return the labels with a probability above a half."""
        return logits > 0

    def predict(self, table: Table, *, logits: Logits, **_: Any) -> list[dict[str, Any]]:
        """Return the predicted labels and the probability of each."""
        assert table.classes is not None
        z, names = logits(table)[0], table.classes.names
        p, sets = expit(z.astype(np.float64)), [np.flatnonzero(row) for row in self.predictions(z)]
        return [
            {"prediction": [names[k] for k in own], "probability": p[i, own].tolist()} for i, own in enumerate(sets)
        ]

    def unusable(self, logits: Float[Tensor, "n k"], labels: Tensor) -> tuple[Bool[Tensor, " n"], str]:
        return ~labels.isfinite().all(1), "it must be a finite number"
