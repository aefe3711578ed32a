"""Findings of rows among each other: copies, leaks from the evaluation file, contradictions, boilerplate."""

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache, partial

import numpy as np
from scipy.ndimage import binary_dilation

from tsqlora.compat.shapes import Int
from tsqlora.text.conversations import Conversation, Message
from tsqlora.text.ledger import Line

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
CELLS = 26
"""Bits of a stretch by which it is counted."""
SHOWN = 200
"""Characters of a leak that are shown."""
# Of scripts without blanks each character is a word.
_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W_{_UNSPACED}]+(?:'[^\W_{_UNSPACED}]+)*")

Hashes = Int[np.ndarray, " h"]


def among_rows(
    rows: Sequence[Conversation], lines: Sequence[Line], evaluation: Sequence[Conversation] | None = None
) -> dict[str, list[int]]:
    """Return row numbers by finding; the fate of a copy names the row that it copies, the detail of a leak its text."""
    findings = defaultdict(list[int])
    readable = [row for row in rows if row.problem is None and row.messages]
    originals = _copies(readable)
    for copy, original in originals.items():
        lines[copy].fate = f"duplicate of {original}" if lines[copy].fate == "trained" else lines[copy].fate
    findings["duplicate"] = sorted(originals)
    if evaluation is not None:
        leaks = _leaks(readable, [row for row in evaluation if row.messages])
        for row, span in leaks.items():
            lines[row].detail = lines[row].detail or f"the evaluation file has: {span[:SHOWN]}"
        findings["eval_leak"] = sorted(leaks)
    findings |= _answers(readable, originals)
    findings |= _pairs(readable)
    return dict(findings)


def words_of(text: str) -> list[str]:
    """Return the words of a text, without case.

    >>> words_of("It's late -- go home! 回家")
    ["it's", 'late', 'go', 'home', '回', '家']
    """
    return [word.casefold() for word in _WORD.findall(text)]


def _parts(row: Conversation) -> tuple[str, str, str]:
    """Prompt, answer and rejected answer."""
    return _text(row.question), _text(row.messages[len(row.question) :]), _text(row.rejected or ())


def _text(messages: Iterable[Message]) -> str:
    """What messages say and call, with single blanks."""
    return " ".join(" ".join(f"{m.content} {[m.further[key] for key in m.carried] or ''}" for m in messages).split())


def _copies(rows: Sequence[Conversation]) -> dict[int, int]:
    """The earlier row that each later copy has: equal, or near in prompt and answer, each by itself.

    Parts that share NEAR of their stretches share one of the first 1 − NEAR, in any order of all stretches (prefix
    filter, Chaudhuri et al. 2006). No stretch counts that more than SHARED rows have, so the time is linear.
    """
    first, copies, heads = dict[int, int](), dict[int, int](), [np.zeros(0, np.uint64)]
    for row in rows:
        if (original := first.setdefault(hash(_parts(row)), row.row)) != row.row:
            copies[row.row] = original
    single = [row for row in rows if row.row not in copies]
    counts = _counts(part for row in single for part in _parts(row))
    divided = lru_cache(1 << 12)(partial(_divided, counts=counts, most=_most(len(single))))
    for row in single:
        tagged = [divided(part)[0] ^ np.uint64(number) for number, part in enumerate(_parts(row))]
        own = np.sort(np.concatenate(tagged))
        head = own[: len(own) - int(NEAR * len(own)) + 1]
        heads.append(head[counts(head) > 1])
    keys, owners = np.concatenate(heads), np.repeat(np.arange(-1, len(single)), [*map(len, heads)])
    order = np.argsort(keys, kind="stable")
    keys, owners = keys[order], owners[order]
    both = [np.stack([owners[k:], owners[:-k]], 1)[keys[k:] == keys[:-k]] for k in range(1, SHARED)]
    for later, earlier in np.unique(np.concatenate(both), axis=0).tolist():
        one, other = single[later], single[earlier]
        pairs = zip(_parts(one), _parts(other), strict=True)
        if {one.row, other.row}.isdisjoint(copies) and all(a == b or _alike(divided(a), divided(b)) for a, b in pairs):
            copies[one.row] = other.row
    return copies


def _leaks(rows: Sequence[Conversation], evaluation: Sequence[Conversation]) -> dict[int, str]:
    """What each training row has of the evaluation file: a prompt, whatever the answer; or a whole row.

    A prompt is in a row if its stretches are, with or without those that many evaluation prompts share. Some must be
    its own: an instruction alone is no leak.
    """
    equal = {hash(_parts(row)) for row in evaluation}
    times_of = Counter(_text(m for m in row.question or row.messages if m.role != "system") for row in evaluation)
    prompts = [prompt for prompt, times in times_of.items() if times <= max(2, len(evaluation) / 2)]
    firsts = {hash(part): (row, number) for row in rows for number, part in enumerate(_parts(row))}
    theirs, ours = _counts(prompts), _counts(_parts(row)[number] for row, number in firsts.values())
    few, many = _most(len(prompts)), max(_most(len(rows)), BOILERPLATE * len(rows))
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
    for row in rows:
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


def _counts(texts: Iterable[str]) -> Callable[[Hashes], Int[np.ndarray, " h"]]:
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


def _answers(rows: Sequence[Conversation], copies: dict[int, int]) -> dict[str, list[int]]:
    """Prompts with far answers, unless most prompts repeat; and answers that many prompts share."""
    by_prompt, by_answer = defaultdict(list[Conversation]), defaultdict(list[Conversation])
    for row in rows:
        if row.rejected is None and row.answer.strip() and row.question and row.row not in copies:
            prompt, answer, _ = _parts(row)
            by_prompt[prompt.casefold()].append(row)
            by_answer[answer.casefold()].append(row)
    groups, conflicts = [group for group in by_prompt.values() if len(group) > 1], list[int]()
    if sum(map(len, groups)) < len(rows) / 2:
        for group in groups:
            sets = [{*words_of(row.answer)} for row in group]
            # Some of the others are enough, or the time would grow with the square of a large group.
            others = sets[:: max(1, len(sets) // SHARED)]
            pairs = zip(group, sets, strict=True)
            conflicts += [row.row for row, own in pairs if any(len(own & o) < FAR * len(own | o) for o in others)]
    least = max(LEAST_COPIES, BOILERPLATE * len(rows))
    shared = [row.row for answer, group in by_answer.items() if answer and len(group) >= least for row in group]
    return {"conflicting_answers": sorted(conflicts), "one_answer": sorted(shared)}


def _pairs(rows: Sequence[Conversation]) -> dict[str, list[int]]:
    """Pairs whose reverse is there too; and whether the chosen answer is mostly the longer one."""
    pairs = [(row.row, *_parts(row)) for row in rows if row.rejected]
    there = {(prompt, chosen, rejected) for _, prompt, chosen, rejected in pairs}
    conflicts = [row for row, prompt, a, b in pairs if a != b and (prompt, b, a) in there]
    longer = [row for row, _, chosen, rejected in pairs if len(chosen) > len(rejected)]
    biased = len(pairs) >= LEAST_PAIRS and len(longer) >= LONGER * len(pairs)
    return {"pair_conflict": conflicts, "length_bias": longer if biased else []}
