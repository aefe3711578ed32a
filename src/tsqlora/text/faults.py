"""Faults planted in a user's own rows: they teach what a fault looks like, and measure what can be found.  Ours.

A row is judged by a fit that saw neither it, nor a copy of its prompt, nor another turn of its conversation.
"""

import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import connected_components
from scipy.stats import beta
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.isotonic import IsotonicRegression
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from tsqlora.compat.shapes import Bool, Float, Int
from tsqlora.text.among import words_of
from tsqlora.text.answers import Turn

FOLDS = 5
PLANTED = 512
"""Rows that get a fault, at most."""
ALIKE = 0.5
"""Share of common words above which texts are near, and one's answer may fit the other."""
TRIES = 20
FLOORS = (0.5, 0.6, 0.7, 0.8, 0.9)
"""Values of p, which is uniform for faults, above which few good rows lie."""
LEVELS = (0.01, 0.05)
"""False alarms at which recall is measured."""
LEAST_RECALL = 0.4
"""Where fewer planted faults are found at 1 % false alarms, rows are ordered and none is called wrong. A weak detector
takes hard rows for faults, which makes its recall look up to 0.1 better."""
LEAST_AREA = 0.78
"""A perfect detector has this area where 44 % of the rows are faulty."""
DRAWS = 200

FAULTS: dict[str, Callable[[str, str, np.random.Generator], str]] = {}
"""Faults besides another row's answer and a cut: a function of prompt and answer gives the answer with the fault, or
the answer as it is where it has none to give."""


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


FAULTS["disordered_answer"] = disordered


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
            if all(_near(a, b) <= ALIKE for a, b in zip(words[row], words[other], strict=True)):
                donors[k] = other
                break
    return donors


def near_donors_of(
    turns: Sequence[Turn], folds: Int[np.ndarray, " n"], rows: Int[np.ndarray, " m"]
) -> Int[np.ndarray, " m"]:
    """Return for each row the turn of its fold with the nearest other prompt and another answer; -1 for none."""
    words = TfidfVectorizer(analyzer=words_of, sublinear_tf=True)  # pyright: ignore[reportArgumentType]
    prompts = words.fit_transform([turn.question for turn in turns])
    donors = np.full(len(rows), -1)
    for fold in range(FOLDS):
        within, judged = np.flatnonzero(folds == fold), np.flatnonzero(folds[rows] == fold)
        alike = (prompts[rows[judged]] @ prompts[within].T).toarray()
        for k, near in zip(judged.tolist(), np.argsort(-alike, axis=1)[:, :TRIES], strict=True):
            row = turns[rows[k]]
            question, answer = words_of(row.question), {*words_of(row.text)}
            others = (j for j in within[near].tolist() if words_of(turns[j].question) != question)
            donors[k] = next((j for j in others if _near({*words_of(turns[j].text)}, answer) <= ALIKE), -1)
    return donors


def _near(a: set[str], b: set[str]) -> float:
    return len(a & b) / len(a | b) if a | b else 1.0


def cut_places(turn: Turn, texts: Sequence[bytes], rng: np.random.Generator) -> tuple[int, int, int]:
    """Return numbers of tokens after which an answer would be cut in a word, behind one, and behind a sentence.

    `texts` are the tokens' bytes. A place lies in the middle four fifths of the answer; 0 where there is none.
    """
    size = len(texts)
    kinds = dict[int, list[int]]({0: [], 1: [], 2: []})
    for k in range(max(1, size // 10), size - max(1, size // 10)):
        before, after = b"".join(texts[max(0, k - 3) : k]), texts[k]
        if before.rstrip()[-1:] in b".!?" and after[:1].isspace():
            kinds[2].append(k)
        elif after[:1].isspace() and before[-1:].isalnum():
            kinds[1].append(k)
        elif after[:1].isalpha() and before[-1:].isalpha():
            kinds[0].append(k)
    return tuple(int(rng.choice(kinds[kind])) if kinds[kind] else 0 for kind in range(3))  # pyright: ignore


@dataclass(frozen=True, slots=True, eq=False)
class Detection:
    """What is known of one kind of fault among n turns."""

    planted: int
    recall: Mapping[float, float]
    """Share of the planted faults that is found, by the share of false alarms."""
    area: float
    """Chance that a planted fault scores above a row as it is (area under ROC)."""
    rate: float
    """Estimated share of the turns that have this fault; it errs upward."""
    high: float
    """With 95 % confidence no more have it."""
    low: float
    """With 95 % confidence the estimate is above this, by a bootstrap; no lower bound of the share itself."""
    score: Float[np.ndarray, " n"]
    """The higher, the more a turn looks like a planted one."""
    probability: Float[np.ndarray, " n"]
    """That the turn has the fault, given the rate."""

    evident: bool
    """Whether there is evidence of this fault beyond hard rows."""
    kinds: Mapping[str, float] = field(default_factory=dict)
    """Share of the planted faults of a kind that is found at 1 % false alarms; some kinds do not teach."""

    @property
    def usable(self) -> bool:
        """Whether enough planted faults are found to call rows wrong.

        A detector without power and a table that is half wrong look alike: then nothing is called wrong either.
        """
        return self.recall[LEVELS[0]] >= LEAST_RECALL and self.area >= LEAST_AREA

    def over(self, judged: Int[np.ndarray, " k"], size: int) -> "Detection":
        """Return the same for `size` turns, of which only some were judged; the others are nan."""
        score, probability = np.full(size, np.nan), np.full(size, np.nan)
        score[judged], probability[judged] = self.score, self.probability
        return replace(self, score=score, probability=probability)


def clean_rate(recall: float) -> float:
    """The rate that tables without faults seem to have, by the recall of planted faults at 1 % false alarms."""
    return 0.01 + 0.25 * (1 - recall)


def cross_fitted(
    own: Float[np.ndarray, "n d"],
    planted: Float[np.ndarray, "m d"],
    fold: Int[np.ndarray, " n"],
    planted_fold: Int[np.ndarray, " m"],
    *further: tuple[Float[np.ndarray, "k d"], Int[np.ndarray, " k"]],
) -> tuple[Float[np.ndarray, " _"], ...]:
    """Return log-odds that a row is planted, by a logistic regression that has not seen its fold.

    There is an array for rows as they are, one for planted ones, and one for each of `further` rows with their folds,
    which do not teach.
    """
    judged = ((own, fold), (planted, planted_fold), *further)
    scores = tuple(np.zeros(len(values)) for values, _ in judged)
    for one in range(FOLDS):
        a, b = fold != one, planted_fold != one
        scaler, model = _fitted(own[a], planted[b])
        for (values, folds), out in zip(judged, scores, strict=True):
            if (folds == one).any():
                out[folds == one] = model.decision_function(scaler.transform(values[folds == one]))
    return scores


def _fitted(
    own: Float[np.ndarray, "n d"], planted: Float[np.ndarray, "m d"]
) -> tuple[StandardScaler, LogisticRegression]:
    features = np.concatenate([own, planted])
    scaler = StandardScaler().fit(features)
    model = LogisticRegression(class_weight="balanced", max_iter=500)
    return scaler, model.fit(scaler.transform(features), np.repeat([0, 1], [len(own), len(planted)]))


@dataclass(frozen=True, slots=True, eq=False)
class FaultJudge:
    """Judges a turn by itself, by a fit on all turns of a look."""

    weights: Float[np.ndarray, " d"]
    bias: Float[np.ndarray, ""]
    steps: Float[np.ndarray, " s"]
    """Scores from which on the turn has the fault with `probability`."""
    probability: Float[np.ndarray, " s"]
    least: Float[np.ndarray, ""]
    """The least score that is called wrong; infinite where the look called none so."""

    @classmethod
    def fit(
        cls,
        own: Float[np.ndarray, "n d"],
        planted: Float[np.ndarray, "m d"],
        detection: Detection,
        chosen: Int[np.ndarray, " k"],
    ) -> "FaultJudge":
        """Fit on all turns and planted faults; probabilities and `least` are those of the look's own scores."""
        scaler, model = _fitted(own, planted)
        weights = np.asarray(model.coef_)[0] / np.asarray(scaler.scale_)
        order = np.argsort(detection.score, kind="stable")
        p = np.maximum.accumulate(detection.probability[order])
        new = np.r_[True, np.diff(p) > 0]
        least = detection.score[chosen].min(initial=np.inf)
        bias = np.asarray(model.intercept_)[0] - weights @ np.asarray(scaler.mean_)
        return cls(weights, np.asarray(bias), detection.score[order][new], p[new], np.asarray(least))

    def of(self, features: Float[np.ndarray, "n d"]) -> tuple[Float[np.ndarray, " n"], Bool[np.ndarray, " n"]]:
        """Return the probability of the fault, and whether a turn is called wrong."""
        scores = features @ self.weights + self.bias
        place = np.searchsorted(self.steps, scores, side="right") - 1
        return self.probability[np.maximum(place, 0)], scores >= self.least


def detect(
    scores: Float[np.ndarray, " n"],
    planted: Float[np.ndarray, " m"],
    seed: int = 0,
    kinds: Mapping[str, Float[np.ndarray, " k"]] | None = None,
    hard: Sequence[Float[np.ndarray, " k"]] = (),
) -> Detection:
    """Judge turns by their scores and those of planted faults, none of which its own fit has seen.

    `kinds` are scores of faults of one kind, for their recall alone. `hard` ones are harder to see, so that more turns
    may have them: they count for the upper bound.
    """
    p = p_of(scores, planted)
    floor = floor_of(p, len(planted))
    rate = storey(p, floor)
    faulty = posterior(p, rate)
    rng = np.random.default_rng([seed, 48])
    resampled = (p_of(rng.choice(scores, len(scores)), rng.choice(planted, len(planted))) for _ in range(DRAWS))
    again = [storey(one, floor) for one in resampled]
    detection = Detection(
        len(planted),
        {level: found_at(scores, planted, faulty, level) for level in LEVELS},
        float(p_of(planted, scores).mean()),
        rate,
        max(upper_bound(p_of(scores, some), len(some)) for some in (planted, *hard)),
        float(np.quantile(again, 0.05)),
        scores,
        faulty,
        evident=False,
        kinds={name: found_at(scores, some, faulty, LEVELS[0]) for name, some in (kinds or {}).items()},
    )
    return replace(detection, evident=detection.usable and detection.low > clean_rate(detection.recall[LEVELS[0]]))


def p_of(scores: Float[np.ndarray, " n"], planted: Float[np.ndarray, " m"]) -> Float[np.ndarray, " n"]:
    """Return the share of planted faults that look less faulty: uniform for faults, near 0 for good rows."""
    ordered = np.sort(planted)
    below, upto = (np.searchsorted(ordered, scores, side=side) for side in ("left", "right"))
    return (below + upto) / 2 / len(ordered)


def floor_of(p: Float[np.ndarray, " n"], planted: int) -> float:
    """Return the floor of Storey's estimate.

    Above a floor lies a known share of the faults, and of good rows the fewer the higher the floor is. A higher floor
    counts where its estimate is lower by more than four standard errors, of its count and of the planted quantile.
    """
    floors = np.array(FLOORS)
    count = np.array([(p > floor).sum() for floor in FLOORS])
    rates = count / len(p) / (1 - floors)
    errors = np.hypot(np.sqrt(count + 1) / len(p) / (1 - floors), rates * np.sqrt(floors / (1 - floors) / planted))
    lower = np.flatnonzero(rates + 4 * errors < rates[0])
    return FLOORS[lower[-1] if len(lower) else 0]


def storey(p: Float[np.ndarray, " n"], floor: float) -> float:
    """Return the share of uniform values, by those above a floor (Storey 2002)."""
    return min(1.0, float((p > floor).mean()) / (1 - floor))


def upper_bound(p: Float[np.ndarray, " n"], planted: int) -> float:
    """Return an upper bound of the share of faults, of 95 % confidence.

    Any interval of p has its share of the faults, and good rows besides. The quantiles of p are those of a sample of
    planted rows, so that its length has an error too. The best interval counts.
    """
    level, n = 1 - 0.05 / 2 / len(FLOORS), len(p)
    bounds = list[float]()
    for start in FLOORS:
        k = int((p > start).sum())
        most = float(beta.ppf(level, k + 1, n - k)) if k < n else 1.0
        m = round((1 - start) * planted)
        least = float(beta.ppf(1 - level, m, planted - m + 1))
        bounds.append(most / max(least, 1e-9))
    return min(1.0, *bounds)


def posterior(p: Float[np.ndarray, " n"], rate: float) -> Float[np.ndarray, " n"]:
    """Return P(fault | p): the rate over the density of p, which falls (Grenander 1956)."""
    bins = int(np.clip(len(p) // 10, 5, 50))
    count, edges = np.histogram(p, bins, (0, 1))
    density = IsotonicRegression(increasing=False).fit_transform(np.arange(bins), count / len(p) * bins)
    place = np.clip(np.digitize(p, edges) - 1, 0, bins - 1)
    return np.minimum(1, rate / np.maximum(density[place], 1e-9))


def found_at(
    scores: Float[np.ndarray, " n"], planted: Float[np.ndarray, " m"], faulty: Float[np.ndarray, " n"], level: float
) -> float:
    """Return the share of planted faults above a threshold that this share of the good rows passes.

    Rows that are probably `faulty` are no false alarms: they are the user's own faults.
    """
    order, good = np.argsort(-scores), faulty <= 0.5
    alarms = np.cumsum(good[order]) / max(good.sum(), 1)
    passed = int((alarms <= level).sum())
    return float((planted > scores[order[passed]]).mean()) if passed < len(order) else 1.0


def listed(detection: Detection, fits: Bool[np.ndarray, " n"]) -> Int[np.ndarray, " k"]:
    """Return the turns that are called wrong, worst first: likely ones whose own prompt does not fit best.

    There are at most as many as the rate says; none where the fault is not evident.
    """
    if not detection.evident:
        return np.empty(0, np.int64)
    order = np.argsort(-detection.score, kind="stable")
    chosen = order[(detection.probability[order] > 0.5) & ~fits[order]]
    return chosen[: round(detection.rate * len(detection.score))]


def few_answers(texts: Collection[str]) -> bool:
    """Whether answers repeat so often that they are labels, which the judge of labels reads better."""
    return len(Counter(texts)) < max(20, len(texts) // 20)
