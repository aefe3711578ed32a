"""The trusted model of pairs, a plain training that leaves the model unchanged; and which rows are left out by it."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tsqlora as tsq
from models import collate, samples, tiny_bert
from tsqlora.errors import TsqLoraError
from tsqlora.quality import trusted as trusted_module
from tsqlora.quality.trusted import RATES, Trusted, left_out, trusted_model
from tsqlora.tasks import get_task
from tsqlora.tasks.forward import split_labels

TASK = get_task("sequence-classification")


@pytest.fixture
def model() -> torch.nn.Module:
    return tsq.wrap(tiny_bert().float(), mean_rank=2)


def losses_of(model: torch.nn.Module, rows: list) -> torch.Tensor:
    inputs, labels = split_labels(collate(rows), model)
    with torch.no_grad():
        return TASK.loss(TASK.reading.logits(model, inputs), labels)


@pytest.fixture(autouse=True)
def _few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trusted_module, "STEPS", 6)


@pytest.mark.parametrize(("at_once", "rate", "best"), [(None, 5e-3, 0), (3, 5e-3, 0), (None, 0.05, 2)])
def test_it_is_a_plain_training_at_the_rate_that_is_best_on_held_out_rows(
    model: torch.nn.Module, at_once: int | None, rate: float, best: int
) -> None:
    rows, pool, rng = samples(20, 3, seed=0), samples(8, 3, seed=1), np.random.default_rng(0)
    held_out, rest = ([rows[j] for j in part] for part in np.split(rng.permutation(20), [4]))
    twins = [copy.deepcopy(model).eval() for _ in RATES]
    for twin, factor in zip(twins, RATES, strict=True):
        optimizer = torch.optim.AdamW([p for p in twin.parameters() if p.requires_grad], weight_decay=0.0)
        order = np.concatenate([rng.permutation(16) for _ in range(3)])
        for step in range(6):
            optimizer.param_groups[0]["lr"] = factor * rate * (1 - step / 6)
            inputs, labels = split_labels(collate([rest[j] for j in order[8 * step : 8 * step + 8]]), twin)
            TASK.loss(TASK.reading.logits(twin, inputs), labels).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    of_rates = [float(losses_of(twin, held_out).mean()) for twin in twins]
    stops = next((j + 1 for j in range(2) if of_rates[j + 1] > of_rates[j]), 2)  # a lower rate was no better
    best = int(np.argmin(of_rates[: stops + 1]))

    options = {"task": TASK, "at_once": at_once, "rng": np.random.default_rng(0)}
    sizes = list[int]()
    model.register_forward_pre_hook(lambda _, __, inputs: sizes.append(len(inputs["input_ids"])), with_kwargs=True)
    with trusted_model(model, Trusted(rows, rate, 8), collate, **options) as lesson:
        assert max(sizes) == (at_once or 8)
        assert lesson.teaches
        torch.testing.assert_close(losses_of(model, pool), losses_of(twins[best], pool), rtol=1e-4, atol=1e-5)


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
    try:
        with trusted_model(model, Trusted(samples(20, 3), 5e-3), collate, task=TASK, rng=np.random.default_rng(0)):
            assert any(not torch.equal(value, before[name]) for name, value in model.state_dict().items())
            if fails:
                raise TsqLoraError("in between")
    except TsqLoraError:
        assert fails
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert modes == [module.training for module in model.modules()]
    assert all(a is b for a, b in zip(grads, [p.grad for p in model.parameters()], strict=True))
    assert torch.equal(torch.get_rng_state(), state)


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
