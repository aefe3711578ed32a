"""Rows of a file as `tsqlora train` prepares them, without leaving any out: each has its sequences or a reason."""

import json
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from os.path import commonprefix
from shlex import quote
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from tsqlora.auditing.texts.findings import ERROR, NOTE, findings_of
from tsqlora.auditing.texts.ledger import REASONING_ENDS, SHOWN, Line, line_of
from tsqlora.auditing.texts.prepared import SIDES, Collate, Trained, sequences_of
from tsqlora.auditing.texts.reconcile import Reconciled
from tsqlora.auditing.texts.vocabulary import PROBE, Vocabulary
from tsqlora.errors import DataError, few
from tsqlora.progress import Progress
from tsqlora.rows.batches import IGNORED
from tsqlora.rows.chat import ANSWER, REASONING, WHOLE, Chat, Format, Message
from tsqlora.rows.rows import Row
from tsqlora.rows.table import Table
from tsqlora.rows.tokens import TemplateError, Tokenised, causal_rows, render

LOOKED_AT, WORST = 500, 3
"""Rows to look at, evenly spaced, and findings to show before a training."""


@dataclass(slots=True)
class Prepared:
    """What training makes of a row: its sequences (two of a pair), or why it has none."""

    sequences: tuple[Trained, ...] = ()
    lost: int = 0
    """Tokens of its answers that do not fit."""
    cut: bool = False
    """Whether the length limit took something, of a prompt or of an answer."""
    finding: str = ""
    """The finding that says why there are no sequences; "" if there are."""
    reason: str = ""
    shows: dict[str, str] = field(default_factory=dict)
    """What the template leaves out or rewrites: findings, each with the text that shows it."""


@dataclass(frozen=True, slots=True, eq=False)
class Chats(Sequence[Chat]):
    """The rows of a table, each read on access: a million of them do not fit into memory."""

    table: Table
    format: Format

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, i: Any) -> Any:
        return self.format.show(self.table.at(i))

    def __iter__(self) -> Iterator[Chat]:
        return map(self.format.show, self.table)


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
    return Reconciled(Chats(table, format), lines, of, limit, lengths, format=format.name)


def audited(chunk: Sequence[Row], format: Format, vocabulary: Vocabulary, limit: int) -> list[Line]:
    """Return the lines of some rows."""
    tokenizer, lines = vocabulary.tokenizer, list[Line]()
    sides = [[side.parse(row, WHOLE) for row in chunk] for side in format.sides]
    if format.name in ("messages", "sharegpt") and not tokenizer.chat_template:
        made = [Prepared(finding="no_template") for _ in chunk]
    else:
        made = prepared_rows(chunk, format, tokenizer, max_length=limit, sides=sides)
    for row, both, prepared in zip(chunk, zip(*sides, strict=True), made, strict=True):
        line = line_of(format.show(row, both), prepared.sequences, vocabulary, lost=prepared.lost, cut=prepared.cut)
        if prepared.finding:
            line.match = "exact"  # the source is known
            # What its own texts show says more than "dropped".
            if prepared.finding != "dropped" or not {"empty_answer", "roles"} & {*line.findings}:
                line.findings.append(prepared.finding)
            if prepared.reason:
                line.detail, line.lost_tokens = prepared.reason, prepared.lost
        for name, text in prepared.shows.items():
            line.find(name, text)
        if "prompt_not_prefix" in line.findings:
            line.findings = [name for name in line.findings if name != "only_last_answer"]
        lines.append(line)
    return lines


def prepared_rows(
    rows: Sequence[Row],
    format: Format,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    sides: Sequence[Sequence[Chat]] | None = None,
) -> list[Prepared]:
    """Return what training makes of each row, in order; `sides` are the rows as a chat template reads them."""
    if sides is None or not tokenizer.chat_template:
        manner = replace(WHOLE, chat=bool(tokenizer.chat_template))
        sides = [[side.parse(row, manner) for row in rows] for side in format.sides]
    made = [causal_rows(side, tokenizer, max_length) for side in sides]
    pairs = zip(rows, zip(*made, strict=True), strict=True)
    return [_prepared(both, row, tokenizer, max_length) for row, both in pairs]


def _prepared(
    sides: Sequence[Tokenised | DataError], row: Row, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> Prepared:
    whole = Prepared()
    for side, one in zip(SIDES if len(sides) > 1 else ("",), sides, strict=True):
        if isinstance(one, DataError):
            finding = one.finding if isinstance(one, TemplateError) else "dropped"
            why = finding, str(one).removeprefix(f"{row.place}: ")
        elif one.needs > max_length:
            what = "the answer" if one.chat.plain else "the last exchange"
            why = "answer_cut", f"{what} needs {one.needs} tokens, and {max_length} are read"
            whole.lost, whole.cut = whole.lost + one.targets, True
        else:
            why = "", ""
            ids = np.asarray(one.sample["input_ids"], np.int32)
            labels = np.asarray(one.sample.get("labels", [IGNORED] * len(ids)), np.int32)
            whole.sequences += (Trained(ids, labels, row.id, side, one.places),)
            whole.lost += max(0, one.targets - int((labels != IGNORED).sum())) if one.cut else 0
            whole.cut |= one.cut
            shows = {} if one.chat.plain else dict(rewritten(one, tokenizer))
            whole.shows = shows | whole.shows
        if not whole.finding:
            whole.finding, whole.reason = why
    return replace(whole, sequences=(), shows={}) if whole.finding else whole


def rewritten(one: Tokenised, tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[str, str]]:
    """Yield findings of what a template leaves out of a chat, or writes in another way, with the text that shows it.

    Blanks do not count, nor reasoning of an earlier answer, which is a note. What is not there as it is written, and
    changes nothing where it is another text, is left out.
    """
    chat, pieces, messages, last = one.chat, one.pieces, one.chat.messages, len(one.chat.messages) - 1
    trained = [k for k, piece in enumerate(pieces) if piece.trained]
    before = "".join(piece.text for piece in pieces[: max(trained, default=0)])
    as_served = bool(trained) and pieces[trained[-1]].served and pieces[trained[-1]].message == last

    def rendered(messages: tuple[Message, ...], *, prompt: bool = False) -> str:
        return render(replace(chat, messages=messages), tokenizer, prompt=prompt)

    served = before if as_served or not last else rendered(messages[:last], prompt=True)
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


def worst_findings(
    samples: Any,
    vocabulary: Vocabulary,
    *,
    table: Table | None = None,
    max_length: int = 0,
    most: float = 0.0,
    collate: Collate | None = None,
) -> list[str]:
    """Say the worst errors and warnings of prepared samples; of a `table` those of its rows, cut at `max_length`.

    Raises DataError for an error in all rows of a table, unless `most`, the share of rows that may be bad, is 1.
    """
    places = np.unique(np.linspace(0, len(samples) - 1, LOOKED_AT).astype(int)).tolist()
    if table is not None and table.format is not None:
        rows = list(replace(table, ids=np.sort(table.samples.ids[places])))
        lines = audited(rows, table.format, vocabulary, max_length)
    else:
        sequences = [replace(one, row=j) for j in places for one in sequences_of([samples[j]], collate)]
        lines = [line_of(Chat((), row=one.row), [one], vocabulary) for one in sequences]
    worst = findings_of(lines)
    worst = [finding for finding in worst if finding.severity != NOTE][:WORST]
    see, shown = "tsqlora.audit(trainer)", list[str]()
    if table is not None:
        see = f"`tsqlora audit {quote(table.name)} --model {quote(vocabulary.tokenizer.name_or_path)}`"
    for finding in worst:
        of = "all" if len(lines) == len(samples) else f"the {len(lines):,} sampled"
        severity = "error " if finding.severity == ERROR else ""  # the rest are shown as warnings, which says it
        where = f"{len(finding.where) / len(lines):.0%} of {of} rows: {few(finding.where, 3)}"
        shown.append(f"{severity}{finding.name}: {finding.cause} ({where}); see {see}")
        if table is not None and finding.severity == ERROR and len(finding.where) == len(lines) and most < 1:
            cure = f"; with TRL {finding.cure['TRL']}" if finding.cure else ""
            raise DataError(
                f"{finding.name} in {of} rows of {table.name}: {finding.cause}{cure}; {see} shows them, and "
                "data.max_bad_rows 1 trains on them as they are"
            )
    return shown
