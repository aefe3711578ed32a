"""The look: what is known of every row before it is trained on.  METHOD 1.

A forward pass over all rows fits the head, and judges each label by a fit that has not seen it. Terms that need
gradients take a second pass, the trusted model one more.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
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
from tsqlora.quality.head_start import HeadStart, install
from tsqlora.quality.label_noise import reject
from tsqlora.quality.predictions import predictions
from tsqlora.quality.rule import LookRequest, ScoringRule, needs_gradients, needs_trusted, of_classes
from tsqlora.quality.sampling import draw_size
from tsqlora.quality.scores import Scores, from_terms
from tsqlora.quality.started import Started, start_head
from tsqlora.quality.terms import Measured, Term
from tsqlora.quality.trusted import RATE, trusted_model, trusted_steps_of
from tsqlora.seeds import stream
from tsqlora.tasks import Task
from tsqlora.tasks.forward import each_its_row
from tsqlora.tasks.generation import Generation


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


def look(model: nn.Module, request: LookRequest) -> Look:
    """Fit the head where that is better than the model's own, and score every row.

    The fitted head stays in the model; all else is as it was. The scores of several processes are the same.
    """
    begun = time.perf_counter()
    task, trusted = request.task, request.trusted
    rule = request.rule.trusting(task, trusted is not None)
    rule.require_trusted(trusted is not None)
    rule.require_rejectable(task)
    if trusted is not None and isinstance(rule.reference, int):
        rule = replace(rule, reference=trusted.rows)
    model, request = distributed.unwrapped(model), replace(request, rule=rule, collate=each_its_row(request.collate))
    started = start_head(model, request)
    try:
        found = _Looking(model, request, started).found()
    except BaseException:
        started.undo()
        raise
    found.cost.add(seconds=time.perf_counter() - begun - found.trusted_cost.seconds)
    return found


@dataclass(frozen=True, slots=True)
class _Looking:
    """A look at a model whose head is fitted."""

    model: nn.Module
    request: LookRequest
    started: Started

    def found(self) -> Look:
        started, task, rule = self.started, self.request.task, self.request.rule
        why_not = distributed.once(lambda: started.why_not(task))
        teaches = self._teaches()
        if (why_not and needs_gradients(rule.measured())) or (needs_trusted(rule.measured()) and not teaches):
            rule = replace(rule, weights=None, temperature=1.0, terms=(), reject=None)
        columns: dict[str, np.ndarray] = {}
        record: dict[str, Any] = {}
        if needs_gradients(rule.measured()) or any(term.alone for term in rule.measured().values()):
            measured = gradient_pass(self.model, replace(self.request, rule=rule))
            columns, record = measured.columns, measured.record
        begun, trusts = time.perf_counter(), rule.trusts
        known = self._trusted_loss() if teaches and trusts else None
        taken = self._trusted_cost(time.perf_counter() - begun) if teaches and trusts else PhaseCost()
        # Decided once: what is drawn must not depend on a process.
        scores = distributed.once(lambda: self._gated(self._scores(rule, columns, record, known, why_not), rule, known))
        cost = self._cost(rule, record.get("reference_rows", 0))
        return Look(scores, started.head, why_not, cost, taken, started.layer, started.undo)

    def _teaches(self) -> bool:
        task, trusted = self.request.task, self.request.trusted
        if trusted is None:
            return False
        if isinstance(task, Generation) or trusted.loss is not None:
            return True
        return distributed.once(lambda: self.started.teaches(task))

    def _cost(self, rule: ScoringRule, reference: int) -> PhaseCost:
        terms, n, lengths = rule.measured().values(), len(self.request.dataset), self.request.rows.lengths
        cost = look_cost(terms, rows=n, reference=reference, trusted=self.request.trusted_rows)
        if lengths is not None:  # of the rows; the reference's are few
            cost.add(tokens=cost.forward // n * sum(lengths))
        return cost

    def _trusted_cost(self, seconds: float) -> PhaseCost:
        task, trusted = self.request.task, self.request.trusted
        assert trusted is not None
        if trusted.loss is not None:
            return PhaseCost()
        steps, batch = trusted_steps_of(task, len(trusted.rows), trusted.batch_size)
        cost = trusted_cost(len(self.request.dataset), steps=steps, batch_size=batch)
        cost.add(seconds=seconds)
        return cost

    def _trusted_loss(self) -> np.ndarray | None:
        """The trusted model's loss on every row, in the first process; all train the same model."""
        request, started = self.request, self.started
        trusted, compute = request.trusted, request.compute
        assert trusted is not None
        if trusted.loss is not None:
            return trusted.loss
        steps, batch = trusted_steps_of(request.task, len(trusted.rows), trusted.batch_size)

        def start() -> None:
            if started.of_trusted is not None and started.layer is not None:
                install(started.layer, started.of_trusted)

        with trusted_model(
            self.model,
            trusted.rows,
            request.collate,
            task=request.task,
            learning_rate=RATE * trusted.learning_rate,
            steps=steps,
            batch_size=batch,
            autocast=compute.autocast,
            rng=stream("trusted model", request.rule.seed),
            start=start,
        ):
            journal = None if compute.journal is None else compute.journal / "trusted"
            names = {"lengths": request.rows.lengths, "hashes": request.rows.hashes}
            again = replace(compute, journal=journal)
            found, _ = forward_pass(
                self.model, request.dataset, request.collate, task=request.task, compute=again, **names
            )
        return None if found is None else found.loss

    def _scores(
        self,
        rule: ScoringRule,
        columns: dict[str, np.ndarray],
        record: dict[str, Any],
        trusted_loss: np.ndarray | None,
        why_not: str | None,
    ) -> Scores:
        started, pool, rows, task, trusted = (
            self.started,
            self.started.pool,
            self.request.rows,
            self.request.task,
            self.request.trusted,
        )
        assert pool is not None
        logits, unseen = started.logits, started.unseen(task)
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
                "trusted_rows": self.request.trusted_rows,
                **rows.about,
            },
            hashes=rows.hashes,
            ids=rows.ids,
            predictions={} if said is None else _predicted(said, pool.labels, task),
        )
        if trusted is not None:
            return scores if trusted.twins is None else scores.drop(trusted.twins, "trusted row")
        return without_suspects(scores) if rule.rejects(classes) and unseen is not None else scores

    def _gated(self, scores: Scores, rule: ScoringRule, trusted_loss: np.ndarray | None) -> Scores:
        """The scores without rows that the gate leaves out; the record says how many, or why there is no gate."""
        if rule.gate is None or self.request.trusted is None:
            return scores
        if trusted_loss is None:
            why = "trusted rows teach nothing beyond class frequencies: no row is left out"
            return replace(scores, record=replace(scores.record, gate={"name": rule.gate, "why_not": why}))
        assert self.started.trusted is not None
        margin = GATES[rule.gate](trusted_loss, scores.labels, self.started.trusted.labels, scores.stratified)
        # Rows that are drawn evenly may come twice.
        size = draw_size(len(scores), self.request.fraction)
        mask = left_out(np.where(scores.kept, margin, np.inf), -(-size // 2) if rule.even else size)
        noted = replace(scores, record=replace(scores.record, gate={"name": rule.gate, "left_out": int(mask.sum())}))
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


def _predicted(logits: np.ndarray, labels: np.ndarray, task: Task) -> dict[str, np.ndarray]:
    numbers = torch.from_numpy(logits)
    known = Measured(logits=numbers, labels=torch.from_numpy(labels), loss=numbers[:, 0])
    return {name: value.numpy() for name, value in predictions(known, task).items()}


def without_suspects(scores: Scores) -> Scores:
    """The scores without rows whose label seems wrong; all rows where there is no evidence of wrong labels."""
    mask, noise = reject(scores.predictions["logits"], scores.labels, frozen=scores.record.frozen)
    noted = replace(scores, record=replace(scores.record, noise=noise.to_dict()))
    return noted.drop(mask, "confident negative") if mask.any() else noted
