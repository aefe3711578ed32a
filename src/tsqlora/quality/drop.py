"""Kinds of rows that `--drop` removes: near-duplicates and outliers.  To add one, add entries to REASONS and DROPS.

Texts are near-duplicates if their sets of character 5-grams overlap by 0.9 or more (Jaccard index, estimated by
datasketch's MinHash; Broder, 1997).  Candidates are pairs whose signatures agree in a whole band; signatures are on
disk, so that any number of texts fits.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from tsqlora.compat.shapes import Bool, Float, Int, UInt32, UInt64
from tsqlora.errors import SettingsError, UnsupportedError, nearest
from tsqlora.quality.scores import Scores

FAR = 5.0
"""Robust standard deviations of the log gradient norm beyond which a row is an outlier."""
ALIKE = 0.9
CANDIDATE = 0.75
"""Overlap for which bands are planned: hardly a pair above ALIKE is missed, and pairs below are filtered out."""
SHINGLE = 5
PERMUTATIONS = 128
_CHUNK = 1024

Texts = Callable[[], Iterator[str]]
"""Reads the text of every scored row, in order."""

Drop = Callable[[Scores, Texts, Path], Bool[np.ndarray, " n"]]
"""(scores, texts, scratch file) -> rows to drop."""


def outliers(scores: Scores) -> Bool[np.ndarray, " n"]:
    """Return the rows whose gradient is far larger than usual in their class.  [ours]

    In logarithms, since the norms of a trained model span orders of magnitude. A class without spread has none.
    """
    if "gradient_norm" not in scores.terms:
        why = scores.record.not_ready or "the trusted rows teach nothing"
        warnings.warn(f"--drop outlier dropped no row, since gradient norms were not measured: {why}", stacklevel=2)
        return np.zeros(len(scores), dtype=np.bool_)
    norms = scores.terms["gradient_norm"].astype(np.float64)
    logs = np.log(np.maximum(norms, np.finfo(np.float64).tiny))
    groups = np.zeros(len(scores), dtype=np.int64) if scores.strata is None else scores.strata
    out = np.zeros(len(scores), dtype=np.bool_)
    for group in np.unique(groups):
        rows = groups == group
        centred = logs[rows] - np.median(logs[rows])
        spread = 1.4826 * np.median(np.abs(centred))
        out[rows] = (centred > FAR * spread) & (spread > 0)
    return out


def duplicates(scores: Scores, texts: Texts, scratch: Path) -> Bool[np.ndarray, " n"]:
    """Return the near-duplicates of better rows; kept rows are better than dropped ones."""
    return near_duplicates(texts(), np.where(scores.kept, scores.quality, -np.inf), scratch)


DROPS: dict[str, Drop] = {"duplicate": duplicates, "outlier": lambda scores, texts, scratch: outliers(scores)}


def drop_rows(scores: Scores, kinds: Sequence[str], texts: Texts, scratch: Path) -> Scores:
    """Drop the rows of these kinds; the first kind that applies is a row's reason."""
    require_drops(kinds)
    for kind in dict.fromkeys(kinds):
        scores = scores.drop(DROPS[kind](scores, texts, scratch), kind)
    return scores


def require_drops(kinds: Sequence[str]) -> None:
    """Raise SettingsError for an unknown kind, UnsupportedError for one whose package is missing."""
    for kind in kinds:
        if kind not in DROPS:
            raise SettingsError(f"--drop {kind}: unknown; {nearest(kind, DROPS)}")
    if "duplicate" in kinds:
        _require_datasketch()


def _require_datasketch() -> None:
    try:
        import datasketch  # noqa: F401
    except ImportError:
        raise UnsupportedError(
            "near-duplicates need the package datasketch; pip install 'tsqlora[dedup]', or remove --drop duplicate"
        ) from None


def near_duplicates(texts: Iterable[str], quality: Float[np.ndarray, " n"], scratch: Path) -> Bool[np.ndarray, " n"]:
    """Return the texts that are near-duplicates of a better one, or of an earlier one of equal quality.

    Args:
        texts: n texts, compared in lower case with normalised white space.
        scratch: a file of 512 bytes per text, which is removed.

    A chain of near-duplicates is one group.  Raises UnsupportedError without datasketch.
    """
    _require_datasketch()
    try:
        keys = _write_signatures(iter(texts), len(quality), scratch)
        signatures = np.memmap(scratch, dtype=np.uint32, mode="r", shape=(len(quality), PERMUTATIONS))
        pairs = np.concatenate([_alike(_candidates(band), signatures) for band in keys.T])
        del signatures
    finally:
        scratch.unlink(missing_ok=True)
    edges = coo_array((np.ones(len(pairs), dtype=np.bool_), tuple(pairs.T)), shape=(len(quality), len(quality)))
    _, groups = connected_components(edges, directed=False)
    order = np.lexsort((-quality, groups))
    worse = np.zeros(len(quality), dtype=np.bool_)
    worse[order[1:]] = groups[order[1:]] == groups[order[:-1]]
    return worse


def _write_signatures(texts: Iterator[str], n: int, path: Path) -> UInt64[np.ndarray, "n bands"]:
    """Write each text's signature, and return one number for each of its bands."""
    from datasketch import MinHash, MinHashLSH

    plan = MinHashLSH(threshold=CANDIDATE, num_perm=PERMUTATIONS)
    # Odd factors lose no bit of a signature; a collision of two bands only adds a candidate.
    factors = np.random.default_rng(0).integers(0, 2**63, size=plan.r, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
    keys = np.empty((n, plan.b), dtype=np.uint64)
    start = 0
    with open(path, "wb") as file:
        while chunk := list(islice(texts, _CHUNK)):
            hashed = MinHash.bulk([shingles(text) for text in chunk], num_perm=PERMUTATIONS)
            signatures = np.stack([one.hashvalues for one in hashed]).astype(np.uint32)
            file.write(signatures.tobytes())
            bands = signatures[:, : plan.b * plan.r].reshape(len(chunk), plan.b, plan.r)
            keys[start : start + len(chunk)] = (bands.astype(np.uint64) * factors).sum(2)
            start += len(chunk)
    assert start == n, (start, n)
    return keys


def shingles(text: str) -> set[bytes]:
    """Return the text's character 5-grams; a shorter text is its own.

    >>> sorted(shingles("A  Tree"))
    [b'a tre', b' tree']
    """
    plain = " ".join(text.lower().split())
    return {plain[j : j + SHINGLE].encode() for j in range(max(1, len(plain) - SHINGLE + 1))}


def _candidates(keys: UInt64[np.ndarray, " n"]) -> Int[np.ndarray, "pairs 2"]:
    """Pair rows of equal key with the previous and the first one, which is enough to connect groups."""
    order = np.argsort(keys, kind="stable")
    again = np.flatnonzero(keys[order[1:]] == keys[order[:-1]]) + 1
    starts = np.flatnonzero(np.diff(again, prepend=-1) > 1)
    first = np.repeat(again[starts] - 1, np.diff(starts, append=len(again)))
    return np.concatenate([np.stack([order[other], order[again]], axis=1) for other in (again - 1, first)])


def _alike(pairs: Int[np.ndarray, "pairs 2"], signatures: UInt32[np.ndarray, "n k"]) -> Int[np.ndarray, "alike 2"]:
    """Return the pairs whose signatures agree by ALIKE or more."""
    agree = [
        (signatures[part[:, 0]] == signatures[part[:, 1]]).mean(1) >= ALIKE
        for part in (pairs[start : start + _CHUNK] for start in range(0, len(pairs), _CHUNK))
    ]
    return pairs[np.concatenate(agree)] if agree else pairs
