"""Find the source row of each sequence that a trainer prepared, by the contents that its tokens spell."""

import re
from bisect import bisect_left
from collections import defaultdict, deque
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import NamedTuple

import numpy as np

from tsqlora.data.chat import Conversation
from tsqlora.text.ledger import LEAST_KNOWN, at_ends_alone, digest_of, locate, place_of
from tsqlora.text.prepared import Trained
from tsqlora.text.vocabulary import Vocabulary

SENTENCE = re.compile(r"[\n\0]|(?<=[.!?:。！？>\]])|(?=[<\[]|\b[A-Z]\w+:)")
"""Where contents are split, and a template's own words from them."""
CANDIDATES = 8
"""Most rows that are compared with a sequence: those with the most and the rarest of its sentences, and no others."""
COMMON = 256
"""Most rows that are counted for a sequence; a sentence that more rows have singles out none of them."""
BEHIND = 4
"""Tokens behind an answer among which its stop is, blanks and line feeds included."""


def match(
    rows: Sequence[Conversation], sequences: Iterable[Trained], vocabulary: Vocabulary
) -> tuple[dict[int, list[Trained]], dict[int, str], list[Trained]]:
    """Return the sequences of each source row, how sure that is, and the sequences without a row.

    A match is "exact" if all contents are there in order, or all but what is cut at an end; "ambiguous" if equal rows
    share the sequences, which are dealt out by count. Of rows that begin alike, one without further contents comes
    first, then one without a sequence. Both sides of a pair have one row. Templates trim contents, so blanks around
    them do not count. A row that packing has split has its pieces in order.
    """
    equal, spelled = defaultdict(deque[int]), dict[str, str]()
    for j, row in enumerate(rows):
        messages = (*row.messages, *(row.rejected or ()), *(row.prompt or ()))
        spelled[digest := digest_of(row)] = "\n".join(vocabulary.content(one.content).decode() for one in messages)
        equal[digest].append(j)
    having = defaultdict(deque[str])
    for digest in sorted(spelled, key=lambda digest: len(spelled[digest])):
        for sentence in _sentences(spelled[digest]):
            having[sentence].append(digest)
    parts = sorted(having), sorted(sentence[::-1] for sentence in having)
    taken, sure, left = defaultdict(list[Trained]), dict[int, str](), list[Trained]()
    fitted, lacking = dict[int, _Fit](), defaultdict(list[int])
    units = defaultdict[tuple[int, int], list[Trained]](list)
    for number, one in enumerate(sequences):
        units[one.row, -1 if one.side else number].append(one)
    for unit in units.values():
        text = b"\n".join(vocabulary.plain(one.ids) for one in unit).decode(errors="ignore")
        sentences = _sentences(text)
        votes = _votes(sentences, having, parts)
        most = max(votes.values(), default=0)
        likely = [digest for digest, vote in votes.items() if vote > most / 2]
        likely.sort(key=lambda digest: (-votes[digest], equal[digest][0] in taken))
        fits = {d: [_fit(rows[equal[d][0]], one, vocabulary) for one in unit] for d in likely[:CANDIDATES]}
        rank = {
            digest: (
                sum(fit.present for fit in own),
                all(fit.present and not fit.missing for fit in own),
                equal[digest][0] not in taken,
                -sum(fit.missing for fit in own),
            )
            for digest, own in fits.items()
        }
        best = max(rank, key=rank.__getitem__, default="")
        present, whole, *_ = rank.get(best, (0, False))
        strange = sum(len(sentence) for sentence in sentences if sentence not in having)
        enough = present >= LEAST_KNOWN and (most >= 1 / CANDIDATES or strange <= present)
        if not whole and not enough:  # a "Yes." may be any row's
            left += unit
            continue
        row = equal[best][0]
        equal[best].rotate(-1)
        taken[row] += unit
        sure[row] = "exact" if len(equal[best]) == 1 else "ambiguous"
        for one, fit in zip(unit, fits[best], strict=True):
            fitted[id(one)] = fit
            lacking[fit.rest].append(row)
    others = list[Trained]()
    for one in left:
        texts = _plain(one, vocabulary)
        if texts[0] and lacking[texts[0]]:  # too short to be known, but all that a row lacks
            row = lacking[texts[0]].pop(0)
            taken[row].append(one)
            fitted[id(one)] = _Fit(begin=(len(rows[row].messages), 0))
        elif any(texts):  # a template's last line feed may be any row's
            others.append(one)
    for own in taken.values():
        own.sort(key=lambda one: fitted[id(one)].begin)
    return taken, sure, others


def _sentences(text: str) -> Iterable[str]:
    """The sentences of a text, each once, without blanks."""
    return dict.fromkeys(sentence for part in SENTENCE.split(text) if (sentence := "".join(part.split())))


def _votes(
    sentences: Iterable[str], having: dict[str, deque[str]], parts: tuple[Sequence[str], Sequence[str]]
) -> dict[str, float]:
    """Count the rows that have the sentences, each by how few rows have it, also where a sentence is cut."""
    shared, votes = list[deque[str]](), defaultdict[str, float](float)
    for sentence in sentences:
        if sentence in having:
            shared.append(having[sentence])
            continue
        for ordered, part, step in zip(parts, (sentence, sentence[::-1]), (1, -1), strict=True):
            first, end = bisect_left(ordered, part), bisect_left(ordered, f"{part}\U0010ffff")
            whole = (having[one[::step]] for one in ordered[first : min(end, first + COMMON)])
            shared.append(deque(dict.fromkeys(digest for digests in whole for digest in digests)))
    for digests in sorted(shared, key=len):
        if votes and len(votes) + len(digests) > COMMON:
            break
        for digest in islice(digests, COMMON):
            votes[digest] += 1 / len(digests)
        if len(digests) > COMMON:
            digests.rotate(-1)  # rows that a cut makes alike have their turns
    return votes


def _plain(one: Trained, vocabulary: Vocabulary) -> list[bytes]:
    """The texts between special tokens."""
    return [part.strip() for part in re.split(rb"\0+", vocabulary.plain(one.ids))]


def unwrapped(rows: Sequence[Conversation], wrapped: Sequence[Trained], vocabulary: Vocabulary) -> list[Trained]:
    """Return the sequence of each row of a stream that was cut into equal parts, as TRL's `wrapped` packing does.

    Rows are looked for in order; one that is not there is left out. A row ends behind its last content's stop.
    """
    ids, targets = (np.concatenate([getattr(one, name) for one in wrapped]) for name in ("ids", "targets"))
    starts = np.cumsum([0, *(len(one.ids) for one in wrapped)])
    text, ends = vocabulary.text(ids), vocabulary.ends(ids)
    parts, place, first = list[Trained](), 0, 0
    for row in rows:
        at = place
        for message in row.messages:
            _, at = place_of(vocabulary.content(message.content), text, at) or (0, len(text) + 1)
        if not place < at <= len(text):
            continue
        last = int(np.searchsorted(ends, at, side="left")) + 1
        last += next((k + 1 for k, j in enumerate(ids[last : last + BEHIND].tolist()) if j in vocabulary.stops), 0)
        part = int(np.searchsorted(starts, first, side="right")) - 1
        parts.append(Trained(ids[first:last], targets[first:last], part))
        place, first = int(ends[last - 1]), last
    return parts


class _Fit(NamedTuple):
    """How many bytes of a row's contents a sequence has and lacks; in which message, and where there, it begins."""

    present: int = 0
    """System prompts do not count; 0 if a content is missing between others, but for tool calls and their results."""
    missing: int = 0
    begin: tuple[int, int] = (0, 0)
    rest: bytes = b"\0"
    """What it lacks of the row's last content."""


def _fit(row: Conversation, one: Trained, vocabulary: Vocabulary) -> _Fit:
    messages = row.side(one.side)
    contents = [vocabulary.content(message.content) for message in messages]
    spans = locate(messages, one.ids, vocabulary)
    pairs = list(zip(messages, spans, strict=True))
    lacks = [len(c) if span is None else span.before + span.behind for c, span in zip(contents, spans, strict=True)]
    present = sum(len(c) - n for c, n, m in zip(contents, lacks, messages, strict=True) if m.role != "system")
    # How calls and their results are written is the template's.
    if present and at_ends_alone(pair for pair in pairs if pair[0].role != "tool" and not pair[0].carried):
        k, span = next((k, span) for k, span in enumerate(spans) if span is not None)
        rest = b"" if spans[-1] is None else contents[-1][len(contents[-1]) - spans[-1].behind :]
        missing = sum(n for n, m in zip(lacks, messages, strict=True) if m.role != "tool")
        return _Fit(present, missing, (k, span.before), rest.strip())
    part = max(_plain(one, vocabulary), key=len)
    for k, content in enumerate(contents if len(part) >= LEAST_KNOWN else ()):
        if (at := content.find(part)) >= 0:  # from the middle of a content, as `bfd_split` leaves it
            return _Fit(len(part), sum(map(len, contents)) - len(part), (k, at), content[at + len(part) :].strip())
    return _Fit()
