"""Fit a task's last linear layer on its input features.

Linear probing before fine-tuning (Kumar et al. 2022); the scale follows Tomihari and Sato (2024): a head of large norm
slows the training of the features.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
from scipy.optimize import brentq
from scipy.special import log_softmax
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold, KFold, StratifiedKFold

from tsqlora.compat.shapes import Float, Int, Shaped
from tsqlora.quality.ridge import fit_ridge

Kind = Literal["classes", "labels", "numbers"]
"""The targets: one of k classes per row, any of k labels as n × k of 0 and 1, or one number."""

STRENGTHS = np.geomspace(1e-2, 1e2, 5)
"""Candidates for sklearn's C, on features of mean square norm 1."""
FOLDS = 3
GROUPS = 5
"""Folds of `grouped_logits`."""
ROWS_TO_CHOOSE, ROWS_TO_FIT = 5_000, 20_000
"""Choose the strength on at most this many rows; `grouped_logits` fits at most this many a fold."""
MARGIN = 2.0
"""Standard errors by which a fitted head's out-of-fold loss must beat the model's own head."""
LEAST_SCALE = 1e-3
TOLERANCE = 1e-2
"""Tolerance of the gradient relative to its largest entry at zero weights, which is small for many classes."""


@dataclass(frozen=True, slots=True, eq=False)
class LinearHead:
    """logits = features · weightᵀ + bias."""

    weight: Float[np.ndarray, "k d"]
    bias: Float[np.ndarray, " k"]

    def logits(self, features: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n k"]:
        return features.astype(np.float64) @ self.weight.T + self.bias

    def scaled(self, by: float) -> "LinearHead":
        return LinearHead(self.weight * by, self.bias * by)


@dataclass(frozen=True, slots=True, eq=False)
class HeadFit:
    """A head fitted on all rows, and its out-of-fold losses."""

    head: LinearHead
    strength: float
    rows: Int[np.ndarray, " m"]
    """The rows that chose the strength, at most 5,000."""
    losses: Float[np.ndarray, " m"]
    """Out-of-fold losses of those rows."""
    scale: float
    """Factor on the head that makes the initial training loss equal the out-of-fold loss."""
    middle: float = 0.0
    """The output around which training scales the head: the mean of numbers, 0 for logits."""

    @property
    def loss(self) -> float:
        return float(self.losses.mean())

    def better_than(self, losses: Float[np.ndarray, " m"]) -> bool:
        """Whether out-of-fold losses beat these losses of the same rows, paired, by 2 standard errors."""
        gain = losses - self.losses
        error = float(gain.std(ddof=1)) / len(gain) ** 0.5 if len(gain) > 1 else np.inf
        return float(gain.mean()) > MARGIN * error


def fit_head(
    features: Float[np.ndarray, "n d"],
    targets: Shaped[np.ndarray, "n *k"],
    *,
    kind: Kind,
    width: int,
    intercept: bool = True,
    class_weights: Float[np.ndarray, " k"] | None = None,
    groups: Int[np.ndarray, " n"] | None = None,
    rng: np.random.Generator,
) -> HeadFit:
    """Fit a head of `width` outputs with the regularisation of least out-of-fold loss, at a calibrated scale.

    Classes: multinomial logistic regression; labels: a binary one each; numbers: least squares. A class without rows
    gets the logit of a class that occurs in less than one row. Samples of one of the `groups` share a fold.
    """
    # Centred if a bias can absorb the centre: features of similar direction converge slowly.
    centre = features.mean(axis=0, dtype=np.float64) if intercept else np.zeros(features.shape[1])
    features = features - centre.astype(np.float32)
    unit = float(np.sqrt(np.square(features, dtype=np.float64).sum(axis=1).mean())) or 1.0
    features, middle = (features / unit).astype(np.float32), 0.0
    some = np.sort(rng.permutation(len(features))[:ROWS_TO_CHOOSE])
    if kind == "numbers":
        ridge = fit_ridge(features, targets[:, None], intercept=intercept)
        losses = row_losses(ridge.left_out[some].astype(np.float64), targets[some], kind)
        head, strength, scale = LinearHead(ridge.weight, ridge.bias), ridge.strength, 1.0
        middle = float(targets.mean())
    else:
        fit = partial(_softmax, width=width, intercept=intercept, class_weights=class_weights)
        if kind == "labels":
            fit = partial(_sigmoids, intercept=intercept)
        own = None if groups is None else groups[some]
        losses, strength, start = _out_of_fold(fit, features[some], targets[some], kind, own, rng)
        head = fit(features, targets, strength, start=start)
        scale = _calibrated_scale(head.logits(features), targets, kind, float(losses.mean()))
    head = LinearHead(head.weight / unit, head.bias - head.weight @ centre / unit).scaled(scale)
    return HeadFit(head, strength, some, losses, scale, middle)


def row_losses(
    logits: Float[np.ndarray, "n k"], targets: Shaped[np.ndarray, "n *k"], kind: Kind
) -> Float[np.ndarray, " n"]:
    """Return cross-entropy, the mean binary cross-entropy of the labels, or squared error per row."""
    if kind == "numbers":
        return np.square(logits[:, 0] - targets)
    if kind == "labels":
        return np.logaddexp(0, np.where(targets > 0.5, -logits, logits)).mean(axis=1)
    return -log_softmax(logits, axis=1)[np.arange(len(targets)), targets]


def _out_of_fold(
    fit: Callable[..., LinearHead],
    features: Float[np.ndarray, "m d"],
    labels: Shaped[np.ndarray, "m *k"],
    kind: Kind,
    groups: Int[np.ndarray, " m"] | None,
    rng: np.random.Generator,
) -> tuple[Float[np.ndarray, " m"], float, LinearHead]:
    """Return out-of-fold losses, the strength of least loss, and the mean of its fits."""
    best: tuple[Float[np.ndarray, " m"], float, LinearHead] | None = None
    stratified = kind == "classes" and np.bincount(labels)[np.unique(labels)].min() >= FOLDS
    splitter = (StratifiedKFold if stratified else KFold)(FOLDS, shuffle=True, random_state=int(rng.integers(2**31)))
    folds = list(splitter.split(labels, labels) if groups is None else GroupKFold(FOLDS).split(labels, None, groups))
    heads: list[LinearHead] = []
    for strength in map(float, STRENGTHS):
        losses, starts = np.empty(len(labels)), heads or [None] * FOLDS
        heads = [fit(features[t], labels[t], strength, start=s) for (t, _), s in zip(folds, starts, strict=True)]
        for head, (_, test) in zip(heads, folds, strict=True):
            losses[test] = row_losses(head.logits(features[test]), labels[test], kind)
        if best is not None and losses.mean() > best[0].mean():
            break  # the loss has one minimum, and weaker penalties take longer to fit
        best = losses, strength, _mean(heads)
    assert best is not None
    return best


def _mean(heads: Sequence[LinearHead]) -> LinearHead:
    return LinearHead(np.mean([head.weight for head in heads], axis=0), np.mean([head.bias for head in heads], axis=0))


def _softmax(
    features: Float[np.ndarray, "n d"],
    labels: Int[np.ndarray, " n"],
    strength: float,
    *,
    width: int,
    intercept: bool,
    class_weights: Float[np.ndarray, " k"] | None,
    start: LinearHead | None = None,
) -> LinearHead:
    """Fit logistic regression, starting from a more regularised fit."""
    present = np.unique(labels)
    weight, bias = np.zeros((width, features.shape[1])), np.zeros(width)
    if len(present) > 1:
        shares = None if class_weights is None else class_weights[labels]
        begin = None if start is None or len(present) == 2 else LinearHead(start.weight[present], start.bias[present])
        coefficients, intercepts = _logistic(features, labels, strength, intercept, shares, begin)
        if len(present) == 2:  # sklearn returns the log-odds of the second class
            coefficients = np.concatenate([-coefficients, coefficients]) / 2
            intercepts = np.concatenate([-intercepts, intercepts]) / 2
        weight[present], bias[present] = coefficients, intercepts
    if intercept and len(present) < width:
        absent = np.setdiff1d(np.arange(width), present)
        bias[absent] = bias[present].min() - np.log(len(labels) + 1)
    return LinearHead(weight, bias)


def _sigmoids(
    features: Float[np.ndarray, "n d"],
    labels: Float[np.ndarray, "n k"],
    strength: float,
    *,
    intercept: bool,
    start: LinearHead | None = None,
) -> LinearHead:
    """Fit a binary logistic regression for each label; a constant label gets the log odds of n + 1 rows."""
    weight, bias = np.zeros((labels.shape[1], features.shape[1])), np.zeros(labels.shape[1])
    for k, own in enumerate((labels > 0.5).T):
        if own.any() and not own.all():
            begin = None if start is None else LinearHead(start.weight[k : k + 1], start.bias[k : k + 1])
            weight[k], bias[k] = (part[0] for part in _logistic(features, own, strength, intercept, None, begin))
        elif intercept:
            bias[k] = (1 if own[0] else -1) * np.log(len(own) + 1)
    return LinearHead(weight, bias)


def _logistic(
    features: Float[np.ndarray, "n d"],
    labels: Shaped[np.ndarray, " n"],
    strength: float,
    intercept: bool,
    shares: Float[np.ndarray, " n"] | None,
    start: LinearHead | None,
) -> tuple[Float[np.ndarray, "k d"], Float[np.ndarray, " k"]]:
    """Return coefficients and intercepts: of each class, or of the second of two."""
    onehot = labels[:, None] == np.unique(labels)
    gradient = np.abs((onehot - onehot.mean(axis=0)).T.astype(np.float32) @ features / len(labels)).max()
    tol = max(TOLERANCE * gradient, 1e-12)
    model = LogisticRegression(C=strength, fit_intercept=intercept, max_iter=300, tol=tol)
    if start is not None:
        model.warm_start = True
        model.coef_, model.intercept_ = start.weight.astype(np.float32), start.bias.astype(np.float32)
    with warnings.catch_warnings():
        # Out-of-fold losses also judge a fit that did not converge.
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(features, labels, sample_weight=shares)
    return model.coef_, np.asarray(model.intercept_) if intercept else np.zeros(len(model.coef_))


def _calibrated_scale(logits: np.ndarray, labels: np.ndarray, kind: Kind, out_of_fold: float) -> float:
    """Return the factor, at most 1, at which the training loss equals the out-of-fold loss."""

    def excess(scale: float) -> float:
        return float(row_losses(scale * logits, labels, kind).mean()) - out_of_fold

    if excess(1.0) >= 0 or excess(LEAST_SCALE) <= 0:
        return 1.0
    return float(brentq(excess, LEAST_SCALE, 1.0, xtol=1e-3))  # pyright: ignore[reportArgumentType]


def grouped_logits(
    features: Float[np.ndarray, "n d"],
    labels: Int[np.ndarray, " n"],
    groups: Int[np.ndarray, " n"],
    width: int,
    *,
    rng: np.random.Generator,
) -> Float[np.ndarray, "n k"]:
    """Return each sample's logits by a logistic regression that has not seen its group; there are 3 groups or more."""
    centred = features - features.mean(axis=0, dtype=np.float64)
    centred = (centred / (np.sqrt(np.square(centred).sum(axis=1).mean()) or 1.0)).astype(np.float32)
    logits = np.empty((len(labels), width), dtype=np.float32)
    fit = partial(_softmax, width=width, intercept=True, class_weights=None)
    some = np.sort(rng.permutation(len(labels))[:ROWS_TO_CHOOSE])
    _, strength, _ = _out_of_fold(fit, centred[some], labels[some], "classes", groups[some], rng)
    for train, test in GroupKFold(min(GROUPS, len(np.unique(groups)))).split(centred, labels, groups):
        part = np.sort(rng.permutation(train)[:ROWS_TO_FIT])
        logits[test] = fit(centred[part], labels[part], strength).logits(centred[test])
    return logits
