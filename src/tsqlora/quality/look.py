"""The look: what is known of every row before it is trained on.  METHOD 1.

A forward pass over all rows fits the head, and judges each label by a fit that has not seen it. Terms that need
gradients take a second pass, the trusted model one more.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from tsqlora import distributed
from tsqlora.quality.cost import PhaseCost, look_cost, trusted_cost
from tsqlora.quality.features import Head
from tsqlora.quality.forward_pass import Forward, forward_pass
from tsqlora.quality.gate import GATES, left_out
from tsqlora.quality.gradient_pass import gradient_pass
from tsqlora.quality.head_start import HeadStart, features_with, fit_start, install, of_trusted
from tsqlora.quality.label_noise import reject
from tsqlora.quality.learned import against_chance, require_finite
from tsqlora.quality.linear_head import Kind, row_losses
from tsqlora.quality.predictions import predictions
from tsqlora.quality.ridge import fit_ridge, fit_temperature, leave_one_out_logits
from tsqlora.quality.rows import Dataset
from tsqlora.quality.rule import Compute, RowNames, ScoringRule, needs_gradients, needs_trusted, of_classes
from tsqlora.quality.sampling import draw_size
from tsqlora.quality.scores import Scores, from_terms
from tsqlora.quality.terms import Measured, Term
from tsqlora.quality.trusted import BATCH_SIZE, RATE, STEPS, STEPS_OF_TEXT, Trusted, trusted_model
from tsqlora.seeds import stream
from tsqlora.tasks import Answers, Task
from tsqlora.tasks.classification import Classification
from tsqlora.tasks.forward import Collate, each_its_row
from tsqlora.tasks.generation import Generation
from tsqlora.tasks.regression import Regression

ROWS_TO_FIT = 50_000
"""A head is fitted on at most so many rows, drawn evenly: more hardly change it, and their features need not fit."""
LEAST_TRUSTED = 8
"""With fewer trusted rows no head is fitted on them."""


@dataclass(frozen=True, slots=True, eq=False)
class Started:
    """A model whose head is fitted, and the passes that told; passes are the first process's alone."""

    head: HeadStart | None
    """None where there was nothing to fit."""
    of_trusted: HeadStart | None
    """Fitted on trusted rows alone."""
    layer: Head | None
    pool: Forward | None
    trusted: Forward | None
    undo: Callable[[], None] = lambda: None
    """Puts the model's own head back."""


@dataclass(frozen=True, slots=True, eq=False)
class Look:
    """What one look found."""

    scores: Scores
    head: HeadStart | None
    why_not: str | None
    """Why the model's gradients say nothing yet; None where they do."""
    cost: PhaseCost
    trusted_cost: PhaseCost
    """Of the trusted model, which is no part of `cost`."""
    layer: Head | None = None
    """What a fitted head was written into."""
    undo: Callable[[], None] = lambda: None
    """Puts the model's own head back."""


def look(
    model: nn.Module,
    dataset: Dataset,
    collate: Collate,
    *,
    rule: ScoringRule,
    task: Task,
    rows: RowNames,
    compute: Compute,
    fraction: float = 1.0,
    trusted: Trusted | None = None,
) -> Look:
    """Fit the head where that is better than the model's own, and score every row.

    The fitted head stays in the model; all else is as it was. `fraction` of the rows must be left by a gate. The scores
    of several processes are the same.
    """
    begun = time.perf_counter()
    model, collate = distributed.unwrapped(model), each_its_row(collate)
    rule = rule.trusting(task, trusted is not None)
    rule.require_trusted(trusted is not None)
    if trusted is not None and isinstance(rule.reference, int):
        rule = replace(rule, reference=trusted.rows)
    started = start_head(model, dataset, collate, rule=rule, task=task, rows=rows, compute=compute, trusted=trusted)
    try:
        found = _Looking(model, dataset, collate, rule, task, rows, compute, trusted, started).found(fraction)
    except BaseException:
        started.undo()
        raise
    found.cost.add(seconds=time.perf_counter() - begun - found.trusted_cost.seconds)
    return found


def start_head(
    model: nn.Module,
    dataset: Dataset,
    collate: Collate,
    *,
    rule: ScoringRule,
    task: Task,
    rows: RowNames,
    compute: Compute,
    trusted: Trusted | None = None,
) -> Started:
    """Fit the task's last linear layer on the features that it is given, and install it where it is better.

    One forward pass without dropout over all rows, and over the trusted ones; the first process fits. The head is
    fitted on the rows, or on the trusted rows, whichever loses less on these.
    """
    passing = partial(forward_pass, model, task=task, compute=compute)
    pool, layer = passing(dataset, collate, lengths=rows.lengths, hashes=rows.hashes)
    apart = None
    if trusted is not None:
        apart, _ = passing(trusted.rows, collate, compute=replace(compute, journal=None, progress=None))
    trusts = rule.trusts and trusted is not None and trusted.loss is None
    if layer is None or not isinstance(task, Classification | Regression) or not (rule.head_start or trusts):
        return Started(None, None, layer, pool, apart)
    head, own = distributed.once(lambda: _fit(pool, apart, task, layer, rule.seed))
    if not rule.head_start:  # the trusted model begins with a head of its own all the same
        return Started(None, own, layer, pool, apart)
    chosen = own if own is not None and own.replaces else head
    undo = install(layer, chosen) if chosen.replaces else lambda: None
    return Started(chosen, own, layer, pool, apart, undo)


def _fit(
    pool: Forward | None, trusted: Forward | None, task: Task, layer: Head, seed: int
) -> tuple[HeadStart, HeadStart | None]:
    assert pool is not None
    assert pool.features is not None
    for passed in (pool, trusted):
        if passed is not None:
            require_finite(torch.from_numpy(passed.loss))
    weights = task.class_weights if isinstance(task, Classification) else None
    chosen = np.sort(stream("head start", seed).permutation(len(pool.labels))[:ROWS_TO_FIT])
    options: dict[str, Any] = {
        "kind": _kind(task),
        "width": layer.linear.out_features,
        "intercept": layer.linear.bias is not None,
        "class_weights": None if weights is None else weights.numpy(force=True),
        "rng": lambda: stream("head folds", seed),
    }
    start = fit_start(
        pool.features[chosen].astype(np.float32),
        pool.labels[chosen],
        pool.loss[chosen].astype(np.float64),
        dense_inputs=None if pool.dense is None else pool.dense[chosen].astype(np.float32),
        activation=layer.activation,
        **options,
    )
    if trusted is None or len(trusted.labels) < LEAST_TRUSTED:
        return start, None
    return start, of_trusted(start, features_with(start, trusted, layer), trusted, **options)


def _kind(task: Task) -> Kind:
    return "classes" if isinstance(task, Classification) else "numbers"


def _why_not(started: Started, task: Task) -> str | None:
    """Why the model is at chance: its losses on all rows, also calibrated, are no better than a constant guess's."""
    pool = started.pool
    assert pool is not None
    if not isinstance(task, Answers) or len(pool.labels) < 2:
        return None
    assert pool.logits is not None
    logits, labels = _logits(started, pool), torch.from_numpy(pool.labels)
    test = against_chance(task, torch.from_numpy(logits), labels)
    if not test.passed and isinstance(task, Classification):
        # A model that is too sure of itself, or trained on right labels among wrong ones, is not at chance.
        logits = (logits / fit_temperature(logits, pool.labels)).astype(np.float32)
        test = against_chance(task, torch.from_numpy(logits), labels)
    return None if test.passed else test.told


def _logits(started: Started, of: Forward) -> np.ndarray:
    """The logits of the model as it is now: of the fitted head, where that was installed."""
    assert of.logits is not None
    if started.head is None or not started.head.replaces:
        return of.logits.astype(np.float32)  # a large column is in half precision
    assert started.layer is not None
    return started.head.fit.head.logits(features_with(started.head, of, started.layer)).astype(np.float32)


def _teaches(started: Started, task: Task, known: bool) -> bool:
    """Whether trusted rows teach anything beyond class frequencies, by losses out of fold; `known` from earlier."""
    if isinstance(task, Generation) or known:
        return True

    def better() -> bool:
        own, apart = started.of_trusted, started.trusted
        if own is None or apart is None or not isinstance(task, Answers):
            return False
        labels = torch.from_numpy(apart.labels)
        width = 1 if apart.logits is None else apart.logits.shape[1]
        constant = task.chance(labels, width).numpy()
        return own.fit.better_than(row_losses(np.tile(constant, (len(labels), 1)), apart.labels, _kind(task)))

    return distributed.once(better)


@dataclass(frozen=True, slots=True)
class _Looking:
    """A look at a model whose head is fitted."""

    model: nn.Module
    dataset: Dataset
    collate: Collate
    rule: ScoringRule
    task: Task
    rows: RowNames
    compute: Compute
    trusted: Trusted | None
    started: Started

    def found(self, fraction: float) -> Look:
        started, task = self.started, self.task
        why_not = distributed.once(lambda: _why_not(started, task))
        teaches = self.trusted is not None and _teaches(started, task, known=self.trusted.loss is not None)
        rule = self.rule
        if (why_not and needs_gradients(rule.measured())) or (needs_trusted(rule.measured()) and not teaches):
            rule = replace(rule, weights=None, temperature=1.0, terms=(), reject=None)
        columns: dict[str, np.ndarray] = {}
        record: dict[str, Any] = {}
        if needs_gradients(rule.measured()) or any(term.alone for term in rule.measured().values()):
            measured = gradient_pass(
                self.model, self.dataset, self.collate, rule=rule, task=task, rows=self.rows, compute=self.compute
            )
            columns, record = measured.columns, measured.record
        begun, trusts = time.perf_counter(), rule.trusts
        known = self._trusted_loss() if teaches and trusts else None
        taken = self._trusted_cost(time.perf_counter() - begun) if teaches and trusts else PhaseCost()
        # Decided once: what is drawn must not depend on a process.
        scores = distributed.once(
            lambda: self._gated(self._scores(rule, columns, record, known, why_not), rule, known, fraction)
        )
        cost = self._cost(rule, record.get("reference_rows", 0))
        return Look(scores, started.head, why_not, cost, taken, started.layer, started.undo)

    def _cost(self, rule: ScoringRule, reference: int) -> PhaseCost:
        terms, n, lengths = rule.measured().values(), len(self.dataset), self.rows.lengths
        cost = look_cost(
            terms, rows=n, reference=reference, trusted=0 if self.trusted is None else len(self.trusted.rows)
        )
        if lengths is not None:  # of the rows; the reference's are few
            cost.add(tokens=cost.forward // n * sum(lengths))
        return cost

    def _trusted_cost(self, seconds: float) -> PhaseCost:
        assert self.trusted is not None
        if self.trusted.loss is not None:
            return PhaseCost()
        steps, batch = self._trusted_steps
        cost = trusted_cost(len(self.dataset), steps=steps, batch_size=batch)
        cost.add(seconds=seconds)
        return cost

    @property
    def _trusted_steps(self) -> tuple[int, int]:
        """Steps of the trusted model, and rows of each."""
        assert self.trusted is not None
        text = isinstance(self.task, Generation)
        batch = self.trusted.batch_size if text else BATCH_SIZE
        return STEPS_OF_TEXT if text else STEPS, min(batch, len(self.trusted.rows))

    def _trusted_loss(self) -> np.ndarray | None:
        """The trusted model's loss on every row, in the first process; all train the same model."""
        trusted, started, compute = self.trusted, self.started, self.compute
        assert trusted is not None
        if trusted.loss is not None:
            return trusted.loss
        steps, batch = self._trusted_steps

        def start() -> None:
            if started.of_trusted is not None and started.layer is not None:
                install(started.layer, started.of_trusted)

        with trusted_model(
            self.model,
            trusted.rows,
            self.collate,
            task=self.task,
            learning_rate=RATE * trusted.learning_rate,
            steps=steps,
            batch_size=batch,
            autocast=compute.autocast,
            rng=stream("trusted model", self.rule.seed),
            start=start,
        ):
            journal = None if compute.journal is None else compute.journal / "trusted"
            names = {"lengths": self.rows.lengths, "hashes": self.rows.hashes}
            again = replace(compute, journal=journal)
            found, _ = forward_pass(self.model, self.dataset, self.collate, task=self.task, compute=again, **names)
        return None if found is None else found.loss

    def _scores(
        self,
        rule: ScoringRule,
        columns: dict[str, np.ndarray],
        record: dict[str, Any],
        trusted_loss: np.ndarray | None,
        why_not: str | None,
    ) -> Scores:
        started, task, trusted, pool = self.started, self.task, self.trusted, self.started.pool
        assert pool is not None
        logits = None if pool.logits is None else _logits(started, pool)
        unseen = _left_out(started, task)
        said = logits if unseen is None else unseen
        classes = of_classes(task, pool.labels)
        scores = from_terms(
            _measured(columns, pool, logits, trusted_loss, rule, task),
            labels=pool.labels,
            stratified=classes,
            weights=rule.q,
            even=rule.even,
            temperature=rule.temperature,
            record={
                "seed": rule.seed,
                **record,
                "head_start": None if started.head is None else started.head.summary(),
                "not_ready": why_not,
                "frozen": why_not is not None or (started.head is not None and started.head.replaces),
                "out_of_sample": unseen is not None,
                "trusted_rows": 0 if trusted is None else len(trusted.rows),
                **self.rows.about,
            },
            hashes=self.rows.hashes,
            ids=self.rows.ids,
            predictions={} if said is None else _predicted(said, pool.labels, task),
        )
        if trusted is not None:
            return scores if trusted.twins is None else scores.drop(trusted.twins, "trusted row")
        return without_suspects(scores) if rule.rejects(classes) and unseen is not None else scores

    def _gated(self, scores: Scores, rule: ScoringRule, trusted_loss: np.ndarray | None, fraction: float) -> Scores:
        """The scores without rows that the gate leaves out; the record says how many, or why there is no gate."""
        if rule.gate is None or self.trusted is None:
            return scores
        if trusted_loss is None:
            why = "trusted rows teach nothing beyond class frequencies: no row is left out"
            return replace(scores, record={**scores.record, "gate": {"name": rule.gate, "why_not": why}})
        assert self.started.trusted is not None
        margin = GATES[rule.gate](trusted_loss, scores.labels, self.started.trusted.labels, scores.stratified)
        # Rows that are drawn evenly may come twice.
        size = draw_size(len(scores), fraction)
        mask = left_out(np.where(scores.kept, margin, np.inf), -(-size // 2) if rule.even else size)
        noted = replace(scores, record={**scores.record, "gate": {"name": rule.gate, "left_out": int(mask.sum())}})
        return noted.drop(mask, "gated") if mask.any() else noted


def _measured(
    columns: dict[str, np.ndarray],
    pool: Forward,
    logits: np.ndarray | None,
    trusted_loss: np.ndarray | None,
    rule: ScoringRule,
    task: Task,
) -> dict[str, np.ndarray]:
    """Every term that the rule asks for, from the passes."""
    loss = torch.from_numpy(pool.loss)
    if logits is not None:
        loss = task.loss(torch.from_numpy(logits), torch.from_numpy(pool.labels))
    known = Measured(
        logits=None if logits is None else torch.from_numpy(logits),
        labels=torch.from_numpy(pool.labels),
        loss=loss,
        trusted_loss=None if trusted_loss is None else torch.from_numpy(trusted_loss),
    )
    found: dict[str, np.ndarray] = {}
    for name, term in rule.measured().items():
        if name in columns:
            found[name] = columns[name]
        elif _is_known(term, known):
            found[name] = term.of(known).numpy()
    return found if trusted_loss is None else {**found, "trusted_loss": trusted_loss}


def _is_known(term: Term, measured: Measured) -> bool:
    if term.gradient or term.alone or (term.answers and measured.logits is None):
        return False
    return not term.trusted or measured.trusted_loss is not None


def _left_out(started: Started, task: Task) -> np.ndarray | None:
    """What a fit that has not seen the row says of it: logits of classes, or a number; None without features."""
    pool = started.pool
    assert pool is not None
    if pool.features is None or len(pool.labels) < 3 or started.layer is None:
        return None
    features = pool.features if started.head is None else features_with(started.head, pool, started.layer)
    if isinstance(task, Classification) and len(np.unique(pool.labels)) > 1:
        return leave_one_out_logits(features, pool.labels, started.layer.linear.out_features)
    if isinstance(task, Regression):
        return fit_ridge(features, pool.labels[:, None].astype(np.float64)).left_out
    return None


def _predicted(logits: np.ndarray, labels: np.ndarray, task: Task) -> dict[str, np.ndarray]:
    numbers = torch.from_numpy(logits)
    known = Measured(logits=numbers, labels=torch.from_numpy(labels), loss=numbers[:, 0])
    return {name: value.numpy() for name, value in predictions(known, task).items()}


def without_suspects(scores: Scores) -> Scores:
    """The scores without rows whose label seems wrong; all rows where there is no evidence of wrong labels."""
    mask, noise = reject(scores.predictions["logits"], scores.labels, frozen=scores.record["frozen"])
    noted = replace(scores, record={**scores.record, "noise": noise.to_dict()})
    return noted.drop(mask, "confident negative") if mask.any() else noted
