from typing import Any, cast

import pytest
import torch
from peft import PeftModel
from transformers import T5ForConditionalGeneration

import tsqlora as tsq
from models import collate, generating, tiny_t5
from setups import base, build, make_setup
from stock import moods
from tsqlora.adapter.slots import layers_of
from tsqlora.baselines.eva import CountedForward, batches_of
from tsqlora.errors import SettingsError, UnsupportedError
from tsqlora.gradients.sites import inner_name

POOLER = "bert.pooler.dense"


def test_ranks_sum_to_those_of_uniform_lora_and_end_at_the_largest() -> None:
    free = build("eva", max_rank=8).ranks()
    assert sum(free.values()) == 4 * 7
    assert 4 < max(free.values()) <= 8
    assert set(build("eva", max_rank=4).ranks().values()) == {4}


def test_a_is_of_orthonormal_directions_and_both_matrices_train() -> None:
    model = cast(PeftModel, build("eva").model)
    for layer in layers_of(model).values():
        a, b = (cast(Any, part["default"]).weight for part in (layer.lora_A, layer.lora_B))
        torch.testing.assert_close(a @ a.T, torch.eye(len(a)), rtol=0, atol=1e-4)
        assert not b.any()
        assert a.requires_grad
        assert b.requires_grad


def test_the_poolers_first_direction_is_that_of_its_own_inputs() -> None:
    setup = make_setup(max_rank=4, samples=moods(64))
    model = base().eval()
    with torch.no_grad():
        first = torch.cat([model.bert(**batch).last_hidden_state[:, 0] for batch in batches_of(setup)]).double()
    expected = torch.linalg.svd(first - first.mean(0)).Vh[0]
    built = build("eva", max_rank=4, samples=moods(64))
    result = cast(Any, layers_of(cast(PeftModel, built.model))[POOLER]).lora_A["default"].weight[0].detach().double()
    assert abs(float(expected @ result)) > 0.98


def test_batches_have_a_row_for_each_direction_and_no_labels() -> None:
    batches = batches_of(make_setup(batch_size=2, max_rank=8))
    assert [len(batch["input_ids"]) for batch in batches] == [8] * 8
    assert all("labels" not in batch for batch in batches)
    shown = sorted(row.tolist() for batch in batches for row in batch["input_ids"].sum(1)[:, None])
    assert shown == sorted([sum(row["input_ids"])] for row in moods())


def test_modes_and_base_weights_are_as_before() -> None:
    model = base()
    modes = [m.training for m in model.modules()]
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    built = build("eva", model)
    after = {inner_name(n).replace(".base_layer", ""): p for n, p in built.model.named_parameters()}
    assert all(torch.equal(before[n], after[n]) for n in before if "classifier" not in n)
    assert built.model.training
    assert all(modes)


@pytest.mark.parametrize(
    ("changes", "error", "named"),
    [
        ({"samples": moods(6)}, SettingsError, "8 rows .* 6; .*ranks.max"),
        ({"max_rank": 3}, SettingsError, "ranks.max is 3"),
        ({"target_modules": ["word_embeddings", "query"]}, UnsupportedError, "bert.embeddings.word_embeddings"),
    ],
)
def test_what_has_no_directions_is_refused_by_name(changes: dict[str, Any], error: Any, named: str) -> None:
    with pytest.raises(error, match=named):
        build("eva", **changes)


def test_an_encoder_with_a_decoder_is_refused_by_name() -> None:
    model = generating(T5ForConditionalGeneration, tiny_t5(dtype=torch.float32))
    with pytest.raises(UnsupportedError, match="T5ForConditionalGeneration"):
        build("eva", model)


def test_directions_that_never_settle_are_an_error() -> None:
    forward = CountedForward(1)
    batch = {name: value for name, value in collate(moods(4)).items() if name != "labels"}
    forward(base(), batch)
    with pytest.raises(tsq.TsqLoraError, match="EVA"):
        forward(base(), batch)


def test_passes_that_building_takes_are_counted_and_padding_is_none_of_their_tokens() -> None:
    model, masks = base(), list[torch.Tensor]()
    hook = lambda module, args, kwargs: masks.append(kwargs["attention_mask"])  # noqa: E731
    model.bert.register_forward_pre_hook(hook, with_kwargs=True)
    cost = build("eva", model).cost
    assert cost.forward == sum(map(len, masks)) >= 64
    assert cost.tokens == sum(int(mask.sum()) for mask in masks)
    assert (cost.backward, build("lora").cost.forward) == (0, 0)
