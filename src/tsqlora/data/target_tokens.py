"""Split a sample's text into prompts and targets, and tokenise it so that no token spans two of them."""

import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from transformers import PreTrainedTokenizerBase

from tsqlora.data.formats.chats import Chat, Example, Turn
from tsqlora.errors import DataError, SettingsError

SECONDS = 10.0
"""Time limit of a chat template for one chat: its loops may be endless."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A stretch of a sample's text; `trained` if it is a target."""

    text: str
    trained: bool


@dataclass(frozen=True, slots=True)
class Run:
    """The tokens of one piece; `trained` if it is a target."""

    ids: list[int]
    trained: bool


def pieces_of(example: Example | Chat, tokenizer: PreTrainedTokenizerBase, place: str) -> list[Piece]:
    """The sample's text in order, without empty pieces.  Raises DataError with the row's place."""
    if isinstance(example, Chat):
        return chat_pieces(example.turns, tokenizer, place)
    target = [] if example.target is None else [Piece(example.target, True)]
    return [*([Piece(example.prompt, False)] if example.prompt else []), *target]


def chat_pieces(turns: Sequence[Turn], tokenizer: PreTrainedTokenizerBase, place: str) -> list[Piece]:
    """The chat as the tokenizer's template renders it; an assistant's turn is a target.

    A turn is the difference between the template's prompt for it and the template with it: exactly what a model has to
    write after the prompt that it will get. White space after the end token belongs to the next prompt. The target of
    a turn that opens the chat starts with its content. A chat that ends with another turn ends with the prompt for an
    answer; if the template rewrites earlier text, that chat is one piece. Raises DataError if the template refuses the
    turns, or rewrites the text before an answer with loss, so that the turn's text is unclear.
    """
    final = None if turns[-1].role == "assistant" else _rendered(turns, tokenizer, place, prompt=True)
    pieces, seen = list[Piece](), ""
    for i, turn in enumerate(turns):
        if turn.role != "assistant":
            continue
        whole = _rendered(turns[: i + 1], tokenizer, place, prompt=False)
        prompt = _rendered(turns[:i], tokenizer, place, prompt=True) if i else _before(turn, whole)
        if pieces and not prompt.startswith(seen):  # some templates, as Phi 3's, close a whole text with an end token
            closed = pieces.pop()
            pieces.append(replace(closed, text=closed.text.removesuffix(str(tokenizer.eos_token))))
            seen = seen.removesuffix(str(tokenizer.eos_token))
        if not (prompt.startswith(seen) and whole.startswith(prompt)):
            if final is not None:
                return [Piece(final, False)]
            raise DataError(
                f"{place}: the chat template rewrites the text before turn {i + 1}, so the turn's tokens are unclear; "
                "write one assistant turn a row"
            )
        target = _to_end_token(whole[len(prompt) :], tokenizer)
        pieces += [Piece(prompt[len(seen) :], False), Piece(target, True)]
        seen = prompt + target
    if final is not None:
        if not final.startswith(seen):
            return [Piece(final, False)]
        pieces.append(Piece(final[len(seen) :], False))
    return [piece for piece in pieces if piece.text]


def _before(turn: Turn, whole: str) -> str:
    """The template's text before the content of a turn that opens the chat; all text if the content is not in it."""
    at = whole.find(turn.content.strip())
    return whole[:at] if at >= 0 else whole


def _to_end_token(text: str, tokenizer: PreTrainedTokenizerBase) -> str:
    end, cut = tokenizer.eos_token, text.rstrip()
    return cut if isinstance(end, str) and cut.endswith(end) else text


def _rendered(turns: Sequence[Turn], tokenizer: PreTrainedTokenizerBase, place: str, *, prompt: bool) -> str:
    messages: list[Any] = [{"role": turn.role, "content": turn.content} for turn in turns]
    try:
        with _time_limit(SECONDS):
            return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt))
    except Exception as error:  # a template is a program of whoever made the model
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise DataError(f"{place}: the chat template refuses these turns ({reason}); correct one of the two") from error


@contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in the code inside after a time; only in the main thread, since others get no signals."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: Any) -> None:
        raise TimeoutError(f"it takes longer than {seconds:g} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    left, interval = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, left, interval)
        signal.signal(signal.SIGALRM, before)


def tokens_of(pieces: Sequence[Sequence[Piece]], tokenizer: PreTrainedTokenizerBase) -> list[list[Run]]:
    """Tokenise the pieces of each sample, without the tokenizer's special tokens.

    A piece's tokens follow those of the piece before it in their joint text. If a token would span the two, the piece
    is tokenised alone. So every run has the same tokens whether or not another follows it.
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
    """The special tokens that the tokenizer puts before and after a text."""
    encoded = tokenizer("a", return_special_tokens_mask=True)
    ids, mask = list(encoded["input_ids"]), list(encoded["special_tokens_mask"])
    text = [k for k, special in enumerate(mask) if not special]
    return (ids[: text[0]], ids[text[-1] + 1 :]) if text else (ids, [])


def target_tokens(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Labels of a sequence-to-sequence model: the tokenizer's target tokens, with an end token."""
    if not texts:
        return []
    end = end_token(tokenizer)
    encoded: list[list[int]] = tokenizer(text_target=list(texts), verbose=False)["input_ids"]  # pyright: ignore[reportAssignmentType]
    return [ids if end is None or ids[-1:] == [end] else [*ids, end] for ids in encoded]


def plain_tokens(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Each text alone, without special tokens; long texts are cut and counted later."""
    if not texts:
        return []
    encoded = tokenizer(list(texts), add_special_tokens=False, verbose=False, return_attention_mask=False)
    return encoded["input_ids"]  # pyright: ignore[reportReturnType]


def split_opening(runs: Sequence[Run], tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[Run]]:
    """Separate the opening token, if the chat template writes one, from the runs."""
    first, opening = runs[0], tokenizer.bos_token_id
    if not isinstance(opening, int) or first.ids[:1] != [opening]:
        return [], list(runs)
    return [opening], [replace(first, ids=first.ids[1:]), *runs[1:]]


def ended(runs: Sequence[Run], tokenizer: PreTrainedTokenizerBase) -> list[Run]:
    """The runs with an end token after a final target."""
    last, end = runs[-1], end_token(tokenizer)
    if not last.trained or end is None or last.ids[-1:] == [end]:
        return list(runs)
    return [*runs[:-1], replace(last, ids=[*last.ids, end])]


def end_token(tokenizer: PreTrainedTokenizerBase) -> int | None:
    end = tokenizer.eos_token_id
    assert end is None or isinstance(end, int)
    return end


def require_end(tokenizer: PreTrainedTokenizerBase, *, seq2seq: bool) -> None:
    """Raises SettingsError for a tokenizer without an end token.

    Targets of a sequence-to-sequence model may end with the token that closes its texts.
    """
    closes = seq2seq and bool(special_tokens(tokenizer)[1])
    if end_token(tokenizer) is None and not closes:
        raise SettingsError(
            f"the tokenizer of {tokenizer.name_or_path or 'the model'} has no end token, so answers would not end; "
            "set its eos_token"
        )
