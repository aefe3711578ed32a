"""Scores and a file -> the rows of the file that a quality sample has."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tsqlora.data.cells import row_hash
from tsqlora.data.rows import Source, open_split
from tsqlora.data.write import can_copy, copy_rows, require_apart, require_writable, write_rows
from tsqlora.errors import DataError
from tsqlora.quality.epochs import sample
from tsqlora.quality.explain import hints_of
from tsqlora.quality.scores import Scores


def select_rows(scores_path: Path, out: Path, *, fraction: float, seed: int = 0, data: Path | None = None) -> int:
    """Draws a quality sample and writes its rows; how many.

    The rows are those of `data`, found by their hashes (by position, if the scores have no
    hashes), as they stand there if `out` has its format; without it, each drawn row's id,
    hash, quality and probability.
    """
    require_writable(out)
    require_apart(out, scores_path, data)
    scores = Scores.load(scores_path)
    chosen = sample(scores, fraction, seed)
    if data is None:
        write_rows(out, _about(scores, chosen))
        return len(chosen)
    source = open_split(data, split="train", hints=hints_of(scores))
    places = find_rows(scores, chosen, source)
    if source.path is not None and can_copy(source.path, out):
        copy_rows(source.path, out, places, source.dialect)
    else:
        write_rows(out, rows_at(source, places))
    return len(places)


def find_rows(scores: Scores, chosen: np.ndarray, source: Source) -> np.ndarray:
    """Where the chosen rows stand in the file, ascending.

    At their own ids where the file still has them there, else wherever their hashes are.
    Raises DataError where the file lacks some.
    """
    columns = scores.record.columns
    if scores.hashes is None or columns is None:
        if (rows := sum(len(chunk) for chunk in source.chunks())) != len(scores):
            raise DataError(f"{source.name} has {rows} rows, and there are scores for {len(scores)}")
        return chosen
    order = np.argsort(_ids(scores)[chosen], kind="stable")
    places, hashes = _ids(scores)[chosen][order], [scores.hashes[j] for j in chosen[order]]
    if _all_there(_hashes_of(source, columns), places, hashes):
        return places
    wanted = Counter(hashes)
    found: list[int] = []
    for place, name in enumerate(_hashes_of(source, columns)):
        if wanted[name] > 0:
            wanted[name] -= 1
            found.append(place)
    if missing := sum(wanted.values()):
        raise DataError(
            f"{source.name} lacks {missing} of the {len(chosen)} drawn rows; give the file that was "
            f"scored (its columns {', '.join(c for c in columns.values() if c)} unchanged)"
        )
    return np.array(found)


def _hashes_of(source: Source, columns: Mapping[str, str | None]) -> Iterator[str]:
    """Of every row, in order; one chunk of rows is in memory at a time."""
    return (row_hash(row, columns) for chunk in source.chunks() for row in chunk.rows)


def _all_there(there: Iterable[str], places: np.ndarray, hashes: Sequence[str]) -> bool:
    """Whether the rows at these places, which ascend, have these hashes."""
    wanted = zip(places.tolist(), hashes, strict=True)
    place, name = next(wanted)
    for here, found in enumerate(there):
        if here == place:
            if found != name:
                return False
            place, name = next(wanted, (-1, ""))
            if place < 0:
                return True
    return False


def rows_at(source: Source, places: np.ndarray) -> list[dict[str, Any]]:
    """The rows of the file at these places, which ascend."""
    wanted = set(places.tolist())
    rows = (row for chunk in source.chunks() for row in chunk.rows)
    return [row for place, row in enumerate(rows) if place in wanted]


def _about(scores: Scores, chosen: np.ndarray) -> list[dict[str, Any]]:
    hashes, ids = scores.hashes, _ids(scores)
    return [
        {
            "id": int(ids[j]),
            **({} if hashes is None else {"hash": hashes[j]}),
            "quality": float(scores.quality[j]),
            "probability": float(scores.probability[j]),
        }
        for j in chosen
    ]


def _ids(scores: Scores) -> np.ndarray:
    return np.arange(len(scores)) if scores.ids is None else scores.ids
