"""What a row says to a model that writes: a prompt and its target, or the turns of a chat."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Example:
    """A text to go on from, "" for none, and the text that is to be written; None where it is not read."""

    prompt: str
    target: str | None


@dataclass(frozen=True, slots=True)
class Turn:
    """One message of a chat."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Chat:
    """Turns in order, for the tokenizer's chat template; every assistant's turn is a target.

    Where targets are not read, the turns up to the one that is to be written.
    """

    turns: tuple[Turn, ...]


@dataclass(frozen=True, slots=True)
class Manner:
    """For which model rows are read.

    Args:
        seq2seq: it reads the prompt on one side and writes on the other; else it goes on from the prompt.
        chat: its tokenizer has a chat template.
        targets: whether targets are read too, and so must be there.
        measured: where they are not, whether what is written will be compared with them: a chat then ends before its
            last answer, and not with a turn that stands behind it.
    """

    seq2seq: bool
    chat: bool
    targets: bool = True
    measured: bool = False
