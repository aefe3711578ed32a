"""When do wrong labels show, and how well: rejection at the start of each epoch of a run on random halves.

    python bench/recheck.py [--tasks sst2] [--wrong 0.2,0] [--seeds 0] [--rates 2.5e-4,5e-4] [--out FILE]

MiniLM with LoRA r 4, rows and settings of `bench/glue.py`, eight epochs of a random half. Before each of epochs 2 to 6
every row's logits are calibrated and `quality/label_noise.py` says what it would leave out; training goes on untouched.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import glue
import numpy as np
import torch
from origin import commit
from transformers import TrainerCallback, set_seed

from tsqlora.compare.cells import Cell, Entry
from tsqlora.compare.methods import build
from tsqlora.compare.run import planned_steps, settings_of
from tsqlora.files import write_json
from tsqlora.quality.label_noise import reject
from tsqlora.run.job import Job, arguments, fit_job, load, subset
from tsqlora.tasks.classification import Classification
from tsqlora.training.predict import predict_logits
from tsqlora.training.record import RunRecord, versions

EPOCHS = range(2, 7)


class Look(TrainerCallback):
    """What rejection would do before each epoch."""

    def __init__(self, job: Job, data: Any, bad: np.ndarray, autocast: torch.dtype | None) -> None:
        self.job, self.data, self.bad, self.autocast = job, data, bad, autocast
        self.found: dict[int, dict[str, Any]] = {}

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        epoch = round(state.epoch or 0)
        self.data.begin_epoch(epoch, "Look")
        if epoch in EPOCHS:
            samples = self.job.data.samples["train"].samples
            labels = torch.tensor([row["labels"] for row in samples])
            logits = torch.from_numpy(
                predict_logits(kwargs["model"], samples, self.job.collate, batch_size=64, autocast=self.autocast)
            ).double()
            mask, noise = reject((logits + Classification().offsets(logits, labels)).numpy(), labels.numpy())
            self.found[epoch] = {
                "evident": noise.evident,
                "rate": noise.rate,
                "statistic": noise.statistic,
                "rejected": float(mask.mean()),
                "precision": float(self.bad[mask].mean()) if mask.any() else None,
                "recall": float(mask[self.bad].mean()) if self.bad.any() else None,
            }


def run(task: str, wrong: float, seed: int, rate: float, shared: Path) -> dict[int, dict[str, Any]]:
    block = glue.Block(task, 2000, wrong, 4)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        glue.write_data(block, seed, shared, folder)
        glue.write_data(glue.Block(task, 2000, 0.0, 4), seed, shared, folder / "true")
        given, true = (glue.labels_of(place / "train.jsonl") for place in (folder, folder / "true"))
        cell = Cell(Entry("lora", "random"), seed, rate)
        settings = settings_of(glue.config_of(block, folder), cell, {})
        job, args = load(settings), arguments(settings, folder / "out")
        set_seed(seed)
        built, _ = build(job, "lora", steps=planned_steps(settings, len(true), cell, equal="steps"))
        data = subset(job, settings.quality.fraction)
        look = Look(job, data, np.array(given) != np.array(true), torch.bfloat16 if args.bf16 else None)
        record = RunRecord("bench", seed, job.task.name, None, {}, {})
        fit_job(job, built.model, args, data, record, None, None, None, also=[look])
    return look.found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, default=Path(__file__).parents[2] / "shared")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "recheck.json")
    parser.add_argument("--tasks", default="sst2")
    parser.add_argument("--wrong", default="0.2,0")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--rates", default="2.5e-4,5e-4")
    args = parser.parse_args()
    torch.set_num_threads(1)
    for task in args.tasks.split(","):
        for seed in args.seeds.split(","):
            for rate in args.rates.split(","):
                for wrong in args.wrong.split(","):
                    key = f"{task}/seed {seed}/rate {float(rate):g}/wrong {float(wrong):g}"
                    stored = json.loads(args.out.read_text())["results"] if args.out.exists() else {}
                    if key not in stored:
                        found = run(task, float(wrong), int(seed), float(rate), args.shared)
                        about = {"task": task, "seed": int(seed), "rate": float(rate), "wrong": float(wrong)}
                        new = {key: {**about, "epochs": found, "commit": commit()}}
                        write_json(args.out, {"versions": versions(), "results": stored | new})
                        print(key, found, flush=True)


if __name__ == "__main__":
    main()
