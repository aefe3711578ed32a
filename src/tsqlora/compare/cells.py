"""A cell of a comparison: one method on one choice of rows, one seed, one learning rate.

The result of a finished cell is one JSON file, so that an interrupted comparison goes on.
"""

import json
from collections.abc import Mapping, Sequence
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
        """The name of its file.

        >>> Cell(Entry("lora", "all"), 0, 1e-3).name
        'lora+all_seed0_lr0.001'
        """
        return f"{self.entry.name}_seed{self.seed}_lr{self.learning_rate:g}"

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return asdict(self.entry) | {"seed": self.seed, "learning_rate": self.learning_rate}


def path_of(out: Path, cell: Cell) -> Path:
    """The cell's file."""
    return out / CELLS_DIR / f"{cell.name}.json"


def save(out: Path, cell: Cell, found: Mapping[str, Any]) -> None:
    """Writes a cell's result, whole or not at all."""
    path = path_of(out, cell)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, found)


def load(out: Path, cell: Cell) -> dict[str, Any] | None:
    """A cell's result, None if it was not run.  Raises DataError for a file that is not this cell's."""
    path = path_of(out, cell)
    if not path.exists():
        return None
    found = _read(path)
    if found["cell"] != cell.to_dict():
        raise DataError(f"{path} is of another cell; remove it, and it is run again")
    return found


def known_seeds(out: Path, seeds: Sequence[int]) -> list[int]:
    """The seeds of which there is a cell."""
    return [seed for seed in seeds if any((out / CELLS_DIR).glob(f"*_seed{seed}_lr*.json"))]


def require_rows(out: Path, hashes: Mapping[int, str]) -> None:
    """Raises DataError where a cell was trained on other rows than those that its seed has now."""
    for path in sorted((out / CELLS_DIR).glob("*.json")):
        found = _read(path)
        now = hashes.get(found["cell"]["seed"])
        was = found.get("data_hash", now)
        if now is not None and was != now:
            raise DataError(
                f"{path} is of other rows (hash {was}) than the data has now ({now}), so the cells in {out} cannot be "
                "compared with new ones; name another --out, or put the data back"
            )


def _read(path: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(path.read_text())
        found["cell"]["seed"]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: not a cell's result ({error}); remove it, and it is run again") from None
    return found
