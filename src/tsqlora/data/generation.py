"""Rows -> tokenised samples of which only the targets are trained on."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from jaxtyping import Int
from transformers import PreTrainedTokenizerBase

from tsqlora.data.cells import is_blank
from tsqlora.data.formats import Format
from tsqlora.data.formats.example import Chat, Example, Manner
from tsqlora.data.pieces import pieces_of
from tsqlora.data.rows import Rows
from tsqlora.data.runs import (
    Run,
    ended,
    plain_tokens,
    require_end,
    special_tokens,
    split_opening,
    tokens_of,
    written_tokens,
)
from tsqlora.data.tokenise import TokenisedSplit, row_hash
from tsqlora.errors import DataError, SettingsError

IGNORED = -100
"""The label of a token that is not trained on."""

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
    turn that was cut is not trained on. Raises DataError with file and row for what a row lacks,
    and for targets that are empty or do not fit whole.
    """
    made = _make(rows, format, tokenizer, max_length, seq2seq=seq2seq, with_targets=with_targets, measured=measured)
    most, setting = kept_of_targets(max_length, max_target_length, seq2seq=seq2seq)
    if long := [i for i, one in enumerate(made) if one.needs > most]:
        raise DataError(
            f"{rows.place(long[0])}: the target needs {made[long[0]].needs} tokens, and {most} are kept"
            f"{_and_others(len(long))}; raise {setting} to {max(made[i].needs for i in long)}, or leave them out"
        )
    used = asdict(format.columns)
    hashes = tuple(row_hash(row, used) for row in rows.rows)
    return TokenisedSplit([one.sample for one in made], hashes, sum(one.cut for one in made), rows.ids)


def rows_that_fit(
    rows: Rows,
    format: Format,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    seq2seq: bool,
    max_target_length: int | None = None,
    may_be_none: bool = False,
) -> Int[np.ndarray, " k"]:
    """Which rows have a target that fits whole, ascending.

    Raises DataError where none has, so that no token would be trained on, unless there `may_be_none`, and as
    `tokenise_generation` for all else.
    """
    made = _make(rows, format, tokenizer, max_length, seq2seq=seq2seq, with_targets=True)
    most, setting = kept_of_targets(max_length, max_target_length, seq2seq=seq2seq)
    fitting = np.flatnonzero([one.needs <= most for one in made])
    if not len(fitting) and not may_be_none:
        raise DataError(
            f"{rows.source}: no token would be trained on: none of {len(rows)} targets fits whole into {most} tokens; "
            f"raise {setting} to {min(one.needs for one in made)} or more"
        )
    return fitting


def kept_of_targets(max_length: int, max_target_length: int | None, *, seq2seq: bool) -> tuple[int, str]:
    """How many tokens of a target are kept, and the setting that says so."""
    if seq2seq and max_target_length:
        return max_target_length, "data.max_target_length"
    return max_length, "data.max_length"


def left_out(rows: Rows, fitting: Int[np.ndarray, " k"]) -> str | None:
    """For a note: how many rows `rows_that_fit` left out, and where the first of them are; None where none was."""
    others = np.setdiff1d(np.arange(len(rows)), fitting)
    if not len(others):
        return None
    first = ", ".join(rows.place(int(i)) for i in others[:_SHOWN])
    more = ", …" if len(others) > _SHOWN else ""
    return f"{len(others)} of {len(rows)} rows are left out, whose targets do not fit whole: {first}{more}"


def references(rows: Rows, format: Format) -> list[str]:
    """What each row says is to be written: its target, of a chat the assistant's last turn; no space around it."""
    examples = (format.read(rows, i, Manner(seq2seq=False, chat=False)) for i in range(len(rows)))
    return [_last_target(example).strip() for example in examples]


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
    _require_room(tokenizer, max_length)
    if with_targets:
        _require_targets(rows, format)
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
        _require_tokens(runs[-1].ids, rows.place(i))
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
        _require_tokens(ids, rows.place(i))
        input_ids = [*front, *ids[-room:], *back]
        sample: dict[str, Any] = {"input_ids": input_ids, "attention_mask": [1] * len(input_ids)}
        if written:
            _require_tokens([token for token in written[i] if token not in special], rows.place(i))
            sample["labels"] = written[i]
        made.append(Made(sample, len(ids) > room, len(written[i]) if written else 0))
    return made


def least_prompt(tokenizer: PreTrainedTokenizerBase) -> int:
    """Tokens without which there is no room for text: the special ones, and two."""
    return sum(map(len, special_tokens(tokenizer))) + 2


def _require_room(tokenizer: PreTrainedTokenizerBase, max_length: int) -> None:
    least = least_prompt(tokenizer)
    if max_length < least:
        raise SettingsError(
            f"data.max_length {max_length} leaves no room for text beside {least - 2} special tokens; "
            f"set it to {least} or more"
        )


def _require_targets(rows: Rows, format: Format) -> None:
    """That no target is empty, told all at once; what else may be wrong is told row by row."""
    column = format.columns.label
    if column is None:
        return
    if empty := [i for i, row in enumerate(rows.rows) if is_blank(row.get(column))]:
        raise DataError(
            f"{rows.place(empty[0])}: no text in column '{column}', the target{_and_others(len(empty))}; "
            "fill it in or leave the row out"
        )


def _require_tokens(ids: Sequence[int], place: str) -> None:
    if not ids:
        raise DataError(f"{place}: the tokenizer makes no token of this text; leave the row out")


def _and_others(count: int) -> str:
    """For an error that names the first of some rows."""
    return "" if count == 1 else f" (so in {count} rows)"


def _last_target(example: Example | Chat) -> str:
    if isinstance(example, Chat):
        return next(turn.content for turn in reversed(example.turns) if turn.role == "assistant")
    assert example.target is not None
    return example.target
