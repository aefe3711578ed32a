"""Findings of rows among each other: copies, leaks from the evaluation file, contradictions, boilerplate."""

import re
from array import array
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache, partial
from itertools import chain

import numpy as np
from scipy.ndimage import binary_dilation

from tsqlora.auditing.texts.ledger import Line
from tsqlora.libs.shapes import Shaped, UInt64
from tsqlora.rows.chat import Chat, Message

WIDTH = 5
"""Words of a stretch, by which texts are compared."""
SHARED = 10
"""Texts that may share a stretch as copies do. What more of them share is the table's: an instruction, a schema."""
NEAR = 0.8
"""Share of common stretches from which texts are near-duplicates, or one contains the other."""
FAR = 0.3
"""Share of common words below which two answers differ."""
BOILERPLATE = 0.01
LEAST_COPIES = 5
LONGER, LEAST_PAIRS = 0.65, 50
BLOCK = 1 << 20
"""Keys that are compared at a time."""
CELLS = 26
"""Bits of a stretch by which it is counted, the first ones."""
TAG = 62 - CELLS
"""The bits of a stretch that tell prompts from answers; those below may be the row's number."""
SHOWN = 200
"""Characters of a leak that are shown."""
# Of scripts without blanks each character is a word.
_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W_{_UNSPACED}]+(?:'[^\W_{_UNSPACED}]+)*")

Hashes = UInt64[np.ndarray, " _"]


def among_rows(
    rows: Sequence[Chat], lines: Sequence[Line], evaluation: Sequence[Chat] | None = None
) -> dict[str, list[int]]:
    """Return row numbers by finding; the fate of a copy names the row that it copies, the detail of a leak its text.

    Rows are at the places of their numbers. They are read one after another, several times, and never held.
    """
    findings = defaultdict(list[int])
    readable = (row for row in rows if row.whole)
    digests = np.fromiter(map(_digest, readable), _DIGEST)
    originals = _copies(rows, digests)
    for copy, original in originals.items():
        lines[copy].fate = f"duplicate of {original}" if lines[copy].fate == "trained" else lines[copy].fate
    findings["duplicate"] = sorted(originals)
    if evaluation is not None:
        leaks = _leaks(rows, digests, [row for row in evaluation if row.whole])
        for row, span in leaks.items():
            lines[row].detail = lines[row].detail or f"the evaluation file has: {span[:SHOWN]}"
        findings["eval_leak"] = sorted(leaks)
    findings |= _answers(rows, digests, originals)
    findings |= _pairs(digests)
    return dict(findings)


_DIGEST = np.dtype(
    [(name, np.int64) for name in ("row", "whole", "turned", "prompt", "answer")]
    + [(name, np.bool_) for name in ("answered", "paired", "longer")]
)
"""A row's number; hashes of its texts, in their order and with the answers of a pair turned, and of prompt and answer
without case; and whether it has both and is no pair, or is one, whose chosen answer may be the longer."""


def _digest(row: Chat) -> tuple[int | bool, ...]:
    prompt, answer, rejected = _parts(row)
    answered, paired = bool(row.rejected is None and row.answer.strip() and row.question), bool(row.rejected)
    texts = ((prompt, answer, rejected), (prompt, rejected, answer), prompt.casefold(), answer.casefold())
    return (row.row, *map(hash, texts), answered, paired, paired and len(answer) > len(rejected))


def _some(rows: Iterable[Chat], numbers: np.ndarray) -> Iterator[Chat]:
    """Those of the rows that have these numbers, in order."""
    chosen = {*numbers.tolist()}
    return (row for row in rows if row.row in chosen)


def words_of(text: str) -> list[str]:
    """Return the words of a text, without case.

    >>> words_of("It's late -- go home! 回家")
    ["it's", 'late', 'go', 'home', '回', '家']
    """
    return [word.casefold() for word in _WORD.findall(text)]


def _parts(row: Chat) -> tuple[str, str, str]:
    """Prompt, answer and rejected answer."""
    rejected = () if row.rejected is None else row.rejected.whole[-1:]
    return _text(row.question), _text(row.whole[len(row.question) :]), _text(rejected)


def _text(messages: Iterable[Message]) -> str:
    """What messages say and call, with single blanks."""
    return " ".join(" ".join(f"{m.content} {[m.further[key] for key in m.carried] or ''}" for m in messages).split())


def _copies(rows: Sequence[Chat], digests: np.ndarray) -> dict[int, int]:
    """The earlier row that each later copy has: equal, or near in prompt and answer, each by itself.

    Parts that share NEAR of their stretches share one of the first 1 − NEAR, in any order of all stretches (prefix
    filter, Chaudhuri et al. 2006). No stretch counts that more than SHARED rows have, so the time is linear.
    """
    _, first, group = np.unique(digests["whole"], return_index=True, return_inverse=True)
    later = np.flatnonzero(first[group] != np.arange(len(group)))
    copies = dict(zip(digests["row"][later].tolist(), digests["row"][first[group[later]]].tolist(), strict=True))
    single = digests["row"][first]
    counts = _counts(part for row in _some(rows, single) for part in _parts(row))
    divided = lru_cache(1 << 12)(partial(_divided, counts=counts, most=_most(len(single))))
    # Each key ends with the number of its row, so that rows of equal stretches are side by side when keys are sorted.
    bits, keys = np.uint64(len(rows).bit_length()), array("Q")
    for row in _some(rows, single):
        tagged = [divided(part)[0] ^ np.uint64(number << TAG) for number, part in enumerate(_parts(row))]
        own = np.sort(np.concatenate(tagged))
        head = own[: len(own) - int(NEAR * len(own)) + 1]
        keys.frombytes((head[counts(head) > 1] >> bits << bits | np.uint64(row.row)).tobytes())
    ordered, pairs = np.frombuffer(keys, np.uint64), [np.zeros((0, 2), np.uint64)]
    ordered.sort()
    for start in range(0, len(ordered), BLOCK):
        part = ordered[start : start + BLOCK + SHARED]
        stretches, owners = part >> bits, part & ((np.uint64(1) << bits) - np.uint64(1))
        same = [(k, stretches[k:] == stretches[:-k]) for k in range(1, min(SHARED, len(part)))]
        pairs += [np.stack([owners[k:][equal], owners[:-k][equal]], 1) for k, equal in same]
    parts = lru_cache(1 << 12)(lambda row: _parts(rows[row]))
    for one, other in np.unique(np.concatenate(pairs), axis=0).tolist():
        both = zip(parts(one), parts(other), strict=True)
        if {one, other}.isdisjoint(copies) and all(a == b or _alike(divided(a), divided(b)) for a, b in both):
            copies[one] = other
    return copies


def _leaks(rows: Sequence[Chat], digests: np.ndarray, evaluation: Sequence[Chat]) -> dict[int, str]:
    """What each training row has of the evaluation file: a prompt, whatever the answer; or a whole row.

    A prompt is in a row if its stretches are, with or without those that many evaluation prompts share. Some must be
    its own: an instruction alone is no leak.
    """
    equal = {hash(_parts(row)) for row in evaluation}
    times_of = Counter(_text(m for m in row.question or row.whole if m.role != "system") for row in evaluation)
    prompts = [prompt for prompt, times in times_of.items() if times <= max(2, len(evaluation) / 2)]
    seen = set[int]()  # each text counts once, or a prompt with many answers would be the table's
    parts = (part for row in _some(rows, digests["row"]) for part in _parts(row))
    texts = (part for part in parts if not (hash(part) in seen or seen.add(hash(part))))
    theirs, ours = _counts(prompts), _counts(texts)
    few, many = _most(len(prompts)), max(_most(len(digests["row"])), BOILERPLATE * len(digests["row"]))
    index, contents = defaultdict(list[int]), list[tuple[str, Hashes, Hashes]]()
    for prompt in prompts:
        stretches = _stretches(prompt)
        shared = theirs(stretches) > few
        own = np.logical_not(shared | (ours(stretches) > many))
        alone = np.logical_not(binary_dilation(shared, np.ones(2 * WIDTH - 1)))
        for part in (np.ones_like(shared), alone) if shared.any() else (alone,):
            for one in {*stretches[part & own].tolist()}:
                index[one].append(len(contents))
            contents.append((prompt, stretches[part], np.unique(stretches[part & own])))
    leaks = dict[int, str]()
    for row in _some(rows, digests["row"]):
        text = " ".join(_parts(row))
        stretches = _stretches(text)
        hits = Counter(number for one in {*stretches.tolist()} for number in index.get(one, ()))
        near = [contents[number] for number, count in hits.items() if count >= NEAR * len(contents[number][2])]
        spans = (_span(text, stretches, *content) for content in near)
        if span := text if hash(_parts(row)) in equal else next(filter(None, spans), ""):
            leaks[row.row] = span
    return leaks


def _span(text: str, stretches: Hashes, prompt: str, part: Hashes, own: Hashes) -> str:
    """The text from a prompt's first own stretch to its last; "" if it lacks a part, or the wording of a short one."""
    words, places = [*_WORD.finditer(text)], np.flatnonzero(np.isin(stretches, own))
    span = text[words[places[0]].start() : words[places[-1] + WIDTH - 1].end()]
    needed = [*_WORD.finditer(prompt)]
    wording = "" if len(needed) >= 2 * WIDTH else prompt[needed[0].start() : needed[-1].end()].casefold()
    return span if wording in text.casefold() and np.isin(part, stretches).mean() >= NEAR else ""


def _most(rows: int) -> int:
    """Rows that may share a stretch: SHARED, in a small table fewer than half."""
    return max(2, min(SHARED, (rows - 1) // 2))


def _stretches(text: str) -> Hashes:
    """A hash of every WIDTH words in a row."""
    words = words_of(text)
    return np.fromiter(map(hash, zip(*(words[k:] for k in range(WIDTH)), strict=False)), np.int64).view(np.uint64)


def _counts(texts: Iterable[str]) -> Callable[[Hashes], Shaped[np.ndarray, " _"]]:
    """The number of texts that have each of some stretches, or that are the text with this hash."""
    counts, shift = np.zeros(1 << CELLS, np.uint16), np.uint64(64 - CELLS)
    for text in texts:
        cells = np.append(_stretches(text), _hash(text)) >> shift
        counts[cells] += counts[cells] < np.iinfo(np.uint16).max
    return lambda stretches: counts[stretches >> shift]


def _hash(text: str) -> Hashes:
    return np.array([hash(text)]).view(np.uint64)


def _divided(text: str, counts: Callable[[Hashes], np.ndarray], most: int) -> tuple[Hashes, Hashes]:
    """The stretches that a text alone has, and those of more than `most` texts; a short text is one stretch."""
    stretches = np.unique(_stretches(text))
    stretches = stretches if len(stretches) > WIDTH else _hash(text)
    shared = counts(stretches) > most
    return stretches[~shared], stretches[shared]


def _alike(one: tuple[Hashes, Hashes], other: tuple[Hashes, Hashes]) -> bool:
    """Whether two texts share NEAR of their own stretches, and no two of the table's tell them apart."""
    both = len(np.intersect1d(one[0], other[0], assume_unique=True))
    apart = len(np.setdiff1d(one[1], other[1])) and len(np.setdiff1d(other[1], one[1]))
    return not apart and 0 < NEAR * (len(one[0]) + len(other[0]) - both) <= both


def _answers(rows: Sequence[Chat], digests: np.ndarray, copies: Mapping[int, int]) -> dict[str, list[int]]:
    """Prompts with far answers, unless most prompts repeat; and answers that many prompts share."""
    chosen = digests["answered"] & ~np.isin(digests["row"], [*copies])
    groups, conflicts = _groups(digests["row"][chosen], digests["prompt"][chosen], 2), list[int]()
    if sum(map(len, groups)) < len(digests["row"]) / 2:
        for group in groups:
            # Some of the others are enough, or the time would grow with the square of a large group.
            others = [{*words_of(rows[row].answer)} for row in group[:: max(1, len(group) // SHARED)]]
            for row in group:
                own = {*words_of(rows[row].answer)}
                conflicts += [row] if any(len(own & o) < FAR * len(own | o) for o in others) else []
    least = max(LEAST_COPIES, BOILERPLATE * len(digests["row"]))
    shared = chain.from_iterable(_groups(digests["row"][chosen], digests["answer"][chosen], least))
    return {"conflicting_answers": sorted(conflicts), "one_answer": sorted(shared)}


def _groups(rows: np.ndarray, hashes: np.ndarray, least: float) -> list[list[int]]:
    """The rows that share a hash, where there are enough of them."""
    order = np.argsort(hashes, kind="stable")
    parts = np.split(rows[order], np.flatnonzero(np.diff(hashes[order])) + 1)
    return [part.tolist() for part in parts if len(part) >= least]


def _pairs(digests: np.ndarray) -> dict[str, list[int]]:
    """Pairs whose reverse is there too; and whether the chosen answer is mostly the longer one."""
    pairs = digests[digests["paired"]]
    turned = np.isin(pairs["turned"], pairs["whole"]) & (pairs["turned"] != pairs["whole"])
    conflicts, longer = pairs["row"][turned].tolist(), pairs["row"][pairs["longer"]].tolist()
    biased = len(pairs) >= LEAST_PAIRS and len(longer) >= LONGER * len(pairs)
    return {"pair_conflict": conflicts, "length_bias": longer if biased else []}
