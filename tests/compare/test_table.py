"""Means against scipy, verdicts, the printed table, and `tsqlora compare` as scripts see it."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from tsqlora.cli.comparison_display import show_comparison
from tsqlora.reports.comparison import Mean, interval, paired, verdict

# Spread apart: scipy has no interval of scale 0, which a difference of 1e-308 amounts to.
NUMBERS = st.lists(st.integers(-10_000, 10_000).map(lambda k: k / 100), min_size=2, max_size=8, unique=True)
NUMBER = {"mean": 0.8, "half": 0.01, "n": 3}
ROW = {
    "name": "lora+all",
    "failed": [],
    "metrics": {"accuracy": NUMBER},
    "verdict": "the reference",
    "seconds": NUMBER,
    "steps": 100,
    "trainable_mean": 12345.0,
    "trainable_range": [12345, 12345],
    "peak_memory_bytes": 2**30,
    "split": "test",
}
RESULT = {"metric": "accuracy", "equal": "steps", "seeds": [0, 1, 2], "out": "comparison"}


@given(NUMBERS, st.floats(-5, 5))
def test_an_interval_is_scipys_and_a_shift_of_every_seed_has_none(values: list[float], shift: float) -> None:
    ours, theirs = interval(values), dict(enumerate(values))
    low, high = scipy.stats.t.interval(0.95, len(values) - 1, np.mean(values), scipy.stats.sem(values))
    assert (ours.mean, ours.half) == pytest.approx((np.mean(values), (high - low) / 2), abs=1e-9)
    shifted = paired({seed: value + shift for seed, value in theirs.items()}, theirs)
    assert shifted is not None
    assert (shifted.mean, shifted.half) == pytest.approx((shift, 0.0), abs=1e-9)


def test_only_common_seeds_are_compared() -> None:
    assert paired({0: 1.0, 1: 5.0}, {1: 2.0, 2: 9.0}) == Mean(3.0, None, 1)
    assert paired({0: 1.0}, {1: 2.0}) is None


@pytest.mark.parametrize(
    ("difference", "words"),
    [
        (Mean(0.02, 0.03, 3), "within noise of lora"),
        (Mean(-0.02, 0.03, 3), "within noise of lora"),
        (Mean(0.05, 0.03, 3), "better than lora"),
        (Mean(-0.05, 0.03, 3), "worse than lora"),
        (Mean(0.05, None, 1), "1 seed: too few to tell from lora"),
        (Mean(0.05, 0.001, 2), "2 seeds: too few to tell from lora"),
        (None, "no seed in common with lora"),
    ],
)
def test_a_verdict_follows_the_interval(difference: Mean | None, words: str) -> None:
    assert verdict(difference, "lora") == words
    turned = words.replace("better", "?").replace("worse", "better").replace("?", "worse")
    assert verdict(difference, "lora", lower_is_better=True) == turned


def test_the_table_fits_80_columns_and_shows_failures(capsys: pytest.CaptureFixture[str]) -> None:
    partly = {"name": "dora+all", "failed": [2], "seeds": [0, 1], "random": [1], "difference": NUMBER}
    partly |= {"trainable_mean": 12345.5, "trainable_range": [12341, 12350], "verdict": "better than lora+all"}
    failed = {"name": "full+all", "failed": [0, 1, 2], "verdict": "every seed failed"}
    result = RESULT | {"table": [ROW, ROW | partly, failed]}
    show_comparison(Console(width=80), result)
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80
    for words in ("0.8000 ± 0.0100", "+0.8000 ± 0.0100", "every seed failed", "12,345", "1,024"):
        assert words in out
    show_comparison(Console(width=200), result)
    out = capsys.readouterr().out
    assert "dora+all (1 failed; 1 of 2 seeds drew at random)" in out
    assert "12,346 (12,341 to 12,350)" in out


def test_the_table_warns_of_rates_chosen_on_shown_rows_and_of_mixed_code(capsys: pytest.CaptureFixture[str]) -> None:
    about = {"sweep": [1e-3, 1e-2], "differing": {"commit": ["a" * 40, "b" * 40 + "-dirty"], "torch": ["2.8", "2.9"]}}
    show_comparison(Console(width=200), RESULT | about | {"table": [ROW | {"split": "validation"}]})
    out = capsys.readouterr().out
    assert "There are no test rows" in out
    assert f"commit: {'a' * 12}, {'b' * 12}-dirty" in out
    assert "torch: 2.8, 2.9" in out


Run = Callable[..., tuple[int, str, str]]


def test_stdout_has_one_json_object_and_stderr_the_progress(place: Path, tmp_path: Path, tsqlora: Run) -> None:
    arguments = (place / "c.yaml", "--methods", "lora, lora+random", "--seeds", "3", "--out", tmp_path / "o", "--json")
    code, out, err = tsqlora("compare", *arguments)
    assert code == 0, err
    table = json.loads(out)["table"]
    assert [(row["name"], row["split"]) for row in table] == [("lora+all", "validation"), ("lora+random", "validation")]
    assert "1/2 lora+all.3: validation accuracy" in err
    assert "Loading weights" not in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "lora", "--seeds", "x"], "--seeds"),
        (["--methods", "lora", "--lr-sweep", "1e-3,y"], "--lr-sweep"),
        (["--methods", "lora", "--lr", "lora"], "--lr lora"),
        (["--methods", "lora", "--lr", "lora=1e-3", "--lr", "lora=2e-3"], "--lr lora"),
    ],
)
def test_wrong_usage_exits_2_and_writes_nothing(
    arguments: list[str], message: str, place: Path, tmp_path: Path, tsqlora: Run
) -> None:
    code, out, err = tsqlora("compare", place / "c.yaml", *arguments, "--out", tmp_path / "out")
    assert (code, out) == (2, "")
    assert message in err
    assert not (tmp_path / "out").exists()
