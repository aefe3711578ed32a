"""What a row says -> the text that a model sees, in pieces, of which some are trained on."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from tsqlora.data.formats.example import Chat, Example, Turn
from tsqlora.errors import DataError, SettingsError


@dataclass(frozen=True, slots=True)
class Piece:
    """A stretch of a sample's text; `trained` says whether it is a target."""

    text: str
    trained: bool


def pieces_of(example: Example | Chat, tokenizer: PreTrainedTokenizerBase, place: str) -> list[Piece]:
    """The sample's text in order, without what is empty.  Raises DataError with the row's place."""
    if isinstance(example, Chat):
        return chat_pieces(example.turns, tokenizer, place)
    target = [] if example.target is None else [Piece(example.target, True)]
    return [*([Piece(example.prompt, False)] if example.prompt else []), *target]


def chat_pieces(turns: Sequence[Turn], tokenizer: PreTrainedTokenizerBase, place: str) -> list[Piece]:
    """The chat as the tokenizer's template writes it; what an assistant's turn adds is trained on.

    The turn is what is new between the template's prompt for it and the template with it, so that
    a model is trained on just what it has to write after the prompt that it will get. White space
    after the end token belongs to the next prompt. A turn that begins the chat is trained on from where its content
    begins. A chat that ends with another turn ends with the prompt for an answer; where the template rewrites what
    stands before, it is one piece. Raises DataError where the template refuses the turns, or rewrites what stands
    before an answer that is to be trained on, so that no part of the text is the turn's.
    """
    require_template(tokenizer)
    asked = None if turns[-1].role == "assistant" else _rendered(turns, tokenizer, place, ask=True)
    pieces, seen = list[Piece](), ""
    for i, turn in enumerate(turns):
        if turn.role != "assistant":
            continue
        whole = _rendered(turns[: i + 1], tokenizer, place, ask=False)
        prompt = _rendered(turns[:i], tokenizer, place, ask=True) if i else _before(turn, whole)
        if not (prompt.startswith(seen) and whole.startswith(prompt)):
            if asked is not None:
                return [Piece(asked, False)]
            raise DataError(
                f"{place}: the chat template rewrites what stands before turn {i + 1}, so that its tokens cannot "
                "be told apart; write one assistant's turn a row"
            )
        target = _to_end_token(whole[len(prompt) :], tokenizer)
        pieces += [Piece(prompt[len(seen) :], False), Piece(target, True)]
        seen = prompt + target
    if asked is not None:
        if not asked.startswith(seen):
            return [Piece(asked, False)]
        pieces.append(Piece(asked[len(seen) :], False))
    return [piece for piece in pieces if piece.text]


def _before(turn: Turn, whole: str) -> str:
    """What the template writes before the content of a turn that begins the chat; all of it, if that is not found."""
    at = whole.find(turn.content.strip())
    return whole[:at] if at >= 0 else whole


def require_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises SettingsError for a tokenizer that has no chat template."""
    if not tokenizer.chat_template:
        owner = tokenizer.name_or_path or "the model"
        raise SettingsError(
            f"the tokenizer of {owner} has no chat template, which rows of messages need; "
            "use a chat model, or put a chat_template.jinja beside the tokenizer"
        )


def _to_end_token(text: str, tokenizer: PreTrainedTokenizerBase) -> str:
    end, cut = tokenizer.eos_token, text.rstrip()
    return cut if isinstance(end, str) and cut.endswith(end) else text


def _rendered(turns: Sequence[Turn], tokenizer: PreTrainedTokenizerBase, place: str, *, ask: bool) -> str:
    messages: list[Any] = [{"role": turn.role, "content": turn.content} for turn in turns]
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=ask))
    except (TemplateError, ValueError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise DataError(f"{place}: the chat template refuses these turns ({reason}); correct their order") from error
