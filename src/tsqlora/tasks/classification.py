"""Classification of texts, images or recordings: one of k classes per sample, cross-entropy."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import minimize
from scipy.special import logsumexp, softmax
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef
from torch import Tensor

from tsqlora.errors import TsqLoraError
from tsqlora.libs.shapes import Bool, Float, Int
from tsqlora.libs.torch import double
from tsqlora.rows.table import Table
from tsqlora.tasks.reading import TEXTS, Reading
from tsqlora.tasks.task import Link, Logits, evaluate

FLOOR = 1e-12
"""Added to frequencies before the logarithm, so that an absent class has a finite logit."""
LEAST_STEP = 1e-6
"""Share of a Newton step below which no closer solution is sought."""
TOLERANCE = 1e-8
"""Largest error of a class's mean probability after calibration."""


@dataclass(frozen=True, eq=False, slots=True)
class Classification:
    """Cross-entropy with optional label smoothing (0 to 1) and class weights (one per class).

    With class weights w a sample's loss is w[y]·ce. Training must divide the sum by n, not by Σw[y] as torch does:
    a sample's loss must not depend on its batch.
    """

    headline = "accuracy"
    measured = ("accuracy", "macro_f1", "matthews", "loss")
    link: ClassVar[Link] = "softmax"
    evaluate = evaluate

    label_smoothing: float = 0.0
    class_weights: Tensor | None = None
    name: str = "sequence-classification"
    reading: Reading = field(default=TEXTS, repr=False)

    def loss(self, logits: Float[Tensor, "n k"], labels: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
        """Return w[y]·ce per sample; without weights its mean is torch's cross_entropy."""
        losses = F.cross_entropy(logits, labels, reduction="none", label_smoothing=self.label_smoothing)
        return losses if self.class_weights is None else losses * self.class_weights.to(logits)[labels]

    def batch_loss(self, losses: Float[Tensor, " n"], labels: Int[Tensor, " n"]) -> Float[Tensor, ""]:
        """Return the mean."""
        return losses.mean()

    def chance(self, labels: Int[Tensor, " n"], width: int) -> Float[Tensor, " k"]:
        """Return the log of the class frequencies, weighted and smoothed as in the loss, in float64.

        This constant predictor has the least mean loss. Absent classes get log(1e-12).
        """
        frequencies = class_frequencies(labels, width, self._weights_of(labels))
        return torch.log(self._smoothed(frequencies) + FLOOR)

    def offsets(self, logits: Float[Tensor, "n k"], labels: Int[Tensor, " n"]) -> Float[Tensor, " k"]:
        """Return constants that, added to the logits, make mean probabilities equal class frequencies.

        Means and frequencies are weighted and smoothed as in the loss. Classes without labels are left out and keep 0,
        since no finite offset gives them probability 0. The offsets minimise the mean cross-entropy on these rows and
        are unique with sum 0. Exact to 1e-8; raises TsqLoraError for logits that are not finite.
        """
        weights = self._weights_of(labels)
        frequencies = class_frequencies(labels, logits.shape[1], weights)
        present = frequencies > 0
        offsets = torch.zeros_like(frequencies)
        target = self._smoothed(frequencies[present])
        offsets[present] = match_frequencies(double(logits[:, present]), target, weights)
        return offsets.to(logits.dtype).to(logits.device)

    def metrics(self, logits: Float[np.ndarray, "n k"], labels: Int[np.ndarray, " n"]) -> dict[str, float]:
        """Return accuracy, macro_f1 over the classes in labels or predictions, matthews and mean loss.

        matthews is 0.0 where labels or predictions have only one class.
        """
        predicted = self.predictions(logits)
        losses = self.loss(torch.from_numpy(logits).double(), torch.from_numpy(labels).long())
        return {
            "accuracy": float(accuracy_score(labels, predicted)),
            "macro_f1": float(f1_score(labels, predicted, average="macro")),
            "matthews": _matthews(labels, predicted),
            "loss": float(losses.mean()),
        }

    def predictions(self, logits: Float[np.ndarray, "n k"]) -> Int[np.ndarray, " n"]:
        """Return the class with the largest logit."""
        return logits.argmax(axis=1)

    def predict(self, table: Table, *, logits: Logits, **_: Any) -> list[dict[str, Any]]:
        """Return the likeliest class and its probability."""
        assert table.classes is not None
        z, names = logits(table)[0], table.classes.names
        chosen = zip(self.predictions(z), softmax(z.astype(np.float64), axis=1).max(axis=1), strict=True)
        return [{"prediction": names[int(value)], "probability": float(p)} for value, p in chosen]

    def unusable(self, logits: Float[Tensor, "n k"], labels: Int[Tensor, " n"]) -> tuple[Bool[Tensor, " n"], str]:
        k = logits.shape[1]
        return (labels < 0) | (labels >= k), f"the model has classes 0 to {k - 1}"

    def _weights_of(self, labels: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
        """Return each sample's share of the mean loss; the shares sum to 1."""
        if self.class_weights is None:
            weights = double(torch.ones(len(labels), device=labels.device))
        else:
            weights = double(self.class_weights.to(labels.device)[labels])
        return weights / weights.sum()

    def _smoothed(self, frequencies: Float[Tensor, " k"]) -> Float[Tensor, " k"]:
        return (1 - self.label_smoothing) * frequencies + self.label_smoothing / len(frequencies)


def class_frequencies(labels: Int[Tensor, " n"], width: int, weights: Float[Tensor, " n"]) -> Float[Tensor, " k"]:
    """Return each class's share of the sample weights, which sum to 1.

    >>> class_frequencies(torch.tensor([0, 2, 2, 2]), 3, torch.full((4,), 0.25)).tolist()
    [0.25, 0.0, 0.75]
    """
    # On the CPU: on a GPU the order of addition varies, which torch.use_deterministic_algorithms forbids.
    return torch.bincount(labels.cpu(), weights=weights.cpu(), minlength=width).to(weights.device)


def match_frequencies(
    logits: Float[Tensor, "n k"], frequencies: Float[Tensor, " k"], weights: Float[Tensor, " n"]
) -> Float[Tensor, " k"]:
    """Return the o with sum 0 for which Σ_i w_i softmax(logits_i + o) equals the frequencies.

    o minimises the convex Σ_i w_i logsumexp(logits_i + o) - f·o, and exists for finite logits and positive
    frequencies; float64, exact to 1e-8. Raises TsqLoraError for logits that are not finite or too extreme.
    """
    if not torch.isfinite(logits).all():
        raise TsqLoraError("some logits are not finite; lower training.learning_rate or use another dtype")
    z, f, w = (values.cpu().numpy() for values in (logits, frequencies, weights))

    def gradient(o: np.ndarray) -> np.ndarray:
        return w @ softmax(z + o, axis=1) - f

    def curvature(o: np.ndarray) -> np.ndarray:
        p = softmax(z + o, axis=1)
        return np.diag(w @ p) - p.T @ (w[:, None] * p)

    offsets = minimize(
        lambda o: w @ logsumexp(z + o, axis=1) - f @ o,
        np.zeros(len(f)),
        jac=gradient,
        hess=curvature,
        method="trust-ncg",
        options={"gtol": TOLERANCE / 10},
    ).x
    # Rounding of the objective stops the search near the minimum; the gradient is precise enough for further steps.
    error = np.abs(gradient(offsets)).max()
    step, share = np.linalg.lstsq(curvature(offsets), gradient(offsets))[0], 1.0
    while error > TOLERANCE / 100 and share > LEAST_STEP:
        closer = offsets - share * step
        if np.abs(gradient(closer)).max() < error:
            offsets, error = closer, np.abs(gradient(closer)).max()
            step, share = np.linalg.lstsq(curvature(offsets), gradient(offsets))[0], 1.0
        else:
            share /= 2
    if not error <= TOLERANCE:
        raise TsqLoraError(
            f"calibration is off by {error:.1e}; the logits are too extreme (up to {np.abs(z).max():.3g}); "
            "lower training.learning_rate"
        )
    return torch.from_numpy(offsets - offsets.mean()).to(frequencies.device)


def _matthews(labels: Int[np.ndarray, " n"], predicted: Int[np.ndarray, " n"]) -> float:
    # scikit-learn warns where both have the same single class.
    constant = np.ptp(labels) == 0 or np.ptp(predicted) == 0
    return 0.0 if constant else float(matthews_corrcoef(labels, predicted))
