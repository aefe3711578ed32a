"""Which labels are likely wrong, before any training: rate, probabilities, suggestions.  METHOD 1.4, ours.

Each row is judged by a fit that has not seen it: ridge regression on frozen features, all others left in. The rate of
wrong labels is fitted to what contradicts these predictions (`label_noise`), which classes' labels they bear, too
(`transitions`); Bayes' rule then gives each class's chance to be the true one.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.special import softmax
from torch import nn

from tsqlora import distributed
from tsqlora.errors import SettingsError, UnsupportedError
from tsqlora.quality.contradictions import Contradiction, contradictions
from tsqlora.quality.forward_pass import forward_pass
from tsqlora.quality.label_noise import FROZEN_CLASSES, LabelNoise, reject
from tsqlora.quality.ridge import fit_temperature, leave_one_out_logits
from tsqlora.quality.rows import Dataset
from tsqlora.quality.rule import Compute, RowNames
from tsqlora.quality.scores import require_names
from tsqlora.quality.transitions import fit_transitions, true_class
from tsqlora.tasks import get_task
from tsqlora.tasks.forward import Collate, each_its_row

LIKELY = 0.5
"""A label that is wrong with a higher chance is called likely wrong."""
USUAL_RATE = 0.03
"""Assumed where there is no evidence, but no more than what is possible: benchmarks have 3.3 % on average (Northcutt et
al. 2021)."""
FEWEST = 5
"""Rows of a class that can be judged: what is left of fewer does not say what the class is, so that all seem wrong."""
CANDIDATES = 4
"""Classes of a row that are kept, likeliest first."""
ROWS_TO_FIT = 50_000
ROWS_AT_ONCE = 16_384


@dataclass(frozen=True, slots=True)
class ClassPair:
    """Rows with one label that look more like another class."""

    label: int
    suggested: int
    rows: int
    """So many are likelier of the suggested class."""
    wrong: float
    """So many of them are expected to be wrong."""


@dataclass(frozen=True, slots=True, eq=False)
class Audit:
    """Every row, the likeliest wrong label first. Labels are numbers of `classes`.

    Where wrong labels are not `evident`, `rate` is assumed and the order alone says something.
    """

    ids: Int[np.ndarray, " n"]
    labels: Int[np.ndarray, " n"]
    suggested: Int[np.ndarray, " n"]
    """The likeliest class beside the label."""
    probability: Float[np.ndarray, " n"]
    """That the label is wrong."""
    candidates: Int[np.ndarray, "n c"]
    """Classes, the likeliest first, with the label among what the row may be."""
    classes: tuple[str | int, ...]
    rate: float
    """Share of wrong labels, with bounds each of which holds in 95 of 100 tables."""
    low: float
    high: float
    evident: bool
    why_not: str | None
    """Why there is no evidence of wrong labels; None where there is."""
    unjudged: int
    """Rows of classes with fewer than FEWEST; their probability is the rate."""
    pairs: tuple[ClassPair, ...]
    """The most frequent first."""
    duplicates: tuple[Contradiction, ...]
    """Near-duplicates with different labels, the nearest first."""

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def likely_wrong(self) -> int:
        """Rows whose label is likely wrong, which come first; 0 without evidence."""
        return int((self.probability > LIKELY).sum()) if self.evident else 0

    def columns(self) -> dict[str, np.ndarray]:
        """Columns for `pandas.DataFrame`: row, label, suggested_label, wrong_probability."""
        names = np.array(self.classes)
        return {
            "row": self.ids,
            "label": names[self.labels],
            "suggested_label": names[self.suggested],
            "wrong_probability": self.probability,
        }


def audit(
    model: nn.Module,
    dataset: Dataset,
    collate: Collate,
    *,
    classes: Sequence[str | int] | None = None,
    rows: RowNames | None = None,
    compute: Compute | None = None,
) -> Audit:
    """Find labels that are likely wrong, by one forward pass of a model that was not trained on these rows.

    Args:
        model: a classifier of any head, also a new one; it is left as it was.
        dataset: its rows go to `collate`, which gives the model's inputs and `labels`, a class each.
        classes: names of the classes by number; by default the numbers.
        rows: the rows' ids; by default their places.

    Raises UnsupportedError for a model without a last linear layer, SettingsError for fewer than 3 rows.
    """
    rows, compute = rows or RowNames(), compute or Compute()
    model, collate = distributed.unwrapped(model), each_its_row(collate)
    require_names(len(dataset), hashes=rows.hashes, ids=rows.ids)
    if len(dataset) < 3:
        raise SettingsError(f"{len(dataset)} rows are too few for an audit; give at least 3")
    named = {"lengths": rows.lengths, "hashes": rows.hashes}
    found, _ = forward_pass(
        model, dataset, collate, task=get_task("sequence-classification"), compute=compute, mean=True, **named
    )

    def judged() -> Audit:
        assert found is not None
        known = [part for part in (found.features, found.mean) if part is not None]
        if not known:
            raise UnsupportedError("an audit reads what the model's last linear layer is given, and there is none")
        features = known[0] if len(known) == 1 else np.concatenate(known, axis=1, dtype=np.float32)
        return audit_of(features, found.labels, classes=classes, ids=rows.ids)

    return distributed.once(judged)


def audit_of(
    features: Float[np.ndarray, "n d"],
    labels: Int[np.ndarray, " n"],
    *,
    classes: Sequence[str | int] | None = None,
    ids: Int[np.ndarray, " n"] | None = None,
) -> Audit:
    """The audit of labels by frozen features: each row is judged by the ridge fit on all others."""
    width = int(labels.max()) + 1 if classes is None else len(classes)
    logits = leave_one_out_logits(features, labels, width)
    found = audit_of_logits(logits, labels, classes=classes, ids=ids)
    near = contradictions(features, labels, np.arange(len(labels)) if ids is None else ids)
    return replace(found, duplicates=near)


def audit_of_logits(
    logits: Float[np.ndarray, "n k"],
    labels: Int[np.ndarray, " n"],
    *,
    classes: Sequence[str | int] | None = None,
    ids: Int[np.ndarray, " n"] | None = None,
) -> Audit:
    """The audit by logits, or logarithms of probabilities, of fits that have not seen the rows that they judge."""
    logits = logits / np.float32(fit_temperature(logits, labels))
    judged = np.bincount(labels, minlength=logits.shape[1])[labels] >= FEWEST
    if judged.sum() < 2:
        raise SettingsError(f"no class has {FEWEST} rows; an audit learns from a class's other rows what it is")
    _, noise = reject(logits[judged], labels[judged], frozen=True)
    fitted = noise if noise.evident else _assumed(noise)
    chances = _chances(logits, labels, fitted, judged)
    own = chances[np.arange(len(labels)), labels]
    others = chances.copy()
    others[np.arange(len(labels)), labels] = -1
    suggested, wrong = others.argmax(axis=1), np.where(judged, (1 - own).clip(0, 1), fitted.rate)
    # By the logits where all is as good as certain.
    order = np.lexsort((logits[np.arange(len(labels)), labels], -wrong))
    ids = np.arange(len(labels)) if ids is None else ids
    rate, low, high = _rate(noise, fitted, float(wrong[judged].mean()))
    return Audit(
        ids=ids[order],
        labels=labels[order],
        suggested=suggested[order],
        probability=wrong[order],
        candidates=np.argsort(-chances, axis=1, kind="stable")[:, :CANDIDATES][order],
        classes=tuple(range(logits.shape[1])) if classes is None else tuple(classes),
        rate=rate,
        low=low,
        high=high,
        evident=noise.evident,
        why_not=None if noise.evident else _why_not(labels[judged]),
        unjudged=int((~judged).sum()),
        pairs=_pairs(labels, suggested, wrong, logits),
        duplicates=(),
    )


def _chances(
    logits: Float[np.ndarray, "n k"],
    labels: Int[np.ndarray, " n"],
    noise: LabelNoise,
    judged: Bool[np.ndarray, " n"],
) -> Float[np.ndarray, "n k"]:
    """Each class's chance to be the true one; of unjudged rows by the logits alone."""

    def p(rows: np.ndarray | slice) -> np.ndarray:
        return softmax(noise.scale * logits[rows].astype(np.float64) + noise.offsets, axis=1)

    known = np.flatnonzero(judged)
    some = known[np.linspace(0, len(known) - 1, min(len(known), ROWS_TO_FIT)).astype(int)]
    matrix = fit_transitions(p(some), labels[some], noise)
    chances = softmax(logits, axis=1)
    for start in range(0, len(known), ROWS_AT_ONCE):
        part = known[start : start + ROWS_AT_ONCE]
        chances[part] = true_class(p(part), labels[part], matrix)
    return chances


def _assumed(noise: LabelNoise) -> LabelNoise:
    """Without evidence calibrated logits are taken as they are, and a rate that is usual."""
    rate = min(USUAL_RATE, (noise.low + noise.high) / 2)
    return replace(noise, rate=rate, scale=1.0, offsets=np.where(noise.shares > 0, 0.0, -np.inf), clear=False)


def _rate(noise: LabelNoise, fitted: LabelNoise, mean: float) -> tuple[float, float, float]:
    if not noise.evident:
        return fitted.rate, 0.0, noise.high
    # Where wrong labels prefer some classes there are more than the even rate says; the bounds move along.
    factor = mean / noise.rate
    return mean, min(noise.low * factor, mean), min(max(noise.high * factor, mean), 1.0)


def _why_not(labels: Int[np.ndarray, " n"]) -> str:
    if len(np.unique(labels)) < FROZEN_CLASSES:
        return "on features that were never trained, wrong labels of two classes look like hard rows"
    return "rows contradict their labels no more surely than hard rows do"


def _pairs(
    labels: Int[np.ndarray, " n"],
    suggested: Int[np.ndarray, " n"],
    wrong: Float[np.ndarray, " n"],
    logits: Float[np.ndarray, "n k"],
) -> tuple[ClassPair, ...]:
    unlike = logits.argmax(axis=1) != labels
    keys = labels[unlike].astype(np.int64) * logits.shape[1] + suggested[unlike]
    found, places = np.unique(keys, return_inverse=True)
    rows, expected = np.bincount(places), np.bincount(places, wrong[unlike])
    return tuple(
        ClassPair(int(found[j] // logits.shape[1]), int(found[j] % logits.shape[1]), int(rows[j]), float(expected[j]))
        for j in np.lexsort((-expected, -rows))
    )
