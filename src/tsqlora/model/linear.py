"""Linear fits on features: a task's last layer, and predictions of rows by fits that have not seen them.

Linear probing before fine-tuning (Kumar et al. 2022).
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from scipy.special import log_softmax
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression

from tsqlora.libs.shapes import Bool, Float, Int, Shaped
from tsqlora.model.copies import ROWS_AT_ONCE, groups_of_copies
from tsqlora.model.ridge import fit_ridge
from tsqlora.sampling import rows_to_fit
from tsqlora.tasks.task import Link

STRENGTHS = np.geomspace(1e-2, 1e5, 8)
"""Candidates for sklearn's C, on features of mean square norm 1; weaker penalties as long as the loss falls."""
ENOUGH = 0.99
"""Try a weaker penalty only while the out-of-fold loss falls by more than 1 %."""
FOLDS = 3
LEAST_P = 1e-3
"""Least probability of a label by least squares, whose predictions may lie outside of 0 and 1."""
LARGE = 4.0
"""Features whose deviation exceeds this multiple of the median get the median: a penalty prefers large features,
whatever they say. Smaller differences stay: with one deviation for all, MiniLM's mean states count less than they say
(average precision on BBC with 3 % wrong labels 0.890 in place of 0.907)."""
LEAST_TO_FIT = 5_000
OUTPUTS_TO_FIT = 750_000
"""`out_of_fold_logits` fits at most this many rows times classes, but at least LEAST_TO_FIT rows: few classes cost
little, and with fewer rows hard classes look wrong."""
MARGIN = 2.0
"""Standard errors by which one head's out-of-fold loss must be lower than another's, or a penalty's in one fold."""
TOLERANCE = 1e-2
"""Tolerance of the gradient relative to its largest entry at zero weights, which is small for many classes."""


@dataclass(frozen=True, slots=True, eq=False)
class LinearHead:
    """logits = features · weightᵀ + bias."""

    weight: Float[np.ndarray, "k d"]
    bias: Float[np.ndarray, " k"]

    def logits(self, features: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n k"]:
        logits = np.empty((len(features), len(self.bias)))
        for start in range(0, len(features), ROWS_AT_ONCE):
            rows = slice(start, start + ROWS_AT_ONCE)
            logits[rows] = features[rows].astype(np.float64) @ self.weight.T + self.bias
        return logits

    def before(self, centre: Float[np.ndarray, " d"], unit: Float[np.ndarray, " d"]) -> "LinearHead":
        """Return the head that reads features before they were normalised by this centre and these units."""
        weight = self.weight / unit
        return LinearHead(weight, self.bias - weight @ centre)


@dataclass(frozen=True, slots=True, eq=False)
class HeadFit:
    """A head fitted on some rows, and their out-of-fold losses."""

    head: LinearHead
    strength: float
    targets: Shaped[np.ndarray, "n *k"]
    weights: Float[np.ndarray, " n"]
    """Of the rows, with mean 1."""
    losses: Float[np.ndarray, " n"]
    """Out of fold."""
    middle: float = 0.0
    """The output around which training scales the head: the mean of numbers, 0 for logits."""
    of_other: bool = False
    """Whether the head is of the `other` features, whose out-of-fold loss was lower."""

    @property
    def loss(self) -> float:
        return float(np.average(self.losses, weights=self.weights))

    def better_than(self, losses: Float[np.ndarray, " n"]) -> bool:
        """Whether out-of-fold losses beat these losses of the same rows, paired, by 2 standard errors."""
        return _lower(self.losses, losses, self.weights)


def fit_head(
    features: Float[np.ndarray, "n d"],
    targets: Shaped[np.ndarray, "n *k"],
    *,
    link: Link,
    width: int,
    intercept: bool = True,
    class_weights: Float[np.ndarray, " k"] | None = None,
    weights: Float[np.ndarray, " n"] | None = None,
    groups: Int[np.ndarray, " n"] | None = None,
    other: Float[np.ndarray, "n d"] | None = None,
    rng: np.random.Generator,
) -> HeadFit:
    """Fit a head of `width` outputs with the regularisation of least out-of-fold loss.

    Classes: multinomial logistic regression; labels: a binary one each; numbers: least squares. A class without rows
    gets the logit of a class that occurs in less than one row. Each row counts `weights` times. Samples of one of the
    `groups` share a fold, and so do copies: a copy in another fold would make the loss seem lower than that of new
    rows. The head reads the `other` features of the rows if its out-of-fold loss is lower.
    """
    weights = np.ones(len(features)) if weights is None else weights
    fit = partial(_softmax, width=width, intercept=intercept, class_weights=class_weights)
    if link == "sigmoid":
        fit = partial(_sigmoids, intercept=intercept)
    candidates, seed = [features] if other is None else [features, other], int(rng.integers(2**31))

    def outcome(candidate: Float[np.ndarray, "n d"]) -> tuple[Float[np.ndarray, " n"], float, LinearHead]:
        normalised, centre, unit = _normalised(candidate, centred=intercept)
        if link == "identity":
            ridge = fit_ridge(normalised, targets[:, None], intercept=intercept, copies=groups_of_copies(normalised))
            losses = row_losses(ridge.left_out.astype(np.float64), targets, link)
            return losses, ridge.strength, LinearHead(ridge.weight, ridge.bias).before(centre, unit)
        own = groups_of_copies(normalised) if groups is None else groups
        of = _folds(targets if link == "softmax" else np.zeros(len(targets), int), own, np.random.default_rng(seed))
        losses, strength, heads = _out_of_fold(fit, normalised, targets, link, weights, of)
        head = fit(normalised, targets, strength, weights, start=_mean(heads))
        return losses, strength, head.before(centre, unit)

    tried = [outcome(candidate) for candidate in candidates]
    best = min(range(len(tried)), key=lambda index: float(np.average(tried[index][0], weights=weights)))
    losses, strength, head = tried[best]
    middle = float(targets.mean()) if link == "identity" else 0.0
    return HeadFit(head, strength, targets, weights, losses, middle, of_other=best == 1)


def out_of_fold_logits(
    features: Float[np.ndarray, "n d"],
    labels: Int[np.ndarray, " n"],
    width: int,
    *,
    groups: Int[np.ndarray, " n"] | None = None,
    order: Int[np.ndarray, " n"] | None = None,
    rng: np.random.Generator,
) -> tuple[Float[np.ndarray, "n k"], LinearHead]:
    """Predict each row by a logistic regression that has not seen it, nor another row of its group.

    There is one for each fold, fitted on rows of the others, at most OUTPUTS_TO_FIT outputs in all, taken from the
    rows in this `order`. Also return the mean of these heads.
    """
    order = np.arange(len(labels)) if order is None else order
    of = np.empty(len(labels), int)
    of[order] = _folds(labels[order], None if groups is None else groups[order], rng)
    some, weights = rows_to_fit(labels[order], max(LEAST_TO_FIT, OUTPUTS_TO_FIT // width))
    some = order[some]
    fitted, centre, unit = _normalised(features[some], centred=True)
    fit = partial(_softmax, width=width, intercept=True, class_weights=None)
    _, _, heads = _out_of_fold(fit, fitted, labels[some], "softmax", weights, of[some])
    heads = [head.before(centre, unit) for head in heads]
    logits = np.empty((len(labels), width), np.float32)
    for fold, head in enumerate(heads):
        logits[of == fold] = head.logits(features[of == fold])
    return logits, _mean(heads)


def _normalised(
    features: Float[np.ndarray, "n d"], *, centred: bool
) -> tuple[Float[np.ndarray, "n d"], Float[np.ndarray, " d"], Float[np.ndarray, " d"]]:
    """Return features of mean square norm 1, without LARGE ones, their centre, and the unit of each.

    Centred if a bias can absorb the centre: features of similar direction converge slowly.
    """
    centre = features.mean(axis=0, dtype=np.float64) if centred else np.zeros(features.shape[1])
    features = (features - centre.astype(np.float32)).astype(np.float32, copy=False)
    spread = np.sqrt(np.einsum("nd,nd->d", features, features, dtype=np.float64) / len(features))
    usual = float(np.median(spread[spread > 0])) if spread.any() else 1.0
    unit = np.where(spread > LARGE * usual, spread / usual, 1.0)
    unit *= np.linalg.norm(spread / unit) or 1.0
    features /= unit.astype(np.float32)
    return features, centre, unit


def row_losses(
    logits: Float[np.ndarray, "n k"], targets: Shaped[np.ndarray, "n *k"], link: Link
) -> Float[np.ndarray, " n"]:
    """Return cross-entropy, the mean binary cross-entropy of the labels, or squared error per row."""
    if link == "identity":
        return np.square(logits[:, 0] - targets)
    if link == "sigmoid":
        return np.logaddexp(0, np.where(targets > 0.5, -logits, logits)).mean(axis=1)
    return -log_softmax(logits, axis=1)[np.arange(len(targets)), targets]


def unseen_logits(
    features: Float[np.ndarray, "n d"], targets: Shaped[np.ndarray, "n *k"], own: Bool[np.ndarray, " n"], link: Link
) -> Float[np.ndarray, "n k"]:
    """Predict numbers, or logits of labels, by least squares on the rows `own`, of these without the row itself."""
    targets = targets.reshape(len(targets), -1).astype(np.float64)
    some = features[own]
    ridge = fit_ridge(some, targets[own], copies=groups_of_copies(some))
    predicted = ridge.predict(features).astype(np.float32)
    predicted[own] = ridge.left_out
    if link == "identity":
        return predicted
    p = predicted.clip(LEAST_P, 1 - LEAST_P)
    return np.log(p / (1 - p))


def _folds(
    labels: Int[np.ndarray, " n"], groups: Int[np.ndarray, " n"] | None, rng: np.random.Generator
) -> Int[np.ndarray, " n"]:
    """Return the fold of each row: each fold has its share of every class, or whole groups."""
    units = None if groups is None else np.unique(groups, return_inverse=True)[1]
    if units is not None and units.max() + 1 >= FOLDS:
        return (rng.permutation(int(units.max()) + 1) % FOLDS)[units]
    mixed, of = rng.permutation(len(labels)), np.empty(len(labels), int)
    of[mixed[np.argsort(labels[mixed], kind="stable")]] = np.arange(len(labels)) % FOLDS
    return of


def _out_of_fold(
    fit: Callable[..., LinearHead],
    features: Float[np.ndarray, "m d"],
    labels: Shaped[np.ndarray, "m *k"],
    link: Link,
    weights: Float[np.ndarray, " m"],
    of: Int[np.ndarray, " m"],
) -> tuple[Float[np.ndarray, " m"], float, list[LinearHead]]:
    """Return out-of-fold losses, the strength of least loss, and its fits without the rows of each fold."""
    best: tuple[Float[np.ndarray, " m"], float, list[LinearHead]] | None = None
    heads: list[LinearHead] = []
    for strength in map(float, STRENGTHS):
        losses, starts, heads = np.empty(len(labels)), heads or [None] * FOLDS, list[LinearHead]()
        for fold, start in enumerate(starts):
            train, test = of != fold, of == fold
            heads.append(fit(features[train], labels[train], strength, weights[train], start=start))
            losses[test] = row_losses(heads[-1].logits(features[test]), labels[test], link)
            if best is not None and _lower(best[0][test], losses[test], weights[test]):
                return best  # the loss has one minimum, and weaker penalties take longer to fit
        if best is not None and np.average(losses, weights=weights) > ENOUGH * np.average(best[0], weights=weights):
            break
        best = losses, strength, heads
    assert best is not None
    return best


def _lower(losses: Float[np.ndarray, " m"], others: Float[np.ndarray, " m"], weights: Float[np.ndarray, " m"]) -> bool:
    """Whether losses are lower than others of the same rows, paired and weighted, by 2 standard errors."""
    gain = (others - losses) * weights
    error = float(gain.std(ddof=1)) / len(gain) ** 0.5 if len(gain) > 1 else np.inf
    return float(gain.mean()) > MARGIN * error


def _mean(heads: Sequence[LinearHead]) -> LinearHead:
    return LinearHead(np.mean([head.weight for head in heads], axis=0), np.mean([head.bias for head in heads], axis=0))


def _softmax(
    features: Float[np.ndarray, "n d"],
    labels: Int[np.ndarray, " n"],
    strength: float,
    weights: Float[np.ndarray, " n"],
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
        shares = weights if class_weights is None else weights * class_weights[labels]
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
    weights: Float[np.ndarray, " n"],
    *,
    intercept: bool,
    start: LinearHead | None = None,
) -> LinearHead:
    """Fit a binary logistic regression for each label; a constant label gets the log odds of n + 1 rows."""
    weight, bias = np.zeros((labels.shape[1], features.shape[1])), np.zeros(labels.shape[1])
    for k, own in enumerate((labels > 0.5).T):
        if own.any() and not own.all():
            begin = None if start is None else LinearHead(start.weight[k : k + 1], start.bias[k : k + 1])
            weight[k], bias[k] = (part[0] for part in _logistic(features, own, strength, intercept, weights, begin))
        elif intercept:
            bias[k] = (1 if own[0] else -1) * np.log(len(own) + 1)
    return LinearHead(weight, bias)


def _logistic(
    features: Float[np.ndarray, "n d"],
    labels: Shaped[np.ndarray, " n"],
    strength: float,
    intercept: bool,
    shares: Float[np.ndarray, " n"],
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
        warnings.filterwarnings("ignore", "The number of unique classes")
        model.fit(features, labels, sample_weight=shares)
    return model.coef_, np.asarray(model.intercept_) if intercept else np.zeros(len(model.coef_))
