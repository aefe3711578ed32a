"""Label transitions: which labels the rows of each class get, for wrong labels that prefer some classes.  [ours]

A transition matrix as in learning with noisy labels (Patrini et al. 2017) and the confident joint (Northcutt et al.
2021), but fitted by expectation maximisation on calibrated probabilities, and used only where it predicts held-out
labels better than labels drawn blindly do.
"""

from dataclasses import replace

import numpy as np
from scipy.sparse import csr_array

from tsqlora.compat.shapes import Float
from tsqlora.quality.label_noise import GAIN, LabelNoise, Labels, Logits
from tsqlora.seeds import stream

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


def blind_transitions(noise: LabelNoise, least: float = 0.0) -> Transitions:
    """Return the transitions of `noise`: a share of the labels is drawn whatever the class."""
    blind = max(noise.blind, least)
    matrix = np.tile(blind * noise.drawn, (len(noise.drawn), 1))
    matrix[np.diag_indices(len(matrix))] += 1 - blind
    return matrix


def fit_transitions(noise: LabelNoise, logits: Logits, labels: Labels) -> tuple[LabelNoise, Transitions] | None:
    """Fit transitions to out-of-fold logits; also return the noise, with the scale of the logits that suits them.

    None where a fit on half of the rows does not predict the other half better than labels drawn blindly.
    """
    prior, half = blind_transitions(noise, LEAST_RATE), stream("audit halves", 0).permutation(len(labels)) % 2 == 0
    before = _log_likelihood(noise.class_probabilities(logits), labels, blind_transitions(noise))
    best = None
    # Labels that each class loses to one other make the logits look less sure than they are.
    for factor in SHARPER:
        sharper = replace(noise, scale=noise.scale * factor, offsets=noise.offsets * factor)
        p, gain = sharper.class_probabilities(logits), -before
        for rows in (half, ~half):
            gain += _log_likelihood(p[rows], labels[rows], _fit(p[~rows], labels[~rows], prior))
        if gain > (GAIN * len(labels) if best is None else best[0]):
            best = gain, sharper, p
    return None if best is None else (best[1], _fit(best[2], labels, prior))


def true_class(p: Probabilities, labels: Labels, transitions: Transitions) -> Probabilities:
    """Return the probability of each class to be the true one given the label, by Bayes' rule."""
    joint = p * transitions.T[labels] + 1e-30
    return joint / joint.sum(axis=1, keepdims=True)


def _fit(p: Probabilities, labels: Labels, prior: Transitions) -> Transitions:
    n, k = p.shape
    by_label = csr_array((np.ones(n), (labels, np.arange(n))), shape=(k, n))
    matrix = prior
    for _ in range(ROUNDS):
        counts = np.asarray(by_label @ true_class(p, labels, matrix)).T
        matrix = (counts + PRIOR_ROWS * prior) / (counts.sum(axis=1, keepdims=True) + PRIOR_ROWS)
    return matrix


def _log_likelihood(p: Probabilities, labels: Labels, matrix: Transitions) -> float:
    return float(np.log(np.einsum("nk,nk->n", p, matrix.T[labels]) + 1e-30).sum())
