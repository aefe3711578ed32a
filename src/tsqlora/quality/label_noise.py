"""Which rows to leave out: how many labels seem wrong, and which.  METHOD section 1, ours.

A hard task and wrong labels look alike in a loss. They differ where the model is most sure: a hard row's label
contradicts it ever less often, a wrong label as often there as anywhere. So a floor of contradictions that
no confidence removes tells wrong labels, and how many there are; a temperature has no such floor, whichever
constants of the classes go with it.
Pure functions of logits and labels; what is random is only the data.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.optimize import OptimizeResult, brentq, minimize
from scipy.special import softmax
from scipy.stats import chi2

from tsqlora.errors import SettingsError, TsqLoraError

DOUBT = 0.2
"""Rows are rejected whose label is wrong with more than this chance: a wrong one that is kept costs more than a right
one that is lost."""
MOST = 0.5
"""No larger share is rejected."""
LEVEL = 0.95
"""Of the test that there are wrong labels, and of each one-sided bound of their rate."""
STEEPEST = 5.0
"""No larger scale is fitted, in units of the logits' spread: a row one spread from the border is 99.3 % sure then.
Steeper ones are fitted to few rows alone, where a border that happens to part them is taken for knowledge."""
TINY = 1e-30
"""Added to a chance that is divided by."""


@dataclass(frozen=True, slots=True, eq=False)
class LabelNoise:
    """How labels come from logits z: a class from softmax(scale·z + offsets), and with chance `rate` the label is that
    of another class instead, each as often as rows are labelled with it.

    So a class that is rare, or that no row is labelled with, is rarely a wrong label, or never: the offset of the
    latter is −∞.
    """

    rate: float
    low: float
    high: float
    statistic: float
    """Twice the log-likelihood that a rate above 0 gains; only a large one is evidence."""
    level: float
    scale: float
    offsets: Float[np.ndarray, " k"]
    shares: Float[np.ndarray, " k"]
    """Of the labels."""
    rows: int

    @property
    def evident(self) -> bool:
        """Whether there are wrong labels, by a likelihood ratio test at `level`: the rate lies on the border of what is
        possible if there are none, and half of its distribution with it (Self and Liang, 1987)."""
        return self.statistic > _gain(self.level)

    def to_dict(self) -> dict[str, float | int | bool | list[float | None]]:
        numbers = {n: getattr(self, n) for n in ("rate", "low", "high", "statistic", "level", "scale", "rows")}
        offsets = [at if np.isfinite(at) else None for at in self.offsets.tolist()]  # JSON has no infinity
        return numbers | {"offsets": offsets, "shares": self.shares.tolist(), "evident": self.evident}

    def doubt(self, logits: Float[np.ndarray, "n k"], labels: Int[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
        """The chance that a row's label, of a class that was fitted, is a wrong one: 0 for all where the rate is 0."""
        if self.rate == 0:
            return np.zeros(len(labels))
        given, other = _chances(softmax(self.scale * logits + self.offsets, axis=1), labels, self.shares)
        wrong = self.rate * other
        return wrong / ((1 - self.rate) * given + wrong + TINY)


def reject(
    logits: Float[np.ndarray, "n k"],
    labels: Int[np.ndarray, " n"],
    *,
    doubt: float = DOUBT,
    most: float = MOST,
    level: float = LEVEL,
) -> tuple[Bool[np.ndarray, " n"], LabelNoise]:
    """A mask of the rows to leave out, and the rate of wrong labels that says how many.

    Where wrong labels are `evident`, as large a share as has a label that is wrong with a chance above `doubt`, at most
    `most`; else none.  It is the same share of each class, the most doubtful rows of it: what is kept then has the
    classes' shares, and a model that leans to one does not lean further.  Of equally doubtful rows the earlier goes.
    """
    if not 0 < doubt < 1:
        raise SettingsError(f"doubt is {doubt}; it must be above 0 and below 1")
    if not 0 <= most < 1:
        raise SettingsError(f"most is {most}; it must be at least 0 and below 1")
    noise = label_noise(logits, labels, level=level)
    mask = np.zeros(len(labels), dtype=bool)
    if noise.evident:
        doubts = noise.doubt(logits, labels)
        share = min(float((doubts > doubt).mean()), most)
        for label in np.unique(labels):
            rows = np.flatnonzero(labels == label)
            mask[rows[np.argsort(-doubts[rows], kind="stable")[: round(share * len(rows))]]] = True
    return mask, noise


def label_noise(logits: Float[np.ndarray, "n k"], labels: Int[np.ndarray, " n"], *, level: float = LEVEL) -> LabelNoise:
    """The likeliest rate of wrong labels, with its profile-likelihood bounds.

    Logits may be of any scale, with any constants of the classes: both are fitted along.  One without the other will
    not do: constants that calibrate logits as they are lean to some classes once the logits are scaled.
    The largest rate is that beyond which labels would contradict the model: (k − 1)/k of k equally frequent classes,
    where they say nothing.  Where only one class occurs no label is wrong.  Raises SettingsError for fewer than two
    rows or logits of a row, TsqLoraError for logits that are not finite.
    """
    if not 0.5 < level < 1:
        raise SettingsError(f"level is {level}; it must be above 0.5 and below 1")
    if min(logits.shape) < 2:
        rows, classes = logits.shape
        raise SettingsError(f"{rows} rows of {classes} classes say nothing of wrong labels; give 2 or more of both")
    if broken := int((~np.isfinite(logits)).any(axis=1).sum()):
        raise TsqLoraError(
            f"{broken} of {len(logits)} rows have logits that are not finite; "
            "lower training.learning_rate or use another dtype"
        )
    offsets, shares = np.full(logits.shape[1], -np.inf), _shares(labels, logits.shape[1])
    occur, labels = np.unique(labels, return_inverse=True)
    if len(occur) == 1:
        offsets[occur] = 0.0
        return LabelNoise(0.0, 0.0, 0.0, 0.0, level, 1.0, offsets, shares, len(labels))
    logits = logits[:, occur]
    centre, spread = logits.mean(axis=0), _spread(logits)
    unit, most = (logits - centre) / spread, _largest_rate(shares[occur])
    least, without = _fit(unit, labels, np.array([0.0, 1.0, *np.zeros(len(centre))]), free=False)
    # With a rate the likelihood may have more than one peak.
    starts = [(rate, scale) for rate in (0.05, 0.3) for scale in (without[1], STEEPEST / 2)]
    fits = [_fit(unit, labels, np.array([*start, *without[2:]])) for start in starts]
    loss, best = min([(least, without), *fits], key=lambda fit: fit[0])
    rate, scale = float(best[0]), float(best[1]) / spread
    offsets[occur] = best[2:] - scale * centre
    gain = 2 * len(labels) * (least - loss)

    def beyond(at: float) -> float:
        """Above 0 where a rate is too unlikely to lie within the bounds."""
        worse = _fit(unit, labels, np.array([at, *best[1:]]), free=False)[0] - loss
        return 2 * len(labels) * worse - _gain(level)

    return LabelNoise(
        rate=rate,
        low=_root(beyond, 0.0, rate) if beyond(0.0) > 0 else 0.0,
        high=_root(beyond, rate, most) if beyond(most) > 0 else most,
        statistic=float(gain),
        level=level,
        scale=scale,
        offsets=offsets,
        shares=shares,
        rows=len(labels),
    )


def _gain(level: float) -> float:
    return float(chi2.ppf(2 * level - 1, df=1))


def _root(function: Callable[[float], float], low: float, high: float) -> float:
    return float(brentq(function, low, high, xtol=1e-4))  # pyright: ignore[reportArgumentType]


def _spread(logits: Float[np.ndarray, "n k"]) -> float:
    """Deviation of the logits within a row, so that any model's have one scale; 1 where they are all equal."""
    centred = logits - logits.mean(1, keepdims=True)
    return float(np.sqrt(np.square(centred - centred.mean(0)).mean())) or 1.0


def _shares(labels: Int[np.ndarray, " n"], classes: int) -> Float[np.ndarray, " k"]:
    return np.bincount(labels, minlength=classes) / len(labels)


def _largest_rate(shares: Float[np.ndarray, " k"]) -> float:
    """Beyond it the most frequent label would be likelier in rows of the next most frequent class than in its own."""
    second, first = np.sort(shares)[-2:]
    return float(1 / (1 + first / (1 - second)))


def _chances(
    p: Float[np.ndarray, "n k"], labels: Int[np.ndarray, " n"], shares: Float[np.ndarray, " k"]
) -> tuple[Float[np.ndarray, " n"], Float[np.ndarray, " n"]]:
    """Each row's chance of its label if that is right, and if it is of another class, as often as labels are."""
    rows = np.arange(len(labels))
    others = p / (1 - shares)
    others[rows, labels] = 0
    return p[rows, labels], shares[labels] * others.sum(axis=1)


def _fit(
    logits: Float[np.ndarray, "n k"],
    labels: Int[np.ndarray, " n"],
    start: Float[np.ndarray, " m"],
    *,
    free: bool = True,
) -> tuple[float, Float[np.ndarray, " m"]]:
    """The least mean negative log-likelihood, and where: rate, scale and offsets.  The rate stays unless it is free."""
    fixed = 0 if free else 1  # not by equal bounds: the gradient across them spoils L-BFGS's steps

    def loss(at: np.ndarray) -> tuple[float, np.ndarray]:
        value, gradient = _loss(np.concatenate([start[:fixed], at]), logits, labels)
        return value, gradient[fixed:]

    most = _largest_rate(_shares(labels, logits.shape[1]))
    bounds = [(0.0, most), (0.0, STEEPEST), *[(None, None)] * logits.shape[1]][fixed:]
    options = {"ftol": 1e-12}
    found: OptimizeResult = minimize(loss, start[fixed:], jac=True, method="L-BFGS-B", bounds=bounds, options=options)
    return float(found.fun), np.concatenate([start[:fixed], found.x])


def _loss(
    at: Float[np.ndarray, " m"], logits: Float[np.ndarray, "n k"], labels: Int[np.ndarray, " n"]
) -> tuple[float, Float[np.ndarray, " m"]]:
    """Mean negative log-likelihood of the labels, and its gradient in rate, scale and offsets."""
    rate, scale, offsets = at[0], at[1], at[2:]
    rows, shares = np.arange(len(labels)), _shares(labels, len(offsets))
    p = softmax(scale * logits + offsets, axis=1)
    given, other = _chances(p, labels, shares)
    chance = (1 - rate) * given + rate * other + TINY
    by_rate = ((given - other) / chance).mean()
    # The class's chance less that given the label.
    of_class = rate * shares[labels][:, None] / (1 - shares)
    of_class[rows, labels] = 1 - rate
    by_logits = p * (1 - of_class / chance[:, None]) / len(labels)
    gradient = np.array([by_rate, (by_logits * logits).sum(), *by_logits.sum(axis=0)])
    return float(-np.log(chance).mean()), gradient
