"""The trusted model, a plain training that leaves the model unchanged; and gates."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tsqlora as tsq
from models import collate, samples, tiny_bert
from tsqlora.errors import SettingsError, TsqLoraError
from tsqlora.quality import trusted as trusted_module
from tsqlora.quality.rule import ScoringRule
from tsqlora.quality.trusted import GATES, Gate, Trusted, by_share, by_surest, left_out, trusted_model
from tsqlora.tasks import get_task
from tsqlora.tasks.forward import model_logits, split_labels

TASK = get_task("sequence-classification")


@pytest.fixture
def model() -> torch.nn.Module:
    return tsq.wrap(tiny_bert().float(), mean_rank=2)


def losses_of(model: torch.nn.Module, rows: list) -> torch.Tensor:
    inputs, labels = split_labels(collate(rows), model)
    with torch.no_grad():
        return TASK.loss(model_logits(model, inputs, TASK), labels)


@pytest.fixture(autouse=True)
def _few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trusted_module, "STEPS", 6)
    monkeypatch.setattr(trusted_module, "BATCH_SIZE", 8)


@pytest.mark.parametrize("at_once", [None, 3])
def test_it_is_a_plain_training_on_the_trusted_rows(model: torch.nn.Module, at_once: int | None) -> None:
    rows, pool = samples(20, 3, seed=0), samples(8, 3, seed=1)
    twin = copy.deepcopy(model).eval()
    optimizer = torch.optim.AdamW([p for p in twin.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
    rng = np.random.default_rng(0)
    order = np.concatenate([rng.permutation(20) for _ in range(3)])
    for step in range(6):
        optimizer.param_groups[0]["lr"] = 1e-2 * (1 - step / 6)
        inputs, labels = split_labels(collate([rows[j] for j in order[8 * step : 8 * step + 8]]), twin)
        TASK.loss(model_logits(twin, inputs, TASK), labels).mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    options = {"task": TASK, "at_once": at_once, "rng": np.random.default_rng(0)}
    sizes = list[int]()
    model.register_forward_pre_hook(lambda _, __, inputs: sizes.append(len(inputs["input_ids"])), with_kwargs=True)
    with trusted_model(model, Trusted(rows, 5e-3), collate, **options):
        assert max(sizes) == (at_once or 8)
        torch.testing.assert_close(losses_of(model, pool), losses_of(twin, pool))


def test_parts_of_a_batch_count_as_its_tokens_do(model: torch.nn.Module) -> None:
    labels = torch.tensor([[1, -100, -100], [0, 1, 1], [1, 1, -100]])
    task, losses = get_task("token-classification"), torch.tensor([0.5, 2.0, 1.0])
    training = trusted_module._Training(
        model, Trusted([0, 1, 2]), lambda rows: {"labels": labels[rows]}, task, 2, None, np.random.default_rng(0)
    )
    first, second = training._shares(np.arange(3))
    parts = first * task.batch_loss(losses[:2], labels[:2]) + second * task.batch_loss(losses[2:], labels[2:])
    torch.testing.assert_close(parts, task.batch_loss(losses, labels))


@pytest.mark.parametrize("fails", [False, True])
def test_everything_is_put_back(model: torch.nn.Module, fails: bool) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.ones_like(parameter)
    grads = [parameter.grad for parameter in model.parameters()]
    state = torch.get_rng_state()
    trusted = Trusted(samples(20, 3), 1e30 if fails else 1e-2)
    try:
        with trusted_model(model, trusted, collate, task=TASK, rng=np.random.default_rng(0)):
            assert any(not torch.equal(value, before[name]) for name, value in model.state_dict().items())
    except TsqLoraError:
        assert fails
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert modes == [module.training for module in model.modules()]
    assert all(a is b for a, b in zip(grads, [p.grad for p in model.parameters()], strict=True))
    assert torch.equal(torch.get_rng_state(), state)


def test_a_label_passes_if_it_is_at_least_as_likely_as_its_share_of_the_trusted_rows() -> None:
    likelihood = np.array([0.8, 0.7, 0.3, 0.2, 0.001])
    margin = by_share(-np.log(likelihood), np.array([0, 0, 1, 1, 2]), np.array([0, 0, 0, 1]), True)
    # Shares 3/4 and 1/4; nothing is trusted of class 2, so that its row is not judged.
    np.testing.assert_allclose(margin[:4], np.log(likelihood[:4] / [0.75, 0.75, 0.25, 0.25]))
    assert margin[4] == np.inf


def test_a_number_passes_if_its_squared_error_is_at_most_the_trusted_rows_variance() -> None:
    margin = by_share(np.array([0.9, 1.0, 1.1]), np.zeros(3), np.array([1.0, 3.0]), False)
    np.testing.assert_allclose(margin, [0.1, 0.0, -0.1])


@pytest.mark.parametrize("classes", [True, False])
def test_the_surest_fifth_does_not_pass_but_for_classes_without_a_trusted_row(classes: bool) -> None:
    losses, labels = np.arange(10.0), np.array([0] * 9 + [1])
    out = by_surest(losses, labels, np.array([0, 0]), classes) < 0
    assert np.flatnonzero(out).tolist() == ([8] if classes else [8, 9])


def test_of_too_few_rows_the_nearest_to_passing_follow() -> None:
    margin = np.array([1.0, -2.0, -1.0, -3.0, np.inf])
    assert [np.flatnonzero(left_out(margin, least)).tolist() for least in (2, 3, 4, 5)] == [[1, 2, 3], [1, 3], [3], []]


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=30), st.data())
def test_enough_rows_are_left_and_no_row_leaves_before_one_farther_below(
    margins: list[float], data: st.DataObject
) -> None:
    margin, least = np.array(margins), data.draw(st.integers(0, len(margins)))
    out = left_out(margin, least)
    assert (~out).sum() >= least
    assert not out[margin >= 0].any()
    if out.any() and (~out).sum() > max(least, (margin >= 0).sum()):
        pytest.fail("more rows are left than pass or are needed")
    assert not out.any() or margin[out].max() <= margin[~out].min(initial=np.inf)


@pytest.mark.parametrize("gate", GATES)
def test_a_gate_without_trusted_rows_is_refused(gate: Gate) -> None:
    with pytest.raises(SettingsError, match=gate):
        ScoringRule(gate=gate).require_trusted(False)
