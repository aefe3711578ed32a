"""The look: score every row before it is trained on.

A forward pass over all rows fits the head, and judges the labels. Terms with gradients take a second pass.
"""

import inspect
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from peft.tuners.adalora import AdaLoraModel
from torch import Tensor, nn

from tsqlora import distributed
from tsqlora.auditing.draw.subset import equals
from tsqlora.auditing.head_start import Started, features_with, fitted_parameters, start_head
from tsqlora.auditing.labels.density_ratio import log_density_ratio
from tsqlora.auditing.labels.judge import FEWEST, Judgement, Verdict, judge, judged_features
from tsqlora.auditing.scores import Scores, from_terms, require_row_names
from tsqlora.errors import SettingsError, UnsupportedError, of_loaded_model
from tsqlora.libs.shapes import Bool, Float
from tsqlora.libs.torch import upcast
from tsqlora.model.eval_mode import eval_mode
from tsqlora.model.forward import Forward, sample_losses, with_reference
from tsqlora.model.linear import FOLDS, unseen_logits
from tsqlora.model.modules import batch_coupled, plain_name
from tsqlora.model.oom import halves, retry_on_oom
from tsqlora.model.request import (
    Compute,
    LookRequest,
    RowNames,
    ScoringRule,
    needs_gradients,
    needs_probe,
    require_precision,
    terms_of_batch,
)
from tsqlora.model.terms import Measured, columns_of, look_cost, published
from tsqlora.record import PhaseCost
from tsqlora.rows.datasets import Dataset, require_reference
from tsqlora.tasks import Answers, Batch, Collate, Task, answers_of, task_of
from tsqlora.tasks.forward import base_model, each_its_row, output_part, placed, precision, split_labels
from tsqlora.tasks.task import require_usable


@dataclass(frozen=True, slots=True, eq=False)
class Look:
    """The result of a look."""

    scores: Scores
    why_not: str | None
    """Why the model's gradients carry no information yet; None if they do."""
    cost: PhaseCost
    undo: Callable[[], None] = lambda: None
    """Restores the model's own head."""
    head: Mapping[str, Tensor] = field(default_factory=dict)
    """The fitted head, by the names that its parameters have in the base model; empty if the model's own stays."""
    verdict: Verdict | None = None
    """The judge of labels; None where there is none."""


def look(model: nn.Module, request: LookRequest) -> Look:
    """Fit the head if that is better than the model's own, judge the labels, and score every row.

    The fitted head stays in the model; everything else is restored. All processes get the same scores. A later look
    renews only Q: its request has the scores of the first one.
    """
    begin = time.perf_counter()
    model, request = distributed.unwrapped(model), replace(request, collate=each_its_row(request.collate))
    distributed.require_whole(model)
    request = request.task.reading.referenced(request, partial(with_reference, model))
    task, trusted = request.task, request.trusted
    rule = request.rule.trusting(task, trusted is not None)
    rule.require_trusted(trusted is not None)
    rule.require_texts(task)
    if trusted is not None and isinstance(rule.reference, int):
        rule = replace(rule, reference=trusted)
    request = replace(request, rule=rule)
    judges = request.first is None and rule.judges(task)
    started = start_head(model, request, mean=judges)
    try:
        why_not = distributed.once(lambda: started.why_not(task))
        ratio, why_even = distributed.once(lambda: _density_ratio(request, started))
        if why_not and needs_gradients(rule.measured()):
            rule = replace(rule, weights=None, temperature=1.0, terms=())
        elif why_even:
            rule = rule.without_probe()
        columns, record = dict[str, np.ndarray](), dict[str, Any]()
        if needs_gradients(rule.measured()):
            columns, record = published().gradient_pass(model, replace(request, rule=rule))
        if ratio is not None:
            columns["density_ratio"] = ratio

        def scores() -> tuple[Scores, Verdict | None]:
            judgement = _judged(request, started) if judges else None
            verdict = None if judgement is None else judgement.verdict
            return _scores(request, rule, started, judgement, columns, record, why_not, why_even), verdict

        # In one process: a draw must not depend on which process makes it.
        shared, verdict = distributed.once(scores)
    except BaseException:
        started.undo()
        raise
    terms, n, lengths = rule.measured().values(), len(request.dataset), request.rows.lengths
    cost = look_cost(terms, rows=n, reference=record.get("reference_rows", 0), trusted=request.trusted_rows)
    tokens = 0 if lengths is None else cost.forward // n * sum(lengths)  # without the few of the reference
    cost.add(seconds=time.perf_counter() - begin, tokens=tokens)
    names: dict[Tensor, str] = {parameter: plain_name(name) for name, parameter in model.named_parameters()}
    head = {names[parameter]: value.float() for parameter, value in fitted_parameters(started.layer, started.head)}
    return Look(shared, why_not, cost, started.undo, head, verdict)


def _density_ratio(request: LookRequest, started: Started) -> tuple[np.ndarray | None, str]:
    """Return the density ratio of every row if the rule has it, and why it cannot be measured; in the first process."""
    pool, few = started.pool, started.trusted
    if not needs_probe(request.rule.measured()):
        return None, ""
    assert few is not None
    if pool.mean is None or few.mean is None:
        return None, "the model returns no hidden states of its tokens"
    return log_density_ratio(pool.mean, few.mean, request.excluded, lengths=(pool.labels, few.labels))


def _judged(request: LookRequest, started: Started) -> Judgement | None:
    """Judge the classes of the rows that are in a fit; None where no class can be judged."""
    pool, own = started.pool, ~(request.twins | started.held)
    labels = pool.labels[own]
    counts = np.bincount(labels)
    few = len(labels) < FOLDS or (counts > 0).sum() < 2 or counts.max() < FEWEST
    if few or not (features := judged_features(pool, slice(None) if own.all() else own)).shape[1]:
        return None
    assert pool.logits is not None
    return judge(features, labels, pool.logits.shape[1])


def _scores(
    request: LookRequest,
    rule: ScoringRule,
    started: Started,
    judgement: Judgement | None,
    columns: dict[str, np.ndarray],
    record: dict[str, Any],
    why_not: str | None,
    why_even: str,
) -> Scores:
    rows, task, pool, logits, held = request.rows, request.task, started.pool, started.logits, started.held
    own = ~(request.twins | held)
    unseen = _unseen(started, task, own)
    predicting = logits if unseen is None else unseen
    wrong, p_wrong = np.zeros(len(pool.labels), dtype=bool), np.zeros(len(pool.labels))
    if judgement is not None and predicting is not None:
        predicting = predicting.copy()  # the terms are of the head that training begins with
        predicting[own], wrong[own], p_wrong[own] = judgement.logits, judgement.left_out, judgement.p_wrong
        if held.any():
            assert judgement.verdict is not None
            predicting[held], p_wrong[held] = judgement.verdict.of(judged_features(pool, held), pool.labels[held])
            wrong[held] = judgement.evident & (p_wrong[held] > judgement.verdict.doubt[pool.labels[held]])
    scores = from_terms(
        _terms(columns, pool, logits, rule, task),
        labels=pool.labels,
        stratified=task.reading.judges(),
        weights=rule.q,
        even=rule.even,
        temperature=rule.temperature,
        record={
            "seed": rule.seed,
            **record,
            "head_start": None if started.head is None else started.head.summary(),
            "not_ready": why_not,
            "out_of_sample": judgement is not None or unseen is not None,
            "trusted_rows": request.trusted_rows,
            **rows.about,
        },
        hashes=rows.hashes,
        ids=rows.ids,
        predictions={} if predicting is None else predictions(predicting, pool.labels, answers_of(task)),
    )
    if request.first is not None:
        return scores.judged_as(request.first)
    if why_even:
        how = "all rows are drawn evenly" if scores.even else "the other terms draw the rows"
        scores = scores.noted(gate={"name": "density ratio", "why_not": f"{why_even}: {how}"})
    if request.twins.any():
        scores = scores.drop(request.twins, "trusted row")
    if judgement is not None:
        scores = scores.noted(noise=judgement.to_dict())
        if judgement.evident:
            scores = replace(scores, predictions={**scores.predictions, "wrong_probability": p_wrong})
        scores = scores.drop(wrong, "confident negative") if wrong.any() else scores
    return scores.drop(held, "held out") if held.any() else scores


def _unseen(started: Started, task: Task, own: Bool[np.ndarray, " n"]) -> Float[np.ndarray, "n k"] | None:
    """Predict numbers, or logits of several labels a row, by a fit without the row; None for other tasks."""
    pool, answers = started.pool, answers_of(task)
    if answers is None or task.reading.judges() or pool.features is None:
        return None
    if started.layer is None or own.sum() < FOLDS:
        return None
    features = pool.features if started.head is None else features_with(started.head, pool, started.layer)
    return unseen_logits(features, pool.labels, own, answers.link)


def _terms(
    columns: dict[str, np.ndarray],
    pool: Forward,
    logits: np.ndarray | None,
    rule: ScoringRule,
    task: Task,
) -> dict[str, np.ndarray]:
    """Return the rule's terms: those in `columns`, and others computed from the forward passes."""
    labels, loss = torch.from_numpy(pool.labels), torch.from_numpy(pool.loss)
    if logits is not None:
        loss = task.loss(torch.from_numpy(logits), labels)
    measured = Measured(logits=None if logits is None else torch.from_numpy(logits), labels=labels, loss=loss)
    return {
        name: columns[name] if name in columns else term.of(measured).numpy()
        for name, term in rule.measured().items()
        if name in columns or not (term.gradient or (term.answers and logits is None))
    }


def predictions(logits: np.ndarray, labels: np.ndarray, answers: Answers | None) -> dict[str, np.ndarray]:
    """Return the columns of PREDICTIONS that the logits of each row's class, labels or number give."""
    assert answers is not None
    z: Tensor = upcast(torch.from_numpy(logits))
    predicted = np.asarray(answers.predictions(z.numpy()))
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


def scoring_request(
    model: nn.Module,
    dataset: Dataset,
    collate: Collate,
    *,
    rule: ScoringRule,
    task: Task | None,
    rows: RowNames,
    compute: Compute,
    trusted: Dataset | None,
) -> LookRequest:
    """Check what `score` was given, and return it as a request; the task follows from the model if it is None."""
    model = distributed.unwrapped(model)
    if len(dataset) == 0:
        raise SettingsError("there are no rows to score")
    require_row_names(len(dataset), hashes=rows.hashes, ids=rows.ids)
    require_separable(model)
    require_precision(rule.measured(), compute.autocast)
    if not isinstance(rule.reference, int):
        require_reference(rule.reference, dataset)
    if compute.parts is not None and rows.hashes is None:
        raise SettingsError("finished parts need hashes of the rows; pass rows=RowNames(hashes=...)")
    if task is None:  # that of the model's config, whose loss is the model's own
        own_task, safe = task_of(model), each_its_row(collate)

        def check(size: int) -> None:
            require_own_loss(model, safe([dataset[j] for j in range(size)]), own_task)

        with eval_mode(model):
            distributed.together(lambda: retry_on_oom(check, halves(min(compute.batch_size, len(dataset)))))
        task = own_task
    return LookRequest(
        dataset=dataset,
        collate=collate,
        task=task,
        rule=rule,
        rows=rows,
        compute=compute,
        trusted=trusted,
        excluded=None if trusted is None else equals(dataset, trusted),
    )


@of_loaded_model
def score(
    model: nn.Module,
    dataset: Dataset,
    collate: Collate,
    *,
    rule: ScoringRule | None = None,
    task: Task | None = None,
    rows: RowNames | None = None,
    compute: Compute | None = None,
    trusted: Dataset | None = None,
) -> Scores:
    """Score every sample for the model, with a fitted head where its own is no better than a random one.

    Args:
        model: the model to train; it is left unchanged, also after an error.
        dataset: its rows go to `collate`, which returns the model's inputs and `labels`.
        rule: terms to measure and how to draw rows; by default the published terms and even draws.
        task: its loss must equal that of training; by default it follows from the model's config
            (text generation, regression for one label, else classification).
        rows: ids, hashes and lengths of the rows.
        compute: batch size, precision, progress, and a folder for finished parts.
        trusted: rows that represent what the model should be good at, in the format of the data set.

    If the model is at chance with any head, its gradients carry no information: score warns and draws rows evenly.
    Raises UnsupportedError naming what cannot be scored exactly; SettingsError.
    """
    request = scoring_request(
        model,
        dataset,
        collate,
        rule=rule or ScoringRule(terms=published().PAPER_TERMS),
        task=task,
        rows=rows or RowNames(),
        compute=compute or Compute(),
        trusted=trusted,
    )
    result = look(model, request)
    result.undo()
    why_even = request.task.reading.why_even if result.scores.even else None
    unready = result.why_not and f"rows are drawn evenly, and have no terms of gradients: {result.why_not}"
    for why in filter(None, (why_even, unready, result.scores.caution)):
        warnings.warn(why, stacklevel=3)
    return result.scores


def require_scorable(
    model: nn.Module,
    rows: Sequence[Any],
    collate: Collate,
    *,
    task: Task,
    own_loss: bool = False,
    rule: ScoringRule,
    autocast: torch.dtype | None = None,
) -> None:
    """Raise the errors that `score` would raise for the model, the task and these few rows, before a look.

    With `own_loss` the task was inferred from the model's config, and its loss must equal the model's own. Costs a
    forward pass over the rows, and their exactness check if a term needs gradients. The model is left unchanged.
    """
    model = distributed.unwrapped(model)
    require_separable(model)
    require_precision(rule.measured(), autocast)
    rule.require_texts(task)
    collate = each_its_row(collate)
    with eval_mode(model), precision(next(model.parameters()).device, autocast, cache=False):
        # In one batch: only a batch shows whether samples share a row.
        terms = terms_of_batch(rule, task, collate(list(rows)))
        free = {name: term for name, term in terms.items() if not (term.gradient or term.probe)}

        def check(size: int) -> None:
            batch = collate(list(rows[:size]))
            if own_loss:
                require_own_loss(model, batch, task)
            inputs, labels = split_labels(batch, model)
            with torch.no_grad():
                logits = task.reading.logits(model, inputs)
                require_usable(task, logits, labels, range(size))
                losses = sample_losses(task, logits, labels)
            answers = logits if logits.dim() == 2 else None
            columns_of(free, Measured(logits=answers, labels=labels, loss=losses))
            if needs_gradients(terms):
                published().require_exact(model, batch, task)

        retry_on_oom(check, halves(len(rows)))


def require_separable(model: nn.Module) -> None:
    """Raise UnsupportedError for a model that is sharded, or that couples the samples of a batch."""
    distributed.require_whole(model)
    if coupled := batch_coupled(model):
        raise UnsupportedError(
            f"{coupled[0]} couples the samples of a batch, so that no sample has its own loss; replace it"
        )


def require_own_loss(model: nn.Module, batch: Batch, task: Task) -> None:
    """Raise UnsupportedError where the model computes a loss itself and it differs from the task's.

    The batch has the first rows.  Raises DataError for a label that the loss cannot use.
    """
    inner = base_model(model)
    if "labels" not in inspect.signature(inner.forward).parameters:
        return
    inputs, labels = split_labels(batch, model)
    config = getattr(inner, "config", None)
    kind = getattr(config, "problem_type", None)
    try:
        with torch.no_grad():
            logits = task.reading.logits(model, inputs)
            require_usable(task, logits, labels, range(len(labels)))
            ours = task.batch_loss(task.loss(logits, labels), labels)
            del logits  # of text they are large
            # AdaLoRA's own model adds a penalty to the loss, which is of no sample.
            called = inner if isinstance(getattr(model, "base_model", None), AdaLoraModel) else model
            own = output_part(called(**placed(model, inputs), labels=labels), "loss")
    finally:
        # transformers stores the problem type that the first labels suggest.
        if config is not None and kind is None:
            config.problem_type = None
    if own is not None and abs(float(own) - float(ours)) > 1e-2 * max(1.0, abs(float(ours))):
        raise UnsupportedError(
            f"the model's own loss on a batch is {float(own):.4f}, but the {task.name} loss is {float(ours):.4f}; pass "
            "`task` with the loss that training uses"
        )
