"""What a task needs: a loss for each sample; where a sample has one answer, chance level, calibration and metrics."""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from tsqlora.errors import SettingsError, UnsupportedError, nearest
from tsqlora.tasks.classification import Classification
from tsqlora.tasks.generation import Generation
from tsqlora.tasks.regression import Regression


@runtime_checkable  # for beartype, which checks annotations while tests run
class Task(Protocol):
    """What training and scores by gradients ask of a task."""

    @property
    def name(self) -> str: ...

    answer: ClassVar[Literal["class", "number", "text"]]
    """What a row's label is."""

    headline: ClassVar[str]
    """The metric by which runs are compared, unless another is asked for; more is better."""

    measured: ClassVar[tuple[str, ...]]
    """Every metric of the task, but for those of text that is written (`texts.TEXT_METRICS`)."""

    def loss(self, logits: Float[Tensor, "n *k"], labels: Shaped[Tensor, "n *t"]) -> Float[Tensor, " n"]:
        """Each sample's own loss, never reduced."""
        ...

    def batch_loss(self, losses: Float[Tensor, " n"], labels: Shaped[Tensor, "n *t"]) -> Float[Tensor, ""]:
        """What training makes of the samples' losses: their mean, or that over the tokens."""
        ...


@runtime_checkable
class Answers(Task, Protocol):
    """A task whose samples have one answer each: a class or a number."""

    def chance(self, labels: Shaped[Tensor, " n"], width: int) -> Float[Tensor, " k"]:
        """Logits of the constant predictor whose mean loss over these labels is least."""
        ...

    def offsets(self, logits: Float[Tensor, "n k"], labels: Shaped[Tensor, " n"]) -> Float[Tensor, " k"]:
        """Constants to add to the logits so that they lean to no class or side over these rows."""
        ...

    def strata(self, labels: Shaped[np.ndarray, " n"]) -> Int[np.ndarray, " n"] | None:
        """The stratum of each sample, where sampling is stratified."""
        ...

    def metrics(self, logits: Float[np.ndarray, "n k"], labels: Shaped[np.ndarray, " n"]) -> dict[str, float]:
        """The task's metrics by their plain names, and the mean loss."""
        ...

    def predictions(self, logits: Float[np.ndarray, "n k"]) -> Shaped[np.ndarray, " n"]:
        """What the logits say: class ids or numbers."""
        ...


GENERATION = ("causal-lm", "seq2seq")
"""The tasks whose answer is text."""

TASKS: dict[str, Callable[..., Any]] = {
    Classification.name: Classification,
    Regression.name: Regression,
    **{name: partial(Generation, name, causal=name == "causal-lm") for name in GENERATION},
}

NOT_BUILT = (
    "multi-label-classification",
    "multi-label",
    "token-classification",
    "question-answering",
    "masked-lm",
    "preference-tuning",
)


def get_task(name: str, **options: Any) -> Task:
    """The task of that name, made with its options (label_smoothing, class_weights).

    Raises UnsupportedError for a task that is not built, SettingsError for an unknown name or an option of another.
    """
    if name.replace("_", "-").replace(" ", "-") in NOT_BUILT:
        raise UnsupportedError(f"task.type {name} is not built; built are: {', '.join(sorted(TASKS))}")
    if name not in TASKS:
        raise SettingsError(f"unknown task.type '{name}'; {nearest(name, TASKS)}")
    if foreign := options.keys() - inspect.signature(TASKS[name]).parameters.keys():
        raise SettingsError(f"{min(foreign)} is not of {name}; leave it out")
    return TASKS[name](**options)


def require_answers(task: Task, what: str) -> Answers:
    """The task, if its samples have one answer each.  Raises UnsupportedError for text generation."""
    if isinstance(task, Answers):
        return task
    raise UnsupportedError(
        f"{what} is built for classification and regression, and the task is {task.name}; leave it out"
    )
