"""How rows are scored and drawn: one immutable rule, what it asks to be measured, and what that costs."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tsqlora.errors import SettingsError, UnsupportedError, nearest
from tsqlora.gradients.sites import Scope
from tsqlora.progress import Progress
from tsqlora.quality.gate import GATES, Gate
from tsqlora.quality.label_noise import MOST
from tsqlora.quality.rows import REFERENCE_ROWS, Dataset
from tsqlora.quality.sampling import require_temperature
from tsqlora.quality.terms import Asked, Term, get_terms
from tsqlora.quality.trusted import Trusted
from tsqlora.tasks import Answers, Task
from tsqlora.tasks.forward import Batch, Collate, require_labels
from tsqlora.tasks.generation import Generation

TRUST: Mapping[str, float] = {"loss": -1.0}
"""The Q of rows that are drawn evenly: only those that are dropped depend on it."""
PAPER_TERMS = ("gradient_norm", "loss_reduction", "convergence")
FREE_TERMS = ("loss", "el2n")
"""Measured always, where they are known: they cost no more."""


@dataclass(frozen=True, slots=True)
class ScoringRule:
    """What is measured of each row, and how rows are drawn by it.

    Raises SettingsError for a value that means nothing, alone or beside the others.
    """

    weights: Mapping[str, float] | None = None
    """Of the terms in Q, by whose softmax rows are drawn; a term with a weight is always measured. None draws evenly,
    and for classes first drops rows whose label seems wrong, if there is evidence of wrong labels."""
    temperature: float = 1.0
    """Of the softmax over Q; small is choosy."""
    reject: bool | None = None
    """Whether rows whose label seems wrong are dropped; None: without weights, and for classes."""
    terms: Sequence[Asked] = ()
    """What else to measure, by a name of TERMS, or as a function or Term of your own. Gradients cost a backward pass,
    `loss_reduction` one more forward, `ifd` one of the targets alone."""
    scope: Scope = "adapter"
    """Gradients of what trains ("adapter"), or of the whole target layers and the head ("full")."""
    reference: int | Sequence[int] | Dataset = REFERENCE_ROWS
    """The rows whose mean gradient `convergence` compares with: how many to choose at random, or their indices, or
    samples. A row that is scored as well, the same or equal, is taken out of its own mean."""
    calibration: bool = True
    """Whether to correct first a leaning of the logits to one class, or of numbers to one side."""
    guard: bool = True
    """Whether QualityCallback draws kept rows at random where the rows that Q draws would teach less than random ones
    (`quality/fallback.py`)."""
    seed: int = 0
    """Of the reference rows that are chosen, of the head's folds and of the trusted model."""
    gate: Gate | None = None
    """Which rows leave the pool because the trusted model disagrees with them (`quality/gate.py`); None keeps all."""
    head_start: bool = True
    """Whether a head that is better than the model's own is fitted before the first step."""
    look_again: bool = True
    """Whether QualityCallback looks at all rows again after a third of the steps."""
    select: bool = True
    """False draws all rows evenly, unscored, with the same head start: the control."""

    def __post_init__(self) -> None:
        require_temperature(self.temperature)
        if self.weights is None and self.temperature != 1:
            raise SettingsError(
                f"temperature {self.temperature} is of a softmax over Q, and Q has no weights; give weights"
            )
        for name, weight in (self.weights or {}).items():
            if not np.isfinite(weight):
                raise SettingsError(f"the weight of '{name}' is {weight}; it must be a finite number")
        if isinstance(self.reference, Integral) and self.reference < 2:
            raise SettingsError(f"reference is {self.reference}; it must be a whole number of rows, at least 2")
        if self.gate is not None and self.gate not in GATES:
            raise SettingsError(f"unknown quality.gate '{self.gate}'; {nearest(self.gate, GATES)}")
        self.measured()

    @property
    def even(self) -> bool:
        """Whether kept rows are drawn equally often."""
        return self.weights is None

    @property
    def q(self) -> dict[str, float]:
        """The weights of Q, also where rows are drawn evenly."""
        return dict(TRUST if self.weights is None else self.weights)

    def measured(self) -> dict[str, Term]:
        """The terms that are asked for or have a weight, and those that cost no more."""
        return wanted_terms([*self.terms, *(name for name, weight in self.q.items() if weight)])

    @property
    def trusts(self) -> bool:
        """Whether it asks what the trusted model makes of the rows."""
        return self.gate is not None or needs_trusted(self.measured())

    def guarded(self) -> "ScoringRule":
        """The rule that also measures convergence for the guard, where gradients are computed anyway."""
        weighted = wanted_terms(name for name, weight in (self.weights or {}).items() if weight)
        if self.guard and needs_gradients(weighted):
            return replace(self, terms=(*self.terms, "convergence"))
        return self

    def trusting(self, task: Task, trusted: bool) -> "ScoringRule":
        """The rule for a task: text that has trusted rows, and no weights, is drawn by its reducible loss."""
        if trusted and self.weights is None and isinstance(task, Generation) and self.select:
            return replace(self, weights={"reducible_loss": 1.0})
        return self

    def decides(self, task: Task, trusted: bool) -> bool:
        """Whether a look can decide anything: text has no head to fit, and without Q its rows are all alike."""
        idle = isinstance(task, Generation) and self.trusting(task, trusted).even and not self.terms
        return self.select and not idle

    def rejects(self, stratified: bool) -> bool:
        """Whether rows whose label seems wrong are dropped; `stratified`: labels are classes."""
        return stratified and (self.even if self.reject is None else self.reject)

    def require_trusted(self, given: bool) -> None:
        """Raises SettingsError for what only trusted rows can say, where there are none."""
        asked = [name for name, term in self.measured().items() if term.trusted]
        what = f"gate '{self.gate}'" if self.gate is not None else f"term '{asked[0]}'" if asked else None
        if what is not None and not given:
            raise SettingsError(f"{what} needs trusted rows: name them in data.trusted, or give trusted=rows")

    def require_rejectable(self, task: Task) -> None:
        """Raises SettingsError for rejection where labels are no classes."""
        if self.reject and task.answer != "class":
            raise SettingsError(f"reject finds wrong labels of classes, and the task is {task.name}; leave it out")

    def require_room(self, fraction: float) -> None:
        """Raises SettingsError where rejection might leave fewer rows than a softmax draws."""
        if self.reject and self.weights is not None and fraction > 1 - MOST:
            raise SettingsError(
                f"reject may leave out {MOST:.0%} of the rows, and weights draw {fraction:.0%} of all of them, none "
                f"twice; set the fraction to {1 - MOST:g} or less, or leave out reject or the weights"
            )


@dataclass(frozen=True, slots=True)
class RowNames:
    """What is known of the rows beside what they hold, for the scores' file."""

    ids: np.ndarray | None = None
    """The place of each row in the file that it comes from."""
    hashes: Sequence[str] | None = None
    """What each row holds, as a name of it: by them a scores' file tells whether its rows are still there."""
    lengths: Sequence[int] | None = None
    """Tokens of every row; then rows are read once."""
    about: Mapping[str, Any] = field(default_factory=dict)
    """What else the scores' record should say."""


@dataclass(frozen=True, slots=True)
class Compute:
    """How scores are computed; what they say does not depend on it but for rounding."""

    batch_size: int = 32
    """Samples of a pass."""
    autocast: torch.dtype | None = None
    """Compute in this dtype; then terms are good to about two digits, and `loss_reduction`, a small difference, is
    refused."""
    journal: Path | None = None
    """A folder in which what is measured is kept. If the process ends before it is done, the same call goes on there
    and gives the same scores; delete it when they are saved. It needs the rows' hashes."""
    progress: Progress | None = None
    """Called with (phase, rows done, rows in all)."""

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise SettingsError(f"batch_size is {self.batch_size}; it must be at least 1")


def wanted_terms(names: Iterable[Asked]) -> dict[str, Term]:
    """The terms of these names, and those that cost no more.  Raises SettingsError for an unknown one."""
    found = get_terms(dict.fromkeys([*names, *FREE_TERMS]))
    return found | get_terms(["cosine"]) if needs_gradients(found) else found


def needs_trusted(terms: Mapping[str, Term]) -> bool:
    return any(term.trusted for term in terms.values())


def require_terms(weights: Mapping[str, float], task: Task) -> None:
    """Raises what `score` does for weights of terms that samples of the task do not have: before a look."""
    _known(wanted_terms(name for name, weight in weights.items() if weight), task, weights)


def fitting(terms: Mapping[str, Term], task: Task, rule: ScoringRule, batch: Batch) -> dict[str, Term]:
    """The terms that samples of the task have.  Raises for labels that are not of the task, and what it has not."""
    labels = batch.get("labels")
    if isinstance(labels, Tensor):
        require_labels(task, labels)
    return _known(terms, task, rule.q)


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


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LookRequest:
    """Rows to look at, and how: all that a look needs beside the model."""

    dataset: Dataset
    collate: Collate
    """Makes batches in which each row is a sample."""
    task: Task
    rule: ScoringRule = ScoringRule()
    rows: RowNames = RowNames()
    compute: Compute = Compute()
    trusted: Trusted | None = None
    fraction: float = 1.0
    """The share of the rows that a gate must leave."""

    @property
    def trusted_rows(self) -> int:
        return 0 if self.trusted is None else len(self.trusted.rows)
