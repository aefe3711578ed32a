import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import tsqlora as tsq
from models import samples, tiny_bert
from scoring import fingerprint, logits_of
from slotted import (
    OPTIMIZERS,
    POOLER,
    QUERY,
    TYPES,
    WIDE,
    WORDS,
    assert_hidden_are_zero,
    backward,
    embedded,
    resize,
    take_steps,
    trained,
    wrapped,
)
from tsqlora import paper
from tsqlora.adapter.patterns import lora_config
from tsqlora.paper.sites import lora_layers
from tsqlora.paper.slots import ActivePrefix, find_slots

ROWS = samples(5, 3)
MIXED = {QUERY: 2, WIDE: 7, POOLER: 0}
KINDS = {"linear": (wrapped, MIXED), "embedding": (embedded, {WORDS: 6, TYPES: 0, QUERY: 1})}
"""Models over linear layers, and over embeddings, whose A and B PEFT keeps in a ParameterDict; with ranks for them."""

EVERY_KIND = pytest.mark.parametrize("kind", KINDS)


def make(kind: str, **options: Any) -> PeftModel:
    build, ranks = KINDS[kind]
    return build(**{"ranks": ranks} | options)


def assert_same_logits(one: nn.Module, other: nn.Module) -> None:
    torch.testing.assert_close(logits_of(one, ROWS), logits_of(other, ROWS), rtol=1e-12, atol=1e-12)


def plain_load(folder: Path) -> PeftModel:
    """The model that PEFT alone makes of an adapter's files."""
    return PeftModel.from_pretrained(tiny_bert(), str(folder)).double()


# --- saving -------------------------------------------------------------------------------


@EVERY_KIND
def test_state_dicts_and_files_hold_the_active_slots_only_and_plain_peft_loads_them(kind: str, tmp_path: Path) -> None:
    model = make(kind)
    state = model.state_dict()
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert not any("parametrizations" in key for key in (*state, *saved))
    for name, slots in find_slots(model).items():
        a, b = ("lora_embedding_A", "lora_embedding_B") if "embeddings" in name else ("lora_A.weight", "lora_B.weight")
        for part, active in ((a, slots.a.detach()[: slots.rank]), (b, slots.b.detach()[:, : slots.rank])):
            key = f"base_model.model.{name}.{part}"
            in_state = key.replace("_A.", "_A.default.").replace("_B.", "_B.default.")
            in_state = in_state if in_state != key else f"{key}.default"
            assert (key in saved) == (in_state in state) == (slots.rank > 0)
            if slots.rank:
                assert torch.equal(state[in_state], active)
                assert torch.equal(saved[key], active)
    assert_same_logits(plain_load(tmp_path), model)


def test_a_wrapped_models_state_has_the_keys_of_a_model_around_it() -> None:
    model = wrapped(ranks=MIXED)
    outer = nn.ModuleDict({"module": model})
    assert set(outer.state_dict()) == {f"module.{key}" for key in model.state_dict()}
    target = nn.ModuleDict({"module": wrapped(seed=1)})
    target.load_state_dict(outer.state_dict())
    assert paper.active_ranks(target["module"]) == paper.active_ranks(model)
    assert_same_logits(target["module"], model)


def test_the_saved_config_has_the_active_ranks_and_no_patterns_for_equal_ones(tmp_path: Path) -> None:
    model = wrapped(ranks=MIXED, alpha=6)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    active = {name: rank for name, rank in paper.active_ranks(model).items() if rank}
    assert config["rank_pattern"] == active
    assert config["alpha_pattern"] == {name: 1.5 * rank for name, rank in active.items()}
    assert (config["r"], config["lora_alpha"]) == (7, 10.5)
    assert config["target_modules"] == sorted(active)
    wrapped(mean_rank=3, alpha=6).save_pretrained(tmp_path / "equal")
    config = json.loads((tmp_path / "equal" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["rank_pattern"], config["alpha_pattern"]) == (3, 6, {}, {})


@given(st.dictionaries(st.sampled_from([QUERY, WIDE, POOLER]), st.integers(0, 8), min_size=1))
def test_scale_times_rank_is_alpha_for_any_ranks(ranks: dict[str, int]) -> None:
    if not any(ranks.values()):
        with pytest.raises(tsq.SettingsError, match="every layer is at rank 0"):
            lora_config(ranks, 0.75)
        return
    config = LoraConfig(**lora_config(ranks, 0.75))
    for name, rank in ranks.items():
        assert (name in config.target_modules) == (rank > 0)  # type: ignore[operator]
        if rank:
            assert config.rank_pattern.get(name, config.r) == rank  # type: ignore[union-attr]
            assert config.alpha_pattern.get(name, config.lora_alpha) == 0.75 * rank  # type: ignore[union-attr]


def test_a_layer_whose_name_ends_like_anothers_keeps_its_own_rank(tmp_path: Path) -> None:
    def base() -> nn.Module:
        torch.manual_seed(0)
        inner = nn.ModuleDict({"zz": nn.ModuleDict({"query": nn.Linear(8, 8)}), "query": nn.Linear(8, 8)})
        inner.forward = lambda x: inner["query"](inner["zz"]["query"](x))  # type: ignore[method-assign,assignment]
        return inner.double()

    model = paper.wrap(base(), mean_rank=2, target_modules=["query"]).double()
    resize(model, {"query": 1, "zz.query": 3})
    model.save_pretrained(tmp_path)
    x = torch.randn(3, 8, dtype=torch.float64)
    loaded = PeftModel.from_pretrained(base(), str(tmp_path)).double()
    torch.testing.assert_close(loaded(x), model(x))


# --- loading into slots -------------------------------------------------------------------


def through_a_state_dict(model: PeftModel, other: PeftModel, folder: Path) -> PeftModel:
    other.load_state_dict(model.state_dict())
    return other


def through_load_adapter(model: PeftModel, other: PeftModel, folder: Path) -> PeftModel:
    """As the Trainer does."""
    model.save_pretrained(folder)
    other.load_adapter(str(folder), "default", is_trainable=True)
    return other


def through_a_copy(model: PeftModel, other: PeftModel, folder: Path) -> PeftModel:
    return copy.deepcopy(model)


@EVERY_KIND
@pytest.mark.parametrize("way", [through_a_state_dict, through_load_adapter, through_a_copy])
def test_ranks_and_weights_come_back_and_training_goes_on(way: Any, kind: str, tmp_path: Path) -> None:
    model, other = make(kind), make(kind, seed=1, ranks={QUERY: 8})
    optimizer, before = OPTIMIZERS["adamw"](trained(other)), {id(p) for p in other.parameters()}
    loaded = way(model, other, tmp_path)
    assert paper.active_ranks(loaded) == paper.active_ranks(model)
    assert_hidden_are_zero(loaded)
    assert_same_logits(loaded, model)
    assert loaded.peft_config["default"].rank_pattern == model.peft_config["default"].rank_pattern
    if loaded is other:
        assert {id(p) for p in other.parameters()} == before  # the optimizer's own
        take_steps(other, optimizer, 2)
        assert_hidden_are_zero(other, optimizer)
    resize(loaded, {QUERY: 5})
    assert paper.active_ranks(model)[QUERY] == KINDS[kind][1][QUERY]


def test_a_state_dict_of_something_else_leaves_the_ranks() -> None:
    model = wrapped(ranks=MIXED)
    before = paper.active_ranks(model)
    rest = {key: value for key, value in model.state_dict().items() if "lora_" not in key}
    result = model.load_state_dict(rest, strict=False)
    assert paper.active_ranks(model) == before
    assert not result.unexpected_keys
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict(rest)


def test_a_saved_rank_above_the_capacity_is_a_clear_error_and_changes_nothing() -> None:
    model, small = wrapped(ranks=MIXED), wrapped(mean_rank=3)
    before = fingerprint(small)["weights"]
    with pytest.raises(tsq.SettingsError, match=f"{WIDE}: the saved rank is 7, and .* slots end at 6; wrap .* larger"):
        small.load_state_dict(model.state_dict())
    after = fingerprint(small)["weights"]
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[key]) for key, value in before.items())


@pytest.mark.parametrize("b", [None, torch.zeros(17, 4)], ids=["missing", "wide"])
def test_a_saved_matrix_that_does_not_fit_is_a_clear_error(b: Tensor | None) -> None:
    model = wrapped()
    state = model.state_dict() | {f"base_model.model.{QUERY}.lora_B.default.weight": b}
    with pytest.raises(tsq.SettingsError, match=r"lora_B have shapes \(4, 16\) and .* 16 inputs and 16 outp"):
        model.load_state_dict({key: value for key, value in state.items() if value is not None})


# --- finding ------------------------------------------------------------------------------


def test_slots_are_of_a_wrapped_model_and_ranks_of_any_lora() -> None:
    model = wrapped()
    ranks, plain = paper.active_ranks(model), paper.finalize(model)
    assert paper.active_ranks(plain) == ranks
    for model in (tiny_bert(), plain):
        with pytest.raises(tsq.UnsupportedError, match=r"tsqlora\.paper\.wrap"):
            find_slots(model)
    assert paper.active_ranks(tiny_bert()) == {}


def test_a_custom_parametrisation_is_not_a_slot() -> None:
    model = tiny_bert()
    nn.utils.parametrizations.weight_norm(model.classifier)
    assert paper.active_parameters(model) == sum(p.numel() for p in model.parameters())


class Doubled(nn.Module):
    def forward(self, shown: Tensor) -> Tensor:
        return 2 * shown


@pytest.mark.parametrize("further", [False, True])
def test_what_is_shown_is_what_torchs_parametrisation_gives(further: bool) -> None:
    model = copy.deepcopy(wrapped(ranks=MIXED))
    for slots in find_slots(model).values():
        for part, (full, dim) in zip(slots.parts, slots.matrices(), strict=True):
            if further:
                nn.utils.parametrize.register_parametrization(part.holder, part.tensor, Doubled())
            shown = getattr(part.holder, part.tensor)
            assert torch.equal(shown, part.holder.parametrizations[part.tensor]())  # type: ignore[index, operator]
            assert torch.equal(shown, (2 if further else 1) * full.narrow(dim, 0, slots.rank))


def test_a_step_computes_what_plain_lora_of_the_active_ranks_does() -> None:
    def operations(model: nn.Module) -> int:
        with FlopCounterMode(display=False) as counter:
            backward(model)
        return counter.get_total_flops()

    model = wrapped(max_rank=8, ranks={QUERY: 3, WIDE: 6})
    assert operations(model) == operations(get_peft_model(tiny_bert(), model.peft_config["default"]).eval())


# --- finalize -----------------------------------------------------------------------------


def assert_plain(model: nn.Module) -> None:
    assert not any(isinstance(module, ActivePrefix) for module in model.modules())
    assert not any("Parametrized" in type(module).__name__ for module in model.modules())
    assert not any("parametrizations" in name for name, _ in model.named_parameters())
    for module in model.modules():
        assert not module._state_dict_hooks
        assert not module._load_state_dict_pre_hooks
        assert not module._load_state_dict_post_hooks
        assert not module._state_dict_pre_hooks


@EVERY_KIND
def test_a_finalised_model_is_plain_and_computes_the_same(kind: str) -> None:
    model = make(kind)
    before, ranks = logits_of(model, ROWS), {name: rank for name, rank in paper.active_ranks(model).items() if rank}
    assert paper.finalize(model) is model
    assert_plain(model)
    # Not bit for bit over embeddings: on some processors a product rounds by how its factors lie in memory.
    torch.testing.assert_close(logits_of(model, ROWS), before, rtol=0, atol=0 if kind == "linear" else 1e-14)
    base = model.get_base_model()
    assert type(base.get_submodule(POOLER)) is nn.Linear
    assert kind == "linear" or type(base.get_submodule(TYPES)) is nn.Embedding
    assert {name: layer.r["default"] for name, layer in lora_layers(model).items()} == ranks
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            assert parameter.is_contiguous()
            assert parameter.untyped_storage().nbytes() == parameter.numel() * parameter.element_size()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    assert paper.finalize(model) is model  # again, which changes nothing
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_a_finalised_copy_leaves_the_original_its_slots() -> None:
    model = wrapped(ranks=MIXED)
    before = logits_of(model, ROWS)
    other = pickle.loads(pickle.dumps(paper.finalize(copy.deepcopy(model))))
    assert_plain(other)
    assert torch.equal(logits_of(model, ROWS), before)
    assert torch.equal(logits_of(other, ROWS), before)
    resize(model, {QUERY: 4})
    assert f"base_model.model.{QUERY}.lora_A.default.weight" in model.state_dict()
    wrapped().load_state_dict(model.state_dict())


def test_a_finalised_model_trains_what_trained_before() -> None:
    model = wrapped(ranks=MIXED)
    find_slots(model)[QUERY].a.requires_grad_(False)
    paper.finalize(model)
    frozen = {name for name, p in model.named_parameters() if "lora_" in name and not p.requires_grad}
    assert frozen == {f"base_model.model.{QUERY}.lora_A.default.weight"}


@EVERY_KIND
@pytest.mark.parametrize("finalised", [True, False])
def test_disabling_the_adapter_and_merging_give_what_peft_gives(finalised: bool, kind: str) -> None:
    model = make(kind)
    if finalised:
        paper.finalize(model)
    before, trains = logits_of(model, ROWS), {id(p) for p in trained(model)}
    with model.disable_adapter():
        torch.testing.assert_close(logits_of(model, ROWS), logits_of(tiny_bert(), ROWS))
    assert torch.equal(logits_of(model, ROWS), before)
    assert {id(p) for p in trained(model)} == trains
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits_of(merged, ROWS), before, rtol=1e-12, atol=1e-12)
    assert not any("lora" in name for name, _ in merged.named_modules())


def test_trainable_parameters_are_printed_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    model = wrapped(ranks=MIXED)
    active = paper.active_parameters(model)
    assert copy.deepcopy(model).requires_grad_(False).get_nb_trainable_parameters()[0] == 0
    for counted in (model, copy.deepcopy(model), paper.finalize(copy.deepcopy(model))):
        counted.print_trainable_parameters()
        assert f"trainable params: {active:,} ||" in capsys.readouterr().out
