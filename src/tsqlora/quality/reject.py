"""Which rows to leave out: how many labels seem wrong, and which.  METHOD section 1, ours.

Pure functions of what one pass over the rows says. A model that is sure, and yet is contradicted by the labels more
often than it expects, is told by them that labels are wrong, and how many. Those are the rows whose loss lies
furthest above what is usual in their class.
"""

from dataclasses import asdict, dataclass

import numpy as np
from jaxtyping import Bool, Float, Shaped
from scipy.stats import beta

from tsqlora.errors import SettingsError

CONFIDENT = 1 / 3
"""The share of the rows, the most confident ones, whose labels tell the rate of wrong ones."""
LEVEL = 0.95
"""Of the one-sided bounds of that rate."""


FACTOR = 1.5
"""Rows rejected for each label that seems wrong: the finding is not exact, and a good row lost costs less than a
wrong one kept."""
MOST = 0.4
"""No larger share is rejected."""


@dataclass(frozen=True, slots=True)
class NoiseRate:
    """How often labels contradict the model where it is most confident, with one-sided bounds."""

    rate: float
    low: float
    high: float
    expected: float
    """How often the model itself expects to be wrong there: the mean of 1 − confidence."""
    rows: int
    """How many rows it was counted on."""

    @property
    def evident(self) -> bool:
        """Whether labels contradict more often than the model expects, beyond chance.

        A model that has learned little expects it, and what it finds surprising is not wrong but hard.
        """
        return self.low > self.expected

    def to_dict(self) -> dict[str, float | int | bool]:
        return asdict(self) | {"evident": self.evident}


def reject(
    confidence: Float[np.ndarray, " n"],
    agrees: Bool[np.ndarray, " n"],
    loss: Float[np.ndarray, " n"],
    labels: Shaped[np.ndarray, " n"],
    *,
    factor: float = FACTOR,
    most: float = MOST,
    confident: float = CONFIDENT,
    level: float = LEVEL,
) -> tuple[Bool[np.ndarray, " n"], NoiseRate]:
    """A mask of the rows to leave out, and the rate of wrong labels that says how many.

    Where that rate is `evident`, the most surprising rows, `factor` times as many as labels seem wrong and
    at most the share `most`; else none.
    """
    if not factor >= 0:
        raise SettingsError(f"factor is {factor}; it must be 0 or more")
    if not 0 <= most < 1:
        raise SettingsError(f"most is {most}; it must be at least 0 and below 1")
    noise = noise_rate(confidence, agrees, confident=confident, level=level)
    share = min(factor * noise.rate, most) if noise.evident else 0.0
    return most_surprising(loss, labels, round(share * len(loss))), noise


def noise_rate(
    confidence: Float[np.ndarray, " n"],
    agrees: Bool[np.ndarray, " n"],
    *,
    confident: float = CONFIDENT,
    level: float = LEVEL,
) -> NoiseRate:
    """Counts contradictions among the most confident rows.

    Args:
        confidence: the largest probability of each row, calibrated.
        agrees: whether the label is the class that has it.
        confident: the share of rows that count; ties at its edge count too, so that their order decides nothing.
        level: of the Clopper-Pearson bounds, each on its own.

    >>> noise_rate(np.array([0.9, 0.8, 0.7, 0.6]), np.array([True, False, True, True]), confident=0.5).rate
    0.5
    """
    if len(confidence) == 0:
        raise SettingsError("there are no rows to tell a rate of wrong labels from")
    if not 0 < confident <= 1:
        raise SettingsError(f"confident is {confident}; it must be above 0 and at most 1")
    if not 0.5 < level < 1:
        raise SettingsError(f"level is {level}; it must be above 0.5 and below 1")
    edge = np.sort(confidence)[-max(1, round(confident * len(confidence)))]
    counted = confidence >= edge
    rows, wrong = int(counted.sum()), int((~agrees[counted]).sum())
    low = float(beta.ppf(1 - level, wrong, rows - wrong + 1)) if wrong else 0.0
    high = float(beta.ppf(level, wrong + 1, rows - wrong)) if wrong < rows else 1.0
    return NoiseRate(wrong / rows, low, high, float(np.mean(1 - confidence[counted])), rows)


def surprise(loss: Float[np.ndarray, " n"], labels: Shaped[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """Each row's calibrated loss above the median of its class, in nats.

    The median is taken off so that a rare class, whose losses are larger, is not the first to go. It is not divided
    by a spread: a class with more wrong labels is to lose more rows.
    """
    out = np.zeros(len(loss), dtype=np.float64)
    for label in np.unique(labels):
        rows = labels == label
        out[rows] = loss[rows] - np.median(loss[rows])
    return out


def most_surprising(
    loss: Float[np.ndarray, " n"], labels: Shaped[np.ndarray, " n"], count: int
) -> Bool[np.ndarray, " n"]:
    """A mask of the `count` rows of largest surprise; of equal ones the earlier."""
    if not 0 <= count <= len(loss):
        raise SettingsError(f"{count} of {len(loss)} rows cannot be rejected")
    mask = np.zeros(len(loss), dtype=bool)
    mask[np.argsort(-surprise(loss, labels), kind="stable")[:count]] = True
    return mask
