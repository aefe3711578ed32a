"""Which rows to leave out: how many labels seem wrong, and which.  METHOD section 1, ours.

A hard task and wrong labels look alike in a loss. They differ where the model is most sure: a hard row's label
contradicts it ever less often, a wrong label as often there as anywhere. So a floor of contradictions that
no confidence removes tells wrong labels, and how many there are; a temperature has no such floor, whichever
constants of the classes go with it.
Pure functions of logits and labels; what is random is only the data.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

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
FROZEN_CLASSES = 3
"""Fewer are no evidence on frozen features: of two, clean MRPC looks as certain as wrong labels
of two separate intents."""
FROZEN_LEVEL = 0.9999
"""Of the test there.  A head that knows nothing may fit three classes by a steep step, which gains up to 7.4 of the
13.8 needed in 150 draws, certain of each row."""
SEPARATION = 0.65
"""Least share of the variance of right and wrong that the doubts must settle there.  Clean tables of which over 2 %
would go: at most 0.60 (GoEmotions, CLINC150's intents thrown together); wrong labels in 5 to 150 intents: from 0.81."""
ROWS = 5_000
"""At most so many rows are fitted, in equal steps of the rows sorted by label; doubts are computed so many at once."""
FEW_CLASSES = 20
"""With more, the best of the starting points goes before a fit of the offsets, and the bounds hold the offsets."""
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
    """So many were fitted: the statistic, the bounds and the shares are theirs."""
    clear: bool = True
    """False where doubts from frozen features are too weak to tell wrong labels from rows that no line can fit."""

    @property
    def evident(self) -> bool:
        """Whether there are wrong labels, by a likelihood ratio test at `level`: the rate lies on the border of what is
        possible if there are none, and half of its distribution with it (Self and Liang, 1987).  Never unless clear."""
        return self.clear and self.statistic > _gain(self.level)

    def to_dict(self) -> dict[str, float | int | bool | list[float | None]]:
        numbers = {n: getattr(self, n) for n in ("rate", "low", "high", "statistic", "level", "scale", "rows", "clear")}
        offsets = [at if np.isfinite(at) else None for at in self.offsets.tolist()]  # JSON has no infinity
        return numbers | {"offsets": offsets, "shares": self.shares.tolist(), "evident": self.evident}

    def doubt(self, logits: Float[np.ndarray, "n k"], labels: Int[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
        """The chance that a row's label, of a class that was fitted, is a wrong one: 0 for all where the rate is 0."""
        if self.rate == 0:
            return np.zeros(len(labels))
        doubts = np.empty(len(labels))
        for start in range(0, len(labels), ROWS):
            part = slice(start, start + ROWS)
            p = softmax(self.scale * logits[part] + self.offsets, axis=1)
            given, other = _chances(p, labels[part], self.shares)
            doubts[part] = self.rate * other / ((1 - self.rate) * given + self.rate * other + TINY)
        return doubts


def reject(
    logits: Float[np.ndarray, "n k"],
    labels: Int[np.ndarray, " n"],
    *,
    doubt: float = DOUBT,
    most: float = MOST,
    level: float = LEVEL,
    frozen: bool = False,
) -> tuple[Bool[np.ndarray, " n"], LabelNoise]:
    """A mask of the rows to leave out, and the rate of wrong labels that says how many.

    Where wrong labels are `evident`, as large a share as has a label that is wrong with a chance above `doubt`, at most
    `most`; else none.  It is the same share of each class, the most doubtful rows of it: what is kept then has the
    classes' shares, and a model that leans to one does not lean further.  Of equally doubtful rows the earlier goes.

    Give `frozen` with leave-one-out predictions of a linear head on features that were never trained.  Classes that
    are not linear in those contradict it at any confidence, as wrong labels do, but less sharply: evidence then
    needs FROZEN_CLASSES, FROZEN_LEVEL and SEPARATION.
    """
    if not 0 < doubt < 1:
        raise SettingsError(f"doubt is {doubt}; it must be above 0 and below 1")
    if not 0 <= most < 1:
        raise SettingsError(f"most is {most}; it must be at least 0 and below 1")
    noise = label_noise(logits, labels, level=level)
    mask, doubts = np.zeros(len(labels), dtype=bool), noise.doubt(logits, labels)
    if frozen:
        enough = len(np.unique(labels)) >= FROZEN_CLASSES and noise.statistic > _gain(FROZEN_LEVEL)
        noise = replace(noise, clear=enough and _settled(doubts) >= SEPARATION)
    if noise.evident:
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
    # Sorted by label: else a table whose labels follow a pattern loses classes to the steps.
    some = np.argsort(labels, kind="stable")[np.linspace(0, len(labels) - 1, min(len(labels), ROWS)).astype(int)]
    logits, labels = logits[np.sort(some)], labels[np.sort(some)]
    offsets, shares = np.full(logits.shape[1], -np.inf), _shares(labels, logits.shape[1])
    occur, labels = np.unique(labels, return_inverse=True)
    if len(occur) == 1:
        offsets[occur] = 0.0
        return LabelNoise(0.0, 0.0, 0.0, 0.0, level, 1.0, offsets, shares, len(labels))
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
        """Above 0 where a rate is too unlikely to lie within the bounds."""
        worse = _fit(unit, labels, np.array([at, *best[1:]]), free=False, offsets=few)[0] - loss
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


def _settled(doubts: Float[np.ndarray, " n"]) -> float:
    """Share of the variance of right and wrong that the doubts explain: 1 if each is 0 or 1, 0 if all are equal."""
    mean = float(doubts.mean())
    return float(doubts.var()) / max(mean * (1 - mean), TINY)


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
    given, weights = p[np.arange(len(labels)), labels], 1 / (1 - shares)
    return given, shares[labels] * (p @ weights - given * weights[labels]).clip(0)


def _fit(
    logits: Float[np.ndarray, "n k"],
    labels: Int[np.ndarray, " n"],
    start: Float[np.ndarray, " m"],
    *,
    free: bool = True,
    offsets: bool = True,
) -> tuple[float, Float[np.ndarray, " m"]]:
    """The least mean negative log-likelihood, and where: rate, scale and offsets.

    The rate stays unless it is free, and the offsets unless they are.
    """
    # Not by equal bounds: the gradient across them spoils L-BFGS's steps.
    moves = slice(0 if free else 1, None if offsets else 2)

    def loss(at: np.ndarray) -> tuple[float, np.ndarray]:
        whole = start.copy()
        whole[moves] = at
        value, gradient = _loss(whole, logits, labels)
        return value, gradient[moves]

    most = _largest_rate(_shares(labels, logits.shape[1]))
    bounds = [(0.0, most), (0.0, STEEPEST), *[(None, None)] * logits.shape[1]][moves]
    options = {"ftol": 1e-12}
    found: OptimizeResult = minimize(loss, start[moves], jac=True, method="L-BFGS-B", bounds=bounds, options=options)
    at = start.copy()
    at[moves] = found.x
    return float(found.fun), at


def _loss(
    at: Float[np.ndarray, " m"], logits: Float[np.ndarray, "n k"], labels: Int[np.ndarray, " n"]
) -> tuple[float, Float[np.ndarray, " m"]]:
    """Mean negative log-likelihood of the labels, and its gradient in rate, scale and offsets."""
    rate, scale, offsets = at[0], at[1], at[2:]
    shares = _shares(labels, len(offsets))
    p = softmax(scale * logits + offsets, axis=1)
    given, other = _chances(p, labels, shares)
    chance = (1 - rate) * given + rate * other + TINY
    # By a logit: the class's chance less that given the label.  A label's own class has another factor than the rest.
    weights, share = 1 / (1 - shares), rate * shares[labels] / chance
    own = given * ((1 - rate) / chance - share * weights[labels])
    by_offset = p.sum(axis=0) - weights * (share @ p) - np.bincount(labels, own, len(offsets))
    p *= logits
    by_scale = p.sum() - share @ (p @ weights) - own @ logits[np.arange(len(labels)), labels]
    gradient = np.array([((given - other) / chance).sum(), by_scale, *by_offset]) / len(labels)
    return float(-np.log(chance).mean()), gradient
