"""Models whose parts have separate configs: every export of an adapter, on the classes of these models."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertLMHeadModel,
    BertModel,
    CLIPVisionConfig,
    EncoderDecoderModel,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Llama4Config,
    Llama4ForConditionalGeneration,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    MistralConfig,
    PixtralVisionConfig,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

from loras import lora_config, save_base, save_lora
from models import SIZES
from tsqlora.errors import UnsupportedError
from tsqlora.training.export import export

TEXT: Mapping[str, Any] = {**SIZES, "num_key_value_heads": 1, "head_dim": 8, "bos_token_id": 1, "eos_token_id": 2}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}
IMAGE = 55
"""The token that stands for an image."""
ROPE = {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 1e4}}


def gemma3() -> PreTrainedModel:
    config = Gemma3Config(text_config=TEXT, vision_config=VISION, mm_tokens_per_image=1, image_token_index=IMAGE)
    return Gemma3ForConditionalGeneration(config)


def gemma4() -> PreTrainedModel:
    transformers: Any = pytest.importorskip("transformers.models.gemma4", reason="this transformers has no Gemma 4")
    text = TEXT | {"hidden_size_per_layer_input": 4, "vocab_size_per_layer_input": 60, "global_head_dim": 8}
    config = transformers.Gemma4Config(
        text_config=text | {"num_kv_shared_layers": 0}, vision_config=VISION | {"head_dim": 8}, image_token_id=IMAGE
    )
    return transformers.Gemma4ForConditionalGeneration(config)


def qwen2_vl() -> PreTrainedModel:
    vision = {"depth": 1, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "patch_size": 8}
    return Qwen2VLForConditionalGeneration(
        Qwen2VLConfig(text_config=TEXT | ROPE, vision_config=vision, image_token_id=IMAGE)
    )


def qwen25_vl() -> PreTrainedModel:
    vision = {"depth": 1, "hidden_size": 16, "out_hidden_size": 16, "intermediate_size": 16, "num_heads": 2}
    return Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(text_config=TEXT | ROPE, vision_config=vision, image_token_id=IMAGE)
    )


def qwen3_vl() -> PreTrainedModel:
    vision = {"depth": 1, "hidden_size": 16, "out_hidden_size": 16, "intermediate_size": 16, "num_heads": 2}
    vision |= {"deepstack_visual_indexes": [0], "patch_size": 8, "num_position_embeddings": 4}
    return Qwen3VLForConditionalGeneration(
        Qwen3VLConfig(text_config=TEXT | ROPE, vision_config=vision, image_token_id=IMAGE)
    )


def llava() -> PreTrainedModel:
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**VISION), text_config=LlamaConfig(**TEXT), image_token_index=IMAGE
    )
    return LlavaForConditionalGeneration(config)


def mistral3() -> PreTrainedModel:
    vision = PixtralVisionConfig(**VISION, head_dim=8)
    config = Mistral3Config(vision_config=vision, text_config=MistralConfig(**TEXT), image_token_index=IMAGE)
    return Mistral3ForConditionalGeneration(config)


def llama4() -> PreTrainedModel:
    text = TEXT | {"intermediate_size_mlp": 32, "num_local_experts": 2, "moe_layers": [], "pad_token_id": 0}
    vision = VISION | {"vision_output_dim": 16, "projector_input_dim": 16, "projector_output_dim": 16}
    return Llama4ForConditionalGeneration(Llama4Config(text_config=text, vision_config=vision, image_token_index=IMAGE))


def encoder_decoder() -> PreTrainedModel:
    decoder = BertLMHeadModel(BertConfig(**SIZES, is_decoder=True, add_cross_attention=True))
    return EncoderDecoderModel(encoder=BertModel(BertConfig(**SIZES | {"vocab_size": 40})), decoder=decoder)


FAMILIES: Mapping[str, tuple[Callable[[], PreTrainedModel], str]] = {
    "Gemma 3": (gemma3, "q_proj"),
    "Gemma 4": (gemma4, "q_proj"),
    "Qwen2-VL": (qwen2_vl, "q_proj"),
    "Qwen2.5-VL": (qwen25_vl, "q_proj"),
    "Qwen3-VL": (qwen3_vl, "q_proj"),
    "Llava": (llava, "q_proj"),
    "Mistral 3": (mistral3, "q_proj"),
    "Llama 4": (llama4, "q_proj"),
    "EncoderDecoder": (encoder_decoder, "query"),
}
"""A tiny model, and the last name of the layers that its adapter changes."""


@pytest.fixture(scope="module", params=FAMILIES)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The directories of a base and of an adapter on it."""
    build, target = FAMILIES[request.param]
    folder = tmp_path_factory.mktemp("composite")
    torch.manual_seed(0)
    save_base(folder / "base", model := build())
    parts = [name for name, _ in model.named_modules() if name.endswith(target) and "vision" not in name]
    task = None if request.param == "EncoderDecoder" else "CAUSAL_LM"
    save_lora(folder / "a", model, lora_config(target_modules=parts, task_type=task))
    return folder / "base", folder / "a"


@pytest.mark.parametrize(
    "options",
    [{"format": "peft"}, {"format": "universal"}, {"format": "compressed", "max_rank": 4}, {"format": "merged"}],
    ids=lambda options: options["format"],
)
def test_an_adapter_on_a_part_is_exported_in_every_form(
    options: Mapping[str, Any], saved: tuple[Path, Path], tmp_path: Path
) -> None:
    base, adapter = saved
    report = export(adapter, tmp_path / "out", base=str(base), **options)
    assert report["relative_difference"] < 1e-5
    if any("Llama4ForConditionalGeneration does not run on tokens" in note for note in report["notes"]):
        pytest.skip("its forward pass is broken in transformers 5.24: only the updates were compared")
    assert report["logits_difference"] < 1e-4 * report["largest_logit"]
    assert report["largest_logit"] > 0.01


def test_a_file_for_llama_cpp_is_refused_by_the_models_name(saved: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = saved
    with pytest.raises(UnsupportedError, match="the base is a "):
        export(adapter, tmp_path / "out", format="gguf", base=str(base))


def test_the_text_part_of_a_model_of_images_is_exported_alone(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", llama4())
    text = AutoModelForCausalLM.from_pretrained(base)
    assert type(text).__name__ == "Llama4ForCausalLM"
    save_lora(tmp_path / "a", text, lora_config())
    report = export(tmp_path / "a", tmp_path / "out", format="merged", base=str(base))
    assert report["logits_difference"] < 1e-4 * report["largest_logit"]
