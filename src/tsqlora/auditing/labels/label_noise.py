"""Label noise: the rate of wrong labels, from predictions by fits that have not seen the row.  Ours.

Hard rows and wrong labels both have a high loss. They differ where the model is confident: labels of hard rows
contradict it ever less often, wrong labels as often as elsewhere. The rate of contradictions that no confidence removes
is therefore the rate of wrong labels; no temperature or class bias produces such a floor.
Pure functions of logits and labels, without randomness.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import product
from operator import itemgetter

import numpy as np
from scipy.optimize import brentq, minimize
from scipy.special import softmax
from scipy.stats import chi2

from tsqlora.errors import SettingsError, TsqLoraError
from tsqlora.libs.shapes import Bool, Float, Int
from tsqlora.sampling import rows_to_fit

Logits = Float[np.ndarray, "n k"]
Labels = Int[np.ndarray, " n"]

LEVEL = 0.9999
"""Confidence level of the test for wrong labels. At 0.95 a random head that fits three classes by a steep step looks
like wrong labels: 150 draws gained up to 7.4 of the 13.8 that this level needs."""
BOUND = 0.95
"""Confidence level of each one-sided bound of a share."""
STEEPEST = 5.0
"""Largest scale, in units of the logits' spread: a row one spread from the boundary is then 99.3 % certain. Steeper
scales overfit few rows that a boundary happens to separate."""
GAIN = 0.025
"""Least gain in log-likelihood, in nats per row, of a richer model of which labels are wrong. Without it a class that
every other one resembles, as "neutral" in GoEmotions (0.018), passes for labels drawn at random; 3 % of the labels
moved into one class of BBC gain 0.026, 5 % of those of BBC or ATIS 0.047 to 0.049."""
LESS_GAIN = 0.01
"""The same of wrong labels that are drawn by the labels' frequency, which has no parameter: GoEmotions gains 0.005 to
0.007, 5 % wrong labels that avoid rare classes 0.03."""
PRIOR_ROWS = 10.0
"""Weight in rows of the uniform prior of wrong labels, where their distribution is fitted."""
PRECISION = 3.0
"""Of the normal prior of the offsets."""
ROWS = 5_000
"""Fit about this many rows."""
FEW_CLASSES = 20
"""With more classes the bounds hold the offsets fixed."""
MOST = 0.95
TINY = 1e-30


@dataclass(frozen=True, slots=True, eq=False)
class LabelNoise:
    """A model of labels given logits z: the class follows softmax(scale·z + offsets); a share `blind` of the labels is
    drawn from `drawn`, whatever the class.

    A class that no row has is never right: its offset is −∞.
    """

    rate: float
    """Share of labels that are wrong."""
    low: float
    high: float
    statistic: float
    """Likelihood ratio: twice the log-likelihood gained by a rate above 0."""
    blind: float
    drawn: Float[np.ndarray, " k"]
    """Uniform over the classes that occur, the labels' frequency, or fitted: errors may concentrate in few classes."""
    scale: float
    offsets: Float[np.ndarray, " k"]

    @property
    def evident(self) -> bool:
        """Whether a likelihood ratio test at LEVEL finds wrong labels.

        Without wrong labels the rate is on the boundary, so half of the distribution is at 0 (Self and Liang, 1987)."""
        return self.statistic > gain_at(LEVEL)

    def class_probabilities(self, logits: Logits) -> Logits:
        """Return the probability of each class to be the true one, before the label is known."""
        return softmax(self.scale * logits.astype(np.float64) + self.offsets, axis=1)


def label_noise(logits: Logits, labels: Labels) -> LabelNoise:
    """Estimate the rate of wrong labels by maximum likelihood, with profile-likelihood bounds.

    Scale and class offsets of the logits are fitted too, and both are needed: offsets that calibrate the logits favour
    some classes once the logits are scaled. The offsets have a normal prior: without it the right rows of a
    rare class pass for wrong ones as soon as most of its labels are wrong. Wrong labels are drawn uniformly; by the
    frequency of the labels, or by fitted shares, where that gains enough.  With a single class no label is wrong.
    Raises SettingsError for fewer than two rows or classes, TsqLoraError for logits that are not finite.
    """
    if min(logits.shape) < 2:
        size = "{} rows of {} classes".format(*logits.shape)
        raise SettingsError(f"{size} are too few to find wrong labels; give 2 or more of both")
    if broken := int((~np.isfinite(logits)).any(axis=1).sum()):
        raise TsqLoraError(
            f"{broken} of {len(logits)} rows have logits that are not finite; "
            "lower training.learning_rate or use another dtype"
        )
    some, weights = rows_to_fit(labels, ROWS)
    logits, labels, n = logits[some], labels[some], len(some)
    offsets, drawn = np.full(logits.shape[1], -np.inf), np.zeros(logits.shape[1])
    occur, labels = np.unique(labels, return_inverse=True)
    if len(occur) == 1:
        offsets[occur], drawn[occur] = 0.0, 1.0
        return LabelNoise(0.0, 0.0, 0.0, 0.0, 0.0, drawn, 1.0, offsets)
    logits, k = logits[:, occur].astype(np.float64), len(occur)
    rate, scale, share, offset = np.zeros((4, 2 + 2 * k), dtype=bool)  # the parameters, as masks
    rate[0], scale[1], share[2 : 2 + k], offset[2 + k :] = True, True, True, True
    centre, spread = logits.mean(axis=0), _spread(logits)
    start = np.concatenate([[0.0, 1.0], np.zeros(2 * k)])
    least, first = _fit((logits - centre) / spread, labels, weights, start, scale | offset, prior=0.0)
    # Calibrated as if all labels were right. A rate changes little of that, as the prior of the offsets says.
    by, constants = first[1] / spread, first[2 + k :] - first[1] / spread * centre
    logits = by * logits + constants
    unit = _spread(logits)
    fit = partial(_fit, logits / unit, labels, weights)

    def from_shares(shares: Float[np.ndarray, " k"], moves: Bool[np.ndarray, " m"]) -> tuple[float, np.ndarray]:
        """Fit with wrong labels drawn by these shares; with a rate the likelihood may have more than one peak."""
        logs = np.log(shares / shares.sum())
        starts = [np.concatenate([pair, logs, np.zeros(k)]) for pair in product((0.05, 0.3), (unit, STEEPEST / 2))]
        _, best = min((fit(at, rate | scale) for at in starts), key=itemgetter(0))
        return fit(fit(best, rate | scale | moves)[1], rate | scale | offset)  # without the prior of the shares

    start[1] = unit
    loss, best = min((least, start), from_shares(np.ones(k), offset), key=itemgetter(0))
    unlikely = weights / softmax(logits, axis=1)[np.arange(n), labels].clip(1e-3)
    frequency, rarely = np.bincount(labels, weights), np.bincount(labels, unlikely)
    # Less what as many parameters gain from chance.
    for shares, moves, gain in ((frequency, offset, LESS_GAIN), (rarely, share | offset, GAIN + (k - 1) / n)):
        other, at = from_shares(shares, moves)
        if loss - other > gain:
            loss, best = other, at
    statistic = float(2 * n * (least - loss))

    def beyond(at: float) -> float:
        """Return a positive number for a rate outside of the bounds."""
        moves = scale | offset if k <= FEW_CLASSES else scale
        return 2 * n * (fit(np.concatenate([[at], best[1:]]), moves)[0] - loss) - gain_at(BOUND)

    blind, steep = float(best[0]), float(best[1]) / unit
    low = _root(beyond, 0.0, blind) if beyond(0.0) > 0 else 0.0
    high = _root(beyond, blind, MOST) if beyond(MOST) > 0 else MOST
    drawn[occur] = softmax(best[2 : 2 + k])
    offsets[occur] = best[2 + k :] + steep * constants
    p = softmax(steep * logits + best[2 + k :], axis=1)
    wrong = 1 - float(drawn[occur] @ np.average(p, axis=0, weights=weights))  # others have their class by chance
    return LabelNoise(blind * wrong, low * wrong, high * wrong, statistic, blind, drawn, float(steep * by), offsets)


def gain_at(level: float) -> float:
    """Return the likelihood ratio of a one-sided test at this level."""
    return float(chi2.ppf(2 * level - 1, df=1))


def _root(function: Callable[[float], float], low: float, high: float) -> float:
    return float(brentq(function, low, high, xtol=1e-4))  # pyright: ignore[reportArgumentType]


def _spread(logits: Logits) -> float:
    """Return the deviation of the logits within rows, which gives all models one scale; 1 if rows are equal."""
    centred = logits - logits.mean(1, keepdims=True)
    spread = float(np.sqrt(np.square(centred - centred.mean(0)).mean()))
    return spread if spread > 1e-12 else 1.0


def _fit(
    logits: Logits,
    labels: Labels,
    weights: Float[np.ndarray, " n"],
    start: Float[np.ndarray, " m"],
    moves: Bool[np.ndarray, " m"],
    *,
    prior: float = PRECISION,
) -> tuple[float, Float[np.ndarray, " m"]]:
    """Minimise the mean negative log-likelihood over the parameters that move; return it, and all parameters.

    Offsets have a normal prior of this precision; shares that move have a uniform one of PRIOR_ROWS.
    """
    priors = PRIOR_ROWS * float(moves[2]), prior

    def loss(at: np.ndarray) -> tuple[float, np.ndarray]:
        whole = start.copy()
        whole[moves] = at
        value, gradient = _loss(whole, logits, labels, weights, priors)
        return value, gradient[moves]

    ends = [(0.0, MOST), (0.0, max(STEEPEST, start[1])), *[(None, None)] * (len(start) - 2)]
    bounds = [end for end, move in zip(ends, moves, strict=True) if move]
    result = minimize(loss, start[moves], jac=True, method="L-BFGS-B", bounds=bounds, options={"ftol": 1e-10})
    at = start.copy()
    at[moves] = result.x
    return float(result.fun), at


def _loss(
    at: Float[np.ndarray, " m"],
    logits: Logits,
    labels: Labels,
    weights: Float[np.ndarray, " n"],
    priors: tuple[float, float],
) -> tuple[float, Float[np.ndarray, " m"]]:
    """Return the mean negative log-likelihood of the weighted labels and of the priors, and its gradient.

    The parameters are the share of blind labels, the scale, and k each of log shares and offsets; priors as for `_fit`.
    """
    (n, k), rows = logits.shape, np.arange(len(labels))
    blind, scale, drawn, offsets = at[0], at[1], softmax(at[2 : 2 + k]), at[2 + k :]
    p = softmax(scale * logits + offsets, axis=1)
    own = p[rows, labels]
    chance = (1 - blind) * own + blind * drawn[labels] + TINY
    share = weights * (1 - blind) * own / chance  # of which the label was not drawn blindly
    by_blind = (weights * (drawn[labels] - own) / chance).sum()
    by_label = np.bincount(labels, weights - share, k) + priors[0] / k
    by_logit = -share[:, None] * p
    by_logit[rows, labels] += share
    by_scale, by_offset = (by_logit * logits).sum(), by_logit.sum(axis=0) - priors[1] * offsets
    gradient = np.concatenate([[by_blind, by_scale], by_label - by_label.sum() * drawn, by_offset])
    prior = priors[0] * np.log(k * drawn + TINY).mean() - priors[1] * np.square(offsets).sum() / 2
    return float(-weights @ np.log(chance) - prior) / n, -gradient / n
