"""One life of a wrapped model, from `paper.wrap(model)` to plain PEFT, on every family of base models."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn
from transformers import RobertaConfig, RobertaForSequenceClassification

from models import (
    EOS,
    SIZES,
    collate,
    images,
    samples,
    tiny_bart,
    tiny_bert,
    tiny_falcon,
    tiny_gpt2,
    tiny_llama_classifier,
    tiny_mpnet,
    tiny_t5,
    tiny_vit,
)
from scoring import assert_agree, logits_of, score_by, slow, slow_offsets, teach
from slotted import assert_hidden_are_zero, trained, updates, wrapped
from tsqlora import paper
from tsqlora.paper.change import drop_slots, grow_slot
from tsqlora.paper.slots import find_slots

Rows = list[dict[str, Any]]


def sentences() -> Rows:
    rows = samples(6, 3, vocab=EOS)
    for row in rows:
        row["input_ids"][-1] = EOS
    return rows


FAMILIES: dict[str, tuple[Callable[[], nn.Module], Callable[[], Rows]]] = {
    "bert": (tiny_bert, sentences),
    "mpnet": (tiny_mpnet, sentences),
    "gpt2": (tiny_gpt2, sentences),
    "falcon": (tiny_falcon, sentences),
    "llama": (tiny_llama_classifier, sentences),
    "t5": (tiny_t5, sentences),
    "bart": (tiny_bart, sentences),
    "vit": (tiny_vit, lambda: images(6, 3)),
}
HEADS = {
    "bert": {"classifier"},
    "mpnet": {"classifier.dense", "classifier.out_proj"},
    "gpt2": {"score"},
    "falcon": {"score"},
    "llama": {"score"},
    "t5": {"classification_head.dense", "classification_head.out_proj"},
    "bart": {"classification_head.dense", "classification_head.out_proj"},
    "vit": {"classifier"},
}


def step(model: nn.Module, rows: Rows, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    model.train()(**collate(rows)).loss.backward()
    optimizer.step()


def assert_whole_is_the_head_alone(model: PeftModel, base: nn.Module, heads: set[str]) -> None:
    """LoRA is in every linear layer but the head, and nothing else trains."""
    kinds = ("Linear", "Conv1D", "FalconLinear")
    linear = {name for name, module in base.named_modules() if type(module).__name__ in kinds}
    assert paper.active_ranks(model).keys() == linear - heads
    whole = {name for name, p in model.named_parameters() if p.requires_grad and "lora_" not in name}
    whole = {name.replace("modules_to_save.default.", "").rpartition(".")[0] for name in whole}
    assert whole == {f"base_model.model.{name}" for name in heads}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_trains_changes_ranks_and_is_plain_peft_in_the_end(family: str, tmp_path: Path) -> None:
    build, rows = FAMILIES[family][0], FAMILIES[family][1]()
    torch.manual_seed(0)
    model = paper.wrap(build(), mean_rank=3).double()
    assert_whole_is_the_head_alone(model, build(), HEADS[family])
    optimizer = torch.optim.AdamW(trained(model), lr=0.01)
    for _ in range(2):
        step(model, rows, optimizer)
    first, second, *_, last = paper.active_ranks(model)

    before = updates(model)
    grow_slot(find_slots(model)[first], torch.randn(find_slots(model)[first].shape[0]), optimizer)
    assert all(torch.equal(delta, before[name]) for name, delta in updates(model).items())
    for name, rank in {second: 0, last: 1}.items():
        slots = find_slots(model)[name]
        drop_slots(slots, range(rank, slots.rank), optimizer)
    a, b = (part.full.detach() for part in find_slots(model)[last].parts)
    product = 16 / 3 * b[:, :1] @ a[:1]
    torch.testing.assert_close(updates(model)[last], product.T if family == "gpt2" else product)
    step(model, rows, optimizer)
    assert_hidden_are_zero(model)

    measured = paper.sensitivity(model, rows, collate)
    assert all(value > 0 for value in measured.values.values())
    before = logits_of(model.eval(), rows)
    torch.testing.assert_close(logits_of(paper.finalize(model), rows), before, rtol=1e-9, atol=1e-9)
    model.save_pretrained(str(tmp_path))
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert all(any(f"model.{head}.weight" in key for key in saved) for head in HEADS[family])
    assert not any(f"{second}.lora" in key for key in saved)
    loaded = PeftModel.from_pretrained(build(), str(tmp_path)).double()
    torch.testing.assert_close(logits_of(loaded, rows), before, rtol=1e-6, atol=1e-6)
    assert not torch.allclose(logits_of(build(), rows), before, atol=1e-3)


def test_a_head_whose_layers_a_checkpoint_lacks_trains_whole() -> None:
    with torch.random.fork_rng(devices=[]):
        base = RobertaForSequenceClassification(RobertaConfig(**SIZES, num_labels=3))
    model = paper.wrap(base, mean_rank=2, modules_to_save=["classifier.dense", "classifier.out_proj"])
    own = {name: parameter for name, parameter in model.named_parameters() if "classifier" in name}
    model(input_ids=torch.randint(2, 50, (2, 5)), labels=torch.tensor([0, 1])).loss.backward()
    assert {name for name, p in own.items() if p.requires_grad} == {
        name for name, p in own.items() if p.grad is not None
    }
    assert sum(p.requires_grad for p in own.values()) == 4


def test_images_are_scored_as_by_the_slow_twin() -> None:
    model, rows = wrapped(tiny_vit()), images(10, 3)
    teach(model, rows)
    scores = score_by(model, rows, collate, reference=range(6), batch_size=4)
    assert_agree(scores, slow(model, rows, range(6), offsets=slow_offsets(model, rows[:6])))
