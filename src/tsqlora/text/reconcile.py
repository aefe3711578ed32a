"""Reconcile a set that a trainer has prepared with the rows that it was made of."""

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from tsqlora.data.batches import IGNORED
from tsqlora.data.chat import ANSWER, Conversation, Format, Message, conversation, format_of
from tsqlora.data.readers import SNIFF, Hints
from tsqlora.data.sources import open_table
from tsqlora.errors import DataError, SettingsError
from tsqlora.progress import Progress
from tsqlora.text.answers import empty_tokens, stretches
from tsqlora.text.findings import FINDINGS, NEARLY_ALL, OF_LABELS, OF_TOKENS
from tsqlora.text.ledger import ROLE_MARKERS, SPEAKERS, Line, Span, line_of
from tsqlora.text.matching import match
from tsqlora.text.prepared import Collate, Trained, is_packed, sequences_of
from tsqlora.text.vocabulary import Vocabulary

PREPARED = {"input_ids", "labels", "attention_mask", "position_ids", "text"}
"""Columns of a prepared set that are no source."""
MOST_UNMATCHED = 0.01
MOST_ALIKE = 0.9
EMPTY_REASONING = re.compile(r"<think>\s*</think>")
"""What a template may write before an answer without reasoning."""


@dataclass(frozen=True, slots=True)
class Reconciled:
    """Source rows, their lines, and their sequences; and where the sequences without a row are."""

    rows: list[Conversation]
    lines: list[Line]
    sequences: dict[int, list[Trained]]
    unmatched: list[dict[str, int]]
    """Their rows of the set, and which sequence of it they are."""
    longest: int
    lengths: list[int]
    """Tokens of each row of the set, of which a batch is made; none of packed rows."""
    finds: Collection[str]
    """The findings that its rows can show: all, those of labels, or those of tokens."""

    def of(self, places: Collection[int]) -> dict[int, tuple[Trained, ...]]:
        """The sequences of some rows."""
        return {place: tuple(self.sequences.get(place, ())) for place in places}


def audit_sequences(
    made: Any,
    collate: Collate | None,
    vocabulary: Vocabulary,
    *,
    data: Any = None,
    progress: Progress | None = None,
) -> Reconciled:
    """Reconcile a prepared set with source rows: a file, rows, the set's own columns, or else what its labels say.

    Where more than MOST_UNMATCHED of the sequences have no row, or packing has cut one, no row is called dropped. Parts
    of a stream, as TRL's `wrapped` packing makes them, have no rows; findings are by part.
    """
    sequences = list[Trained]()
    for number, one in enumerate(sequences_of(made, collate)):
        sequences.append(one)
        if progress is not None and number % 1000 == 0:
            progress("ledger", one.row, len(made))
    names, unmatched = list(getattr(made, "column_names", None) or made[0]), list[dict[str, int]]()
    packed, wrapped = is_packed(sequences), _may_be_wrapped(names, sequences)
    longest = max((len(one.ids) for one in sequences), default=0)
    finds, lines = FINDINGS.keys(), None
    source = conversations_of(data)
    if source is not None and not (wrapped and len(sequences) != len(source)):  # rows may be cut to one length
        rows = source
        by_row, sure, left = match(rows, sequences, vocabulary, packed=packed)
        places = {id(one): k for parts in _by_row(sequences).values() for k, one in enumerate(parts)}
        unmatched = [{"row": one.row, "sequence": places[id(one)]} for one in left]
    elif not packed and (format := _own_format(names)) is not None:
        rows = [_without_end(conversation(made[j], format, j), vocabulary) for j in range(len(made))]
        by_row, sure = _by_row(sequences), {}
    else:
        by_row = _by_row(replace(one, row=j) for j, one in enumerate(sequences)) if packed else _by_row(sequences)
        rows, sure = [Conversation(j, ()) for j in range(len(by_row) if packed else len(made))], {}
        finds = OF_TOKENS
        if not wrapped:  # a part of a stream begins and ends anywhere
            rows, lines, finds = *_by_labels(rows, by_row, vocabulary, longest), OF_LABELS
    if lines is None:
        lines = [line_of(row, by_row.get(row.row, ()), vocabulary, limit=longest) for row in rows]
    unsure = len(unmatched) > (0 if packed else MOST_UNMATCHED * len(sequences))
    for line in lines:
        line.match = sure.get(line.row, line.match)
        if unsure and line.match == "unmatched":
            line.fate = "unknown"
    lengths = [] if packed else [len(one.ids) for one in sequences]
    return Reconciled(rows, lines, by_row, unmatched, longest, lengths, finds)


def _by_labels(
    rows: Iterable[Conversation], by_row: Mapping[int, Sequence[Trained]], vocabulary: Vocabulary, longest: int
) -> tuple[list[Conversation], list[Line]]:
    """Read rows by their labels: trained stretches are answers, and what precedes them is their prompt.

    Where text follows the last trained token of nearly all rows, prompts are trained in place of answers. Rows of the
    greatest length are cut if they, unlike others, have no stop.
    """
    empty, before = empty_tokens(vocabulary), Counter[int]()
    behind = list[bool]()
    for one in (one for parts in by_row.values() for one in parts):
        answers = [(start, end) for _, start, end, _ in stretches(one, vocabulary.stops, empty) if start < end]
        before.update(int(one.ids[start - 1]) for start, _ in answers)
        behind += [bool(_text(one.ids[end:], vocabulary).strip()) for _, end in answers[-1:] if not one.side]
    inverted = sum(behind) > NEARLY_ALL * len(behind)
    ((header, count),) = before.most_common(1) or [(-1, 0)]
    header = header if count > MOST_ALIKE * before.total() else None
    made, lines = list[Conversation](), list[Line]()
    for row in rows:
        parts = by_row.get(row.row, ())
        read = {one.side: [] if inverted else _turns(one, vocabulary, empty, header) for one in parts}
        messages, *others = [tuple(message for message, _ in turns) for turns in read.values()] or [()]
        row = replace(row, messages=messages, plain=[one.role for one in messages[:1]] == [ANSWER])
        for other in others:
            prompt = None if other[:-1] == messages[:-1] else other[:-1]
            row = replace(row, rejected=other[-1:], prompt=prompt)
        spans = {side: [span for _, span in turns] for side, turns in read.items()}
        line = line_of(row, parts, vocabulary, spans=spans)
        if inverted and line.trained_tokens:
            line.fate, line.findings = "nothing to train", [*line.findings, "nothing_trained"]
        made.append(row)
        lines.append(line)
    at_limit = [line for line in lines if line.tokens == longest and "stop_not_trained" in line.findings]
    if len(at_limit) > 1 and any(line.stop_trained for line in lines):
        for line in at_limit:
            line.fate, line.stop_trained = "cut", None
            line.findings = ["answer_cut" if name == "stop_not_trained" else name for name in line.findings]
    return made, lines


def _turns(
    one: Trained, vocabulary: Vocabulary, empty: Collection[int], header: int | None
) -> list[tuple[Message, Span]]:
    """The prompts and answers of a sequence; a trained stop alone is an empty answer behind what opens answers."""
    turns, place = list[tuple[Message, Span]](), 0
    answers = [(start, end) for _, start, end, _ in stretches(one, vocabulary.stops, empty)]
    if one.side and not answers:  # an answer without tokens
        answers = [(len(one.ids), len(one.ids))]
    for start, end in answers:
        if start == end and header not in (None, int(one.ids[start - 1])):
            continue  # the stop of a prompt, as axolotl's `train_on_eos: all` trains it
        if start > 1:  # nothing predicts the first token
            prompt = _unmarked(_text(one.ids[place:start], vocabulary))
            place += int((one.targets[place:start] == IGNORED).argmax())
            turns.append((Message("user", prompt), Span(place, start)))
        answer = EMPTY_REASONING.sub("", _text(one.ids[start:end], vocabulary))
        # A template's own "### Instruction:" is no fault, of a prompt or of a text that is trained whole.
        turns.append((Message(ANSWER, answer if start > 1 else _unmarked(answer)), Span(start, end)))
        place = end
    return turns


def _unmarked(text: str) -> str:
    """The text without the names of roles that a template writes."""
    return SPEAKERS.sub("", ROLE_MARKERS.sub("", text))


def _text(ids: np.ndarray, vocabulary: Vocabulary) -> str:
    """The text of some tokens without special ones, and without a character of which a part is missing."""
    return vocabulary.plain(ids).replace(b"\0", b"").decode(errors="ignore")


def _may_be_wrapped(names: Collection[str], sequences: Sequence[Trained]) -> bool:
    """Whether rows may have been joined and cut into equal parts, with no word of where one ends.

    Rows that were cut to one length begin alike; parts of a stream begin anywhere.
    """
    lengths = {len(one.ids) for one in sequences[:-1]}
    paired = any(one.side for one in sequences)
    if paired or len(lengths) != 1 or len(sequences) < 3 or {"seq_lengths", "position_ids"} & {*names}:
        return False
    ((_, alike),) = Counter(tuple(one.ids[:2].tolist()) for one in sequences).most_common(1)
    return alike < MOST_ALIKE * len(sequences)


def _by_row(sequences: Iterable[Trained]) -> dict[int, list[Trained]]:
    by_row = dict[int, list[Trained]]()
    for one in sequences:
        by_row.setdefault(one.row, []).append(one)
    return by_row


def _without_end(row: Conversation, vocabulary: Vocabulary) -> Conversation:
    """The row without the end token that TRL writes behind its completion."""
    end = vocabulary.tokenizer.eos_token
    if not isinstance(end, str) or not row.answer.endswith(end):
        return row
    answer = replace(row.messages[-1], content=row.answer.removesuffix(end))
    return replace(row, messages=(*row.messages[:-1], answer))


def _own_format(names: Sequence[str]) -> Format | None:
    try:
        return format_of([name for name in names if name not in PREPARED], "prepared")
    except (DataError, SettingsError):
        return None


def conversations_of(rows: Any, hints: Hints = SNIFF, like: Format | None = None) -> list[Conversation] | None:
    """Read a file, or a list of dicts or `datasets.Dataset`, as conversations; None for None.

    Rows with the columns of the format `like` have this format, others their own.
    """
    if rows is None:
        return None
    if isinstance(rows, str | Path):
        table = open_table(rows, hints=hints)
        names, name, cells = table.names, table.name, (row.cells for row in table)
    else:
        names, name, cells = list(rows[0]), "data", (rows[j] for j in range(len(rows)))
    own = like and replace(like, columns=like.columns.spelled(names))
    format = own if own and {own.columns.text, own.columns.label} <= {*names, None} else format_of(names, name)
    return [conversation(row, format, j) for j, row in enumerate(cells)]
