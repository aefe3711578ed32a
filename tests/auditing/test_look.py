"""The look: its results, the fitted head, what it must not depend on, and what it must not change."""

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from peft import TaskType
from torch import Tensor, nn
from transformers import BertForSequenceClassification

import tsqlora as tsq
from models import (
    GENERATORS,
    collate,
    lora,
    samples,
    text_collator,
    texts,
    tiny_bert,
    tiny_llama_classifier,
)
from scoring import assert_unchanged, fingerprint, trainable
from tsqlora import paper
from tsqlora.auditing.head_start import SCALE, Started, start_head
from tsqlora.auditing.labels.density_ratio import log_density_ratio
from tsqlora.auditing.look import Look, look, require_scorable
from tsqlora.errors import DataError, SettingsError
from tsqlora.model import passes as forward_module
from tsqlora.model.forward import find_head, forward_pass
from tsqlora.model.request import Compute, LookRequest, RowNames, ScoringRule
from tsqlora.model.ridge import fit_ridge
from tsqlora.paper.terms import PAPER_TERMS
from tsqlora.tasks import Task, get_task
from tsqlora.tasks.forward import split_labels

Rows = list[dict[str, Any]]
CLASSES, NUMBERS = get_task("sequence-classification"), get_task("regression")


def learnable(n: int = 200, seed: int = 0) -> Rows:
    """Rows whose class is which of three tokens stands in them most."""
    rows = samples(n, 3, seed=seed)
    for row in rows:
        row["input_ids"][: len(row["input_ids"]) // 2 + 1] = [10 + row["labels"]] * (len(row["input_ids"]) // 2 + 1)
    return rows


def with_numbers(rows: Rows) -> Rows:
    return [row | {"labels": 2.0 * row["labels"] + 1 + 0.1 * len(row["input_ids"])} for row in rows]


def shifted(rows: Rows) -> Rows:
    """The next class for each, so that what is learned of the rows is wrong of these."""
    return [row | {"labels": (row["labels"] + 1) % 3} for row in rows]


def wrapped(model: Any = None, **options: Any) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return tsq.wrap((model or tiny_bert()).float(), mean_rank=2, **options)


def of_numbers() -> nn.Module:
    return wrapped(tiny_bert(num_labels=1, problem_type="regression"))


def started(
    model: nn.Module, rows: Rows, *, task: Task = CLASSES, trusted: Rows | None = None, collate: Any = collate
) -> Started:
    return start_head(model, LookRequest(dataset=rows, collate=collate, task=task, trusted=trusted))


def looked(
    model: nn.Module,
    rows: Rows,
    *,
    rule: ScoringRule | None = None,
    task: Task = CLASSES,
    trusted: Rows | None = None,
    collate: Any = collate,
    lengths: list[int] | None = None,
    batch_size: int = 32,
    **further: Any,
) -> Look:
    options: dict[str, Any] = {"rows": RowNames(lengths=lengths), "compute": Compute(batch_size), "trusted": trusted}
    options |= further
    request = LookRequest(dataset=rows, collate=collate, task=task, rule=rule or ScoringRule(), **options)
    return look(model, request)


def losses(model: nn.Module, rows: Rows, task: Task = CLASSES, collate: Any = collate) -> Tensor:
    inputs, labels = split_labels(collate(rows), model)
    with torch.no_grad():
        return task.loss(task.reading.logits(model.eval(), inputs), labels)


def head_of(model: nn.Module) -> Tensor:
    inputs, _ = split_labels(collate(samples(4, 3)), model)
    head = find_head(model.eval(), inputs, CLASSES)
    assert head is not None
    return head.linear.weight.detach().clone()


def features_of(model: nn.Module, rows: Rows, task: Task) -> np.ndarray:
    """What the classifier is given, row by row."""
    seen: list[Tensor] = []
    linear = next(
        module for name, module in model.named_modules() if name.endswith("classifier.modules_to_save.default")
    )
    handle = linear.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    for row in rows:
        losses(model, [row], task)
    handle.remove()
    return torch.cat(seen).double().numpy(force=True)


# --- the head -----------------------------------------------------------------------------


@pytest.mark.parametrize("build", [wrapped, lambda: wrapped(tiny_llama_classifier()), of_numbers])
def test_a_head_is_installed_at_one_scale_of_its_fit(build: Callable[[], nn.Module]) -> None:
    model, rows, task = build(), learnable(), NUMBERS if build is of_numbers else CLASSES
    rows = with_numbers(rows) if build is of_numbers else rows
    mean = float(np.mean([row["labels"] for row in rows])) if build is of_numbers else 0.0
    before = float(losses(model, rows, task).mean())
    start = started(model, rows, task=task).head
    assert start is not None
    assert start.replaces
    assert float(losses(model, rows, task).mean()) < before
    np.testing.assert_allclose(head_of(model).numpy(), SCALE * start.fit.head.weight, rtol=1e-5)
    inputs, _ = split_labels(collate(rows), model)
    logits = task.reading.logits(model.eval(), inputs).numpy(force=True)
    if isinstance(model.get_base_model(), BertForSequenceClassification):
        fitted = start.fit.head.logits(features_of(model, rows, task).astype(np.float32))
        np.testing.assert_allclose(logits, mean + SCALE * (fitted - mean), atol=1e-3)


def test_terms_of_q_are_of_the_head_that_training_begins_with() -> None:
    model, rows = wrapped(), learnable(60)
    rule = ScoringRule(terms=("gradient_norm",))
    first = looked(model, rows, rule=rule).scores
    again = looked(model, rows, rule=replace(rule, head_start=False)).scores
    for name in ("gradient_norm", "loss"):
        np.testing.assert_allclose(first.terms[name], again.terms[name], rtol=1e-3, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("loss", ["smoothed", "weighted"])
def test_a_good_head_stays_whatever_the_training_loss_does_to_the_numbers(loss: str) -> None:
    """Its plain loss is compared, as that of the fit is."""
    model, rows = wrapped(), learnable(400)
    task: Any = get_task("sequence-classification")
    start = started(model, rows).head
    assert start is not None
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear) and module.out_features == 3 and module.weight.requires_grad:
                module.weight.copy_(torch.from_numpy(start.fit.head.weight))
                module.bias.copy_(torch.from_numpy(start.fit.head.bias))
    good = head_of(model)
    options = {"label_smoothing": 0.5} if loss == "smoothed" else {"class_weights": torch.full((3,), 10.0)}
    task = get_task("sequence-classification", **options)
    again = started(model, rows, task=task).head
    assert again is not None
    assert not again.replaces
    assert torch.equal(head_of(model), good)


def test_only_the_head_changes_and_it_can_be_put_back() -> None:
    model = wrapped()
    before = fingerprint(model)
    start = started(model, learnable())
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before["weights"][name])}
    assert changed
    assert all("classifier" in name for name in changed)
    start.undo()
    assert_unchanged(before, model)


def test_a_head_that_is_trained_already_stays() -> None:
    model, rows = wrapped(), learnable()
    started(model, rows)
    inputs, labels = split_labels(collate(rows), model)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(60):
        CLASSES.loss(CLASSES.reading.logits(model.eval(), inputs), labels).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    trained = head_of(model)
    start = started(model, rows).head
    assert start is not None
    assert not start.replaces
    assert torch.equal(head_of(model), trained)


def test_text_and_frozen_heads_have_none() -> None:
    model = lora(GENERATORS["llama"](), task=TaskType.CAUSAL_LM)
    result = started(model, texts(model, 4), task=get_task("causal-lm"), collate=text_collator(model))
    assert result.head is None
    assert result.layer is None
    assert started(tiny_bert().float().requires_grad_(False), samples(8, 3)).head is None


def test_copies_of_trusted_rows_leave_the_pool_before_anything_is_fitted() -> None:
    rows, trusted = learnable(100), shifted(learnable(40, seed=1))
    pool = [*rows, *(5 * trusted)]
    request = LookRequest(dataset=pool, collate=collate, task=CLASSES, trusted=trusted, excluded=np.arange(300) >= 100)
    head, alone = start_head(wrapped(), request).head, started(wrapped(), rows).head
    assert head is not None
    assert alone is not None
    np.testing.assert_allclose(head.fit.head.weight, alone.fit.head.weight, rtol=1e-3, atol=1e-5)


def test_held_out_rows_and_their_copies_are_in_no_fit() -> None:
    """Whatever numbers they have, the head is the same, bit for bit; the look names them."""
    rows = with_numbers(learnable(110))
    pool, heads, named = [*rows, *copy.deepcopy(rows[:60])], list[torch.Tensor](), list[np.ndarray]()
    for change in (0.0, 1e3):
        for row in [pool[j] for j in np.flatnonzero(named[0])] if named else []:
            row["labels"] += change
        model = of_numbers()
        request = LookRequest(
            dataset=pool, collate=partial(collate, label_dtype=torch.float32), task=NUMBERS, trusted=rows[:2], asks=True
        )
        result = look(model, request)
        heads.append(head_of(model))
        named.append(result.scores.left_out_as("held out"))
    np.testing.assert_array_equal(named[0], named[1])
    np.testing.assert_array_equal(named[0][:60], named[0][110:])
    assert named[0].sum() >= 12
    assert torch.equal(heads[0], heads[1])


def test_wrong_labels_among_held_out_rows_are_left_out_by_a_judge_that_has_not_seen_them() -> None:
    pool, wrong = mislabelled(learnable(900))
    result = look(wrapped(), LookRequest(dataset=pool, collate=collate, task=CLASSES, trusted=pool[:2], asks=True))
    held, left_out = (result.scores.left_out_as(name) for name in ("held out", "confident negative"))
    assert 75 <= held.sum() <= 100  # with their copies
    assert (held & wrong).sum() <= 2
    assert (left_out & wrong).sum() > 0.8 * wrong.sum()
    p_wrong = result.scores.predictions["wrong_probability"]
    assert p_wrong[held].max() <= 0.2


# --- text with trusted rows ---------------------------------------------------------------


@pytest.mark.parametrize("family", GENERATORS)
def test_text_is_drawn_by_the_density_ratio_of_its_hidden_states(family: str) -> None:
    behind_encoder = family in ("t5", "bart", "bert + bert")
    model = lora(GENERATORS[family](), task=TaskType.SEQ_2_SEQ_LM if behind_encoder else TaskType.CAUSAL_LM)
    task, batches = (
        get_task("seq2seq" if behind_encoder else "causal-lm"),
        text_collator(model, left=not behind_encoder),
    )
    of_its_own, others = texts(model, 30), texts(model, 40, seed=1)
    for row in others:  # another prompt, or another target
        row["input_ids"] = [1 + token % 5 for token in row["input_ids"]]
        row["labels"] = [token if token < 0 else 1 + token % 5 for token in row["labels"]]
    pool, trusted = [*of_its_own[:15], *others], of_its_own[15:]
    before = fingerprint(model)
    result = looked(model, pool, task=task, trusted=trusted, collate=batches, batch_size=8)
    assert_unchanged(before, model)
    scores = result.scores
    assert scores.record.weights == {"density_ratio": 4.0}
    assert not scores.even
    run = partial(forward_pass, model, collate=batches, task=task, compute=Compute(8), mean=True)
    (of_pool, _), (of_trusted, _) = run(pool), run(trusted)
    assert of_pool is not None
    assert of_pool.mean is not None
    assert of_trusted is not None
    assert of_trusted.mean is not None
    lengths = of_pool.labels, of_trusted.labels
    expected, _ = log_density_ratio(of_pool.mean, of_trusted.mean, lengths=lengths)
    np.testing.assert_array_equal(scores.terms["density_ratio"], expected)
    if family != "t5":  # whose only block is followed by a norm
        states = [states_twin(model, batches([row])) for row in pool]
        np.testing.assert_allclose(of_pool.mean, states, rtol=1e-2, atol=1e-2)
    assert scores.quality[:15].mean() > scores.quality[15:].mean()
    assert result.cost.backward == 0
    assert result.cost.forward == len(pool) + len(trusted)


@torch.no_grad()
def states_twin(model: nn.Module, batch: dict[str, Any]) -> np.ndarray:
    """The mean over the tokens of the target of the states halfway up, as transformers returns them."""
    inputs, labels = split_labels(batch, model)
    output = model.eval()(**inputs, output_hidden_states=True)
    layers = output.get("decoder_hidden_states") or output["hidden_states"]
    state = layers[len(layers) // 2][0]
    return state[labels[0] != -100].mean(0).numpy()


def test_text_is_drawn_evenly_where_trusted_rows_look_like_the_pool() -> None:
    model = lora(GENERATORS["llama"](), task=TaskType.CAUSAL_LM)
    rows = texts(model, 60)
    trusted = rows[::3]
    pool = [row for j, row in enumerate(rows) if j % 3]
    scores = looked(model, pool, task=get_task("causal-lm"), trusted=trusted, collate=text_collator(model)).scores
    assert scores.even
    assert scores.record.gate == {
        "name": "density ratio",
        "why_not": "hidden states do not separate trusted rows from the others: all rows are drawn evenly",
    }


@pytest.mark.parametrize(
    "rule",
    [
        ScoringRule(terms=PAPER_TERMS),
        ScoringRule(terms=("density_ratio",), select=False),
        ScoringRule(weights={"density_ratio": 1.0, "loss": 1.0}),
        ScoringRule(weights={"density_ratio": 1.0, "gradient_norm": 1.0}),
    ],
)
@pytest.mark.parametrize("like_the_pool", [False, True])
def test_the_density_ratio_stands_beside_other_terms(rule: ScoringRule, like_the_pool: bool) -> None:
    model = lora(GENERATORS["llama"](), task=TaskType.CAUSAL_LM)
    rows = texts(model, 60)
    if not like_the_pool:
        for row in rows[::3]:
            row["input_ids"] = [1 + token % 3 for token in row["input_ids"]]
    task, batches = get_task("causal-lm"), text_collator(model)
    pool = [row for j, row in enumerate(rows) if j % 3]
    require_scorable(model, pool[:2], batches, task=task, rule=rule)
    scores = looked(model, pool, rule=rule, task=task, trusted=rows[::3], collate=batches).scores
    assert ("density_ratio" in scores.terms) != like_the_pool
    assert {*rule.terms} - {"density_ratio"} <= {*scores.terms}
    assert ("why_not" in (scores.record.gate or {})) == like_the_pool
    assert scores.even == (rule.weights is None and (like_the_pool or not rule.select))


@pytest.mark.parametrize("relabelled", [False, True])
def test_a_row_with_the_input_of_a_trusted_row_is_never_drawn(relabelled: bool) -> None:
    model, rows, trusted = wrapped(), learnable(60), learnable(20, seed=1)
    rows[3], rows[40] = [copy.deepcopy(row) for row in trusted[:2]]
    if relabelled:
        rows[3], rows[40] = shifted([rows[3], rows[40]])
    scores = paper.score(model, rows, collate, trusted=trusted)
    assert np.flatnonzero(~scores.kept).tolist() == [3, 40]
    assert np.flatnonzero(scores.left_out_as("trusted row")).tolist() == [3, 40]
    subset = tsq.QualitySubset(rows, 0.5, trusted=trusted)
    unscored = [subset.plan.draw(epoch) for epoch in range(6)]
    subset.use(scores, 0)
    for drawn in (*unscored, *(subset.plan.draw(epoch) for epoch in range(6))):
        assert not {3, 40} & set(drawn.tolist())


# --- predictions out of sample ------------------------------------------------------------


def test_predicted_numbers_are_those_of_refits_without_the_row() -> None:
    task, model, rows = NUMBERS, of_numbers(), with_numbers(learnable(40))
    x = features_of(model, rows, task)
    targets = np.array([row["labels"] for row in rows])[:, None]
    strength = fit_ridge(x, targets.astype(np.float64)).strength
    refits = []
    for j in range(40):
        rest = np.arange(40) != j
        centre, mean = x[rest].mean(0), targets[rest].mean(0)
        gram = (x[rest] - centre).T @ (x[rest] - centre) + strength * np.eye(x.shape[1])
        weight = np.linalg.solve(gram, (x[rest] - centre).T @ (targets[rest] - mean))
        refits.append((x[j] - centre) @ weight + mean)
    result = looked(model, rows, task=task).scores
    assert result.record.out_of_sample
    np.testing.assert_allclose(result.predictions["predicted"], np.array(refits)[:, 0], rtol=1e-3, atol=1e-3)


# --- what a look may not depend on --------------------------------------------------------


@pytest.mark.parametrize("how", ["batches", "padding", "lengths", "order", "memory"])
def test_a_look_does_not_depend_on(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, rule = learnable(60), ScoringRule(terms=PAPER_TERMS)
    order = np.random.default_rng(0).permutation(60) if how == "order" else np.arange(60)
    options: dict[str, Any] = {
        "batches": {"batch_size": 7},
        "padding": {"collate": partial(collate, pad_to=30)},
        "lengths": {"lengths": [1] * 60},
    }.get(how, {})
    first, second = wrapped(), wrapped()
    expected = looked(first, rows, rule=rule).scores
    if how == "memory":
        monkeypatch.setattr(forward_module, "IN_MEMORY", 0)
    result = looked(second, [rows[j] for j in order], rule=rule, **options).scores
    one, other = head_of(first).flatten(), head_of(second).flatten()
    if how in ("order", "memory"):  # the folds follow the order, half precision rounds
        assert torch.cosine_similarity(one, other, dim=0) > 0.95
        near = 1e-2
    else:
        torch.testing.assert_close(other, one, rtol=0, atol=1e-3 * float(one.abs().max()))
        near = 1e-3
        for name, values in expected.terms.items():
            limit = near * np.abs(values).max()
            np.testing.assert_allclose(result.terms[name], values, rtol=0, atol=limit, err_msg=name)
    for name in ("label_probability", "predicted_probability"):
        np.testing.assert_allclose(result.predictions[name], expected.predictions[name][order], atol=near, err_msg=name)


# --- the model is as it was ---------------------------------------------------------------


class Breaks(Exception):
    pass


TRUSTING = ScoringRule(terms=PAPER_TERMS)


@pytest.mark.parametrize("before_end", [None, 0, 3, 5, 7, 9, 11])
def test_score_leaves_the_model_as_it_was_also_after_an_error(before_end: int | None) -> None:
    model, rows, trusted = wrapped(), learnable(60), learnable(40, seed=1)
    for j, parameter in enumerate(trainable(model).values()):
        parameter.grad = torch.randn_like(parameter) if j % 2 else None
    for j, module in enumerate(model.modules()):
        module.training = j % 3 > 0
    calls, breaks = 0, -1

    def counted(batch: Rows) -> dict[str, Tensor]:
        nonlocal calls
        calls += 1
        torch.rand(1)
        if calls == breaks:
            raise Breaks
        return collate(batch)

    before = fingerprint(model)
    run = partial(paper.score, model, rows, counted, rule=TRUSTING, compute=Compute(16), trusted=trusted)
    scores = run()
    assert scores.record.head_start["replaced"]
    assert_unchanged(before, model)
    if before_end is not None:
        calls, breaks = 0, calls - before_end
        with pytest.raises(Breaks):
            run()
        assert_unchanged(before, model)


def test_one_trusted_row_is_too_few() -> None:
    with pytest.raises(SettingsError, match="1 trusted rows are too few; give at least 2"):
        paper.score(wrapped(), learnable(12), collate, trusted=learnable(1, seed=1))


def test_two_rows_are_too_few_to_fit_a_head_in_folds() -> None:
    assert looked(wrapped(), learnable(2)).scores.record.head_start is None


# --- wrong labels -------------------------------------------------------------------------


def mislabelled(rows: Rows) -> tuple[Rows, np.ndarray]:
    """Every tenth row has another label, drawn: all in one class, they would look like hard rows to these features."""
    wrong = np.arange(len(rows)) % 10 == 0
    steps = np.where(wrong, np.random.default_rng(0).integers(1, 3, len(rows)), 0).tolist()
    return [row | {"labels": (row["labels"] + step) % 3} for row, step in zip(rows, steps, strict=True)], wrong


@pytest.mark.parametrize("rule", [ScoringRule(), ScoringRule(weights={"loss": 1.0}), ScoringRule(judge=False)])
@pytest.mark.parametrize("trusted", [False, True])
def test_wrong_labels_are_left_out_one_by_one_as_the_audit_lists_them(rule: ScoringRule, trusted: bool) -> None:
    rows, wrong = mislabelled(learnable(600))
    apart = shifted(learnable(60, seed=1)) if trusted else None
    scores = looked(wrapped(), rows, rule=rule, trusted=apart).scores
    out = scores.left_out_as("confident negative")
    assert (scores.caution is not None) == (rule.weights is not None)
    if not rule.judge:
        assert not out.any()
        return
    assert (out & wrong).sum() > 0.8 * wrong.sum()
    assert (out & wrong).sum() > 0.8 * out.sum()
    listed = tsq.audit(wrapped(), rows, collate)
    assert {*listed.ids[: listed.likely_wrong].tolist()} == {*np.flatnonzero(out).tolist()}
    np.testing.assert_allclose(scores.predictions["wrong_probability"][listed.ids], listed.probability, atol=1e-6)


def test_a_later_look_renews_q_and_judges_no_label() -> None:
    rows, _ = mislabelled(learnable(600))
    first = looked(model := wrapped(), rows, rule=(rule := ScoringRule(weights={"loss": 1.0}))).scores
    with torch.no_grad():
        for parameter in trainable(model).values():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    second = looked(model, rows, rule=replace(rule, head_start=False), first=first).scores
    assert not np.allclose(first.terms["loss"], second.terms["loss"])
    np.testing.assert_array_equal(first.kept, second.kept)
    assert second.record.noise == first.record.noise
    for name, values in first.predictions.items():
        np.testing.assert_array_equal(second.predictions[name], values, err_msg=name)


def with_label(rows: Rows, at: int, label: float) -> Rows:
    return [row | {"labels": label} if j == at else row for j, row in enumerate(rows)]


@pytest.mark.parametrize("at", [1, 90])
@pytest.mark.parametrize("label", [-100, 3, float("nan")])
def test_a_label_that_the_loss_cannot_use_is_named_with_its_row(at: int, label: float) -> None:
    model, rows = (wrapped(), learnable(100)) if label in (-100, 3) else (of_numbers(), with_numbers(learnable(100)))
    task = CLASSES if label in (-100, 3) else NUMBERS
    wrong = with_label(rows, at, label)
    with pytest.raises(DataError, match=f"^row {at} has the label {label}"):
        paper.score(model, wrong, collate)
    if at == 1:
        with pytest.raises(DataError, match=f"^row 1 has the label {label}"):
            require_scorable(model, wrong[:2], collate, task=task, rule=ScoringRule())
    with pytest.raises(DataError, match=f"^row {at + 7} has the label {label}"):
        start_head(model, LookRequest(dataset=wrong, collate=collate, task=task, rows=RowNames(ids=np.arange(100) + 7)))
    with pytest.raises(DataError, match=f"^trusted row {at} has the label {label}"):
        start_head(model, LookRequest(dataset=rows, collate=collate, task=task, trusted=wrong))
