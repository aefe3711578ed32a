"""The learned test and the guard."""

import math
from dataclasses import asdict
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import softmax

from tsqlora.errors import TsqLoraError
from tsqlora.quality.fallback import against_chance, guard_test, guarded, learned
from tsqlora.quality.sampling import expected_inclusion
from tsqlora.quality.scores import Scores, from_terms
from tsqlora.tasks.classification import Classification

ALL = np.ones(400, dtype=bool)


def scored(weights: dict[str, float], *, n: int = 400, noise: float = 0.0, even: bool = False, seed: int = 0) -> Scores:
    """Rows of two classes of which the model is right, a share with a wrong label."""
    rng = np.random.default_rng(seed)
    true = rng.integers(0, 2, size=n)
    margin = 2 * rng.exponential(size=n) * (2 * true - 1)
    logits = np.stack([-margin, margin], axis=1)
    drawn = (rng.random(n) > softmax(logits, axis=1)[:, 0]).astype(int)
    labels = np.where(rng.random(n) < noise, 1 - drawn, drawn)
    loss = -np.log(softmax(logits, axis=1)[np.arange(n), labels])
    return from_terms(
        {"loss": loss},
        labels=labels,
        stratified=True,
        weights=weights,
        temperature=1.0,
        even=even,
        record={},
        predictions={"logits": logits},
    )


@given(st.integers(0, 1000), st.floats(0.01, 100), st.floats(-50, 50))
def test_only_the_order_of_magnitude_of_a_difference_against_its_noise_counts(
    s: int, scale: float, shift: float
) -> None:
    rng = np.random.default_rng(s)
    x, q = rng.normal(size=400), rng.uniform(0.1, 1, size=400)
    one = guard_test(x, chance=q, kept=ALL)
    order = rng.permutation(400)
    for other in (
        guard_test(scale * x + shift, chance=q, kept=ALL),
        guard_test(x[order], chance=q[order], kept=ALL),
        guard_test(x, chance=q / 3, kept=ALL),
    ):
        assert other.standard_errors == pytest.approx(one.standard_errors, rel=1e-6, abs=1e-6)
    assert guard_test(-x, chance=q, kept=ALL).standard_errors == pytest.approx(-one.standard_errors)


def test_means_are_those_of_the_rows_drawn_and_of_the_kept_ones() -> None:
    x, q = np.array([1.0, 2.0, 6.0, 100.0]), np.array([0.5, 1.0, 0.5, 0.0])
    test = guard_test(x, chance=q, kept=np.array([True, True, True, False]))
    assert (test.rows, test.random) == (3, pytest.approx(3.0))
    assert test.drawn == pytest.approx((0.5 * 1 + 2 + 0.5 * 6) / 2)
    parts = np.array([-0.25, 0.5, -0.25]) * (x[:3] - 3)
    assert test.standard_errors == pytest.approx(-parts.mean() / (parts.std() / np.sqrt(3)))


def test_a_draw_that_has_nothing_to_do_with_worth_seldom_fails() -> None:
    failed = 0
    for seed in range(400):
        rng = np.random.default_rng(seed)
        chance = expected_inclusion(rng.normal(size=400), size=200, temperature=1.0)
        failed += not guard_test(rng.exponential(size=400), chance=chance, kept=ALL).passed
    assert failed < 0.06 * 400


def test_what_fails_is_drawn_as_random_rows_are() -> None:
    before = scored({"loss": 1.0}, noise=0.2).drop(np.arange(400) < 40, "duplicate")
    scores, test = guarded(before, 0.5)
    assert test is not None
    assert not test.passed
    assert test.rows == 360
    assert np.ptp(scores.probability[40:]) == 0
    assert (scores.probability[:40] == 0).all()
    assert scores.record.effective_sample_size == pytest.approx(360)
    assert (scores.quality == before.quality).all()
    assert f"{test.drawn:.1%}, of random ones {test.random:.1%}" in test.message


@pytest.mark.parametrize(("weight", "passes"), [(1.0, False), (-1.0, True)])
def test_where_wrong_labels_are_evident_their_share_decides(weight: float, passes: bool) -> None:
    scores, test = guarded(scored({"loss": weight}, noise=0.2), 0.5)
    assert test is not None
    assert test.passed == passes
    guard = {"checked": True, **asdict(test), "passed": passes}
    assert scores.record.guard == (guard if passes else {**guard, "why": test.message})
    assert (test.drawn < test.random) == passes
    assert 0.05 < test.random < 0.3
    assert scores.even == (not passes)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"weights": {"loss": -1.0}, "even": True}, "rows are drawn evenly"),
        ({"weights": {"loss": -1.0}}, "wrong labels are not evident"),
    ],
)
def test_without_a_test_the_record_says_why(options: dict[str, Any], why: str) -> None:
    before = scored(**options)
    scores, test = guarded(before, 0.5)
    assert test is None
    assert scores.record.guard["checked"] is False
    assert scores.record.guard["why"].startswith(why)
    assert (scores.probability == before.probability).all()


LOSSES = st.lists(st.floats(-10, 10), min_size=2, max_size=30)


def test_numbers_by_hand() -> None:
    # Differences 1, 2, 3: mean 2, standard deviation 1, standard error 1/√3.
    test = learned(torch.tensor([0.0, 0.0, 1.0]), torch.tensor([1.0, 2.0, 4.0]))
    assert test.rows == 3
    assert test.loss == pytest.approx(1 / 3)
    assert test.chance == pytest.approx(7 / 3)
    assert test.standard_errors == pytest.approx(2 * math.sqrt(3))
    assert test.passed


@given(LOSSES, st.integers(0, 2**32))
def test_it_is_one_sided(losses: list[float], seed: int) -> None:
    chance = torch.randn(len(losses), generator=torch.Generator().manual_seed(seed)).double()
    there, back = learned(torch.tensor(losses).double(), chance), learned(chance, torch.tensor(losses).double())
    assert there.standard_errors == pytest.approx(-back.standard_errors)
    assert not (there.passed and back.passed)


def test_identical_rows_are_finitely_far_away() -> None:
    test = learned(torch.full((4,), 0.1), torch.full((4,), 0.5))
    assert test.passed
    assert math.isfinite(test.standard_errors)


def test_labels_that_are_all_the_same_are_named_as_the_reason() -> None:
    test = against_chance(Classification(), torch.rand(5, 2), torch.zeros(5, dtype=torch.long))
    assert not test.passed
    assert "all 5 rows have the same label" in test.message


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_losses_that_are_not_finite_are_refused(value: float) -> None:
    with pytest.raises(TsqLoraError, match="1 of 3"):
        learned(torch.tensor([0.1, value, 0.2]), torch.ones(3))
