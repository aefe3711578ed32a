"""Kinds of rows to drop: outliers, and near-duplicates as a comparison of all pairs finds them."""

import random
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tsqlora.errors import SettingsError, UnsupportedError
from tsqlora.quality import drop
from tsqlora.quality.drop import ALIKE, drop_rows, near_duplicates, outliers, require_drops, shingles
from tsqlora.quality.epochs import sample
from tsqlora.quality.scores import REASONS, Scores, from_terms


def made(norms: np.ndarray, **changes: Any) -> Scores:
    defaults: dict[str, Any] = {
        "terms": {"gradient_norm": norms},
        "labels": np.arange(len(norms)) % 2,
        "stratified": True,
        "weights": {"gradient_norm": -1.0},
        "temperature": 1.0,
        "record": {},
    }
    return from_terms(**defaults | changes)


def norms(n: int = 40) -> np.ndarray:
    return np.exp(np.random.default_rng(0).normal(size=n))


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


def test_without_gradient_norms_a_warning_says_that_no_row_is_dropped() -> None:
    with pytest.warns(UserWarning, match="gradient norms were not measured"):
        assert not outliers(replace(made(norms()), terms={})).any()


def test_dropped_rows_carry_the_first_of_their_reasons(tmp_path: Path) -> None:
    values = norms()
    values[[4, 6]] *= 1e6
    texts = [f"text number {j} with its own words: {j * 7919}" for j in range(40)]
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
    with pytest.raises(SettingsError, match="--drop duplicates"):
        require_drops(["duplicates"])


def test_of_duplicates_one_stays_that_is_not_dropped_for_something_else(tmp_path: Path) -> None:
    values = norms()
    values[4] *= 1e6  # an outlier, and by this Q the best of its group
    texts = [f"text number {j} with its own words: {j * 7919}" for j in range(40)]
    texts[4] = texts[0]
    scores = made(values, weights={"gradient_norm": 1.0})
    retained = drop_rows(scores, ["outlier", "duplicate"], lambda: iter(texts), tmp_path / "scratch").kept
    assert retained[0]
    assert not retained[4]


FIRST = ("the", "day", "was", "and", "it", "house", "tree", "river", "stone", "good", "warm", "glad", "sunny", "kind")
WORDS = (*FIRST, "bad", "poor", "cold", "sad", "rainy", "mean", "window", "paper", "orange", "seven", "market")


def texts_of(n: int, seed: int = 0, words: int = 40) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=words)) for _ in range(n)]


def dropped_texts(texts: list[str], folder: Path, quality: np.ndarray | None = None) -> list[int]:
    mask = near_duplicates(texts, np.zeros(len(texts)) if quality is None else quality, folder / "scratch")
    assert list(folder.iterdir()) == []
    return np.flatnonzero(mask).tolist()


def overlap(one: str, other: str) -> float:
    return len(shingles(one) & shingles(other)) / len(shingles(one) | shingles(other))


def test_different_texts_stay(tmp_path: Path) -> None:
    assert dropped_texts(texts_of(60), tmp_path) == []
    assert dropped_texts(["a", "b", "ab", "abc", "文字"], tmp_path) == []


def test_of_equal_texts_the_best_stays_and_of_equal_ones_the_first(tmp_path: Path) -> None:
    texts = texts_of(4)
    both = [*texts, *texts, texts[0].upper().replace(" ", "\n  ")]
    assert dropped_texts(both, tmp_path) == [4, 5, 6, 7, 8]
    assert dropped_texts(both, tmp_path, np.arange(9.0)) == [0, 1, 2, 3, 4]


def test_it_agrees_with_all_pairs_where_the_estimate_cannot_err(tmp_path: Path) -> None:
    rng = random.Random(1)
    texts = texts_of(20, words=80)
    for text in texts[:20]:
        words = text.split()
        for _ in range(rng.choice([0, 1, 12, 40])):
            words[rng.randrange(80)] = rng.choice(WORDS)
        texts.append(" ".join(words))
    result = set(dropped_texts(texts, tmp_path))
    for j in range(20):
        shared = overlap(texts[j], texts[20 + j])
        if abs(shared - ALIKE) > 0.08:
            assert (20 + j in result) == (shared > ALIKE), shared


def test_a_chain_is_one_group(tmp_path: Path) -> None:
    words = texts_of(1, words=300)[0].split()
    chain = []
    for j in range(5):
        words[40 * j] = f"changed{j}"
        chain.append(" ".join(words))
    assert len(dropped_texts(chain, tmp_path)) == 4


def test_many_equal_texts_are_one_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drop, "_CHUNK", 7)
    texts = ["one and the same text"] * 50 + ["quite another text"] * 20
    assert dropped_texts(texts, tmp_path) == [*range(1, 50), *range(51, 70)]


def test_without_the_package_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasketch", None)
    with pytest.raises(UnsupportedError, match="datasketch"):
        near_duplicates(["a"], np.zeros(1), tmp_path / "scratch")
