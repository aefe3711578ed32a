"""Audit: find wrong labels before training, with rate, probabilities and suggestions.  Ours.

Each row is judged by a fit without it on frozen features: ridge regression, or for two classes, tags and several labels
a row, where least squares looks like wrong labels, logistic regression. `label_noise` estimates the rate of wrong
labels from contradictions with these predictions, `transitions` which labels each class's rows get; Bayes' rule then
gives the probability that a class is the true one. Of several labels of a row, each is judged without the others.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from scipy.special import softmax
from torch import nn

from tsqlora import distributed
from tsqlora.compat.shapes import Bool, Float, Int, Shaped
from tsqlora.errors import DataError, UnsupportedError, of_loaded_model
from tsqlora.quality.duplicates import Contradiction, contradictions, labels_of_nearest
from tsqlora.quality.forward_pass import forward_pass
from tsqlora.quality.label_noise import FROZEN_CLASSES, LabelNoise, Labels, Logits, Nearest, reject
from tsqlora.quality.linear_head import FOLDS, grouped_logits
from tsqlora.quality.ridge import fit_classes, fit_temperature
from tsqlora.quality.rows import Dataset
from tsqlora.quality.rule import Compute, RowNames
from tsqlora.quality.scores import require_row_names
from tsqlora.quality.tag_features import TagFeatures, tag_features
from tsqlora.quality.transitions import fit_transitions, true_class
from tsqlora.seeds import stream
from tsqlora.tasks import Task
from tsqlora.tasks.forward import Collate, each_its_row, task_of
from tsqlora.tasks.tokens import OUTSIDE, TokenClassification

LIKELY = 0.5
"""A label is likely wrong above this probability."""
USUAL_RATE = 0.03
"""Rate assumed without evidence, if it is possible: benchmarks have 3.3 % on average (Northcutt et al. 2021)."""
FEWEST = 5
"""Rows that a class needs to be judged: with fewer, the other rows do not define the class, and all look wrong."""
CANDIDATES = 4
"""Classes to list for each row, likeliest first."""
ROWS_TO_FIT = 50_000
ROWS_AT_ONCE = 16_384


@dataclass(frozen=True, slots=True)
class ClassPair:
    """Rows of one label that look like another class."""

    label: int
    suggested: int
    rows: int
    """Rows that are likelier of the suggested class."""
    wrong: float
    """Expected wrong labels among them."""


@dataclass(frozen=True, slots=True, eq=False)
class Audit:
    """All labels, the likeliest wrong one first, as indices into `classes`; a row with several labels has several.

    Unless wrong labels are `evident`, `rate` is an assumption and only the order is informative.
    """

    ids: Int[np.ndarray, " n"]
    """The row of each label."""
    labels: Labels
    suggested: Labels
    """The likeliest class other than the label."""
    probability: Float[np.ndarray, " n"]
    """Probability that the label is wrong."""
    candidates: Int[np.ndarray, "n c"]
    """The likeliest classes, which may include the label."""
    classes: tuple[str | int, ...]
    rate: float
    """Share of wrong labels; each bound holds for 95 of 100 tables."""
    low: float
    high: float
    evident: bool
    why_not: str | None
    """Why there is no evidence of wrong labels; None if there is."""
    unjudged: int
    """Rows of classes with fewer than FEWEST rows; their probability is the rate."""
    pairs: tuple[ClassPair, ...]
    """The most frequent first."""
    duplicates: tuple[Contradiction, ...]
    """Near-duplicates with different labels, the nearest first."""
    tokens: Int[np.ndarray, " n"] | None = None
    """The number of each tag's token among the tagged tokens of its row; None for rows with other labels."""

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def likely_wrong(self) -> int:
        """Number of likely wrong labels, which come first; 0 without evidence."""
        return int((self.probability > LIKELY).sum()) if self.evident else 0

    def columns(self) -> dict[str, np.ndarray]:
        """Return columns for `pandas.DataFrame`: row, token (of tags), label, suggested_label, wrong_probability."""
        names = np.array(self.classes)
        return {
            "row": self.ids,
            **({} if self.tokens is None else {"token": self.tokens}),
            "label": names[self.labels],
            "suggested_label": names[self.suggested],
            "wrong_probability": self.probability,
        }


@of_loaded_model
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
        model: a classifier; its head may be new. It is left unchanged.
        dataset: its rows go to `collate`, which returns the model's inputs and `labels`: a class each, or n × k of 0
            and 1 for a model with the problem_type multi_label_classification, or a tag for each token.
        classes: class names by number; by default the numbers.
        rows: ids of the rows; by default their positions.

    Raises UnsupportedError for another task and for a model without a last linear layer, DataError for fewer than 3
    rows.
    """
    rows, compute = rows or RowNames(), compute or Compute()
    model, collate = distributed.unwrapped(model), each_its_row(collate)
    require_row_names(len(dataset), hashes=rows.hashes, ids=rows.ids)
    if len(dataset) < 3:
        raise DataError(f"{len(dataset)} rows are too few for an audit; give at least 3")
    task = task_of(model)
    if isinstance(task, TokenClassification):
        return distributed.once(lambda: _audit_tags(model, dataset, collate, task, classes, rows, compute))
    if task.answer not in ("class", "labels"):
        raise UnsupportedError(f"an audit needs classes, but the task is {task.name}")
    forward, _ = forward_pass(model, dataset, collate, task=task, compute=compute, rows=rows, mean=True)

    def judge() -> Audit:
        assert forward is not None
        parts = [part for part in (forward.features, forward.mean) if part is not None]
        if not parts:
            raise UnsupportedError("an audit needs a model with a last linear layer or hidden states; use another one")
        features = parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1, dtype=np.float32)
        return audit_of(features, forward.labels, classes=classes, ids=rows.ids)

    return distributed.once(judge)


def _audit_tags(
    model: nn.Module,
    dataset: Dataset,
    collate: Collate,
    task: Task,
    classes: Sequence[str | int] | None,
    rows: RowNames,
    compute: Compute,
) -> Audit:
    # Tags outside of an entity are so many that wrong tags of entities would be no evidence.
    outside = list(classes).index(OUTSIDE) if classes is not None and OUTSIDE in classes else None
    every = np.arange(len(dataset))
    result = tag_features(model, dataset, every, collate, task, compute, early=True, without=outside)
    if result is None:
        raise UnsupportedError("an audit of tags needs a model with a last linear layer; use another one")
    layer, tokens = result
    ids = every if rows.ids is None else rows.ids
    return audit_of_tags(tokens, width=layer.linear.out_features, classes=classes, ids=ids)


def audit_of_tags(
    tokens: TagFeatures, *, width: int, classes: Sequence[str | int] | None = None, ids: Int[np.ndarray, " m"]
) -> Audit:
    """Audit the tags of tokens by frozen features; `ids` are those of the rows.

    Fits on other rows judge them, since the other tokens of its row give a tag away.
    """
    logits = _out_of_fold(tokens.features, tokens.tags, tokens.rows, width)
    nearest = partial(labels_of_nearest, tokens.features, tokens.tags, tokens.rows)
    result = audit_of_logits(logits, tokens.tags, classes=classes, nearest=nearest)
    return replace(result, ids=ids[tokens.rows[result.ids]], tokens=tokens.numbers[result.ids])


def audit_of(
    features: Float[np.ndarray, "n d"],
    labels: Shaped[np.ndarray, "n *k"],
    *,
    classes: Sequence[str | int] | None = None,
    ids: Int[np.ndarray, " n"] | None = None,
) -> Audit:
    """Audit labels, classes or n × k of 0 and 1, by frozen features.

    A ridge fit on all other rows judges each row's class, and logistic regressions in folds one of two classes, or each
    of several labels.
    """
    ids = np.arange(len(labels)) if ids is None else ids
    if labels.ndim == 2:
        rows, own = np.nonzero(labels > 0.5)
        others = labels[rows] > 0.5
        others[np.arange(len(own)), own] = False
        logits = _out_of_fold(features[rows], own, rows, labels.shape[1])
        nearest = partial(labels_of_nearest, features[rows], own, rows)
        # The row's other labels are as unlikely as its least likely class.
        logits = np.where(others, logits.min(axis=1, keepdims=True), logits)
        result = audit_of_logits(logits, own, classes=classes, ids=ids[rows], excluded=others, nearest=nearest)
        labels = np.unique(labels, axis=0, return_inverse=True)[1]
    else:
        width, nearest = int(labels.max()) + 1 if classes is None else len(classes), None
        if len(np.unique(labels)) >= FROZEN_CLASSES:
            logits = fit_classes(features, labels, width).left_out
        else:
            rows = np.arange(len(labels))
            logits = _out_of_fold(features, labels, rows, width)
            nearest = partial(labels_of_nearest, features, labels, rows)
        result = audit_of_logits(logits, labels, classes=classes, ids=ids, nearest=nearest)
    return replace(result, duplicates=contradictions(features, labels, ids))


def _out_of_fold(features: Float[np.ndarray, "n d"], labels: Labels, rows: Int[np.ndarray, " n"], width: int) -> Logits:
    if (several := len(np.unique(rows))) < FOLDS:
        raise DataError(f"{several} rows with a label are too few for an audit; give at least {FOLDS}")
    return grouped_logits(features, labels, rows, width, rng=stream("audit folds", 0))


def audit_of_logits(
    logits: Logits,
    labels: Labels,
    *,
    classes: Sequence[str | int] | None = None,
    ids: Int[np.ndarray, " n"] | None = None,
    excluded: Bool[np.ndarray, "n k"] | None = None,
    frozen: bool = True,
    nearest: Nearest | None = None,
) -> Audit:
    """Audit labels by logits, or log probabilities, of fits without the rows that they judge.

    `excluded` classes are not suggested. `frozen` says that the fits were on features that were never trained, where
    evidence of wrong labels needs more, and `nearest` that they were logistic regressions (`reject`).
    """
    rows = np.arange(len(labels))
    logits = logits / np.float32(fit_temperature(logits, labels))
    judged = np.bincount(labels, minlength=logits.shape[1])[labels] >= FEWEST
    if judged.sum() < 2:
        raise DataError(f"no class has {FEWEST} rows, from which an audit learns the class; give more rows")
    places = np.flatnonzero(judged)
    near = None if nearest is None else lambda some: nearest(places[some])
    _, noise = reject(logits[judged], labels[judged], frozen=frozen, nearest=near)
    fitted = noise
    if not noise.evident:
        # Without evidence: calibrated logits as they are, and a usual rate.
        rate, offsets = min(USUAL_RATE, (noise.low + noise.high) / 2), np.where(noise.shares > 0, 0.0, -np.inf)
        fitted = replace(noise, rate=rate, scale=1.0, offsets=offsets, clear=False)
    p_true = _p_true(logits, labels, fitted, judged)
    own, others = p_true[rows, labels], p_true.copy()
    others[np.zeros_like(others, dtype=bool) if excluded is None else excluded] = -1
    others[rows, labels] = -2  # least, also where every class is excluded: a row with all labels loses this one
    suggested, wrong = others.argmax(axis=1), np.where(judged, (1 - own).clip(0, 1), fitted.rate)
    # The logits order rows that are all but certain.
    order = np.lexsort((logits[rows, labels], -wrong))
    rate, low, high = fitted.rate, 0.0, noise.high
    if noise.evident:
        # Wrong labels that prefer some classes exceed the even rate; the bounds scale along.
        rate = float(wrong[judged].mean())
        low, high = min(noise.low * rate / noise.rate, rate), min(max(noise.high * rate / noise.rate, rate), 1.0)
    return Audit(
        ids=(rows if ids is None else ids)[order],
        labels=labels[order],
        suggested=suggested[order],
        probability=wrong[order],
        candidates=np.argsort(-p_true, axis=1, kind="stable")[:, :CANDIDATES][order],
        classes=tuple(range(logits.shape[1])) if classes is None else tuple(classes),
        rate=rate,
        low=low,
        high=high,
        evident=noise.evident,
        why_not=None if noise.evident else "rows contradict their labels no more surely than hard rows do",
        unjudged=int((~judged).sum()),
        pairs=_pairs(labels, suggested, wrong, logits),
        duplicates=(),
    )


def _p_true(logits: Logits, labels: Labels, noise: LabelNoise, judged: Bool[np.ndarray, " n"]) -> Logits:
    """Return the probability that each class is the true one; for unjudged rows by the logits alone."""

    def p(rows: np.ndarray) -> np.ndarray:
        return softmax(noise.scale * logits[rows].astype(np.float64) + noise.offsets, axis=1)

    rows = np.flatnonzero(judged)
    some = rows[np.linspace(0, len(rows) - 1, min(len(rows), ROWS_TO_FIT)).astype(int)]
    matrix = fit_transitions(p(some), labels[some], noise)
    p_true = softmax(logits, axis=1)
    for start in range(0, len(rows), ROWS_AT_ONCE):
        part = rows[start : start + ROWS_AT_ONCE]
        p_true[part] = true_class(p(part), labels[part], matrix)
    return p_true


def _pairs(labels: Labels, suggested: Labels, wrong: Float[np.ndarray, " n"], logits: Logits) -> tuple[ClassPair, ...]:
    k, unlike = logits.shape[1], logits.argmax(axis=1) != labels
    keys, places = np.unique(labels[unlike].astype(np.int64) * k + suggested[unlike], return_inverse=True)
    rows, expected = np.bincount(places), np.bincount(places, wrong[unlike])
    return tuple(
        ClassPair(int(keys[j] // k), int(keys[j] % k), int(rows[j]), float(expected[j]))
        for j in np.lexsort((-expected, -rows))
    )
