"""LoRA over nn.Embedding, whose A and B PEFT keeps in a ParameterDict: slots, and what the probe sees."""

import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn

from models import collate, samples, tiny_bert, tiny_llama_classifier
from scoring import logits_of, slow_layers
from slotted import TARGETS, WORDS, assert_hidden_are_zero, embedded, resize, take_steps, trained, updates
from tsqlora import paper
from tsqlora.paper import probe
from tsqlora.paper.change import grow_slot, new_row
from tsqlora.paper.probe import SKETCH_ROWS, probe_pass
from tsqlora.paper.sites import lora_layers
from tsqlora.paper.slots import find_slots

ROWS = samples(7, 3)


def test_a_fresh_and_a_grown_embedding_adapter_change_nothing_and_the_new_slot_trains() -> None:
    base = tiny_bert().eval()
    logits = logits_of(base, ROWS)
    fresh = paper.wrap(base, target_modules=TARGETS, mean_rank=2).double()
    assert torch.equal(logits_of(fresh, ROWS), logits)
    slots = find_slots(fresh)[WORDS]
    row = new_row(slots.a.detach()[:2], None, seed=0)  # PEFT's own rows of A are zero before they train
    assert float(row.norm()) > 0.1
    model = embedded()
    before = updates(model)
    optimizer = torch.optim.AdamW(trained(model), lr=0.01)
    assert find_slots(model)[WORDS].shape == (60, 16)
    grow_slot(find_slots(model)[WORDS], torch.randn(60), optimizer)
    assert torch.equal(updates(model)[WORDS], before[WORDS])
    take_steps(model, optimizer, 1)
    assert bool(find_slots(model)[WORDS].b[:, 4].any())
    assert_hidden_are_zero(model, optimizer)


def test_the_base_weights_of_a_causal_models_embedding_are_not_saved(tmp_path: Path) -> None:
    """PEFT adds them for target_modules named embed_tokens; ours are full names, and the base weights are frozen."""
    model = embedded(tiny_llama_classifier(), target_modules=["embed_tokens", "q_proj"])
    model.save_pretrained(tmp_path)
    assert not any("base_layer" in key for key in load_file(tmp_path / "adapter_model.safetensors"))
    loaded = PeftModel.from_pretrained(tiny_llama_classifier(), str(tmp_path)).double()
    torch.testing.assert_close(logits_of(loaded, ROWS), logits_of(model, ROWS), rtol=1e-5, atol=1e-5)


def test_slots_are_put_on_an_embedding_adapter_that_is_there_and_change_nothing() -> None:
    torch.manual_seed(0)
    config = LoraConfig(r=3, lora_alpha=7, target_modules=TARGETS, task_type=TaskType.SEQ_CLS)
    model = get_peft_model(tiny_bert(), config, adapter_name="mine").double().eval()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.1)
    before = logits_of(model, ROWS)
    deltas = {name: layer.get_delta_weight("mine") for name, layer in lora_layers(model).items()}
    assert paper.wrap(model) is model
    assert set(paper.active_ranks(model).values()) == {3}
    assert torch.equal(logits_of(model, ROWS), before)
    assert all(torch.equal(delta, deltas[name]) for name, delta in updates(model).items())
    resize(model, {WORDS: 5})
    assert f"base_model.model.{WORDS}.lora_embedding_A.mine" in model.state_dict()


# --- the probe ----------------------------------------------------------------------------


def repeated(base: Callable[..., nn.Module]) -> tuple[PeftModel, list[dict[str, Any]]]:
    """A model, and rows in which tokens repeat and the padding token stands inside of rows, too."""
    rows = samples(9, 3, vocab=6, lengths=(3, 11))
    rows[0]["input_ids"][1] = 0
    targets = TARGETS if base is tiny_bert else ["embed_tokens", "q_proj"]
    return embedded(base(), target_modules=targets), rows


@pytest.mark.parametrize("base", [tiny_bert, tiny_llama_classifier])
def test_sensitivity_of_an_embedding_is_that_of_the_slow_twin(base: Callable[..., nn.Module]) -> None:
    model, rows = repeated(base)
    expected = slow_layers(model, rows)
    measured = paper.sensitivity(model, rows, collate, batch_size=4)
    assert dict(measured.values) == pytest.approx(expected, rel=1e-12 if base is tiny_bert else 1e-6)


def test_the_sketch_of_an_embedding_is_that_of_its_one_hot_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    model, rows = repeated(tiny_bert)
    seen: dict[str, Tensor] = {}

    def keep(a: Tensor, b: Tensor, layer: Any) -> Tensor:
        if a.dim() == 2 and layer.in_features == 60:
            one_hot = nn.functional.one_hot(a, 60).double()
            seen["gradient"] = seen.get("gradient", 0) + torch.einsum("nto,nti->oi", b, one_hot)
        return torch.ones(())

    monkeypatch.setattr(probe, "sampled", keep)
    directions = probe_pass(model, rows, collate, batch_size=4, seed=5).directions()
    generator = torch.Generator().manual_seed(zlib.crc32(f"5:{WORDS}".encode()))
    omega = torch.randn(SKETCH_ROWS, 16, generator=generator).double() / SKETCH_ROWS**0.5
    torch.testing.assert_close(directions[WORDS], omega @ seen["gradient"])
