"""Find the source row of each sequence that a trainer prepared, by the contents that its tokens spell."""

import re
from bisect import bisect_left
from collections import defaultdict, deque
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain, islice

from tsqlora.data.chat import Conversation
from tsqlora.text.ledger import LEAST_KNOWN, at_ends_alone, digest_of, locate
from tsqlora.text.prepared import Trained
from tsqlora.text.vocabulary import Vocabulary

SENTENCE = re.compile(r"[\n\0]|(?<=[.!?:。！？>\]])|(?=[<\[]|\b[A-Z]\w+:)")
"""Where contents are split, and a template's own words from them."""
CANDIDATES = 8
"""Most rows that are compared with a sequence: those with the most and the rarest of its sentences, and no others."""
COMMON = 256
"""Most rows that are counted for a sequence; a sentence that more rows have singles out none of them."""


def match(
    rows: Sequence[Conversation], sequences: Iterable[Trained], vocabulary: Vocabulary, *, packed: bool = False
) -> tuple[dict[int, list[Trained]], dict[int, str], list[Trained]]:
    """Return the sequences of each source row, how sure that is, and the sequences without a row.

    A match is "exact" if all contents are there in order, or all but what is cut at an end; "ambiguous" if equal rows
    share the sequences, which are dealt out by count. Of rows that begin alike, one without further contents comes
    first, then one without a sequence. Both sides of a pair have one row. Templates trim contents, so blanks around
    them do not count. With `packed`, a sequence that lacks a content is a piece that packing cut, and has no row.
    """
    equal, spelled = defaultdict(deque[int]), dict[str, str]()
    for j, row in enumerate(rows):
        messages = (*row.messages, *(row.rejected or ()), *(row.prompt or ()))
        spelled[digest := digest_of(row)] = "\n".join(vocabulary.content(one.content).decode() for one in messages)
        equal[digest].append(j)
    having = defaultdict(list[str])
    for digest in sorted(spelled, key=lambda digest: len(spelled[digest])):
        for sentence in _sentences(spelled[digest]):
            having[sentence].append(digest)
    ordered = sorted(having)
    taken, sure, left = defaultdict(list[Trained]), dict[int, str](), list[Trained]()
    units = defaultdict[tuple[int, int], list[Trained]](list)
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
        likely_cut = not packed and present >= LEAST_KNOWN and (most >= 1 / CANDIDATES or strange <= present)
        if whole or likely_cut:
            row = equal[best][0]
            equal[best].rotate(-1)
            taken[row] += unit
            sure[row] = "exact" if len(equal[best]) == 1 else "ambiguous"
        else:  # a "Yes." may be any row's, and a template's last line feed is no one's
            left += [one for one in unit if vocabulary.plain(one.ids).replace(b"\0", b"").strip()]
    return taken, sure, left


def _sentences(text: str) -> Iterable[str]:
    """The sentences of a text, each once, without blanks."""
    return dict.fromkeys(sentence for part in SENTENCE.split(text) if (sentence := "".join(part.split())))


def _votes(sentences: Iterable[str], having: Mapping[str, Sequence[str]], ordered: Sequence[str]) -> dict[str, float]:
    """Count the rows that have the sentences, each by how few rows have it; a limit may cut a sentence's end."""
    shared, votes = list[Sequence[str]](), defaultdict[str, float](float)
    for one in sentences:
        first, end = bisect_left(ordered, one), bisect_left(ordered, f"{one}\U0010ffff")
        whole = [one] if one in having else ordered[first : min(end, first + COMMON)]
        shared.append(list(dict.fromkeys(chain.from_iterable(having[sentence] for sentence in whole))))
    for digests in sorted(shared, key=len):
        if votes and len(votes) + len(digests) > COMMON:
            break
        for digest in islice(digests, COMMON):
            votes[digest] += 1 / len(digests)
    return votes


def _fit(row: Conversation, one: Trained, vocabulary: Vocabulary) -> tuple[int, int]:
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
