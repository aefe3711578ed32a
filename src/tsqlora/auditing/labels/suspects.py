"""Audit: list wrong labels before training, with rate, probabilities and suggestions.  Ours.

`judge` judges the labels by frozen features, as it does for training, so both list the same rows. Of several labels of
a row, each is judged without the others.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import combinations_with_replacement
from typing import Any

import numpy as np
from torch import nn

from tsqlora import distributed
from tsqlora.auditing.labels.judge import Judgement, judge, judged_features, unit_features
from tsqlora.auditing.labels.label_noise import Labels
from tsqlora.auditing.scores import require_row_names
from tsqlora.errors import DataError, UnsupportedError, of_loaded_model
from tsqlora.libs.shapes import Bool, Float, Int
from tsqlora.model.forward import forward_pass
from tsqlora.model.request import Compute, RowNames
from tsqlora.model.units import Units, token_units, units_of
from tsqlora.rows.datasets import Dataset
from tsqlora.rows.labels import OUTSIDE
from tsqlora.rows.rows import is_missing
from tsqlora.tasks import Collate, require_classes, task_of
from tsqlora.tasks.forward import each_its_row

CANDIDATES = 4
"""Classes to list for each row, likeliest first."""
NEAR = 0.93
"""Cosine of centred features above which rows are near-duplicates: on CLINC150's mean hidden states such pairs say
(nearly) the same."""
MOST_PRODUCTS = 4e12
"""Compare as many rows as these multiplications allow, some minutes on two cores: 100,000 rows of 768 numbers."""
MOST_CONTRADICTIONS = 100_000
"""The nearest pairs that are returned: more are those of very many copies of one text."""
ROWS_AT_ONCE = 1_024


@dataclass(frozen=True, slots=True)
class ClassPair:
    """Rows of one label that look like another class."""

    label: int
    suggested: int
    rows: int
    """Rows that are likelier of the suggested class."""
    wrong: float
    """Expected wrong labels among them, where wrong labels are evident."""


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Audit:
    """All labels, as indices into `classes`: those that training leaves out, then the others, each the likeliest wrong
    one first; a row with several labels has several.

    Unless wrong labels are `evident`, only the order is informative.
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
    """Share of wrong labels; 0 without evidence."""
    low: float
    high: float
    """Each bound holds for 95 of 100 tables; 0 and 1 where there are none."""
    evident: bool
    why_not: str | None
    """Why there is no evidence of wrong labels; None if there is."""
    unjudged: int
    """Labels of classes with too few rows to be judged."""
    likely_wrong: int
    """Number of likely wrong labels, those that training leaves out. They come first; 0 without evidence."""
    copies: int
    """Rows that repeat an earlier one with its label; it is judged for them."""
    pairs: tuple[ClassPair, ...]
    """The most frequent first."""
    duplicates: tuple[tuple[int, int], ...] = ()
    """Pairs of near-duplicate rows with different labels, by their ids, the nearest first."""
    uncompared: int = 0
    """Rows that were not compared with others for near-duplicates, of very many."""
    tokens: Int[np.ndarray, " n"] | None = None
    """The number of each tag's token among the tagged tokens of its row; None for rows with other labels."""

    def __len__(self) -> int:
        return len(self.ids)

    def __repr__(self) -> str:
        if not self.evident:
            return f"Audit({len(self)} labels, none called wrong: {self.why_not})"
        listed = f"{self.likely_wrong} to look at, about {self.expected_wrong:.0f} of them wrong"
        bounds = f", {self.low:.1%} to {self.high:.1%}" if self.high < 1 else ""
        return f"Audit({len(self)} labels, {listed}; {self.rate:.1%} of all wrong{bounds})"

    @property
    def expected_wrong(self) -> float:
        """How many of the likely wrong labels are wrong, by their probabilities."""
        return float(self.probability[: self.likely_wrong].sum())

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
    task, ids = task_of(model), np.arange(len(dataset)) if rows.ids is None else rows.ids
    require_classes(task)
    how = {"task": task, "compute": compute}
    of_rows = partial(forward_pass, model, dataset, collate, rows=rows, mean=True, **how)
    forward, _ = task.reading.units(of_rows=of_rows, of_tokens=lambda: (None, None))()

    def result() -> Audit:
        if forward is None:
            # Tags outside of an entity are so many that wrong tags of entities would be no evidence.
            outside = list(classes).index(OUTSIDE) if classes is not None and OUTSIDE in classes else None
            every = np.arange(len(dataset))
            tokens = token_units(model, dataset, every, collate, early=True, without=outside, **how)
            if tokens is not None:
                return audit_of_units(tokens[1], classes=classes, ids=ids)
        elif (features := judged_features(forward)).shape[1]:
            return audit_of(features, forward.labels, classes=classes, ids=ids)
        raise UnsupportedError("an audit needs a model with a last linear layer or hidden states; use another one")

    return distributed.once(result)


def audit_of(features: Any, labels: Any, *, classes: Sequence[str | int] | None = None, ids: Any = None) -> Audit:
    """Find labels that are likely wrong, by any features of the rows: embeddings, hidden states, pixels.

    Args:
        features: n × d numbers of a model that was not trained on these labels; standardised here.
        labels: n classes, as texts or numbers, or n × k of 0 and 1 where a row has several labels.
        classes: class names by number, if labels are numbers.
        ids: numbers of the rows; by default their positions.

    Raises DataError for other shapes, fewer than 3 rows, missing labels, and features that are not finite.
    """
    features, labels = np.asarray(features), np.asarray(labels)
    labels = labels.ravel() if labels.ndim == 2 and labels.shape[1] == 1 else labels  # a column of a data frame
    features = features if features.dtype.kind == "f" else features.astype(np.float32)
    if features.ndim != 2 or not 1 <= labels.ndim <= 2 or len(features) != len(labels) or len(labels) < 3:
        raise DataError(
            f"features are {features.shape} and labels {labels.shape}; give n × d numbers, and n classes or n × k of "
            "0 and 1, for at least 3 rows"
        )
    if len(bad := np.flatnonzero(~np.isfinite(features).all(axis=1))):
        raise DataError(f"the features of row {bad[0]} are not finite, and of {len(bad)} rows in all")
    if len(none := [j for j, label in enumerate(labels.tolist()) if is_missing(label)]):
        raise DataError(f"row {none[0]} has no label, and {len(none)} rows in all have none; leave them out")
    if classes is None and labels.ndim == 1:
        names, labels = np.unique(labels, return_inverse=True)
        classes = tuple(names.tolist())
    ids = np.arange(len(labels)) if ids is None else np.asarray(ids)
    units = units_of(features, labels, None if classes is None else len(classes))
    sets = labels if labels.ndim == 1 else np.unique(labels, axis=0, return_inverse=True)[1]
    duplicates, uncompared = contradictions(features, sets, ids)
    return replace(audit_of_units(units, classes=classes, ids=ids), duplicates=duplicates, uncompared=uncompared)


def contradictions(
    features: Float[np.ndarray, "n d"], labels: Labels, ids: Int[np.ndarray, " n"]
) -> tuple[tuple[tuple[int, int], ...], int]:
    """Return the nearest pairs with different labels, by their ids, and how many rows were not compared.  [ours]

    Of more rows than MOST_PRODUCTS allows, evenly spaced ones are compared. Cost: n²·d/2 multiplications.
    """
    some = np.linspace(0, len(ids) - 1, min(len(ids), int((2 * MOST_PRODUCTS / features.shape[1]) ** 0.5))).astype(int)
    unit, labels, least = unit_features(features[some]), labels[some], NEAR
    similarity, pairs = np.empty(0, np.float32), np.empty((2, 0), np.int64)
    for a, b in combinations_with_replacement(range(0, len(some), ROWS_AT_ONCE), 2):
        first, second = slice(a, a + ROWS_AT_ONCE), slice(b, b + ROWS_AT_ONCE)
        similar = unit[first] @ unit[second].T
        near = (similar >= least) & (labels[first, None] != labels[second])
        near = np.triu(near, 1) if a == b else near
        similarity = np.concatenate([similarity, similar[near]])
        pairs = np.concatenate([pairs, np.array([[a], [b]]) + np.nonzero(near)], axis=1)
        if len(similarity) > MOST_CONTRADICTIONS:
            nearest = np.argpartition(-similarity, MOST_CONTRADICTIONS)[:MOST_CONTRADICTIONS]
            similarity, pairs = similarity[nearest], pairs[:, nearest]
            least = np.nextafter(similarity.min(), np.float32(2))  # nearer ones alone can replace these
    first, second = ids[some[pairs[:, np.lexsort((*pairs[::-1], -similarity))]]].tolist()
    return tuple(zip(first, second, strict=True)), len(ids) - len(some)


def audit_of_units(units: Units, *, classes: Sequence[str | int] | None = None, ids: Int[np.ndarray, " m"]) -> Audit:
    """Audit units by their features; `ids` are those of the rows.

    Fits on other rows judge them, since the other units of its row give one away.
    """
    judgement = judge(units.features, units.labels, units.width, groups=units.groups, excluded=units.excluded)
    result = audit_of_judgement(judgement, units.labels, classes=classes, excluded=units.excluded)
    order = result.ids
    numbers = None if units.numbers is None else units.numbers[order]
    return replace(result, ids=ids[units.rows[order]], tokens=numbers)


def audit_of_judgement(
    judgement: Judgement,
    labels: Labels,
    *,
    classes: Sequence[str | int] | None = None,
    excluded: Bool[np.ndarray, "n k"] | None = None,
) -> Audit:
    """Present a judgement of these labels; `excluded` classes of a row are not suggested."""
    rows, wrong, others = np.arange(len(labels)), judgement.p_wrong, judgement.p_true.copy()
    if excluded is not None:
        others[excluded] = -1
    others[rows, labels] = -2  # least, also where every class is excluded: a row with all labels loses this one
    suggested = others.argmax(axis=1)
    # The logits order rows that are all but certain.
    order = np.lexsort((judgement.logits[rows, labels], -wrong, ~judgement.left_out))
    unlike, k = judgement.logits.argmax(axis=1) != labels, others.shape[1]
    keys, places = np.unique(labels[unlike].astype(np.int64) * k + suggested[unlike], return_inverse=True)
    times, expected = np.bincount(places), np.bincount(places, wrong[unlike])
    return Audit(
        ids=order,
        labels=labels[order],
        suggested=suggested[order],
        probability=wrong[order],
        candidates=np.argsort(-judgement.p_true, axis=1, kind="stable")[:, :CANDIDATES][order],
        classes=tuple(range(k)) if classes is None else tuple(classes),
        rate=judgement.rate,
        low=judgement.low,
        high=judgement.high,
        evident=judgement.evident,
        why_not=judgement.why_not,
        unjudged=int((~judgement.judged).sum()),
        likely_wrong=int(judgement.left_out.sum()),
        copies=judgement.copies,
        pairs=tuple(
            ClassPair(int(keys[j] // k), int(keys[j] % k), int(times[j]), float(expected[j]))
            for j in np.lexsort((-expected, -times))
        ),
    )
