"""Whether trusted rows agree with the pool: on tables whose answer is known, and against a slow twin."""

from typing import Any

import numpy as np
import pytest
from scipy.special import softmax

from tsqlora.quality.agreement import Agreement, agreement
from tsqlora.quality.label_noise import label_noise
from tsqlora.quality.ridge import fit_classes, fit_ridge
from tsqlora.tasks import Task, get_task

N, M, WIDTH = 1500, 128, 16
CLASSES, LABELS, NUMBERS = (
    get_task(f"{name}") for name in ("sequence-classification", "multi-label-classification", "regression")
)


def table(rng: np.random.Generator, *, shortcut: float = 0.0, wrong: float = 0.0, signal: float = 1.5) -> Any:
    """A pool and trusted rows of 2 classes: with a `shortcut`, one feature gives away the pool's labels only."""
    y = rng.integers(2, size=N + M)
    x = rng.normal(size=(N + M, WIDTH))
    x[:, 0] += signal * (2 * y - 1)
    leaked = np.where(np.arange(N + M) < N, y, rng.integers(2, size=N + M))
    x[:, 1] += shortcut * (2 * leaked - 1)
    y[:N] ^= rng.random(N) < wrong
    return x[:N].astype(np.float32), y[:N], x[N:].astype(np.float32), y[N:]


def result(x: np.ndarray, y: np.ndarray, few: np.ndarray, answers: np.ndarray, task: Task = CLASSES) -> Agreement:
    ridge = fit_classes(x, y, 2) if task is CLASSES else fit_ridge(x, y.reshape(len(y), -1).astype(np.float64))
    it = agreement(ridge, y, few, answers, task)
    assert it is not None
    return it


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    ("options", "agrees"),
    [
        ({}, True),
        ({"wrong": 0.2}, True),
        ({"shortcut": 2.0, "signal": 0.5}, False),
        ({"shortcut": 2.0, "signal": 0.5, "wrong": 0.2}, False),
        ({"signal": 0.0}, False),
    ],
    ids=["clean", "wrong labels", "shortcut", "both", "no signal"],
)
def test_rows_of_the_pool_agree_and_a_shortcut_does_not(options: dict[str, float], agrees: bool, seed: int) -> None:
    assert result(*table(np.random.default_rng(seed), **options)).agrees == agrees


def test_labels_of_another_rule_disagree() -> None:
    x, y, few, answers = table(np.random.default_rng(0))
    assert result(x, y, few, answers).agrees
    assert result(x, y, few, 1 - answers).confirmed < 0


@pytest.mark.parametrize("task", [NUMBERS, LABELS], ids=["numbers", "labels"])
def test_numbers_and_label_sets(task: Task) -> None:
    rng = np.random.default_rng(0)
    x, noise = rng.normal(size=(N + M, WIDTH)), 0.3 * rng.normal(size=(N + M, 3))
    y = x[:, :3] + noise
    y = y[:, 0] if task is NUMBERS else (y > 0).astype(np.float32)
    parts: Any = x[:N].astype(np.float32), y[:N], x[N:].astype(np.float32)
    assert result(*parts, y[N:], task).agrees
    assert not result(*parts, rng.permutation(y[N:]), task).agrees


def test_against_a_slow_twin() -> None:
    x, y, few, answers = table(np.random.default_rng(3), wrong=0.1)
    ridge = fit_classes(x, y, 2)
    noise = label_noise(ridge.left_out, y)
    p = [softmax(noise.scale * (ridge.weight @ row.astype(float) + ridge.bias) + noise.offsets) for row in few]
    frequent = sum(p) / M
    expected = [sum(of_class**2 for of_class in row) for row in p]
    claim = sum(expected) / M - sum(of_class**2 for of_class in frequent)
    actual = sum(row[label] for row, label in zip(p, answers, strict=True)) / M - sum(c**2 for c in frequent)
    it = agreement(ridge, y, few, answers, CLASSES)
    assert it is not None
    np.testing.assert_allclose([it.claim, it.confirmed], [claim, actual / claim], rtol=1e-6)


def test_fewer_rows_are_less_sure() -> None:
    x, y, few, answers = table(np.random.default_rng(1))
    errors = [result(x, y, few[:m], answers[:m]).error for m in (128, 32, 8)]
    assert errors == sorted(errors)
    assert agreement(fit_classes(x, y, 2), y, few[:1], answers[:1], CLASSES) is None
