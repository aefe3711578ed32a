import copy
import io
import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn

import tsqlora as tsq
from models import samples, tiny_bert
from scoring import fingerprint, logits_of
from slotted import (
    OPTIMIZERS,
    POOLER,
    QUERY,
    WIDE,
    assert_hidden_are_zero,
    resize,
    take_steps,
    trained,
    updates,
    wrapped,
)
from tsqlora.adapter.slots import ActivePrefix, find_slots, sync_config
from tsqlora.interop.patterns import lora_config

ROWS = samples(5, 3)
MIXED = {QUERY: 2, WIDE: 7, POOLER: 0}


def assert_same_logits(one: nn.Module, other: nn.Module) -> None:
    torch.testing.assert_close(logits_of(one, ROWS), logits_of(other, ROWS), rtol=1e-12, atol=1e-12)


def plain_load(folder: Path) -> PeftModel:
    """What PEFT alone makes of an adapter's files."""
    return PeftModel.from_pretrained(tiny_bert(), str(folder)).double()


# --- what is saved ------------------------------------------------------------------------


def test_a_state_dict_holds_the_active_slots_only_under_pefts_own_names() -> None:
    model = wrapped(ranks=MIXED)
    state = model.state_dict()
    assert not any("parametrizations" in key for key in state)
    for name, slots in find_slots(model).items():
        key = f"base_model.model.{name}.lora_{{}}.default.weight"
        if slots.rank == 0:
            assert key.format("A") not in state
            assert key.format("B") not in state
            continue
        assert torch.equal(state[key.format("A")], slots.a.detach()[: slots.rank])
        assert torch.equal(state[key.format("B")], slots.b.detach()[:, : slots.rank])


def test_a_wrapped_models_state_has_the_keys_of_a_model_around_it() -> None:
    model = wrapped(ranks=MIXED)
    outer = nn.ModuleDict({"module": model})
    assert set(outer.state_dict()) == {f"module.{key}" for key in model.state_dict()}
    target = nn.ModuleDict({"module": wrapped(seed=1)})
    target.load_state_dict(outer.state_dict())
    assert tsq.active_ranks(target["module"]) == tsq.active_ranks(model)
    assert_same_logits(target["module"], model)


def test_plain_peft_loads_what_was_saved(tmp_path: Path) -> None:
    model = wrapped(ranks=MIXED)
    model.save_pretrained(tmp_path)
    keys = load_file(tmp_path / "adapter_model.safetensors").keys()
    assert f"base_model.model.{QUERY}.lora_A.weight" in keys
    assert not any(POOLER in key for key in keys)
    assert_same_logits(plain_load(tmp_path), model)


def test_plain_peft_loads_it_where_tsqlora_cannot_be_imported(tmp_path: Path) -> None:
    model = wrapped(ranks=MIXED)
    model.save_pretrained(tmp_path / "adapter")
    tiny_bert().save_pretrained(tmp_path / "base")
    batch = torch.arange(1, 13).view(2, 6)
    torch.save(batch, tmp_path / "batch.pt")
    script = """
import sys
from pathlib import Path

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "tsqlora":
            raise ImportError("blocked")

sys.meta_path.insert(0, Blocked())
import torch
from peft import PeftModel
from transformers import BertForSequenceClassification

folder = Path(sys.argv[1])
base = BertForSequenceClassification.from_pretrained(folder / "base", dtype=torch.float64)
model = PeftModel.from_pretrained(base, folder / "adapter").double().eval()
with torch.no_grad():
    torch.save(model(input_ids=torch.load(folder / "batch.pt")).logits, folder / "logits.pt")
"""
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True, capture_output=True, timeout=60)
    with torch.no_grad():
        wanted = model(input_ids=batch).logits
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), wanted, rtol=1e-10, atol=1e-10)


def test_the_saved_config_says_what_was_active(tmp_path: Path) -> None:
    model = wrapped(ranks=MIXED, alpha=6)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    active = {name: rank for name, rank in tsq.active_ranks(model).items() if rank}
    assert config["rank_pattern"] == active
    assert config["alpha_pattern"] == {name: 1.5 * rank for name, rank in active.items()}
    assert (config["r"], config["lora_alpha"]) == (7, 10.5)
    assert config["target_modules"] == sorted(active)


def test_equal_ranks_need_no_patterns(tmp_path: Path) -> None:
    wrapped(mean_rank=3, alpha=6).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["rank_pattern"], config["alpha_pattern"]) == (3, 6, {}, {})


def test_the_config_is_right_also_where_ranks_changed_since(tmp_path: Path) -> None:
    model = wrapped()
    find_slots(model)[QUERY].set_rank(3)
    model.save_pretrained(tmp_path)
    assert_same_logits(plain_load(tmp_path), model)


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

    model = tsq.wrap(base(), mean_rank=2, target_modules=["query"]).double()
    resize(model, {"query": 1, "zz.query": 3})
    model.save_pretrained(tmp_path)
    x = torch.randn(3, 8, dtype=torch.float64)
    loaded = PeftModel.from_pretrained(base(), str(tmp_path)).double()
    torch.testing.assert_close(loaded(x), model(x))


# --- loading into slots -------------------------------------------------------------------


def test_loading_sets_the_ranks_before_the_weights() -> None:
    model, other = wrapped(ranks=MIXED), wrapped(seed=1, ranks={QUERY: 8, WIDE: 1})
    other.load_state_dict(model.state_dict())
    assert tsq.active_ranks(other) == tsq.active_ranks(model)
    assert_hidden_are_zero(other)
    assert_same_logits(other, model)
    assert other.peft_config["default"].rank_pattern == model.peft_config["default"].rank_pattern


def test_load_adapter_does_as_the_trainer_asks_it_to(tmp_path: Path) -> None:
    model, other = wrapped(ranks=MIXED), wrapped(seed=1)
    model.save_pretrained(tmp_path)
    parameters = {name: id(p) for name, p in other.named_parameters()}
    other.load_adapter(str(tmp_path), "default", is_trainable=True)
    assert tsq.active_ranks(other) == tsq.active_ranks(model)
    assert {name: id(p) for name, p in other.named_parameters()} == parameters  # the optimizer's own
    assert_hidden_are_zero(other)
    assert_same_logits(other, model)
    assert other.peft_config["default"].rank_pattern == model.peft_config["default"].rank_pattern


def test_training_goes_on_after_loading() -> None:
    model, other = wrapped(ranks=MIXED), wrapped(seed=1)
    optimizer = OPTIMIZERS["adamw"](trained(other))
    other.load_state_dict(model.state_dict())
    take_steps(other, optimizer, 2)
    assert_hidden_are_zero(other, optimizer)


def test_a_state_dict_of_something_else_says_nothing_about_ranks() -> None:
    model = wrapped(ranks=MIXED)
    before = tsq.active_ranks(model)
    rest = {key: value for key, value in model.state_dict().items() if "lora_" not in key}
    result = model.load_state_dict(rest, strict=False)
    assert tsq.active_ranks(model) == before
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


@pytest.mark.parametrize("part", ["missing", "wide"])
def test_a_saved_matrix_that_does_not_fit_is_a_clear_error(part: str) -> None:
    state = wrapped().state_dict()
    key = f"base_model.model.{QUERY}.lora_B.default.weight"
    if part == "missing":
        del state[key]
    else:
        state[key] = torch.zeros(17, 4)
    with pytest.raises(
        tsq.SettingsError, match=r"lora_A and lora_B have shapes \(4, 16\) and .* 16 inputs and 16 outp"
    ):
        wrapped().load_state_dict(state)


# --- finding and copying ------------------------------------------------------------------


def test_slots_are_of_a_wrapped_model_and_ranks_of_any_lora() -> None:
    model = wrapped()
    ranks, plain = tsq.active_ranks(model), tsq.finalize(model)
    assert tsq.active_ranks(plain) == ranks
    for model in (tiny_bert(), plain):
        with pytest.raises(tsq.UnsupportedError, match=r"tsqlora\.wrap"):
            find_slots(model)
    with pytest.raises(tsq.UnsupportedError, match=r"tsqlora\.wrap"):
        tsq.active_ranks(tiny_bert())


def test_a_parametrisation_of_the_users_own_is_not_a_slot() -> None:
    model = tiny_bert()
    nn.utils.parametrizations.weight_norm(model.classifier)
    assert tsq.active_parameters(model) == sum(p.numel() for p in model.parameters())


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


def test_a_copy_of_a_model_with_slots_has_slots_of_its_own() -> None:
    model = wrapped(ranks=MIXED)
    other = copy.deepcopy(model)
    resize(other, {QUERY: 5})
    assert tsq.active_ranks(model)[QUERY] == 2
    assert other.state_dict()[f"base_model.model.{QUERY}.lora_A.default.weight"].shape[0] == 5
    model.load_state_dict(other.state_dict())
    assert tsq.active_ranks(model)[QUERY] == 5


def test_a_layer_at_rank_zero_stays_in_the_graph_and_can_grow_again() -> None:
    model = wrapped(ranks={QUERY: 0})
    optimizer = OPTIMIZERS["adamw"](trained(model))
    take_steps(model, optimizer, 1)
    assert find_slots(model)[QUERY].a.grad is not None
    resize(model, {QUERY: 2})
    take_steps(model, optimizer, 2)
    assert bool(updates(model)[QUERY].any())


def test_every_layer_at_rank_zero_is_an_error() -> None:
    model = wrapped()
    for slots in find_slots(model).values():
        slots.set_rank(0)
    with pytest.raises(tsq.SettingsError, match=r"every layer is at rank 0.*raise ranks.mean or set ranks.min to 1"):
        sync_config(model)


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


def test_a_finalised_model_is_plain_and_computes_the_same() -> None:
    model = wrapped(ranks=MIXED)
    before, state = logits_of(model, ROWS), model.state_dict()
    assert tsq.finalize(model) is model
    assert_plain(model)
    assert torch.equal(logits_of(model, ROWS), before)
    assert model.state_dict().keys() - state.keys() == {
        f"base_model.model.{POOLER}.{part}" for part in ("weight", "bias")
    }
    assert type(model.get_base_model().get_submodule(POOLER)) is nn.Linear
    layer = model.get_base_model().get_submodule(WIDE)
    assert (layer.lora_A["default"].out_features, layer.lora_B["default"].in_features, layer.r["default"]) == (7, 7, 7)


def test_a_finalised_copy_leaves_the_original_its_slots() -> None:
    model = wrapped(ranks=MIXED)
    before = logits_of(model, ROWS)
    other = tsq.finalize(copy.deepcopy(model))
    assert_plain(other)
    assert torch.equal(logits_of(model, ROWS), before)
    assert torch.equal(logits_of(other, ROWS), before)
    resize(model, {QUERY: 4})
    assert f"base_model.model.{QUERY}.lora_A.default.weight" in model.state_dict()
    wrapped().load_state_dict(model.state_dict())


def test_finalising_twice_changes_nothing() -> None:
    model = tsq.finalize(wrapped(ranks=MIXED))
    before = fingerprint(model)
    assert tsq.finalize(model) is model
    assert before["weights"].keys() == model.state_dict().keys()
    assert all(torch.equal(value, before["weights"][key]) for key, value in model.state_dict().items())


def test_a_finalised_model_trains_what_trained_before() -> None:
    model = wrapped(ranks=MIXED)
    find_slots(model)[QUERY].a.requires_grad_(False)
    tsq.finalize(model)
    frozen = {name for name, p in model.named_parameters() if "lora_" in name and not p.requires_grad}
    assert frozen == {f"base_model.model.{QUERY}.lora_A.default.weight"}


@pytest.mark.parametrize("finalised", [True, False])
def test_merging_gives_the_same_logits(finalised: bool) -> None:
    model = wrapped(ranks=MIXED)
    before = logits_of(model, ROWS)
    merged = (tsq.finalize(model) if finalised else model).merge_and_unload()
    torch.testing.assert_close(logits_of(merged, ROWS), before, rtol=1e-12, atol=1e-12)
    assert not any("lora" in name for name, _ in merged.named_modules())


@pytest.mark.parametrize("finalised", [True, False])
def test_disabling_the_adapter_gives_the_base_model(finalised: bool) -> None:
    model = wrapped(ranks=MIXED)
    if finalised:
        tsq.finalize(model)
    before = logits_of(model, ROWS)
    with model.disable_adapter():
        torch.testing.assert_close(logits_of(model, ROWS), logits_of(tiny_bert(), ROWS))
    assert torch.equal(logits_of(model, ROWS), before)


def through_pickle(model: PeftModel) -> PeftModel:
    return pickle.loads(pickle.dumps(model))


def through_torch_save(model: PeftModel) -> PeftModel:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, through_pickle, through_torch_save])
def test_a_finalised_model_can_be_copied(copied) -> None:  # type: ignore[no-untyped-def]
    model = tsq.finalize(wrapped(ranks=MIXED))
    assert torch.equal(logits_of(copied(model), ROWS), logits_of(model, ROWS))


def test_a_finalised_model_is_saved_and_loaded_as_peft_does(tmp_path: Path) -> None:
    model = tsq.finalize(wrapped(ranks=MIXED))
    model.save_pretrained(tmp_path)
    loaded = plain_load(tmp_path)
    assert_same_logits(loaded, model)
    loaded.save_pretrained(tmp_path / "again")
    assert_same_logits(plain_load(tmp_path / "again"), model)
    slotted = wrapped(seed=1)
    slotted.load_adapter(str(tmp_path), "default")
    assert_same_logits(slotted, model)


def test_trainable_parameters_are_printed_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    model = wrapped(ranks=MIXED)
    active = tsq.active_parameters(model)
    for counted in (model, copy.deepcopy(model), tsq.finalize(model)):
        counted.print_trainable_parameters()
        assert f"trainable params: {active:,} ||" in capsys.readouterr().out
    assert model.get_nb_trainable_parameters() == PeftModel.get_nb_trainable_parameters(model)


def test_a_copy_counts_its_own_parameters() -> None:
    model = wrapped(ranks=MIXED)
    other = copy.deepcopy(model)
    other.requires_grad_(False)
    assert other.get_nb_trainable_parameters()[0] == 0
    assert model.get_nb_trainable_parameters()[0] == tsq.active_parameters(model)


def test_weights_are_of_their_own_storage() -> None:
    model = tsq.finalize(wrapped(ranks=MIXED))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            assert isinstance(parameter, Tensor)
            assert parameter.is_contiguous()
            assert parameter.untyped_storage().nbytes() == parameter.numel() * parameter.element_size()
