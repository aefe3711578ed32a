"""Audit the set that a trainer has prepared, and leave out the rows of named findings."""

import tempfile
import warnings
from collections.abc import Collection
from pathlib import Path
from typing import Any

from tsqlora.errors import DataError
from tsqlora.run.text_audit import audit_prepared
from tsqlora.text.findings import OF_LABELS, impossible, require_possible
from tsqlora.text.prepared import is_packed, sequences_of

MOST = 0.5
"""Share of the rows that findings may leave out."""


def require_findings(names: Collection[str], *, answers: bool) -> None:
    """Raise SettingsError for a name that no finding has, or that no row of a set without texts can have."""
    require_possible(names, impossible(OF_LABELS, evaluation=False, answers=answers))


def without_findings(
    made: Any, *, model: str, out: Path, drop: Collection[str] = (), answers: bool = False
) -> tuple[Any, dict[str, Any]]:
    """Write the audit of a prepared `datasets.Dataset` to `out`; return the set without the rows of `drop`.

    A packed row with such a sequence is left out whole, with a warning. With `answers` the model reads the answers.
    Raises DataError if more than half of the rows would be left out, SettingsError for a finding that none can have.
    """
    with tempfile.TemporaryDirectory() as folder:
        made.save_to_disk(folder)
        result = audit_prepared(Path(folder), model=model, out=out, answers=answers)
    require_possible(drop, result["cannot"])
    places = {place for one in result["findings"] if one["name"] in drop for place in one["places"]}
    rows = _packed_rows(made) if places else None
    dropped = places if rows is None else {rows[place] for place in places}
    if len(dropped) > MOST * len(made):
        cure = "remove the cause" if rows is None else "remove the cause, or prepare the rows without packing"
        raise DataError(
            f"{', '.join(drop)} would leave out {len(dropped)} of {len(made)} rows, more than half; see {out}, "
            f"and {cure}"
        )
    if rows is not None:
        warnings.warn(
            f"{len(dropped)} packed rows are left out whole, for {len(places)} of their sequences with "
            f"{', '.join(drop)}; prepare the rows without packing to leave out these alone",
            stacklevel=2,
        )
    left = [place for place in range(len(made)) if place not in dropped]
    summary = {"rows": len(made), "left_out": len(dropped), "audit": str(out)}
    return made.select(left) if dropped else made, summary


def _packed_rows(made: Any) -> list[int] | None:
    """The row of each sequence of a packed set, whose audit numbers sequences; None where it numbers rows."""
    sequences = list(sequences_of(made))
    return [one.row for one in sequences] if is_packed(sequences) else None
