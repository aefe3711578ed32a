"""Which number finds wrong labels, and what tells that there are any?  No training: from bench/.cache.

    python bench/selection_bank.py [--out bench/results/selection_bank.json]

Reads the states that bench/selection.py left after warm-up. Each number ranks the rows; its ROC area and average
precision are those of finding the labels that were made wrong.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.special import log_softmax, softmax
from selection import CACHE, best_scale, stored
from sklearn.metrics import average_precision_score, roc_auc_score

from tsqlora.files import write_json
from tsqlora.quality.label_noise import reject
from tsqlora.quality.terms import standardise
from tsqlora.training.record import versions

RIDGE, NEIGHBOURS = 1.0, 100
"""Those of 0.001 to 1 and of 10 to 100 that found most in most of the states of 2026-11-25 (tried by hand)."""


def suspicion(terms: dict[str, np.ndarray], logits: np.ndarray, labels: np.ndarray) -> dict[str, np.ndarray]:
    """Numbers that should be high for wrong labels, by name."""
    loss = -log_softmax(logits, axis=1)[np.arange(len(labels)), labels]
    medians = np.array([np.median(loss[labels == label]) for label in labels])
    found = {"loss": loss, "loss - median": loss - medians, "z(loss)": standardise(loss, labels).values}
    if terms:
        z = {name: standardise(values, labels).values for name, values in terms.items()}
        found |= {
            "EL2N": terms["el2n"],
            "z(N)": z["gradient_norm"],
            "-z(C)": -z["convergence"],
            "-z(cosine)": -z["cosine"],
            "z(loss) - z(C)": z["loss"] - z["convergence"],
        }
    return found


def by_features(features: np.ndarray, labels: np.ndarray) -> dict[str, np.ndarray]:
    """The same of what the head is given: how little a row's label is that of the others, all of them or the nearest.

    A ridge regression on all other rows, in closed form; and the labels of the most alike (cosine).
    """
    rows = np.arange(len(labels))
    own = np.eye(labels.max() + 1)[labels]
    x = features - features.mean(0)
    x = np.c_[x / x.std(0).mean(), np.ones(len(x))]
    solved = np.linalg.solve(x.T @ x + RIDGE * len(x) * np.eye(x.shape[1]), x.T)
    leverage = np.einsum("nd,dn->n", x, solved)[:, None]
    left_out = (x @ (solved @ own) - leverage * own) / (1 - leverage)
    x = features / np.linalg.norm(features, axis=1, keepdims=True)
    alike = x @ x.T
    np.fill_diagonal(alike, -np.inf)
    nearest = np.argsort(-alike, axis=1)[:, :NEIGHBOURS]
    return {
        "head of the others": left_out.max(1) - left_out[rows, labels],
        f"{NEIGHBOURS} neighbours": -own[nearest].mean(1)[rows, labels],
    }


def study(path: Path) -> dict[str, Any]:
    task, seed, wrong, fraction = path.stem.split("-")
    state = torch.load(path, weights_only=True)
    labels, logits, bad = (state[name].numpy() for name in ("labels", "logits", "bad"))
    found = suspicion({n: v.numpy() for n, v in state["terms"].items()}, logits, labels)
    if "features" in state:
        found |= by_features(state["features"].numpy().astype(np.float64), labels)
    mask, noise = reject(logits, labels)
    return {
        "task": task,
        "seed": int(seed),
        "wrong": float(wrong),
        "fraction": float(fraction),
        "learned": state["learned"],
        "epochs": state["epoch"],
        "accuracy": state["test"]["accuracy"],
        "noise": noise.to_dict(),
        "contradicted": {f"{share:g}": contradicted(logits, labels, share) for share in (0.1, 1 / 3, 1.0)},
        "rejected": float(mask.mean()),
        "precision": float(bad[mask].mean()) if mask.any() else None,
        "recall": float(mask[bad].mean()) if bad.any() else None,
        "best_scale": best_scale(logits, labels),
        "auc": {n: float(roc_auc_score(bad, v)) for n, v in found.items()} if bad.any() else {},
        "precision_of": {n: float(average_precision_score(bad, v)) for n, v in found.items()} if bad.any() else {},
    }


def contradicted(logits: np.ndarray, labels: np.ndarray, share: float) -> float:
    """How often labels contradict the most confident predictions, so many of all."""
    first = np.argsort(-softmax(logits, axis=1).max(1), kind="stable")[: round(share * len(labels))]
    return float((logits.argmax(1) != labels)[first].mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "selection_bank.json")
    args = parser.parse_args()
    known = stored(args.out)
    for path in sorted(CACHE.glob("*.pt")):
        if not path.stem.endswith(("half", "whole", "lookahead")):
            known[path.stem] = study(path)
    write_json(args.out, {"versions": versions(), "results": known})


if __name__ == "__main__":
    main()
