"""The scoring rule: which terms are measured and how rows are drawn; and the request for a look."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from tsqlora.errors import SettingsError, UnsupportedError
from tsqlora.libs.shapes import Bool
from tsqlora.model.terms import Term, TermSpec, get_terms
from tsqlora.progress import Progress
from tsqlora.rows.datasets import REFERENCE_ROWS, Dataset
from tsqlora.sampling import require_temperature
from tsqlora.tasks import Batch, Collate, Task, answers_of
from tsqlora.tasks.task import require_labels

if TYPE_CHECKING:
    from tsqlora.auditing.scores import Scores

EVEN_WEIGHTS: Mapping[str, float] = {"loss": -1.0}
"""Q of rows that are drawn evenly: only the choice between duplicates depends on it."""
FREE_TERMS = ("loss", "el2n")
"""Always measured where available, since they cost nothing more."""


@dataclass(frozen=True, slots=True)
class ScoringRule:
    """The terms to measure for each row, and how rows are drawn.

    Raises SettingsError for an invalid value or combination.
    """

    weights: Mapping[str, float] | None = None
    """Weights of the terms in Q, whose softmax draws the rows; terms with a weight are always measured. None draws
    evenly."""
    judge: bool = True
    """Whether to leave out rows whose class is wrong by the judge of labels (`auditing/labels/judge.py`); published
    methods do not."""
    temperature: float = 1.0
    """Temperature of the softmax over Q; small values are selective."""
    terms: Sequence[TermSpec] = ()
    """More terms to measure: names in TERMS, functions or Terms. Gradients cost a backward pass, `loss_reduction` one
    more forward pass."""
    reference: int | Sequence[int] | Dataset = REFERENCE_ROWS
    """The rows whose mean gradient `convergence` compares with: a number of random rows, indices, or samples. A row
    that is scored too is left out of its own mean."""
    calibration: bool = True
    """Whether to remove the bias of the logits towards one class or side before scoring."""
    seed: int = 0
    """Seed of the reference rows and of the head's folds."""
    head_start: bool = True
    """Whether to fit the head before the first step, if that is better than the model's own."""
    look_again: bool = True
    """Whether QualityCallback measures Q again after a third of the steps."""
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

    def trusting(self, task: Task, trusted: bool) -> "ScoringRule":
        """Return the rule for a task: with trusted rows and without weights, the density ratio draws texts."""
        if not (trusted and self.select and task.reading.hidden_terms):
            return self
        return replace(self, weights=self.weights or task.reading.hidden_terms)

    def without_probe(self) -> "ScoringRule":
        """Return the rule without terms of hidden states; without other weights rows are drawn evenly."""
        probes = {name for name, term in self.measured().items() if term.probe}
        weights = {name: weight for name, weight in (self.weights or {}).items() if weight and name not in probes}
        terms = [term for term in self.terms if not (isinstance(term, str) and term in probes)]
        rule = replace(self, weights=weights, terms=terms)
        return rule if weights else replace(rule, weights=None, temperature=1.0)

    def decides(self, task: Task, trusted: bool) -> bool:
        """Whether a look changes the draw: text has no head to fit, and without Q all its rows are equal."""
        idle = bool(task.reading.hidden_terms) and self.trusting(task, trusted).even and not self.terms
        return self.select and not idle

    def judges(self, task: Task) -> bool:
        """Whether a look leaves out rows whose class is wrong."""
        return self.judge and self.select and task.reading.judges()

    def fits_head(self, task: Task) -> bool:
        """Whether a head may be fitted before the first step: texts have none that is new."""
        return self.head_start and bool(task.reading.head(None))

    def measured_of(self, task: Task) -> dict[str, Term]:
        """Return the terms to measure that the task has.  Raises SettingsError for a weight of another one."""
        return _terms_of_task(self.measured(), task, self.q)

    def require_trusted(self, trusted: bool) -> None:
        """Raise SettingsError if the rule needs trusted rows and there are none."""
        needing = [name for name, term in self.measured().items() if term.probe]
        if needing and not trusted:
            raise SettingsError(
                f"term '{needing[0]}' needs trusted rows: name them in data.trusted, or pass trusted=rows"
            )

    def require_texts(self, task: Task) -> None:
        """Raise UnsupportedError for a term of hidden states of texts where the task has no texts to write."""
        if needs_probe(self.measured()) and not task.reading.hidden_terms:
            raise UnsupportedError(
                f"quality term 'density_ratio' compares hidden states of texts, but the task is {task.name}; remove it"
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
    parts: Path | None = None
    """A folder for the results of finished batches. If the process ends early, the same call continues there and gives
    the same scores; delete it once they are saved. Needs the rows' hashes."""
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
    return rule.measured_of(task)


def _terms_of_task(terms: Mapping[str, Term], task: Task, weights: Mapping[str, float]) -> dict[str, Term]:
    if answers_of(task) is not None:
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
    trusted: Dataset | None = None
    """Rows that represent what the model should be good at."""
    excluded: Bool[np.ndarray, " n"] | None = None
    """Rows with the input of a trusted row; they are not drawn."""
    asks: bool = False
    """Whether to hold rows out of every fit for the question to the pool (`auditing/labels/question.py`)."""
    first: "Scores | None" = None
    """Scores of the run's first look, for a later one, which judges no labels."""

    def __post_init__(self) -> None:
        if self.trusted is not None and len(self.trusted) < 2:
            raise SettingsError(f"{len(self.trusted)} trusted rows are too few; give at least 2, better about 100")

    @property
    def trusted_rows(self) -> int:
        return 0 if self.trusted is None else len(self.trusted)

    @property
    def twins(self) -> Bool[np.ndarray, " n"]:
        """Rows that equal a trusted row: they leave the pool before anything is fitted."""
        return np.zeros(len(self.dataset), dtype=np.bool_) if self.excluded is None else self.excluded
