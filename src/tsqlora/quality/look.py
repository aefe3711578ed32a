"""The look: score every row before it is trained on.

A forward pass over all rows fits the head, and predicts each row by a fit without it. Terms with gradients take a
second pass, the trusted model one more.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tsqlora import distributed
from tsqlora.compat.torch import upcast
from tsqlora.quality.cost import PhaseCost, look_cost, trusted_cost
from tsqlora.quality.density_ratio import log_density_ratio
from tsqlora.quality.forward_pass import Forward, Head, forward_pass
from tsqlora.quality.gradient_pass import gradient_pass
from tsqlora.quality.head_start import start_head
from tsqlora.quality.label_noise import reject
from tsqlora.quality.pairs import with_reference
from tsqlora.quality.rule import LookRequest, ScoringRule, needs_gradients, needs_probe, needs_trusted
from tsqlora.quality.sampling import draw_size
from tsqlora.quality.scores import Scores, from_terms
from tsqlora.quality.started import HeadStart, Started, install, unseen
from tsqlora.quality.terms import Measured
from tsqlora.quality.trusted import GATES, Lesson, left_out, trusted_model, trusted_steps_of
from tsqlora.seeds import stream
from tsqlora.tasks import Answers, Task, require_answers
from tsqlora.tasks.forward import each_its_row
from tsqlora.tasks.preference import Preference


@dataclass(frozen=True, slots=True, eq=False)
class Look:
    """The result of a look."""

    scores: Scores
    head: HeadStart | None
    why_not: str | None
    """Why the model's gradients carry no information yet; None if they do."""
    cost: PhaseCost
    trusted_cost: PhaseCost
    """Cost of the trusted model, which `cost` does not include."""
    layer: Head | None = None
    """The layers that have the fitted head."""
    undo: Callable[[], None] = lambda: None
    """Restores the model's own head."""


def look(model: nn.Module, request: LookRequest) -> Look:
    """Fit the head if that is better than the model's own, and score every row.

    The fitted head stays in the model, scaled for training; everything else is restored. All processes get the same
    scores.
    """
    begin = time.perf_counter()
    model, request = distributed.unwrapped(model), replace(request, collate=each_its_row(request.collate))
    if isinstance(request.task, Preference):
        request = with_reference(model, request)
    task, trusted = request.task, request.trusted
    rule = request.rule.trusting(task, trusted is not None)
    rule.require_trusted(trusted is not None)
    rule.require_rejectable(task)
    if trusted is not None and isinstance(rule.reference, int):
        rule = replace(rule, reference=trusted.rows)
    request = replace(request, rule=rule)
    started = start_head(model, request)
    try:
        result = _Looking(model, request, started).result()
        started.ready_to_train()
    except BaseException:
        started.undo()
        raise
    result.cost.add(seconds=time.perf_counter() - begin - result.trusted_cost.seconds)
    return result


@dataclass(frozen=True, slots=True)
class _Looking:
    """A look at a model whose head is fitted."""

    model: nn.Module
    request: LookRequest
    started: Started

    def result(self) -> Look:
        started, task, rule = self.started, self.request.task, self.request.rule
        why_not = distributed.once(lambda: started.why_not(task))
        begin, teaches, trusted_loss, cost_of_trusted = time.perf_counter(), self._teaches(), None, PhaseCost()
        if teaches and rule.trusts:
            (teaches, trainings), trusted_loss = self._trusted_loss()
            cost_of_trusted = self._trusted_cost(trainings, time.perf_counter() - begin)
        ratio, why_even = None, ""
        if needs_probe(rule.measured()):
            ratio, why_even = distributed.once(self._density_ratio)
        if (why_not and needs_gradients(rule.measured())) or (needs_trusted(rule.measured()) and not teaches):
            rule = replace(rule, weights=None, temperature=1.0, terms=(), reject=None)
        elif why_even:
            rule = rule.without_probe()
        columns: dict[str, np.ndarray] = {}
        record: dict[str, Any] = {}
        if needs_gradients(rule.measured()) or any(term.alone for term in rule.measured().values()):
            measurements = gradient_pass(self.model, replace(self.request, rule=rule))
            columns, record = measurements.columns, measurements.record

        if ratio is not None:
            columns["density_ratio"] = ratio

        def scores() -> Scores:
            return self._gated(self._scores(rule, columns, record, trusted_loss, why_not), rule, trusted_loss, why_even)

        # In one process: a draw must not depend on which process makes it.
        shared = distributed.once(scores)
        cost = self._cost(rule, record.get("reference_rows", 0))
        return Look(shared, started.head, why_not, cost, cost_of_trusted, started.layer, started.undo)

    def _density_ratio(self) -> tuple[np.ndarray | None, str]:
        """Of every row, else why there is none; only the first process can compute it."""
        pool, few, trusted = self.started.pool, self.started.trusted, self.request.trusted
        assert pool is not None
        assert few is not None
        assert trusted is not None
        if pool.mean is None or few.mean is None:
            return None, "the model returns no hidden states of its tokens"
        return log_density_ratio(pool.mean, few.mean, trusted.twins)

    def _teaches(self) -> bool:
        task, trusted = self.request.task, self.request.trusted
        if trusted is None:
            return False
        if not isinstance(task, Answers) or trusted.loss is not None:
            return True
        return distributed.once(lambda: self.started.teaches(task))

    def _cost(self, rule: ScoringRule, reference: int) -> PhaseCost:
        terms, n, lengths = rule.measured().values(), len(self.request.dataset), self.request.rows.lengths
        cost = look_cost(terms, rows=n, reference=reference, trusted=self.request.trusted_rows)
        if lengths is not None:  # without the tokens of the reference, which are few
            cost.add(tokens=cost.forward // n * sum(lengths))
        return cost

    def _trusted_cost(self, trainings: int, seconds: float) -> PhaseCost:
        trusted = self.request.trusted
        assert trusted is not None
        if trusted.loss is not None:
            return PhaseCost()
        steps, batch = trusted_steps_of(self.request.task, len(trusted.rows), trusted.batch_size)
        cost = trusted_cost(len(self.request.dataset), steps=trainings * steps, batch_size=batch)
        cost.add(seconds=seconds)
        return cost

    def _trusted_loss(self) -> tuple[Lesson, np.ndarray | None]:
        """Train the trusted model, the same in all processes; the first process gets its loss on every row."""
        request, started, trusted = self.request, self.started, self.request.trusted
        assert trusted is not None
        if trusted.loss is not None:
            return Lesson(True, 0), trusted.loss

        def start() -> None:
            if started.of_trusted is not None and started.layer is not None:
                install(started.layer, started.of_trusted)

        compute = request.compute
        with trusted_model(
            self.model,
            trusted,
            request.collate,
            task=request.task,
            at_once=compute.batch_size,
            autocast=compute.autocast,
            rng=stream("trusted model", request.rule.seed),
            start=start,
        ) as lesson:
            if not lesson.teaches:
                return lesson, None
            journal = None if compute.journal is None else compute.journal / "trusted"
            forward, _ = forward_pass(
                self.model,
                request.dataset,
                request.collate,
                task=request.task,
                compute=replace(compute, journal=journal),
                rows=request.rows,
            )
        return lesson, None if forward is None else forward.loss

    def _scores(
        self,
        rule: ScoringRule,
        columns: dict[str, np.ndarray],
        record: dict[str, Any],
        trusted_loss: np.ndarray | None,
        why_not: str | None,
    ) -> Scores:
        started, rows, task, trusted = self.started, self.request.rows, self.request.task, self.request.trusted
        pool, logits, ridge = started.pool, started.logits, started.ridge(task)
        assert pool is not None
        predicting = logits if ridge is None else unseen(ridge, task)
        agreement = None if ridge is None else started.agreement(ridge, task)
        classes = isinstance(task, Answers) and task.strata(pool.labels) is not None
        scores = from_terms(
            _terms(columns, pool, logits, trusted_loss, rule, task),
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
                "out_of_sample": ridge is not None,
                "trusted_rows": self.request.trusted_rows,
                "agreement": None if agreement is None else agreement.to_dict(),
                **rows.about,
            },
            hashes=rows.hashes,
            ids=rows.ids,
            predictions={} if predicting is None else predictions(predicting, pool.labels, task),
        )
        if trusted is not None and trusted.twins is not None:
            scores = scores.drop(trusted.twins, "trusted row")
        believed = trusted is None or rule.reject or (agreement is not None and agreement.agrees)
        if not (rule.rejects(classes) and ridge is not None and believed):
            return scores
        mask, noise = reject(scores.predictions["logits"], scores.labels, frozen=scores.record.frozen)
        scores = replace(scores, record=replace(scores.record, noise=noise.to_dict()))
        return scores.drop(mask, "confident negative") if mask.any() else scores

    def _gated(self, scores: Scores, rule: ScoringRule, trusted_loss: np.ndarray | None, why_even: str) -> Scores:
        """Drop the rows that the gate excludes; the record says how many, or why there is no gate."""
        gate: dict[str, Any] | None = None
        if self.request.trusted is not None and self.request.rule.trusts and trusted_loss is None:
            beyond = "class frequencies" if isinstance(self.request.task, Answers) else "what the model knows"
            why = f"trusted rows teach nothing beyond {beyond}: no row is dropped, and all are drawn evenly"
            gate = {"name": rule.gate or "reducible loss", "why_not": why}
        elif why_even:
            how = "all rows are drawn evenly" if scores.even else "the other terms draw the rows"
            gate = {"name": "density ratio", "why_not": f"{why_even}: {how}"}
        if gate is not None:
            return replace(scores, record=replace(scores.record, gate=gate))
        if rule.gate is None or trusted_loss is None:
            return scores
        assert self.started.trusted is not None
        margin = GATES[rule.gate](trusted_loss, scores.labels, self.started.trusted.labels, scores.stratified)
        # Half is enough for an even draw, which may repeat rows.
        size = draw_size(len(scores), self.request.fraction)
        least = (-(-size // 2) if rule.even else size) + int((~scores.kept).sum())
        mask = left_out(np.where(scores.kept, margin, np.inf), least)
        noted = replace(scores, record=replace(scores.record, gate={"name": rule.gate, "left_out": int(mask.sum())}))
        return noted.drop(mask, "swapped pair" if rule.gate == "swapped" else "gated") if mask.any() else noted


def _terms(
    columns: dict[str, np.ndarray],
    pool: Forward,
    logits: np.ndarray | None,
    trusted_loss: np.ndarray | None,
    rule: ScoringRule,
    task: Task,
) -> dict[str, np.ndarray]:
    """Return the rule's terms: those in `columns`, and others computed from the forward passes."""
    labels, loss = torch.from_numpy(pool.labels), torch.from_numpy(pool.loss)
    if logits is not None:
        loss = task.loss(torch.from_numpy(logits), labels)
    measured = Measured(
        logits=None if logits is None else torch.from_numpy(logits),
        labels=labels,
        loss=loss,
        trusted_loss=None if trusted_loss is None else torch.from_numpy(trusted_loss),
    )
    terms: dict[str, np.ndarray] = {}
    for name, term in rule.measured().items():
        missing = term.gradient or term.alone or (term.answers and logits is None)
        if name in columns:
            terms[name] = columns[name]
        elif not missing and (trusted_loss is not None or not term.trusted):
            terms[name] = term.of(measured).numpy()
    return terms if trusted_loss is None else {**terms, "trusted_loss": trusted_loss}


def predictions(logits: np.ndarray, labels: np.ndarray, task: Task) -> dict[str, np.ndarray]:
    """Return the columns of PREDICTIONS that the logits of each row's class, labels or number give."""
    z: Tensor = upcast(torch.from_numpy(logits))
    predicted = np.asarray(require_answers(task, "a prediction").predictions(z.numpy()))
    if z.shape[1] == 1:
        return {"predicted": predicted}
    if labels.ndim == 2:
        return {"predicted": predicted.astype(np.float32), "logits": z.numpy()}
    p = z.softmax(1)
    return {
        "predicted": predicted,
        "predicted_probability": p.amax(1).numpy(),
        "label_probability": p.gather(1, torch.from_numpy(labels)[:, None]).squeeze(1).numpy(),
        "logits": z.numpy(),
    }
