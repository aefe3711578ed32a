"""Near-duplicates among texts of any number: MinHash signatures on disk, a few numbers a text in memory.

Texts are alike whose sets of character 5-grams overlap by 0.9 or more (Jaccard's index, estimated by
datasketch's MinHash; Broder, 1997).  Candidates are pairs whose signatures agree in a whole band.
"""

from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float, Int, UInt32, UInt64
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from tsqlora.errors import UnsupportedError

ALIKE = 0.9
CANDIDATE = 0.75
"""Bands are planned for this overlap: then hardly a pair above ALIKE is missed, and what is below is sorted out."""
SHINGLE = 5
PERMUTATIONS = 128
_CHUNK = 1024


def require_datasketch() -> None:
    """Raises UnsupportedError where the package that finds near-duplicates is not installed."""
    try:
        import datasketch  # noqa: F401
    except ImportError:
        raise UnsupportedError(
            "near-duplicates need the package datasketch; pip install 'tsqlora[dedup]', or leave out --drop duplicate"
        ) from None


def near_duplicates(texts: Iterable[str], quality: Float[np.ndarray, " n"], scratch: Path) -> Bool[np.ndarray, " n"]:
    """Whether each text is like one that is better, or as good and earlier: of a group one stays.

    Args:
        texts: n of them; lower case, and any white space is one space.
        scratch: a file of 512 bytes a text, which is removed.

    A chain of texts each like the next is one group.  Raises UnsupportedError without datasketch.
    """
    require_datasketch()
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
    """Writes each text's signature, and returns one number for each of its bands."""
    from datasketch import MinHash, MinHashLSH

    plan = MinHashLSH(threshold=CANDIDATE, num_perm=PERMUTATIONS)
    # Odd, so that no bit of a signature is lost; two bands with one number are only candidates.
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
    """The text's character 5-grams; a shorter text is its own.

    >>> sorted(shingles("A  Tree"))
    [b'a tre', b' tree']
    """
    plain = " ".join(text.lower().split())
    return {plain[j : j + SHINGLE].encode() for j in range(max(1, len(plain) - SHINGLE + 1))}


def _candidates(keys: UInt64[np.ndarray, " n"]) -> Int[np.ndarray, "pairs 2"]:
    """Rows with one key, each with the one before it and with the first: enough to join what is alike."""
    order = np.argsort(keys, kind="stable")
    again = np.flatnonzero(keys[order[1:]] == keys[order[:-1]]) + 1
    starts = np.flatnonzero(np.diff(again, prepend=-1) > 1)
    first = np.repeat(again[starts] - 1, np.diff(starts, append=len(again)))
    return np.concatenate([np.stack([order[other], order[again]], axis=1) for other in (again - 1, first)])


def _alike(pairs: Int[np.ndarray, "pairs 2"], signatures: UInt32[np.ndarray, "n k"]) -> Int[np.ndarray, "alike 2"]:
    """The pairs whose signatures agree in a share of ALIKE or more."""
    agree = [
        (signatures[part[:, 0]] == signatures[part[:, 1]]).mean(1) >= ALIKE
        for part in (pairs[start : start + _CHUNK] for start in range(0, len(pairs), _CHUNK))
    ]
    return pairs[np.concatenate(agree)] if agree else pairs
