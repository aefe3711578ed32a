"""Select: draw a quality sample and write its rows from their file."""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from tsqlora.auditing.draw.epochs import sample
from tsqlora.auditing.reasons import table_of
from tsqlora.auditing.scores import ScoreRecord, Scores, reasons_of, written_elsewhere
from tsqlora.errors import DataError, SettingsError
from tsqlora.files import reading, writing
from tsqlora.rows.rows import Columns, row_hash
from tsqlora.rows.table import Table
from tsqlora.rows.write import copy_rows, require_writable, write_rows


def select_rows(scores_path: Path, out: Path, *, fraction: float, seed: int = 0, data: Path | None = None) -> int:
    """Draw a quality sample, write its rows, and return their number.

    Rows come from `data`, by hash, or by position if the scores have no hashes; they are copied verbatim if `out` has
    the same format. Without `data`, write id, hash, quality and probability of each drawn row. `scores_path` may be a
    folder or a pattern of parts, and `data` then the folder of their files. Of parts that another program
    wrote, with a column `reason`, the rows are written as they are there.
    """
    require_writable(out)
    if scores_path.is_dir() or (not scores_path.exists() and any(sign in scores_path.name for sign in "*?[")):
        return _select_of_parts(scores_path, out, fraction=fraction, seed=seed, data=data)
    with writing(out):
        scores = Scores.load(scores_path)
        reading(scores.record.data or "")
        table = None if data is None else table_of(scores, data)
    chosen = sample(scores, fraction, seed)
    if table is None:
        columns = {"id": scores.row_ids, "quality": scores.quality, "probability": scores.probability}
        columns |= {} if scores.hashes is None else {"hash": np.array(scores.hashes)}
        write_rows(out, [{name: values[j].item() for name, values in columns.items()} for j in chosen])
        return len(chosen)
    shown = table if scores.record.columns is None else table.using(Columns(**scores.record.columns))
    places = _find_rows(scores, chosen, shown)
    copy_rows(table if shown.path else shown, out, places)  # without a column of labels that the file has not
    return len(places)


def _find_rows(scores: Scores, chosen: np.ndarray, table: Table) -> np.ndarray:
    """Return the positions of the chosen rows in the file, ascending.

    These are their ids if the file still has the rows there, else the positions of their hashes.
    Raises DataError where the file lacks some.
    """
    columns = scores.record.columns
    if scores.hashes is None or columns is None:
        if len(table) != len(scores):
            raise DataError(
                f"{table.name} has {len(table)} rows, but there are scores for {len(scores)}; name their file"
            )
        return chosen
    places = np.sort(scores.row_ids[chosen])
    hash_at = {int(scores.row_ids[j]): scores.hashes[j] for j in chosen}
    required = Counter(scores.hashes[j] for j in chosen)
    positions: list[int] = []
    for place, row in enumerate(table):
        name = row_hash(row.cells, table.columns)
        if hash_at.get(place) == name:
            del hash_at[place]
            if not hash_at:
                return places
        if required[name] > 0:
            required[name] -= 1
            positions.append(place)
    if missing := sum(required.values()):
        raise DataError(
            f"{table.name} lacks {missing} of the {len(chosen)} drawn rows; give the file that was "
            f"scored (its columns {', '.join(c for key, c in columns.items() if c and key != 'media')} unchanged)"
        )
    return np.array(positions)


def _select_of_parts(pattern: Path, out: Path, *, fraction: float, seed: int, data: Path | None) -> int:
    """Draw from all parts as from one file: rows that are kept have the same chance, whatever their part."""
    folder, name = (pattern, "*.parquet") if pattern.is_dir() else (pattern.parent, pattern.name)
    if not (paths := sorted(folder.glob(name))):
        raise DataError(f"{pattern} has no part; `tsqlora score --look` writes one")
    parts = [_part(path) for path in paths]
    sizes = [len(reasons) for _, reasons in parts]
    n = sum(sizes)
    record = ScoreRecord(temperature=1.0, effective_sample_size=n, draw="even")
    every = Scores(
        {}, np.zeros(n, np.int8), np.zeros(n), np.ones(n), False, record, reasons=np.concatenate([r for _, r in parts])
    )
    chosen, ends = sample(every, fraction, seed), np.cumsum(sizes)
    rows: list[dict[str, Any]] = []
    for path, (about, _), end, size in zip(paths, parts, ends, sizes, strict=True):
        own = chosen[(chosen >= end - size) & (chosen < end)] - (end - size)
        rows += _rows_of_part(path, about, own, data)
    with writing(out):
        write_rows(out, rows)
    return len(rows)


def _part(path: Path) -> tuple[ScoreRecord | None, np.ndarray]:
    """Return the record and the reasons of a part, the only column that an even draw needs; none of another program."""
    if written_elsewhere(path):
        return None, reasons_of(pq.read_table(path, columns=["reason"]), path)
    scores = Scores.load(path, columns=("reason",))
    if not scores.even:
        raise SettingsError(
            f"{path} draws by Q, which is standardised within the part; score all rows together, or with a look that "
            "has no quality.preset"
        )
    return scores.record, scores.reason_codes


def _rows_of_part(path: Path, record: ScoreRecord | None, own: np.ndarray, data: Path | None) -> list[dict[str, Any]]:
    if not len(own):
        return []
    if record is None:
        return pq.read_table(path).take(own).to_pylist()
    scores = Scores.load(path)
    if data is None:
        names = scores.hashes or [None] * len(scores)
        return [{"part": path.name, "id": int(scores.row_ids[j]), "hash": names[j]} for j in own]
    table = table_of(scores, data / Path(record.data or "").name)
    if record.columns is not None:
        table = table.using(Columns(**record.columns))
    return [row.cells for row in replace(table, ids=_find_rows(scores, own, table))]
