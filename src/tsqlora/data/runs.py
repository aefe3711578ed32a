"""Texts in pieces -> runs of tokens that meet where the pieces do."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from transformers import PreTrainedTokenizerBase

from tsqlora.data.pieces import Piece
from tsqlora.errors import SettingsError


@dataclass(frozen=True, slots=True)
class Run:
    """The tokens of one piece; `trained` says whether they are a target."""

    ids: list[int]
    trained: bool


def tokens_of(pieces: Sequence[Sequence[Piece]], tokenizer: PreTrainedTokenizerBase) -> list[list[Run]]:
    """The pieces of each sample as runs, without special tokens of the tokenizer's own.

    A piece has the tokens that follow those of the piece before it when both are tokenised as one
    text. Where they do not begin with those of the piece before it, because a token would lie
    across, it has those of its text alone. So every run is there in the same tokens whether or not
    another follows it.
    """
    alone = iter(plain_tokens([piece.text for row in pieces for piece in row], tokenizer))
    joint = iter(plain_tokens([a.text + b.text for row in pieces for a, b in pairwise(row)], tokenizer))
    return [_runs(row, [next(alone) for _ in row], [next(joint) for _ in row[1:]]) for row in pieces]


def _runs(row: Sequence[Piece], alone: list[list[int]], joint: list[list[int]]) -> list[Run]:
    runs = [Run(alone[0], row[0].trained)] if row else []
    for piece, before, own, both in zip(row[1:], alone, alone[1:], joint, strict=False):
        follows = both[: len(before)] == before
        runs.append(Run(both[len(before) :] if follows else own, piece.trained))
    return runs


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """What the tokenizer puts before and after a text of its own accord."""
    encoded = tokenizer("a", return_special_tokens_mask=True)
    ids, mask = list(encoded["input_ids"]), list(encoded["special_tokens_mask"])
    text = [k for k, special in enumerate(mask) if not special]
    return (ids[: text[0]], ids[text[-1] + 1 :]) if text else (ids, [])


def written_tokens(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """What a sequence-to-sequence model is to write: as the tokenizer writes targets, and an end token."""
    if not texts:
        return []
    end = end_token(tokenizer)
    encoded: list[list[int]] = tokenizer(text_target=list(texts), verbose=False)["input_ids"]  # pyright: ignore[reportAssignmentType]
    return [ids if end is None or ids[-1:] == [end] else [*ids, end] for ids in encoded]


def plain_tokens(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Each text alone, without special tokens of the tokenizer's own."""
    # Too long is no surprise here: it is cut later, and counted.
    if not texts:
        return []
    encoded = tokenizer(list(texts), add_special_tokens=False, verbose=False, return_attention_mask=False)
    return encoded["input_ids"]  # pyright: ignore[reportReturnType]


def split_opening(runs: Sequence[Run], tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[Run]]:
    """The opening token that a chat template writes, if it does, and the runs without it."""
    first, opening = runs[0], tokenizer.bos_token_id
    if not isinstance(opening, int) or first.ids[:1] != [opening]:
        return [], list(runs)
    return [opening], [replace(first, ids=first.ids[1:]), *runs[1:]]


def ended(runs: Sequence[Run], tokenizer: PreTrainedTokenizerBase) -> list[Run]:
    """The runs with an end token after the target, if they end with a target."""
    last, end = runs[-1], end_token(tokenizer)
    if not last.trained or end is None or last.ids[-1:] == [end]:
        return list(runs)
    return [*runs[:-1], replace(last, ids=[*last.ids, end])]


def end_token(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The id of the end token, if there is one."""
    end = tokenizer.eos_token_id
    assert end is None or isinstance(end, int)
    return end


def require_end(tokenizer: PreTrainedTokenizerBase, *, seq2seq: bool) -> None:
    """Raises SettingsError for a tokenizer that has no end token.

    The targets of a sequence-to-sequence model may end with what the tokenizer closes texts with.
    """
    closes = seq2seq and bool(special_tokens(tokenizer)[1])
    if end_token(tokenizer) is None and not closes:
        raise SettingsError(
            f"the tokenizer of {tokenizer.name_or_path or 'the model'} has no end token, without which no answer ends; "
            "set its eos_token"
        )
