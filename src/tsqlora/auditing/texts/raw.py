"""Rows of a file as `tsqlora train` prepares them, without leaving any out: each has its sequences or a reason."""

import json
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from os.path import commonprefix
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from tsqlora.auditing.texts.ledger import REASONING_ENDS, SHOWN, Line, line_of
from tsqlora.auditing.texts.prepared import Trained
from tsqlora.auditing.texts.reconcile import Reconciled
from tsqlora.auditing.texts.vocabulary import PROBE, Vocabulary
from tsqlora.errors import DataError
from tsqlora.progress import Progress
from tsqlora.rows.batches import IGNORED
from tsqlora.rows.chat import (
    ANSWER,
    PREFERENCE,
    REASONING,
    WHOLE,
    Chat,
    Conversation,
    Format,
    Message,
    Problems,
    conversation,
    shown,
)
from tsqlora.rows.rows import Row
from tsqlora.rows.table import Table
from tsqlora.rows.tokens import Piece, TemplateError, causal_rows, render


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
    shows: dict[str, str] = field(default_factory=dict)
    """What the template leaves out or rewrites: findings, each with the text that shows it."""


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


def audit_table(
    table: Table, format: Format, vocabulary: Vocabulary, limit: int, progress: Progress | None = None
) -> Reconciled:
    """Reconcile every row of a table with what training would make of it, at most `limit` tokens."""
    lines = list[Line]()
    for chunk in table.chunks():
        lines += audited(chunk, format, vocabulary, limit)
        if progress is not None:
            progress("ledger", len(lines), len(table))

    def of(places: Collection[int]) -> dict[int, tuple[Trained, ...]]:
        chosen = list(replace(table, ids=np.array(sorted(places), np.int64)))
        made = prepared_rows(chosen, format, vocabulary.tokenizer, max_length=limit)
        return {row.id: one.sequences for row, one in zip(chosen, made, strict=True)}

    lengths = [line.tokens for line in lines]
    return Reconciled(Conversations(table, format), lines, of, limit, lengths, format=format.name)


def audited(chunk: Sequence[Row], format: Format, vocabulary: Vocabulary, limit: int) -> list[Line]:
    """Return the lines of some rows."""
    tokenizer, lines = vocabulary.tokenizer, list[Line]()
    if format.name in ("messages", "sharegpt") and not tokenizer.chat_template:
        return [failed(conversation(row.cells, format, row.id), vocabulary, "no_template") for row in chunk]
    sides = [[side.parse(row, WHOLE) for row in chunk] for side in format.sides]
    made = prepared_rows(chunk, format, tokenizer, max_length=limit, parsed=sides if tokenizer.chat_template else None)
    for row, parsed, prepared in zip(chunk, zip(*sides, strict=True), made, strict=True):
        one = shown(row, format, parsed)
        if prepared.finding:
            line = failed(one, vocabulary, prepared.finding)
            line.detail, line.lost_tokens = prepared.reason, prepared.lost
        else:
            line = line_of(one, prepared.sequences, vocabulary, lost=prepared.lost, cut=prepared.cut)
        for name, text in prepared.shows.items():
            line.find(name, text)
        if "prompt_not_prefix" in line.findings:
            line.findings = [name for name in line.findings if name != "only_last_answer"]
        lines.append(line)
    return lines


def failed(one: Conversation, vocabulary: Vocabulary, finding: str) -> Line:
    """Return the line of a row that has no tokens; what its own texts show says more than "dropped"."""
    line = line_of(one, (), vocabulary)
    line.match = "exact"  # the source is known
    if finding != "dropped" or not {"empty_answer", "roles"} & {*line.findings}:
        line.findings.append(finding)
    return line


def prepared_rows(
    rows: Sequence[Row],
    format: Format,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    parsed: Sequence[Sequence[tuple[Chat, Problems]]] | None = None,
) -> list[Prepared]:
    """Return what training makes of each row, in order; `parsed` are the rows of each side as this tokenizer's."""
    if parsed is None:
        manner = replace(WHOLE, chat=bool(tokenizer.chat_template))
        parsed = [[side.parse(row, manner) for row in rows] for side in format.sides]
    names = ("chosen", "rejected") if format.name == PREFERENCE else ("",)
    parts = [_side(rows, one, side, tokenizer, max_length) for side, one in zip(names, parsed, strict=True)]
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
                shows={name: shown for one in reversed(both) for name, shown in one.shows.items()},
            )
            if failed is None
            else replace(failed, lost=lost)
        )
    return whole


def _side(
    rows: Sequence[Row],
    parsed: Sequence[tuple[Chat, Problems]],
    side: str,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
) -> list[Prepared]:
    made = list[Prepared]()
    for row, one in zip(rows, causal_rows(rows, parsed, tokenizer, max_length), strict=True):
        if isinstance(one, DataError):
            finding = one.finding if isinstance(one, TemplateError) else "dropped"
            made.append(Prepared((), 0, finding=finding, reason=str(one).removeprefix(f"{row.place}: ")))
            continue
        if one.needs > max_length:
            what = "the answer" if one.chat.plain else "the last exchange"
            why = f"{what} needs {one.needs} tokens, and {max_length} are read"
            made.append(Prepared((), one.targets, True, "answer_cut", why))
            continue
        ids = np.asarray(one.sample["input_ids"], np.int32)
        labels = np.asarray(one.sample.get("labels", [IGNORED] * len(ids)), np.int32)
        lost = max(0, one.targets - int((labels != IGNORED).sum())) if one.cut else 0
        shows = {} if one.chat.plain else dict(rewritten(one.chat, one.pieces, tokenizer, row.place))
        made.append(Prepared((Trained(ids, labels, row.id, side, one.places),), lost, one.cut, shows=shows))
    return made


def rewritten(
    chat: Chat, pieces: Sequence[Piece], tokenizer: PreTrainedTokenizerBase, place: str
) -> Iterator[tuple[str, str]]:
    """Yield findings of what a template leaves out of a chat, or writes in another way, with the text that shows it.

    Blanks do not count, nor reasoning of an earlier answer, which is a note. What is not there as it is written, and
    changes nothing where it is another text, is left out.
    """
    messages, last = chat.messages, len(chat.messages) - 1
    trained = [k for k, piece in enumerate(pieces) if piece.trained]
    before = "".join(piece.text for piece in pieces[: max(trained, default=0)])

    def rendered(messages: tuple[Message, ...], *, prompt: bool = False) -> str:
        return render(replace(chat, messages=messages), tokenizer, place, prompt=prompt)

    served = rendered(messages[:last], prompt=True) if last else before
    answers = [message for message in messages[chat.context :] if message.role == ANSWER]
    if served != before:
        at = max(0, len(commonprefix([served, before])) - SHOWN // 3)  # noqa: RUF071  (texts, no paths)
        yield "prompt_not_prefix", f"{before[at : at + SHOWN]!r}, and when it is served {served[at : at + SHOWN]!r}"
    elif len(trained) == 1 < len(answers):
        yield "prompt_not_prefix", repr((answers[0].content or str(answers[0].further))[:SHOWN])
    text = "".join(piece.text for piece in pieces) + served
    for k, message in enumerate(messages):
        reasoning, ends, rest = message.content.rpartition(REASONING_ENDS)
        stripped = "content_lost" if k == last else "reasoning_stripped"
        parts = [(rest, "content_lost"), (reasoning.partition("<think>")[2] if ends else "", stripped)]
        parts += [(str(message.further[key]), stripped) for key in message.carried if key in REASONING]
        for part, name in ((part.strip(), name) for part, name in parts):
            if part in text or json.dumps(part, ensure_ascii=False)[1:-1] in text:
                continue
            other = replace(message, content=message.content.replace(part, PROBE))
            if rendered((*messages[:k], other, *messages[k + 1 :])) == rendered(messages):
                yield name, repr(part[:SHOWN])
