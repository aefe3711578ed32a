"""Answers that do not fit: a look before a training, scores without them, and rows that the look was not taken at."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, replace
from functools import partial
from typing import Any

import numpy as np
from torch import nn

from tsqlora import distributed
from tsqlora.auditing.scores import REASONS, Scores, from_terms
from tsqlora.auditing.texts.answers import (
    MOST_ANSWER,
    Sample,
    Turn,
    behind,
    common_end,
    fits_own,
    longest_prompt,
    opened,
    read_answers,
    stretches,
    turns_in,
    views,
)
from tsqlora.auditing.texts.faults import SHARE, FaultJudge
from tsqlora.auditing.texts.look import CUT, DECOYS, FOREIGN, PHASES, SAMPLE, SWAPPED, AnswerLook, look_at_answers
from tsqlora.auditing.texts.prepared import is_packed, sequences_of
from tsqlora.auditing.texts.vocabulary import Vocabulary
from tsqlora.model.request import Compute, RowNames
from tsqlora.rows.datasets import Dataset
from tsqlora.tasks import Collate

UNFIT, OTHER = {FOREIGN: "foreign answer", CUT: "cut answer", SWAPPED: "swapped pair"}, "unfit answer"
"""Reasons for which rows are left out, by fault."""
PACKED = "rows are packed: one with a wrong answer is left out whole; packing=False leaves out that answer alone"
OF_ANSWERS = {*UNFIT.values(), OTHER}


def look_before(
    model: nn.Module,
    samples: Any,
    vocabulary: Vocabulary,
    compute: Compute,
    *,
    collate: Collate | None = None,
    seed: int = 0,
) -> AnswerLook:
    """Look at the answers of SAMPLE prepared samples, and of all where a fault is evident among these."""
    order, look = np.random.default_rng([seed, 45]).permutation(len(samples)), AnswerLook([])
    for some in (order[:SAMPLE], order):
        places = np.sort(some).tolist()
        sequences = [replace(one, row=j) for j in places for one in sequences_of([samples[j]], collate)]
        look = look_at_answers(model, turns_in(sequences, vocabulary), vocabulary, compute, seed=seed)
        look.notes += [PACKED] if is_packed(sequences) else []
        if len(places) == len(samples) or not look.lists:
            break
    return look


def even_scores(samples: Any, collate: Collate | None, rows: RowNames, answers: AnswerLook, *, seed: int) -> Scores:
    """Draw evenly from all rows whose answers fit."""
    trained = np.zeros(len(samples), np.int64)
    for one in sequences_of(samples, collate):
        trained[one.row] += len(one.trained)
    scores = from_terms(
        {},
        labels=trained,
        stratified=False,
        weights={},
        temperature=1.0,
        even=True,
        record={"seed": seed, "step": 0, "epoch": 0, "look": 1, **rows.about},
        hashes=rows.hashes,
        ids=rows.ids,
    )
    return without_unfit(scores, answers)


def in_one_line(look: AnswerLook, dropped: Mapping[str, int], rows: int) -> str:
    """Say how many of the rows are left out and why, and what the look can find.

    >>> in_one_line(AnswerLook([]), {"foreign answer": 12, "duplicate": 1}, 240)
    "of 240 rows these are left out: 12 as 'foreign answer'"
    """
    why = ", ".join(f"{count} as '{reason}'" for reason, count in dropped.items() if reason in OF_ANSWERS)
    unseen = ", ".join(name for name, one in look.detections.items() if not one.usable)
    finds = ", ".join(f"{one.recall:.0%} of {name}" for name, one in look.detections.items() if one.usable)
    parts = [
        f"this model cannot tell which rows have {unseen}" if unseen else "",
        f"of {rows:,} rows these are left out: {why}" if why else f"no row of {rows:,} is left out for its answer",
        f"with {SHARE:.0%} of the rows faulty, the look would find {finds}" if finds else "",
    ]
    return "; ".join(filter(None, parts))


def without_unfit(scores: Scores, look: AnswerLook) -> Scores:
    """Return the scores without the rows that a look calls wrong, at most half of all, the likeliest first."""
    unfit = [(p, row, fault) for fault in look.detections for row, p in look.rows(fault).items()]
    chosen = sorted(unfit, key=lambda one: (-one[0], one[1]))
    chosen = chosen[: max(0, len(scores) // 2 - int((~scores.kept).sum()))]
    p_wrong = np.zeros(len(scores))
    for p, row, _ in chosen:
        p_wrong[row] = max(p_wrong[row], p)
    for fault in dict.fromkeys(fault for *_, fault in chosen):
        mask = np.zeros(len(scores), np.bool_)
        mask[[row for _, row, other in chosen if other == fault]] = True
        scores = scores.drop(mask, UNFIT.get(fault, OTHER))
    predictions = {**scores.predictions, "wrong_probability": p_wrong} if chosen else scores.predictions
    return replace(scores, predictions=predictions).noted(answers=look.summary())


def answers_of(look: AnswerLook, vocabulary: Vocabulary, rows: int) -> dict[str, np.ndarray]:
    """Return what judges answers by themselves as arrays, for the folder of a look; nothing if it judged none."""
    if not look.turns or any(turn.side for turn in look.turns):
        return {}
    prompts = [turn.prompt for turn in look.turns]
    decoys = [prompts[j] for j in np.linspace(0, len(prompts) - 1, DECOYS).astype(int)]
    own = np.full(rows, np.nan)
    for name in look.judges:
        for turn, p in zip(look.turns, look.detections[name].probability.tolist(), strict=True):
            own[turn.row] = np.fmax(own[turn.row], p)
    judges = {f"{fault}.{name}": x for fault, judge in look.judges.items() for name, x in asdict(judge).items()}
    return judges | {
        "own": own,
        "opening": common_end(prompts).astype(np.int64),
        "bos": np.array([-1 if vocabulary.bos is None else vocabulary.bos]),
        "stops": np.array(sorted(vocabulary.stops), np.int64),
        "empty": np.array(sorted(vocabulary.empty), np.int64),
        "decoys": np.concatenate(decoys),
        "decoy_lengths": np.array([len(prompt) for prompt in decoys]),
    }


def answer_columns(
    model: nn.Module,
    made: Mapping[str, np.ndarray],
    scores: Scores,
    dataset: Dataset,
    collate: Collate | None,
    *,
    rows: RowNames,
    compute: Compute,
) -> dict[str, np.ndarray]:
    """Return the columns of `SavedLook.of` for rows with answers, and their numbers of trained tokens as `labels`.

    `made` has the judges of a look with these scores (`answers_of`).
    """
    distributed.require_whole(model)
    n = len(dataset)
    stops, empty = ({*made[name].tolist()} for name in ("stops", "empty"))
    turns, trained = list[Turn](), np.zeros(n, np.int64)
    for one in sequences_of(dataset, collate):
        trained[one.row] += len(one.trained)
        for _, start, end, ends in stretches(one, stops, empty):
            if start < end:
                turns.append(Turn(one.row, "", one.ids[:start], one.ids[:0], one.ids[start:end], ends, "", ""))
    turns = opened(turns, made["opening"], int(made["bos"][0]))
    columns = {"loss": np.full(n, np.nan), "wrong_probability": np.full(n, np.nan)}
    columns["reason"] = np.full(n, "kept", dtype="U20")
    if turns:
        _judge(distributed.unwrapped(model), turns, made, compute, columns)
    places = {name: j for j, name in enumerate(scores.hashes or ())}
    for here, name in enumerate(rows.hashes or ()):
        there = places.get(name)
        if there is not None and not np.isnan(made["own"][there]):  # nan: the look has not read it
            columns["wrong_probability"][here] = made["own"][there]
            columns["reason"][here] = REASONS[scores.reason_codes[there]]
    return {"labels": trained, **columns}


def _judge(
    model: nn.Module,
    turns: Sequence[Turn],
    made: Mapping[str, np.ndarray],
    compute: Compute,
    columns: dict[str, np.ndarray],
) -> None:
    """Fill the columns of the turns' rows; a suspect is foreign if it is likelier behind one of the look's prompts."""

    def read(phase: str, samples: Sequence[Sample]) -> dict[str, np.ndarray]:
        return read_answers(model, samples, made["stops"].tolist(), compute, phase=PHASES[phase])

    prompted, _, features = views(turns, read, [(min(len(turn.answer), MOST_ANSWER),) for turn in turns])
    row = np.array([turn.row for turn in turns])
    sums = [np.bincount(row, prompted[name], len(columns["loss"])) for name in ("loss", "tokens")]
    columns["loss"] = np.divide(*sums, out=columns["loss"], where=sums[1] > 0)
    whole = np.array([turn.ends for turn in turns])
    for fault in dict.fromkeys(name.rpartition(".")[0] for name in made if "." in name):
        judge = FaultJudge(**{part.name: made[f"{fault}.{part.name}"] for part in fields(FaultJudge)})
        judged = np.flatnonzero(whole if fault == CUT else np.ones(len(turns), np.bool_))
        p, wrong = judge.of((prompted["stop"] if fault == CUT else features)[judged])
        np.fmax.at(columns["wrong_probability"], row[judged], p)
        suspects = judged[wrong]
        if fault == FOREIGN and len(suspects):
            some = [turns[j] for j in suspects]
            prompts = np.split(made["decoys"], np.cumsum(made["decoy_lengths"])[:-1])
            losses = read("decoys", [behind(prompt, turn.answer) for turn in some for prompt in prompts])["loss"]
            same = np.array([np.array_equal(turn.prompt, prompt) for turn in some for prompt in prompts])
            others = np.where(same, np.inf, losses).reshape(-1, len(prompts)).min(1)
            own = prompted["loss"][suspects]
            suspects = suspects[~fits_own(some, own, others, partial(read, "whole"), most=longest_prompt(model))]
        chosen = row[suspects]
        columns["reason"][chosen[columns["reason"][chosen] == "kept"]] = UNFIT.get(fault, OTHER)
