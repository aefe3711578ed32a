"""No randomness inside, everything as it was afterwards."""

import random

import numpy as np
import pytest
import torch
from torch import nn

from models import collate, samples, tiny_bert
from tsqlora.model.eval_mode import eval_mode


def modes(model: nn.Module) -> list[bool]:
    return [module.training for module in model.modules()]


def draws() -> tuple[float, float, float]:
    return float(torch.rand(1)), float(np.random.rand()), random.random()


@pytest.mark.parametrize("fails", [False, True])
def test_modes_and_generators_go_on_as_if_nothing_was_drawn(fails: bool) -> None:
    model = tiny_bert()
    for j, module in enumerate(model.modules()):
        module.training = j % 2 == 0
    before = modes(model)
    states = torch.random.get_rng_state(), np.random.get_state(), random.getstate()
    expected = draws()
    torch.random.set_rng_state(states[0])
    np.random.set_state(states[1])
    random.setstate(states[2])
    try:
        with eval_mode(model):
            assert not any(modes(model))
            draws()
            if fails:
                raise KeyError
    except KeyError:
        assert fails
    assert modes(model) == before
    assert draws() == expected


def test_checkpointed_layers_stay_in_training_without_dropout() -> None:
    model = tiny_bert()
    batch = collate(samples(4, 3))
    for layer in model.bert.encoder.layer:
        layer.gradient_checkpointing = True
        layer.own_dropout = 0.5
    with eval_mode(model):
        trains = [module for module in model.modules() if module.training]
        assert trains == list(model.bert.encoder.layer)
        assert [layer.own_dropout for layer in trains] == [0.0, 0.0]
        assert not any(m.training for m in model.modules() if isinstance(m, nn.Dropout))
    assert [layer.own_dropout for layer in model.bert.encoder.layer] == [0.5, 0.5]
    for layer in model.bert.encoder.layer:
        layer.gradient_checkpointing = False
    with eval_mode(model), torch.no_grad():
        assert torch.equal(model(**batch).logits, model(**batch).logits)
