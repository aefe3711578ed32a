"""Tokenise rows of texts, with loss on their targets alone."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from tsqlora.data.batches import IGNORED
from tsqlora.data.cells import Row
from tsqlora.data.formats import Format
from tsqlora.data.formats.chats import Chat, Example, Manner
from tsqlora.data.table import Samples, of_rows
from tsqlora.data.target_tokens import (
    Run,
    ended,
    pieces_of,
    plain_tokens,
    require_end,
    special_tokens,
    split_opening,
    target_tokens,
    tokens_of,
)
from tsqlora.data.tokenise import require_room, require_tokens
from tsqlora.errors import DataError

_SHOWN = 3
"""Rows that a note lists."""


@dataclass(frozen=True, slots=True)
class Tokenised:
    """A row's sample, whether it was cut, and the tokens that its target needs."""

    sample: dict[str, Any]
    cut: bool
    needs: int


def tokenise_generation(
    rows: Sequence[Row],
    format: Format,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    seq2seq: bool,
    with_targets: bool = True,
    measured: bool = False,
) -> Samples:
    """One sample a row, not padded: input_ids, attention_mask, and labels if `with_targets`.

    The input of a causal model is prompt and target, and labels are -100 outside targets. The input of a
    sequence-to-sequence model is the prompt, and its labels are the target. Targets end with the end token. No token
    spans prompt and target: the prompt alone, which `with_targets=False` makes, has the tokens of training.

    With `measured` a chat ends before its last answer, the reference of a generated one.

    A long prompt loses its beginning, after the tokens that open every text, and a long plain text its end;
    `truncated` counts both. A chat loses its oldest turns, and a turn that was cut has no loss. A row whose target
    does not fit whole is left out. Raises DataError with file and row for missing values and empty targets.
    """
    require_end(tokenizer, seq2seq=seq2seq)
    require_room(max_length, least_prompt(tokenizer) - 2, 2)
    manner = Manner(seq2seq=seq2seq, chat=bool(tokenizer.chat_template), targets=with_targets, measured=measured)
    examples = [format.read(row, manner) for row in rows]
    tokenised = (_seq2seq if seq2seq else _causal)(examples, rows, tokenizer, max_length)
    fitting = [i for i, one in enumerate(tokenised) if one.needs <= max_length]
    return of_rows(
        [tokenised[i].sample for i in fitting],
        [rows[i] for i in fitting],
        format.columns,
        truncated=sum(tokenised[i].cut for i in fitting),
        left_out=tuple((rows[i].place, one.needs) for i, one in enumerate(tokenised) if one.needs > max_length),
    )


def tokenise_pairs(
    rows: Sequence[Row], format: Format, tokenizer: PreTrainedTokenizerBase, *, max_length: int
) -> Samples:
    """One sample a preference row: both answers, each after its prompt, in one list, and where the second begins.

    A row is left out if one of its answers does not fit whole.
    """
    columns = format.columns
    swapped = replace(format, columns=replace(columns, text_pair=columns.label, label=columns.text_pair))
    chosen, rejected = (
        tokenise_generation(rows, one, tokenizer, max_length=max_length, seq2seq=False) for one in (format, swapped)
    )
    first, second = ({row: j for j, row in enumerate(split.ids.tolist())} for split in (chosen, rejected))
    both = [row for row in first if row in second]
    samples = list[dict[str, Any]]()
    for row in both:
        one, other = chosen[first[row]], rejected[second[row]]
        samples.append({key: [*one[key], *other[key]] for key in one} | {"second": len(one["input_ids"])})
    left_out = {place: needs for split in (chosen, rejected) for place, needs in split.left_out}
    return Samples(
        samples,
        tuple(chosen.hashes[first[row]] for row in both),
        max(chosen.truncated, rejected.truncated),
        np.array(both, dtype=np.int64),
        tuple(left_out.items()),
    )


def require_some(split: Samples, source: str, max_length: int) -> None:
    """Raises DataError if no target fits whole, so that no token would have a loss."""
    if not len(split):
        raise DataError(
            f"{source}: none of {len(split.left_out)} targets fits whole into {max_length} tokens; "
            f"raise data.max_length to {min(needs for _, needs in split.left_out)} or more"
        )


def left_out(split: Samples) -> list[str]:
    """A note that counts the rows left out and lists the first, if there are any."""
    if not split.left_out:
        return []
    count, first = len(split.left_out), ", ".join(place for place, _ in split.left_out[:_SHOWN])
    more = ", …" if count > _SHOWN else ""
    return [f"{count} of {len(split) + count} rows are left out, whose targets do not fit whole: {first}{more}"]


PLAINLY = Manner(seq2seq=False, chat=False)


def references(rows: Iterable[Row], format: Format) -> list[str]:
    """Each row's target, of a chat the last assistant turn, without white space around it."""
    return [_last_target(format.read(row, PLAINLY)).strip() for row in rows]


def input_of(row: Row, format: Format) -> str:
    """A row's input as text: the prompt, or a chat's turns before the last answer.

    Of a row without a prompt, such as plain text, the whole text.
    """
    example = format.read(row, PLAINLY)
    if isinstance(example, Example):
        return example.prompt or str(example.target)
    before = example.turns[:-1]
    # Answers to one system prompt alone would all have the same input.
    lone = all(turn.role == "system" for turn in before)
    return json.dumps([(turn.role, turn.content) for turn in (example.turns if lone else before)])


def _causal(
    examples: Sequence[Example | Chat], rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> list[Tokenised]:
    pieces = [pieces_of(example, tokenizer, rows[i].place) for i, example in enumerate(examples)]
    tokenised = []
    for i, (example, runs) in enumerate(zip(examples, tokens_of(pieces, tokenizer), strict=True)):
        require_tokens(runs[-1].ids, rows[i].place)
        tokenised.append(causal_sample(example, runs, tokenizer, max_length))
    return tokenised


def causal_sample(
    example: Example | Chat, runs: Sequence[Run], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> Tokenised:
    """Make one sample of a causal model: an opening, which is never cut, and the runs, cut to the rest."""
    if isinstance(example, Chat):  # the template writes the special tokens
        opening, runs = split_opening(runs, tokenizer)
    else:
        opening, runs = special_tokens(tokenizer)[0], ended(runs, tokenizer)
    return _continued(runs, opening, max_length)


def _continued(runs: Sequence[Run], opening: list[int], max_length: int) -> Tokenised:
    """One sample of a causal model: the opening, which is never cut, and the runs, cut to the rest."""
    room, total = max_length - len(opening), sum(len(run.ids) for run in runs)
    plain = len(runs) == 1 and runs[0].trained
    over = 0 if plain else max(0, total - room)
    ids, labels = [], []
    for run in runs:
        # A target without its beginning would be learned without what leads to it.
        trained = run.trained and len(ids) >= over
        labels += run.ids if trained else [IGNORED] * len(run.ids)
        ids += run.ids
    span = slice(over, over + room)
    input_ids = [*opening, *ids[span]]
    sample: dict[str, Any] = {"input_ids": input_ids, "attention_mask": [1] * len(input_ids)}
    if not runs or not runs[-1].trained:
        return Tokenised(sample, total > room, 0)
    needs = 0 if plain else len(opening) + len(runs[-1].ids) + 1
    labels = [*[IGNORED] * len(opening), *labels[span]]
    labels[0] = IGNORED  # nothing predicts the first token
    return Tokenised({**sample, "labels": labels}, total > room, needs)


def _seq2seq(
    examples: Sequence[Example | Chat], rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> list[Tokenised]:
    front, back = special_tokens(tokenizer)
    room = max_length - len(front) - len(back)
    sides = [(one.prompt, one.target) for one in examples if isinstance(one, Example)]
    assert len(sides) == len(examples), "formats refuse chats for sequence-to-sequence models"
    sources = plain_tokens([prompt for prompt, _ in sides], tokenizer)
    targets = target_tokens([target for _, target in sides if target is not None], tokenizer)
    special, tokenised = set(tokenizer.all_special_ids), []
    for i, ids in enumerate(sources):
        require_tokens(ids, rows[i].place)
        input_ids = [*front, *ids[-room:], *back]
        sample: dict[str, Any] = {"input_ids": input_ids, "attention_mask": [1] * len(input_ids)}
        if targets:
            require_tokens([token for token in targets[i] if token not in special], rows[i].place)
            sample["labels"] = targets[i]
        tokenised.append(Tokenised(sample, len(ids) > room, len(targets[i]) if targets else 0))
    return tokenised


def least_prompt(tokenizer: PreTrainedTokenizerBase) -> int:
    """The least tokens that leave room for text: the special ones, and two."""
    return sum(map(len, special_tokens(tokenizer))) + 2


def _last_target(example: Example | Chat) -> str:
    if isinstance(example, Chat):
        return next(turn.content for turn in reversed(example.turns) if turn.role == "assistant")
    assert example.target is not None
    return example.target
