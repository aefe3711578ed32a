"""What the look before the first step buys: accuracy against steps and processor seconds, compared with plain LoRA.

    python bench/headstart.py [--tables clinc150,sst2-500] [--seeds 0,1,2] [--rates 5e-4,1e-3,2e-3]

Plain LoRA trains for three epochs of all rows; `lora+head`, and `tsqlora` in epochs of half the rows, for as many
steps, on all of CLINC150 for a third of them. Each has its learning rate chosen on validation rows, on the first seed.
One core a cell; seconds are those of the processor, evaluations left out, so that two cells may run side by side. Each
cell is a file in bench/results/headstart, and a cell that is there is not run again. `lora-third` is plain LoRA on
CLINC150, whose schedule ends at a third of the steps.
"""

import itertools
import json
import math
import os
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from harness import entry, train
from origin import ROOT, encoder, machine, parser_of, stored
from transformers import TrainerCallback

from tsqlora.settings import Config
from tsqlora.tasks import get_task
from tsqlora.training.demo import bbc_news
from tsqlora.training.job import Job
from tsqlora.training.predict import predictor_of

SHARED = ROOT / ".." / "shared" / "data"
RESULTS = Path(os.environ.get("RESULTS", ROOT / "bench" / "results" / "headstart"))
MODEL, MARK = encoder()
TABLES = {
    "clinc150": ("clinc150", 15000, 32),
    "clinc150-3000": ("clinc150", 3000, 32),
    "stsb-2000": ("stsb", 2000, 16),
    "goemotions-2000": ("goemotions", 2000, 16),
    "wnut17-1000": ("wnut17", 1000, 16),
    **{f"{name}-{rows}": (name, rows, 16) for name in ("sst2", "mrpc") for rows in (500, 2000)},
    "bbc-500": ("bbc", 500, 16),
    "bbc-1500": ("bbc", 1500, 16),
}
"""Of each the data set, how many rows train, and the batch size."""
TASKS = {"stsb": "regression", "goemotions": "multi-label-classification", "wnut17": "token-classification"}
"""Task types of data sets that do not have one class a row."""
EPOCHS, TEST_ROWS = 3, 1500
MARKS = [0, 5, 10, 20, 35, 50, 75, 100, 150, 200, 300, 400, 500, 600, 700, 800, 1000, 1200, 1400]
"""Steps after which a run is measured, and after its last."""


def rows_of(name: str) -> dict[str, list[dict[str, Any]]]:
    """Train, validation and test rows."""
    if name == "bbc":
        news = [{"text": text, "label": topic} for text, topic in bbc_news()]
        order = np.random.default_rng(7).permutation(len(news))
        parts = np.split(order, [1500, 1700])
        return {
            split: [news[j] for j in part] for split, part in zip(("train", "validation", "test"), parts, strict=True)
        }
    files = {split: SHARED / name / f"{split}.jsonl" for split in ("train", "validation", "test")}
    return {split: [json.loads(line) for line in path.read_text().splitlines()] for split, path in files.items()}


def write_table(name: str, rows: int, seed: int, folder: Path) -> None:
    parts = rows_of(name)
    chosen = np.random.default_rng(seed).permutation(len(parts["train"]))[:rows]
    parts["train"] = [parts["train"][j] for j in chosen]
    parts["test"] = [parts["test"][j] for j in np.random.default_rng(0).permutation(len(parts["test"]))[:TEST_ROWS]]
    for split, part in parts.items():
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))


class Curve(TrainerCallback):
    """Test accuracy after some steps, and the processor seconds until there, evaluations left out."""

    def __init__(self, job: Job, last: int, started: float) -> None:
        self.job, self.last, self.started = job, last, started
        self.points: list[dict[str, float]] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.measure(args, 0, kwargs["model"])

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step in MARKS or state.global_step == self.last:
            self.measure(args, state.global_step, kwargs["model"])

    def measure(self, args: Any, step: int, model: Any) -> None:
        seconds, random = time.process_time() - self.started, torch.get_rng_state()
        was = model.training
        actual = predictor_of(self.job.with_model(model), args).metrics(self.job.data["test"].samples, phase="test")
        model.train(was)
        torch.set_rng_state(random)
        headline = {"accuracy": actual[self.job.task.headline], "loss": actual["loss"]}
        self.points.append({"step": step, "seconds": seconds, **headline})
        self.started = time.process_time() - seconds


def run(table: str, method: str, rate: float, seed: int) -> dict[str, Any]:
    name, rows, batch = TABLES[table]
    total, curves = EPOCHS * math.ceil(rows / batch), list[Curve]()
    steps = math.ceil(total / 3) if table == "clinc150" and method != "lora" else total

    def callbacks(job: Job, steps: int) -> list[TrainerCallback]:
        curves.append(Curve(job, steps, time.process_time()))
        return [*curves]

    training = {"epochs": 2, "learning_rate": rate, "batch_size": batch, "seed": seed, "max_steps": steps}
    task = TASKS.get(name, "sequence-classification")
    with tempfile.TemporaryDirectory() as folder:
        write_table(name, rows, seed, Path(folder))
        files = {split: f"{folder}/{split}.jsonl" for split in ("train", "validation", "test")}
        settings = {"model": {"path": MODEL}, "data": files | {"max_length": 64}, "training": training}
        config = Config.model_validate({**settings, "task": {"type": task}})
        result = train(config, entry(method.removesuffix("-third")), also=callbacks)
    validation = result["metrics"]["validation"]
    return {
        "settings": {"table": table + MARK, "method": method, "rate": rate, "steps": steps, **training},
        "curve": curves[0].points,
        "validation": validation,
        "headline": validation[get_task(task).headline],
        "looks": result["quality"].get("looks", []),
        "machine": machine(),
        **{name: result[name] for name in ("cost", "data_hash", "versions", "commit")},
    }


def cell(table: str, method: str, rate: float, seed: int) -> float:
    """A cell's headline metric on validation rows; its last accuracy on the screen."""
    path = RESULTS / f"{table}{MARK}.{method}.{rate:g}.{seed}.json"
    result = stored(path, lambda: run(table, method, rate, seed))
    last = result["curve"][-1]
    print(path.stem, f"{last['accuracy']:.4f} after {last['step']}, {last['seconds']:.0f} s", flush=True)
    return result["headline"]


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--tables", default=",".join(TABLES))
    parser.add_argument("--methods", default="lora,lora+head,tsqlora")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--rates", default="5e-4,1e-3,2e-3")
    args = parser.parse_args()
    torch.set_num_threads(1)
    first, *others = map(int, args.seeds.split(","))
    for table, method in itertools.product(args.tables.split(","), args.methods.split(",")):
        headline = {rate: cell(table, method, rate, first) for rate in map(float, args.rates.split(","))}
        for seed in others:
            cell(table, method, max(headline, key=lambda rate: headline[rate]), seed)


if __name__ == "__main__":
    main()
