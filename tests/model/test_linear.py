"""Linear fits on features: the strength by folds, and predictions of rows that were not seen."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression

from tsqlora.model import linear as linear_head
from tsqlora.model.linear import ENOUGH, STRENGTHS, HeadFit, _folds, fit_head, out_of_fold_logits, row_losses


def classes(n: int, k: int, d: int = 8, spread: float = 1.0, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    centres, labels = rng.normal(size=(k, d)), rng.integers(0, k, n)
    return centres[labels] + spread * rng.normal(size=(n, d)), labels


def fitted(x: np.ndarray, y: np.ndarray, width: int, link: Any = "softmax", **options: Any) -> HeadFit:
    return fit_head(x, y, link=link, width=width, rng=np.random.default_rng(0), **options)


def test_unseen_rows_are_classified() -> None:
    x, y = classes(600, 4)
    fit = fitted(x[:400], y[:400], 4)
    assert (fit.head.logits(x[400:]).argmax(1) == y[400:]).mean() > 0.8
    assert fit.loss == pytest.approx(row_losses(fit.head.logits(x[400:]), y[400:], "softmax").mean(), rel=0.5)


def test_the_grid_of_strengths_does_not_end_at_the_best_one() -> None:
    x, y = classes(3000, 50, d=32, spread=0.15)
    fit = fitted(x, y, 50)
    assert STRENGTHS[0] < fit.strength < STRENGTHS[-1]


@pytest.mark.parametrize("seed", range(6))
def test_the_strength_is_that_of_all_folds_although_a_bad_one_is_left_early(seed: int) -> None:
    """The slow twin fits every fold of every strength by scikit-learn."""
    x, y = classes(150, 4, d=16, spread=2.0, seed=seed)
    fit = fit_head(x, y, link="softmax", width=4, rng=np.random.default_rng(seed))

    unit = x - x.mean(0)
    unit /= np.sqrt(np.square(unit).sum(1).mean())
    of = _folds(y, None, np.random.default_rng(int(np.random.default_rng(seed).integers(2**31))))
    folds = [np.nonzero(part) for fold in range(3) for part in (of != fold, of == fold)]
    best = np.inf
    for strength in STRENGTHS:
        losses = np.empty(len(y))
        for (train,), (test,) in zip(folds[::2], folds[1::2], strict=True):
            p = LogisticRegression(C=strength, max_iter=1000).fit(unit[train], y[train]).predict_log_proba(unit[test])
            losses[test] = -p[np.arange(len(test)), y[test]]
        if losses.mean() > ENOUGH * best:
            break
        best, chosen = losses.mean(), strength
    assert fit.strength == chosen
    assert fit.loss == pytest.approx(best, rel=0.01)


@pytest.mark.parametrize("most", [None, 100])
def test_no_row_is_predicted_by_a_fit_that_has_seen_its_group(
    most: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Labels are random, so that only a fit that has seen a row, or a copy of it, knows its label."""
    if most is not None:
        monkeypatch.setattr(linear_head, "LEAST_TO_FIT", most)
        monkeypatch.setattr(linear_head, "OUTPUTS_TO_FIT", 0)
    rng = np.random.default_rng(0)
    x, y = np.repeat(rng.normal(size=(60, 80)), 4, axis=0), np.repeat(rng.integers(2, size=60), 4)
    logits, _ = out_of_fold_logits(x, y, 2, groups=np.repeat(np.arange(60), 4), rng=rng)
    assert (logits.argmax(1) == y).mean() < 0.75
    assert np.isfinite(logits).all()


@pytest.mark.parametrize("factor", [1e-3, 1e3])
def test_the_features_scale_decides_nothing(factor: float) -> None:
    x, y = classes(100, 3)
    one, other = (fitted(x * by, y, 3) for by in (1.0, factor))
    np.testing.assert_allclose(one.head.logits(x), other.head.logits(x * factor), atol=2e-2)
    assert one.strength == other.strength


def test_a_class_without_rows_is_the_least_likely() -> None:
    x, y = classes(60, 3)
    logits = fitted(x, y, 5).head.logits(x)
    assert (logits[:, 3:].max(1) < logits[:, :3].max(1)).all()


def test_several_labels_are_fitted_each_and_constant_ones_are_sure() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(400, 6))
    y = np.column_stack([x[:, 0] > 0, x[:, 1] + x[:, 2] > 1, np.zeros(400), np.ones(400)]).astype(float)
    fit = fit_head(x[:300], y[:300], link="sigmoid", width=4, rng=rng)
    logits = fit.head.logits(x[300:])
    assert ((logits > 0) == y[300:]).mean() > 0.95
    assert fit.loss == pytest.approx(row_losses(logits, y[300:], "sigmoid").mean(), rel=0.5)
    assert (np.abs(logits[:, 2:]) > 2).all()


def test_samples_of_one_group_share_a_fold() -> None:
    rng = np.random.default_rng(0)
    x, y = np.repeat(rng.normal(size=(40, 60)), 6, axis=0), np.repeat(rng.integers(2, size=40), 6)
    x, groups = x + 0.02 * rng.normal(size=x.shape), np.repeat(np.arange(40), 6)
    alone, together = (fitted(x, y, 2, groups=own).loss for own in (None, groups))
    assert alone < 0.3, "near copies in other folds give the label away"
    assert together > 0.6


@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=8), alike=st.integers(1, 4), seed=st.integers(0, 2**32 - 1)
)
def test_each_fold_has_its_share_of_every_class_and_whole_groups(sizes: list[int], alike: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.repeat(np.arange(len(sizes)), sizes))
    of = _folds(labels, None, rng)
    for label, size in enumerate(sizes):
        counts = np.bincount(of[labels == label], minlength=3)
        assert counts.sum() == size
        assert np.ptp(counts) <= 1, "a class of few rows is in every fit"
    groups = rng.permutation(np.repeat(np.arange(3, 3 + len(labels)), alike))
    together = _folds(np.repeat(labels, alike), groups, rng)
    if len(labels) >= 3:
        assert all(len(np.unique(together[groups == group])) == 1 for group in np.unique(groups))
        assert len(np.unique(together)) == 3


@pytest.mark.parametrize("spread", [1.0, 100.0])
def test_features_of_a_large_spread_that_say_nothing_hide_nothing(spread: float) -> None:
    rng = np.random.default_rng(0)
    x, y = classes(1_000, 3, d=24, spread=0.4)
    x = np.concatenate([x, spread * rng.normal(size=(1_000, 3))], axis=1).astype(np.float32)
    logits, head = out_of_fold_logits(x, y, 3, rng=rng)
    assert (logits.argmax(axis=1) == y).mean() > 0.95
    assert (head.logits(x).argmax(axis=1) == y).mean() > 0.95


def test_copies_make_the_loss_no_lower_and_the_penalty_no_weaker() -> None:
    rng = np.random.default_rng(0)
    means, y = rng.normal(size=(10, 64)) * 0.35, rng.integers(10, size=300)
    x = (means[y] + rng.normal(size=(300, 64))).astype(np.float32)
    once, thrice = (fitted(np.tile(x, (k, 1)), np.tile(y, k), 10) for k in (1, 3))
    assert thrice.loss == pytest.approx(once.loss, rel=0.1)
    assert thrice.strength <= once.strength


def test_copies_make_the_loss_of_numbers_no_lower() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(300, 64)).astype(np.float32)
    y = (x @ rng.normal(size=64) / 8 + rng.normal(size=300)).astype(np.float32)
    once, thrice = (fitted(np.tile(x, (k, 1)), np.tile(y, k), 1, "identity") for k in (1, 3))
    assert thrice.loss == pytest.approx(once.loss, rel=0.01)


def test_rows_that_are_all_equal_are_fitted() -> None:
    y = np.arange(30) % 2
    fit = fit_head(np.ones((30, 4), np.float32), y, link="softmax", width=2, rng=np.random.default_rng(0))
    assert fit.loss == pytest.approx(np.log(2), abs=0.05)


def test_a_layer_without_bias_gets_none() -> None:
    x, y = classes(60, 3)
    fit = fitted(x, y, 3, intercept=False)
    assert not fit.head.bias.any()


def test_class_weights_move_the_border() -> None:
    x, y = classes(200, 2, spread=3)
    weights = np.array([1.0, 20.0])
    plain, weighted = (fitted(x, y, 2, class_weights=w).head.logits(x) for w in (None, weights))
    assert weighted.argmax(1).sum() > plain.argmax(1).sum()


def test_numbers_are_fitted_by_least_squares() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(300, 5))
    y = x @ np.arange(5.0) + 2 + 0.1 * rng.normal(size=300)
    fit = fit_head(x, y, link="identity", width=1, rng=rng)
    np.testing.assert_allclose(fit.head.weight[0], np.arange(5.0), atol=0.05)
    assert fit.loss == pytest.approx(0.01, rel=0.3)


def test_a_head_is_better_only_beyond_noise() -> None:
    x, y = classes(200, 3, spread=0.5)
    fit = fitted(x, y, 3)
    assert fit.better_than(np.full(200, np.log(3)))
    assert not fit.better_than(fit.losses + np.random.default_rng(1).normal(size=200))
    assert not fit.better_than(np.zeros(200))
