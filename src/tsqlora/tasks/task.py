"""What a task is: how its rows reach a model, the loss, and what is made of the logits."""

from collections.abc import Callable, Iterable
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

import numpy as np
from torch import Tensor

from tsqlora.errors import DataError, UnsupportedError
from tsqlora.libs.shapes import Bool, Float, Shaped
from tsqlora.rows.table import Table
from tsqlora.tasks.reading import Reading

Link = Literal["softmax", "sigmoid", "identity"]
"""What turns a row's logits into its answer: one of k classes, any of k labels, or a number."""

Logits = Callable[[Any], tuple[np.ndarray, Any]]
"""The logits of rows, with their labels or samples."""


@runtime_checkable  # for beartype, which checks annotations while tests run
class Task(Protocol):
    """Everything that depends on what the model learns."""

    @property
    def name(self) -> str: ...

    headline: ClassVar[str]
    """The metric that compares runs by default; more is better."""

    measured: ClassVar[tuple[str, ...]]
    """Every metric of the task, except those of generated text (`text_metrics.TEXT_METRICS`)."""

    @property
    def reading(self) -> Reading: ...

    def loss(self, logits: Float[Tensor, "n *k"], labels: Shaped[Tensor, "n *t"]) -> Float[Tensor, " n"]:
        """Return the loss of each sample, not reduced."""
        ...

    def batch_loss(self, losses: Float[Tensor, " n"], labels: Shaped[Tensor, "n *t"]) -> Float[Tensor, ""]:
        """Reduce sample losses as training does: the mean over samples, or over tokens."""
        ...

    def metrics(self, logits: Float[np.ndarray, "n *k"], labels: Shaped[np.ndarray, "n *t"], /) -> dict[str, float]:
        """Return the metrics of `measured` by their plain names; nothing of text, whose logits are too large."""
        ...

    def evaluate(self, samples: Any, /, *, logits: Logits, summed: Callable[..., dict[str, float]]) -> dict[str, float]:
        """Return the metrics of `measured` from the samples' logits and labels, or from counts summed over batches."""
        ...

    def predict(self, table: Table, /, *, logits: Logits, texts: Callable[[Table], list[str]]) -> list[dict[str, Any]]:
        """Return the cells that a file of predictions gets for each row, from its logits, or from written texts."""
        ...


@runtime_checkable
class Answers(Task, Protocol):
    """A task whose logits are one row a sample: a head is fitted on them, and they are compared with a constant."""

    link: ClassVar[Link]

    @property
    def class_weights(self) -> Tensor | None: ...

    def chance(self, labels: Shaped[Tensor, "n *k"], width: int) -> Float[Tensor, " k"]:
        """Return the logits of the constant predictor with the least mean loss on these labels."""
        ...

    def offsets(self, logits: Float[Tensor, "n k"], labels: Shaped[Tensor, "n *k"]) -> Float[Tensor, " k"]:
        """Return constants that remove the bias of the logits towards a class or side on these rows."""
        ...

    def predictions(self, logits: Float[np.ndarray, "n k"]) -> Shaped[np.ndarray, "n *k"]:
        """Return the predicted class ids, numbers, or whether each label is predicted."""
        ...

    def unusable(self, logits: Float[Tensor, "n k"], labels: Tensor) -> tuple[Bool[Tensor, " n"], str]:
        """Return which labels the loss cannot use, and what is expected."""
        ...


def evaluate(task: Task, samples: Any, /, *, logits: Logits, **_: Any) -> dict[str, float]:
    """The `evaluate` of a task with small logits."""
    return task.metrics(*logits(samples))


def answers_of(task: Task) -> Answers | None:
    """Return the task if its logits are one row a sample; None where tokens have logits, and for pairs."""
    return task if isinstance(task, Answers) else None


def require_labels(task: Task, labels: Tensor) -> None:
    """Raise UnsupportedError for labels of another task: one class per sample, or n × k of 0 and 1."""
    kind = task.reading.label
    if kind is None or kind.by_token or labels.dim() == (2 if kind.joint else 1):
        return
    cure = "give 0.0 or 1.0 for each label"
    if kind.single:
        cure = (
            'for several labels per row set model.config.problem_type to "multi_label_classification", for tags use '
            "AutoModelForTokenClassification"
        )
    raise UnsupportedError(f"the labels have shape {tuple(labels.shape)}, but the task is {task.name}; {cure}")


def require_usable(task: Task, logits: Tensor, labels: Tensor, rows: Iterable[Any], kind: str = "row") -> None:
    """Raise DataError naming the first of these rows whose label the loss cannot use: no class, or not finite."""
    if not isinstance(task, Answers):
        return
    wrong, expected = task.unusable(logits, labels)
    if not wrong.any():
        return
    first = int(wrong.int().argmax())
    raise DataError(
        f"{kind} {[*rows][first]} has the label {labels[first].tolist()}, and {expected}; correct it or remove the row"
    )
