from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from peft import PeftModel
from peft.tuners.adalora.layer import AdaLoraLayer
from torch import nn
from transformers import BertForSequenceClassification, BitsAndBytesConfig

import tsqlora as tsq
from models import tiny_llama_classifier
from setups import HEAD, base, build, logits_of, make_setup, trainer_of
from stock import moods
from tsqlora.adapter.slots import active_ranks, layers_of
from tsqlora.baselines import BASELINES
from tsqlora.errors import SettingsError, UnsupportedError
from tsqlora.training.load import Pretrained

ADAPTERS = [name for name in BASELINES if name != "full"]
TRIPLETS = ["adalora", "elalora"]


def head_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """The head that trains."""
    return {
        name.rpartition(".")[2]: p.detach().clone()
        for name, p in model.named_parameters()
        if "classifier" in name and p.requires_grad
    }


@pytest.mark.parametrize("name", BASELINES)
def test_a_method_trains_in_a_stock_trainer_and_predicts(name: str, tmp_path: Path) -> None:
    built = build(name, steps=30)
    head = head_of(built.model)
    trainer = trainer_of(built, tmp_path, max_steps=30, evaluate_on=moods(32, seed=1))
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < 0.8 * before
    predictions = np.asarray(trainer.predict(moods(32, seed=2)).predictions)  # type: ignore[arg-type]
    assert (predictions.argmax(1) == [row["labels"] for row in moods(32, seed=2)]).mean() > 0.9
    assert all(not torch.equal(head[part], now) for part, now in head_of(built.model).items())
    assert sum(built.ranks().values()) == (0 if name == "full" else 4 * 7)


@pytest.mark.parametrize("name", BASELINES)
def test_a_method_begins_as_the_pretrained_model_with_its_head(name: str) -> None:
    model = base()
    logits, head = logits_of(model), head_of(model)
    built = build(name, model)
    # DoRA divides by a norm and multiplies by it again.
    torch.testing.assert_close(logits_of(built.model), logits, rtol=0, atol=1e-5 if name == "dora" else 0)
    assert head_of(built.model).keys() == head.keys()
    assert all(torch.equal(head[part], now) for part, now in head_of(built.model).items())


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_method_adapts_the_layers_that_ours_adapts(name: str) -> None:
    """The head, and what the checkpoint lacks, train whole and have no adapter."""
    whole = ("bert.pooler.dense", "classifier")
    ours = tsq.wrap(base(), mean_rank=4, target_modules=["query", "dense"], modules_to_save=whole)
    built = build(name, target_modules=["query", "dense"], pretrained=Pretrained(base(), cast(Any, None), whole))
    assert list(built.ranks()) == list(active_ranks(ours))
    assert isinstance(built.model, PeftModel)
    assert {n for n, p in built.model.named_parameters() if p.requires_grad and "lora_" not in n} == {
        n for n, p in ours.named_parameters() if p.requires_grad and "lora_" not in n
    }


def test_lora_has_the_parameters_of_ours_at_the_same_mean_rank() -> None:
    ours = tsq.wrap(base(), mean_rank=4, max_rank=4, modules_to_save=HEAD)
    assert build("lora").trainable() == sum(p.numel() for p in ours.parameters() if p.requires_grad)


def test_all_of_the_model_trains_in_full() -> None:
    model = base()
    assert build("full", model).trainable() == sum(p.numel() for p in model.parameters())
    assert build("full", model.requires_grad_(False)).trainable() > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_in_half_precision_are_not_trained_in_full(dtype: torch.dtype) -> None:
    partly = base()
    partly.get_submodule("bert.pooler").to(dtype)
    with pytest.raises(UnsupportedError, match=r"bert\.pooler\.dense\.weight .*model\.dtype"):
        build("full", partly)


# torch warns of its own script_method, which bitsandbytes imports.
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("bits", [4, 8])
def test_packed_weights_are_not_trained_in_full(bits: int, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    base().save_pretrained(tmp_path)
    how = BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8)
    packed = BertForSequenceClassification.from_pretrained(tmp_path, quantization_config=how, dtype=torch.float32)
    with pytest.raises(UnsupportedError, match=r"model\.quantization"):
        build("full", packed)


@pytest.mark.parametrize("name", TRIPLETS)
def test_triplets_cost_their_two_vectors_and_one_number(name: str, tmp_path: Path) -> None:
    built = build(name)
    trainer_of(built, tmp_path).train()
    shapes = {n: (m.in_features, m.out_features) for n, m in base().named_modules() if isinstance(m, nn.Linear)}
    head = sum(p.numel() for p in head_of(built.model).values())
    assert built.trainable() == head + sum(r * (sum(shapes[n]) + 1) for n, r in built.ranks().items())


@pytest.mark.parametrize("name", ADAPTERS)
def test_the_scale_is_that_of_lora_in_every_layer(name: str) -> None:
    built = build(name, alpha=12.0)
    assert isinstance(built.model, PeftModel)
    for layer in layers_of(built.model).values():
        scale = layer.scaling["default"]
        if isinstance(layer, AdaLoraLayer):
            scale /= layer.ranknum["default"].item()
        assert scale == pytest.approx(12 / 4**0.5 if name == "rslora" else 12 / 4)


@pytest.mark.parametrize("name", BASELINES)
def test_the_seed_decides_the_first_weights(name: str) -> None:
    drawn = iter(range(4))

    def weights(seed: int) -> list[torch.Tensor]:
        torch.manual_seed(next(drawn))  # whatever was drawn before
        return list(build(name, seed=seed).model.parameters())

    assert all(torch.equal(a, b) for a, b in zip(weights(0), weights(0), strict=True))
    if name != "full":
        assert not all(torch.equal(a, b) for a, b in zip(weights(0), weights(1), strict=True))


@pytest.mark.parametrize("name", ADAPTERS)
@pytest.mark.parametrize("mean", [2.5, 0.5, float("nan")])
def test_a_mean_rank_that_is_not_whole_is_refused(name: str, mean: float) -> None:
    with pytest.raises(SettingsError, match=rf"ranks\.mean .*{name}"):
        build(name, mean_rank=mean)


@pytest.mark.parametrize("name", ["elalora", "adalora"])
def test_a_decoder_serves_as_well(name: str, tmp_path: Path) -> None:
    model = tiny_llama_classifier(2, layers=1, dtype=torch.float32)
    setup = make_setup(model, mean_rank=2)
    built = BASELINES[name](setup)
    trainer_of(built, tmp_path).train()
    assert sum(built.ranks().values()) == 2 * 7


def test_a_target_that_is_not_there_is_named() -> None:
    with pytest.raises(SettingsError, match=r"adapter\.target_modules nowhere"):
        build("adalora", target_modules=["nowhere"])
