"""Ridge regression in closed form, with exact leave-one-out predictions from the hat matrix."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import logsumexp

from tsqlora.libs.shapes import Float, Int
from tsqlora.model.copies import ROWS_AT_ONCE, groups_of_copies

STRENGTHS = np.geomspace(1e-5, 1e2, 15)
"""Candidate strengths, in units of the features' mean eigenvalue."""
ROWS_TO_CHOOSE = 5_000
"""Choose the strength by the leave-one-out error of at most this many rows."""


@dataclass(frozen=True, slots=True, eq=False)
class Ridge:
    """A least-squares fit of targets on features, with leave-one-out predictions."""

    weight: Float[np.ndarray, "k d"]
    bias: Float[np.ndarray, " k"]
    """Zero where the fit has no intercept."""
    strength: float
    left_out: Float[np.ndarray, "n k"]
    """Row i's prediction by the fit without it and its copies: ŷ − (ȳ − ŷ)·ch/(1 − ch).

    h is the diagonal of the hat matrix, c counts the row and its copies, and ȳ is their mean target.
    """

    def predict(self, features: Float[np.ndarray, "m d"]) -> Float[np.ndarray, "m k"]:
        return features.astype(np.float64) @ self.weight.T + self.bias


def fit_ridge(
    features: Float[np.ndarray, "n d"],
    targets: Float[np.ndarray, "n k"],
    *,
    intercept: bool = True,
    copies: Int[np.ndarray, " n"] | None = None,
) -> Ridge:
    """Fit with the strength of least leave-one-out squared error; rows of one group of `copies` are left out together.

    Cost: n·d² + (strengths · min(n, 5,000) + n)·d·k operations, and d³ for the eigenvectors.
    """
    n = len(features)
    mean = _mean(features) if intercept else np.zeros(features.shape[1])
    centre = targets.mean(axis=0, dtype=np.float64) if intercept else np.zeros(targets.shape[1])
    gram, cross = np.zeros((len(mean), len(mean))), np.zeros((len(mean), len(centre)))
    for rows, part in _parts(features, mean):
        gram += part.T @ part
        cross += part.T @ (targets[rows] - centre)
    values, vectors = np.linalg.eigh(gram)
    values, cross = values.clip(0), vectors.T @ cross
    own = 1 / n if intercept else 0.0  # the intercept's part of each h
    counts, shared = np.ones(n), targets
    if copies is not None:
        counts = np.bincount(copies)[copies].astype(np.float64)
        shared = np.stack([np.bincount(copies, column)[copies] / counts for column in targets.T], axis=1)

    some = _some(n)
    rotated, answers = (features[some] - mean) @ vectors, shared[some] - centre
    unit = max(float(values.mean()), np.finfo(np.float64).tiny)

    def error(strength: float) -> float:
        left_out = _left_out(rotated, answers, cross, values + strength, own, counts[some])
        return float(np.square(targets[some] - centre - left_out).mean())

    strength = min((float(s) * unit for s in STRENGTHS), key=error)
    weight = (vectors @ (cross / (values + strength)[:, None])).T
    left_out = np.empty(targets.shape, dtype=np.float32)
    for rows, part in _parts(features, mean):
        answers = shared[rows] - centre
        left_out[rows] = centre + _left_out(part @ vectors, answers, cross, values + strength, own, counts[rows])
    return Ridge(weight, centre - weight @ mean, strength, left_out)


def fit_classes(features: Float[np.ndarray, "n d"], labels: Int[np.ndarray, " n"], width: int) -> Ridge:
    """Fit one-hot labels of `width` classes; predictions are logits in float32.

    A temperature calibrates them, fitted on the rows that choose the strength, at most 5,000.
    """
    one_hot, copies = np.eye(width, dtype=np.float32)[labels], groups_of_copies(features)
    ridge, some = fit_ridge(features, one_hot, copies=copies), _some(len(labels))
    t = np.float32(fit_temperature(ridge.left_out[some], labels[some]))
    return Ridge(ridge.weight / t, ridge.bias / t, ridge.strength, ridge.left_out / t)


def fit_temperature(scores: Float[np.ndarray, "n k"], labels: Int[np.ndarray, " n"]) -> float:
    """Return the T for which softmax(scores / T) has the least mean cross-entropy with the labels."""
    rows = np.arange(len(labels))
    spread = float(np.square(scores - scores.mean(axis=1, keepdims=True)).mean() ** 0.5) or 1.0

    def loss(log_scale: float) -> float:
        scaled = scores * (np.exp(log_scale) / spread)
        return float((logsumexp(scaled, axis=1) - scaled[rows, labels]).mean())

    result = minimize_scalar(loss, bounds=(-5.0, 6.0), method="bounded", options={"xatol": 1e-3})
    return spread / float(np.exp(result.x))  # pyright: ignore[reportAttributeAccessIssue]


def _some(n: int) -> Int[np.ndarray, " m"]:
    return np.linspace(0, n - 1, min(n, ROWS_TO_CHOOSE)).astype(int)


def _left_out(
    rotated: Float[np.ndarray, "n d"],
    answers: Float[np.ndarray, "n k"],
    cross: Float[np.ndarray, "d k"],
    shrunk: Float[np.ndarray, " d"],
    own: float,
    counts: Float[np.ndarray, " n"],
) -> Float[np.ndarray, "n k"]:
    """Return leave-one-out predictions in the basis of the eigenvectors; answers are centred means of rows' copies."""
    fitted = rotated @ (cross / shrunk[:, None])
    hat = (counts * (own + np.square(rotated) @ (1 / shrunk))).clip(max=1 - 1e-9)[:, None]
    return fitted - (answers - fitted) * (hat / (1 - hat))


def _mean(features: Float[np.ndarray, "n d"]) -> Float[np.ndarray, " d"]:
    total = np.zeros(features.shape[1])
    for _, part in _parts(features, total.copy()):
        total += part.sum(axis=0)
    return total / len(features)


def _parts(
    features: Float[np.ndarray, "n d"], mean: Float[np.ndarray, " d"]
) -> Iterator[tuple[slice, Float[np.ndarray, "m d"]]]:
    """Yield centred features in float64, ROWS_AT_ONCE rows at a time."""
    for start in range(0, len(features), ROWS_AT_ONCE):
        rows = slice(start, min(start + ROWS_AT_ONCE, len(features)))
        yield rows, features[rows].astype(np.float64) - mean
