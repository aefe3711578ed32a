"""Labels that the model itself draws give back its rate and preferences; hard rows give no evidence."""

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import approx_fprime, minimize
from scipy.special import softmax

from tsqlora.auditing.labels import label_noise as module
from tsqlora.auditing.labels.judge import blind_transitions, true_class
from tsqlora.auditing.labels.label_noise import STEEPEST, LabelNoise, _fit, _loss, _spread, gain_at, label_noise
from tsqlora.errors import SettingsError, TsqLoraError

SEEDS = st.integers(0, 2**32 - 1)


def rows_of(
    seed: int,
    *,
    rows: int = 800,
    classes: int = 2,
    blind: float = 0.0,
    drawn: Sequence[float] | None = None,
    sure: float = 3.0,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Logits, labels, and which are wrong: classes follow the logits' softmax, then some labels are drawn blindly."""
    rng = np.random.default_rng(seed)
    logits = sure * rng.normal(size=(rows, classes))
    true = (logits + rng.gumbel(size=logits.shape)).argmax(1)
    labels = np.where(rng.random(rows) < blind, rng.choice(classes, size=rows, p=drawn), true)
    return logits, labels, labels != true


def p_wrong(noise: LabelNoise, logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The probability that each label is wrong, by Bayes' rule."""
    p_true = true_class(noise.class_probabilities(logits), labels, blind_transitions(noise))
    return 1 - p_true[np.arange(len(labels)), labels]


@pytest.mark.parametrize(("blind", "classes"), [(0.1, 2), (0.4, 3), (0.2, 6)])
def test_the_bounds_hold_the_rate_of_labels_that_the_model_drew(blind: float, classes: int) -> None:
    inside = []
    for seed in range(6):
        logits, labels, wrong = rows_of(seed, blind=blind, classes=classes, rows=1000)
        noise = label_noise(logits, labels)
        assert noise.low <= noise.rate <= noise.high
        assert noise.rate == pytest.approx(wrong.mean(), abs=0.06)
        inside.append(noise.low <= wrong.mean() <= noise.high)
    assert sum(inside) >= 4, "each bound fails in one table of 20"


@settings(max_examples=3, deadline=None)
@given(seed=SEEDS, classes=st.sampled_from([6, 12]))
def test_errors_in_one_class_are_found_in_that_class(seed: int, classes: int) -> None:
    drawn = np.full(classes, 0.1 / (classes - 1))
    drawn[1] = 0.9
    logits, labels, wrong = rows_of(seed, rows=2000, classes=classes, blind=0.3, drawn=drawn.tolist(), sure=5.0)
    noise = label_noise(logits, labels)
    assert noise.evident
    assert noise.rate == pytest.approx(wrong.mean(), abs=0.05)
    np.testing.assert_allclose(noise.drawn, drawn, atol=0.1)
    wrongly = p_wrong(noise, logits, labels)
    for own in (labels == 1, labels != 1):
        assert wrongly[own].mean() == pytest.approx(wrong[own].mean(), abs=0.08)
    assert wrong[wrongly > 0.5].mean() > 0.75


@settings(max_examples=8, derandomize=True, deadline=None)
@given(seed=SEEDS, sure=st.sampled_from([0.1, 1.0, 4.0]), classes=st.sampled_from([2, 5]))
def test_hard_rows_are_no_wrong_labels(seed: int, sure: float, classes: int) -> None:
    logits, labels, _ = rows_of(seed, sure=sure, classes=classes)
    noise = label_noise(logits, labels)
    assert not noise.evident


@pytest.mark.parametrize("seed", range(3))
def test_a_model_that_has_hardly_learned_is_no_evidence(seed: int) -> None:
    # Scaled by 30 the logits tell the classes apart; until then the classes' constants rule.
    rng, often = np.random.default_rng(seed), np.log([0.4, 0.25, 0.2, 0.1, 0.05])
    logits = 2.0 * rng.normal(size=(200, 5))
    labels = (logits + often + rng.gumbel(size=(200, 5))).argmax(1)
    assert not label_noise(logits / 30 + np.log(np.bincount(labels, minlength=5) / 200), labels).evident


def test_the_test_of_right_labels_errs_no_more_often_than_its_level_says() -> None:
    errors, often = 0, (0.6, 0.25, 0.1, 0.05)
    for seed in range(30):
        rng = np.random.default_rng(seed)
        logits = 3.0 * rng.normal(size=(300, len(often)))
        labels = (logits + 3 * np.log(often) + rng.gumbel(size=logits.shape)).argmax(1)
        errors += label_noise(logits, labels).statistic > gain_at(0.8)
    # 20 % of 30 and three standard errors.
    assert 1 <= errors <= 12


@pytest.mark.parametrize("seed", range(2))
def test_at_a_bound_the_likelihood_has_fallen_to_the_edge_of_the_test(seed: int) -> None:
    logits, labels, _ = rows_of(seed, blind=0.3, rows=400)
    noise = label_noise(logits, labels)
    shares, spread = np.log(noise.drawn), _spread(logits)

    def profile(blind: float) -> float:
        def loss(at: np.ndarray) -> float:
            if np.exp(at[0]) * spread > STEEPEST:
                return np.inf
            parameters = np.array([blind, np.exp(at[0]), *shares, *at[1:]])
            return float(_loss(parameters, logits, labels, np.ones(400), (0, 0))[0])

        start = np.array([np.log(noise.scale), *noise.offsets])
        return minimize(loss, start, method="Nelder-Mead", options={"xatol": 1e-5, "fatol": 1e-9}).fun

    for bound in (noise.low, noise.high):
        fallen = 2 * 400 * (profile(noise.blind * bound / noise.rate) - profile(noise.blind))
        # This twin lacks the prior of the offsets. At a rate of 0, where there is nothing beyond, it falls less far.
        assert fallen == pytest.approx(2.7055, abs=0.6) or (bound == 0 and fallen < 2.7055)


@settings(max_examples=4, deadline=None)
@given(seed=SEEDS, scale=st.sampled_from([0.01, 0.5, 7.0]), shift=st.floats(-5, 5))
def test_scale_constants_order_names_and_a_class_without_rows_change_nothing(
    seed: int, scale: float, shift: float
) -> None:
    logits, labels, _ = rows_of(seed, blind=0.3, rows=300, classes=3)
    rng, noise = np.random.default_rng(seed), label_noise(logits, labels)
    wrong = p_wrong(noise, logits, labels)

    moved = scale * logits + shift * (np.arange(300)[:, None] / 300 + np.array([0.0, 1.0, -1.0]))
    again = label_noise(moved, labels)
    assert again.rate == pytest.approx(noise.rate, abs=2e-3)
    assert again.scale * scale == pytest.approx(noise.scale, rel=2e-2)
    np.testing.assert_allclose(p_wrong(again, moved, labels), wrong, atol=0.02)

    order, names = rng.permutation(300), rng.permutation(3)
    again = label_noise(logits[order][:, np.argsort(names)], names[labels[order]])
    assert again.rate == pytest.approx(noise.rate, abs=1e-3)
    assert again.statistic == pytest.approx(noise.statistic, abs=1e-2)

    wide, renamed = np.insert(logits, 1, -9 + rng.normal(size=300), axis=1), labels + (labels > 0)
    wider = label_noise(wide, renamed)
    assert (wider.rate, wider.low, wider.high, wider.statistic) == (noise.rate, noise.low, noise.high, noise.statistic)
    np.testing.assert_allclose(p_wrong(wider, wide, renamed), wrong)
    assert np.isfinite(wider.offsets).tolist() == [True, False, True, True]
    assert wider.drawn[1] == 0
    assert not wider.class_probabilities(wide)[:, 1].any()


@settings(max_examples=8, deadline=None)
@given(seed=SEEDS, blind=st.floats(0.01, 0.6), scale=st.floats(0.1, 5), classes=st.integers(2, 4))
def test_the_gradient_is_that_of_the_likelihood(seed: int, blind: float, scale: float, classes: int) -> None:
    logits, labels, _ = rows_of(seed, rows=40, classes=classes, blind=0.2)
    shares, offsets = np.random.default_rng(seed).normal(size=(2, classes))
    at = np.array([blind, scale, *shares, *offsets])
    weights = np.random.default_rng(seed).uniform(0.1, 2, size=40)
    value, gradient = _loss(at, logits, labels, weights, (30.0, 2.0))
    drawn = softmax(shares)
    by_hand = [
        (1 - blind) * p[y] + blind * drawn[y]
        for p, y in zip(softmax(scale * logits + offsets, axis=1), labels, strict=True)
    ]
    priors = 30 * np.log(classes * drawn).mean() - (offsets**2).sum()
    assert value == pytest.approx(-(weights @ np.log(by_hand) + priors) / 40)
    expected = np.asarray(approx_fprime(at, lambda x: _loss(x, logits, labels, weights, (30.0, 2.0))[0], 1e-7))
    np.testing.assert_allclose(gradient, expected, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("seed", range(8))
def test_the_fit_without_wrong_labels_ends_where_its_gradient_does(seed: int) -> None:
    # What it misses would be taken for evidence.
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(400, 3)) * np.array([6.0, 20.0, 20.0])
    labels = (logits + np.array([-20.0, 0.0, 20.0]) + rng.gumbel(size=(400, 3))).argmax(1)
    unit = (logits - logits.mean(0)) / _spread(logits)
    start = np.array([0.0, 1.0, *np.log((np.bincount(labels, minlength=3) + 1) / 403), 0.0, 0.0, 0.0])
    moves = np.array([False, True, False, False, False, True, True, True])
    _, at = _fit(unit, labels, np.ones(400), start, moves, prior=0.0)
    _, gradient = _loss(at, unit, labels, np.ones(400), (0.0, 0.0))
    np.testing.assert_array_equal(at[~moves], start[~moves])
    assert gradient[1] < 1e-4  # below 0 at the steepest scale
    np.testing.assert_allclose(gradient[5:], 0, atol=1e-4)


@pytest.mark.parametrize("seed", range(2))
def test_a_rare_class_hides_no_wrong_labels(seed: int) -> None:
    rng = np.random.default_rng(seed)
    logits = 3.0 * rng.normal(size=(800, 4)) + np.array([0.0, 0.0, 0.0, -7.0])
    true = (logits + rng.gumbel(size=logits.shape)).argmax(1)
    labels = np.where(rng.random(800) < 0.25, rng.permutation(true), true)
    assert 0 < (labels == 3).mean() < 0.05
    noise = label_noise(logits, labels)
    assert noise.rate == pytest.approx((labels != true).mean(), abs=0.07)
    assert not label_noise(logits, true).evident


def test_of_one_class_no_label_is_wrong() -> None:
    logits = np.random.default_rng(0).normal(size=(50, 3))
    noise = label_noise(logits, np.full(50, 2))
    assert (noise.rate, noise.low, noise.high, noise.evident) == (0, 0, 0, False)
    np.testing.assert_allclose(p_wrong(noise, logits, np.full(50, 2)), 0, atol=1e-12)
    assert noise.class_probabilities(logits).tolist() == [[0.0, 0.0, 1.0]] * 50


def test_p_wrong_by_hand() -> None:
    drawn, offsets = np.array([0.6, 0.4]), np.array([np.log(3), 0.0])
    noise = LabelNoise(0.1, 0.0, 0.2, 9.0, 0.2, drawn, 0.5, offsets)
    logits, labels = np.ones((2, 2)), np.array([0, 1])
    # Label 0: its class has ¾. Right with 0.8 · ¾ + 0.2 · 0.6 · ¾, wrong with 0.2 · 0.6 · ¼.
    expected = [0.03 / (0.6 + 0.12), 0.06 / (0.2 + 0.08)]
    assert p_wrong(noise, logits, labels).tolist() == pytest.approx(expected)


@pytest.mark.parametrize(("shape", "error"), [((1, 2), SettingsError), ((5, 1), SettingsError), ((3, 2), TsqLoraError)])
def test_too_few_rows_or_classes_and_logits_that_are_not_finite_are_refused(
    shape: tuple[int, int], error: type[TsqLoraError]
) -> None:
    with pytest.raises(error):
        label_noise(np.full(shape, np.nan), np.zeros(shape[0], dtype=np.int64))


@pytest.mark.parametrize("rows", [2, 9])
def test_few_rows_are_no_evidence(rows: int) -> None:
    logits, labels = np.random.default_rng(rows).normal(size=(rows, 3)), np.arange(rows) % 2
    noise = label_noise(logits, labels)
    assert not noise.evident
    assert np.isfinite([noise.rate, noise.low, noise.high, noise.scale, noise.statistic]).all()


def test_so_many_rows_are_fitted_of_each_class_its_share_and_all_are_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ROWS", 500)
    rng = np.random.default_rng(0)
    true = np.arange(1500) % 3  # every third row is of one class: a step of three would see no other
    logits = 4.0 * np.eye(3)[true] + rng.normal(size=(1500, 3))
    labels = np.where(rng.random(1500) < 0.3, rng.integers(3, size=1500), true)
    noise = label_noise(logits, labels)
    np.testing.assert_allclose(noise.drawn, 1 / 3)
    assert noise.rate == pytest.approx(0.2, abs=0.05)
    together = p_wrong(noise, logits, labels)
    alone = [p_wrong(noise, logits[[row]], labels[[row]])[0] for row in (0, 499, 500, 1499)]
    np.testing.assert_allclose(together[[0, 499, 500, 1499]], alone)
    assert together.mean() == pytest.approx((labels != true).mean(), abs=0.05)


@pytest.mark.parametrize(("seed", "blind"), [(1, 0.1), (2, 0.4)])
def test_of_many_classes_quicker_bounds_are_about_the_same(
    seed: int, blind: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits, labels, _ = rows_of(seed, rows=1000, classes=24, sure=4.0, blind=blind)
    quick = label_noise(logits, labels)
    monkeypatch.setattr(module, "FEW_CLASSES", 24)
    full = label_noise(logits, labels)
    assert (quick.rate, quick.statistic) == (full.rate, full.statistic)
    # Bounds that hold the offsets are a little too narrow.
    assert full.low - 1e-3 < quick.low <= quick.rate
    assert quick.low - full.low < 0.1 * (full.high - full.low) + 1e-3
    assert abs(full.high - quick.high) < 0.1 * (full.high - full.low) + 1e-3
