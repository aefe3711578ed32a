"""Findings of rows among each other: copies, leaks into the evaluation file, contradictions, boilerplate."""

import re
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from functools import lru_cache

import numpy as np

from tsqlora.compat.shapes import Int
from tsqlora.text.conversations import Conversation
from tsqlora.text.ledger import Line, digest_of

WIDTH = 5
"""Words of a shingle."""
BANDS, ROWS_A_BAND = 16, 4
NEAR = 0.8
"""Share of common shingles above which texts are near-duplicates; such a pair shares a band with 99.98 %."""
FAR = 0.3
"""Share of common words below which two answers differ."""
BOILERPLATE = 0.01
LEAST_COPIES = 5
LONGER, LEAST_PAIRS = 0.65, 50

Signature = Int[np.ndarray, " p"]


def among_rows(
    rows: Sequence[Conversation], lines: Sequence[Line], evaluation: Sequence[Conversation] | None = None
) -> dict[str, list[int]]:
    """Return row numbers by finding; the fate of a copy names the row that it copies."""
    findings = defaultdict(list[int])
    readable = [row for row in rows if row.problem is None and row.messages]
    originals = _copies(readable)
    for copy, original in originals.items():
        lines[copy].fate = f"duplicate of {original}" if lines[copy].fate == "trained" else lines[copy].fate
    findings["duplicate"] = sorted(originals)
    if evaluation is not None:
        findings["eval_leak"] = _leaks(readable, [row for row in evaluation if row.messages])
    findings |= _answers(readable, originals)
    findings |= _pairs(readable)
    return dict(findings)


def words_of(text: str) -> list[str]:
    """Return the words of a text, without case.

    >>> words_of("It's late -- go home!")
    ["it's", 'late', 'go', 'home']
    """
    return re.findall(r"[^\W_]+(?:'[^\W_]+)*", text.casefold())


def _contents(row: Conversation) -> str:
    """What a row says without its system prompt, which many rows share."""
    return "\n".join(m.content for m in (*row.messages, *(row.rejected or ())) if m.role != "system")


def _copies(rows: Sequence[Conversation]) -> dict[int, int]:
    """The earlier row that each later copy has, exact or near."""
    first, copies = dict[str, int](), dict[int, int]()
    shingles = dict[int, np.ndarray]()
    bands = dict[tuple[int, bytes], list[int]]()
    for row in rows:
        key = digest_of(row)
        if key in first:
            copies[row.row] = first[key]
            continue
        first[key] = row.row
        own = _shingles(_contents(row))
        if own is None:
            continue
        near = None
        for band in _bands(own):
            near = next((o for o in bands.get(band, ()) if _alike(own, shingles[o]) >= NEAR), near)
        if near is not None:
            copies[row.row] = near
            continue
        shingles[row.row] = own
        for band in _bands(own):
            bands.setdefault(band, []).append(row.row)
    return copies


def _leaks(rows: Sequence[Conversation], evaluation: Sequence[Conversation]) -> list[int]:
    """Training rows that the evaluation file has, in equal words or nearly."""
    exact = {" ".join(words_of(_contents(row))) for row in evaluation}
    bands = defaultdict(list[np.ndarray])
    for row in evaluation:
        if (own := _shingles(_contents(row))) is not None:
            for band in _bands(own):
                bands[band].append(own)

    def leaks(text: str) -> bool:
        if " ".join(words_of(text)) in exact:
            return True
        own = _shingles(text)
        near = () if own is None else (other for band in _bands(own) for other in bands.get(band, ()))
        return own is not None and any(_alike(own, other) >= NEAR for other in near)

    return [row.row for row in rows if leaks(_contents(row))]


@lru_cache(1 << 18)  # the same words come again and again
def _number(word: str) -> int:
    return zlib.crc32(word.encode())


def _shingles(text: str) -> np.ndarray | None:
    """Hashes of every WIDTH words in a row, sorted, each once; None for a text that is too short."""
    words = words_of(text)
    if len(words) < 2 * WIDTH:
        return None
    numbers = np.array([*map(_number, words)], np.uint64)
    with np.errstate(over="ignore"):
        sums = np.zeros(len(words) - WIDTH + 1, np.uint64)
        for k in range(WIDTH):
            sums = sums * np.uint64(0x9E3779B97F4A7C15) + numbers[k : len(words) - WIDTH + 1 + k]
    return np.unique(sums)


_FACTORS = np.random.default_rng(46).integers(1, 2**63, BANDS * ROWS_A_BAND, np.uint64) | np.uint64(1)


def _bands(shingles: np.ndarray) -> Iterator[tuple[int, bytes]]:
    """MinHash (Broder 1997): texts with many common shingles share a band with a high probability."""
    with np.errstate(over="ignore"):
        least = ((shingles[:, None] * _FACTORS) >> np.uint64(20)).min(axis=0)
    for band in range(BANDS):
        yield band, least[band * ROWS_A_BAND : (band + 1) * ROWS_A_BAND].tobytes()


def _alike(one: np.ndarray, other: np.ndarray) -> float:
    both = len(np.intersect1d(one, other, assume_unique=True))
    return both / (len(one) + len(other) - both)


def _answers(rows: Sequence[Conversation], copies: dict[int, int]) -> dict[str, list[int]]:
    """Prompts with far answers, unless most prompts repeat; and answers that many prompts share."""
    by_prompt, by_answer = defaultdict(list[Conversation]), defaultdict(list[Conversation])
    for row in rows:
        if row.rejected is None and row.answer.strip() and row.question and row.row not in copies:
            by_prompt["\0".join(_spaced(m.content) for m in row.question)].append(row)
            by_answer[_spaced(row.answer)].append(row)
    repeated = sum(len(group) for group in by_prompt.values() if len(group) > 1)
    conflicts = list[int]()
    if repeated < len(rows) / 2:
        for group in (group for group in by_prompt.values() if len(group) > 1):
            sets = [{*words_of(row.answer)} for row in group]
            for j, row in enumerate(group):
                if any(len(sets[j] & o) < FAR * len(sets[j] | o) for k, o in enumerate(sets) if k != j):
                    conflicts.append(row.row)
    least = max(LEAST_COPIES, BOILERPLATE * len(rows))
    shared = [row.row for answer, group in by_answer.items() if answer and len(group) >= least for row in group]
    return {"conflicting_answers": sorted(conflicts), "one_answer": sorted(shared)}


def _spaced(text: str) -> str:
    """The text without case, with single blanks."""
    return " ".join(text.casefold().split())


def _pairs(rows: Sequence[Conversation]) -> dict[str, list[int]]:
    """Pairs whose reverse is there too; and whether the chosen answer is mostly the longer one."""
    pairs = [(row, row.answer.strip(), row.rejected[-1].content.strip()) for row in rows if row.rejected]
    keys = Counter((_prompt(row), chosen, rejected) for row, chosen, rejected in pairs)
    conflicts = [row.row for row, a, b in pairs if a != b and (_prompt(row), b, a) in keys]
    longer = [row.row for row, chosen, rejected in pairs if len(chosen) > len(rejected)]
    biased = len(pairs) >= LEAST_PAIRS and len(longer) >= LONGER * len(pairs)
    return {"pair_conflict": conflicts, "length_bias": longer if biased else []}


def _prompt(row: Conversation) -> str:
    return "\0".join(m.content.strip() for m in row.question)
