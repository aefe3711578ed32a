"""Rows -> tokenised samples of which only the targets are trained on."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from tsqlora.data.batches import IGNORED
from tsqlora.data.cells import row_hash
from tsqlora.data.formats import Format
from tsqlora.data.formats.example import Chat, Example, Manner
from tsqlora.data.rows import Rows
from tsqlora.data.samples import TokenisedSplit
from tsqlora.data.target_tokens import (
    Run,
    ended,
    pieces_of,
    plain_tokens,
    require_end,
    special_tokens,
    split_opening,
    tokens_of,
    written_tokens,
)
from tsqlora.data.tokenise import require_room, require_tokens
from tsqlora.errors import DataError

_SHOWN = 3
"""Rows that a note names."""


@dataclass(frozen=True, slots=True)
class Made:
    """What became of a row: its sample, whether it was cut, and the tokens that its target needs."""

    sample: dict[str, Any]
    cut: bool
    needs: int


def tokenise_generation(
    rows: Rows,
    format: Format,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    seq2seq: bool,
    with_targets: bool = True,
    measured: bool = False,
    max_target_length: int | None = None,
) -> TokenisedSplit:
    """One sample a row, not padded: input_ids, attention_mask, and labels where targets are read.

    A causal model's input is prompt and target, and the labels of what is not trained on are -100.
    A sequence-to-sequence model's is the prompt, and its labels are the target, of at most
    `max_target_length` tokens (`max_length` if None). Targets end with the end token. Prompt and
    target meet between two tokens: the prompt alone, which is what `with_targets=False` makes, has
    the tokens that it was trained with.

    With `measured` a chat ends before its last answer, with which what is written will be compared.

    Too long a prompt is cut on the left, after the tokens that open every text, and too long a
    plain text on the right; `truncated` counts both. Of a chat the oldest turns go first, and a
    turn that was cut is not trained on. A row whose target does not fit whole is left out. Raises
    DataError with file and row for what a row lacks, and for targets that are empty.
    """
    made = _make(rows, format, tokenizer, max_length, seq2seq=seq2seq, with_targets=with_targets, measured=measured)
    most, _ = _room_of_targets(max_length, max_target_length, seq2seq=seq2seq)
    used = asdict(format.columns)
    fitting = [i for i, one in enumerate(made) if one.needs <= most]
    return TokenisedSplit(
        [made[i].sample for i in fitting],
        tuple(row_hash(rows.rows[i], used) for i in fitting),
        sum(made[i].cut for i in fitting),
        rows.ids[fitting],
        tuple((rows.place(i), one.needs) for i, one in enumerate(made) if one.needs > most),
    )


def _room_of_targets(max_length: int, max_target_length: int | None, *, seq2seq: bool) -> tuple[int, str]:
    """How many tokens a target may have, and the setting that says so."""
    if seq2seq and max_target_length:
        return max_target_length, "data.max_target_length"
    return max_length, "data.max_length"


def require_some(
    split: TokenisedSplit, source: str, max_length: int, max_target_length: int | None, seq2seq: bool
) -> None:
    """Raises DataError where no target fits whole, so that no token would be trained on."""
    if len(split):
        return
    most, setting = _room_of_targets(max_length, max_target_length, seq2seq=seq2seq)
    raise DataError(
        f"{source}: no token would be trained on: none of {len(split.left_out)} targets fits whole into {most} tokens; "
        f"raise {setting} to {min(needs for _, needs in split.left_out)} or more"
    )


def left_out(split: TokenisedSplit) -> str | None:
    """For a note: how many rows were left out, and where the first of them are; None where none was."""
    if not split.left_out:
        return None
    count, first = len(split.left_out), ", ".join(place for place, _ in split.left_out[:_SHOWN])
    more = ", …" if count > _SHOWN else ""
    return f"{count} of {len(split) + count} rows are left out, whose targets do not fit whole: {first}{more}"


def references(rows: Rows, format: Format) -> list[str]:
    """What each row says is to be written: its target, of a chat the assistant's last turn; no space around it."""
    examples = (format.read(rows, i, Manner(seq2seq=False, chat=False)) for i in range(len(rows)))
    return [_last_target(example).strip() for example in examples]


def inputs(rows: Rows, format: Format) -> list[str]:
    """What each row's answer goes on from, as text: the prompt, or a chat's turns before the last answer.

    Of a row without any, such as plain text, all that it says.
    """
    examples = (format.read(rows, i, Manner(seq2seq=False, chat=False)) for i in range(len(rows)))
    return [_input(example) for example in examples]


def _make(
    rows: Rows,
    format: Format,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    *,
    seq2seq: bool,
    with_targets: bool,
    measured: bool = False,
) -> list[Made]:
    require_end(tokenizer, seq2seq=seq2seq)
    require_room(max_length, least_prompt(tokenizer) - 2, 2)
    manner = Manner(seq2seq=seq2seq, chat=bool(tokenizer.chat_template), targets=with_targets, measured=measured)
    examples = [format.read(rows, i, manner) for i in range(len(rows))]
    if seq2seq:
        return _seq2seq(examples, rows, tokenizer, max_length)
    return _causal(examples, rows, tokenizer, max_length)


def _causal(
    examples: Sequence[Example | Chat], rows: Rows, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> list[Made]:
    front, _ = special_tokens(tokenizer)
    pieces = [pieces_of(example, tokenizer, rows.place(i)) for i, example in enumerate(examples)]
    made = []
    for i, (example, runs) in enumerate(zip(examples, tokens_of(pieces, tokenizer), strict=True)):
        require_tokens(runs[-1].ids, rows.place(i))
        if isinstance(example, Chat):  # the template writes special tokens itself
            opening, runs = split_opening(runs, tokenizer)
        else:
            opening, runs = front, ended(runs, tokenizer)
        made.append(_continued(runs, opening, max_length))
    return made


def _continued(runs: Sequence[Run], opening: list[int], max_length: int) -> Made:
    """One sample of a causal model: the opening, which is never cut, and the runs, cut to what is left."""
    room, total = max_length - len(opening), sum(len(run.ids) for run in runs)
    plain = len(runs) == 1 and runs[0].trained
    over = 0 if plain else max(0, total - room)
    ids, labels = [], []
    for run in runs:
        # A target that lost its beginning would be learned without what leads to it.
        trained = run.trained and len(ids) >= over
        labels += run.ids if trained else [IGNORED] * len(run.ids)
        ids += run.ids
    kept = slice(over, over + room)
    input_ids = [*opening, *ids[kept]]
    sample: dict[str, Any] = {"input_ids": input_ids, "attention_mask": [1] * len(input_ids)}
    if not runs or not runs[-1].trained:
        return Made(sample, total > room, 0)
    needs = 0 if plain else len(opening) + len(runs[-1].ids) + 1
    known = [*[IGNORED] * len(opening), *labels[kept]]
    known[0] = IGNORED  # it follows from nothing
    return Made({**sample, "labels": known}, total > room, needs)


def _seq2seq(
    examples: Sequence[Example | Chat], rows: Rows, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> list[Made]:
    front, back = special_tokens(tokenizer)
    room = max_length - len(front) - len(back)
    sides = [(one.prompt, one.target) for one in examples if isinstance(one, Example)]
    assert len(sides) == len(examples), "formats refuse chats for sequence-to-sequence models"
    sources = plain_tokens([prompt for prompt, _ in sides], tokenizer)
    written = written_tokens([target for _, target in sides if target is not None], tokenizer)
    special, made = set(tokenizer.all_special_ids), []
    for i, ids in enumerate(sources):
        require_tokens(ids, rows.place(i))
        input_ids = [*front, *ids[-room:], *back]
        sample: dict[str, Any] = {"input_ids": input_ids, "attention_mask": [1] * len(input_ids)}
        if written:
            require_tokens([token for token in written[i] if token not in special], rows.place(i))
            sample["labels"] = written[i]
        made.append(Made(sample, len(ids) > room, len(written[i]) if written else 0))
    return made


def least_prompt(tokenizer: PreTrainedTokenizerBase) -> int:
    """Tokens without which there is no room for text: the special ones, and two."""
    return sum(map(len, special_tokens(tokenizer))) + 2


def _input(example: Example | Chat) -> str:
    if isinstance(example, Example):
        return example.prompt or str(example.target)
    before = example.turns[:-1]
    # Under one system prompt all answers that nobody asked for would have the same input.
    lone = all(turn.role == "system" for turn in before)
    return json.dumps([(turn.role, turn.content) for turn in (example.turns if lone else before)])


def _last_target(example: Example | Chat) -> str:
    if isinstance(example, Chat):
        return next(turn.content for turn in reversed(example.turns) if turn.role == "assistant")
    assert example.target is not None
    return example.target
