"""Find the source row of each sequence that a trainer prepared, by the contents that its tokens spell."""

import re
from collections import defaultdict, deque
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from tsqlora.text.conversations import Conversation
from tsqlora.text.ledger import at_ends_alone, digest_of, locate, place_of
from tsqlora.text.prepared import Trained
from tsqlora.text.vocabulary import Vocabulary

KEY = 16
"""Bytes of an anchor, by which a content is looked up."""
ANCHORS = 8
"""Most anchors of a content, evenly spaced."""
CANDIDATES = 8
"""Rows that are compared with a sequence, those with the most anchors in it first."""
BEHIND = 4
"""Tokens behind an answer among which its stop is, blanks and line feeds included."""
_POWERS = np.array([pow(0x9E3779B97F4A7C15, k, 1 << 64) for k in range(KEY)], np.uint64)


def match(
    rows: Sequence[Conversation], sequences: Iterable[Trained], vocabulary: Vocabulary
) -> tuple[dict[int, list[Trained]], dict[int, str], list[Trained]]:
    """Return the sequences of each source row, how sure that is, and the sequences without a row.

    A match is "exact" if all contents are there in order, or all but what is cut at an end; "ambiguous" if equal rows
    share the sequences, which are dealt out by count. Of rows that begin alike, one without further contents comes
    first, then one without a sequence. Both sides of a pair have one row. Templates trim contents, so blanks around
    them do not count. A row that packing has split has its pieces in order.
    """
    by_anchor, alone, sizes = defaultdict(list[int]), list[int](), list[int]()
    for j, row in enumerate(rows):
        anchors = {*_anchors(row, vocabulary)}
        sizes.append(len(anchors))
        for anchor in anchors:
            by_anchor[anchor].append(j)
        if not anchors and row.messages:
            alone.append(j)
    anchors = np.array(sorted(by_anchor), np.uint64)
    equal, taken, digests = defaultdict(deque[int]), dict[int, list[Trained]](), [digest_of(row) for row in rows]
    for j, digest in enumerate(digests):
        equal[digest].append(j)
    sure, left, begins = dict[int, str](), list[Trained](), dict[int, tuple[int, int]]()
    units = defaultdict[tuple[int, int], list[Trained]](list)
    for number, one in enumerate(sequences):
        units[one.row, -1 if one.side else number].append(one)
    for unit in units.values():
        votes = defaultdict(float)
        for anchor in {anchor for one in unit for anchor in _windows(vocabulary.text(one.ids), anchors)}:
            for j in by_anchor[anchor]:
                votes[j] += 1 / len(by_anchor[anchor])  # what few rows have says more
        likely = sorted(votes, key=lambda j: (-votes[j], j in taken, sizes[j], j))
        fits = {j: [_fit(rows[j], one, vocabulary) for one in unit] for j in _distinct(digests, likely)}
        if not any(fit.present for own in fits.values() for fit in own):
            fits = {j: [_fit(rows[j], one, vocabulary) for one in unit] for j in alone}
        rank = {j: _rank(own, free=equal[digests[j]][0] not in taken) for j, own in fits.items()}
        best = max(rank, key=rank.__getitem__, default=None)
        if best is None or not rank[best][0]:
            left += unit
            continue
        begins |= {id(one): fit.begin for one, fit in zip(unit, fits[best], strict=True)}
        group = equal[digests[best]]
        group.rotate(-1)
        taken.setdefault(group[-1], []).extend(unit)
        sure[group[-1]] = "exact" if len(group) == 1 else "ambiguous"
    left = _ends(rows, _pieces(rows, left, taken, begins, vocabulary), taken, begins, vocabulary)
    for row, parts in taken.items():
        sure.setdefault(row, "exact")
        parts.sort(key=lambda one: begins[id(one)])
    return taken, sure, left


def _pieces(
    rows: Sequence[Conversation],
    left: Sequence[Trained],
    taken: dict[int, list[Trained]],
    begins: dict[int, tuple[int, int]],
    vocabulary: Vocabulary,
) -> list[Trained]:
    """Give pieces from the middle of a content, as `bfd_split` leaves them, to their rows; return the others."""
    if not left:
        return []
    contents = [(j, k, vocabulary.content(m.content)) for j, row in enumerate(rows) for k, m in enumerate(row.messages)]
    text, starts = b"\0".join(content for *_, content in contents), np.cumsum([0, *(len(c) + 1 for *_, c in contents)])
    others, seen = list[Trained](), set[int]()
    for one in left:
        part = max(_plain(one, vocabulary), key=len)
        at = text.find(part) if len(part) >= KEY else -1
        while at in seen:
            at = text.find(part, at + 1)
        if at < 0:
            others.append(one)
            continue
        seen.add(at)
        place = int(np.searchsorted(starts, at, side="right")) - 1
        row, message, _ = contents[place]
        begins[id(one)] = message, at - int(starts[place])
        taken.setdefault(row, []).append(one)
    return others


def _ends(
    rows: Sequence[Conversation],
    left: Sequence[Trained],
    taken: Mapping[int, list[Trained]],
    begins: dict[int, tuple[int, int]],
    vocabulary: Vocabulary,
) -> list[Trained]:
    """Give short pieces to rows that lack exactly these ends of their last content; return the others."""
    if not left:
        return []
    lacking = defaultdict(list[tuple[int, tuple[int, int]]])
    for row, parts in taken.items():
        messages, parts = rows[row].messages, sorted(parts, key=lambda one: begins[id(one)])
        ids = np.concatenate([one.ids for one in parts])
        spans, k = locate(messages, ids, vocabulary), len(messages) - 1
        if (span := spans[k]) is not None and (span.behind or span.end == len(ids)):
            content = vocabulary.content(messages[k].content)
            begin = len(content) - span.behind
            lacking[content[begin:].strip()].append((row, (k, begin)))
    others = list[Trained]()
    for one in left:
        texts = _plain(one, vocabulary)
        if not (places := lacking[texts[0]]):
            others += [one] if any(texts) else []  # a template's last line feed may be any row's
            continue
        row, begins[id(one)] = places.pop(0)
        taken[row].append(one)
    return others


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
            span = place_of(vocabulary.content(message.content), text, at)
            if span is None:
                at = -1
                break
            at = span[1]
        if at <= place:
            continue
        last = int(np.searchsorted(ends, at, side="left")) + 1
        last += next((k + 1 for k, j in enumerate(ids[last : last + BEHIND].tolist()) if j in vocabulary.stops), 0)
        part = int(np.searchsorted(starts, first, side="right")) - 1
        parts.append(Trained(ids[first:last], targets[first:last], part))
        place, first = int(ends[last - 1]), last
    return parts


def _distinct(digests: Sequence[str], likely: Sequence[int]) -> Iterable[int]:
    """The first candidates, one of equal rows."""
    seen = set[str]()
    for j in likely:
        if digests[j] not in seen:
            seen.add(digests[j])
            yield j
        if len(seen) == CANDIDATES:
            return


class _Fit(NamedTuple):
    """How many bytes of a row's contents a sequence has and lacks; in which message, and where there, it begins."""

    present: int = 0
    """System prompts do not count; 0 if a content is missing between others, but for tool calls and their results."""
    missing: int = 0
    begin: tuple[int, int] = (0, 0)


def _rank(fits: Iterable[_Fit], *, free: bool) -> tuple[int, bool, bool, int]:
    present, missing = (sum(parts) for parts in zip(*(fit[:2] for fit in fits), strict=True))
    return present, not missing, free, -missing


def _fit(row: Conversation, one: Trained, vocabulary: Vocabulary) -> _Fit:
    messages = row.side(one.side)
    spans = locate(messages, one.ids, vocabulary)
    pairs = list(zip(messages, spans, strict=True))
    if not at_ends_alone(pair for pair in pairs if pair[0].role != "tool" and not pair[0].carried):
        return _Fit()  # how calls and results are written is the template's
    present, missing = 0, 0
    for message, span in pairs:
        length = len(vocabulary.content(message.content))
        lacks = length if span is None else span.before + span.behind
        missing += lacks
        present += length - lacks if message.role != "system" else 0
    return _Fit(present, missing, next(((k, span.before) for k, span in enumerate(spans) if span is not None), (0, 0)))


def _anchors(row: Conversation, vocabulary: Vocabulary) -> list[int]:
    contents = [vocabulary.content(message.content) for message in (*row.messages, *(row.rejected or ()))]
    places = [np.unique(np.linspace(0, len(c) - KEY, ANCHORS).astype(int)) for c in contents if len(c) >= KEY]
    long = [np.frombuffer(content, np.uint8).astype(np.uint64) for content in contents if len(content) >= KEY]
    with np.errstate(over="ignore"):
        return [
            int((content[place : place + KEY] * _POWERS).sum())
            for content, own in zip(long, places, strict=True)
            for place in own.tolist()
        ]


def _windows(text: bytes, anchors: np.ndarray) -> list[int]:
    """The anchors that occur in a text, each once."""
    if len(text) < KEY or not len(anchors):
        return []
    windows = np.lib.stride_tricks.sliding_window_view(np.frombuffer(text, np.uint8), KEY)
    with np.errstate(over="ignore"):
        hashes = np.unique((windows.astype(np.uint64) * _POWERS).sum(axis=1))
    places = np.searchsorted(anchors, hashes).clip(max=len(anchors) - 1)
    return hashes[anchors[places] == hashes].tolist()
