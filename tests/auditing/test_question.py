"""The question to the pool by hand, and by simulated losses: how often it errs, and what it must not be misled by."""

import numpy as np
import pytest

from tsqlora.auditing.labels.question import CONTRADICTED, standard_errors


def measured(loss: np.ndarray, classes: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    return loss, np.zeros(len(loss), np.int64) if classes is None else classes


def test_one_class_by_hand() -> None:
    trusted, pool = np.array([1.0, 2.0, 3.0]), np.array([0.0, 1.0])
    z = standard_errors(*measured(trusted), *measured(pool))
    assert z == pytest.approx(1.5 / np.sqrt(1 / 3 + 0.5 / 2))


def test_a_class_that_the_pool_lacks_does_not_count_and_one_row_has_the_variance_of_all() -> None:
    trusted, pool = np.array([1.0, 2.0, 3.0, 9.0, 4.0]), np.array([0.0, 1.0, 2.0])
    z = standard_errors(
        *measured(trusted, np.array([0, 0, 0, 1, 2])),
        *measured(pool, np.array([0, 0, 2])),
    )
    difference = 3 / 5 * (2 - 0.5) + 1 / 5 * (4 - 2)
    variance = (3 / 5) ** 2 * (1 / 3 + 0.5 / 2) + (1 / 5) ** 2 * (trusted.var(ddof=1) + pool.var(ddof=1))
    assert z == pytest.approx(difference / np.sqrt(variance))
    assert standard_errors(*measured(np.ones(4)), *measured(np.ones(3))) == 0


def draws(rng: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Losses, skewed as they are, and classes, of which the second is rarer and harder."""
    classes = (rng.random(n) < 0.15).astype(int)
    return rng.exponential(np.where(classes, 1.5, 0.3)), classes


@pytest.mark.parametrize("trusted", [32, 128])
def test_a_pool_that_teaches_the_same_is_rarely_said_to_contradict(trusted: int) -> None:
    rng, times = np.random.default_rng(0), 2000
    z = np.array([standard_errors(*draws(rng, trusted), *draws(rng, 200)) for _ in range(times)])
    assert (z >= CONTRADICTED).mean() < 0.05


def test_other_shares_of_the_classes_are_no_contradiction() -> None:
    """Trusted rows in equal shares, beside a pool of 85 : 15 whose rarer class has the larger losses."""
    rng, wrong = np.random.default_rng(0), 0
    for _ in range(300):
        loss, classes = draws(rng, 2000)
        equal = np.concatenate([np.flatnonzero(classes == name)[:64] for name in (0, 1)])
        wrong += standard_errors(loss[equal], classes[equal], *draws(rng, 200)) >= CONTRADICTED
    assert wrong < 0.05 * 300
