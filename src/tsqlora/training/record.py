"""run.json: what a run was made of, what it decided, what it cost and what came of it."""

import json
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from time import perf_counter
from typing import Any

from tsqlora.errors import DataError
from tsqlora.files import reading, write_json
from tsqlora.quality.cost import PhaseCost
from tsqlora.ranks.events import RankEvent

RECORD_FILE = "run.json"
_LIBRARIES = ("tsqlora", "torch", "transformers", "peft", "datasets", "accelerate")


@dataclass(slots=True)
class RunRecord:
    """One run, as run.json keeps it.

    `quality` says whether rows were drawn by quality, and if not, why; `notes` are what the
    user should know (texts cut, warnings given).
    """

    status: str
    seed: int
    task: str
    labels: list[str | int] | None
    data: dict[str, Any]
    plan: dict[str, Any]
    versions: dict[str, str] = field(default_factory=lambda: versions())
    cost: dict[str, PhaseCost] = field(default_factory=dict)
    quality: dict[str, Any] = field(default_factory=dict)
    ranks: dict[str, int] = field(default_factory=dict)
    rank_events: list[RankEvent] = field(default_factory=list)
    parameters: dict[str, int] = field(default_factory=dict)
    metrics: dict[str, dict[str, float]] = field(default_factory=dict)
    skipped: dict[str, Any] = field(default_factory=dict)
    """Of steps whose loss or gradient was not finite: how many, and the first ones' rows; empty if there were none."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Of a training in a Trainer of the user's own; a run of `tsqlora train` has them in config.yaml."""
    notes: list[str] = field(default_factory=list)
    history: list[dict[str, float]] = field(default_factory=list)
    """What the Trainer logged, in its order: `step` and `epoch` with `loss` and the like, or with `eval_…`."""
    compared: dict[str, Any] = field(default_factory=dict)
    """Of a run of `tsqlora compare`: method, policy and learning rate, and what its table shows beside the metrics."""
    now: dict[str, Any] = field(default_factory=dict)
    """Of a run that trains: the `phase` and `step` that it is in, and the `time` at which that was written."""

    def phase(self, name: str) -> PhaseCost:
        """The cost of a phase, to be added to."""
        return self.cost.setdefault(name, PhaseCost())

    @contextmanager
    def timed(self, name: str) -> Iterator[PhaseCost]:
        """Adds the seconds of the block to a phase."""
        start = perf_counter()
        cost = self.phase(name)
        try:
            yield cost
        finally:
            cost.add(seconds=perf_counter() - start)

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists and numbers, ready for JSON."""
        plain = {name: getattr(self, name) for name in self.__dataclass_fields__}
        if not self.compared:
            del plain["compared"]
        return plain | {
            "cost": {name: asdict(cost) for name, cost in self.cost.items()},
            "rank_events": [event.to_dict() for event in self.rank_events],
        }

    def save(self, run: Path) -> None:
        """Writes run.json whole or not at all."""
        write_json(run / RECORD_FILE, self.to_dict())

    @classmethod
    def load(cls, run: Path) -> "RunRecord":
        """Reads a run's record.  Raises DataError naming the file and what is wrong with it."""
        path = run / RECORD_FILE
        reading(path)
        try:
            stored: dict[str, Any] = json.loads(path.read_text())
            costs = {name: PhaseCost(**cost) for name, cost in stored.pop("cost").items()}
            events = [RankEvent.from_dict(event) for event in stored.pop("rank_events")]
            return cls(**stored, cost=costs, rank_events=events)
        except (FileNotFoundError, NotADirectoryError):
            raise DataError(
                f"{run} is not a run: it has no {RECORD_FILE}, which `tsqlora train` and our callbacks write"
            ) from None
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise DataError(f"{path}: not a run's record ({error})") from None


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that decide a result."""
    return {"python": platform.python_version()} | {name: version(name) for name in _LIBRARIES}
