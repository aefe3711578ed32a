"""Label-noise filter: estimate the rate of wrong labels, and choose the rows to drop.  Ours.

Hard rows and wrong labels both have a high loss. They differ where the model is confident: labels of hard rows
contradict it ever less often, wrong labels as often as elsewhere. The rate of contradictions that no confidence removes
is therefore the rate of wrong labels; no temperature or class bias produces such a floor.
Pure functions of logits and labels, without randomness.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from scipy.optimize import OptimizeResult, brentq, minimize
from scipy.special import softmax
from scipy.stats import chi2

from tsqlora.compat.shapes import Bool, Float, Int
from tsqlora.errors import SettingsError, TsqLoraError

Logits = Float[np.ndarray, "n k"]
Labels = Int[np.ndarray, " n"]
Nearest = Callable[[Int[np.ndarray, " m"]], Int[np.ndarray, " m"]]
"""Returns, for row numbers, the label of each one's nearest other row."""

DOUBT = 0.2
"""Drop rows whose label is wrong with more than this probability: a wrong label in training costs more than the loss of
a correct one."""
MOST = 0.5
"""Drop at most this share."""
LEVEL = 0.95
"""Confidence level of the test for wrong labels, and of each one-sided bound of their rate."""
STEEPEST = 5.0
"""Largest scale, in units of the logits' spread: a row one spread from the boundary is then 99.3 % certain. Steeper
scales overfit few rows that a boundary happens to separate."""
FROZEN_CLASSES = 3
"""Least classes for evidence of a ridge regression on frozen features: with two, clean MRPC looks like wrong labels of
two clear intents."""
FROZEN_LEVEL = 0.9999
"""Confidence level on frozen features. A random head may fit three classes by a steep step, which gains up to 7.4 of
the 13.8 needed (150 draws)."""
SEPARATION = 0.65
"""Least share of the variance of correct and wrong that p_wrong must explain for a ridge regression on frozen features.
Clean tables that would lose over 2 % reach 0.60 (GoEmotions, merged intents of CLINC150); wrong labels in 5 to 150
intents start at 0.81.
"""
SHARED = 0.5
"""Most of the likely wrong labels that the nearest row may share where its label is available. A wrong label stands
alone: 3 to 30 % share theirs where labels are set wrong, 52 to 100 % where a linear head cannot fit correct ones.
"""
ROWS_TO_ASK = 1_000
"""Ask for the labels of the nearest rows of at most this many."""
ROWS = 5_000
"""Fit at most this many rows, evenly spaced in the rows sorted by label; compute p_wrong for this many at once."""
FEW_CLASSES = 20
"""With more classes only the best starting point gets a full fit, and the bounds hold the offsets fixed."""
TINY = 1e-30


@dataclass(frozen=True, slots=True, eq=False)
class LabelNoise:
    """A model of labels given logits z: the class follows softmax(scale·z + offsets), and with probability `rate` the
    label is another class, in proportion to the shares of the labels.

    A rare class is therefore rarely a wrong label. A class that no row has never is: its offset is −∞.
    """

    rate: float
    low: float
    high: float
    statistic: float
    """Likelihood ratio: twice the log-likelihood gained by a rate above 0."""
    level: float
    scale: float
    offsets: Float[np.ndarray, " k"]
    shares: Float[np.ndarray, " k"]
    """Shares of the labels."""
    rows: int
    """Number of fitted rows, to which statistic, bounds and shares refer."""
    clear: bool = True
    """False where frozen features cannot distinguish wrong labels from rows that no linear head can fit."""

    @property
    def evident(self) -> bool:
        """Whether a likelihood ratio test at `level` finds wrong labels; never unless `clear`.

        Without wrong labels the rate is on the boundary, so half of the distribution is at 0 (Self and Liang, 1987)."""
        return self.clear and self.statistic > _gain(self.level)

    def to_dict(self) -> dict[str, float | int | bool | list[float | None]]:
        numbers = {n: getattr(self, n) for n in ("rate", "low", "high", "statistic", "level", "scale", "rows", "clear")}
        offsets = [at if np.isfinite(at) else None for at in self.offsets.tolist()]  # JSON has no infinity
        return numbers | {"offsets": offsets, "shares": self.shares.tolist(), "evident": self.evident}

    def p_wrong(self, logits: Logits, labels: Labels) -> Float[np.ndarray, " n"]:
        """Return the probability that each label is wrong; 0 for all where the rate is 0."""
        p_wrong = np.zeros(len(labels))
        if self.rate == 0:
            return p_wrong
        for start in range(0, len(labels), ROWS):
            part = slice(start, start + ROWS)
            p = softmax(self.scale * logits[part] + self.offsets, axis=1)
            right, other = _label_probabilities(p, labels[part], self.shares)
            p_wrong[part] = self.rate * other / ((1 - self.rate) * right + self.rate * other + TINY)
        return p_wrong


def reject(
    logits: Logits, labels: Labels, *, frozen: bool = False, nearest: Nearest | None = None
) -> tuple[Bool[np.ndarray, " n"], LabelNoise]:
    """Return a mask of the rows to drop, and the fitted label noise.

    Where wrong labels are `evident`, drop the share of rows with p_wrong above DOUBT, at most MOST; else none.  Each
    class loses the same share, its rows of largest p_wrong: the class shares stay, and with them the bias of the model.
    Ties go to the earlier row.

    Set `frozen` for out-of-sample predictions of a linear head on features that were never trained: evidence then needs
    FROZEN_LEVEL.  A head of least squares predicts shares, not log odds, so that rows which it cannot fit contradict it
    at any confidence, like wrong labels but less sharply: evidence then also needs FROZEN_CLASSES and SEPARATION.  The
    logits of a logistic regression are log odds.  For these give `nearest`: evidence then needs SHARED instead.
    """
    noise = label_noise(logits, labels)
    mask, p_wrong = np.zeros(len(labels), dtype=bool), noise.p_wrong(logits, labels)
    if frozen:
        if nearest is None:
            clear = len(np.unique(labels)) >= FROZEN_CLASSES and _explained(p_wrong) >= SEPARATION
        else:
            clear = _shared(p_wrong, labels, nearest) <= SHARED
        noise = replace(noise, clear=clear and noise.statistic > _gain(FROZEN_LEVEL))
    if noise.evident:
        share = min(float((p_wrong > DOUBT).mean()), MOST)
        for label in np.unique(labels):
            rows = np.flatnonzero(labels == label)
            mask[rows[np.argsort(-p_wrong[rows], kind="stable")[: round(share * len(rows))]]] = True
    return mask, noise


def doubts(logits: Logits, labels: Labels, *, frozen: bool) -> Float[np.ndarray, " n"] | None:
    """Return the probability that each label is wrong; None where wrong labels are not evident.  As in `reject`."""
    _, noise = reject(logits, labels, frozen=frozen)
    return noise.p_wrong(logits, labels) if noise.evident else None


def label_noise(logits: Logits, labels: Labels) -> LabelNoise:
    """Estimate the rate of wrong labels by maximum likelihood, with profile-likelihood bounds.

    Scale and class offsets of the logits are fitted too, and both are needed: offsets that calibrate the logits favour
    some classes once the logits are scaled.  The rate is at most (k − 1)/k for k equally frequent classes, beyond which
    labels would contradict the model.  With a single class no label is wrong.  Raises SettingsError for fewer than two
    rows or classes, TsqLoraError for logits that are not finite.
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
    logits, labels = logits[np.sort(some)], labels[np.sort(some)]
    offsets, shares = np.full(logits.shape[1], -np.inf), _shares(labels, logits.shape[1])
    occur, labels = np.unique(labels, return_inverse=True)
    if len(occur) == 1:
        offsets[occur] = 0.0
        return LabelNoise(0.0, 0.0, 0.0, 0.0, LEVEL, 1.0, offsets, shares, len(labels))
    logits, few = logits[:, occur].astype(np.float64), len(occur) <= FEW_CLASSES
    centre, spread = logits.mean(axis=0), _spread(logits)
    unit, most = (logits - centre) / spread, _largest_rate(shares[occur])
    least, without = _fit(unit, labels, np.array([0.0, 1.0, *np.zeros(len(centre))]), free=False)
    # With a rate the likelihood may have more than one peak.
    scales = (without[1], STEEPEST / 2)
    starts = [np.array([rate, scale, *without[2:]]) for rate in (0.05, 0.3) for scale in scales]
    if not few:
        starts = [min((_fit(unit, labels, at, offsets=False) for at in starts), key=lambda fit: fit[0])[1]]
    fits = [_fit(unit, labels, at) for at in starts]
    loss, best = min([(least, without), *fits], key=lambda fit: fit[0])
    rate, scale = float(best[0]), float(best[1]) / spread
    offsets[occur] = best[2:] - scale * centre
    gain = 2 * len(labels) * (least - loss)

    def beyond(at: float) -> float:
        """Return a positive number for a rate outside of the bounds."""
        worse = _fit(unit, labels, np.array([at, *best[1:]]), free=False, offsets=few)[0] - loss
        return 2 * len(labels) * worse - _gain(LEVEL)

    return LabelNoise(
        rate=rate,
        low=_root(beyond, 0.0, rate) if beyond(0.0) > 0 else 0.0,
        high=_root(beyond, rate, most) if beyond(most) > 0 else most,
        statistic=float(gain),
        level=LEVEL,
        scale=scale,
        offsets=offsets,
        shares=shares,
        rows=len(labels),
    )


def _explained(p_wrong: Float[np.ndarray, " n"]) -> float:
    """Return the share of the variance of correct and wrong that p_wrong explains: 1 if all are 0 or 1, 0 if equal."""
    mean = float(p_wrong.mean())
    return float(p_wrong.var()) / max(mean * (1 - mean), TINY)


def _shared(p_wrong: Float[np.ndarray, " n"], labels: Labels, nearest: Nearest) -> float:
    """Return the share of the likely wrong labels that are also those of the nearest rows; 0 without any."""
    likely = np.flatnonzero(p_wrong > 0.5)
    if not len(likely):
        return 0.0
    some = likely[np.linspace(0, len(likely) - 1, min(len(likely), ROWS_TO_ASK)).astype(int)]
    return float((nearest(some) == labels[some]).mean())


def _gain(level: float) -> float:
    return float(chi2.ppf(2 * level - 1, df=1))


def _root(function: Callable[[float], float], low: float, high: float) -> float:
    return float(brentq(function, low, high, xtol=1e-4))  # pyright: ignore[reportArgumentType]


def _spread(logits: Logits) -> float:
    """Return the deviation of the logits within rows, which gives all models one scale; 1 if all are equal."""
    centred = logits - logits.mean(1, keepdims=True)
    return float(np.sqrt(np.square(centred - centred.mean(0)).mean())) or 1.0


def _shares(labels: Labels, classes: int) -> Float[np.ndarray, " k"]:
    return np.bincount(labels, minlength=classes) / len(labels)


def _largest_rate(shares: Float[np.ndarray, " k"]) -> float:
    """Return the rate beyond which the first label would be likelier in rows of the second class than in its own."""
    second, first = np.sort(shares)[-2:]
    return float(1 / (1 + first / (1 - second)))


def _label_probabilities(
    p: Logits, labels: Labels, shares: Float[np.ndarray, " k"]
) -> tuple[Float[np.ndarray, " n"], Float[np.ndarray, " n"]]:
    """Return the probability of each label if it is right, and if it is that of another class."""
    right, weights = p[np.arange(len(labels)), labels], 1 / (1 - shares)
    return right, shares[labels] * (p @ weights - right * weights[labels]).clip(0)


def _fit(
    logits: Logits, labels: Labels, start: Float[np.ndarray, " m"], *, free: bool = True, offsets: bool = True
) -> tuple[float, Float[np.ndarray, " m"]]:
    """Minimise the mean negative log-likelihood; return it with rate, scale and offsets.

    `free` fits the rate too, `offsets` the offsets.
    """
    # Equal bounds would fix a parameter too, but its gradient spoils L-BFGS's steps.
    moves = slice(0 if free else 1, None if offsets else 2)

    def loss(at: np.ndarray) -> tuple[float, np.ndarray]:
        whole = start.copy()
        whole[moves] = at
        value, gradient = _loss(whole, logits, labels)
        return value, gradient[moves]

    most = _largest_rate(_shares(labels, logits.shape[1]))
    bounds = [(0.0, most), (0.0, STEEPEST), *[(None, None)] * logits.shape[1]][moves]
    options = {"ftol": 1e-12}
    result: OptimizeResult = minimize(loss, start[moves], jac=True, method="L-BFGS-B", bounds=bounds, options=options)
    at = start.copy()
    at[moves] = result.x
    return float(result.fun), at


def _loss(at: Float[np.ndarray, " m"], logits: Logits, labels: Labels) -> tuple[float, Float[np.ndarray, " m"]]:
    """Return the mean negative log-likelihood of the labels and its gradient in rate, scale and offsets."""
    rate, scale, offsets = at[0], at[1], at[2:]
    shares = _shares(labels, len(offsets))
    p = softmax(scale * logits + offsets, axis=1)
    right, other = _label_probabilities(p, labels, shares)
    chance = (1 - rate) * right + rate * other + TINY
    # The gradient in a logit is the class's probability minus its posterior given the label; the label's own class has
    # another factor than the rest.
    weights, share = 1 / (1 - shares), rate * shares[labels] / chance
    own = right * ((1 - rate) / chance - share * weights[labels])
    by_offset = p.sum(axis=0) - weights * (share @ p) - np.bincount(labels, own, len(offsets))
    p *= logits
    by_scale = p.sum() - share @ (p @ weights) - own @ logits[np.arange(len(labels)), labels]
    gradient = np.array([((right - other) / chance).sum(), by_scale, *by_offset]) / len(labels)
    return float(-np.log(chance).mean()), gradient
