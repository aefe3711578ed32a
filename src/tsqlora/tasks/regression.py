"""Regression: one number per sample, squared error."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
from scipy import stats
from torch import Tensor

from tsqlora.libs.shapes import Bool, Float, Shaped
from tsqlora.libs.torch import double
from tsqlora.rows.table import Table
from tsqlora.tasks.reading import TEXTS, WITHOUT_SMOOTHING
from tsqlora.tasks.task import Link, Logits, evaluate


@dataclass(frozen=True, eq=False, slots=True)
class Regression:
    """The squared-error task on logits of width 1."""

    name = "regression"
    headline = "spearman"
    measured = ("pearson", "spearman", "mse", "loss")
    reading = replace(TEXTS, label=None, problem_type="regression", foreign=WITHOUT_SMOOTHING)
    link: ClassVar[Link] = "identity"
    evaluate = evaluate
    class_weights = None

    def loss(self, logits: Float[Tensor, "n 1"], labels: Shaped[Tensor, " n"]) -> Float[Tensor, " n"]:
        """Return (logit - label)² per sample."""
        return (logits.squeeze(-1) - labels.to(logits.dtype)).square()

    def batch_loss(self, losses: Float[Tensor, " n"], labels: Shaped[Tensor, " n"]) -> Float[Tensor, ""]:
        """Return the mean."""
        return losses.mean()

    def chance(self, labels: Shaped[Tensor, " n"], width: int) -> Float[Tensor, " k"]:
        """Return the mean target: no constant has a smaller mean squared error."""
        return (labels * 1.0).mean().expand(width)  # whole numbers may be integers

    def offsets(self, logits: Float[Tensor, "n 1"], labels: Shaped[Tensor, " n"]) -> Float[Tensor, "1"]:
        """Return mean(labels - predictions), with which the residuals of these rows sum to zero.

        Without this calibration the mean gradient mostly points along the mean residual, and convergence measures
        only the sign of a sample's residual.
        """
        residuals = double(labels) - double(logits.squeeze(-1))
        return residuals.mean().reshape(1).to(logits.dtype).to(logits.device)

    def metrics(self, logits: Float[np.ndarray, "n 1"], labels: Shaped[np.ndarray, " n"]) -> dict[str, float]:
        """Return pearson, spearman, mse and loss, which equals mse.

        A correlation with constant predictions or targets is undefined; it is 0.0 here.
        """
        predicted, targets = logits[:, 0].astype(np.float64), labels.astype(np.float64)
        mse = float(np.square(predicted - targets).mean())
        return {
            "pearson": _correlation(stats.pearsonr, predicted, targets),
            "spearman": _correlation(stats.spearmanr, predicted, targets),
            "mse": mse,
            "loss": mse,
        }

    def predictions(self, logits: Float[np.ndarray, "n 1"]) -> Float[np.ndarray, " n"]:
        """Return the logits themselves."""
        return logits[:, 0]

    def predict(self, table: Table, *, logits: Logits, **_: Any) -> list[dict[str, Any]]:
        """Return the predicted number."""
        return [{"prediction": float(value)} for value in self.predictions(logits(table)[0])]

    def unusable(self, logits: Float[Tensor, "n 1"], labels: Tensor) -> tuple[Bool[Tensor, " n"], str]:
        return ~labels.isfinite().view(len(labels), -1).all(1), "it must be a finite number"


def _correlation(measure: Callable[..., Any], a: np.ndarray, b: np.ndarray) -> float:
    return 0.0 if _is_constant(a) or _is_constant(b) else float(measure(a, b).statistic)


def _is_constant(values: np.ndarray) -> bool:
    # Relative, since scipy also warns where the spread is only rounding error.
    return bool(np.ptp(values) <= 1e-12 * np.abs(values).max())
