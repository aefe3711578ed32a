"""Find the source row of each sequence that a trainer prepared, by the contents that its tokens spell."""

from collections import defaultdict, deque
from collections.abc import Iterable, Sequence

import numpy as np

from tsqlora.text.conversations import Conversation
from tsqlora.text.ledger import at_ends_alone, digest_of, locate
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
    share the sequences, which are dealt out by count. Templates trim contents, so blanks around them do not count.
    """
    by_anchor, alone = defaultdict(list[int]), list[int]()
    for j, row in enumerate(rows):
        anchors = _anchors(row)
        for anchor in anchors:
            by_anchor[anchor].append(j)
        if not anchors and row.messages:
            alone.append(j)
    anchors = np.array(sorted(by_anchor), np.uint64)
    equal, taken = defaultdict(deque[int]), dict[int, list[Trained]]()
    for j, row in enumerate(rows):
        equal[digest_of(row)].append(j)
    sure, left = dict[int, str](), list[Trained]()
    for one in sequences:
        votes = defaultdict(float)
        for anchor in _windows(vocabulary.text(one.ids.tolist()), anchors):
            for j in by_anchor[anchor]:
                votes[j] += 1 / len(by_anchor[anchor])  # what few rows have says more
        likely = sorted(votes, key=lambda j: (-votes[j], j))
        scores = {j: _known_bytes(rows[j], one, vocabulary) for j in _distinct(rows, likely)}
        if not any(scores.values()):
            scores = {j: _known_bytes(rows[j], one, vocabulary) for j in alone}
        best = max(scores, key=lambda j: scores[j], default=None)
        best = None if best is None or not scores[best] else best
        if best is None:
            left.append(one)
            continue
        group = equal[digest_of(rows[best])]
        if not one.side or one.side == "chosen":
            group.rotate(-1)
        row = group[-1]
        taken.setdefault(row, []).append(one)
        sure[row] = "exact" if len(group) == 1 else "ambiguous"
    return taken, sure, left


def unwrapped(rows: Sequence[Conversation], wrapped: Sequence[Trained], vocabulary: Vocabulary) -> list[Trained]:
    """Return the sequence of each row of a stream that was cut into equal parts, as TRL's `wrapped` packing does.

    Rows are looked for in order; one that is not there is left out. A row ends behind its last content's stop.
    """
    ids, targets = (np.concatenate([getattr(one, name) for one in wrapped]) for name in ("ids", "targets"))
    starts = np.cumsum([0, *(len(one.ids) for one in wrapped)])
    text, ends = vocabulary.text(ids.tolist()), vocabulary.ends(ids)
    parts, place, first = list[Trained](), 0, 0
    for row in rows:
        at = place
        for message in row.messages:
            content = message.content.strip().encode()
            at = text.find(content, at)
            if at < 0:
                break
            at += len(content)
        if at <= place:
            continue
        last = int(np.searchsorted(ends, at, side="left")) + 1
        last += next((k + 1 for k, j in enumerate(ids[last : last + BEHIND].tolist()) if j in vocabulary.stops), 0)
        part = int(np.searchsorted(starts, first, side="right")) - 1
        parts.append(Trained(ids[first:last], targets[first:last], part))
        place, first = int(ends[last - 1]), last
    return parts


def _distinct(rows: Sequence[Conversation], likely: Sequence[int]) -> Iterable[int]:
    """The first candidates, one of equal rows."""
    seen = set[str]()
    for j in likely:
        digest = digest_of(rows[j])
        if digest not in seen:
            seen.add(digest)
            yield j
        if len(seen) == CANDIDATES:
            return


def _known_bytes(row: Conversation, one: Trained, vocabulary: Vocabulary) -> int:
    """How much of the row's contents a sequence has, without system prompts; 0 if some is missing between others."""
    messages = row.messages
    if one.side == "rejected" and row.rejected is not None:
        messages = (*(row.prompt or row.question), *row.rejected)
    spans = locate(messages, one.ids, vocabulary)
    if not at_ends_alone(spans, messages):
        return 0
    return sum(
        len(message.content.strip().encode()) - span.before - span.behind
        for message, span in zip(messages, spans, strict=True)
        if span is not None and message.role != "system"
    )


def _anchors(row: Conversation) -> list[int]:
    contents = [message.content.strip().encode() for message in (*row.messages, *(row.rejected or ()))]
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
