"""What the callbacks know, beside the Trainer's checkpoint: a resumed run goes on as if it had never stopped.

The Trainer saves weights, optimizer, schedule and random state. RankCallback adds
`tsqlora.json` and `tsqlora.safetensors`, QualityCallback `tsqlora_quality.json`.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from tsqlora import distributed
from tsqlora.errors import TsqLoraError
from tsqlora.ranks.events import RankEvent

VERSION = 1
RANKS_FILE = "tsqlora.json"
IMPORTANCE_FILE = "tsqlora.safetensors"
QUALITY_FILE = "tsqlora_quality.json"


def checkpoint_folder(args: TrainingArguments, state: TrainerState) -> Path:
    """Where the Trainer keeps the checkpoint of the step that it is at."""
    return Path(str(args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"


@dataclass(frozen=True, slots=True)
class RankState:
    """What RankCallback knows: the budget in parameters, the interval in steps, and all that happened."""

    layers: list[str]
    """The rows of `importance`, in order."""
    importance: dict[str, Tensor]
    events: list[RankEvent]
    started: bool
    budget: int
    interval: int
    seconds: float

    def save(self, folder: Path) -> None:
        if not distributed.is_first():
            return
        save_file({name: table.cpu() for name, table in self.importance.items()}, folder / IMPORTANCE_FILE)
        told = {
            "layers": self.layers,
            "events": [event.to_dict() for event in self.events],
            "started": self.started,
            "budget": self.budget,
            "interval": self.interval,
            "seconds": self.seconds,
        }
        _write(folder / RANKS_FILE, told)

    @classmethod
    def load(cls, folder: Path) -> "RankState":
        """Raises TsqLoraError naming the file that is missing or cannot be read."""
        told = _read(folder / RANKS_FILE)
        path = folder / IMPORTANCE_FILE
        try:
            importance = load_file(path)
        except (FileNotFoundError, SafetensorError) as error:
            raise _unusable(path, error) from error
        events = [RankEvent.from_dict(event) for event in told.pop("events")]
        return cls(importance=importance, events=events, **told)


@dataclass(frozen=True, slots=True)
class QualityState:
    """What QualityCallback knows beside the scores, which have a file of their own."""

    scored_epoch: int | None
    """The first epoch drawn by the scores; None while there are none."""
    attempts: list[str]
    refused: str | None
    seconds: float

    def save(self, folder: Path) -> None:
        if distributed.is_first():
            _write(folder / QUALITY_FILE, asdict(self))

    @classmethod
    def load(cls, folder: Path) -> "QualityState":
        """Raises TsqLoraError naming the file that is missing or cannot be read."""
        return cls(**_read(folder / QUALITY_FILE))


def _write(path: Path, told: Mapping[str, Any]) -> None:
    # Renamed into place: a file that is there is whole.
    whole = path.with_suffix(".tmp")
    whole.write_text(json.dumps({"version": VERSION, **told}, indent=2))
    whole.replace(path)


def _read(path: Path) -> dict[str, Any]:
    try:
        told = json.loads(path.read_text())
    except (FileNotFoundError, ValueError) as error:
        raise _unusable(path, error) from error
    if told.pop("version", None) != VERSION:
        raise TsqLoraError(f"{path} was written by another version of tsqlora; resume with that version")
    return told


def _unusable(path: Path, error: Exception) -> TsqLoraError:
    why = "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read ({error})"
    return TsqLoraError(
        f"cannot resume: {path} {why}; resume from a whole checkpoint in the run's own output_dir, or start anew"
    )
