"""Near-duplicates are what comparing all pairs finds, and of each group the best text stays."""

import random
import sys
from pathlib import Path

import numpy as np
import pytest

from tsqlora.errors import UnsupportedError
from tsqlora.quality import duplicates
from tsqlora.quality.duplicates import ALIKE, near_duplicates, shingles

FIRST = ("the", "day", "was", "and", "it", "house", "tree", "river", "stone", "good", "warm", "glad", "sunny", "kind")
WORDS = (*FIRST, "bad", "poor", "cold", "sad", "rainy", "mean", "window", "paper", "orange", "seven", "market")


def texts_of(n: int, seed: int = 0, words: int = 40) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=words)) for _ in range(n)]


def dropped(texts: list[str], folder: Path, quality: np.ndarray | None = None) -> list[int]:
    mask = near_duplicates(texts, np.zeros(len(texts)) if quality is None else quality, folder / "scratch")
    assert list(folder.iterdir()) == []
    return np.flatnonzero(mask).tolist()


def overlap(one: str, other: str) -> float:
    return len(shingles(one) & shingles(other)) / len(shingles(one) | shingles(other))


def test_texts_that_differ_stay(tmp_path: Path) -> None:
    assert dropped(texts_of(60), tmp_path) == []
    assert dropped(["a", "b", "ab", "abc", "文字"], tmp_path) == []


def test_of_equal_texts_the_best_stays_and_of_equal_ones_the_first(tmp_path: Path) -> None:
    texts = texts_of(4)
    both = [*texts, *texts, texts[0].upper().replace(" ", "\n  ")]
    assert dropped(both, tmp_path) == [4, 5, 6, 7, 8]
    assert dropped(both, tmp_path, np.arange(9.0)) == [0, 1, 2, 3, 4]


def test_a_word_changed_in_a_long_text_makes_no_other_text(tmp_path: Path) -> None:
    texts = texts_of(30, words=120)
    changed = [text.replace(text.split()[60], "other", 1) for text in texts]
    assert min(overlap(a, b) for a, b in zip(texts, changed, strict=True)) > 0.94
    assert dropped([*texts, *changed], tmp_path) == list(range(30, 60))


def test_it_agrees_with_all_pairs_where_the_estimate_cannot_err(tmp_path: Path) -> None:
    rng = random.Random(1)
    texts = texts_of(20, words=80)
    for text in texts[:20]:
        words = text.split()
        for _ in range(rng.choice([0, 1, 12, 40])):
            words[rng.randrange(80)] = rng.choice(WORDS)
        texts.append(" ".join(words))
    found = set(dropped(texts, tmp_path))
    for j in range(20):
        shared = overlap(texts[j], texts[20 + j])
        if abs(shared - ALIKE) > 0.08:
            assert (20 + j in found) == (shared > ALIKE), shared


def test_a_chain_is_one_group(tmp_path: Path) -> None:
    words = texts_of(1, words=300)[0].split()
    chain = []
    for j in range(5):
        words[40 * j] = f"changed{j}"
        chain.append(" ".join(words))
    assert len(dropped(chain, tmp_path)) == 4


def test_many_equal_texts_are_one_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(duplicates, "_CHUNK", 7)
    texts = ["one and the same text"] * 50 + ["quite another text"] * 20
    assert dropped(texts, tmp_path) == [*range(1, 50), *range(51, 70)]


def test_without_the_package_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasketch", None)
    with pytest.raises(UnsupportedError, match=r"need the package datasketch; pip install 'tsqlora\[dedup\]'"):
        near_duplicates(["a"], np.zeros(1), tmp_path / "scratch")
