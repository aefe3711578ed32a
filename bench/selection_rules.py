"""The rules that bench/selection.py compares: from what is known after warm-up to an epoch's rows."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import scipy.special

from tsqlora.quality.reject import MOST, most_surprising, noise_rate
from tsqlora.quality.sampling import draw as gumbel_draw
from tsqlora.quality.sampling import draw_size
from tsqlora.quality.terms import quality, standardise


@dataclass(frozen=True, slots=True)
class Draw:
    """An epoch's rows; their weights in the loss; what was rejected, and what to note."""

    rows: np.ndarray
    weights: np.ndarray | None = None
    rejected: np.ndarray | None = None
    note: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Seen:
    """What a rule may know: given labels, calibrated logits (n × k) and terms after warm-up, and
    the last loss each row had when it was trained on (its warm-up loss before that)."""

    seed: int
    fraction: float
    labels: np.ndarray
    logits: np.ndarray
    terms: Mapping[str, np.ndarray]
    bad: np.ndarray
    """Which labels are wrong: for the oracle alone, which shows what there is to gain."""
    last_loss: np.ndarray | None = None
    first_logits: np.ndarray | None = None
    """Those after warm-up, once `logits` are newer."""

    @property
    def loss(self) -> np.ndarray:
        return -scipy.special.log_softmax(self.logits, axis=1)[np.arange(len(self.labels)), self.labels]

    def refreshed(self, logits: np.ndarray) -> "Seen":
        return replace(
            self, logits=logits, first_logits=self.logits if self.first_logits is None else self.first_logits
        )

    def harvested(self, rows: np.ndarray, losses: np.ndarray) -> "Seen":
        last = (self.loss if self.last_loss is None else self.last_loss).copy()
        last[rows] = losses
        return replace(self, last_loss=last)


@dataclass(frozen=True, slots=True)
class Rule:
    draw: Callable[[Seen, int], Draw] | None
    needs: tuple[str, ...] = ()
    once: bool = False
    """Whether it depends on nothing but what was seen after warm-up."""
    refresh: int = 0
    """How often, evenly spread over the run, logits are taken anew."""


def softmax(weights: Mapping[str, float], temperature: float) -> Rule:
    """METHOD's: probabilities ∝ exp(Q/τ) of standardised terms, in each class its share."""

    def draw(seen: Seen, epoch: int) -> Draw:
        z = {name: standardise(seen.terms[name], seen.labels).values for name in weights}
        return _drawn(seen, epoch, quality(z, weights), temperature)

    return Rule(draw, needs=tuple(weights))


def _drawn(seen: Seen, epoch: int, q: np.ndarray, temperature: float = 1.0) -> Draw:
    rng = np.random.default_rng([seen.seed, 2, epoch])
    return Draw(gumbel_draw(q, fraction=seen.fraction, temperature=temperature, rng=rng, strata=seen.labels).indices)


def rejection(factor: float = 1.5, *, gate: bool = True, even: bool = True, refresh: int = 0) -> Rule:
    """Leaves out the most surprising rows, `factor` times as many as labels seem wrong; of the rest a random share.

    `gate`: none where wrong labels are not evident. `even`: passes over the rest, as random's; else
    independent draws, in each class its share. After a refresh as many are left out, but those of the newer losses.
    """

    def draw(seen: Seen, epoch: int) -> Draw:
        first = scipy.special.softmax(seen.logits if seen.first_logits is None else seen.first_logits, axis=1)
        noise = noise_rate(first.max(1), first.argmax(1) == seen.labels)
        share = min(factor * noise.rate, MOST) if noise.evident or not gate else 0.0
        mask = most_surprising(seen.loss, seen.labels, round(share * len(seen.labels)))
        drawn = (
            Draw(stretch(seen.seed, seen.fraction, np.flatnonzero(~mask), len(mask), epoch))
            if even
            else _drawn(seen, epoch, np.where(mask, -np.inf, 0.0))
        )
        return replace(drawn, rejected=mask, note={"noise": noise.to_dict(), "rejected": float(mask.mean())})

    return Rule(draw, refresh=refresh, once=True)


def oracle(seen: Seen, epoch: int) -> Draw:
    """Leaves out exactly the wrong labels."""
    rows = np.flatnonzero(~seen.bad)
    return Draw(stretch(seen.seed, seen.fraction, rows, len(seen.bad), epoch), rejected=seen.bad)


def stretch(seed: int, fraction: float, rows: np.ndarray, total: int, epoch: int) -> np.ndarray:
    """The epoch's part of an endless row of random orders of `rows`, a fraction of the `total` long."""
    size, n = draw_size(total, fraction), len(rows)
    start = epoch * size
    passes = range(start // n, (start + size - 1) // n + 1)
    orders = [np.random.default_rng([seed, 1, p]).permutation(n) for p in passes]
    return rows[np.concatenate(orders)[start % n :][:size]]


def info_batch(seen: Seen, epoch: int) -> Draw:
    """Rows of more than the mean loss, and as many of the others as fit, weighted up for those left out.

    After InfoBatch (Qin et al., 2024): losses are those each row last had in training; the share
    that is left out is what equal steps ask for, and there is no last phase on all rows.
    """
    rng = np.random.default_rng([seen.seed, 2, epoch])
    loss = seen.loss if seen.last_loss is None else seen.last_loss
    size = draw_size(len(loss), seen.fraction)
    high = np.flatnonzero(loss >= loss.mean())
    low = np.flatnonzero(loss < loss.mean())
    taken_high = rng.permutation(high)[:size]
    taken_low = rng.permutation(low)[: size - len(taken_high)]
    rows = np.concatenate([taken_high, taken_low])
    weights = np.ones(len(rows))
    if len(taken_low):
        weights[len(taken_high) :] = len(low) / len(taken_low)
    return Draw(rows, weights)


RULES: dict[str, Rule] = {
    "random": Rule(None),
    "oracle": Rule(oracle),
    "reject": rejection(),
    "reject, refreshed": rejection(refresh=1),
    "reject, refreshed each epoch": rejection(refresh=5),
    "reject 1": rejection(1.0),
    "reject 2": rejection(2.0),
    "reject 2, refreshed": rejection(2.0, refresh=1),
    "reject, no gate": rejection(gate=False, even=False),
    "reject 1, no gate": rejection(1.0, gate=False, even=False),
    "C - loss, t=3": softmax({"convergence": 1.0, "loss": -1.0}, 3.0),
    "-loss, t=1": softmax({"loss": -1.0}, 1.0),
    "paper": softmax({"gradient_norm": 1 / 3, "loss_reduction": 1 / 3, "convergence": 1 / 3}, 1.0),
    "N": softmax({"gradient_norm": 1.0}, 1.0),
    "D": softmax({"loss_reduction": 1.0}, 1.0),
    "C": softmax({"convergence": 1.0}, 1.0),
    "EL2N": softmax({"el2n": 1.0}, 1.0),
    "loss": softmax({"loss": 1.0}, 1.0),
    "InfoBatch": Rule(info_batch),
}
