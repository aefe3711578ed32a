"""What we rely on in PEFT beyond its documentation: a failure here says which interface has changed."""

from typing import Any

import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer

from models import collate, samples, tiny_bert
from tsqlora import paper
from tsqlora.libs.peft import VARIANTS, forget_adapter, has_variant, lora_matrices, places_of, without_zero_updates
from tsqlora.paper.sites import lora_layers
from tsqlora.paper.slots import find_slots

EMBEDDING, QUERY = "bert.embeddings.word_embeddings", "bert.encoder.layer.0.attention.self.query"


def layers_of(**options: Any) -> dict[str, LoraLayer]:
    config = LoraConfig(r=3, target_modules=[EMBEDDING, QUERY], **options)
    model = get_peft_model(tiny_bert(dtype=torch.float32), config)
    return {name: model.get_base_model().get_submodule(name) for name in (EMBEDDING, QUERY)}  # type: ignore[misc]


@pytest.mark.parametrize("name", [EMBEDDING, QUERY])
def test_a_and_b_are_where_they_are_looked_for_and_make_the_update(name: str) -> None:
    """`lora_A` and `lora_B` are linear layers by adapter; `lora_embedding_A` and `_B` parameters by adapter."""
    layer: Any = layers_of(init_lora_weights=False)[name]
    a, b = lora_matrices(layer, "default")
    update = layer.scaling["default"] * b @ a
    torch.testing.assert_close(layer.get_delta_weight("default"), update.T if name == EMBEDDING else update)
    for (holder, tensor, path), matrix in zip(places_of(layer, "default"), (a, b), strict=True):
        assert getattr(holder, tensor) is matrix
        assert layer.get_submodule(path) is holder


def test_variants_are_marked_in_the_config_and_in_their_layers() -> None:
    """`metadata["is_lora_variant"]` of LoraConfig's fields; `lora_variant` and `lora_bias` of LoraLayer."""
    assert "use_dora" in VARIANTS
    assert not has_variant(layers_of()[QUERY])
    assert has_variant(layers_of(use_dora=True)[QUERY])
    model = get_peft_model(tiny_bert(dtype=torch.float32), LoraConfig(target_modules=[QUERY], lora_bias=True))
    assert has_variant(model.get_base_model().get_submodule(QUERY))  # type: ignore[arg-type]


def test_a_layer_forgets_an_adapter() -> None:
    """`adapter_layer_names` and `other_param_names` name all that a layer keeps by adapter."""
    layer: Any = layers_of()[QUERY]
    x = torch.randn(2, layer.in_features)
    forget_adapter(layer, "default")
    assert "default" not in {*layer.r, *layer.lora_A, *layer.scaling, *layer.lora_dropout}
    assert torch.equal(layer(x), layer.get_base_layer()(x))


def test_layers_that_add_nothing_are_left_out_and_come_back() -> None:
    model, rows = paper.wrap(tiny_bert().float(), mean_rank=2).eval(), collate(samples(4, 3))
    del rows["labels"]
    layers = list(lora_layers(model).values())
    with torch.no_grad():
        before = model(**rows).logits
        with without_zero_updates(model):
            assert all(layer.disable_adapters for layer in layers)
            assert torch.equal(model(**rows).logits, before)
        assert not any(layer.disable_adapters for layer in layers)
        first = next(iter(find_slots(model).values()))
        first.b[:, : first.rank] = 1.0
        moved = model(**rows).logits
        with without_zero_updates(model):
            assert torch.equal(model(**rows).logits, moved)
    assert not torch.equal(moved, before)


def test_adalora_adds_nothing_while_its_e_is_zero() -> None:
    config = AdaLoraConfig(target_modules=[QUERY], init_r=3, target_r=2, total_step=10)
    model = get_peft_model(tiny_bert(dtype=torch.float32), config)
    layer: Any = lora_layers(model)[QUERY]
    with without_zero_updates(model):
        assert layer.disable_adapters
    torch.nn.init.ones_(layer.lora_E["default"])
    with without_zero_updates(model):
        assert not layer.disable_adapters


def test_a_layer_that_lacks_the_active_adapter_adds_nothing() -> None:
    model = get_peft_model(tiny_bert(dtype=torch.float32), LoraConfig(r=2, target_modules=["query"]))
    model.add_adapter("second", LoraConfig(r=2, target_modules=["value"], init_lora_weights=False))
    model.set_adapter("second")
    with without_zero_updates(model):
        idle = {name.rpartition(".")[2] for name, layer in lora_layers(model).items() if layer.disable_adapters}
    assert idle == {"query"}
