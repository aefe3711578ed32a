"""Sequence classification: one of k classes for each sample, cross-entropy."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from scipy.optimize import minimize
from scipy.special import logsumexp, softmax
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef
from torch import Tensor

from tsqlora.compat.torch import double
from tsqlora.errors import TsqLoraError

# Added to frequencies under the logarithm, so that an absent class has a finite logit.
FLOOR = 1e-12

# Offsets are exact to this in every class's mean probability.
TOLERANCE = 1e-8


@dataclass(frozen=True, eq=False, slots=True)
class Classification:
    """Cross-entropy with optional label smoothing (0 to 1) and class weights (one a class).

    With class weights w a sample's loss is w[y]·ce. Training must divide the sum by n: a
    sample's loss may not depend on its batch, as it does where torch divides by Σw[y].
    """

    name: ClassVar[str] = "sequence-classification"
    answer: ClassVar[Literal["class", "number", "text"]] = "class"
    headline: ClassVar[str] = "accuracy"
    measured: ClassVar[tuple[str, ...]] = ("accuracy", "macro_f1", "matthews", "loss")

    label_smoothing: float = 0.0
    class_weights: Tensor | None = None

    def loss(self, logits: Float[Tensor, "n k"], labels: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
        """w[y]·ce, one a sample; without weights its mean is torch's cross_entropy."""
        losses = F.cross_entropy(logits, labels, reduction="none", label_smoothing=self.label_smoothing)
        return losses if self.class_weights is None else losses * self.class_weights.to(logits)[labels]

    def batch_loss(self, losses: Float[Tensor, " n"], labels: Int[Tensor, " n"]) -> Float[Tensor, ""]:
        """Their mean."""
        return losses.mean()

    def chance(self, labels: Int[Tensor, " n"], width: int) -> Float[Tensor, " k"]:
        """Logarithm of the class frequencies that the loss sees, in float64.

        With label smoothing and class weights these are the smoothed, weighted ones: of all
        constant predictors that one has the least mean loss. Absent classes get log(1e-12).
        """
        frequencies = class_frequencies(labels, width, self._weights_of(labels))
        return torch.log(self._smoothed(frequencies) + FLOOR)

    def offsets(self, logits: Float[Tensor, "n k"], labels: Int[Tensor, " n"]) -> Float[Tensor, " k"]:
        """Constants that, added to the logits, make mean probabilities equal class frequencies.

        Probabilities are taken among the classes that occur in `labels`: a class without labels
        has no frequency to match, keeps 0 and is left out, else its share of the probability
        would have to vanish. So defined the offsets exist, and are unique when their sum is 0:
        they are where the mean cross-entropy over these rows is least. Means and frequencies
        are those the loss sees, weighted and smoothed where it is. Exact to 1e-8; raises
        TsqLoraError for logits that are not finite. METHOD section 1, ours.
        """
        weights = self._weights_of(labels)
        frequencies = class_frequencies(labels, logits.shape[1], weights)
        present = frequencies > 0
        found = torch.zeros_like(frequencies)
        wanted = self._smoothed(frequencies[present])
        found[present] = match_frequencies(double(logits[:, present]), wanted, weights)
        return found.to(logits.dtype).to(logits.device)

    def strata(self, labels: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
        """The labels: sampling keeps the classes' shares."""
        return labels

    def metrics(self, logits: Float[np.ndarray, "n k"], labels: Int[np.ndarray, " n"]) -> dict[str, float]:
        """accuracy, macro_f1 over the classes in labels or predictions, matthews, loss (mean).

        Where labels or predictions hold one class only, matthews is 0.0.
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
        """The id of the class with the largest logit."""
        return logits.argmax(axis=1)

    def _weights_of(self, labels: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
        """Each sample's share in the mean loss; they sum to 1."""
        if self.class_weights is None:
            weights = double(torch.ones(len(labels), device=labels.device))
        else:
            weights = double(self.class_weights.to(labels.device)[labels])
        return weights / weights.sum()

    def _smoothed(self, frequencies: Float[Tensor, " k"]) -> Float[Tensor, " k"]:
        return (1 - self.label_smoothing) * frequencies + self.label_smoothing / len(frequencies)


def class_frequencies(labels: Int[Tensor, " n"], width: int, weights: Float[Tensor, " n"]) -> Float[Tensor, " k"]:
    """Each class's share of the samples' weights, which sum to 1.

    >>> class_frequencies(torch.tensor([0, 2, 2, 2]), 3, torch.full((4,), 0.25)).tolist()
    [0.25, 0.0, 0.75]
    """
    # On the processor: a GPU adds in any order, and refuses to under torch.use_deterministic_algorithms.
    return torch.bincount(labels.cpu(), weights=weights.cpu(), minlength=width).to(weights.device)


def match_frequencies(
    logits: Float[Tensor, "n k"], frequencies: Float[Tensor, " k"], weights: Float[Tensor, " n"]
) -> Float[Tensor, " k"]:
    """The o, of sum 0, for which Σ_i w_i softmax(logits_i + o) equals the frequencies.

    It is the minimum of the convex  Σ_i w_i logsumexp(logits_i + o) - f·o  and exists for finite logits and
    frequencies that are all positive; float64, exact to 1e-8. Raises TsqLoraError for logits that are not finite,
    and for some that are too extreme to be matched.
    """
    if not torch.isfinite(logits).all():
        raise TsqLoraError("some logits are not finite; lower training.learning_rate or use another dtype")
    z, f, w = (values.cpu().numpy() for values in (logits, frequencies, weights))

    def gradient(o: np.ndarray) -> np.ndarray:
        return w @ softmax(z + o, axis=1) - f

    def curvature(o: np.ndarray) -> np.ndarray:
        p = softmax(z + o, axis=1)
        return np.diag(w @ p) - p.T @ (w[:, None] * p)

    found = minimize(
        lambda o: w @ logsumexp(z + o, axis=1) - f @ o,
        np.zeros(len(f)),
        jac=gradient,
        hess=curvature,
        method="trust-ncg",
        options={"gtol": TOLERANCE / 10},
    ).x
    # Near the minimum the objective's rounding stops the search; the gradient's allows one more step.
    found -= np.linalg.lstsq(curvature(found), gradient(found))[0]
    error = np.abs(gradient(found)).max()
    if not error <= TOLERANCE:
        raise TsqLoraError(
            f"calibration is off by {error:.1e}; the logits are too extreme (up to {np.abs(z).max():.3g}); "
            "lower training.learning_rate"
        )
    return torch.from_numpy(found - found.mean()).to(frequencies.device)


def _matthews(labels: Int[np.ndarray, " n"], predicted: Int[np.ndarray, " n"]) -> float:
    # scikit-learn warns where both hold one and the same class.
    constant = np.ptp(labels) == 0 or np.ptp(predicted) == 0
    return 0.0 if constant else float(matthews_corrcoef(labels, predicted))
