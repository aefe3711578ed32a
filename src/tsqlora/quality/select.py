"""Select: draw a quality sample and write its rows from their file."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np

from tsqlora.data.rows import Columns, row_hash
from tsqlora.data.table import Table
from tsqlora.data.write import can_copy, copy_rows, require_writable, write_rows
from tsqlora.errors import DataError
from tsqlora.files import reading, writing
from tsqlora.quality.epochs import sample
from tsqlora.quality.reasons import table_of
from tsqlora.quality.scores import Scores


def select_rows(scores_path: Path, out: Path, *, fraction: float, seed: int = 0, data: Path | None = None) -> int:
    """Draw a quality sample, write its rows, and return their number.

    Rows come from `data`, by hash, or by position if the scores have no hashes; they are copied verbatim if `out` has
    the same format. Without `data`, write id, hash, quality and probability of each drawn row.
    """
    require_writable(out)
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
    if scores.record.columns is not None:
        table = table.using(Columns(**scores.record.columns))
    places = _find_rows(scores, chosen, table)
    if table.path is not None and can_copy(table.path, out):
        copy_rows(table.path, out, places, table.dialect)
    else:
        write_rows(out, [row.cells for row in replace(table, ids=places)])
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
