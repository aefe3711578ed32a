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
    tiny_mpnet,
)
from scoring import assert_unchanged, fingerprint, trainable
from tsqlora.errors import DataError
from tsqlora.quality import passes as forward_module
from tsqlora.quality.density_ratio import log_density_ratio
from tsqlora.quality.forward_pass import find_head, forward_pass
from tsqlora.quality.head_start import start_head
from tsqlora.quality.label_noise import reject as reject_of
from tsqlora.quality.look import Look, look
from tsqlora.quality.ridge import fit_ridge
from tsqlora.quality.rule import PAPER_TERMS, Compute, LookRequest, RowNames, ScoringRule
from tsqlora.quality.score import require_scorable
from tsqlora.quality.started import Started, install
from tsqlora.quality.trusted import Trusted
from tsqlora.seeds import stream
from tsqlora.tasks import Task, get_task
from tsqlora.tasks.forward import model_logits, split_labels

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
    apart = None if trusted is None else Trusted(trusted)
    return start_head(model, LookRequest(dataset=rows, collate=collate, task=task, trusted=apart))


def looked(
    model: nn.Module,
    rows: Rows,
    *,
    rule: ScoringRule | None = None,
    task: Task = CLASSES,
    trusted: Trusted | None = None,
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
        return task.loss(model_logits(model.eval(), inputs, task), labels)


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
def test_the_fitted_head_has_the_out_of_fold_loss(build: Callable[[], nn.Module]) -> None:
    model, rows, task = build(), learnable(), NUMBERS if build is of_numbers else CLASSES
    rows = with_numbers(rows) if build is of_numbers else rows
    before = losses(model, rows, task).mean()
    start = started(model, rows, task=task).head
    assert start is not None
    assert start.replaces
    after = float(losses(model, rows, task).mean())
    assert after < 0.7 * float(before)
    assert build is of_numbers or after == pytest.approx(start.fit.loss, rel=0.05)


@pytest.mark.parametrize("build", [wrapped, lambda: wrapped(tiny_llama_classifier()), of_numbers])
def test_training_starts_at_half_of_the_logits_and_with_numbers_half_as_far_from_their_mean(
    build: Callable[[], nn.Module],
) -> None:
    model, rows, task = build(), learnable(60), NUMBERS if build is of_numbers else CLASSES
    rows = with_numbers(rows) if build is of_numbers else rows
    mean = float(np.mean([row["labels"] for row in rows])) if build is of_numbers else 0.0
    result = looked(model, rows, task=task, rule=ScoringRule(terms=("gradient_norm",)))
    assert result.head is not None
    assert result.head.replaces
    np.testing.assert_allclose(head_of(model).numpy(), 0.5 * result.head.fit.head.weight, rtol=1e-5)
    inputs, _ = split_labels(collate(rows), model)
    logits = model_logits(model.eval(), inputs, task).numpy(force=True)
    twin = build()
    started(twin, rows, task=task)
    whole = looked(twin, rows, task=task, rule=ScoringRule(terms=("gradient_norm",), head_start=False)).scores
    np.testing.assert_allclose(result.scores.terms["gradient_norm"], whole.terms["gradient_norm"], rtol=1e-3, atol=1e-5)
    calibrated = model_logits(twin.eval(), inputs, task).numpy(force=True)
    np.testing.assert_allclose(logits, mean + 0.5 * (calibrated - mean), atol=1e-4)


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
        CLASSES.loss(model_logits(model.eval(), inputs, CLASSES), labels).mean().backward()
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


@pytest.mark.parametrize("pool_agrees", [True, False])
def test_the_head_is_fitted_on_the_rows_that_make_for_the_lower_loss_on_trusted_ones(pool_agrees: bool) -> None:
    model, rows, trusted = wrapped(), learnable(), learnable(30, seed=1)
    result = started(model, rows if pool_agrees else shifted(rows), trusted=trusted)
    assert result.head is not None
    assert result.of_trusted is not None
    assert result.head.trusted == (not pool_agrees)
    # Both by losses on trusted rows: of the pool's head, and of their own out of fold.
    assert (result.of_trusted.fit.loss < result.of_trusted.present) == (not pool_agrees)
    other = wrapped()
    started(other, rows if pool_agrees else shifted(rows))
    assert result.of_trusted.present == pytest.approx(float(losses(other, trusted).mean()), rel=1e-3)
    assert float(losses(model, trusted).mean()) < 0.7
    before = head_of(model)
    result.ready_to_train()
    assert torch.equal(head_of(model), before * (0.5 if pool_agrees else 1.0))


@pytest.mark.parametrize("pool_agrees", [True, False])
def test_a_head_of_trusted_rows_stands_on_the_dense_layer_that_it_was_fitted_on(pool_agrees: bool) -> None:
    model = wrapped(tiny_mpnet(), modules_to_save=["classifier"])
    rows, trusted = learnable(120), learnable(60, seed=1)
    if not pool_agrees:
        rng = np.random.default_rng(0)
        rows = [row | {"labels": int(rng.integers(3))} for row in rows]  # whose head does not replace the model's own
    result = started(model, rows, trusted=trusted)
    assert result.layer is not None
    assert result.of_trusted is not None
    install(result.layer, result.of_trusted)
    assert float(losses(model, trusted).mean()) == pytest.approx(result.of_trusted.fit.loss, rel=0.1)


# --- the trusted model --------------------------------------------------------------------


def trained_alone(
    model: nn.Module, trusted: Rows, task: Task, collate: Any, *, steps: int, size: int, rate: float, rng: Any
) -> None:
    """Plain AdamW with linear decay on these rows, in the order that the look takes."""
    model.eval()
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=rate, weight_decay=0.0)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=1.0, end_factor=0.0, total_iters=steps)
    order = np.concatenate([rng.permutation(len(trusted)) for _ in range(-(-steps * size // len(trusted)))])
    for step in range(steps):
        inputs, labels = split_labels(collate([trusted[j] for j in order[step * size :][:size]]), model)
        task.batch_loss(task.loss(model_logits(model, inputs, task), labels), labels).backward()
        optimizer.step()
        decay.step()
        optimizer.zero_grad()


REDUCIBLE = ScoringRule(terms=("reducible_loss",), seed=3)


@pytest.mark.parametrize("numbers", [False, True])
def test_reducible_loss_is_the_slow_twins(numbers: bool) -> None:
    task, model = (NUMBERS, of_numbers()) if numbers else (CLASSES, wrapped())
    rows, trusted = learnable(60), learnable(40, seed=1)
    if numbers:
        rows, trusted = with_numbers(rows), with_numbers(trusted)
    twin = copy.deepcopy(model)
    request = LookRequest(dataset=rows, collate=collate, task=task, rule=REDUCIBLE, trusted=Trusted(trusted))
    start = start_head(twin, request)
    ours = losses(twin, rows, task)
    assert start.layer is not None
    assert start.of_trusted is not None
    install(start.layer, start.of_trusted)
    trained_alone(twin, trusted, task, collate, steps=100, size=16, rate=2 * 1e-3, rng=stream("trusted model", 3))
    expected = losses(twin, rows, task)

    before = fingerprint(model)
    result = looked(model, rows, rule=REDUCIBLE, task=task, trusted=Trusted(trusted, learning_rate=1e-3))

    terms = result.scores.terms
    scale = float((ours - expected).abs().max())
    np.testing.assert_allclose(terms["trusted_loss"], expected, rtol=2e-3, atol=1e-3 * scale)
    np.testing.assert_allclose(terms["reducible_loss"], ours - expected, rtol=2e-3, atol=2e-3 * scale)
    assert result.trusted_cost.backward == 100 * 16
    result.undo()
    assert_unchanged(before, model)


@pytest.mark.parametrize(("family", "rate", "best"), [("llama", 1e-3, 0), ("t5", 1e-3, 0), ("llama", 0.1, 2)])
def test_of_text_it_is_relative_and_trained_for_fewer_steps_at_the_best_rate(
    family: str, rate: float, best: int
) -> None:
    kind = TaskType.SEQ_2_SEQ_LM if family == "t5" else TaskType.CAUSAL_LM
    task = get_task("seq2seq" if family == "t5" else "causal-lm")
    model = lora(GENERATORS[family](), task=kind)
    rows, trusted, batches = texts(model, 9), 6 * texts(model, 1, seed=1), text_collator(model)
    ours = losses(model, rows, task, batches)
    rng = stream("trusted model", 3)
    held_out, rest = ([trusted[j] for j in part] for part in np.split(rng.permutation(len(trusted)), [2]))
    twins = [copy.deepcopy(model) for _ in range(3)]
    for twin, factor in zip(twins, (2.0, 1.0, 0.5), strict=True):
        trained_alone(twin, rest, task, batches, steps=24, size=4, rate=factor * rate, rng=rng)
    of_rates = [float(losses(twin, held_out, task, batches).mean()) for twin in twins]
    assert int(np.argmin(of_rates)) == best
    expected = losses(twins[best], rows, task, batches)

    before = fingerprint(model)
    rule = ScoringRule(weights={"reducible_loss": 1.0}, seed=3)
    result = looked(
        model, rows, rule=rule, task=task, trusted=Trusted(trusted, rate, batch_size=4), collate=batches, batch_size=2
    )

    expected = (ours - expected) / ours.clamp_min(ours.median().item())
    np.testing.assert_allclose(result.scores.terms["reducible_loss"], expected, rtol=1e-3, atol=1e-4)
    assert not result.scores.even
    assert_unchanged(before, model)


def test_text_that_no_rate_learns_is_drawn_evenly() -> None:
    task, model = get_task("causal-lm"), lora(GENERATORS["llama"](), task=TaskType.CAUSAL_LM)
    rows, batches = texts(model, 9), text_collator(model)
    for rate, trainings in ((1e-3, 2), (1e9, 3)):
        trusted = Trusted(6 * texts(model, 1, seed=1), rate, batch_size=4)
        rule = ScoringRule(weights={"reducible_loss": 1.0}, seed=3)
        result = looked(model, rows, rule=rule, task=task, trusted=trusted, collate=batches)
        assert result.scores.even == (trainings == 3)
        assert ("why_not" in (result.scores.record.gate or {})) == (trainings == 3)
        assert result.trusted_cost.backward == trainings * 24 * 4


def test_trusted_rows_that_teach_nothing_have_no_gate() -> None:
    model, rows, trusted = wrapped(), learnable(60), samples(40, 3, seed=1)
    rng = np.random.default_rng(0)
    for row in trusted:
        row["labels"] = int(rng.integers(3))
    result = looked(model, rows, rule=ScoringRule(gate="share"), trusted=Trusted(trusted))
    assert "why_not" in result.scores.record.gate
    assert result.scores.kept.all()
    assert result.trusted_cost.forward == 0


@pytest.mark.parametrize("head_start", [True, False])
def test_a_gate_leaves_out_the_rows_that_the_trusted_model_contradicts(head_start: bool) -> None:
    model, rows = wrapped(), learnable(100)
    wrong = np.arange(100) % 5 == 0
    rows = [shifted([row])[0] if wrong[j] else row for j, row in enumerate(rows)]
    rule = ScoringRule(gate="surest", head_start=head_start)
    scores = looked(model, rows, rule=rule, trusted=Trusted(learnable(60, seed=1), 1e-3)).scores
    out = ~scores.kept
    assert scores.record.gate == {"name": "surest", "left_out": int(out.sum())}
    assert out.sum() == 20
    assert wrong[out].mean() > 0.8
    np.testing.assert_array_equal(scores.left_out_as("gated"), out)


def test_a_gate_leaves_enough_rows_beside_copies_of_trusted_rows() -> None:
    twins = np.arange(100) < 10
    rule = ScoringRule(gate="surest", weights={"loss": 1.0})
    trusted = Trusted(learnable(60, seed=1), 1e-3, twins=twins)
    scores = looked(wrapped(), learnable(100), rule=rule, trusted=trusted, fraction=0.85).scores
    assert scores.kept.sum() == 85
    assert not scores.kept[twins].any()


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
    result = looked(model, pool, task=task, trusted=Trusted(trusted), collate=batches, batch_size=8)
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
    expected, _ = log_density_ratio(of_pool.mean, of_trusted.mean)
    np.testing.assert_array_equal(scores.terms["density_ratio"], expected)
    if family != "t5":  # whose only block is followed by a norm
        states = [states_twin(model, batches([row])) for row in pool]
        np.testing.assert_allclose(of_pool.mean, states, rtol=1e-2, atol=1e-2)
    assert scores.quality[:15].mean() > scores.quality[15:].mean()
    assert result.trusted_cost.forward == result.cost.backward == 0
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
    trusted = Trusted(rows[::3])
    pool = [row for j, row in enumerate(rows) if j % 3]
    scores = looked(model, pool, task=get_task("causal-lm"), trusted=trusted, collate=text_collator(model)).scores
    assert scores.even
    assert scores.record.gate == {
        "name": "density ratio",
        "why_not": "hidden states do not tell trusted rows from the others: all rows are drawn evenly",
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
    scores = looked(model, pool, rule=rule, task=task, trusted=Trusted(rows[::3]), collate=batches).scores
    assert ("density_ratio" in scores.terms) != like_the_pool
    assert {*rule.terms} - {"density_ratio"} <= {*scores.terms}
    assert ("why_not" in (scores.record.gate or {})) == like_the_pool
    assert scores.even == (rule.weights is None and (like_the_pool or not rule.select))


def test_what_an_earlier_look_measured_of_the_trusted_model_is_used_again() -> None:
    model, rows, trusted = wrapped(), learnable(60), learnable(40, seed=1)
    rule = ScoringRule(weights={"reducible_loss": 1.0})
    first = looked(model, rows, rule=rule, trusted=Trusted(trusted))
    head = head_of(model)
    again = Trusted(trusted, loss=first.scores.terms["trusted_loss"])
    second = looked(model, rows, rule=replace(rule, head_start=False), trusted=again)
    assert torch.equal(head_of(model), head)
    np.testing.assert_array_equal(second.scores.terms["trusted_loss"], first.scores.terms["trusted_loss"])
    expected = losses(model, rows, CLASSES).numpy() - first.scores.terms["trusted_loss"]
    np.testing.assert_allclose(second.scores.terms["reducible_loss"], expected, atol=1e-4)
    assert not second.scores.even
    assert second.trusted_cost.forward == 0


@pytest.mark.parametrize("relabelled", [False, True])
def test_a_row_with_the_input_of_a_trusted_row_is_never_drawn(relabelled: bool) -> None:
    model, rows, trusted = wrapped(), learnable(60), learnable(20, seed=1)
    rows[3], rows[40] = [copy.deepcopy(row) for row in trusted[:2]]
    if relabelled:
        rows[3], rows[40] = shifted([rows[3], rows[40]])
    scores = tsq.score(model, rows, collate, trusted=trusted)
    assert np.flatnonzero(~scores.kept).tolist() == [3, 40]
    assert np.flatnonzero(scores.left_out_as("trusted row")).tolist() == [3, 40]
    subset = tsq.QualitySubset(rows, 0.5, trusted=trusted)
    unscored = [subset.plan.from_pool(epoch) for epoch in range(6)]
    subset.use(scores, 0)
    for drawn in (*unscored, *(subset.plan.from_pool(epoch) for epoch in range(6))):
        assert not {3, 40} & set(drawn.tolist())


# --- predictions out of sample ------------------------------------------------------------


@pytest.mark.parametrize("numbers", [False, True])
def test_predictions_are_those_of_refits_without_the_row(numbers: bool) -> None:
    task, model, rows = (
        (NUMBERS, of_numbers(), with_numbers(learnable(40))) if numbers else (CLASSES, wrapped(), learnable(40))
    )
    x = features_of(model, rows, task)
    labels = np.array([row["labels"] for row in rows])
    targets = labels[:, None] if numbers else np.eye(3)[labels]
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
    if numbers:
        np.testing.assert_allclose(result.predictions["predicted"], np.array(refits)[:, 0], rtol=1e-3, atol=1e-3)
    else:
        logits = result.predictions["logits"]
        assert np.corrcoef(logits.ravel(), np.ravel(refits))[0, 1] > 1 - 1e-6
        assert result.predictions["predicted"].tolist() == np.argmax(refits, axis=1).tolist()


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
        assert torch.cosine_similarity(one, other, dim=0) > 0.98
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


TRUSTING = ScoringRule(terms=(*PAPER_TERMS, "reducible_loss"), gate="surest")


@pytest.mark.parametrize("before_end", [None, 0, 3, 50, 104, 107, 110])
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
    run = partial(tsq.score, model, rows, counted, rule=TRUSTING, compute=Compute(16), trusted=Trusted(trusted, 1e-3))
    scores = run()
    assert scores.record.head_start["replaced"]
    assert_unchanged(before, model)
    if before_end is not None:
        calls, breaks = 0, calls - before_end
        with pytest.raises(Breaks):
            run()
        assert_unchanged(before, model)


def test_two_rows_are_too_few_to_fit_a_head_in_folds() -> None:
    assert looked(wrapped(), learnable(2)).head is None


# --- wrong labels beside trusted rows -----------------------------------------------------


@pytest.mark.parametrize(
    ("agree", "reject", "dropped"),
    [(True, None, True), (False, None, False), (False, True, True), (True, False, False)],
)
def test_wrong_labels_are_dropped_where_trusted_rows_agree_with_the_pool(
    agree: bool, reject: bool | None, dropped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fit on the pool judges them; trusted rows that contradict it say that it cannot, unless `reject` is set."""
    rows = learnable(300)
    wrong = np.arange(300) % 5 == 0
    # The features of so small a model are no evidence.
    monkeypatch.setattr("tsqlora.quality.look.reject", lambda *seen, frozen: (wrong, reject_of(*seen)[1]))
    pool = [shifted([row])[0] if is_wrong else row for row, is_wrong in zip(rows, wrong, strict=True)]
    trusted = learnable(60, seed=1)
    rule = ScoringRule(reject=reject)
    scores = looked(wrapped(), pool, rule=rule, trusted=Trusted(trusted if agree else shifted(trusted))).scores
    assert scores is not None
    assert scores.record.agreement is not None
    assert scores.record.agreement["agrees"] == agree
    left_out = scores.left_out_as("confident negative")
    assert np.array_equal(left_out, wrong & dropped)


def with_label(rows: Rows, at: int, label: float) -> Rows:
    return [row | {"labels": label} if j == at else row for j, row in enumerate(rows)]


@pytest.mark.parametrize("at", [1, 90])
@pytest.mark.parametrize("label", [-100, 3, float("nan")])
def test_a_label_that_the_loss_cannot_use_is_named_with_its_row(at: int, label: float) -> None:
    model, rows = (wrapped(), learnable(100)) if label in (-100, 3) else (of_numbers(), with_numbers(learnable(100)))
    task = CLASSES if label in (-100, 3) else NUMBERS
    wrong = with_label(rows, at, label)
    with pytest.raises(DataError, match=f"^row {at} has the label {label}"):
        tsq.score(model, wrong, collate)
    if at == 1:
        with pytest.raises(DataError, match=f"^row 1 has the label {label}"):
            require_scorable(model, wrong[:2], collate, task=task, rule=ScoringRule())
    with pytest.raises(DataError, match=f"^row {at + 7} has the label {label}"):
        start_head(model, LookRequest(dataset=wrong, collate=collate, task=task, rows=RowNames(ids=np.arange(100) + 7)))
    with pytest.raises(DataError, match=f"^trusted row {at} has the label {label}"):
        start_head(model, LookRequest(dataset=rows, collate=collate, task=task, trusted=Trusted(wrong)))
