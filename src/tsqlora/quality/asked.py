"""Which terms a scoring measures: those that were asked for, and that samples of the task have."""

from collections.abc import Iterable, Mapping

import numpy as np
import torch
from torch import Tensor

from tsqlora.errors import SettingsError, UnsupportedError
from tsqlora.quality.terms import Asked, Term, get_terms
from tsqlora.tasks import Answers, Task
from tsqlora.tasks.forward import Batch, require_labels
from tsqlora.tasks.generation import Generation

TRUST: Mapping[str, float] = {"loss": -1.0}
"""The Q of rows that are drawn evenly: only those that are dropped depend on it."""
PAPER_TERMS = ("gradient_norm", "loss_reduction", "convergence")
FREE_TERMS = ("loss", "el2n")
"""Measured always, where they are known: they cost no more."""


def wanted_terms(names: Iterable[Asked]) -> dict[str, Term]:
    """The terms of these names, and those that cost no more.  Raises SettingsError for an unknown one."""
    found = get_terms(dict.fromkeys([*names, *FREE_TERMS]))
    return found | get_terms(["cosine"]) if needs_gradients(found) else found


def require_terms(weights: Mapping[str, float], task: Task) -> None:
    """Raises what `score` does for weights of terms that samples of the task do not have: before a warm-up."""
    _known(wanted_terms(name for name, weight in weights.items() if weight), task, weights)


def fitting(
    terms: Mapping[str, Term], task: Task, weights: Mapping[str, float], reject: bool | None, batch: Batch
) -> dict[str, Term]:
    """The terms that samples of the task have.  Raises for labels that are not of the task, and what it has not."""
    labels = batch.get("labels")
    if isinstance(labels, Tensor):
        require_labels(task, labels)
        if reject and not of_classes(task, labels.cpu().numpy()):
            raise SettingsError(f"reject finds wrong labels of classes, and the task is {task.name}; leave it out")
    return _known(terms, task, weights)


def _known(terms: Mapping[str, Term], task: Task, weights: Mapping[str, float]) -> dict[str, Term]:
    """The terms that samples of the task have.

    Raises SettingsError if Q asks for one that only classes and numbers have, UnsupportedError for one that only a
    text behind its prompt has.
    """
    alone = [name for name, term in terms.items() if term.alone]
    if alone and not (isinstance(task, Generation) and task.causal):
        raise UnsupportedError(
            f"quality term '{alone[0]}' compares a target with and without its prompt, which {task.name} cannot; leave "
            "it out"
        )
    if not isinstance(task, Generation):
        return dict(terms)
    if asked := [name for name, term in terms.items() if term.answers and weights.get(name)]:
        raise SettingsError(
            f"quality term '{asked[0]}' is of classes and numbers, and the task is {task.name}; leave it out"
        )
    return {name: term for name, term in terms.items() if not term.answers}


def needs_gradients(terms: Mapping[str, Term]) -> bool:
    return any(term.gradient for term in terms.values())


def of_classes(task: Task, labels: np.ndarray) -> bool:
    return isinstance(task, Answers) and task.strata(labels) is not None


def require_precision(terms: Mapping[str, Term], autocast: torch.dtype | None) -> None:
    if autocast is not None and any(term.lookahead for term in terms.values()):
        raise SettingsError("loss_reduction is a difference that half precision cannot hold; score in float32")


def require_softmax(weights: Mapping[str, float] | None, temperature: float) -> None:
    """Raises SettingsError for a temperature where no softmax is taken."""
    if weights is None and temperature != 1:
        raise SettingsError(f"temperature {temperature} is of a softmax over Q, and Q has no weights; give weights")
