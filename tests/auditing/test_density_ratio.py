"""The density ratio of trusted rows and the pool: against a slow twin, and where it is None."""

import numpy as np
import pytest

from tsqlora.auditing.labels.density_ratio import log_density_ratio
from tsqlora.errors import TsqLoraError
from tsqlora.model.ridge import fit_classes


def rows(n: int, shift: float, seed: int, width: int = 6) -> np.ndarray:
    x = np.random.default_rng(seed).normal(size=(n, width)).astype(np.float32)
    x[:, 0] += shift
    return x * np.array([1, 1, 1, 1, 1, 1000], dtype=np.float32)  # one feature is far larger, as in language models


def test_rows_like_the_trusted_ones_have_the_largest_ratio() -> None:
    pool, trusted = np.concatenate([rows(40, 3.0, 0), rows(160, 0.0, 1)]), rows(30, 3.0, 2)
    ratio, _ = log_density_ratio(pool, trusted)
    assert ratio is not None
    assert (np.argsort(-ratio)[:20] < 40).mean() > 0.8


def test_a_row_is_judged_by_a_fit_without_it() -> None:
    pool, trusted = rows(60, 0.0, 3), rows(20, 2.0, 4)
    ratio, _ = log_density_ratio(pool, trusted)
    assert ratio is not None
    standard = np.concatenate([(pool - pool.mean(0)) / pool.std(0), (trusted - pool.mean(0)) / pool.std(0)])
    whole = fit_classes(standard, np.repeat([0, 1], [60, 20]), 2)
    targets = np.eye(2)[np.repeat([0, 1], [60, 20])]
    twin = np.empty(60)
    for j in range(60):
        x, y = np.delete(standard, j, 0), np.delete(targets, j, 0)
        # The intercept is not shrunk: it is the mean over all rows, as in the fit.
        centre = standard.mean(0)
        design = np.c_[x - centre, np.ones(len(x))]
        shrink = np.diag([*[whole.strength] * 6, 0.0])
        weight = np.linalg.solve(design.T @ design + shrink, design.T @ y)
        prediction = np.r_[standard[j] - centre, 1.0] @ weight
        twin[j] = prediction[1] - prediction[0]
    slope = np.polyfit(twin, ratio, 1)  # a temperature scales the predictions
    np.testing.assert_allclose(np.polyval(slope, twin), ratio, atol=1e-3 * np.abs(ratio).max())


@pytest.mark.parametrize(("count", "shift", "why"), [(30, 0.0, "do not separate"), (7, 3.0, "rows are too few")])
def test_there_is_none_for_rows_like_the_pool_or_for_too_few(count: int, shift: float, why: str) -> None:
    ratio, reason = log_density_ratio(rows(200, 0.0, 5), rows(count, shift, 6))
    assert ratio is None
    assert why in reason


def texts(n: int, topic: float, words: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Hidden states of texts of about so many words, which show the length in one direction, the topic in another."""
    rng = np.random.default_rng(seed)
    lengths = np.maximum(1, rng.lognormal(np.log(words), 0.4, n)).round()
    states = rows(n, topic, seed)
    states[:, 1] += 3 * np.log(lengths)
    return states, lengths


def test_texts_that_are_only_shorter_change_no_draw() -> None:
    (pool, pooled), (trusted, few) = texts(400, 0.0, 50, 13), texts(40, 0.0, 15, 14)
    ratio, _ = log_density_ratio(pool, trusted)
    assert ratio is not None
    assert np.corrcoef(ratio, np.log(pooled))[0, 1] < -0.7
    ratio, why = log_density_ratio(pool, trusted, lengths=(pooled, few))
    assert ratio is None
    assert "do not separate" in why


def test_shorter_texts_of_another_topic_prefer_the_topic_and_not_the_length() -> None:
    (own, short), (other, long) = texts(80, 3.0, 50, 15), texts(320, 0.0, 50, 16)
    trusted, few = texts(40, 3.0, 15, 17)
    lengths = np.concatenate([short, long])
    ratio, _ = log_density_ratio(np.concatenate([own, other]), trusted, lengths=(lengths, few))
    assert ratio is not None
    assert (np.argsort(-ratio)[:40] < 80).mean() > 0.8
    assert abs(np.corrcoef(ratio, np.log(lengths))[0, 1]) < 0.15


def test_texts_of_one_length_are_compared_as_they_are() -> None:
    pool, trusted = rows(200, 0.0, 18), rows(30, 2.0, 19)
    ratio, _ = log_density_ratio(pool, trusted)
    same, _ = log_density_ratio(pool, trusted, lengths=(np.full(200, 7), np.full(30, 7)))
    np.testing.assert_allclose(same, ratio, atol=1e-4)


def test_copies_of_trusted_rows_are_no_part_of_the_pool() -> None:
    pool, trusted = rows(100, 0.0, 9), rows(20, 2.0, 10)
    alone, _ = log_density_ratio(pool, trusted)
    twins = np.repeat([False, True], [100, 20])
    ratio, _ = log_density_ratio(np.concatenate([pool, trusted]), trusted, twins)
    assert alone is not None
    assert ratio is not None
    assert np.corrcoef(ratio[:100], alone)[0, 1] > 0.99
    assert ratio[100:].mean() > ratio[:100].mean() + 1


def test_hidden_states_that_are_not_finite_are_named() -> None:
    pool = rows(60, 0.0, 11)
    pool[3, 2] = np.nan
    with pytest.raises(TsqLoraError, match="hidden states of some texts are not finite"):
        log_density_ratio(pool, rows(20, 2.0, 12))


def test_a_feature_without_spread_counts_nothing() -> None:
    pool, trusted = rows(60, 0.0, 7), rows(20, 2.0, 8)
    pool[:, 3], trusted[:, 3] = 5.0, 5.0
    ratio, _ = log_density_ratio(pool, trusted)
    assert ratio is not None
    assert np.isfinite(ratio).all()
