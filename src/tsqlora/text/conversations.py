"""A source row as the messages that its one reading has, in order; what cannot be trained on is there, too."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tsqlora.data.examples import ANSWER, Chat, Example, Manner, Message
from tsqlora.data.formats import Format
from tsqlora.data.rows import Row
from tsqlora.data.table import Table

WHOLE = Manner(seq2seq=False, chat=True)


@dataclass(frozen=True, slots=True)
class Conversation:
    """One row. Of a pair, `messages` end with the chosen answer, and `rejected` is the other one's."""

    row: int
    messages: tuple[Message, ...]
    problem: str | None = None
    """Why the row has no messages."""
    rejected: tuple[Message, ...] | None = None
    prompt: tuple[Message, ...] | None = None
    """Of a pair whose answers are whole chats with different prompts: the rejected one's prompt."""
    plain: bool = False
    """Whether the row is plain text, without turns; its one message has the text."""

    @property
    def question(self) -> tuple[Message, ...]:
        """The messages before the last answer."""
        return self.messages[:-1] if self.messages and self.messages[-1].role == ANSWER else self.messages

    @property
    def answer(self) -> str:
        """The last answer; "" without one."""
        return self.messages[-1].content if self.messages and self.messages[-1].role == ANSWER else ""

    def side(self, side: str) -> tuple[Message, ...]:
        """The messages of one side of a pair, or of a row that is none."""
        if side != "rejected" or self.rejected is None:
            return self.messages
        return (*(self.question if self.prompt is None else self.prompt), *self.rejected)


@dataclass(frozen=True, slots=True, eq=False)
class Conversations(Sequence[Conversation]):
    """The rows of a table as conversations, each read on access."""

    table: Table
    format: Format

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, i: Any) -> Any:
        return conversation(self.table.at(i).cells, self.format, i)

    def __iter__(self) -> Iterator[Conversation]:
        return (conversation(row.cells, self.format, j) for j, row in enumerate(self.table))


def conversation(cells: Mapping[str, Any], format: Format, row: int) -> Conversation:
    """Show one row as its messages, which need not be whole."""
    source = Row({**cells}, "", row, row)
    examples, problems = zip(*(one.parse(source, WHOLE) for one in format.sides), strict=True)
    messages, *others = map(_messages, examples)
    if not messages and (why := [str(one) for one in problems[0]]):
        return Conversation(row, (), why[0].removeprefix(f"{source.place}: "))
    plain = isinstance(examples[0], Example) and format.columns.label is None
    if not others:
        return Conversation(row, messages, plain=plain)
    *before, last = others[0] or messages
    prompt = None if before == [*messages[:-1]] else tuple(before)
    return Conversation(row, messages, rejected=(last,), prompt=prompt)


def _messages(example: Example | Chat) -> tuple[Message, ...]:
    if isinstance(example, Chat):
        return (*example.messages, *example.unanswered)
    prompt = [Message("user", example.prompt)] if example.prompt else []
    return (*prompt, Message(ANSWER, example.target or ""))
