"""The head start on a model: what is found, fitted and installed, and what it must not depend on."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import tsqlora as tsq
from models import collate, samples, tiny_bert, tiny_llama_classifier
from tsqlora.quality.features import find_head
from tsqlora.quality.look import start_head
from tsqlora.tasks import get_task
from tsqlora.tasks.forward import model_logits, split_labels

CLASSES = get_task("sequence-classification")


def learnable(n: int = 200) -> list[dict[str, Any]]:
    """Rows whose class is which of three tokens stands in them most."""
    rows = samples(n, 3)
    for row in rows:
        row["input_ids"][: len(row["input_ids"]) // 2 + 1] = [10 + row["labels"]] * (len(row["input_ids"]) // 2 + 1)
    return rows


def wrapped(seed: int = 0) -> nn.Module:
    return tsq.wrap(tiny_bert(seed=seed).float(), mean_rank=2)


def losses(model: nn.Module, rows: list[dict[str, Any]], task: Any = CLASSES) -> torch.Tensor:
    inputs, labels = split_labels(collate(rows), model)
    with torch.no_grad():
        return task.loss(model_logits(model.eval(), inputs, task), labels)


def head_of(model: nn.Module) -> torch.Tensor:
    inputs, _ = split_labels(collate(samples(4, 3)), model)
    head = find_head(model.eval(), lambda: model_logits(model, inputs, CLASSES))
    assert head is not None
    return head.linear.weight.detach().clone()


def test_the_first_step_starts_at_the_out_of_fold_loss() -> None:
    model, rows = wrapped(), learnable()
    before = losses(model, rows).mean()
    start = start_head(model, rows, collate, task=CLASSES)
    assert start is not None
    assert start.replaces
    after = float(losses(model, rows).mean())
    assert after == pytest.approx(start.fit.loss, rel=0.05)
    assert after < 0.7 * float(before)


def test_only_the_head_changes() -> None:
    model = wrapped()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state, modes = torch.get_rng_state(), [module.training for module in model.modules()]
    start_head(model, learnable(), collate, task=CLASSES)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed
    assert all("classifier" in name for name in changed)
    assert torch.equal(torch.get_rng_state(), state)
    assert modes == [module.training for module in model.modules()]


@pytest.mark.parametrize("how", ["batches", "padding", "lengths"])
def test_the_head_does_not_depend_on(how: str) -> None:
    rows, fitted = learnable(60), []
    options: list[dict[str, Any]] = [{}, {}]
    if how == "batches":
        options[1] = {"batch_size": 7}
    if how == "lengths":
        options[1] = {"lengths": [1] * 60}
    for number, option in enumerate(options):
        model = wrapped()
        padded = (lambda batch: collate(batch, pad_to=30)) if how == "padding" and number else collate
        start_head(model, rows, padded, task=CLASSES, **option)
        fitted.append(head_of(model))
    torch.testing.assert_close(*fitted, rtol=2e-2, atol=2e-2)


def test_a_head_that_is_trained_already_stays() -> None:
    model, rows = wrapped(), learnable()
    start_head(model, rows, collate, task=CLASSES)
    inputs, labels = split_labels(collate(rows), model)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(60):
        CLASSES.loss(model_logits(model.eval(), inputs, CLASSES), labels).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    trained = head_of(model)
    start = start_head(model, rows, collate, task=CLASSES)
    assert start is not None
    assert not start.replaces
    assert torch.equal(head_of(model), trained)


def test_a_decoder_without_a_bias() -> None:
    model, rows = tsq.wrap(tiny_llama_classifier().float(), mean_rank=2), learnable()
    start = start_head(model, rows, collate, task=CLASSES)
    assert start is not None
    assert start.replaces
    assert float(losses(model, rows).mean()) == pytest.approx(start.fit.loss, rel=0.05)


def test_numbers() -> None:
    rows = learnable()
    for row in rows:
        row["labels"] = 2.0 * row["labels"] + 1
    model = tsq.wrap(tiny_bert(num_labels=1, problem_type="regression").float(), mean_rank=2)
    task = get_task("regression")
    before = losses(model, rows, task).mean()
    start = start_head(model, rows, collate, task=task)
    assert start is not None
    assert start.replaces
    assert float(losses(model, rows, task).mean()) < 0.5 * float(before)


def test_text_and_frozen_heads_have_none() -> None:
    assert start_head(nn.Linear(1, 1), [], collate, task=get_task("causal-lm")) is None
    assert start_head(tiny_bert().float().requires_grad_(False), samples(8, 3), collate, task=CLASSES) is None


def test_rows_that_say_nothing_leave_the_head_random() -> None:
    model, rows = wrapped(), samples(60, 3)
    rng = np.random.default_rng(0)
    for row in rows:
        row["labels"] = int(rng.integers(3))
    twin = copy.deepcopy(model)
    with torch.no_grad():  # a head that says each class is equally likely
        for module in (model, twin):
            for name, parameter in module.named_parameters():
                if "classifier" in name:
                    parameter.zero_()
    start = start_head(model, rows, collate, task=CLASSES)
    assert start is not None
    assert not start.replaces
