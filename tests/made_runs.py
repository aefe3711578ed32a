"""Directories made by hand: what a training leaves behind, without the training."""

from pathlib import Path
from typing import Any

import numpy as np

from runs import Row, write_jsonl
from tsqlora.auditing.scores import Scores, from_terms
from tsqlora.record import RankEvent, RunRecord
from tsqlora.rows.rows import sample_hash

LAYERS = [f"bert.layer.{block}.attention.{kind}" for block in (0, 1) for kind in ("query", "value")] + ["bert.pooler"]
CLASSES = ("no", "yes")


def make_run(folder: Path, *, rows: list[Row] | None = None, events: int = 3, **changes: Any) -> Path:
    """A finished run; with `rows` it has scores, whose texts are in a file beside it."""
    run = folder / "run"
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(
        f"model:\n  path: some/model\ndata:\n  train: {folder / 'train.jsonl'}\nranks:\n  policy: fixed\n"
    )
    record: dict[str, Any] = {
        "status": "finished",
        "seed": 3,
        "task": "sequence-classification",
        "labels": list(CLASSES),
        "data": {"hash": "abc123"},
        "plan": {
            "rows": {"train": 100, "test": 20},
            "rows_an_epoch": 50,
            "epochs": 4,
            "steps": 40,
            "ranks": dict.fromkeys(LAYERS, 4),
        },
        "versions": {"python": "3.11", "tsqlora": "0.1.0"},
        "quality": {"enabled": rows is not None, "used": rows is not None},
        "ranks": rank_events(events)[-1].ranks if events else dict.fromkeys(LAYERS, 4),
        "rank_events": rank_events(events),
        "parameters": {"trainable": 12345},
        "metrics": {"test": {"accuracy": 0.875, "macro_f1": 0.8}},
        "confusions": [(0, 0, 9), (0, 1, 2), (1, 1, 9)],
        "notes": ["about 20% of the labels seem wrong"],
        "history": [{"step": j, "epoch": j / 10, "loss": 1 / j} for j in range(10, 41, 10)]
        + [{"step": 40, "epoch": 4.0, "eval_loss": 0.5, "eval_accuracy": 0.8}],
    }
    if rows is not None:
        record["quality"] |= {"trusted_rows": 0, "looks": looks_of(len(rows))}
        record["quality"]["scores"] = {"epoch": 2, "step": 20, "draw": "softmax", "weights": {"loss": -1.0}}
        write_jsonl(folder / "train.jsonl", rows)
        scores_of(folder / "train.jsonl", rows).save(run / "scores.parquet")
    made = RunRecord(**record | changes)
    made.phase("training").add(seconds=1.5, forward=200, backward=200, tokens=900)
    made.save(run)
    return run


def looks_of(rows: int) -> list[dict[str, Any]]:
    """Two looks: a head replaced and wrong labels evident at the first, whose verdicts the second repeats."""
    head = {"replaced": True, "out_of_fold_loss": 0.31, "present_loss": 0.72, "rows": rows}
    head |= {"strength": 1.0, "scale": 0.5, "whitened": False, "trusted": False}
    noise = {"evident": True, "rate": 0.2, "low": 0.17, "high": 0.24}
    about = {"gate": None, "not_ready": None, "noise": noise, "rows": rows}
    return [
        {"epoch": 0, "step": 0, "head_start": head, "kept": rows - 5, **about},
        {"epoch": 2, "step": 20, "head_start": None, "kept": rows - 5, **about},
    ]


def rank_events(count: int) -> list[RankEvent]:
    """One slot goes to the last block's value at each."""
    events = []
    for j in range(1, count + 1):
        ranks = dict.fromkeys(LAYERS, 4) | {LAYERS[0]: 4 - j % 3, LAYERS[3]: 4 + j % 3}
        sensitivity = {layer: float(place + j) for place, layer in enumerate(LAYERS)}
        events.append(RankEvent(10 * j, "adjustment", ranks, ranks, sensitivity, 1, 100, 120))
    return events


def scores_of(data: Path, rows: list[Row], *, dropped: int = 3) -> Scores:
    """Scores of these rows, of whose first ones some are left out."""
    rng = np.random.default_rng(0)
    labels = np.array([CLASSES.index(row["label"]) for row in rows])
    own = rng.uniform(0.05, 0.95, size=len(rows))
    return from_terms(
        {"loss": -np.log(own), "convergence": rng.normal(size=len(rows))},
        labels=labels,
        stratified=True,
        weights={"loss": -1.0},
        temperature=1.0,
        record={
            "data": str(data),
            "columns": {"text": "text", "text_pair": None, "label": "label"},
            "classes": list(CLASSES),
        },
        hashes=[sample_hash(row["text"], "", row["label"]) for row in rows],
        predictions={
            "predicted": np.where(own > 0.5, labels, 1 - labels),
            "predicted_probability": np.maximum(own, 1 - own),
            "label_probability": own,
        },
    ).drop(np.arange(len(rows)) < dropped, "duplicate")
