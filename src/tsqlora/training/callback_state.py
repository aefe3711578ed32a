"""State of the callbacks in a Trainer's checkpoint: a resumed run goes on as if it had never stopped.

The Trainer saves weights, optimizer, schedule and random state. RankCallback adds
`tsqlora.json` and `tsqlora.safetensors`, QualityCallback `tsqlora_quality.json`, GuardCallback `tsqlora_guard.json`.
Costs of training are in `trainer_state.json`. The states are read once `Checkpoints` has found every file intact.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from tsqlora import distributed
from tsqlora.errors import SettingsError, TsqLoraError
from tsqlora.files import write_json, write_tensors
from tsqlora.quality.cost import PhaseCost
from tsqlora.ranks.events import RankEvent

VERSION = 4
"""Of the callbacks' files. 4: labels are judged once, and trusted rows come last; 3: a look before the first step, in
place of a warm-up; 2: draws from named streams."""
RANKS_FILE = "tsqlora.json"
IMPORTANCE_FILE = "tsqlora.safetensors"
QUALITY_FILE = "tsqlora_quality.json"
GUARD_FILE = "tsqlora_guard.json"


@dataclass(frozen=True, slots=True)
class RankState:
    """State of RankCallback: the budget in parameters, the interval in steps, and all events."""

    layers: list[str]
    """The rows of `importance`, in order."""
    importance: dict[str, Tensor]
    events: list[RankEvent]
    started: bool
    postponed: bool
    """Whether the next step adjusts, since the gradients of one that was due overflowed."""
    budget: int
    interval: int
    seconds: float
    withheld: bool
    """Whether the last step that was due did not adjust, since rows were not scored yet."""
    passes: int
    """Rows of the forward and backward passes for the first ranks, and their tokens."""
    tokens: int
    options: dict[str, Any]
    """Options of the loop beside `interval`."""

    def save(self, folder: Path) -> None:
        if not distributed.is_first():
            return
        values = self.to_dict()
        write_tensors(folder / IMPORTANCE_FILE, values.pop("importance"))
        write_json(folder / RANKS_FILE, {"version": VERSION, **values})

    @classmethod
    def load(cls, folder: Path) -> "RankState":
        """Raises TsqLoraError naming the file if it is missing or of another version."""
        values = _read(folder / RANKS_FILE)
        return cls.from_dict({"importance": load_file(folder / IMPORTANCE_FILE), **values})

    def to_dict(self) -> dict[str, Any]:
        """Tensors, numbers, strings, lists and dicts, without copies of the tensors."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return values | {"events": [event.to_dict() for event in self.events]}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "RankState":
        """Inverse of `to_dict`."""
        return cls(**{**values, "events": [RankEvent.from_dict(event) for event in values["events"]]})


@dataclass(frozen=True, slots=True)
class QualityState:
    """State of QualityCallback beside the scores, which are in another file."""

    looks: list[dict[str, Any]]
    """Summary of each look."""
    scored_epoch: int | None
    """The first epoch drawn by the scores; None while there are none."""
    scores_sha256: str | None
    """Of the scores' file."""
    spent: dict[str, PhaseCost]
    """Cost of the looks, by phase."""
    draws: dict[str, Any]
    """Options that decide scores and draws."""
    notes: list[str]
    jumped: bool = False
    """Whether early stopping ended the steps on the pool, so that the run went on with those on trusted rows."""

    def save(self, folder: Path) -> None:
        if distributed.is_first():
            write_json(folder / QUALITY_FILE, {"version": VERSION, **asdict(self)})

    @classmethod
    def load(cls, folder: Path) -> "QualityState":
        """Raises TsqLoraError naming the file if it is missing or of another version."""
        values = _read(folder / QUALITY_FILE)
        return cls(
            **{"notes": [], **values, "spent": {phase: PhaseCost(**cost) for phase, cost in values["spent"].items()}}
        )


@dataclass(frozen=True, slots=True)
class SkippedStep:
    """A step whose loss or gradient was not finite."""

    step: int
    rows: list[int] | None
    """Of the training split; None if unknown."""

    def in_words(self) -> str:
        """The first eight of its rows, in words.

        >>> SkippedStep(3, [5, 1]).in_words(), SkippedStep(3, [*range(9)]).in_words(), SkippedStep(3, None).in_words()
        ('rows 5, 1', 'rows 0, 1, 2, 3, 4, 5, 6, 7, ...', 'its rows are unknown')
        """
        if self.rows is None:
            return "its rows are unknown"
        return f"rows {', '.join(map(str, self.rows[:8]))}{', ...' if len(self.rows) > 8 else ''}"


@dataclass(frozen=True, slots=True)
class GuardState:
    """State of GuardCallback: the first skipped steps, their number, and the last ones."""

    skipped: list[SkippedStep]
    count: int
    recent: list[SkippedStep]

    def save(self, folder: Path) -> None:
        if distributed.is_first():
            write_json(folder / GUARD_FILE, {"version": VERSION, **asdict(self)})

    @classmethod
    def load(cls, folder: Path) -> "GuardState":
        """Nothing skipped if the run began without a guard.  Raises SettingsError for a file of another version."""
        if not (folder / GUARD_FILE).exists():
            return cls([], 0, [])
        values = _read(folder / GUARD_FILE)
        steps = {name: [SkippedStep(**step) for step in values[name]] for name in ("skipped", "recent")}
        return cls(count=values["count"], **steps)


ROWS_HASH = "hash of rows"
"""The option that tells data sets of one length apart."""


def require_options(begun: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raises SettingsError if an option differs from the one that the resumed run started with.

    Options that the checkpoint lacks are not compared.
    """
    for name, value in now.items():
        was = begun.get(name, value)
        if was != value and name == ROWS_HASH:
            raise SettingsError(
                "the rows differ from those of the checkpoint, or are in another order, and its scores are by place; "
                "resume with the same data set in the same order, or start again in another directory"
            )
        if was != value:
            raise SettingsError(
                f"the resumed run had {name} {was}, and this one has {value}; resume with the run's own options, or "
                "start again in another directory"
            )


def _read(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise TsqLoraError(
            f"cannot resume: {path} is missing; resume from a complete checkpoint in the run's own output_dir, or "
            "start again"
        )
    values = json.loads(path.read_text())
    if values.pop("version", None) != VERSION:
        raise SettingsError(
            f"{path} was written by a version of tsqlora that draws other rows; resume with that version, or start "
            "again in another --out (output_dir)"
        )
    return values
