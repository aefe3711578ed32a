"""Every kind of rows that can be dropped has a reason, and what is dropped is what it says."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tsqlora.errors import SettingsError
from tsqlora.quality.drop import DROPS, drop_rows, outliers, require_drops
from tsqlora.quality.epochs import sample
from tsqlora.quality.scores import REASONS, Scores, from_terms


def made(norms: np.ndarray, **changes: Any) -> Scores:
    known: dict[str, Any] = {
        "terms": {"gradient_norm": norms},
        "labels": np.arange(len(norms)) % 2,
        "stratified": True,
        "weights": {"gradient_norm": -1.0},
        "temperature": 1.0,
        "record": {},
    }
    return from_terms(**known | changes)


def norms(n: int = 40) -> np.ndarray:
    return np.exp(np.random.default_rng(0).normal(size=n))


def test_every_kind_has_a_reason() -> None:
    assert DROPS.keys() <= set(REASONS[1:])


def test_an_outlier_is_far_above_its_class() -> None:
    values = norms()
    values[1::2] *= 1000  # the other class is larger as a whole
    assert not outliers(made(values)).any()
    values[[4, 7]] *= 1e6
    assert np.flatnonzero(outliers(made(values))).tolist() == [4, 7]
    assert not outliers(made(1 / values))[[4, 7]].any(), "small gradients are no outliers"


def test_a_class_without_spread_has_no_outliers() -> None:
    values = np.ones(40)
    values[4] = 1e9
    assert not outliers(made(values)).any()
    assert not outliers(made(np.zeros(40))).any()


def test_dropped_rows_carry_the_first_of_their_reasons(tmp_path: Path) -> None:
    values = norms()
    values[[4, 6]] *= 1e6
    texts = [f"text number {j} with words of its own: {j * 7919}" for j in range(40)]
    texts[4] = texts[0]

    def dropped(*kinds: str) -> list[str]:
        scores = drop_rows(made(values), kinds, lambda: iter(texts), tmp_path / "scratch")
        for seed in range(5):
            assert scores.kept[sample(scores, 0.5, seed)].all()
        return [REASONS[code] for code in (scores.reasons if scores.reasons is not None else np.zeros(40, dtype=int))]

    both = dropped("duplicate", "outlier")
    assert (both[4], both[6]) == ("duplicate", "outlier")
    assert both.count("kept") == 38
    assert dropped("outlier", "duplicate")[4] == "outlier"
    assert set(dropped()) == {"kept"}


def test_an_unknown_kind_is_refused_with_the_known_ones() -> None:
    with pytest.raises(SettingsError, match="--drop duplicates: unknown; did you mean 'duplicate'"):
        require_drops(["duplicates"])


def test_of_duplicates_one_stays_that_is_not_dropped_for_something_else(tmp_path: Path) -> None:
    values = norms()
    values[4] *= 1e6  # an outlier, and by this Q the best of its group
    texts = [f"text number {j} with words of its own: {j * 7919}" for j in range(40)]
    texts[4] = texts[0]
    scores = made(values, weights={"gradient_norm": 1.0})
    kept = drop_rows(scores, ["outlier", "duplicate"], lambda: iter(texts), tmp_path / "scratch").kept
    assert kept[0]
    assert not kept[4]
