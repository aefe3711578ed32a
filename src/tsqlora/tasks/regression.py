"""Regression: one number for each sample, squared error."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from jaxtyping import Float
from scipy import stats
from torch import Tensor

from tsqlora.compat.torch import double


@dataclass(frozen=True, eq=False, slots=True)
class Regression:
    """The squared-error task on logits of width 1."""

    name: ClassVar[str] = "regression"
    answer: ClassVar[Literal["class", "number", "text"]] = "number"
    headline: ClassVar[str] = "spearman"
    measured: ClassVar[tuple[str, ...]] = ("pearson", "spearman", "mse", "loss")

    def loss(self, logits: Float[Tensor, "n 1"], labels: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
        """(logit - label)², one a sample."""
        return (logits.squeeze(-1) - labels.to(logits.dtype)).square()

    def batch_loss(self, losses: Float[Tensor, " n"], labels: Float[Tensor, " n"]) -> Float[Tensor, ""]:
        """Their mean."""
        return losses.mean()

    def chance(self, labels: Float[Tensor, " n"], width: int) -> Float[Tensor, " k"]:
        """The mean of the targets: no constant has a smaller mean squared error."""
        return labels.mean().expand(width)

    def offsets(self, logits: Float[Tensor, "n 1"], labels: Float[Tensor, " n"]) -> Float[Tensor, "1"]:
        """mean(labels - predictions): with it, residuals over these rows sum to zero.

        The like of the classes' calibration. Without it the mean gradient is mostly the mean
        residual's direction, and convergence says only the sign of a sample's residual.
        """
        residuals = double(labels) - double(logits.squeeze(-1))
        return residuals.mean().reshape(1).to(logits.dtype).to(logits.device)

    def strata(self, labels: Float[np.ndarray, " n"]) -> None:
        """None: there are no classes."""
        return None

    def metrics(self, logits: Float[np.ndarray, "n 1"], labels: Float[np.ndarray, " n"]) -> dict[str, float]:
        """pearson, spearman, mse, and loss, which is mse.

        Where predictions or targets are constant a correlation is not defined: it is 0.0 here.
        """
        predicted, wanted = logits[:, 0].astype(np.float64), labels.astype(np.float64)
        losses = self.loss(torch.from_numpy(predicted[:, None]), torch.from_numpy(wanted))
        mse = float(losses.mean())
        return {
            "pearson": _correlation(stats.pearsonr, predicted, wanted),
            "spearman": _correlation(stats.spearmanr, predicted, wanted),
            "mse": mse,
            "loss": mse,
        }

    def predictions(self, logits: Float[np.ndarray, "n 1"]) -> Float[np.ndarray, " n"]:
        """The logits themselves."""
        return logits[:, 0]


def _correlation(measure: Callable[..., Any], a: np.ndarray, b: np.ndarray) -> float:
    return 0.0 if _is_constant(a) or _is_constant(b) else float(measure(a, b).statistic)


def _is_constant(values: np.ndarray) -> bool:
    # Relative: a spread of rounding errors has no correlation either, and scipy warns of it.
    return bool(np.ptp(values) <= 1e-12 * np.abs(values).max())
