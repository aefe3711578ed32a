"""Faults planted in a user's own rows: they teach what a fault looks like, and measure what can be found.  Ours.

A row is judged by a fit that saw neither it, nor a copy of its prompt, nor another turn of its conversation.
"""

import itertools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy.optimize import isotonic_regression
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import connected_components
from scipy.special import betaincinv
from scipy.stats import beta
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import PredefinedSplit, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from tsqlora.auditing.texts.among import words_of
from tsqlora.auditing.texts.answers import Turn
from tsqlora.libs.shapes import Bool, Float, Int

FOLDS = 5
PLANTED = 512
"""Rows that get a fault, at most."""
ALIKE = 0.5
"""Share of common words above which texts are near, and one's answer may fit the other."""
TRIES = 20
SENTENCE_ENDS = tuple(end.encode() for end in ".!?\n。！？")
FLOORS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
"""Values of p, which is uniform for faults, above which few good rows lie."""
NEAR_GOOD, BEYOND = 0.05, (0.3, 0.5)
"""What good rows reach: the rows with p between the first and another show how many more have a higher one."""
LEAST_BEYOND, SLACK = 4, 0.005
"""Rows, and the share of all, that must lie beyond what good rows reach."""
LEAST_AREA = 0.78
"""A perfect detector has this area where 44 % of the rows are faulty. With a smaller one no row is called wrong: a
detector without power and a table that is half wrong look alike."""
SUSPECTS, LEAST_SUSPECTS = 0.15, 5
"""Share of the answers that are read behind other prompts, and how many of them are evidence."""
SHARE, DRAWS = 0.05, 50
"""Share of the rows whose place planted faults take, and how often, to measure what could have been found."""
LEAST_FOUND = 0.1
"""Where the rule lists fewer of these, the model cannot tell, and no row is called wrong."""


def disordered(prompt: str, answer: str, rng: np.random.Generator) -> str:
    """Return the answer with its sentences shuffled; of two the first is repeated."""
    sentences = re.split(r"(?<=[.!?])\s+|\n+", answer.strip())
    if len(sentences) < 2:
        return answer
    if len(sentences) == 2:
        return " ".join([sentences[0], *sentences])
    order = np.arange(len(sentences))
    while (order == np.arange(len(order))).all():
        order = rng.permutation(len(order))
    return " ".join(sentences[j] for j in order)


FAULTS: dict[str, Callable[[str, str, np.random.Generator], str]] = {"disordered_answer": disordered}
"""Faults besides another row's answer and a cut: a function of prompt and answer gives the answer with the fault, or
the answer as it is where it has none to give."""


def folds_of(turns: Sequence[Turn], seed: int) -> Int[np.ndarray, " n"]:
    """Return the fold of each turn: turns of one row, and of equal prompts, share it."""
    questions, rows = {}, {}
    for number, turn in enumerate(turns):
        questions.setdefault(" ".join(words_of(turn.question)) or number, len(questions))
        rows.setdefault(turn.row, len(rows))
    a = np.array([rows[turn.row] for turn in turns])
    b = np.array([questions[" ".join(words_of(turn.question)) or j] for j, turn in enumerate(turns)]) + len(rows)
    edges = csr_matrix((np.ones(len(a)), (a, b)), shape=(len(rows) + len(questions),) * 2)
    groups = connected_components(edges, directed=False)[1][a]
    place = np.random.default_rng([seed, 47]).permutation(groups.max() + 1)
    return place[groups] % FOLDS


def donors_of(
    turns: Sequence[Turn], folds: Int[np.ndarray, " n"], rows: Int[np.ndarray, " m"], rng: np.random.Generator
) -> Int[np.ndarray, " m"]:
    """Return for each row a random turn of its fold whose answer does not fit; -1 where none was drawn.

    Neither prompt nor answer of the donor is near.
    """
    words = [({*words_of(turn.question)}, {*words_of(turn.text)}) for turn in turns]
    within = [np.flatnonzero(folds == fold) for fold in range(FOLDS)]
    donors = np.full(len(rows), -1)
    for k, row in enumerate(rows.tolist()):
        for other in rng.choice(within[folds[row]], TRIES).tolist():
            both = zip(words[row], words[other], strict=True)
            if all(len(a | b) and len(a & b) <= ALIKE * len(a | b) for a, b in both):
                donors[k] = other
                break
    return donors


def cut_place(texts: Sequence[bytes], rng: np.random.Generator) -> int:
    """Return a number of tokens, whose bytes are `texts`, after which a cut is not the end of a sentence.

    It lies in the middle four fifths, and behind a word where there is such a place; 0 where there is none.
    """
    size = len(texts)
    after_word, others = list[int](), list[int]()
    for k in range(max(1, size // 10), size - max(1, size // 10)):
        before = b"".join(texts[max(0, k - 3) : k])
        if not before.rstrip(b" ").endswith(SENTENCE_ENDS):
            (after_word if texts[k][:1].isspace() and before[-1:].isalnum() else others).append(k)
    return int(rng.choice(after_word or others or [0]))


@dataclass(frozen=True, slots=True, eq=False)
class Detection:
    """The result for one kind of fault among n turns."""

    planted: int
    rate: float
    """Estimated share of the turns that have this fault; it errs upward."""
    score: Float[np.ndarray, " n"]
    """The higher, the more a turn looks like a planted one."""
    probability: Float[np.ndarray, " n"]
    """That the turn has the fault, given the rate."""
    suspects: Int[np.ndarray, " s"]
    """The worst of the turns that are likely faulty, which deserve other prompts."""
    listed: Int[np.ndarray, " k"]
    """Turns that are called wrong, worst first; none without evidence beyond hard rows."""
    high: float = 1.0
    """With 95 % confidence no more have a fault that looks like the planted ones."""
    recall: float = 0.0
    """Share of planted faults in the place of SHARE of the rows that the same rule would list, the mean of DRAWS."""
    between: tuple[float, float] = (0.0, 0.0)
    """The share lies between these in 90 % of the draws."""
    right: float = 0.0
    """Rows as they are that it would list besides, and does not list without the planted ones."""

    @property
    def usable(self) -> bool:
        """Whether enough planted faults would be listed to call rows wrong."""
        return self.recall >= LEAST_FOUND

    def over(self, judged: Int[np.ndarray, " k"], size: int) -> "Detection":
        """Return the same for `size` turns, of which only some were judged; the others are nan."""
        score, probability = np.full(size, np.nan), np.full(size, np.nan)
        score[judged], probability[judged] = self.score, self.probability
        return replace(self, score=score, probability=probability, listed=judged[self.listed])


def cross_fitted(
    own: Float[np.ndarray, "n d"],
    planted: Float[np.ndarray, "m d"],
    fold: Int[np.ndarray, " n"],
    planted_fold: Int[np.ndarray, " m"],
) -> tuple[Float[np.ndarray, " n"], Float[np.ndarray, " m"]]:
    """Return log-odds that a row is planted, of rows as they are and of planted ones, by a logistic regression each
    time that has not seen their fold."""
    folds = PredefinedSplit(np.concatenate([fold, planted_fold]))
    scores: Any = cross_val_predict(*_lesson(own, planted), cv=folds, method="decision_function")
    return scores[: len(own)], scores[len(own) :]


def _lesson(own: Float[np.ndarray, "n d"], planted: Float[np.ndarray, "m d"]) -> tuple[Any, Any, Any]:
    """A regression that is not fitted, features, and whether each is planted."""
    model = make_pipeline(StandardScaler(), LogisticRegression(class_weight="balanced", max_iter=500))
    return model, np.concatenate([own, planted]), np.repeat([0, 1], [len(own), len(planted)])


@dataclass(frozen=True, slots=True, eq=False)
class FaultJudge:
    """Judges a turn by itself, by a fit on all turns of a look."""

    weights: Float[np.ndarray, " d"]
    bias: Float[np.ndarray, "*one"]
    steps: Float[np.ndarray, " s"]
    """Scores from which on the turn has the fault with `probability`."""
    probability: Float[np.ndarray, " s"]
    least: Float[np.ndarray, "*one"]
    """The least score that is called wrong; infinite where the look called none so."""

    @classmethod
    def fit(
        cls,
        own: Float[np.ndarray, "n d"],
        planted: Float[np.ndarray, "m d"],
        detection: Detection,
    ) -> "FaultJudge":
        """Fit on all turns and planted faults; probabilities and `least` are those of the look's own scores."""
        pipeline, features, is_planted = _lesson(own, planted)
        scaler, model = pipeline.fit(features, is_planted)
        weights = model.coef_[0] / scaler.scale_
        order = np.argsort(detection.score, kind="stable")
        p = np.maximum.accumulate(detection.probability[order])
        new = np.r_[True, np.diff(p) > 0]
        least = detection.score[detection.listed].min(initial=np.inf)
        bias = model.intercept_[0] - weights @ scaler.mean_
        return cls(weights, np.asarray(bias), detection.score[order][new], p[new], np.asarray(least))

    def of(self, features: Float[np.ndarray, "n d"]) -> tuple[Float[np.ndarray, " n"], Bool[np.ndarray, " n"]]:
        """Return the probability of the fault, and whether a turn is called wrong."""
        scores = features @ self.weights + self.bias
        place = np.searchsorted(self.steps, scores, side="right") - 1
        return self.probability[np.maximum(place, 0)], scores >= self.least


def plantings(rows: int, pool: Int[np.ndarray, " m"]) -> list[Int[np.ndarray, " n"]]:
    """Return tables in which planted faults of a pool, by number, have taken the place of SHARE of the rows, at random.

    A table has the numbers of its rows; those of the planted ones begin behind the last row. The first is as it is.
    """
    rng, tables = np.random.default_rng([0, 48]), [np.arange(rows)]
    for _ in range(DRAWS):
        table = np.arange(rows)
        table[rng.permutation(rows)[: max(1, round(SHARE * rows))]] = rows
        table[table == rows] += rng.choice(pool, (table == rows).sum())
        tables.append(table)
    return tables


def detect(
    scores: Float[np.ndarray, " n"],
    planted: Float[np.ndarray, " m"],
    tables: Sequence[Int[np.ndarray, " n"]] | None = None,
    fits: Bool[np.ndarray, " n+m"] | None = None,
) -> Detection:
    """Judge turns by their scores and those of planted faults, none of which its own fit has seen.

    The same rule judges the tables of `plantings`, to measure what could have been found. `fits` is whether the own
    prompt of a row, or of a planted fault, is the best.
    """
    n, every = len(scores), np.concatenate([scores, planted])
    tables = plantings(n, np.arange(len(planted))) if tables is None else tables
    as_is, *again = (judged(every[table], planted, None if fits is None else fits[table]) for table in tables)
    listed = [table[one.listed] for table, one in zip(tables[1:], again, strict=True)]
    shares = [(some >= n).sum() / (table >= n).sum() for table, some in zip(tables[1:], listed, strict=True)]
    low, high = np.quantile(shares, (0.05, 0.95))
    detection = replace(
        as_is,
        high=upper_bound(p_of(scores, planted), len(planted)),
        recall=float(np.mean(shares)),
        between=(float(low), float(high)),
        right=float(np.mean([len(np.setdiff1d(some[some < n], as_is.listed)) for some in listed])),
    )
    return detection if detection.usable else replace(detection, listed=as_is.listed[:0])


def judged(
    scores: Float[np.ndarray, " n"], planted: Float[np.ndarray, " m"], fits: Bool[np.ndarray, " n"] | None = None
) -> Detection:
    """Judge a table: likely rows are called wrong, at most as many as the rate says, where the fault is evident.

    `fits` says whether a row's own prompt is the best: such a row is not called wrong, and a fault is evident where
    most suspects fit other prompts better. Without it the share of rows beyond what good ones reach is the evidence.
    """
    p = p_of(scores, planted)
    rate = rate_of(p, len(planted))
    probability = posterior(p, rate)
    order = np.argsort(-scores, kind="stable")
    likely = order[probability[order] > 0.5] if p_of(planted, scores).mean() >= LEAST_AREA else order[:0]
    suspects = likely[: round(SUSPECTS * len(scores))]
    if fits is None:
        chosen, evident = likely, exceeds(p, rate)
    else:
        chosen, evident = suspects[~fits[suspects]], len(suspects) >= LEAST_SUSPECTS and fits[suspects].mean() < 0.5
    listed = chosen[: round(rate * len(scores)) if evident else 0]
    return Detection(len(planted), rate, scores, probability, suspects, listed)


def exceeds(p: Float[np.ndarray, " n"], rate: float) -> bool:
    """Whether more rows look faulty than good rows explain.

    The scores of good and of planted rows are taken as logistic, so that the odds of p > x are those of 1 − x, divided
    by a constant c: the share of rows between NEAR_GOOD and x gives it, as the larger root of a quadratic equation. A
    twofold share beyond x, with 95 % confidence, is evidence. Among swapped pairs, planted ones are as often right as
    rows are wrong: the second begins behind these.
    """
    for start, end in itertools.product((NEAR_GOOD, min(max(NEAR_GOOD, rate), 0.8 * BEYOND[0])), BEYOND):
        beyond, near = int((p > end).sum()), float(((p > start) & (p <= end)).mean())
        a, b = start / (1 - start), end / (1 - end)
        half = b - a - near * (a + b)
        twice = half + np.sqrt(max(half**2 - 4 * near**2 * a * b, 0))  # 2·a·b·c·near
        tail = 2 * near * a / (2 * near * a + max(twice, 0)) if near else 0.0
        least = betaincinv(beyond, len(p) - beyond + 1, 0.05) if beyond >= LEAST_BEYOND else 0.0
        if least > 2 * tail + SLACK * (1 - end):
            return True
    return False


def p_of(scores: Float[np.ndarray, " n"], planted: Float[np.ndarray, " m"]) -> Float[np.ndarray, " n"]:
    """Return the share of planted faults that look less faulty: uniform for faults, near 0 for good rows."""
    ordered = np.sort(planted)
    below, upto = (np.searchsorted(ordered, scores, side=side) for side in ("left", "right"))
    return (below + upto) / 2 / len(ordered)


def rate_of(p: Float[np.ndarray, " n"], planted: int) -> float:
    """Return the share of uniform values, by those above a floor (Storey 2002).

    Above a floor lies a known share of the faults, and of good rows the fewer the higher the floor is. A higher floor
    counts where its estimate is lower by more than four standard errors, of its count and of the planted quantile.
    """
    floors = np.array(FLOORS)
    count = np.array([(p > floor).sum() for floor in FLOORS])
    rates = count / len(p) / (1 - floors)
    errors = np.hypot(np.sqrt(count + 1) / len(p) / (1 - floors), rates * np.sqrt(floors / (1 - floors) / planted))
    lower = np.flatnonzero(rates + 4 * errors < rates[0])
    return min(1.0, float(rates[lower[-1] if len(lower) else 0]))


def upper_bound(p: Float[np.ndarray, " n"], planted: int) -> float:
    """Return an upper bound of the share of faults, of 95 % confidence.

    Any interval of p has its share of the faults, and good rows besides. The quantiles of p are those of a sample of
    planted rows, so that its length has an error too. The best interval counts.
    """
    level, n, floors = 1 - 0.05 / 2 / len(FLOORS), len(p), np.array(FLOORS)
    k, m = np.array([(p > floor).sum() for floor in FLOORS]), np.round((1 - floors) * planted)
    most = np.where(k < n, beta.ppf(level, k + 1, np.maximum(n - k, 1)), 1.0)
    least = beta.ppf(1 - level, m, planted - m + 1)
    return min(1.0, float((most / np.maximum(least, 1e-9)).min()))


def posterior(p: Float[np.ndarray, " n"], rate: float) -> Float[np.ndarray, " n"]:
    """Return P(fault | p): the rate over the density of p, which falls (Grenander 1956)."""
    bins = int(np.clip(len(p) // 10, 5, 50))
    count, edges = np.histogram(p, bins, (0, 1))
    density = isotonic_regression(count / len(p) * bins, increasing=False).x
    place = np.clip(np.digitize(p, edges) - 1, 0, bins - 1)
    return np.minimum(1, rate / np.maximum(density[place], 1e-9))
