"""Bases whose weights are quantised, loaded as transformers loads them: bitsandbytes, torchao."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, LlamaForSequenceClassification, TorchAoConfig

import tsqlora as tsq
from models import collate, samples, tiny_llama_classifier
from scoring import assert_agree, logits_of, score_by, slow, slow_layers, slow_offsets, teach
from slotted import assert_hidden_are_zero, resize, take_steps, trained, update, updates
from tsqlora import paper
from tsqlora.libs.bitsandbytes import linear_bits
from tsqlora.paper import probe
from tsqlora.paper.sites import effective_weight, lora_layers
from tsqlora.paper.slots import find_slots

pytestmark = [
    # torch warns of its own script_method, which bitsandbytes imports.
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"),
    # bitsandbytes tells that it rounds float32 inputs, as it always does.
    pytest.mark.filterwarnings("ignore:MatMul8bitLt. inputs will be cast:UserWarning"),
]

ROWS = samples(6, 3)
Q = "model.layers.0.self_attn.q_proj"
DOWN = "model.layers.1.mlp.down_proj"


def four_bit(double: bool) -> Callable[[], Any]:
    return lambda: BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.float32,
        bnb_4bit_use_double_quant=double,
    )


def torchao_int8() -> Any:
    quantization = pytest.importorskip("torchao.quantization")
    return TorchAoConfig(quantization.Int8WeightOnlyConfig())


QUANTISED: dict[str, Callable[[], Any]] = {
    "nf4": four_bit(False),
    "nf4, scales quantised too": four_bit(True),
    "int8": lambda: BitsAndBytesConfig(load_in_8bit=True),
    "torchao int8": torchao_int8,
}
FOUR_BIT = ("nf4", "nf4, scales quantised too")
ROUNDS_INPUTS = ("int8",)
"""The layer computes with rounded inputs: what it gives is its weight times its input to a percent."""


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    tiny_llama_classifier(hidden=64, intermediate=128, dtype=torch.float32).save_pretrained(folder)
    return folder


def load(saved: Path, kind: str) -> LlamaForSequenceClassification:
    if kind != "torchao int8":
        pytest.importorskip("bitsandbytes")
    return LlamaForSequenceClassification.from_pretrained(
        saved, quantization_config=QUANTISED[kind](), dtype=torch.float32
    )


def quantised(saved: Path, kind: str, **options: Any) -> PeftModel:
    """Wrapped, two steps old."""
    torch.manual_seed(0)
    model = paper.wrap(load(saved, kind), **{"mean_rank": 4} | options)
    take_steps(model, torch.optim.AdamW(trained(model), lr=0.01), 2)
    return model.eval()


@pytest.mark.parametrize("kind", QUANTISED)
def test_the_effective_weight_is_what_the_layer_computes_with(saved: Path, kind: str) -> None:
    original = tiny_llama_classifier(hidden=64, intermediate=128, dtype=torch.float32)
    model = quantised(saved, kind)
    for name, layer in lora_layers(model).items():
        weight = effective_weight(layer)
        assert weight.dtype == torch.float32
        x = torch.randn(5, weight.shape[1])
        tolerance = 0.02 if kind in ROUNDS_INPUTS else 1e-5
        with torch.no_grad():
            expected = layer(x)  # type: ignore[operator]
            off = weight - update(layer, "default") - original.get_submodule(name).weight  # type: ignore
        assert float((x @ weight.T - expected).norm() / expected.norm()) < tolerance, name
        assert 0 < float(off.norm() / weight.norm()) < (0.15 if kind in FOUR_BIT else 0.02), name


@pytest.mark.parametrize("kind", QUANTISED)
def test_measuring_and_an_evaluation_leave_the_model_and_its_gradients_as_they_were(saved: Path, kind: str) -> None:
    """On CPUs with AVX512-BF16 bitsandbytes would pack 4-bit weights then, and only LoRA's own path had a gradient."""

    def gradient() -> Tensor:
        model.zero_grad()
        model.eval()(**collate(ROWS)).loss.backward()
        return find_slots(model)[Q].b.grad.clone()

    model = quantised(saved, kind)
    before = gradient()
    logits, weights = logits_of(model, ROWS), {n: effective_weight(x) for n, x in lora_layers(model).items()}
    parameters = {id(p) for p in model.parameters()}
    first, again = (paper.sensitivity(model, ROWS, collate).values for _ in range(2))
    assert first == again
    assert torch.equal(logits_of(model, ROWS), logits)
    assert all(torch.equal(effective_weight(layer), weights[n]) for n, layer in lora_layers(model).items())
    assert {id(p) for p in model.parameters()} == parameters
    assert torch.equal(gradient(), before)


@pytest.mark.parametrize("kind", ["nf4", "torchao int8"])
def test_layers_and_samples_are_measured_over_a_quantised_base_as_by_the_slow_twins(
    saved: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe, "SAMPLED_OUTPUTS", 200)  # more than any layer has
    model, rows = quantised(saved, kind), samples(12, 3)
    target = slow_layers(model, ROWS, weight=effective_weight)
    assert dict(paper.sensitivity(model, ROWS, collate, batch_size=4).values) == pytest.approx(target, rel=1e-3)
    teach(model, rows)
    scores = score_by(model, rows, collate, reference=range(9), batch_size=4)
    assert_agree(scores, slow(model, rows, range(9), offsets=slow_offsets(model, rows[:9])), rtol=1e-3)


@pytest.mark.parametrize("kind", QUANTISED)
def test_ranks_change_over_a_quantised_base_and_plain_peft_loads_the_adapter(
    saved: Path, kind: str, tmp_path: Path
) -> None:
    model = quantised(saved, kind)
    resize(model, {Q: 7, DOWN: 0})
    take_steps(model, torch.optim.AdamW(trained(model), lr=0.01), 1)
    assert_hidden_are_zero(model)
    assert bool(updates(model)[Q].any())
    assert not updates(model)[DOWN].any()
    before = logits_of(model.eval(), ROWS)
    assert torch.equal(logits_of(paper.finalize(model), ROWS), before)
    assert not isinstance(model.get_base_model().get_submodule(DOWN), type(lora_layers(model)[Q]))
    model.save_pretrained(str(tmp_path))
    loaded = PeftModel.from_pretrained(load(saved, kind), str(tmp_path))
    for module in loaded.modules():
        if linear_bits(module) == 4:
            module.support_avx512bf16_for_cpu = False  # which rounds to bfloat16, in evaluation only
    torch.testing.assert_close(logits_of(loaded, ROWS), before, rtol=1e-5, atol=1e-5)


def test_losses_over_8_bit_are_scored_and_gradients_refused_since_outliers_couple_a_batch(saved: Path) -> None:
    model, rows = quantised(saved, "int8"), samples(14, 3)
    teach(model, rows)
    losses = nn.functional.cross_entropy(logits_of(model, rows), torch.tensor([row["labels"] for row in rows]))
    scores = score_by(model, rows, collate, terms=("loss",), calibration=False, batch_size=1)
    assert float(scores.terms["loss"].mean()) == pytest.approx(float(losses), rel=1e-4)
    with pytest.raises(tsq.UnsupportedError, match="couples the samples of a batch"):
        score_by(model, rows, collate, reference=range(10), batch_size=4)


def test_a_weight_that_was_packed_for_inference_is_refused(saved: Path) -> None:
    model = quantised(saved, "nf4")
    lora_layers(model)[Q].get_base_layer().weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(tsq.UnsupportedError, match=r"packed a 4-bit weight.* reload the model"):
        paper.sensitivity(model, ROWS, collate)


def test_a_base_packed_by_gptq_is_refused_by_name() -> None:
    base = tiny_llama_classifier()
    base.config.quantization_config = {"quant_method": "gptq", "bits": 4}
    with pytest.raises(tsq.UnsupportedError, match="GPTQ"):
        paper.wrap(base)
