"""run.json: what a run was made of, what it decided, what it cost and what came of it."""

import json
import math
import platform
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from importlib.metadata import version
from pathlib import Path
from time import perf_counter
from typing import Any

from tsqlora.errors import DataError
from tsqlora.files import reading, write_json
from tsqlora.run_dir import RECORD_FILE

MOST_ENTRIES = 5000
"""Of the log, in the record."""
_LIBRARIES = ("tsqlora", "torch", "transformers", "peft", "datasets", "accelerate")


@dataclass(slots=True)
class PhaseCost:
    """The cost of one phase of a run. Passes count samples: a row forward, a row backward."""

    seconds: float = 0.0
    forward: int = 0
    backward: int = 0
    tokens: int = 0

    def add(self, *, seconds: float = 0.0, forward: int = 0, backward: int = 0, tokens: int = 0) -> None:
        self.seconds += seconds
        self.forward += forward
        self.backward += backward
        self.tokens += tokens


@dataclass(frozen=True, slots=True)
class RankEvent:
    """One decision about ranks that move, as in run.json.

    `step` counts completed optimizer steps, `reason` is start or adjustment, `ranks`
    hold from here on, `target` and `sensitivity` are what they were decided from, `moved` is
    the number of slots given up, `used` and `budget` are in parameters.
    """

    step: int
    reason: str
    ranks: Mapping[str, int]
    target: Mapping[str, int]
    sensitivity: Mapping[str, float]
    moved: int
    used: int
    budget: int

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts and numbers, ready for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "RankEvent":
        """Inverse of `to_dict`; DataError if a field is missing."""
        try:
            return cls(**{field.name: data[field.name] for field in fields(cls)})
        except KeyError as error:
            raise DataError(f"saved rank event has no {error}; the file is cut off or from another version") from None


MOST_EVENTS = 1000
"""Events of a run in run.json; each has three numbers per layer."""


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
    confusions: list[list[int]] = field(default_factory=list)
    """Of the rows that were measured last, with one class each: class, predicted class, and how many rows."""
    skipped: dict[str, Any] = field(default_factory=dict)
    """Of steps whose loss or gradient was not finite: how many, and the first ones; empty if there were none."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Of a training in a Trainer of the user's own; a run of `tsqlora train` has them in config.yaml."""
    notes: list[str] = field(default_factory=list)
    history: list[dict[str, float]] = field(default_factory=list)
    """What the Trainer logged, in its order: `step` and `epoch` with `loss` and the like, or with `eval_…`."""
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
        return {name: getattr(self, name) for name in self.__dataclass_fields__} | {
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
            stored.pop("compared", None)  # of a run of `tsqlora compare`, in earlier versions
            costs = {name: PhaseCost(**cost) for name, cost in stored.pop("cost").items()}
            events = [RankEvent.from_dict(event) for event in stored.pop("rank_events")]
            return cls(**stored, cost=costs, rank_events=events)
        except (FileNotFoundError, NotADirectoryError):
            raise DataError(
                f"{run} is not a run: it has no {RECORD_FILE}, which `tsqlora train` and QualityCallback write"
            ) from None
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise DataError(f"{path}: not a run's record ({error})") from None


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that decide a result."""
    return {"python": platform.python_version()} | {name: version(name) for name in _LIBRARIES}


def logged(history: Sequence[Mapping[str, Any]]) -> list[dict[str, float]]:
    """A Trainer's log for the record, without its speed; of many losses every n-th."""
    rows = [entry for entry in map(_numbers, history) if entry.keys() - {"step", "epoch"} and "train_loss" not in entry]
    every = -(-len(rows) // MOST_ENTRIES)
    return [entry for j, entry in enumerate(rows) if j % every == 0 or "loss" not in entry]


def metrics_of(logs: Mapping[str, Any]) -> dict[str, float]:
    """The metrics of an evaluation by their plain names, the loss last.

    >>> metrics_of({"eval_loss": 0.5, "eval_accuracy": 0.9, "eval_runtime": 2.0, "epoch": 1.0})
    {'accuracy': 0.9, 'loss': 0.5}
    """
    metrics = {n.removeprefix("eval_"): float(x) for n, x in _numbers(logs).items() if n.startswith("eval_")}
    return dict(sorted(metrics.items(), key=lambda metric: metric[0] == "loss"))


def _numbers(logs: Mapping[str, Any]) -> dict[str, Any]:
    """The finite numbers, since JSON has no others; without those of speed."""
    return {
        name: value
        for name, value in logs.items()
        if isinstance(value, int | float) and math.isfinite(value) and not name.endswith(("_runtime", "_per_second"))
    }


def look_sentences(quality: Mapping[str, Any]) -> list[tuple[str, list[str]]]:
    """For each look a heading, and sentences: the head, the gate, evidence of wrong labels, and rows that are kept.

    `quality` is that of run.json; a version without looks, and a run without any, gives an empty list.
    """
    looks: list[tuple[str, list[str]]] = []
    for j, look in enumerate(quality.get("looks", ()), start=1):
        sentences = [_head_in_words(look.get("head_start"))] if j == 1 else []
        if look.get("not_ready"):
            sentences.append(f"Rows are drawn evenly and ranks stay: {look['not_ready']}.")
        if why := (gate := look.get("gate") or {}).get("why_not"):
            sentences.append(f"Not used ({gate['name']}): {why}.")
        if (noise := look.get("noise")) is not None:
            bounds = f", between {noise['low']:.0%} and {noise['high']:.0%}" if noise.get("high", 1) < 1 else ""
            sentences.append(
                f"About {noise['rate']:.0%} of the labels seem wrong{bounds}; likely wrong ones are left out."
                if noise["evident"]
                else "There is no evidence of wrong labels, which does not mean that there are none."
            )
        if "kept" in look:
            held = (
                f", and {look['held_out']:,} are held out until the question to the pool" if "held_out" in look else ""
            )
            sentences.append(f"{look['kept']:,} of {look['rows']:,} rows were kept{held}.")
        if j == 1 and (trusted := quality.get("trusted_rows", 0)):
            words = question_in_words(quality.get("question") or {})
            sentences.append(f"There are {trusted:,} trusted rows: {words}.")
        looks.append((f"Look {j} at all rows, before step {look.get('step', 0) + 1:,}", sentences))
    return looks


def _head_in_words(head: Mapping[str, Any] | None) -> str:
    if head is None:
        return "The head is unchanged: none was fitted."
    fitted, present = f"{head['out_of_fold_loss']:.3g}", f"{head['present_loss']:.3g}"
    if not head["replaced"]:
        return (
            f"The model's own head was kept: its loss is {present}, a fitted head's on rows it has not seen {fitted}."
        )
    rows = f"{head['rows']:,} rows"
    dense = ", and the layer before it was whitened" if head["whitened"] else ""
    return (
        f"A head fitted on {rows} replaced the model's own{dense}: its loss on rows it has not seen is {fitted}, "
        f"that of the old head {present}."
    )


def question_in_words(question: Mapping[str, Any]) -> str:
    """What the pool answered, and what follows; `question` is that of a run's `quality`, empty for the control."""
    if (why := question.get("unasked")) is not None:
        return why
    if "standard_errors" not in question:
        why = question.get("why_not")
        return "trusted rows are mixed in with those of the pool" + (f": {why}" if why else "")
    pool, trusted = (
        (f"{question['metric']} {question[f'{of}_metric']:.3g} and " if "metric" in question else "")
        + f"loss {question[f'{of}_loss']:.3g}"
        for of in ("pool", "trusted")
    )
    shown = f"on held-out rows of the pool the model has {pool}, on trusted rows {trusted}"
    z, step = question["standard_errors"], question["from_step"]
    shown += f" ({abs(z):.1f} standard errors {'more' if z > 0 else 'less'}, within classes)"
    if question["contradicted"]:
        return f"the pool contradicts the trusted rows: {shown}; from step {step} on the run trains on them alone"
    return f"the pool does not contradict the trusted rows: {shown}; from step {step} on they are mixed in"
