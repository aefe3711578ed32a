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

from tsqlora.auditing.texts.among import words_of
from tsqlora.auditing.texts.answers import (
    MOST_ANSWER,
    MOST_PROMPT,
    Read,
    Sample,
    Turn,
    behind,
    ends_of,
    features_of,
    fits_own,
    longest_prompt,
    read_answers,
    views,
)
from tsqlora.auditing.texts.faults import (
    FAULTS,
    FOLDS,
    PLANTED,
    SHARE,
    Detection,
    FaultJudge,
    cross_fitted,
    cut_place,
    detect,
    donors_of,
    folds_of,
    judged,
    plantings,
)
from tsqlora.auditing.texts.prepared import SIDES
from tsqlora.auditing.texts.vocabulary import Vocabulary
from tsqlora.libs.shapes import Bool, Float, Int
from tsqlora.model.request import Compute

FOREIGN, CUT, SWAPPED = "foreign_answer", "cut_answer", "swapped_pair"
SAMPLE = 2_000
"""Rows that are looked at by default."""
LEAST_TURNS = 50
"""With fewer answers nothing is judged."""
DECOYS, POOL = 8, 64
"""Other prompts that suspects are read behind, and planted faults that are, to measure what could have been found."""
OWNERS, LEAST_SHIFTED = 200, 5
CALIBRATED, LIKELIER = 0.75, 20
"""Share of whole answers behind which a stop must be so many times likelier than where the same answer is cut."""
PHASES = {
    "prompted": "answers with their prompts",
    "alone": "answers alone",
    "foreign": "planted faults",
    "decoys": "answers under other prompts",
    "whole": "answers under whole prompts",
    "owners": "whose answers they are",
    "moved": "answers beside these",
}
"""What a progress bar calls each pass."""
Losses = Mapping[tuple[int, str], Mapping[int, float]]
"""By row and side of a pair: −log p of a token, by its place in the sequence."""


@dataclass(slots=True)
class AnswerLook:
    """The results for each turn, by the name of the fault."""

    turns: list[Turn]
    detections: dict[str, Detection] = field(default_factory=dict)
    judges: dict[str, FaultJudge] = field(default_factory=dict)
    """By a fault that can be found: what judges turns that the look has not seen."""
    owners: dict[int, int] = field(default_factory=dict)
    """By turn: the row whose prompt its answer fits best."""
    losses: dict[int, Float[np.ndarray, " t"]] = field(default_factory=dict)
    """By turn that is called wrong: −log p of each of its answer's tokens that were read."""
    shifts: list[tuple[int, int, int]] = field(default_factory=list)
    """First row, last row, and by how many rows their answers are shifted."""
    read: int = 0
    """Answers that the model read, over all passes."""
    tokens: dict[str, int] = field(default_factory=dict)
    """Tokens that the model read, by pass."""
    notes: list[str] = field(default_factory=list)

    @property
    def lists(self) -> bool:
        """Whether any answer is called wrong."""
        return any(len(one.listed) for one in self.detections.values())

    def rows(self, fault: str) -> dict[int, float]:
        """Rows that are called wrong, and the probability of the worst turn of each."""
        rows = dict[int, float]()
        if one := self.detections.get(fault):
            for turn in one.listed:
                row = self.turns[turn].row
                rows[row] = max(rows.get(row, 0.0), float(one.probability[turn]))
        return rows

    def by_token(self) -> Losses:
        """The losses of answers that are called wrong, by row and place."""
        losses = dict[tuple[int, str], dict[int, float]]()
        for j, each in self.losses.items():
            turn = self.turns[j]
            places = len(turn.prompt) + ends_of(len(turn.answer))
            losses.setdefault((turn.row, turn.side), {}).update(zip(places.tolist(), each.tolist(), strict=True))
        return losses

    def summary(self) -> dict[str, Any]:
        """The look in findings.json, in the scores' record and in the terminal."""
        faults = {
            name: {
                "planted": one.planted,
                "recall": {"mean": one.recall, "between": list(one.between), "right": one.right}
                if one.usable
                else None,
                "rate": one.rate if one.usable else None,
                "high": one.high,
                "listed": len(self.rows(name)),
            }
            for name, one in self.detections.items()
        }
        about = {"turns": len(self.turns), "tokens": self.tokens, "faults": faults, "shifts": self.shifts}
        return {**about, "notes": self.notes, "says": self.sentences()}

    def sentences(self, *, faults: bool = True) -> list[str]:
        """Say first which faults the model cannot tell, then what it lists; without `faults` only what concerns all."""
        texts = list[str]()
        of = "pairs" if SWAPPED in self.detections else "answers"
        by_power = sorted(self.detections.items(), key=lambda item: item[1].usable)
        for name, one in by_power if faults else ():
            if not one.usable:
                texts.append(f"{name}: this model cannot tell which {of} have it, and calls none wrong")
                continue
            low, high = one.between
            could = (
                f"If {SHARE:.0%} of the {of} had it, this look would list {one.recall:.0%} of those "
                f"({low:.0%} to {high:.0%}), and {one.right:.1g} right ones"
            )
            share = f"about {one.rate:.1%} of the {of}" if len(one.listed) else f"at most {one.high:.1%} of the {of}"
            texts.append(f"{name}: {len(self.rows(name)):,} rows are likely wrong; {share} have it. {could}")
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
    seed: int = 0,
) -> AnswerLook:
    """Read the answers with a causal model, and judge them by faults planted in their copies.

    The model reads each answer behind its prompt and alone, at most PLANTED copies with each fault, and the suspects
    behind DECOYS other prompts. Pairs are judged for swapped sides alone: a rejected answer may have any fault.
    """
    look, rng = AnswerLook(list(turns)), np.random.default_rng([seed, 46])
    if len(turns) < LEAST_TURNS:
        look.notes.append(f"{len(turns)} answers are too few to judge; {LEAST_TURNS} are needed")
        return look
    if len({turn.text for turn in turns}) < max(20, len(turns) // 20):
        look.notes.append(
            "the answers are few and repeat, as labels do; audit them as labels: "
            "tsqlora audit FILE --set data.text=PROMPT_COLUMN --set data.label=ANSWER_COLUMN"
        )
        return look

    def read(phase: str, samples: Sequence[Sample]) -> dict[str, np.ndarray]:
        look.read += len(samples)
        look.tokens[phase] = sum(len(one.before) + len(one.answer) for one in samples)
        return read_answers(model, samples, vocabulary.stops, compute, phase=PHASES.get(phase, phase))

    if any(turn.side for turn in turns):
        _find_swapped(look, seed, read)
        return look

    folds = folds_of(turns, seed)
    planted = np.sort(rng.permutation(len(turns))[:PLANTED])
    shown = [one.answer[ends_of(len(one.answer))] for one in turns]
    cuts = np.array([cut_place([vocabulary.tokens[j] for j in some], rng) for some in shown])
    places = [(len(some), int(cut)) for some, cut in zip(shown, cuts, strict=True)]
    prompted, alone, own = views(turns, read, places)
    _find_cut(look, prompted["stop"], cuts > 0, folds, rng)
    most = longest_prompt(model)
    _find_foreign(look, own, alone, folds, planted, rng, read, most=most)
    if long := sum(len(turn.prompt) > MOST_PROMPT for turn in turns):
        look.notes.append(
            f"{long:,} of {len(turns):,} prompts have more than {MOST_PROMPT} tokens: the model reads both ends, and "
            f"up to {most:,} tokens where an answer seems foreign"
        )
    if long := sum(len(turn.answer) > MOST_ANSWER for turn in turns):
        look.notes.append(
            f"{long:,} of {len(turns):,} answers have more than {MOST_ANSWER} tokens: the model reads the first "
            f"{MOST_ANSWER // 2} and the last {MOST_ANSWER // 2}, and not what is between them"
        )
    for name, fault in FAULTS.items():
        _find_planted(look, name, fault, own, folds, planted, vocabulary, rng, read)
    for turn in {int(j) for one in look.detections.values() for j in one.listed}:
        look.losses[turn] = prompted["each"][turn, : len(shown[turn])]
    return look


def _find_swapped(look: AnswerLook, seed: int, read: Read) -> None:
    """Pairs whose sides differ as those of most pairs do, the other way round."""
    last = {(turn.row, turn.side): turn for turn in look.turns}
    look.turns = [last[row, SIDES[0]] for row, side in last if side == SIDES[0] and (row, SIDES[1]) in last]
    if len(look.turns) < LEAST_TURNS:
        look.notes.append(f"{len(look.turns)} pairs are too few to judge; {LEAST_TURNS} are needed")
        return
    both = [last[turn.row, side] for side in SIDES for turn in look.turns]
    prompted, _, features = views(both, read, [(min(len(one.answer), MOST_ANSWER),) for one in both])
    chosen, rejected = np.split(np.hstack([features, prompted["stop"]]), 2)
    folds = folds_of(look.turns, seed)
    # A pair that is swapped has the difference of its sides with the other sign.
    scores, planted = cross_fitted(chosen - rejected, rejected - chosen, folds, folds)
    _add(look, SWAPPED, np.arange(len(look.turns)), detect(scores, planted))


def _find_cut(
    look: AnswerLook,
    stops: Float[np.ndarray, "n 2"],
    cut: Bool[np.ndarray, " n"],
    folds: np.ndarray,
    rng: np.random.Generator,
) -> None:
    """Cut in the middle: the model expects no stop there. Answers that a stop follows are judged.

    `stops` are its log-probabilities where an answer ends, and where it may be `cut`.
    """
    whole = np.array([one.ends for one in look.turns])
    planted = rng.permutation(np.flatnonzero(whole & cut))
    if len(planted) < LEAST_TURNS:
        look.notes.append("too few answers are whole and long enough to judge cuts")
        return
    # A model that was not trained to stop, or not on this template, ranks the ends of answers by anything else.
    calibrated = (stops[planted, 0] - stops[planted, 1] > np.log(LIKELIER)).mean() >= CALIBRATED
    planted = planted[:PLANTED]
    taught = stops[whole, :1], stops[planted, 1:]
    scores, bad = cross_fitted(*taught, folds[whole], folds[planted])
    detection = detect(scores, bad)
    unable = replace(detection, recall=0.0, listed=detection.listed[:0])
    _add(look, CUT, np.flatnonzero(whole), detection if calibrated else unable, taught)


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
    copies = [behind(turns[j].prompt, turns[k].answer) for j, k in zip(planted, donors, strict=True)]
    taught = own, features_of(read("foreign", copies), alone, donors)
    scores, bad = cross_fitted(*taught, folds, folds[planted])
    # Rows that are suspects as they are, or among planted faults in their place; these stand behind the rows.
    every, n = np.concatenate([scores, bad]), len(turns)
    tables = plantings(n, np.linspace(0, len(bad) - 1, min(len(bad), POOL)).astype(int))
    suspects = np.unique(np.concatenate([table[judged(every[table], bad).suspects] for table in tables]))
    fits = np.ones(len(every), np.bool_)
    if len(suspects):
        prompts, answers = np.r_[np.arange(n), planted], np.r_[np.arange(n), donors]
        others = [rng.choice(np.delete(np.arange(n), prompts[j]), DECOYS, replace=False) for j in suspects]
        decoys = [
            behind(turns[k].prompt, turns[answers[j]].answer)
            for j, some in zip(suspects, others, strict=True)
            for k in some
        ]
        losses = read("decoys", decoys)["loss"].reshape(-1, DECOYS)
        behind_own = np.concatenate(taught)[suspects, 0] * np.maximum(alone["tokens"][answers[suspects]], 1)
        some = [replace(turns[prompts[j]], answer=turns[answers[j]].answer) for j in suspects]
        fits[suspects] = fits_own(some, behind_own, losses.min(1), partial(read, "whole"), most=most)
    _add(look, FOREIGN, np.arange(n), detect(scores, bad, tables, fits), taught)
    if len(look.detections[FOREIGN].listed):
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
    ids: Any = vocabulary.tokenizer([text for _, text in changed], add_special_tokens=False)["input_ids"]
    copies = [replace(turns[j], answer=np.asarray(one, np.int64)) for j, one in zip(rows, ids, strict=True)]
    *_, bad = views(copies, read, phases=(name, f"{name} alone"))
    taught = own, bad
    scores, bad = cross_fitted(*taught, folds, folds[rows])
    _add(look, name, np.arange(len(turns)), detect(scores, bad), taught)


def _add(
    look: AnswerLook,
    fault: str,
    judged: Int[np.ndarray, " k"],
    detection: Detection,
    taught: tuple[Float[np.ndarray, "k d"], Float[np.ndarray, "m d"]] | None = None,
) -> None:
    """Add the result of the judged turns; `taught` are their features and those of planted faults."""
    if taught is not None and detection.usable:
        look.judges[fault] = FaultJudge.fit(*taught, detection)
    look.detections[fault] = detection.over(judged, len(look.turns))


def _find_owners(look: AnswerLook, read: Read) -> None:
    """Whose answers the foreign ones are: the neighbours' of their rows, or of the rows whose prompts are near."""
    turns, foreign = look.turns, look.detections[FOREIGN]
    wrong = foreign.listed[:OWNERS].tolist()
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
        more = np.array([j for j, _ in moved if j not in foreign.listed], np.int64)
        p = foreign.probability
        p[more] = np.maximum(p[more], p[foreign.listed].min())  # the answers around them are foreign
        look.detections[FOREIGN] = replace(foreign, listed=np.r_[foreign.listed, more])
