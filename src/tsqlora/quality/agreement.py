"""Whether trusted rows agree with the pool; then they are mixed in, else they are trained on last.  Ours.

A head fitted on the pool claims to know the labels of trusted rows with some probability. A shortcut, weak labels or
another target make it claim more than trusted rows confirm.
"""

from dataclasses import dataclass

import numpy as np
from scipy.special import softmax

from tsqlora.compat.shapes import Float, Shaped
from tsqlora.quality.label_noise import label_noise
from tsqlora.quality.ridge import Ridge
from tsqlora.tasks import Task
from tsqlora.tasks.classification import Classification
from tsqlora.tasks.multi_label import MultiLabel

CONFIRMED = 0.75
"""Trusted rows agree if the confirmed share of the claim, minus one standard error, is at least this. With 128 trusted
rows of SST-2, clean tables and 20 % random wrong labels confirm 0.74 to 1.15 of it, shortcuts and weak labels 0.14 to
0.83."""


@dataclass(frozen=True, slots=True)
class Agreement:
    """How much of what the pool's head claims to know about trusted rows is true."""

    claim: float
    """Expected probability of the labels beyond that of their frequencies; for numbers R²."""
    confirmed: float
    """The share of the claim that is true."""
    error: float
    """Its standard error over trusted rows."""

    @property
    def agrees(self) -> bool:
        return self.claim > 0 and self.confirmed - self.error >= CONFIRMED

    def to_dict(self) -> dict[str, float | bool]:
        return {"claim": self.claim, "confirmed": self.confirmed, "error": self.error, "agrees": self.agrees}


def agreement(
    pool: Ridge,
    labels: Shaped[np.ndarray, "n *k"],
    features: Float[np.ndarray, "m d"],
    trusted: Shaped[np.ndarray, "m *k"],
    task: Task,
) -> Agreement | None:
    """Compare the answers of trusted rows with those that a fit on the pool predicts; None for fewer than 2 rows.

    Wrong labels of the pool are no disagreement: classes are predicted by the right labels' probability, as the model
    of label noise estimates it.
    """
    if len(trusted) < 2:
        return None
    predicted = pool.predict(features)
    if isinstance(task, Classification):
        noise = label_noise(pool.left_out, labels)
        p = softmax(noise.scale * predicted + noise.offsets, axis=1)
        expected, base = np.square(p).sum(axis=1), float(np.square(p.mean(axis=0)).sum())
        actual = p[np.arange(len(trusted)), trusted]
    elif isinstance(task, MultiLabel):
        p = predicted.clip(0, 1)
        frequent = p.mean(axis=0)
        expected = (np.square(p) + np.square(1 - p)).mean(axis=1)
        base = float((np.square(frequent) + np.square(1 - frequent)).mean())
        actual = np.where(trusted > 0.5, p, 1 - p).mean(axis=1)
    else:
        variance = float(labels.var()) or 1.0
        residual = float(np.square(pool.left_out[:, 0] - labels).mean())
        expected, base = np.full(len(trusted), 1 - residual / variance), 0.0
        actual = 1 - np.square(predicted[:, 0] - trusted) / variance
    claim, surprise = float(expected.mean()) - base, expected - actual
    if claim <= 0:
        return Agreement(claim, 0.0, 0.0)
    error = float(surprise.std(ddof=1)) / len(trusted) ** 0.5
    return Agreement(claim, 1 - float(surprise.mean()) / claim, error / claim)
