import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import BertForTokenClassification

import tsqlora as tsq
from models import collate, samples, tiny_bert, tiny_gpt2, tiny_llama_classifier
from oracles import slow_multi_label_loss, slow_sensitivity, slow_token_loss
from scoring import assert_unchanged, effective_weight, fingerprint, slow_layers
from slotted import QUERY, WIDE, wrapped
from tsqlora import paper
from tsqlora.paper import probe as probe
from tsqlora.paper.probe import SKETCH_ROWS, Probe, probe_pass
from tsqlora.paper.sites import lora_layers
from tsqlora.rows.batches import padded_labels

ROWS = samples(9, 3, lengths=(3, 11))


def by_hand(model: nn.Module, number: Callable[[LoraLayer], Tensor]) -> dict[str, float]:
    """Mean over ROWS of a layer's number after one sample's backward pass; W's gradient is its base weight's."""
    model.eval()
    layers = lora_layers(model)
    totals = dict.fromkeys(layers, 0.0)
    for layer in layers.values():
        layer.get_base_layer().weight.requires_grad_(True)
    for row in ROWS:
        model.zero_grad()
        model(**collate([row])).loss.backward()
        for name, layer in layers.items():
            totals[name] += float(number(layer).detach()) / len(ROWS)
    return totals


@pytest.mark.parametrize(
    ("base", "chunk"), [(tiny_bert, 1), (tiny_bert, 2**21), (tiny_llama_classifier, 1000), (tiny_gpt2, 2**21)]
)
def test_sensitivity_is_that_of_the_slow_twin(base: Any, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "CHUNK", chunk)
    model = wrapped(base(), ranks={QUERY: 7, WIDE: 0} if base is tiny_bert else {})
    measured = paper.sensitivity(model, ROWS, collate, batch_size=4)
    expected = slow_layers(model, ROWS)
    assert dict(measured.values) == pytest.approx(expected, rel=1e-6 if base is tiny_llama_classifier else 1e-12)
    assert measured.samples == len(ROWS)
    assert measured.shapes == {
        name: (layer.in_features, layer.out_features) for name, layer in lora_layers(model).items()
    }


@pytest.mark.parametrize("base", [tiny_bert, tiny_gpt2])
def test_sampled_is_the_mean_over_every_kth_output(base: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "SAMPLED_OUTPUTS", 5)
    model = wrapped(base())

    def every_kth(layer: LoraLayer) -> Tensor:
        weight, outputs = layer.get_base_layer().weight, layer.out_features
        product = (weight + layer.get_delta_weight("default")) * weight.grad
        product = product.T if base is tiny_gpt2 else product
        return product[:: max(1, outputs // 5)].abs().mean()

    assert max(layer.out_features // 5 for layer in lora_layers(model).values()) > 1
    measured = paper.sensitivity(model, ROWS, collate, batch_size=4)
    assert dict(measured.values) == pytest.approx(by_hand(model, every_kth), rel=1e-5)


@pytest.mark.parametrize("head", [32, 64, 128, 256])
@pytest.mark.parametrize("outputs", [1024, 2048, 3072, 4096, 6144, 8192])
def test_sampled_sees_every_kind_of_place_in_a_head(outputs: int, head: int) -> None:
    """Rotary positions turn head / 2 pairs of places, each at its own speed: of each eighth of them one is there."""
    pairs = {output % (head // 2) for output in range(0, outputs, probe.stride(outputs))}
    assert {pair * 16 // head for pair in pairs} == set(range(8))


def tag_batch(batch: list[dict[str, Any]]) -> dict[str, Tensor]:
    made = collate([{**row, "labels": 0} for row in batch])
    made["labels"] = torch.from_numpy(padded_labels([row["labels"] for row in batch], made["input_ids"].shape[1]))
    return made


@pytest.mark.parametrize("task", ["several labels", "tags"])
def test_sensitivity_of_several_labels_and_of_tags_is_that_of_the_slow_twin(task: str) -> None:
    if task == "tags":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            base: Any = BertForTokenClassification(tiny_bert(num_labels=3).config).double()
    else:
        base = tiny_bert(num_labels=4, problem_type="multi_label_classification")
    model, rows, rng = wrapped(base), samples(7, 3, lengths=(3, 11)), np.random.default_rng(0)
    for row in rows:
        tags = [-100, *[token % 3 for token in row["input_ids"][1:]]]
        row["labels"] = tags if task == "tags" else rng.integers(0, 2, 4).astype(float).tolist()
    batch, slow_loss = (tag_batch, slow_token_loss) if task == "tags" else (collate, slow_multi_label_loss)
    layers = {n.removeprefix("base_model.model."): m for n, m in model.named_modules() if isinstance(m, LoraLayer)}
    expected = slow_sensitivity(
        model,
        [batch([row]) for row in rows],
        sample_loss=lambda z, y: slow_loss(z[0], y[0]).reshape(1),
        layers=layers,
        effective_weight=effective_weight,
    )
    measured = paper.sensitivity(model, rows, batch, batch_size=3)
    assert dict(measured.values) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(("batch_size", "pad_to"), [(1, 11), (4, 20)])
def test_numbers_do_not_depend_on_batches_padding_or_order(batch_size: int, pad_to: int) -> None:
    measured = probe_pass(MODEL, ROWS[::-1], lambda rows: collate(rows, pad_to), batch_size=batch_size)
    assert dict(measured.sensitivity().values) == pytest.approx(WHOLE, rel=1e-10)
    assert measured.sensitivity().samples == len(ROWS)
    for name, sketch in probe_pass(MODEL, ROWS, collate).directions().items():
        torch.testing.assert_close(sketch, measured.directions()[name])


def test_the_model_is_left_as_it_was() -> None:
    model = wrapped().train()
    model(**collate(ROWS)).loss.backward()
    model.get_submodule("base_model.model.bert.pooler").eval()
    before = fingerprint(model)
    paper.sensitivity(model, ROWS, collate)
    assert_unchanged(before, model)


def test_dropout_is_off_and_frozen_models_are_measured_too() -> None:
    model = wrapped().train()
    measured = paper.sensitivity(model, ROWS, collate).values
    assert measured == WHOLE
    model.requires_grad_(False)
    assert paper.sensitivity(model, ROWS, collate).values == measured


def test_half_precision_is_near() -> None:
    model = wrapped(dtype=torch.float32)
    exact = paper.sensitivity(model, ROWS, collate).values
    half = paper.sensitivity(model, ROWS, collate, autocast=torch.bfloat16).values
    assert half != exact
    assert dict(half) == pytest.approx(dict(exact), rel=0.1)


def test_invalid_arguments_are_errors() -> None:
    with pytest.raises(tsq.UnsupportedError, match="no LoRA layers"):
        paper.sensitivity(tiny_bert(), ROWS, collate)
    with pytest.raises(tsq.SettingsError, match="no rows"):
        paper.sensitivity(MODEL, [], collate)


def test_a_probe_that_saw_no_backward_is_an_error() -> None:
    watching = Probe(lora_layers(MODEL))
    with watching.watch(MODEL), torch.no_grad():
        MODEL(**collate(ROWS))
    with pytest.raises(tsq.UnsupportedError, match="no backward pass"):
        watching.sensitivity()


def test_a_layer_that_is_not_used_has_no_sensitivity_and_no_direction() -> None:
    class Skips(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.unused = nn.Linear(4, 4)
            self.used = nn.Linear(4, 3)

        def forward(self, input_ids: Tensor) -> Tensor:
            return self.used(input_ids.float()[:, :4])

    model = paper.wrap(Skips(), mean_rank=2, target_modules=["unused", "used"])
    result = probe_pass(model, ROWS, lambda rows: {k: v for k, v in collate(rows, 12).items() if k != "attention_mask"})
    assert result.sensitivity().samples == len(ROWS)
    assert result.sensitivity().values["unused"] == 0 < result.sensitivity().values["used"]
    assert not result.directions()["unused"].any()


def test_directions_are_a_sketch_of_the_layers_gradient_drawn_by_seed_and_layer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = wrapped()
    layers, gradients = lora_layers(model), dict[int, Tensor]()

    def keep(a: Tensor, b: Tensor, layer: Any) -> Tensor:
        gradients[id(layer)] = torch.einsum("nto,nti->oi", b, a)
        return torch.ones(())

    monkeypatch.setattr(probe, "sampled", keep)
    for seed in (3, 4):
        for name, sketch in probe_pass(model, ROWS, collate, seed=seed).directions().items():
            gradient = gradients[id(layers[name])]
            generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}:{name}".encode()))
            omega = torch.randn(SKETCH_ROWS, len(gradient), generator=generator).double() / SKETCH_ROWS**0.5
            torch.testing.assert_close(sketch, omega @ gradient)


def test_a_batch_for_which_memory_is_short_comes_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """It had measured the upper layers already."""
    lowest = next(iter(lora_layers(MODEL)))
    refused = list[int]()

    def scarce(a: Tensor, b: Tensor, layer: Any) -> Tensor:
        if layer is lora_layers(MODEL)[lowest] and len(a) > 2:
            refused.append(len(a))
            raise torch.OutOfMemoryError
        return b.square().sum()

    monkeypatch.setattr(probe, "sampled", lambda a, b, _: b.square().sum())
    whole = probe_pass(MODEL, ROWS, collate, seed=3)
    monkeypatch.setattr(probe, "sampled", scarce)
    parts = probe_pass(MODEL, ROWS, collate, seed=3)
    assert refused
    assert parts.sensitivity().values == pytest.approx(whole.sensitivity().values)
    for name, sketch in whole.directions().items():
        torch.testing.assert_close(sketch, parts.directions()[name])


def test_a_training_steps_own_backward_serves_up_to_a_factor() -> None:
    """The mean loss of a batch has 1/n of each sample's gradient: only ratios count."""
    model = wrapped()
    watching = Probe(lora_layers(model))
    with watching.watch(model):
        for rows in (ROWS[:3], ROWS[3:6], ROWS[6:]):
            model(**collate(rows)).loss.backward()
    measured = watching.sensitivity()
    assert measured.samples == len(ROWS)
    assert {n: 3 * v for n, v in measured.values.items()} == pytest.approx(WHOLE, rel=1e-10)


MODEL: PeftModel = wrapped()
WHOLE = dict(paper.sensitivity(MODEL, ROWS, collate).values)
