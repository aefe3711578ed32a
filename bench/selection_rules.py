"""The rules that bench/selection.py compares: from what is known after warm-up to an epoch's rows."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import scipy.special
from sklearn.cluster import MiniBatchKMeans

from tsqlora.quality.label_noise import LabelNoise, label_noise, reject
from tsqlora.quality.sampling import draw as gumbel_draw
from tsqlora.quality.sampling import draw_size
from tsqlora.quality.terms import quality, standardise

PAPER = ("gradient_norm", "loss_reduction", "convergence")
HALF = " at half scale"
"""Ends the name of a term that was measured with the head at half its best scale."""


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
    features: np.ndarray | None = None
    """What the head is given for each row after warm-up (n × width)."""

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


def softmax(weights: Mapping[str, float], temperature: float, *, unbiased: bool = False) -> Rule:
    """METHOD's: probabilities ∝ exp(Q/τ) of standardised terms, in each class its share; `unbiased`: rows weighed."""

    def draw(seen: Seen, epoch: int) -> Draw:
        z = {name: standardise(seen.terms[name], seen.labels).values for name in weights}
        return _drawn(seen, epoch, quality(z, weights), temperature, unbiased=unbiased)

    return Rule(draw, needs=tuple(weights))


def _drawn(seen: Seen, epoch: int, q: np.ndarray, temperature: float = 1.0, *, unbiased: bool = False) -> Draw:
    rng = np.random.default_rng([seen.seed, 2, epoch])
    drawn = gumbel_draw(q, fraction=seen.fraction, temperature=temperature, rng=rng, strata=seen.labels)
    return Draw(drawn.indices, drawn.weights * len(drawn.indices) if unbiased else None)


def rejection(seen: Seen, epoch: int) -> Draw:
    """The default: doubtful labels left out where wrong ones are evident; of the rest passes as random's."""
    return _passes(seen, epoch, *reject(seen.logits, seen.labels))


def second_look(seen: Seen, epoch: int) -> Draw:
    """The default, which asks again in mid-run; where nothing is evident then, the first answer holds."""
    mask, noise = reject(seen.logits, seen.labels)
    if seen.first_logits is not None and not noise.evident:
        mask, noise = reject(seen.first_logits, seen.labels)
    return _passes(seen, epoch, mask, noise)


def trusted(seen: Seen, epoch: int) -> Draw:
    """Where wrong labels are evident a softmax of −loss, standardised within the class; elsewhere random's rows."""
    noise = label_noise(seen.logits, seen.labels)
    note = {"noise": noise.to_dict()}
    if not noise.evident:
        return Draw(stretch(seen.seed, seen.fraction, np.arange(len(seen.labels)), len(seen.labels), epoch), note=note)
    return replace(_drawn(seen, epoch, -standardise(seen.loss, seen.labels).values), note=note)


def weighted(seen: Seen, epoch: int) -> Draw:
    """Random's rows, where wrong labels are evident each with the chance that its label is right as its weight.

    Weights have mean 1 in each class, so that none counts for more than its share.
    """
    noise = label_noise(seen.logits, seen.labels)
    rows = stretch(seen.seed, seen.fraction, np.arange(len(seen.labels)), len(seen.labels), epoch)
    note = {"noise": noise.to_dict()}
    if not noise.evident:
        return Draw(rows, note=note)
    right = 1 - noise.doubt(seen.logits, seen.labels)
    mean = np.array([right[seen.labels == label].mean() for label in seen.labels])
    weights = (right / mean)[rows]
    return Draw(rows, weights, note=note | {"wrong_weight": float(weights[seen.bad[rows]].sum() / len(rows))})


def coverage(seen: Seen, epoch: int) -> Draw:
    """As the default, but of the kept rows of a class each cluster of features has an equal part, small ones all.

    Clusters are as many as would have ten rows each: rare kinds of rows come up in every epoch, crowded ones less.
    """
    mask, noise = reject(seen.logits, seen.labels)
    assert seen.features is not None
    rng = np.random.default_rng([seen.seed, 2, epoch])
    drawn, size = [], draw_size(len(mask), seen.fraction)
    for label in np.unique(seen.labels):
        rows = np.flatnonzero(~mask & (seen.labels == label))
        clusters = MiniBatchKMeans(max(1, len(rows) // 10), n_init=1, random_state=seen.seed)
        of_row = clusters.fit_predict(seen.features[rows])
        share = round(size * len(rows) / int((~mask).sum()))
        drawn.append(rows[_level(of_row, share, rng)])
    return Draw(np.concatenate(drawn), rejected=mask, note={"noise": noise.to_dict(), "rejected": float(mask.mean())})


def _level(cluster: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    """Places of `size` rows, taken by turns: one of each cluster that has any left, until there are enough."""
    order = rng.permutation(len(cluster))
    turn = np.empty(len(cluster), dtype=int)  # the how manieth of its cluster a row is
    for which in np.unique(cluster):
        of_it = order[cluster[order] == which]
        turn[of_it] = np.arange(len(of_it))
    return order[np.argsort(turn[order], kind="stable")][:size]


def rejection_by_factor(factor: float, *, refresh: int = 0) -> Rule:
    """`factor` times as many as labels seem wrong, at most 40 %, the most doubtful first.

    After a refresh the newer logits decide anew, unless they show no wrong labels.
    """

    def masked(logits: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, LabelNoise]:
        noise = label_noise(logits, labels)
        mask = np.zeros(len(labels), dtype=bool)
        count = round(min(factor * noise.rate, 0.4) * len(labels)) if noise.evident else 0
        mask[np.argsort(-noise.doubt(logits, labels), kind="stable")[:count]] = True
        return mask, noise

    def draw(seen: Seen, epoch: int) -> Draw:
        mask, noise = masked(seen.logits, seen.labels)
        if seen.first_logits is not None and not noise.evident:
            mask, noise = masked(seen.first_logits, seen.labels)
        return _passes(seen, epoch, mask, noise)

    return Rule(draw, refresh=refresh, once=not refresh)


def _passes(seen: Seen, epoch: int, mask: np.ndarray, noise: LabelNoise) -> Draw:
    rows = stretch(seen.seed, seen.fraction, np.flatnonzero(~mask), len(mask), epoch)
    return Draw(rows, rejected=mask, note={"noise": noise.to_dict(), "rejected": float(mask.mean())})


def always_reject(seen: Seen, epoch: int) -> Draw:
    """Half as many again as contradict the most confident third, at most 40 %, whether or not labels seem wrong.

    Those of largest loss above their class's median; of the rest in each class its share.
    """
    sure = np.argsort(-scipy.special.softmax(seen.logits, axis=1).max(1), kind="stable")[: round(len(seen.labels) / 3)]
    share = min(1.5 * float((seen.logits.argmax(1) != seen.labels)[sure].mean()), 0.4)
    surprise = seen.loss - np.array([np.median(seen.loss[seen.labels == label]) for label in seen.labels])
    mask = np.zeros(len(surprise), dtype=bool)
    mask[np.argsort(-surprise, kind="stable")[: round(share * len(mask))]] = True
    drawn = _drawn(seen, epoch, np.where(mask, -np.inf, 0.0))
    return replace(drawn, rejected=mask, note={"rejected": float(mask.mean())})


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
    "reject": Rule(rejection, once=True),
    "reject, coverage": Rule(coverage),
    "reject, factor 1.5": rejection_by_factor(1.5),
    "reject, factor 2": rejection_by_factor(2.0),
    "reject, factor 2, refreshed": rejection_by_factor(2.0, refresh=1),
    "reject, second look": Rule(second_look, refresh=1),
    "-loss where evident": Rule(trusted, once=True),
    "weights of trust": Rule(weighted),
    "always reject": Rule(always_reject, once=True),
    "C - loss, t=3": softmax({"convergence": 1.0, "loss": -1.0}, 3.0),
    "-loss, t=1": softmax({"loss": -1.0}, 1.0),
    "paper": softmax(dict.fromkeys(PAPER, 1 / 3), 1.0),
    "paper, unbiased": softmax(dict.fromkeys(PAPER, 1 / 3), 1.0, unbiased=True),
    "N": softmax({"gradient_norm": 1.0}, 1.0),
    "D": softmax({"loss_reduction": 1.0}, 1.0),
    "C": softmax({"convergence": 1.0}, 1.0),
    "C at half scale": softmax({f"convergence{HALF}": 1.0}, 1.0),
    "paper at half scale": softmax({f"{n}{HALF}": 1 / 3 for n in PAPER}, 1.0),
    "EL2N": softmax({"el2n": 1.0}, 1.0),
    "loss": softmax({"loss": 1.0}, 1.0),
    "InfoBatch": Rule(info_batch),
}
