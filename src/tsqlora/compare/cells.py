"""One training of a comparison and its result file, so that an interrupted comparison resumes.

A cell is one method on one choice of rows with one seed and one learning rate.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tsqlora.errors import DataError
from tsqlora.files import write_json
from tsqlora.reports.comparison import CELLS_DIR


@dataclass(frozen=True, slots=True)
class Entry:
    """A method, and the policy that chooses its rows."""

    method: str
    policy: str

    @property
    def name(self) -> str:
        """The entry as `--methods` names it.

        >>> Entry("lora", "random").name
        'lora+random'
        """
        return f"{self.method}+{self.policy}"


@dataclass(frozen=True, slots=True)
class Cell:
    """One training of an entry."""

    entry: Entry
    seed: int
    learning_rate: float

    @property
    def name(self) -> str:
        """The stem of the cell's file.

        >>> Cell(Entry("lora", "all"), 0, 1e-3).name
        'lora+all_seed0_lr0.001'
        """
        return f"{self.entry.name}_seed{self.seed}_lr{self.learning_rate:g}"

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return asdict(self.entry) | {"seed": self.seed, "learning_rate": self.learning_rate}


def save(out: Path, cell: Cell, result: Mapping[str, Any]) -> None:
    """Write a cell's result atomically."""
    (out / CELLS_DIR).mkdir(parents=True, exist_ok=True)
    write_json(out / CELLS_DIR / f"{cell.name}.json", result)


def load(out: Path, cell: Cell) -> dict[str, Any] | None:
    """Read a cell's result; None if the cell has not run.  Raises DataError for the file of another cell."""
    path = out / CELLS_DIR / f"{cell.name}.json"
    if not path.exists():
        return None
    result = _read(path)
    if result["cell"] != cell.to_dict():
        raise DataError(f"{path} holds the result of another cell; remove the file, and the cell runs again")
    return result


def require_rows(out: Path, hashes: Mapping[int, str]) -> None:
    """Raise DataError where a finished cell was trained on other rows than its seed has now."""
    for path in sorted((out / CELLS_DIR).glob("*.json")):
        result = _read(path)
        now = hashes.get(result["cell"]["seed"])
        before = result.get("data_hash", now)
        if now is not None and before != now:
            raise DataError(
                f"{path} was trained on other rows (hash {before}) than the data has now ({now}); "
                "choose another --out, or restore the data"
            )


def _read(path: Path) -> dict[str, Any]:
    try:
        result: dict[str, Any] = json.loads(path.read_text())
        result["cell"]["seed"]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is not a cell's result ({error}); remove it, and the cell runs again") from None
    return result
