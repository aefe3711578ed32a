"""Reconcile a set that a trainer has prepared with the rows that it was made of."""

import re
from bisect import bisect_left
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np

from tsqlora.auditing.texts.answers import stretches
from tsqlora.auditing.texts.findings import FINDINGS, NEARLY_ALL, OF_LABELS, OF_TOKENS
from tsqlora.auditing.texts.ledger import (
    LEAST_KNOWN,
    ROLE_MARKERS,
    SPEAKERS,
    Line,
    Span,
    at_ends_alone,
    digest_of,
    line_of,
    locate,
)
from tsqlora.auditing.texts.prepared import Collate, Trained, is_packed, sequences_of
from tsqlora.auditing.texts.vocabulary import Vocabulary
from tsqlora.errors import DataError, SettingsError
from tsqlora.progress import Progress
from tsqlora.rows.batches import IGNORED
from tsqlora.rows.chat import ANSWER, PROMPTS, Chat, Format, Message, format_of
from tsqlora.rows.readers import SNIFF, Hints
from tsqlora.rows.rows import Columns, Row
from tsqlora.rows.sources import open_table

PREPARED = {"input_ids", "labels", "attention_mask", "position_ids", "text"}
"""Columns of a prepared set that are no source."""
MOST_UNMATCHED = 0.01
MOST_ALIKE = 0.9
EMPTY_REASONING = re.compile(r"<think>\s*</think>")
"""What a template may write before an answer without reasoning."""
SENTENCE = re.compile(r"[\n\0]|(?<=[.!?:。！？>\]])|(?=[<\[]|\b[A-Z]\w+:)")
"""Where contents are split, and a template's own words from them."""
CANDIDATES = 8
"""Most rows that are compared with a sequence: those with the most and the rarest of its sentences, and no others."""
COMMON = 256
"""Most rows that are counted for a sequence; a sentence that more rows have singles out none of them."""


@dataclass(frozen=True, slots=True)
class Reconciled:
    """Rows, their lines of the ledger, and `of`, which gives the sequences of some of them."""

    rows: Sequence[Chat]
    lines: list[Line]
    of: Callable[[Collection[int]], Mapping[int, Sequence[Trained]]]
    longest: int
    """The most tokens of a sequence."""
    lengths: list[int]
    """Tokens of each row of which a batch is made; none of packed rows."""
    finds: Collection[str] = tuple(FINDINGS)
    """The findings that its rows can show: all, those of labels, or those of tokens."""
    format: str = "prepared"
    unmatched: list[dict[str, int]] | None = None
    """Where a prepared set's sequences without a row are: its row, and which sequence of it."""


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
    of a stream, as TRL's `wrapped` packing makes them, have no rows; findings are by part.  Raises DataError where no
    sequence has a row.
    """
    sequences = list[Trained]()
    for number, one in enumerate(sequences_of(made, collate)):
        sequences.append(one)
        if progress is not None and number % 1000 == 0:
            progress("ledger", one.row, len(made))
    names, unmatched = list(getattr(made, "column_names", None) or made[0]), list[dict[str, int]]()
    packed, wrapped, lengths = is_packed(sequences), False, {len(one.ids) for one in sequences[:-1]}
    try:
        format = format_of([name for name in names if name not in PREPARED], "prepared")
    except (DataError, SettingsError):
        format = None
    bounded = any(one.side for one in sequences) or {"seq_lengths", "position_ids"} & {*names}
    if not bounded and len(lengths) == 1 and len(sequences) > 2:
        # Rows that were cut to one length begin alike; parts of a stream, joined and cut, begin anywhere.
        ((_, alike),) = Counter(tuple(one.ids[:2].tolist()) for one in sequences).most_common(1)
        wrapped = alike < MOST_ALIKE * len(sequences)
    longest = max((len(one.ids) for one in sequences), default=0)
    finds, lines = FINDINGS.keys(), None
    source = conversations_of(data)
    if source is not None and not (wrapped and len(sequences) != len(source)):  # rows may be cut to one length
        rows = source
        by_row, sure, left = match(rows, sequences, vocabulary, packed=packed)
        if left and not by_row:
            raise DataError(
                f"none of the {len(sequences):,} prepared sequences spells a source row; give the rows that they were "
                "made of (--data), and the tokenizer that made them (--model)"
            )
        places = {id(one): k for parts in _by_row(sequences).values() for k, one in enumerate(parts)}
        unmatched = [{"row": one.row, "sequence": places[id(one)]} for one in left]
    elif not packed and format is not None:
        rows = _shown((made[j] for j in range(len(made))), format)
        end: Any = vocabulary.tokenizer.eos_token
        rows = [_without_end(row, end) for row in rows] if isinstance(end, str) else rows
        by_row, sure = _by_row(sequences), {}
    else:
        by_row = _by_row(replace(one, row=j) for j, one in enumerate(sequences)) if packed else _by_row(sequences)
        rows, sure = [Chat((), row=j) for j in range(len(by_row) if packed else len(made))], {}
        finds = OF_TOKENS
        if not wrapped:  # a part of a stream begins and ends anywhere
            rows, lines, finds = *_by_labels(rows, by_row, vocabulary, longest), OF_LABELS
    if lines is None:
        lines = list[Line]()
        for row in rows:
            line, by_row[row.row] = _worst(row, by_row.get(row.row, []), vocabulary, longest)
            lines.append(line)
    unsure = len(unmatched) > (0 if packed else MOST_UNMATCHED * len(sequences))
    for line in lines:
        line.match = sure.get(line.row, line.match)
        if unsure and line.match == "unmatched":
            line.fate = "unknown"
    sizes = [] if packed else [len(one.ids) for one in sequences]

    def of(places: Collection[int]) -> dict[int, Sequence[Trained]]:
        return {place: by_row.get(place, ()) for place in places}

    return Reconciled(rows, lines, of, longest, sizes, finds, unmatched=unmatched)


def _worst(row: Chat, parts: list[Trained], vocabulary: Vocabulary, longest: int) -> tuple[Line, list[Trained]]:
    """The line of a row and its sequences: of copies those with the most findings, then with the most lost tokens."""
    sides = max(1, len({one.side for one in parts}))
    copies = [parts[k : k + sides] for k in range(0, len(parts), sides)] or [parts]
    lines = [line_of(row, own, vocabulary, limit=longest) for own in copies]
    line, own = max(zip(lines, copies, strict=True), key=lambda one: (len(one[0].findings), one[0].lost_tokens or 0))
    line.copies = len(copies) - 1
    return line, own


def _by_labels(
    rows: Iterable[Chat], by_row: Mapping[int, Sequence[Trained]], vocabulary: Vocabulary, longest: int
) -> tuple[list[Chat], list[Line]]:
    """Read rows by their labels: trained stretches are answers, and what precedes them is their prompt.

    Where text follows the last trained token of nearly all rows, prompts are trained in place of answers. Rows of the
    greatest length are cut if they, unlike others, have no stop.
    """
    before, behind = Counter[int](), list[bool]()
    for one in (one for parts in by_row.values() for one in parts):
        parts = stretches(one, vocabulary.stops, vocabulary.empty)
        answers = [(start, end) for _, start, end, _ in parts if start < end]
        before.update(int(one.ids[start - 1]) for start, _ in answers)
        behind += [bool(_text(one.ids[end:], vocabulary).strip()) for _, end in answers[-1:] if not one.side]
    inverted = sum(behind) > NEARLY_ALL * len(behind)
    ((header, count),) = before.most_common(1) or [(-1, 0)]
    header = header if count > MOST_ALIKE * before.total() else None
    made, lines = list[Chat](), list[Line]()
    for row in rows:
        parts = by_row.get(row.row, ())
        read = {one.side: [] if inverted else _turns(one, vocabulary, header) for one in parts}
        messages, *others = [tuple(message for message, _ in turns) for turns in read.values()] or [()]
        rejected = Chat(others[0]) if others else None
        row = replace(row, messages=messages, document=[m.role for m in messages[:1]] == [ANSWER], rejected=rejected)
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


def _turns(one: Trained, vocabulary: Vocabulary, header: int | None) -> list[tuple[Message, Span]]:
    """The prompts and answers of a sequence; a trained stop alone is an empty answer behind what opens answers."""
    turns, place = list[tuple[Message, Span]](), 0

    def unmarked(text: str) -> str:
        """The text without the names of roles that a template writes."""
        return SPEAKERS.sub("", ROLE_MARKERS.sub("", text))

    answers = [(start, end) for _, start, end, _ in stretches(one, vocabulary.stops, vocabulary.empty)]
    if one.side and not answers:  # an answer without tokens
        answers = [(len(one.ids), len(one.ids))]
    for start, end in answers:
        if start == end and header not in (None, int(one.ids[start - 1])):
            continue  # the stop of a prompt, as axolotl's `train_on_eos: all` trains it
        if start > 1:  # nothing predicts the first token
            prompt = unmarked(_text(one.ids[place:start], vocabulary))
            place += int((one.targets[place:start] == IGNORED).argmax())
            turns.append((Message("user", prompt), Span(place, start)))
        answer = EMPTY_REASONING.sub("", _text(one.ids[start:end], vocabulary))
        # A template's own "### Instruction:" is no fault, of a prompt or of a text that is trained whole.
        turns.append((Message(ANSWER, answer if start > 1 else unmarked(answer)), Span(start, end)))
        place = end
    return turns


def _text(ids: np.ndarray, vocabulary: Vocabulary) -> str:
    """The text of some tokens without special ones, and without a character of which a part is missing."""
    return vocabulary.plain(ids).replace(b"\0", b"").decode(errors="ignore")


def _by_row(sequences: Iterable[Trained]) -> dict[int, list[Trained]]:
    by_row = dict[int, list[Trained]]()
    for one in sequences:
        by_row.setdefault(one.row, []).append(one)
    return by_row


def conversations_of(
    rows: Any, hints: Hints = SNIFF, like: Format | None = None, *, answers: bool = True
) -> list[Chat] | None:
    """Read a file, or a list of dicts or `datasets.Dataset`, as conversations; None for None.

    Rows with the columns of the format `like` have this format, others their own. Without `answers` prompts alone are
    read too, such as those of a benchmark.
    """
    if rows is None:
        return None
    if isinstance(rows, str | Path):
        table = open_table(rows, hints=hints)
        names, name, cells = table.names, table.name, (row.cells for row in table)
    else:
        names, name, cells = list(rows[0]), "data", (rows[j] for j in range(len(rows)))
    own = like and replace(like, columns=like.columns.spelled(names))
    if own and {own.columns.text, own.columns.label} <= {*names, None}:
        return _shown(cells, own)
    try:
        return _shown(cells, format_of(names, name))
    except DataError:
        prompt = next((one for one in PROMPTS if one in names), None)
        if answers or prompt is None:
            raise
        return _shown(cells, Format("prompt", Columns(prompt, None, None)))


def _shown(rows: Iterable[Any], format: Format) -> list[Chat]:
    return [format.show(Row({**cells}, "", j, j)) for j, cells in enumerate(rows)]


def _without_end(row: Chat, end: str) -> Chat:
    """The row without the end token that TRL writes behind a completion, and behind both answers of a pair."""
    rejected, messages = row.rejected and _without_end(row.rejected, end), row.messages
    if row.ends_answered:
        messages = (*row.question, replace(messages[-1], content=row.answer.removesuffix(end)))
    return replace(row, messages=messages, rejected=rejected)


def match(
    rows: Sequence[Chat],
    sequences: Sequence[Trained],
    vocabulary: Vocabulary,
    *,
    packed: bool = False,
    split: bool = False,
) -> tuple[dict[int, list[Trained]], dict[int, str], list[Trained]]:
    """Return the sequences of each source row, how sure that is, and the sequences without a row.

    A match is "exact" if all contents are there in order, or all but what is cut at an end; "ambiguous" if equal rows
    share the sequences, which are dealt out by count. Of rows that begin alike, one without further contents comes
    first, then one without a sequence. Both sides of a pair have one row. Templates trim contents, so blanks around
    them do not count. With `packed`, a sequence of the greatest length that a row begins with is that row, cut. Where
    another sequence has more of such a row, packing has `split` rows, and a sequence that lacks a content has no row.
    """
    equal, spelled = defaultdict(deque[int]), dict[str, list[str]]()
    for j, row in enumerate(rows):
        messages = [*row.whole, *(one for one in row.side("rejected") if one not in row.whole)]
        spelled[digest := digest_of(row)] = [vocabulary.content(one.content).decode() for one in messages]
        equal[digest].append(j)
    having = defaultdict(list[str])
    for digest in sorted(spelled, key=lambda digest: sum(map(len, spelled[digest]))):
        # Nothing need stand between a prompt and its completion, which then have a sentence together.
        for sentence in dict.fromkeys(one for by in ("\n", "") for one in _sentences(by.join(spelled[digest]))):
            having[sentence].append(digest)
    ordered = sorted(having)
    taken, sure, left = defaultdict(list[Trained]), dict[int, str](), list[Trained]()
    units = defaultdict[tuple[int, int], list[Trained]](list)
    longest, cut, pieces = max((len(one.ids) for one in sequences), default=0), set[str](), set[str]()
    for number, one in enumerate(sequences):
        units[one.row, -1 if one.side else number].append(one)
    for unit in units.values():
        sentences = _sentences(b"\n".join(vocabulary.plain(one.ids) for one in unit).decode(errors="ignore"))
        votes = _votes(sentences, having, ordered)
        most = max(votes.values(), default=0)
        likely = [digest for digest, vote in votes.items() if vote > most / 2]
        likely.sort(key=lambda digest: (-votes[digest], equal[digest][0] in taken))
        rank = dict[str, tuple[int, bool, bool, int]]()
        for digest in likely[:CANDIDATES]:
            present, missing = zip(*(_fit(rows[equal[digest][0]], one, vocabulary) for one in unit), strict=True)
            whole = all(present) and not any(missing)
            rank[digest] = (sum(present), whole, equal[digest][0] not in taken, -sum(missing))
        best = max(rank, key=rank.__getitem__, default="")
        present, whole, *_ = rank.get(best, (0, False))
        strange = sum(len(sentence) for sentence in sentences if sentence not in having)
        likely_cut = present >= LEAST_KNOWN and (most >= 1 / CANDIDATES or strange <= present)
        if packed and likely_cut and not whole:
            begins = len(unit[0].ids) == longest and _begins(rows[equal[best][0]], unit[0], vocabulary)
            (cut if begins else pieces).add(best)
            likely_cut = begins and not split
        if whole or likely_cut:
            row = equal[best][0]
            equal[best].rotate(-1)
            taken[row] += unit
            sure[row] = "exact" if len(equal[best]) == 1 else "ambiguous"
        else:  # a "Yes." may be any row's, and a template's last line feed is no one's
            left += [one for one in unit if vocabulary.plain(one.ids).replace(b"\0", b"").strip()]
    if cut & pieces and not split:
        return match(rows, sequences, vocabulary, packed=packed, split=True)
    return taken, sure, left


def _begins(row: Chat, one: Trained, vocabulary: Vocabulary) -> bool:
    """Whether a sequence begins with a row's first message that is no system prompt."""
    messages = row.side(one.side)
    spans = zip(messages, locate(messages, one.ids, vocabulary), strict=True)
    first = next((span for message, span in spans if message.role != "system"), None)
    return first is not None and not first.before


def _sentences(text: str) -> Iterable[str]:
    """The sentences of a text, each once, without blanks."""
    return dict.fromkeys(sentence for part in SENTENCE.split(text) if (sentence := "".join(part.split())))


def _votes(sentences: Iterable[str], having: Mapping[str, Sequence[str]], ordered: Sequence[str]) -> dict[str, float]:
    """Count the rows that have the sentences, each by how few rows have it; a limit may cut a sentence's end.

    Of a sentence of many rows some are counted, so that the time is linear.
    """
    shared, votes = list[Sequence[str]](), defaultdict[str, float](float)
    for one in sentences:
        whole = having.get(one)  # no copy: all rows may have a sentence
        if whole is None:
            first, end = bisect_left(ordered, one), bisect_left(ordered, f"{one}\U0010ffff")
            begin = chain.from_iterable(having[sentence] for sentence in ordered[first : min(end, first + COMMON)])
            whole = list(dict.fromkeys(islice(begin, CANDIDATES * COMMON)))
        shared.append(whole)
    for digests in sorted(shared, key=len):
        if votes and len(votes) + len(digests) > COMMON:
            break
        for digest in islice(digests, COMMON):
            votes[digest] += 1 / len(digests)
    return votes


def _fit(row: Chat, one: Trained, vocabulary: Vocabulary) -> tuple[int, int]:
    """How many bytes of a row's contents a sequence has and lacks.

    It has none where a content is missing between others, but for tool calls and their results, whose form is the
    template's. System prompts do not count as present.
    """
    messages = row.side(one.side)
    pairs = list(zip(messages, locate(messages, one.ids, vocabulary), strict=True))
    present = missing = 0
    for message, span in pairs:
        length = len(vocabulary.content(message.content))
        lacks = length if span is None else span.before + span.behind
        present += 0 if message.role == "system" else length - lacks
        missing += 0 if message.role == "tool" else lacks
    ends = present and at_ends_alone(pair for pair in pairs if pair[0].role != "tool" and not pair[0].carried)
    return (present, missing) if ends else (0, 0)
