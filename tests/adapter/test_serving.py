"""What is served beside the weights: tokenizer, chat template, generation_config, and the command of each server."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from families import FAMILIES, tokenizer_of
from kinds import bert_classifier, classifier, edit, saved, with_experts
from loras import lora_config, save_base, save_lora
from models import SIZES, tiny_bert
from tsqlora.adapter.doctor import examine
from tsqlora.adapter.export import save_merged
from tsqlora.adapter.servers import rule_for
from tsqlora.training.export import export


def chat_model(folder: Path) -> Path:
    """An adapter on a tiny chat model."""
    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(**{**SIZES, "vocab_size": 400}, num_key_value_heads=1))
    base.generation_config = GenerationConfig(eos_token_id=7, temperature=0.5, do_sample=True)
    save_base(folder / "base", base)
    tokenizer_of(FAMILIES["qwen 2.5"]).save_pretrained(folder / "base")
    source = save_lora(folder / "a", base, lora_config())
    edit(source, base_model_name_or_path=str(folder / "base"))
    return source


@pytest.mark.parametrize("format", ["universal", "gguf", "merged"])
def test_an_export_has_the_tokenizer_the_template_and_the_settings_of_its_base(format: str, tmp_path: Path) -> None:
    source, out = chat_model(tmp_path), tmp_path / "out"
    report = export(source, out, format=format, base=str(tmp_path / "base"))
    assert (out / "chat_template.jinja").read_text() == FAMILIES["qwen 2.5"].template
    if format != "gguf":  # llama.cpp has them in the base's file
        assert (out / "tokenizer.json").read_text() == (tmp_path / "base" / "tokenizer.json").read_text()
        assert GenerationConfig.from_pretrained(out).temperature == 0.5
    lines, template = report["serve"], f"{out}/chat_template.jinja"
    if format == "gguf":
        assert lines == {
            "llama.cpp": f"llama-server -m BASE.gguf --lora {out}/adapter.gguf --jinja --chat-template-file {template}"
        }
    elif format == "merged":
        assert set(lines) == {"vLLM", "SGLang", "TGI"}
        assert lines["vLLM"] == f"vllm serve {out} --chat-template {template}"
        assert lines["SGLang"] == f"python -m sglang.launch_server --model-path {out} --chat-template {template}"
    else:
        assert lines["vLLM"] == (
            f"vllm serve {tmp_path}/base --enable-lora --max-lora-rank 8 --lora-modules adapter={out} "
            f"--chat-template {template}"
        )
        assert lines["SGLang"].startswith(f"python -m sglang.launch_server --model-path {tmp_path}/base --lora-paths ")


def test_the_doctor_has_a_command_for_each_server_that_reads_the_adapter_as_it_is(tmp_path: Path) -> None:
    lines = {
        one["name"]: one["serve"] for one in examine(saved(rank_pattern={"k_proj": 3})(tmp_path / "a b"))["consumers"]
    }
    quoted = f"'adapter={tmp_path}/a b'"
    assert lines["vLLM"] == f"vllm serve BASE --enable-lora --max-lora-rank 8 --lora-modules {quoted}"
    assert {name for name, line in lines.items() if line} == {"vLLM"}, "the others need an export, or serve nothing"


def test_vllm_gets_the_largest_rank_that_the_config_names(tmp_path: Path) -> None:
    low = saved(r=32, rank_pattern=dict.fromkeys(("q_proj", "k_proj", "v_proj"), 4))(tmp_path / "a")
    experts = with_experts(tmp_path / "b", target_modules=[])
    (tmp_path / "base").mkdir()
    base = {"architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss", "tie_word_embeddings": False}
    (tmp_path / "base" / "config.json").write_text(json.dumps(base))
    edit(experts, base_model_name_or_path=str(tmp_path / "base"))
    for source, rank in ((low, 32), (experts, 8)):
        report = examine(source)
        assert f" --max-lora-rank {rank} " in report["consumers"][1]["serve"]
        assert report["max_lora_rank"] == rank


def test_a_classifier_has_commands_for_its_merged_model_alone(tmp_path: Path) -> None:
    assert not any(one["serve"] for one in examine(classifier(tmp_path / "a"))["consumers"])
    source = bert_classifier(tmp_path / "b")
    lines = export(source, tmp_path / "out", format="merged")["serve"]
    assert lines["text-embeddings-inference"] == f"text-embeddings-router --model-id {tmp_path}/out --dtype float32"
    assert set(lines) == {"vLLM", "SGLang", "text-embeddings-inference"}


def test_a_merged_classifier_names_its_labels(tmp_path: Path) -> None:
    """transformers leaves LABEL_0 and LABEL_1 out of config.json; text-embeddings-inference does not start then."""
    base = tiny_bert(num_labels=2).float()
    save_base(tmp_path / "base", base)
    config = lora_config(task_type="SEQ_CLS", target_modules=["query", "value"])
    source = save_lora(tmp_path / "a", base, config)
    export(source, tmp_path / "out", format="merged", base=str(tmp_path / "base"))
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["id2label"] == {"0": "LABEL_0", "1": "LABEL_1"}
    assert written["label2id"] == {"LABEL_0": 0, "LABEL_1": 1}


BERT = {"max_position_embeddings", "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"}
BERT |= {"intermediate_size", "hidden_act", "type_vocab_size", "initializer_range", "layer_norm_eps", "pad_token_id"}
DEBERTA = {"relative_attention", "max_relative_positions", "position_biased_input", "pos_att_type"}
DISTILBERT = {"vocab_size", "dim", "n_layers", "n_heads", "hidden_dim", "activation", "max_position_embeddings"}
SMALL = {"vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}


READ: Mapping[str, tuple[Mapping[str, Any], set[str]]] = {
    **dict.fromkeys(("Bert", "XLMRoberta"), (SMALL, BERT | {"hidden_dropout_prob"})),
    "DebertaV2": (
        SMALL | {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
        BERT - {"pad_token_id"} | DEBERTA | {"pooler_hidden_size", "pooler_hidden_act"},
    ),
    "DistilBert": (
        {"vocab_size": 60, "dim": 16, "n_layers": 1, "n_heads": 2, "hidden_dim": 32},
        DISTILBERT | {"pad_token_id"},
    ),
}
"""By family the sizes of a tiny classifier, and what text-embeddings-inference reads in its config.json."""


@pytest.mark.parametrize("family", READ)
def test_a_merged_classifier_has_what_text_embeddings_inference_reads(family: str, tmp_path: Path) -> None:
    """The fields without a default of its structs at 0d124dc; transformers 5 leaves some of ModernBERT's out."""
    (sizes, read), model = READ[family], getattr(transformers, f"{family}ForSequenceClassification")
    rule, _ = rule_for("text-embeddings-inference")
    assert model.__name__ in rule.serves
    save_merged(model(model.config_class(**sizes)), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert {*read, "architectures", "model_type", "id2label", "label2id"} <= config.keys()
    assert all(config[name] is not None for name in read)
    assert (tmp_path / "model.safetensors").is_file()
