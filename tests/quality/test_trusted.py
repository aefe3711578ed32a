"""The trusted model: a plain training on trusted rows, of which nothing stays."""

import copy

import numpy as np
import pytest
import torch

import tsqlora as tsq
from models import collate, samples, tiny_bert
from tsqlora.errors import TsqLoraError
from tsqlora.quality.trusted import trusted_model
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


def test_it_is_a_plain_training_on_the_trusted_rows(model: torch.nn.Module) -> None:
    rows, pool = samples(20, 3, seed=0), samples(8, 3, seed=1)
    twin = copy.deepcopy(model).eval()
    optimizer = torch.optim.AdamW([p for p in twin.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
    rng = np.random.default_rng(0)
    order = np.concatenate([rng.permutation(20) for _ in range(3)])
    for step in range(6):
        inputs, labels = split_labels(collate([rows[j] for j in order[8 * step : 8 * step + 8]]), twin)
        TASK.loss(model_logits(twin, inputs, TASK), labels).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    options = {"task": TASK, "learning_rate": 1e-2, "steps": 6, "batch_size": 8, "rng": np.random.default_rng(0)}
    with trusted_model(model, rows, collate, **options):
        torch.testing.assert_close(losses_of(model, pool), losses_of(twin, pool))


@pytest.mark.parametrize("fails", [False, True])
def test_everything_is_put_back(model: torch.nn.Module, fails: bool) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.ones_like(parameter)
    grads = [parameter.grad for parameter in model.parameters()]
    state = torch.get_rng_state()
    rate = 1e30 if fails else 1e-2
    options = {"task": TASK, "learning_rate": rate, "steps": 3, "rng": np.random.default_rng(0)}
    try:
        with trusted_model(model, samples(20, 3), collate, **options):
            assert any(not torch.equal(value, before[name]) for name, value in model.state_dict().items())
    except TsqLoraError:
        assert fails
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert modes == [module.training for module in model.modules()]
    assert all(a is b for a, b in zip(grads, [p.grad for p in model.parameters()], strict=True))
    assert torch.equal(torch.get_rng_state(), state)
