"""Label noise: the rate of wrong labels, from predictions by fits that have not seen the row.  Ours.

Hard rows and wrong labels both have a high loss. They differ where the model is confident: labels of hard rows
contradict it ever less often, wrong labels as often as elsewhere. The rate of contradictions that no confidence removes
is therefore the rate of wrong labels; no temperature or class bias produces such a floor.
Pure functions of logits and labels, without randomness.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.optimize import brentq, minimize
from scipy.special import softmax
from scipy.stats import chi2

from tsqlora.compat.shapes import Bool, Float, Int
from tsqlora.errors import SettingsError, TsqLoraError

Logits = Float[np.ndarray, "n k"]
Labels = Int[np.ndarray, " n"]

LEVEL = 0.9999
"""Confidence level of the test for wrong labels. At 0.95 a random head that fits three classes by a steep step looks
like wrong labels: 150 draws gained up to 7.4 of the 13.8 that this level needs."""
BOUND = 0.95
"""Confidence level of each one-sided bound of the rate."""
STEEPEST = 5.0
"""Largest scale, in units of the logits' spread: a row one spread from the boundary is then 99.3 % certain. Steeper
scales overfit few rows that a boundary happens to separate."""
GAIN = 0.03
"""Least gain in log-likelihood, in nats per row, of a richer model of which labels are wrong. Without it a class that
every other one resembles, as "neutral" in GoEmotions (0.01), passes for labels drawn at random; 10 % of the labels
moved into one class of BBC or of six intents gain 0.057 to 0.108."""
ROWS = 5_000
"""Fit at most this many rows, evenly spaced in the rows sorted by label; predict this many at once."""
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
    """The label shares, or free where that gains GAIN: errors may concentrate in few classes."""
    scale: float
    offsets: Float[np.ndarray, " k"]
    rows: int
    """Number of fitted rows, to which the statistic and the bounds refer."""

    @property
    def evident(self) -> bool:
        """Whether a likelihood ratio test at LEVEL finds wrong labels.

        Without wrong labels the rate is on the boundary, so half of the distribution is at 0 (Self and Liang, 1987)."""
        return self.statistic > _gain(LEVEL)

    def class_probabilities(self, logits: Logits) -> Logits:
        """Return the probability of each class to be the true one, before the label is known."""
        return softmax(self.scale * logits.astype(np.float64) + self.offsets, axis=1)

    def p_wrong(self, logits: Logits, labels: Labels) -> Float[np.ndarray, " n"]:
        """Return the probability that each label is wrong; 0 for all where the rate is 0."""
        p_wrong = np.zeros(len(labels))
        for start in range(0, len(labels) if self.blind else 0, ROWS):
            part = slice(start, start + ROWS)
            own = labels[part]
            p = self.class_probabilities(logits[part])[np.arange(len(own)), own]
            wrong = self.blind * self.drawn[own] * (1 - p)
            p_wrong[part] = wrong / ((1 - self.blind) * p + self.blind * self.drawn[own] + TINY)
        return p_wrong


def label_noise(logits: Logits, labels: Labels) -> LabelNoise:
    """Estimate the rate of wrong labels by maximum likelihood, with profile-likelihood bounds.

    Scale and class offsets of the logits are fitted too, and both are needed: offsets that calibrate the logits favour
    some classes once the logits are scaled.  With a single class no label is wrong.  Raises SettingsError for fewer
    than two rows or classes, TsqLoraError for logits that are not finite.
    """
    if min(logits.shape) < 2:
        rows, classes = logits.shape
        raise SettingsError(
            f"{rows} rows of {classes} classes are too few to find wrong labels; give 2 or more of both"
        )
    if broken := int((~np.isfinite(logits)).any(axis=1).sum()):
        raise TsqLoraError(
            f"{broken} of {len(logits)} rows have logits that are not finite; "
            "lower training.learning_rate or use another dtype"
        )
    # Sorted by label, since steps through a periodic table would miss classes.
    some = np.argsort(labels, kind="stable")[np.linspace(0, len(labels) - 1, min(len(labels), ROWS)).astype(int)]
    logits, labels, n = logits[np.sort(some)], labels[np.sort(some)], len(some)
    offsets, drawn = np.full(logits.shape[1], -np.inf), np.zeros(logits.shape[1])
    occur, labels = np.unique(labels, return_inverse=True)
    if len(occur) == 1:
        offsets[occur], drawn[occur] = 0.0, 1.0
        return LabelNoise(0.0, 0.0, 0.0, 0.0, 0.0, drawn, 1.0, offsets, n)
    logits, k = logits[:, occur].astype(np.float64), len(occur)
    centre, spread = logits.mean(axis=0), _spread(logits)
    unit = (logits - centre) / spread
    rate, scale, share, offset = np.zeros((4, 2 + 2 * k), dtype=bool)  # the parameters, as masks
    rate[0], scale[1], share[2 : 2 + k], offset[2 + k :] = True, True, True, True

    start = np.concatenate([[0.0, 1.0], np.log(np.bincount(labels) / n), np.zeros(k)])
    least, without = _fit(unit, labels, start, scale | offset)
    # With a rate the likelihood may have more than one peak.
    tries = [(at, steep) for at in (0.05, 0.3) for steep in (without[1], STEEPEST / 2)]
    starts = [np.concatenate([[at, steep], without[2:]]) for at, steep in tries]
    _, start = min((_fit(unit, labels, at, rate | scale) for at in starts), key=lambda fit: fit[0])
    loss, best = min((least, without), _fit(unit, labels, start, rate | scale | offset), key=lambda fit: fit[0])
    # From the labels that are least likely by the logits: at a rate of 0 the shares would not move.
    own = softmax(without[1] * unit + without[2 + k :], axis=1)[np.arange(n), labels]
    unlikely = np.bincount(labels, 1 / own.clip(1e-3), k)
    begin = np.concatenate([[0.1, best[1]], np.log(unlikely / unlikely.sum()), best[2 + k :]])
    free = _fit(unit, labels, begin, rate | scale | share | offset)
    if loss - free[0] - (k - 1) / n > GAIN:  # less what as many parameters gain from chance
        loss, best = free

    def beyond(at: float) -> float:
        """Return a positive number for a rate outside of the bounds."""
        moves = scale | offset if k <= FEW_CLASSES else scale
        return 2 * n * (_fit(unit, labels, np.concatenate([[at], best[1:]]), moves)[0] - loss) - _gain(BOUND)

    blind, steep = float(best[0]), float(best[1]) / spread
    low = _root(beyond, 0.0, blind) if beyond(0.0) > 0 else 0.0
    high = _root(beyond, blind, MOST) if beyond(MOST) > 0 else MOST
    drawn[occur] = softmax(best[2 : 2 + k])
    offsets[occur] = best[2 + k :] - steep * centre
    right = float(drawn[occur] @ softmax(best[1] * unit + best[2 + k :], axis=1).mean(axis=0))
    wrong = 1 - right  # of labels that are drawn blindly: the others have their class by chance
    statistic = float(2 * n * (least - loss))
    return LabelNoise(blind * wrong, low * wrong, high * wrong, statistic, blind, drawn, steep, offsets, n)


def _gain(level: float) -> float:
    return float(chi2.ppf(2 * level - 1, df=1))


def _root(function: Callable[[float], float], low: float, high: float) -> float:
    return float(brentq(function, low, high, xtol=1e-4))  # pyright: ignore[reportArgumentType]


def _spread(logits: Logits) -> float:
    """Return the deviation of the logits within rows, which gives all models one scale; 1 if all are equal."""
    centred = logits - logits.mean(1, keepdims=True)
    return float(np.sqrt(np.square(centred - centred.mean(0)).mean())) or 1.0


def _fit(
    logits: Logits, labels: Labels, start: Float[np.ndarray, " m"], moves: Bool[np.ndarray, " m"]
) -> tuple[float, Float[np.ndarray, " m"]]:
    """Minimise the mean negative log-likelihood over the parameters that move; return it, and all parameters."""

    def loss(at: np.ndarray) -> tuple[float, np.ndarray]:
        whole = start.copy()
        whole[moves] = at
        value, gradient = _loss(whole, logits, labels)
        return value, gradient[moves]

    ends = [(0.0, MOST), (0.0, STEEPEST), *[(None, None)] * (len(start) - 2)]
    bounds = [end for end, move in zip(ends, moves, strict=True) if move]
    result = minimize(loss, start[moves], jac=True, method="L-BFGS-B", bounds=bounds, options={"ftol": 1e-10})
    at = start.copy()
    at[moves] = result.x
    return float(result.fun), at


def _loss(at: Float[np.ndarray, " m"], logits: Logits, labels: Labels) -> tuple[float, Float[np.ndarray, " m"]]:
    """Return the mean negative log-likelihood of the labels, and its gradient in the parameters.

    These are the share of blind labels, the scale, and k each of log shares and offsets.
    """
    (n, k), rows = logits.shape, np.arange(len(labels))
    blind, scale, drawn = at[0], at[1], softmax(at[2 : 2 + k])
    p = softmax(scale * logits + at[2 + k :], axis=1)
    own = p[rows, labels]
    chance = (1 - blind) * own + blind * drawn[labels] + TINY
    share = (1 - blind) * own / chance  # the probability that the label was not drawn blindly
    by_blind = ((drawn[labels] - own) / chance).sum()
    by_label = np.bincount(labels, 1 - share, k)
    by_logit = -share[:, None] * p
    by_logit[rows, labels] += share
    by_scale, by_offset = (by_logit * logits).sum(), by_logit.sum(axis=0)
    gradient = np.concatenate([[by_blind, by_scale], by_label - by_label.sum() * drawn, by_offset])
    return float(-np.log(chance).mean()), -gradient / n
