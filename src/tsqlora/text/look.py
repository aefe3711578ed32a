"""The look at answers: which ones do not fit their prompts, stop in the middle, or are in disorder.

Nobody says which rows are bad. Faults planted in copies of the rows teach it, and measure what can be found.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer
from torch import nn

from tsqlora.compat.shapes import Bool, Float, Int
from tsqlora.quality.rule import Compute
from tsqlora.text.among import words_of
from tsqlora.text.answers import (
    MOST_ANSWER,
    MOST_PROMPT,
    Sample,
    Turn,
    behind,
    features_of,
    fits_own,
    longest_prompt,
    read_answers,
)
from tsqlora.text.faults import (
    FAULTS,
    FOLDS,
    LEVELS,
    PLANTED,
    Detection,
    FaultJudge,
    cross_fitted,
    cut_places,
    detect,
    donors_of,
    few_answers,
    folds_of,
    listed,
    near_donors_of,
)
from tsqlora.text.prepared import SIDES
from tsqlora.text.vocabulary import Vocabulary

FOREIGN, CUT, SWAPPED = "foreign_answer", "cut_answer", "swapped_pair"
SAMPLE = 2_000
"""Rows that are looked at by default."""
LEAST_TURNS = 50
"""With fewer answers nothing is judged."""
SUSPECTS, DECOYS = 0.15, 8
"""Share of the answers that are read behind other prompts, and how many."""
LEAST_SUSPECTS = 5
OWNERS, LEAST_SHIFTED = 200, 5
NEAR = 128
"""Rows that get the answer of the nearest prompt, for its recall: a quarter of the planted ones, at most."""
CUTS = ("in a word", "after a word", "after a sentence")
PHASES = {
    "prompted": "answers with their prompts",
    "alone": "answers alone",
    "near": "planted faults, similar prompts",
    "foreign": "planted faults",
    "decoys": "answers under other prompts",
    "whole": "answers under whole prompts",
    "owners": "whose answers they are",
    "moved": "answers beside these",
}
"""What a progress bar calls each pass."""
Losses = Mapping[tuple[int, str], Mapping[int, float]]
"""By row and side of a pair: −log p of a token, by its place in the sequence."""
Read = Callable[[str, Sequence[Sample]], dict[str, np.ndarray]]


@dataclass(slots=True)
class AnswerLook:
    """The results for each turn, by the name of the fault."""

    turns: list[Turn]
    detections: dict[str, Detection] = field(default_factory=dict)
    listed: dict[str, Int[np.ndarray, " k"]] = field(default_factory=dict)
    """Turns that are called wrong, worst first."""
    judges: dict[str, FaultJudge] = field(default_factory=dict)
    """By a fault that can be found: what judges turns that the look has not seen."""
    owners: dict[int, int] = field(default_factory=dict)
    """By turn: the row whose prompt its answer fits best."""
    losses: dict[int, Float[np.ndarray, " t"]] = field(default_factory=dict)
    """By turn that is called wrong: −log p of each of its answer's tokens that were read."""
    shifts: list[tuple[int, int, int]] = field(default_factory=list)
    """First row, last row, and by how many rows their answers are shifted."""
    tokens: dict[str, int] = field(default_factory=dict)
    """Tokens that the model read, by pass."""
    notes: list[str] = field(default_factory=list)

    def rows(self, fault: str) -> dict[int, float]:
        """Rows that are called wrong, and the probability of the worst turn of each."""
        rows = dict[int, float]()
        for turn in self.listed.get(fault, ()):
            row = self.turns[turn].row
            rows[row] = max(rows.get(row, 0.0), float(self.detections[fault].probability[turn]))
        return rows

    def by_token(self) -> Losses:
        """The losses of answers that are called wrong, by row and place."""
        losses = dict[tuple[int, str], dict[int, float]]()
        for j, each in self.losses.items():
            turn = self.turns[j]
            losses.setdefault((turn.row, turn.side), {}).update(enumerate(each.tolist(), start=len(turn.prompt)))
        return losses

    def summary(self) -> dict[str, Any]:
        """The look in findings.json, in the scores' record and in the terminal."""
        faults = {
            name: {
                "planted": one.planted,
                "recall": {f"{level:g}": one.recall[level] for level in LEVELS},
                "kinds": dict(one.kinds),
                "rate": one.rate if one.usable else None,
                "high": one.high,
                "evident": one.evident,
                "listed": len(self.rows(name)),
            }
            for name, one in self.detections.items()
        }
        about = {"turns": len(self.turns), "tokens": self.tokens, "faults": faults, "shifts": self.shifts}
        return {**about, "notes": self.notes, "says": self.sentences()}

    def sentences(self, *, faults: bool = True) -> list[str]:
        """Say first what can be found, then what was; without `faults` only what concerns all of them."""
        texts = list[str]()
        judged = "pairs" if SWAPPED in self.detections else "answers"
        for name, one in self.detections.items() if faults else ():
            power = f"{name}: {one.recall[LEVELS[0]]:.0%} of {one.planted} planted ones are found at 1 % false alarms"
            if one.kinds:
                power += f" ({', '.join(f'{recall:.0%} {kind}' for kind, recall in one.kinds.items())})"
            if not one.usable:
                texts.append(f"{power}; rows do not differ enough from these to call any wrong")
            elif not one.evident:
                texts.append(f"{power}; there is no evidence of any in these rows, and at most {one.high:.1%} have one")
            else:
                rows = len(self.rows(name))
                texts.append(
                    f"{power}; about {one.rate:.1%} of the {judged} have one, at most {one.high:.1%}; {rows} listed"
                )
        for first, last, step in self.shifts:
            texts.append(
                f"rows {first} to {last} have the answers of the rows {'after' if step > 0 else 'before'} them"
            )
        return [*texts, *self.notes]


def look_at_answers(
    model: nn.Module,
    turns: Sequence[Turn],
    vocabulary: Vocabulary,
    compute: Compute,
    *,
    faults: Mapping[str, Callable[[str, str, np.random.Generator], str]] | None = None,
    seed: int = 0,
) -> AnswerLook:
    """Read the answers with a causal model, and judge them by faults planted in their copies.

    The model reads each answer behind its prompt and alone, at most PLANTED copies with each fault, and the suspects
    behind DECOYS other prompts. `faults` are functions (prompt, answer, rng) → answer by name, by default FAULTS. Pairs
    are judged for swapped sides alone: a rejected answer may have any fault.
    """
    look, rng = AnswerLook(list(turns)), np.random.default_rng([seed, 46])
    if len(turns) < LEAST_TURNS:
        look.notes.append(f"{len(turns)} answers are too few to judge; {LEAST_TURNS} are needed")
        return look
    if few_answers([turn.text for turn in turns]):
        look.notes.append(
            "the answers are few and repeat, as labels do; audit them as labels: "
            "tsqlora audit FILE --set data.text=PROMPT_COLUMN --set data.label=ANSWER_COLUMN"
        )
        return look

    def read(phase: str, samples: Sequence[Sample]) -> dict[str, np.ndarray]:
        look.tokens[phase] = sum(len(one.before) + len(one.answer) for one in samples)
        return read_answers(model, samples, vocabulary.stops, compute, phase=PHASES.get(phase, phase))

    if any(turn.side for turn in turns):
        _find_swapped(look, seed, read)
        return look

    folds = folds_of(turns, seed)
    planted = np.sort(rng.permutation(len(turns))[:PLANTED])
    cuts = np.array([cut_places(one, [vocabulary.tokens[j] for j in one.answer[:MOST_ANSWER]], rng) for one in turns])
    ends = np.array([len(one.answer) for one in turns])
    prompted = read(
        "prompted",
        [behind(one.prompt, one.answer, (end, *cut)) for one, end, cut in zip(turns, ends, cuts, strict=True)],
    )
    alone = read("alone", [behind(one.opening, one.answer) for one in turns])
    own = features_of(prompted, alone)
    _find_cut(look, prompted["stop"], ends, cuts, folds, rng)
    most = longest_prompt(model)
    _find_foreign(look, own, alone, folds, planted, rng, read, most=most)
    if long := sum(len(turn.prompt) > MOST_PROMPT for turn in turns):
        look.notes.append(
            f"{long:,} of {len(turns):,} prompts have more than {MOST_PROMPT} tokens: the model reads both ends, and "
            f"up to {most:,} tokens where an answer seems foreign"
        )
    for name, fault in (FAULTS if faults is None else faults).items():
        _find_planted(look, name, fault, own, folds, planted, vocabulary, rng, read)
    for turn in {int(j) for chosen in look.listed.values() for j in chosen}:
        look.losses[turn] = prompted["each"][turn, : len(turns[turn].answer)]
    return look


def _find_swapped(look: AnswerLook, seed: int, read: Read) -> None:
    """Pairs whose sides differ as those of most pairs do, the other way round."""
    last = {(turn.row, turn.side): turn for turn in look.turns}
    look.turns = [last[row, SIDES[0]] for row, side in last if side == SIDES[0] and (row, SIDES[1]) in last]
    if len(look.turns) < LEAST_TURNS:
        look.notes.append(f"{len(look.turns)} pairs are too few to judge; {LEAST_TURNS} are needed")
        return
    both = [last[turn.row, side] for side in SIDES for turn in look.turns]
    prompted = read("prompted", [behind(one.prompt, one.answer, (len(one.answer),)) for one in both])
    alone = read("alone", [behind(one.opening, one.answer) for one in both])
    chosen, rejected = np.split(np.hstack([features_of(prompted, alone), prompted["stop"]]), 2)
    folds = folds_of(look.turns, seed)
    # A pair that is swapped has the difference of its sides with the other sign.
    scores, planted = cross_fitted(chosen - rejected, rejected - chosen, folds, folds)
    _add(look, SWAPPED, np.arange(len(look.turns)), detect(scores, planted))


def _find_cut(
    look: AnswerLook, stops: np.ndarray, ends: np.ndarray, cuts: np.ndarray, folds: np.ndarray, rng: np.random.Generator
) -> None:
    """Cut in the middle: the model expects no stop there. Only answers that were read whole are judged."""
    judged = np.array([one.ends for one in look.turns]) & (ends <= MOST_ANSWER)
    kinds = [(j, k) for j in np.flatnonzero(judged) for k in (1, 2) if cuts[j, k - 1]]
    if judged.sum() < LEAST_TURNS or len(kinds) < LEAST_TURNS:
        look.notes.append("too few answers are whole and long enough to judge cuts")
        return
    turn, kind = np.array([kinds[j] for j in np.sort(rng.permutation(len(kinds))[:PLANTED])]).T
    each = [np.flatnonzero(judged & (cuts[:, k] > 0))[:PLANTED] for k in range(len(CUTS))]
    further = [(stops[rows, k + 1][:, None], folds[rows]) for k, rows in enumerate(each)]
    taught = stops[judged, :1], stops[turn, kind][:, None]
    scores, planted, *some = cross_fitted(*taught, folds[judged], folds[turn], *further)
    by_kind = {name: one for name, one in zip(CUTS, some, strict=True) if len(one) >= LEAST_TURNS}
    _add(look, CUT, np.flatnonzero(judged), detect(scores, planted, kinds=by_kind), taught=taught)


def _find_foreign(
    look: AnswerLook,
    own: np.ndarray,
    alone: dict[str, np.ndarray],
    folds: np.ndarray,
    planted: np.ndarray,
    rng: np.random.Generator,
    read: Read,
    *,
    most: int,
) -> None:
    """Another row's answer, whose own prompt is one of many equals."""
    turns, donors = look.turns, donors_of(look.turns, folds, planted, rng)
    planted, donors = planted[donors >= 0], donors[donors >= 0]
    if len(planted) < LEAST_TURNS:
        look.notes.append("too few answers differ enough to tell whose they are")
        return
    near = planted[np.linspace(0, len(planted) - 1, int(np.clip(len(planted) // 4, LEAST_TURNS, NEAR))).astype(int)]
    nearest = near_donors_of(turns, folds, near)
    near, nearest = near[nearest >= 0], nearest[nearest >= 0]

    def copies(phase: str, rows: np.ndarray, donors: np.ndarray) -> np.ndarray:
        some = [behind(turns[j].prompt, turns[k].answer) for j, k in zip(rows, donors, strict=True)]
        return features_of(read(phase, some), alone, donors)

    further = [(copies("near", near, nearest), folds[near])] if len(near) >= LEAST_TURNS else []
    taught = own, copies("foreign", planted, donors)
    scores, bad, *some = cross_fitted(*taught, folds, folds[planted], *further)
    detection = detect(scores, bad, kinds=dict(zip(["from the nearest prompt"], some, strict=False)), hard=some)
    order = np.argsort(-scores, kind="stable")[: round(SUSPECTS * len(turns))]
    suspects = order[detection.probability[order] > 0.5] if detection.usable else order[:0]
    fits, evident = np.ones(len(turns), np.bool_), False
    if len(suspects):
        others = [rng.choice(np.delete(np.arange(len(turns)), j), DECOYS, replace=False) for j in suspects]
        decoys = [
            behind(turns[k].prompt, turns[j].answer) for j, some in zip(suspects, others, strict=True) for k in some
        ]
        losses = read("decoys", decoys)["loss"].reshape(-1, DECOYS)
        behind_own = own[suspects, 0] * np.maximum(alone["tokens"][suspects], 1)
        some = [turns[j] for j in suspects]
        fits[suspects] = fits_own(some, behind_own, losses.min(1), partial(read, "whole"), most=most)
        evident = len(suspects) >= LEAST_SUSPECTS and bool(fits[suspects].mean() < 0.5)
    detection = replace(detection, evident=evident)
    _add(look, FOREIGN, np.arange(len(turns)), detection, fits, taught)
    if len(look.listed[FOREIGN]):
        _find_owners(look, read)


def _find_planted(
    look: AnswerLook,
    name: str,
    fault: Callable[[str, str, np.random.Generator], str],
    own: np.ndarray,
    folds: np.ndarray,
    planted: np.ndarray,
    vocabulary: Vocabulary,
    rng: np.random.Generator,
    read: Read,
) -> None:
    """A fault that a function makes of prompt and answer."""
    turns = look.turns
    texts = [(j, fault(turns[j].question, turns[j].text, rng)) for j in planted.tolist()]
    changed = [(j, text) for j, text in texts if text != turns[j].text]
    if len(changed) < LEAST_TURNS:
        look.notes.append(f"{name}: too few answers can have it")
        return
    rows = np.array([j for j, _ in changed])
    ids = vocabulary.tokenizer([text for _, text in changed], add_special_tokens=False)["input_ids"]
    answers = [np.asarray(one, np.int64) for one in ids]  # pyright: ignore[reportGeneralTypeIssues]
    prompted = read(name, [behind(turns[j].prompt, one) for j, one in zip(rows, answers, strict=True)])
    alone = read(f"{name} alone", [behind(turns[j].opening, one) for j, one in zip(rows, answers, strict=True)])
    taught = own, features_of(prompted, alone)
    scores, bad = cross_fitted(*taught, folds, folds[rows])
    _add(look, name, np.arange(len(turns)), detect(scores, bad), taught=taught)


def _add(
    look: AnswerLook,
    fault: str,
    judged: Int[np.ndarray, " k"],
    detection: Detection,
    fits: Bool[np.ndarray, " k"] | None = None,
    taught: tuple[Float[np.ndarray, "k d"], Float[np.ndarray, "m d"]] | None = None,
) -> None:
    """Add the result of the judged turns; `taught` are their features and those of planted faults."""
    chosen = listed(detection, np.zeros(len(judged), np.bool_) if fits is None else fits)
    if taught is not None and detection.usable:
        look.judges[fault] = FaultJudge.fit(*taught, detection, chosen)
    look.listed[fault] = judged[chosen]
    look.detections[fault] = detection.over(judged, len(look.turns))


def _find_owners(look: AnswerLook, read: Read) -> None:
    """Whose answers the foreign ones are: the neighbours' of their rows, or of the rows whose prompts are near."""
    turns, wrong = look.turns, look.listed[FOREIGN][:OWNERS].tolist()
    by_row = {turn.row: j for j, turn in reversed([*enumerate(turns)])}
    words = TfidfVectorizer(analyzer=words_of, sublinear_tf=True)  # pyright: ignore[reportArgumentType]
    prompts = words.fit_transform([turn.question for turn in turns])
    nearest = np.argsort(-(words.transform([turns[j].text for j in wrong]) @ prompts.T).toarray(), axis=1)[:, :3]
    candidates = [
        (j, k)
        for j, near in zip(wrong, nearest.tolist(), strict=True)
        for k in {*near, by_row.get(turns[j].row - 1, j), by_row.get(turns[j].row + 1, j), j}
    ]
    losses = read("owners", [behind(turns[k].prompt, turns[j].answer) for j, k in candidates])["loss"]
    best = defaultdict[int, list[tuple[float, int]]](list)
    for (j, k), loss in zip(candidates, losses.tolist(), strict=True):
        best[j].append((loss, k))
    look.owners = {j: turns[min(some)[1]].row for j, some in best.items() if min(some)[1] != j}
    shifted = defaultdict[int, list[int]](list)
    for j, owner in look.owners.items():
        shifted[owner - turns[j].row].append(turns[j].row)
    for step in (-1, 1):
        rows = sorted(shifted[step])
        groups = np.split(rows, np.flatnonzero(np.diff(rows) > 2 * FOLDS) + 1)
        look.shifts += [(int(g[0]), int(g[-1]), step) for g in groups if len(g) >= LEAST_SHIFTED]
    # Among answers that have moved, the others are foreign too if the neighbour's prompt fits them better.
    others = [
        (by_row[row], by_row[row + step])
        for first, last, step in look.shifts
        for row in range(first, last + 1)
        if row in by_row and row + step in by_row and by_row[row] not in wrong
    ]
    if others:
        losses = read("moved", [behind(turns[k].prompt, turns[j].answer) for j, m in others for k in (j, m)])["loss"]
        moved = [one for one, (own, other) in zip(others, losses.reshape(-1, 2), strict=True) if other < own]
        look.owners |= {j: turns[k].row for j, k in moved}
        more = np.array([j for j, _ in moved if j not in look.listed[FOREIGN]], np.int64)
        p = look.detections[FOREIGN].probability
        p[more] = np.maximum(p[more], p[look.listed[FOREIGN]].min())  # the answers around them are foreign
        look.listed[FOREIGN] = np.r_[look.listed[FOREIGN], more]
