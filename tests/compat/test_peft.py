"""What we rely on in PEFT beyond its documentation: a failure here says which interface has changed."""

from typing import Any, cast

import torch
from peft import AdaLoraConfig, PeftModel

from setups import build
from tsqlora.baselines.svd import config_of
from tsqlora.compat.peft import allocate_triplets, chosen_triplets, eva_layer_inputs


def test_the_allocator_says_when_it_chose_and_how_many_triplets_are_kept() -> None:
    model = cast(PeftModel, build("adalora").model)  # tinit 5, every 10 steps, final at 34 of 48
    config = config_of(model)
    assert chosen_triplets(config) == {}
    generator, chosen = torch.Generator().manual_seed(0), list[int]()
    for step in range(36):
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.randn(parameter.shape, generator=generator)
        if allocate_triplets(model, config, step):
            chosen.append(step)
    assert chosen == [10, 20, 30, 34]
    kept = chosen_triplets(config)
    assert sum(kept.values()) == 4 * 7
    assert "bert.pooler.dense" in kept


def test_the_penalty_is_read_from_the_config_in_every_forward_pass() -> None:
    model = cast(PeftModel, build("adalora").model)
    batch: dict[str, Any] = {"input_ids": torch.ones(2, 3, dtype=torch.long), "labels": torch.tensor([0, 1])}

    def loss(weight: float) -> float:
        cast(AdaLoraConfig, config_of(model)).orth_reg_weight = weight
        return float(model.eval()(**batch).loss.detach())

    assert loss(0.0) < loss(0.5) < loss(1.0)


def test_eva_reads_tokens_that_are_not_padding_and_all_rows_of_a_pooler() -> None:
    hidden = torch.arange(12.0).view(2, 3, 2)
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]]).nonzero()
    assert torch.equal(eva_layer_inputs((hidden,), mask, "x"), hidden.view(6, 2)[:4])
    assert torch.equal(eva_layer_inputs((hidden[:, 0],), mask, "x"), hidden[:, 0])
