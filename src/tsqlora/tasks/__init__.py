"""Tasks: the loss per sample; for classes, labels and numbers also chance level, calibration and metrics."""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar, Protocol, runtime_checkable

import numpy as np
from torch import Tensor

from tsqlora.compat.shapes import Float, Int, Shaped
from tsqlora.errors import SettingsError, UnsupportedError, nearest
from tsqlora.tasks.classification import Classification
from tsqlora.tasks.generation import Generation
from tsqlora.tasks.multi_label import MultiLabel
from tsqlora.tasks.preference import Preference
from tsqlora.tasks.regression import Regression
from tsqlora.tasks.tokens import TokenClassification


@runtime_checkable  # for beartype, which checks annotations while tests run
class Task(Protocol):
    """The part of a task that training and gradient scores use."""

    @property
    def name(self) -> str: ...

    answer: ClassVar[str]
    """The kind of a row's label: "class", "labels" (any of several classes), "tags" (of tokens), "number", "text",
    or "pair" (of texts, of which one is preferred)."""

    headline: ClassVar[str]
    """The metric that compares runs by default; more is better."""

    measured: ClassVar[tuple[str, ...]]
    """Every metric of the task, except those of generated text (`texts.TEXT_METRICS`)."""

    def loss(self, logits: Float[Tensor, "n *k"], labels: Shaped[Tensor, "n *t"]) -> Float[Tensor, " n"]:
        """Return the loss of each sample, not reduced."""
        ...

    def batch_loss(self, losses: Float[Tensor, " n"], labels: Shaped[Tensor, "n *t"]) -> Float[Tensor, ""]:
        """Reduce sample losses as training does: the mean over samples, or over tokens."""
        ...


@runtime_checkable
class Answers(Task, Protocol):
    """A task with one answer per sample: a class, a number, or a set of labels as n × k of 0 and 1."""

    def chance(self, labels: Shaped[Tensor, "n *k"], width: int) -> Float[Tensor, " k"]:
        """Return the logits of the constant predictor with the least mean loss on these labels."""
        ...

    def offsets(self, logits: Float[Tensor, "n k"], labels: Shaped[Tensor, "n *k"]) -> Float[Tensor, " k"]:
        """Return constants that remove the bias of the logits towards a class or side on these rows."""
        ...

    def strata(self, labels: Shaped[np.ndarray, "n *k"]) -> Int[np.ndarray, " n"] | None:
        """Return the stratum of each sample; None where sampling is not stratified."""
        ...

    def metrics(self, logits: Float[np.ndarray, "n k"], labels: Shaped[np.ndarray, "n *k"]) -> dict[str, float]:
        """Return the task's metrics by their plain names, and the mean loss."""
        ...

    def predictions(self, logits: Float[np.ndarray, "n k"]) -> Shaped[np.ndarray, "n *k"]:
        """Return the predicted class ids, numbers, or whether each label is predicted."""
        ...


GENERATION = ("causal-lm", "seq2seq")
"""Tasks whose answer is text."""

MEDIA = {"image-classification": "image", "audio-classification": "audio"}
"""Tasks whose rows are files, and the kind of file."""

TASKS: dict[str, Callable[..., Any]] = {
    "sequence-classification": Classification,
    **{name: partial(Classification, name=name) for name in MEDIA},
    MultiLabel.name: MultiLabel,
    Regression.name: Regression,
    TokenClassification.name: TokenClassification,
    Preference.name: Preference,
    **{name: partial(Generation, name, causal=name == "causal-lm") for name in GENERATION},
}

NOT_BUILT = (
    "question-answering",
    "masked-lm",
)


def get_task(name: str, **options: Any) -> Task:
    """Build the task of this name with its options (label_smoothing, class_weights, tags).

    Raises UnsupportedError for a task that is not supported, SettingsError for an unknown name or option.
    """
    if name.replace("_", "-").replace(" ", "-") in NOT_BUILT:
        raise UnsupportedError(f"task.type {name} is not built; choose one of {', '.join(sorted(TASKS))}")
    if name not in TASKS:
        raise SettingsError(f"unknown task.type '{name}'; {nearest(name, TASKS)}")
    if foreign := options.keys() - inspect.signature(TASKS[name]).parameters.keys():
        raise SettingsError(f"{name} has no option {min(foreign)}; remove it")
    return TASKS[name](**options)


def require_answers(task: Task, what: str) -> Answers:
    """Return the task if its samples have one answer each; raise UnsupportedError for text generation."""
    if isinstance(task, Answers):
        return task
    raise UnsupportedError(f"{what} works for classification and regression, but the task is {task.name}; remove it")
