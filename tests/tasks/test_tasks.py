from typing import Any

import numpy as np
import pytest

from tsqlora.errors import SettingsError, UnsupportedError
from tsqlora.tasks import NOT_BUILT, TASKS, get_task
from tsqlora.tasks.classification import Classification


@pytest.mark.parametrize("name", TASKS)
def test_a_task_is_made_by_its_name(name: str) -> None:
    assert get_task(name).name == name


def test_options_reach_the_task() -> None:
    task = get_task("sequence-classification", label_smoothing=0.1)
    assert isinstance(task, Classification)
    assert task.label_smoothing == 0.1
    with pytest.raises(SettingsError, match="label_smoothing"):
        get_task("regression", label_smoothing=0.1)


def test_an_unknown_name_gives_the_nearest() -> None:
    with pytest.raises(SettingsError, match=r"'regresion'.*'regression'"):
        get_task("regresion")


@pytest.mark.parametrize("name", [*NOT_BUILT, "masked lm"])
def test_tasks_that_are_not_built_are_refused_by_name(name: str) -> None:
    with pytest.raises(UnsupportedError, match=name):
        get_task(name)


@pytest.mark.parametrize(
    ("name", "labels"),
    [
        ("sequence-classification", [0, 1, 1]),
        ("multi-label-classification", [[0.0, 1.0], [1.0, 1.0], [0.0, 0.0]]),
        ("regression", [0.5, 1.0, 0.0]),
    ],
)
def test_metrics_are_all_that_the_task_says(name: str, labels: list[Any]) -> None:
    task = get_task(name)
    logits = np.array([[1.0, 0.0], [0.0, 2.0], [1.0, 0.5]])[:, : 1 if name == "regression" else 2]
    result = task.metrics(logits, np.array(labels))
    assert set(result) == set(task.measured) > {task.headline}
