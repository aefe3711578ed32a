"""The scoring rule: which terms are measured and how rows are drawn; and the request for a look."""

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
from tsqlora.quality.label_noise import MOST
from tsqlora.quality.rows import REFERENCE_ROWS, Dataset
from tsqlora.quality.sampling import require_temperature
from tsqlora.quality.terms import Term, TermSpec, get_terms
from tsqlora.quality.trusted import GATES, Gate, Trusted
from tsqlora.tasks import Answers, Task
from tsqlora.tasks.forward import Batch, Collate, require_labels
from tsqlora.tasks.generation import Generation
from tsqlora.tasks.preference import Preference

EVEN_WEIGHTS: Mapping[str, float] = {"loss": -1.0}
"""Q of rows that are drawn evenly: only the choice between duplicates depends on it."""
TEXT_WEIGHTS: Mapping[str, float] = {"density_ratio": 4.0}
"""Q of text with trusted rows. The weight makes the draw choosy: few rows that miss the point do harm."""
PAPER_TERMS = ("gradient_norm", "loss_reduction", "convergence")
FREE_TERMS = ("loss", "el2n")
"""Always measured where available, since they cost nothing more."""


@dataclass(frozen=True, slots=True)
class ScoringRule:
    """The terms to measure for each row, and how rows are drawn.

    Raises SettingsError for an invalid value or combination.
    """

    weights: Mapping[str, float] | None = None
    """Weights of the terms in Q, whose softmax draws the rows; terms with a weight are always measured. None draws
    evenly, and for classes first drops rows with a likely wrong label, if there is evidence of wrong labels."""
    temperature: float = 1.0
    """Temperature of the softmax over Q; small values are selective."""
    reject: bool | None = None
    """Whether to drop rows with a likely wrong label; None: without weights, and for classes."""
    terms: Sequence[TermSpec] = ()
    """More terms to measure: names in TERMS, functions or Terms. Gradients cost a backward pass, `loss_reduction` one
    more forward pass, `ifd` one over the targets without prompts."""
    scope: Scope = "adapter"
    """Take gradients of the trainable parameters ("adapter"), or of whole target layers and the head ("full")."""
    reference: int | Sequence[int] | Dataset = REFERENCE_ROWS
    """The rows whose mean gradient `convergence` compares with: a number of random rows, indices, or samples. A row
    that is scored too is left out of its own mean."""
    calibration: bool = True
    """Whether to remove the bias of the logits towards one class or side before scoring."""
    guard: bool = True
    """Whether QualityCallback draws evenly where wrong labels are evident and Q would draw more of them than chance
    (`quality/fallback.py`)."""
    seed: int = 0
    """Seed of the reference rows, the head's folds and the trusted model."""
    gate: Gate | None = None
    """How the trusted model excludes rows that it disagrees with (`quality/trusted.py`); None keeps all."""
    trusted_last: bool | None = None
    """Whether QualityCallback trains on trusted rows last, after the pool, or mixes them in; None mixes in texts, and
    other rows if they agree with the pool (`quality/agreement.py`)."""
    head_start: bool = True
    """Whether to fit the head before the first step, if that is better than the model's own."""
    look_again: bool = True
    """Whether QualityCallback looks at all rows again after a third of the steps."""
    select: bool = True
    """False draws all rows evenly, unscored, with the same head start: the control."""

    def __post_init__(self) -> None:
        require_temperature(self.temperature)
        if self.weights is None and self.temperature != 1:
            raise SettingsError(f"temperature {self.temperature} needs weights, since it scales Q; give weights")
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
        """The weights of Q, also for even draws."""
        return dict(EVEN_WEIGHTS if self.weights is None else self.weights)

    def measured(self) -> dict[str, Term]:
        """Return the terms to measure: those in `terms`, those with a weight, and free ones."""
        return _with_free_terms([*self.terms, *(name for name, weight in self.q.items() if weight)])

    @property
    def trusts(self) -> bool:
        """Whether the rule needs the trusted model."""
        return self.gate is not None or needs_trusted(self.measured())

    def trusting(self, task: Task, trusted: bool) -> "ScoringRule":
        """Return the rule for a task: text with trusted rows and without weights is drawn by its density ratio.

        With a gate, which trains the trusted model anyway, it is drawn by reducible loss; so are preference pairs, of
        which those that look swapped are dropped.
        """
        rule = self
        if trusted and self.weights is None and isinstance(task, Generation | Preference) and self.select:
            by_ratio = isinstance(task, Generation) and self.gate is None
            rule = replace(self, weights=TEXT_WEIGHTS if by_ratio else {"reducible_loss": 1.0})
        return replace(rule, gate="swapped") if trusted and isinstance(task, Preference) else rule

    def without_probe(self) -> "ScoringRule":
        """Return the rule without terms of hidden states; without other weights rows are drawn evenly."""
        probes = {name for name, term in self.measured().items() if term.probe}
        weights = {name: weight for name, weight in (self.weights or {}).items() if weight and name not in probes}
        terms = [term for term in self.terms if not (isinstance(term, str) and term in probes)]
        rule = replace(self, weights=weights, terms=terms)
        return rule if weights else replace(rule, weights=None, temperature=1.0)

    def decides(self, task: Task, trusted: bool) -> bool:
        """Whether a look changes the draw: text has no head to fit, and without Q all its rows are equal."""
        idle = isinstance(task, Generation) and self.trusting(task, trusted).even and not self.terms
        return self.select and not idle

    def rejects(self, stratified: bool) -> bool:
        """Whether to drop rows with a likely wrong label, if labels are classes (`stratified`)."""
        return stratified and (self.even if self.reject is None else self.reject)

    def require_trusted(self, trusted: bool) -> None:
        """Raise SettingsError if the rule needs trusted rows and there are none."""
        terms = [f"term '{name}'" for name, term in self.measured().items() if term.trusted or term.probe]
        needing = terms if self.gate is None else [f"gate '{self.gate}'", *terms]
        if needing and not trusted:
            raise SettingsError(f"{needing[0]} needs trusted rows: name them in data.trusted, or pass trusted=rows")

    def require_rejectable(self, task: Task) -> None:
        """Raise an error for `reject` where labels are not classes, and for other parts that the task does not have."""
        if self.reject and task.answer != "class":
            raise SettingsError(f"reject works for classification, but the task is {task.name}; remove it")
        if self.gate == "share" and task.answer == "tags":
            raise SettingsError(f"gate share compares labels of rows, but the task is {task.name}; use gate surest")
        if needs_probe(self.measured()) and not isinstance(task, Generation):
            raise UnsupportedError(
                f"quality term 'density_ratio' compares hidden states of texts, but the task is {task.name}; remove it"
            )

    def require_room(self, fraction: float) -> None:
        """Raise SettingsError where `reject` might leave fewer rows than a draw takes."""
        if self.reject and self.weights is not None and fraction > 1 - MOST:
            raise SettingsError(
                f"reject may drop {MOST:.0%} of the rows, and weights draw {fraction:.0%} of them without repeats; "
                f"set the fraction to {1 - MOST:g} or less, or remove reject or the weights"
            )


@dataclass(frozen=True, slots=True)
class RowNames:
    """Ids, hashes and lengths of the rows, for the file of scores."""

    ids: np.ndarray | None = None
    """The number of each row in its file."""
    hashes: Sequence[str] | None = None
    """A hash of each row's content, by which the row is found again."""
    lengths: Sequence[int] | None = None
    """Tokens of every row; saves a pass over the rows."""
    about: Mapping[str, Any] = field(default_factory=dict)
    """More values for the record of the scores."""


@dataclass(frozen=True, slots=True)
class Compute:
    """How scores are computed; apart from rounding, the scores do not depend on it."""

    batch_size: int = 32
    """Samples per pass."""
    autocast: torch.dtype | None = None
    """Compute in this dtype: terms have about two digits, and `loss_reduction`, a small difference, is refused."""
    journal: Path | None = None
    """A folder that records measurements. If the process ends early, the same call continues there and gives the same
    scores; delete it once they are saved. Needs the rows' hashes."""
    progress: Progress | None = None
    """Called with (phase, rows done, all rows)."""
    workers: int = 0
    """Processes that read rows ahead; 0 reads them in this one."""

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise SettingsError(f"batch_size is {self.batch_size}; it must be at least 1")


def _with_free_terms(names: Iterable[TermSpec]) -> dict[str, Term]:
    terms = get_terms(dict.fromkeys([*names, *FREE_TERMS]))
    return terms | get_terms(["cosine"]) if needs_gradients(terms) else terms


def needs_gradients(terms: Mapping[str, Term]) -> bool:
    return any(term.gradient for term in terms.values())


def needs_trusted(terms: Mapping[str, Term]) -> bool:
    return any(term.trusted for term in terms.values())


def needs_probe(terms: Mapping[str, Term]) -> bool:
    return any(term.probe for term in terms.values())


def require_terms(weights: Mapping[str, float], task: Task) -> None:
    """Raise an error for weights of terms that the task does not have."""
    _terms_of_task(_with_free_terms(name for name, weight in weights.items() if weight), task, weights)


def terms_of_batch(rule: ScoringRule, task: Task, batch: Batch) -> dict[str, Term]:
    """Return the rule's terms that the task has.  Raises an error for labels of another task."""
    labels = batch.get("labels")
    if isinstance(labels, Tensor):
        require_labels(task, labels)
    return _terms_of_task(rule.measured(), task, rule.q)


def _terms_of_task(terms: Mapping[str, Term], task: Task, weights: Mapping[str, float]) -> dict[str, Term]:
    alone = [name for name, term in terms.items() if term.alone]
    if alone and not (isinstance(task, Generation) and task.causal):
        raise UnsupportedError(
            f"quality term '{alone[0]}' compares a target with and without its prompt and needs task causal-lm, not "
            f"{task.name}; remove it"
        )
    if isinstance(task, Answers):
        return dict(terms)
    if weighted := [name for name, term in terms.items() if term.answers and weights.get(name)]:
        raise SettingsError(
            f"quality term '{weighted[0]}' needs classes or numbers, but the task is {task.name}; remove it"
        )
    return {name: term for name, term in terms.items() if not term.answers}


def require_precision(terms: Mapping[str, Term], autocast: torch.dtype | None) -> None:
    """Raise SettingsError for a look-ahead term in half precision."""
    if autocast is not None and any(term.lookahead for term in terms.values()):
        raise SettingsError("loss_reduction is too small a difference for half precision; score in float32")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LookRequest:
    """The rows to look at and how: everything that a look needs except the model."""

    dataset: Dataset
    collate: Collate
    """Makes batches with one row per sample."""
    task: Task
    rule: ScoringRule = ScoringRule()
    rows: RowNames = RowNames()
    compute: Compute = Compute()
    trusted: Trusted | None = None
    fraction: float = 1.0
    """The share of the rows that a gate must keep."""

    @property
    def trusted_rows(self) -> int:
        return 0 if self.trusted is None else len(self.trusted.rows)
