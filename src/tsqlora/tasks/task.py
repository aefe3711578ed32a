"""What a task is: how its rows reach a model, the loss, and what is made of the logits."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

import numpy as np
from torch import Tensor, nn

from tsqlora.compat.shapes import Bool, Float, Shaped
from tsqlora.data.chat import Format
from tsqlora.data.labels import LabelKind
from tsqlora.data.splits import Find, resolve_max_length
from tsqlora.data.table import Table
from tsqlora.data.tokens import Encode

Batch = Mapping[str, Any]
Collate = Callable[[list[Any]], Batch]

Link = Literal["softmax", "sigmoid", "identity"]
"""What turns a row's logits into its answer: one of k classes, any of k labels, or a number."""


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Reading:
    """How rows become batches, and which model takes them."""

    auto: str
    """The class of transformers that loads the model."""
    pipeline: str | None
    """The Hub's name for what such a model does."""
    find: Find
    encode: Encode
    collate: Callable[..., Collate]
    """Takes the model, its tokenizer or processor, and `max_length`."""
    logits: Callable[[nn.Module, Mapping[str, Tensor]], Tensor]
    """Runs the model on inputs: n × k, or n × t × k where every token has logits."""
    label: LabelKind | None = None
    """What a cell holds of the classes; None for numbers and texts."""
    problem_type: str | None = None
    """By which a model of transformers chooses its own loss."""
    settings: tuple[str, ...] = ("text", "text_pair", "label")
    """The settings of `data` that `find` takes."""
    foreign: Mapping[str, str | None] = field(default_factory=dict)
    """Settings without effect, each with the one to set in its place."""
    media: str | None = None
    """ "image" or "audio" where a row is a file."""
    whole: bool = False
    """Whether the checkpoint must have every weight: no head is new."""
    causal: bool = False
    """Whether the logits at a token predict the next one."""
    has_reference: bool = False
    """Whether the loss compares the model with itself before training: rows are scored, and another trains."""

    @property
    def stratified(self) -> bool:
        """Whether a row has one class, by which draws are stratified and which fits judge."""
        return self.label is not None and self.label.single

    @property
    def by_token(self) -> bool:
        """Whether a row has a label for each of its tokens."""
        return self.label is not None and self.label.by_token

    def noun(self, format: Format | None) -> str:
        """What a note calls the part of a row that may be cut."""
        return "recordings" if self.media else "texts" if format is None or format.name == "text" else "prompts"

    def limit(self, setting: int | None, tokenizer: Any, positions: int | None, most: int = 10**12) -> int:
        """Most tokens of a sample; of a recording its most steps, 0 for all, as for images."""
        if self.media is not None:
            return setting or 0
        limit = min(tokenizer.model_max_length, most)
        return resolve_max_length(setting, tokenizer_limit=limit, positions=positions)


@runtime_checkable  # for beartype, which checks annotations while tests run
class Answers(Protocol):
    """A task whose logits are one row a sample: a head is fitted on them, and they are compared with a constant."""

    link: ClassVar[Link]

    @property
    def class_weights(self) -> Tensor | None: ...

    def loss(self, logits: Float[Tensor, "n k"], labels: Shaped[Tensor, "n *k"]) -> Float[Tensor, " n"]: ...

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


@runtime_checkable
class Writer(Protocol):
    """A task whose answer is text that the model writes."""

    def count(self, logits: Float[Tensor, "n t v"], labels: Shaped[Tensor, "n t"]) -> dict[str, Tensor]:
        """Return what batches add up to metrics of tokens."""
        ...

    def of_counts(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Return the metrics of summed counts."""
        ...


@runtime_checkable
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

    @property
    def answers(self) -> Answers | None:
        """None where tokens have logits, and for pairs."""
        ...

    @property
    def writer(self) -> Writer | None: ...

    def loss(self, logits: Float[Tensor, "n *k"], labels: Shaped[Tensor, "n *t"]) -> Float[Tensor, " n"]:
        """Return the loss of each sample, not reduced."""
        ...

    def batch_loss(self, losses: Float[Tensor, " n"], labels: Shaped[Tensor, "n *t"]) -> Float[Tensor, ""]:
        """Reduce sample losses as training does: the mean over samples, or over tokens."""
        ...

    def metrics(self, logits: Float[np.ndarray, "n *k"], labels: Shaped[np.ndarray, "n *t"], /) -> dict[str, float]:
        """Return the metrics of `measured` by their plain names; nothing of text, whose logits are too large."""
        ...

    def shown(
        self, logits: Float[np.ndarray, "n *k"], table: Table, samples: Iterable[Mapping[str, Any]], /
    ) -> list[dict[str, Any]]:
        """Return the cells that a file of predictions gets for each row; none of text, which is written."""
        ...
