"""Scores and a file -> the rows of the file that a quality sample has."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from tsqlora.data.rows import Rows, read_rows
from tsqlora.data.tokenise import sample_hash
from tsqlora.data.write import require_writable, write_rows
from tsqlora.errors import DataError
from tsqlora.quality.scores import Scores, sample


def select_rows(scores_path: Path, out: Path, *, fraction: float, seed: int = 0, data: Path | None = None) -> int:
    """Draws a quality sample and writes its rows; how many.

    The rows are those of `data`, found by their hashes (by position, if the scores have no
    hashes); without it, each drawn row's id, hash, quality and probability.
    """
    require_writable(out)
    scores = Scores.load(scores_path)
    chosen = sample(scores, fraction, seed)
    rows = _about(scores, chosen) if data is None else _of_file(scores, chosen, read_rows(data, split="train"))
    write_rows(out, rows)
    return len(rows)


def _about(scores: Scores, chosen: np.ndarray) -> list[dict[str, Any]]:
    hashes = scores.hashes
    return [
        {
            "id": int(j),
            **({} if hashes is None else {"hash": hashes[j]}),
            "quality": float(scores.quality[j]),
            "probability": float(scores.probability[j]),
        }
        for j in chosen
    ]


def _of_file(scores: Scores, chosen: np.ndarray, rows: Rows) -> list[dict[str, Any]]:
    if scores.hashes is None or "columns" not in scores.record:
        if len(rows) != len(scores):
            raise DataError(f"{rows.source} has {len(rows)} rows, and there are scores for {len(scores)}")
        return [rows.rows[j] for j in chosen]
    wanted = Counter(scores.hashes[j] for j in chosen)
    columns = scores.record["columns"]
    found: list[dict[str, Any]] = []
    for row in rows.rows:
        name = _hash(row, columns)
        if wanted[name] > 0:
            wanted[name] -= 1
            found.append(row)
    if missing := sum(wanted.values()):
        raise DataError(
            f"{rows.source} lacks {missing} of the {len(chosen)} drawn rows; give the file that was scored "
            f"(its columns {', '.join(c for c in columns.values() if c)} unchanged)"
        )
    return found


def _hash(row: dict[str, Any], columns: dict[str, str | None]) -> str:
    used = (columns["text"], columns["text_pair"], columns["label"])
    values = [None if column is None else row.get(column) for column in used]
    return sample_hash(*("" if value is None else str(value) for value in values))
