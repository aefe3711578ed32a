"""The judge of labels, of the look, the audit, `score` and the callbacks alike.  [ours]

Logistic regressions in folds on frozen features predict each row without having seen it. `label_noise` estimates the
rate of wrong labels from contradictions with these predictions, `fit_transitions` which labels each class's
rows get; Bayes' rule then gives the probability that a class is the true one.

A transition matrix as in learning with noisy labels (Patrini et al. 2017) and the confident joint (Northcutt et al.
2021), but fitted by expectation maximisation on calibrated probabilities, and used only where it predicts held-out
labels better than labels drawn blindly do.
"""

from dataclasses import dataclass, replace

import numpy as np
from scipy.sparse import csr_array
from scipy.sparse.csgraph import connected_components
from scipy.special import softmax

from tsqlora.auditing.labels.label_noise import (
    BOUND,
    GAIN,
    LabelNoise,
    Labels,
    Logits,
    gain_at,
    label_noise,
)
from tsqlora.errors import DataError
from tsqlora.libs.shapes import Bool, Float, Int
from tsqlora.model.copies import distinct
from tsqlora.model.forward import Forward
from tsqlora.model.linear import FOLDS, LinearHead, out_of_fold_logits
from tsqlora.model.ridge import ROWS_AT_ONCE, fit_temperature
from tsqlora.sampling import rows_to_fit
from tsqlora.seeds import stream

DOUBT = 0.2
"""Leave out rows whose label is wrong with more than this probability: a wrong label in training costs more than the
loss of a correct one. At the lower bound of the rate: hard rows pass for wrong ones before wrong ones pass for hard."""
FEWEST = 5
"""Rows that a class needs to be judged: with fewer, the other rows do not define the class, and all look wrong."""
SOME_BLIND = 1e-3
"""Least share of blind labels: without evidence it orders the rows, and their other classes."""
SHARED = 0.5
"""Most of the likely wrong labels that the nearest row may share. A wrong label stands alone: 0 to 46 % share theirs
where labels were set wrong, 52 to 100 % where a linear head cannot fit correct ones."""
ROWS_TO_ASK = 1_000
"""Ask for the labels of the nearest rows of at most this many."""
ROWS_TO_FIT = 50_000
ROUNDS = 8
PRIOR_ROWS = 30.0
"""Weight of the prior, labels drawn blindly, in rows per class."""
LEAST_RATE = 0.03
"""Share of blind labels in the prior, at least: where each class loses labels to one other, none is drawn blindly."""
SHARPER = (1.0, 2.0)
"""Factors on the scale of the logits."""

Probabilities = Float[np.ndarray, "n k"]
Transitions = Float[np.ndarray, "k k"]
"""Row: the true class. Column: the label. Rows sum to 1."""


@dataclass(frozen=True, slots=True, eq=False)
class Verdict:
    """The fitted judge, for labels of rows that it has not seen."""

    temperature: float
    scale: float
    offsets: Float[np.ndarray, " k"]
    transitions: Transitions
    judged: Bool[np.ndarray, " k"]
    """Classes with FEWEST rows or more."""
    otherwise: Float[np.ndarray, " k"]
    """Probability that a label of each class is wrong if the class is not judged."""
    evident: bool
    weight: Float[np.ndarray, "k d"]
    """Of the mean of the fits in folds, empty where the logits come from elsewhere."""
    bias: Float[np.ndarray, " k"]
    doubt: Float[np.ndarray, " k"]
    """Rows of each label are left out whose label is wrong with more than this probability."""

    def of(self, features: Float[np.ndarray, "n d"], labels: Labels) -> tuple[Logits, Float[np.ndarray, " n"]]:
        """Return calibrated logits, and the probability that each label is wrong."""
        logits = LinearHead(self.weight, self.bias).logits(features).astype(np.float32) / np.float32(self.temperature)
        p = softmax(self.scale * logits.astype(np.float64) + self.offsets, axis=1)
        p_true = true_class(p, labels, self.transitions)
        p_wrong = (1 - p_true[np.arange(len(labels)), labels]).clip(0, 1)
        return logits, np.where(self.judged[labels], p_wrong, self.otherwise[labels])


@dataclass(frozen=True, slots=True, eq=False)
class Judgement:
    """The judgement of each label.

    Unless wrong labels are `evident`, only the order of the rows is informative.
    """

    logits: Logits
    """Out of fold and calibrated."""
    p_true: Float[np.ndarray, "n k"]
    """Probability of each class to be the true one, given the label."""
    p_wrong: Float[np.ndarray, " n"]
    """Probability that the label is wrong; for labels that are not judged as if wrong ones were of any class alike, at
    most DOUBT."""
    left_out: Bool[np.ndarray, " n"]
    """Rows that training leaves out: wrong with more than DOUBT, but of no label more than the sum of its rows'
    probabilities: with a rate above DOUBT, rows whose features are of no use would go otherwise."""
    judged: Bool[np.ndarray, " n"]
    """Labels of classes with FEWEST rows or more."""
    evident: bool
    why_not: str | None
    """Why there is no evidence of wrong labels; None if there is."""
    rate: float
    """Share of wrong labels; 0 without evidence."""
    low: float
    high: float
    """Each bound holds for 95 of 100 tables. 0 and 1, which are none, where labels are not evidently drawn blindly."""
    verdict: Verdict | None = None
    """The fitted judge, for other rows."""
    copies: int = 0
    """Rows with the features and the label of an earlier one, which is judged for them."""

    def to_dict(self) -> dict[str, float | bool]:
        """Summarise the judgement for the record."""
        summary: dict[str, float | bool] = {"evident": self.evident, "judged": int(self.judged.sum())}
        return summary | ({"rate": self.rate, "low": self.low, "high": self.high} if self.evident else {})


def judged_features(forward: Forward, rows: Bool[np.ndarray, " n"] | slice = slice(None)) -> Float[np.ndarray, "m d"]:
    """Return what the judge reads of rows: inputs of the last layer and mean hidden states, where there are any."""
    parts = [part[rows] for part in (forward.features, forward.mean) if part is not None]
    if len(parts) == 1:  # no copy of a large table
        return parts[0].astype(np.float32, copy=False)
    none = np.empty((len(forward.labels[rows]), 0))
    return np.concatenate(parts or [none], axis=1, dtype=np.float32)


def judge(
    features: Float[np.ndarray, "n d"],
    labels: Labels,
    width: int,
    *,
    groups: Int[np.ndarray, " n"] | None = None,
    excluded: Bool[np.ndarray, "n k"] | None = None,
) -> Judgement:
    """Judge labels, numbers below `width`, by frozen features.

    Fits on other groups judge the labels of a group, such as the tags of one row, which give each other away. A copy
    would defend a wrong label: groups with equal features become one, and without groups rows that are there several
    times with one label are judged once.
    `excluded` classes of a row are as unlikely as its least likely class. Raises DataError for too few rows.
    """
    several = len(labels) if groups is None else len(np.unique(groups))
    if several < FOLDS:
        raise DataError(f"{several} rows with a label are too few to judge labels; give at least {FOLDS}")
    rng = stream("audit folds", 0)
    along = features @ rng.normal(size=features.shape[1]).astype(np.float32)
    if groups is None:
        first, of = distinct(features, labels, along)
        if FOLDS <= len(first) < len(labels) and np.bincount(labels[first]).max() >= FEWEST:
            once = judge(features[first], labels[first], width, excluded=None if excluded is None else excluded[first])
            each = {name: getattr(once, name)[of] for name in ("logits", "p_true", "p_wrong", "left_out", "judged")}
            return replace(once, **each, copies=len(labels) - len(first))
    else:
        joined = _joined(groups, features, along)
        groups = joined if joined.max() + 1 >= FOLDS else groups
    # By their content: which rows share a fold must not depend on how a file is sorted.
    order = np.argsort(along)
    logits, head = out_of_fold_logits(features, labels, width, groups=groups, order=order, rng=rng)
    if excluded is not None:
        logits = np.where(excluded, logits.min(axis=1, keepdims=True), logits)
    judgement = judge_logits(logits, labels, features=features, groups=groups)
    assert judgement.verdict is not None
    return replace(judgement, verdict=replace(judgement.verdict, weight=head.weight, bias=head.bias))


def _joined(
    groups: Int[np.ndarray, " n"], features: Float[np.ndarray, "n d"], along: Float[np.ndarray, " n"]
) -> Int[np.ndarray, " n"]:
    """Return groups in which those that share a row's features are one."""
    first, of = distinct(features, np.zeros(len(groups), np.int64), along)
    own = np.unique(groups, return_inverse=True)[1]
    shares = csr_array((np.ones(len(own)), (own, own[first[of]])), shape=(int(own.max()) + 1,) * 2)
    return connected_components(shares, directed=False)[1][own]


def judge_logits(
    logits: Logits,
    labels: Labels,
    *,
    features: Float[np.ndarray, "n d"] | None = None,
    groups: Int[np.ndarray, " n"] | None = None,
) -> Judgement:
    """Judge labels by logits, or log probabilities, of fits without the rows that they judge.

    With `features` evidence also needs SHARED.
    """
    temperature, counts = fit_temperature(logits, labels), np.bincount(labels, minlength=logits.shape[1])
    enough = counts >= FEWEST
    logits, judged = logits / np.float32(temperature), enough[labels]
    if judged.sum() < 2:
        raise DataError(f"every class has fewer than {FEWEST} rows, too few to learn it from; give more rows")
    places = np.flatnonzero(judged)
    noise = label_noise(logits[judged], labels[judged])
    some, weights = rows_to_fit(labels[judged], ROWS_TO_FIT)
    some = places[some]
    fitted = fit_transitions(noise, logits[some], labels[some], weights)
    careful = replace(noise, blind=noise.blind * (noise.low / noise.rate if noise.rate else 0.0))
    model, matrix = (careful, blind_transitions(careful, SOME_BLIND)) if fitted is None else fitted
    p_true = model.class_probabilities(logits)
    for start in range(0, len(places), ROWS_AT_ONCE):
        part = places[start : start + ROWS_AT_ONCE]
        p_true[part] = true_class(p_true[part], labels[part], matrix)
    p_wrong = (1 - p_true[np.arange(len(labels)), labels]).clip(0, 1)
    rate = noise.rate if fitted is None else float(p_wrong[judged].mean())
    why_not = None
    if not noise.evident and fitted is None:
        why_not = "the rows that disagree with their label look like ordinary hard rows"
    elif features is not None:
        groups = np.arange(len(labels)) if groups is None else groups
        if _shared(np.flatnonzero((p_wrong > 0.5) & judged), features, labels, groups) > SHARED:
            why_not = "rows that contradict their labels are like others of the same label: they are hard, not wrong"
    evident, low, high = why_not is None, 0.0, 1.0
    # Few wrong labels of any class alike are many of a class of few rows.
    times = len(labels) / np.count_nonzero(counts) / counts.clip(1) if evident else np.ones(len(enough))
    otherwise = np.minimum(float(p_wrong[judged].mean()) * times, DOUBT)
    p_wrong[~judged] = otherwise[labels[~judged]]
    if evident and fitted is None:
        low, high = noise.low, noise.high  # of labels drawn blindly: transitions have none
    doubt = np.full(len(enough), DOUBT)
    for label in np.unique(labels):
        own = np.sort(p_wrong[labels == label])[::-1]
        doubt[label] = max(DOUBT, own[min(round(own.sum()), len(own) - 1)])
    left_out = (p_wrong > doubt[labels]) & evident
    parts = (temperature, model.scale, model.offsets, matrix, enough, otherwise, evident)
    verdict = Verdict(*parts, np.empty((len(enough), 0)), np.zeros(len(enough)), doubt)
    rate = rate if evident else 0.0
    return Judgement(logits, p_true, p_wrong, left_out, judged, evident, why_not, rate, low, high, verdict)


def _shared(
    likely: Int[np.ndarray, " m"], features: Float[np.ndarray, "n d"], labels: Labels, groups: Int[np.ndarray, " n"]
) -> float:
    """Return the share of the likely wrong labels that are also those of the nearest rows; 0 without any."""
    if not len(likely):
        return 0.0
    some = likely[np.linspace(0, len(likely) - 1, min(len(likely), ROWS_TO_ASK)).astype(int)]
    return float((labels_of_nearest(features, labels, groups, some) == labels[some]).mean())


def unit_features(features: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n d"]:
    """Return centred features of norm 1."""
    centred = features.astype(np.float32)
    centred -= centred.mean(axis=0)
    centred /= np.sqrt(np.einsum("nd,nd->n", centred, centred)).clip(min=1e-12)[:, None]
    return centred


def labels_of_nearest(
    features: Float[np.ndarray, "n d"], labels: Labels, rows: Int[np.ndarray, " n"], some: Int[np.ndarray, " m"]
) -> Int[np.ndarray, " m"]:
    """Return the label that is nearest to each of some labels, by cosine of centred features, in another row."""
    unit, nearest = unit_features(features), list[np.ndarray]()
    for start in range(0, len(some), 256):
        part = some[start : start + 256]
        similar = unit[part] @ unit.T
        similar[rows[part][:, None] == rows] = -np.inf
        nearest.append(similar.argmax(axis=1))
    return labels[np.concatenate(nearest)]


def blind_transitions(noise: LabelNoise, least: float = 0.0) -> Transitions:
    """Return the transitions of `noise`: a share of the labels is drawn whatever the class."""
    blind = max(noise.blind, least)
    matrix = np.tile(blind * noise.drawn, (len(noise.drawn), 1))
    matrix[np.diag_indices(len(matrix))] += 1 - blind
    return matrix


def fit_transitions(
    noise: LabelNoise, logits: Logits, labels: Labels, weights: Float[np.ndarray, " n"]
) -> tuple[LabelNoise, Transitions] | None:
    """Fit transitions to out-of-fold logits; also return the noise, with the scale of the logits that suits them.

    Of the transitions the lower bound: the least share of them that is not much less likely.
    None where a fit on half of the rows does not predict the other half better than labels drawn blindly.
    """
    prior, half = blind_transitions(noise, LEAST_RATE), stream("audit halves", 0).permutation(len(labels)) % 2 == 0
    before = _log_likelihood(noise.class_probabilities(logits), labels, blind_transitions(noise), weights)
    best = None
    # Labels that each class loses to one other make the logits look less sure than they are.
    for factor in SHARPER:
        sharper = replace(noise, scale=noise.scale * factor, offsets=noise.offsets * factor)
        p, gain = sharper.class_probabilities(logits), -before
        for rows in (half, ~half):
            fitted = _fit(p[~rows], labels[~rows], prior, weights[~rows])
            gain += _log_likelihood(p[rows], labels[rows], fitted, weights[rows])
        if gain > (GAIN * len(labels) if best is None else best[0]):
            best = gain, sharper, p
    if best is None:
        return None
    _, sharper, p = best
    every = np.eye(len(prior))
    lost, shares = _fit(p, labels, prior, weights) - every, np.linspace(0.04, 1, 25)
    likely = np.array([_log_likelihood(p, labels, every + share * lost, weights) for share in shares])
    return sharper, every + shares[2 * (likely[-1] - likely) <= gain_at(BOUND)].min() * lost


def true_class(p: Probabilities, labels: Labels, transitions: Transitions) -> Probabilities:
    """Return the probability of each class to be the true one given the label, by Bayes' rule."""
    joint = p * transitions.T[labels] + 1e-30
    return joint / joint.sum(axis=1, keepdims=True)


def _fit(p: Probabilities, labels: Labels, prior: Transitions, weights: Float[np.ndarray, " n"]) -> Transitions:
    n, k = p.shape
    by_label = csr_array((weights, (labels, np.arange(n))), shape=(k, n))
    matrix = prior
    for _ in range(ROUNDS):
        counts = np.asarray(by_label @ true_class(p, labels, matrix)).T
        matrix = (counts + PRIOR_ROWS * prior) / (counts.sum(axis=1, keepdims=True) + PRIOR_ROWS)
    return matrix


def _log_likelihood(p: Probabilities, labels: Labels, matrix: Transitions, weights: Float[np.ndarray, " n"]) -> float:
    return float(weights @ np.log(np.einsum("nk,nk->n", p, matrix.T[labels]) + 1e-30))
