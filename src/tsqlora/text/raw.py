"""Rows of a file as `tsqlora train` prepares them, without leaving any out: each has its sequences or a reason."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from transformers import PreTrainedTokenizerBase

from tsqlora.data.batches import IGNORED
from tsqlora.data.examples import Chat, Example, Manner
from tsqlora.data.formats import PREFERENCE, Format
from tsqlora.data.generation import Piece, causal_sample, pieces_of, tokens_of
from tsqlora.data.rows import Row
from tsqlora.errors import DataError
from tsqlora.text.prepared import Trained


@dataclass(frozen=True, slots=True)
class Prepared:
    """A row's sequences (two of a pair), the tokens of its answers that do not fit, and why it has none."""

    sequences: tuple[Trained, ...]
    lost: int
    cut: bool = False
    """Whether the length limit took something, of a prompt or of an answer."""
    finding: str = ""
    """The finding that says why there are no sequences; "" if there are."""
    reason: str = ""
    last_alone: bool = False
    """Whether the template rewrites earlier answers, so that the last one alone is trained."""


def prepared_rows(
    rows: Sequence[Row], format: Format, tokenizer: PreTrainedTokenizerBase, *, max_length: int
) -> list[Prepared]:
    """Return what training makes of each row, in order."""
    sides = ("chosen", "rejected") if format.name == PREFERENCE else ("",)
    parts = [_side(rows, one, side, tokenizer, max_length) for side, one in zip(sides, format.sides, strict=True)]
    whole = list[Prepared]()
    for both in zip(*parts, strict=True):
        failed = next((one for one in both if one.finding), None)
        lost = sum(one.lost for one in both)
        whole.append(
            replace(
                both[0],
                sequences=tuple(s for one in both for s in one.sequences),
                lost=lost,
                cut=any(one.cut for one in both),
            )
            if failed is None
            else replace(failed, lost=lost)
        )
    return whole


def _side(
    rows: Sequence[Row], format: Format, side: str, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> list[Prepared]:
    manner = Manner(seq2seq=False, chat=bool(tokenizer.chat_template))
    read, failed = list[tuple[Row, Example | Chat, list[Piece]]](), dict[int, Prepared]()
    for row in rows:
        example: Example | Chat | None = None
        try:
            example = format.read(row, manner)
            read.append((row, example, pieces_of(example, tokenizer, row.place)))
        except DataError as error:
            reason = str(error).removeprefix(f"{row.place}: ")
            name = "dropped" if example is None else "template_error"
            if "rewrites the prompt" in reason:
                name = "prompt_not_prefix"
            failed[row.id] = Prepared((), 0, finding=name, reason=reason)
    made = dict[int, Prepared]()
    for (row, example, pieces), runs in zip(read, tokens_of([pieces for *_, pieces in read], tokenizer), strict=True):
        targets = sum(len(run.ids) for run in runs if run.trained)
        one = causal_sample(example, runs, tokenizer, max_length, row.place)
        if one.needs > max_length:
            what = "the last exchange" if isinstance(example, Chat) else "the answer"
            why = f"{what} needs {one.needs} tokens, and {max_length} are read"
            made[row.id] = Prepared((), targets, True, "answer_cut", why)
            continue
        ids = np.asarray(one.sample["input_ids"], np.int32)
        labels = np.asarray(one.sample.get("labels", [IGNORED] * len(ids)), np.int32)
        with_loss = int((labels != IGNORED).sum())
        lost = max(0, targets - with_loss) if one.cut else 0
        last_alone = isinstance(example, Chat) and answers_of(example) > sum(piece.trained for piece in pieces) == 1
        made[row.id] = Prepared((Trained(ids, labels, row.id, side),), lost, one.cut, last_alone=last_alone)
    return [failed.get(row.id) or made[row.id] for row in rows]


def answers_of(chat: Chat) -> int:
    """Count the answers that a template may make targets of."""
    return sum(turn.role == "assistant" for turn in chat.turns[chat.context :])
