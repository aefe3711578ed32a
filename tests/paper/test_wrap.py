from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import AdaLoraConfig, LoHaConfig, LoraConfig, PeftModel, TaskType, get_peft_model, inject_adapter_in_model
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification

import tsqlora as tsq
from models import samples, tiny_bert
from scoring import logits_of
from slotted import POOLER, QUERY, WIDE, assert_hidden_are_zero, resize, take_steps, trained, wrapped
from tsqlora import paper
from tsqlora.paper.budget import budget, used
from tsqlora.paper.sites import lora_layers
from tsqlora.paper.slots import find_slots

ROWS = samples(5, 3)


def layer_shapes(model: nn.Module) -> dict[str, tuple[int, int]]:
    return {name: slots.shape for name, slots in find_slots(model).items()}


def test_ranks_are_uniform_at_an_integer_mean_within_a_layers_size() -> None:
    model = paper.wrap(tiny_bert(), mean_rank=5)
    assert set(paper.active_ranks(model).values()) == {5}
    assert {slots.capacity for slots in find_slots(model).values()} == {10}
    narrow = paper.wrap(nn.Sequential(nn.Linear(12, 3), nn.Linear(3, 12)), mean_rank=5, target_modules=["0", "1"])
    assert set(paper.active_ranks(narrow).values()) == {3}


@settings(max_examples=15)
@given(mean=st.floats(0.2, 7.9))
def test_a_fractional_mean_spends_its_budget_on_the_integers_next_to_it(mean: float) -> None:
    sizes = ((16, 16), (16, 40), (40, 9), (9, 20))
    layers = nn.Sequential(*(nn.Linear(*size) for size in sizes))
    model = paper.wrap(layers, mean_rank=mean, max_rank=8, target_modules=["0", "1", "2", "3"])
    ranks, shapes = paper.active_ranks(model), layer_shapes(model)
    whole = int(mean)
    assert set(ranks.values()) <= {whole, whole + 1}
    left = budget(mean, shapes) - used(ranks, shapes)
    assert left >= 0
    assert all(left < sum(shapes[name]) for name, rank in ranks.items() if rank < 8)


@pytest.mark.parametrize(("options", "scale"), [({}, 2), ({"mean_rank": 2.5, "alpha": 3}, 1.2)])
def test_the_scale_is_alpha_over_the_mean_in_every_layer(options: dict[str, float], scale: float) -> None:
    model = paper.wrap(tiny_bert(), **options)  # type: ignore[arg-type]
    assert {slots.scale for slots in find_slots(model).values()} == {scale}


def test_a_fresh_model_computes_what_its_base_does() -> None:
    base = tiny_bert().eval()
    before = logits_of(base, ROWS)
    assert torch.equal(logits_of(paper.wrap(base), ROWS), before)


def test_the_head_of_a_classifier_and_modules_to_save_train_whole() -> None:
    model = paper.wrap(tiny_bert(), mean_rank=2, modules_to_save=[POOLER])
    others = {name for name, p in model.named_parameters() if p.requires_grad and "lora_" not in name}
    whole = [f"base_model.model.{name}.modules_to_save.default" for name in ("classifier", POOLER)]
    assert others == {f"{name}.{part}" for name in whole for part in ("weight", "bias")}
    assert POOLER not in paper.active_ranks(model)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"target_modules": ["kwery"]}, r"^adapter\.target_modules kwery: "),
        ({"model": nn.Sequential(nn.ReLU())}, r"^adapter\.target_modules all-linear: "),
        ({"mean_rank": -1}, "ranks.mean is -1"),
        ({"mean_rank": 9, "max_rank": 8}, "mean rank is 9.*ranks.max is 8"),
        ({"mean_rank": 0.001}, "every layer is at rank 0"),
    ],
)
def test_bad_options_are_refused_by_name(options: dict[str, Any], text: str) -> None:
    with pytest.raises(tsq.SettingsError, match=text):
        paper.wrap(**{"model": tiny_bert()} | options)


def test_active_parameters_are_those_of_plain_lora_of_the_same_ranks() -> None:
    for mean in (2, 2.5):
        model = wrapped(mean_rank=mean)
        head = 16 * 3 + 3
        assert paper.active_parameters(model) == used(paper.active_ranks(model), layer_shapes(model)) + head
    plain = paper.finalize(wrapped(mean_rank=2))
    assert paper.active_parameters(plain) == plain.get_nb_trainable_parameters()[0]
    assert paper.active_parameters(nn.Linear(3, 2)) == 8
    model = wrapped(mean_rank=2)
    before = paper.active_parameters(model)
    find_slots(model)[POOLER].a.requires_grad_(False)
    assert paper.active_parameters(model) == before - 2 * 16


# --- a model that has an adapter ----------------------------------------------------------


def with_lora(**options: Any) -> PeftModel:
    """PEFT's own, trained a little: B is not zero."""
    torch.manual_seed(0)
    model = get_peft_model(
        tiny_bert(), LoraConfig(**{"r": 3, "lora_alpha": 7, "target_modules": "all-linear"} | options)
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return model.double().eval()


def lora_updates(model: nn.Module) -> dict[str, Tensor]:
    return {name: layer.get_delta_weight("default").detach().clone() for name, layer in lora_layers(model).items()}


@pytest.mark.parametrize(
    "options", [{}, {"use_rslora": True}, {"rank_pattern": {"query": 5}, "alpha_pattern": {"query": 35 / 3}}]
)
def test_slots_are_put_on_an_adapter_that_is_there_and_change_nothing(options: dict[str, Any]) -> None:
    model = with_lora(**options)
    ranks = {name: layer.r["default"] for name, layer in lora_layers(model).items()}
    scales = {name: layer.scaling["default"] for name, layer in lora_layers(model).items()}
    before, deltas, state = logits_of(model, ROWS), lora_updates(model), model.state_dict()
    parameters = {id(p) for p in model.parameters()}
    assert paper.wrap(model, max_rank=9) is model
    assert paper.active_ranks(model) == ranks
    assert {name: slots.scale for name, slots in find_slots(model).items()} == scales
    assert {slots.capacity for slots in find_slots(model).values()} == {9}
    assert torch.equal(logits_of(model, ROWS), before)
    assert all(torch.equal(delta, deltas[name]) for name, delta in lora_updates(model).items())
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert {id(p) for p in model.parameters()} == parameters  # an optimizer made before still trains them
    assert_hidden_are_zero(model)


@pytest.mark.parametrize(("ranks", "capacity"), [({}, 6), ({"query": 5}, 7), ({"query": 20}, 20)])
def test_the_capacity_is_twice_the_mean_rank_and_holds_the_largest(ranks: dict[str, int], capacity: int) -> None:
    model = paper.wrap(with_lora(rank_pattern=ranks, alpha_pattern={name: 7 / 3 * r for name, r in ranks.items()}))
    assert {slots.capacity for slots in find_slots(model).values()} == {capacity}


def test_an_adapter_keeps_its_scale_whatever_the_ranks_also_in_plain_peft(tmp_path: Path) -> None:
    model = paper.wrap(with_lora(r=5, lora_alpha=8, use_rslora=True, task_type=TaskType.SEQ_CLS))
    take_steps(model, torch.optim.AdamW(trained(model), lr=0.01), 1)
    resize(model, {QUERY: 9, WIDE: 1, POOLER: 0})
    scale = 8 / 5**0.5
    assert {slots.scale for slots in find_slots(model).values()} == {scale}
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_bert(), str(tmp_path)).double()
    assert all(x.scaling["default"] == pytest.approx(scale, rel=1e-15) for x in lora_layers(loaded).values())
    torch.testing.assert_close(logits_of(loaded, ROWS), logits_of(model, ROWS), rtol=1e-12, atol=1e-12)


def test_how_the_adapters_first_values_came_about_does_not_matter(tmp_path: Path) -> None:
    for init in (False, "gaussian"):
        paper.wrap(with_lora(init_lora_weights=init))
    model = paper.wrap(with_lora(r=4, init_lora_weights="orthogonal"))
    resize(model, {QUERY: 3})  # PEFT's orthogonal values need an even rank
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_bert(), str(tmp_path)).double()
    torch.testing.assert_close(logits_of(loaded, ROWS), logits_of(model, ROWS), rtol=1e-12, atol=1e-12)


def test_a_finalised_model_can_be_wrapped_again() -> None:
    model = wrapped(ranks={QUERY: 2, WIDE: 0})
    ranks, before = paper.active_ranks(model), logits_of(model, ROWS)
    again = paper.wrap(paper.finalize(model))
    assert paper.active_ranks(again) == {name: rank for name, rank in ranks.items() if rank}
    assert torch.equal(logits_of(again, ROWS), before)


def with_two() -> PeftModel:
    model = with_lora()
    model.add_adapter("other", LoraConfig(target_modules=["query"]))
    return model


def with_setting(name: str, value: Any) -> PeftModel:
    model = with_lora()
    setattr(model.peft_config["default"], name, value)
    return model


def merged() -> PeftModel:
    model = with_lora()
    model.merge_adapter()
    return model


def frozen() -> PeftModel:
    model = merged()
    model.unmerge_adapter()
    return model.requires_grad_(False)


def with_layers_only() -> nn.Module:
    return inject_adapter_in_model(LoraConfig(target_modules=["query"]), tiny_bert())


@pytest.mark.parametrize(
    ("build", "text"),
    [
        (with_two, "ranks change in one adapter, but there are default, other; remove the others"),
        (merged, r"merged into the model; take it out first: model.unmerge_adapter\(\)"),
        (frozen, r"the adapter is frozen; load it with PeftModel.from_pretrained\(..., is_trainable=True\)"),
        (with_layers_only, "has adapter layers and is no PeftModel; make it with peft.get_peft_model"),
        (wrapped, "the model has rank slots already; wrap it once"),
        (lambda: with_setting("use_dora", True), r"LoraConfig\(use_dora=…\) is not supported.*leave it out"),
        (lambda: with_setting("layer_replication", [(0, 1)]), r"LoraConfig\(layer_replication=…\) is not supported"),
        (lambda: with_setting("init_lora_weights", "pissa_niter_4"), "depends on the rank or on the base weights"),
        (lambda: with_lora(rank_pattern={"query": 4}), r"scale lora_alpha / r is 1.75 in .*query and 2.33333 in .*key"),
        (lambda: get_peft_model(tiny_bert(), LoHaConfig(target_modules=["query"])), "the adapter is LOHA, and ranks"),
        (
            lambda: get_peft_model(tiny_bert(), AdaLoraConfig(target_modules=["query"], total_step=9)),
            "the adapter is ADALORA, and ranks change only in LoRA; use LoraConfig",
        ),
    ],
)
def test_an_adapter_that_is_not_one_plain_lora_of_one_scale_is_refused(build: Callable[[], Any], text: str) -> None:
    with pytest.raises(tsq.UnsupportedError, match=text):
        paper.wrap(build())


def test_an_adapters_own_settings_are_not_overridden() -> None:
    for options in ({"mean_rank": 4}, {"alpha": 4}):
        with pytest.raises(tsq.SettingsError, match=r"has an adapter.*max_rank"):
            paper.wrap(with_lora(), **options)  # type: ignore[arg-type]
    with pytest.raises(tsq.SettingsError, match=r"max_rank is 2, and .* has rank 3; raise max_rank"):
        paper.wrap(with_lora(), max_rank=2)


def saved_whole(model: PeftModel) -> set[str]:
    config = model.peft_config["default"]
    assert isinstance(config, LoraConfig)
    return set(config.modules_to_save or ())


def test_a_pooler_that_the_checkpoint_lacked_trains_whole_and_is_saved(tmp_path: Path) -> None:
    whole = tiny_bert()
    weights = {name: w for name, w in whole.state_dict().items() if "pooler" not in name and "classifier" not in name}
    whole.save_pretrained(tmp_path / "base", state_dict=weights)
    torch.manual_seed(1)
    model = paper.wrap(AutoModelForSequenceClassification.from_pretrained(tmp_path / "base"), mean_rank=2)
    assert "bert.pooler.dense" in saved_whole(model)
    model.save_pretrained(tmp_path / "adapter")
    torch.manual_seed(2)
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    again = PeftModel.from_pretrained(base, str(tmp_path / "adapter"))
    ids = torch.arange(3, 12)[None]
    torch.testing.assert_close(again.eval()(input_ids=ids).logits, model.eval()(input_ids=ids).logits)


def test_a_model_whose_weights_were_all_loaded_or_all_made_has_only_its_head_whole(tmp_path: Path) -> None:
    made = tiny_bert()
    made.save_pretrained(tmp_path)
    for model in (made, AutoModelForSequenceClassification.from_pretrained(tmp_path)):
        assert saved_whole(paper.wrap(model, mean_rank=2)) <= {"classifier", "score"}
