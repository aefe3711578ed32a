"""Tasks: everything that depends on what a model learns, one file each; nobody else asks which one it is."""

import inspect
from collections.abc import Callable, Collection
from functools import partial
from typing import Any, cast

from torch import nn
from transformers import GenerationMixin

from tsqlora.errors import SettingsError, UnsupportedError, nearest
from tsqlora.libs.transformers import CLASSES_OF, MEDIA_CLASSES
from tsqlora.tasks.classification import Classification
from tsqlora.tasks.forward import Batch, Collate, base_model
from tsqlora.tasks.generation import Generation
from tsqlora.tasks.multi_label import MultiLabel
from tsqlora.tasks.preference import Preference
from tsqlora.tasks.reading import Reading, files, require_room
from tsqlora.tasks.regression import Regression
from tsqlora.tasks.task import Answers, Task, answers_of
from tsqlora.tasks.tokens import TokenClassification

__all__ = [
    "TASKS",
    "Answers",
    "Batch",
    "Collate",
    "Reading",
    "Task",
    "answers_of",
    "get_task",
    "has_own_loss",
    "require_classes",
    "require_room",
    "task_of",
]

TASKS: dict[str, Callable[..., Any]] = {
    "sequence-classification": Classification,
    **{
        f"{media}-classification": partial(Classification, name=f"{media}-classification", reading=files(media))
        for media in ("image", "audio")
    },
    MultiLabel.name: MultiLabel,
    Regression.name: Regression,
    TokenClassification.name: TokenClassification,
    Preference.name: Preference,
    "causal-lm": partial(Generation, "causal-lm", causal=True),
    "seq2seq": partial(Generation, "seq2seq", causal=False),
}

NOT_BUILT = (
    "question-answering",
    "masked-lm",
)


def get_task(name: str, *, classes: Collection[Any] = (), **options: Any) -> Task:
    """Build the task of this name with its options, such as label_smoothing and class_weights.

    A task whose metrics need the names of `classes` takes them as `tags`. Raises UnsupportedError for a task that is
    not supported, SettingsError for an unknown name or option.
    """
    if name.replace("_", "-").replace(" ", "-") in NOT_BUILT:
        raise UnsupportedError(f"task.type {name} is not built; choose one of {', '.join(sorted(TASKS))}")
    if name not in TASKS:
        raise SettingsError(f"unknown task.type '{name}'; {nearest(name, TASKS)}")
    takes = inspect.signature(TASKS[name]).parameters
    if foreign := options.keys() - takes.keys():
        raise SettingsError(f"{name} has no option {min(foreign)}; remove it")
    return TASKS[name](**options, **({"tags": classes} if classes and "tags" in takes else {}))


def task_of(model: nn.Module, *, columns: Collection[str] = (), label_smoothing: float = 0.0) -> Task:
    """Infer the task from the model: generation, else by its problem_type, else regression for one label.

    A causal model whose rows have the `columns` chosen and rejected prefers one of two answers. Raises UnsupportedError
    naming any other task that the model is made for.
    """
    options: dict[str, Any] = {"label_smoothing": label_smoothing} if label_smoothing else {}
    config, inner = getattr(model, "config", None), base_model(model)
    if isinstance(inner, GenerationMixin):
        name = "seq2seq" if getattr(config, "is_encoder_decoder", False) else "causal-lm"
        if not {"chosen", "rejected"} <= {*columns}:
            return get_task(name, **options)
        if name == "seq2seq":
            raise UnsupportedError(f"preference rows need a causal model, but the task is {name}; give another")
        return get_task(Preference.name)
    classes = {cls.__name__ for cls in type(inner).__mro__}
    for name, mapping in CLASSES_OF.items():
        if classes & set(mapping.values()):
            return get_task(name, classes=tuple(cast(Any, config).id2label.values()), **options)
    kind, labels = getattr(config, "problem_type", None), getattr(config, "num_labels", 2)
    if kind == "multi_label_classification":
        return get_task("multi-label-classification", **options)
    regression = kind == "regression" or (kind is None and labels == 1)
    media = (
        name
        for name, mapping in MEDIA_CLASSES.items()
        if any(classes.intersection([one] if isinstance(one, str) else one) for one in mapping.values())
    )
    return get_task("regression" if regression else next(media, "sequence-classification"), **options)


def require_classes(task: Task) -> None:
    """Raise UnsupportedError for a task without classes, whose labels no audit judges."""
    if task.reading.label is None:
        names = ", ".join(name for name in TASKS if get_task(name).reading.label is not None)
        raise UnsupportedError(f"an audit of labels works for {names}, and the task is {task.name}")


def has_own_loss(task: Task, model: nn.Module) -> bool:
    """Whether the loss of a task is not the one that the model computes itself."""
    return type(task) is not type(task_of(model))
