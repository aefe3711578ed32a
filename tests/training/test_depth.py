"""With a depth, the top blocks have the parameters of all, and the backward pass ends below them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import nn

import tsqlora as tsq
from models import collate, samples, tiny_bert
from paper.test_families import FAMILIES
from scoring import logits_of
from slotted import fill
from stock import make_trainer, moods
from tsqlora import paper
from tsqlora.libs.transformers import transformer_blocks
from tsqlora.training.lora import budget, layer_shapes, used

TOP = "bert.encoder.layer.1."


@pytest.mark.parametrize("family", FAMILIES)
def test_the_backward_pass_ends_below_the_top_block_of_every_family(family: str) -> None:
    base, rows = FAMILIES[family]
    everywhere = tsq.wrap(base(), mean_rank=4)
    all_shapes = layer_shapes(everywhere)
    blocks = transformer_blocks(everywhere.get_base_model(), list(all_shapes))
    model = tsq.wrap(base(), mean_rank=4, depth=1).train()
    ranks, shapes = paper.active_ranks(model), layer_shapes(model)
    left = budget(4, all_shapes) - used(ranks, shapes)
    assert left >= 0
    assert all(left < sum(shapes[name]) for name, rank in ranks.items() if rank < max(ranks.values()))
    inner = model.get_base_model()
    reached: dict[str, bool] = {}
    for block in blocks:
        # Of a block that returns several tensors the first is what the next one takes.
        def note(_: Any, __: Any, output: Any, name: str = block) -> None:
            reached[name] = (output if isinstance(output, torch.Tensor) else output[0]).requires_grad

        inner.get_submodule(block).register_forward_hook(note)
    batch = {k: v for k, v in collate(rows()).items() if k in ("pixel_values", "input_ids", "attention_mask", "labels")}
    model(**batch).loss.backward()
    assert reached == dict.fromkeys(blocks[:-1], False) | {blocks[-1]: True}


def test_a_depth_of_all_blocks_is_what_there_is_without_one() -> None:
    weights: list[dict[str, torch.Tensor]] = []
    for depth in (None, 2):
        torch.manual_seed(0)
        model = tsq.wrap(tiny_bert(), mean_rank=4, depth=depth)
        weights.append({name: p for name, p in model.named_parameters() if p.requires_grad})
    torch.testing.assert_close(weights[1], weights[0], rtol=0, atol=0)


@pytest.mark.parametrize("slots", [True, False])
def test_plain_peft_loads_what_was_saved(slots: bool, tmp_path: Path) -> None:
    rows = samples(5, 3)
    model = (paper.wrap if slots else tsq.wrap)(tiny_bert(), mean_rank=2.5, depth=1).double().eval()
    if slots:
        fill(model)
    else:
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(str(tmp_path))
    loaded = PeftModel.from_pretrained(tiny_bert(), tmp_path).double().eval()
    torch.testing.assert_close(logits_of(loaded, rows), logits_of(model, rows), rtol=1e-12, atol=1e-12)
    assert paper.active_ranks(loaded) == paper.active_ranks(model)
    assert all(name.startswith((TOP, "bert.pooler")) for name in paper.active_ranks(loaded))


def test_the_scale_is_that_of_all_blocks() -> None:
    model = tsq.wrap(tiny_bert(), mean_rank=4, alpha=12, target_modules=["query", "dense"], depth=1)
    assert {layer.scaling["default"] for layer in layers(model)} == {3.0}
    assert all(rank > 4 for rank in paper.active_ranks(model).values())


def layers(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if hasattr(module, "lora_A") and hasattr(module, "scaling")]


def test_ranks_move_among_the_top_blocks_alone(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = tiny_bert(num_labels=2, layers=2, hidden=8, intermediate=16, vocab=40, dtype=torch.float32)
    model = paper.wrap(base, mean_rank=2, depth=1)
    reached: list[bool] = []
    base.bert.embeddings.register_forward_hook(lambda _, __, output: reached.append(output.requires_grad))
    ranks = paper.RankCallback(interval=4, samples=16)
    make_trainer(model, moods(), tmp_path, [ranks]).train()
    assert len({*ranks.final.values()}) > 1
    assert all(name.startswith((TOP, "bert.pooler")) for name in ranks.final)
    assert len({event.budget for event in ranks.events}) == 1
    assert reached
    assert not any(reached)


@pytest.mark.parametrize(
    ("base", "options", "words"),
    [
        (tiny_bert, {"depth": 3}, "depth is 3.*2 transformer blocks"),
        (tiny_bert, {"depth": 0}, "depth is 0"),
        (tiny_bert, {"depth": 1, "target_modules": ["layer.0.attention.self.query"]}, "top 1 of 2 blocks"),
        (lambda: nn.Sequential(nn.Linear(4, 4)), {"depth": 1, "target_modules": ["0"]}, " 0 transformer blocks"),
    ],
)
def test_a_depth_that_the_model_does_not_have_is_refused(base: Any, options: dict[str, Any], words: str) -> None:
    model = base()
    before = [name for name, _ in model.named_modules()]
    with pytest.raises(tsq.SettingsError, match=words):
        tsq.wrap(model, **options)
    assert [name for name, _ in model.named_modules()] == before


def test_an_adapter_that_is_there_has_its_own_depth() -> None:
    with pytest.raises(tsq.SettingsError, match="leave out"):
        paper.wrap(tsq.wrap(tiny_bert()), depth=1)
