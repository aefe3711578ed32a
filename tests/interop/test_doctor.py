"""Ten kinds of adapter, each with what every consumer makes of it."""

import json
import math
import resource
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from huggingface_hub import constants
from transformers import RobertaConfig, RobertaForSequenceClassification

from kinds import KINDS, Q0, Q1, UNREADABLE, bert_classifier, damaged, edit, saved, with_experts
from loras import lora_config, save_base, save_lora, tiny_gpt2_lm, tiny_llama
from models import tiny_bert
from tsqlora.errors import DataError, SettingsError, UnsupportedError
from tsqlora.interop.checkpoint import base_weights
from tsqlora.interop.doctor import examine, format_for, rule_for, served
from tsqlora.interop.health import layer_health
from tsqlora.interop.lora import Target
from tsqlora.interop.servers import CONSUMERS
from tsqlora.run.export import export

RIGHT = dict.fromkeys((consumer.name for consumer in CONSUMERS if not consumer.only), "right")
OLD_VLLM = ("vLLM to 0.31", "vLLM to 0.30")
NEW_VLLM = ("vLLM", "vLLM to 0.32")
VLLM = (*NEW_VLLM, *OLD_VLLM)
SGLANG = ("SGLang", "SGLang to 0.5.23")
OLD_MLX = "MLX to 0.31"
CONFIG_JSON = "config.json"
SERVERS = (*VLLM, *SGLANG, "llama.cpp", "TGI", "MLX", OLD_MLX, "TensorRT-LLM")


def of_all(names: Sequence[str], verdict: str) -> dict[str, str]:
    return dict.fromkeys(names, verdict)


SAVED_WHOLE = of_all(SERVERS, "wrong -> merged") | of_all((*VLLM, "llama.cpp", "MLX"), "refused -> merged")
EXPECTED: Mapping[str, Mapping[str, str]] = {
    "uniform": {},
    "ranks, one scale": of_all((*SGLANG, "MLX"), "refused -> universal")
    | {"llama.cpp": "wrong -> gguf", "TensorRT-LLM": "wrong -> universal"},
    "ranks, one alpha": of_all((*SGLANG, "MLX"), "refused -> universal")
    | of_all((*OLD_VLLM, "TGI", OLD_MLX), "wrong -> universal"),
    "alphas": of_all((*OLD_VLLM, "SGLang to 0.5.23", "TGI", "MLX", OLD_MLX, "TensorRT-LLM"), "wrong -> universal")
    | {"SGLang": "refused -> universal", "llama.cpp": "wrong -> gguf"},
    "rslora": of_all(SGLANG, "wrong -> universal") | {"llama.cpp": "wrong -> gguf"},
    "a layer without": of_all(SGLANG, "refused -> universal") | {"TGI": "wrong -> universal"},
    "q alone": of_all(SGLANG, "refused -> universal"),
    "q and v": {},
    "up alone": of_all(SGLANG, "refused -> universal"),
    "mlp": {},
    "rank 0": of_all(("PEFT",), "refused -> peft") | of_all((*NEW_VLLM, *SGLANG, "MLX"), "refused -> universal"),
    "dora": of_all((*VLLM, *SGLANG, "llama.cpp", "MLX"), "refused -> merged")
    | of_all(("TGI", OLD_MLX), "wrong -> merged"),
    "embedding": of_all(("TGI", "TensorRT-LLM"), "wrong -> merged"),
    "head": SAVED_WHOLE,
    "classifier": of_all((*NEW_VLLM, "vLLM to 0.31"), "right")
    | of_all(SGLANG, "wrong -> merged")
    | {"vLLM to 0.30": "refused -> merged", "text-embeddings-inference": "refused -> merged"}
    | of_all(("llama.cpp", "TGI", "MLX", OLD_MLX, "TensorRT-LLM"), "refused"),
    "damaged": {},
    "pissa": of_all(SERVERS, "wrong -> merged") | of_all(NEW_VLLM, "refused -> merged"),
    "small rank": {"TGI": "wrong -> universal"},
    "bias of B": of_all((*SGLANG, "llama.cpp", "TGI", "MLX", OLD_MLX, "TensorRT-LLM"), "wrong -> merged")
    | of_all(VLLM, "refused -> merged"),
    "trained tokens": SAVED_WHOLE,
    "resized vocabulary": of_all(("PEFT", *SERVERS), "refused") | of_all(("TGI", "TensorRT-LLM"), "wrong"),
    "tied twice": SAVED_WHOLE,
    "experts": of_all((*VLLM, "TGI", OLD_MLX), "wrong")
    | of_all((*SGLANG, "llama.cpp", "MLX", "TensorRT-LLM"), "refused"),
    "loftq": of_all(SERVERS, "wrong -> merged") | of_all(NEW_VLLM, "refused -> merged"),
    "olora": of_all(SERVERS, "wrong -> merged") | of_all(NEW_VLLM, "refused -> merged"),
    "LLaMA-Factory, PEFT 0.18": {},
    "LLaMA-Factory, resize_vocab": SAVED_WHOLE,
    "axolotl, PEFT 0.20": {},
    "unsloth, texts": {},
    "unsloth, images": of_all(SERVERS, "wrong -> merged") | of_all(SGLANG, "refused -> merged"),
}
"""By kind of adapter, who does not read it right, and what mends it."""


def verdicts(report: Mapping[str, Any]) -> dict[str, str]:
    result = {}
    for consumer in report["consumers"]:
        mended = f" -> {consumer['mend']}" if consumer["mend"] else ""
        result[consumer["name"]] = consumer["verdict"] + mended
    return result


@pytest.mark.parametrize("kind", KINDS)
def test_every_consumer_of_every_kind_of_adapter(kind: str, tmp_path: Path) -> None:
    report = examine(KINDS[kind](tmp_path / "a"))
    assert verdicts(report) == RIGHT | EXPECTED[kind]
    json.dumps(report, allow_nan=False)


@pytest.mark.parametrize("kind", KINDS)
def test_the_doctor_says_what_vllm_and_sglang_were_seen_to_do(kind: str, tmp_path: Path) -> None:
    results = Path(__file__).parents[2] / "bench" / "results" / "servers.json"
    source = KINDS[kind](tmp_path / "a")
    for server, seen in json.loads(results.read_text())["servers"].items():  # their own code, by bench/servers.py
        (result,), done = examine(source, server=server.replace(" ", "=="))["consumers"], seen[kind]
        assert result["verdict"] == done["verdict"], (server, done)
        assert result["factors"] == pytest.approx(done.get("factors", {}), rel=1e-5), server


@pytest.mark.parametrize("kind", UNREADABLE)
def test_what_no_server_can_apply_is_refused_by_name(kind: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"empty tensors|cannot be read|no key matches"):
        examine(UNREADABLE[kind](tmp_path / "a"))
    results = Path(__file__).parents[2] / "bench" / "results" / "servers.json"
    assert "right" not in {seen[kind]["verdict"] for seen in json.loads(results.read_text())["servers"].values()}


def test_another_trainers_adapter_loads_in_peft_and_is_exported(tmp_path: Path) -> None:
    save_base(tmp_path / "base", tiny_llama())
    for trainer in ("LLaMA-Factory, PEFT 0.18", "axolotl, PEFT 0.20", "unsloth, texts"):
        source = KINDS[trainer](tmp_path / trainer)
        report = export(source, tmp_path / f"{trainer} out", format="universal", base=str(tmp_path / "base"))
        assert report["logits_difference"] < 1e-3 * report["largest_logit"]


def test_the_bases_on_which_vllm_takes_no_lora_are_those_of_its_registry() -> None:
    results = Path(__file__).parents[2] / "bench" / "results" / "servers.json"
    for server, bases in json.loads(results.read_text())["bases"].items():
        (rule,), _ = rule_for(server.replace(" ", "=="))
        assert list(rule.bases) == bases, server


def test_the_layers_on_which_sglang_takes_lora_are_those_whose_sizes_it_knows() -> None:
    results = Path(__file__).parents[2] / "bench" / "results" / "servers.json"
    ((server, layers),) = json.loads(results.read_text())["layers"].items()
    for version in (server.replace(" ", "=="), "sglang"):
        (rule,), _ = rule_for(version)
        assert list(rule.layers) == layers, version


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "universal" in str(EXPECTED[kind])])
def test_the_universal_export_is_right_where_it_is_said_to_be(kind: str, tmp_path: Path) -> None:
    save_base(tmp_path / "base", tiny_llama())
    source = KINDS[kind](tmp_path / "a")
    export(source, tmp_path / "out", format="universal", base=str(tmp_path / "base"))
    assert verdicts(examine(tmp_path / "out")) == RIGHT


def of(report: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    (result,) = (consumer for consumer in report["consumers"] if consumer["name"] == name)
    return result


@pytest.mark.parametrize(
    ("server", "rule", "noted"),
    [
        ("vllm", "vLLM", False),
        ("vLLM==0.33.0", "vLLM", False),
        ("vllm==0.40", "vLLM", True),
        ("vllm==main", "vLLM", True),
        ("vllm==0.32.0", "vLLM to 0.32", False),
        ("vllm==v0.31.2rc1", "vLLM to 0.31", True),
        ("vllm==0.6.3", "vLLM to 0.30", True),
        ("sglang==0.5.23", "SGLang to 0.5.23", False),
        ("sglang==0.5.24", "SGLang", True),
        ("llama-cpp==b4567", "llama.cpp", True),
        ("mlx==0.32.2", "MLX", False),
        ("mlx==0.31.3", OLD_MLX, False),
    ],
)
def test_a_version_finds_its_rule_and_is_named_where_it_was_not_read(server: str, rule: str, noted: bool) -> None:
    (result,), notes = rule_for(server)
    assert (result.name, bool(notes)) == (rule, noted)


@pytest.mark.parametrize(("server", "named"), [("vlm", "did you mean 'vllm'"), ("vllm==new", "'new'")])
def test_a_server_or_version_that_is_none_is_named(server: str, named: str, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=named):
        examine(tmp_path, server=server)


@pytest.mark.parametrize("named", [True, False])
def test_the_rules_know_the_class_of_the_base(named: bool, tmp_path: Path) -> None:
    report = examine(bert_classifier(tmp_path, named=named))
    assert report["base_class"] == "BertForSequenceClassification"
    assert verdicts(report) == of_all(("PEFT", "vLLM"), "right") | of_all(
        ("vLLM to 0.32", *OLD_VLLM, *SGLANG, "text-embeddings-inference"), "refused -> merged"
    ) | of_all(("llama.cpp", "TGI", "MLX", OLD_MLX, "TensorRT-LLM"), "refused")
    assert "takes no LoRA on BertForSequenceClassification" in of(report, "vLLM to 0.32")["reasons"]
    assert "takes no LoRA on layers named key, query, value" in of(report, "SGLang")["reasons"]


@pytest.mark.parametrize("added", [0, 1])
def test_vllm_takes_no_head_of_more_classes_than_the_base_has(added: int, tmp_path: Path) -> None:
    source = bert_classifier(tmp_path)
    labels = {str(number): f"LABEL_{number}" for number in range(3 - added)}
    config = tmp_path / "base" / CONFIG_JSON
    config.write_text(json.dumps(json.loads(config.read_text()) | {"id2label": labels}))
    result = of(examine(source), "vLLM")
    assert (result["verdict"], result["mend"]) == (("refused", "merged") if added else ("right", None))
    assert ("--max-lora-cls-labels 3" in " ".join(result["reasons"])) == bool(added)


@pytest.mark.parametrize(("rank", "verdict"), [(512, "right"), (513, "refused -> merged")])
def test_vllm_takes_no_rank_beyond_its_largest_setting(rank: int, verdict: str, tmp_path: Path) -> None:
    assert {verdicts(examine(saved(r=rank)(tmp_path / "a")))[name] for name in VLLM} == {verdict}


@pytest.mark.parametrize(
    ("base", "verdict"),
    [("LlamaForCausalLM", "right"), ("Qwen3ForCausalLM", "refused"), ("GemmaForCausalLM", "refused"), ("", "right")],
)
def test_tgi_takes_lora_on_few_bases(base: str, verdict: str, tmp_path: Path) -> None:
    source = saved()(tmp_path / "a")
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / CONFIG_JSON).write_text(json.dumps({"architectures": [base] if base else []}))
    edit(source, base_model_name_or_path=str(tmp_path / "base"))
    result = of(examine(source), "TGI")
    assert result["verdict"] == verdict
    assert verdict == "right" or result["reasons"] == [f"takes no LoRA on {base}"]


def test_tgi_leaves_out_the_head_and_layers_of_other_names(tmp_path: Path) -> None:
    report = of(examine(saved(target_modules=["lm_head", "q_proj"])(tmp_path / "a")), "TGI")
    assert (report["verdict"], report["factors"]) == ("wrong", {"lm_head": 0.0})
    source = save_lora(tmp_path / "b", tiny_gpt2_lm(), lora_config(target_modules=["c_attn"], fan_in_fan_out=True))
    report = of(examine(source), "TGI")
    assert (report["verdict"], set(report["factors"].values())) == ("wrong", {0.0}), "without its base's class"


def test_sglang_has_no_buffer_for_layers_of_other_names(tmp_path: Path) -> None:
    source = save_lora(tmp_path / "a", tiny_gpt2_lm(), lora_config(target_modules=["c_attn"], fan_in_fan_out=True))
    report = examine(source)
    assert {verdicts(report)[name] for name in SGLANG} == {"refused -> merged"}
    assert of(report, "SGLang")["reasons"] == ["takes no LoRA on layers named c_attn"]


@pytest.mark.parametrize(
    ("family", "verdict"),
    [("DistilBert", "refused -> merged"), ("DebertaV2", "refused -> merged"), ("MPNet", "refused")],
)
def test_the_classifiers_that_text_embeddings_inference_serves(family: str, verdict: str, tmp_path: Path) -> None:
    source = bert_classifier(tmp_path)
    config = tmp_path / "base" / CONFIG_JSON
    named = {"architectures": [f"{family}ForSequenceClassification"]}
    config.write_text(json.dumps(json.loads(config.read_text()) | named))
    assert verdicts(examine(source))["text-embeddings-inference"] == verdict


def test_a_head_of_two_layers_is_served_merged(tmp_path: Path) -> None:
    sizes = {"vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    base = RobertaForSequenceClassification(RobertaConfig(**sizes, intermediate_size=32, max_position_embeddings=64))
    source = save_lora(tmp_path / "a", base, lora_config(task_type="SEQ_CLS", target_modules=["query", "value"]))
    report = examine(source)
    assert report["base_class"] == "RobertaForSequenceClassification", "by the names of its layers"
    assert {verdicts(report)[name] for name in ("vLLM", "text-embeddings-inference")} == {"refused -> merged"}


def test_verdicts_are_counted_by_server_not_by_rule(tmp_path: Path) -> None:
    servers = examine(bert_classifier(tmp_path))["servers"]
    others = (consumer.server for consumer in CONSUMERS if consumer.server != "diffusers")
    assert list(servers) == list(dict.fromkeys(others)), "it serves no classifiers"
    assert servers["vLLM"] == "right", "its newest rule's"


def test_a_line_says_who_serves_a_classifier_and_how(tmp_path: Path) -> None:
    line = served(bert_classifier(tmp_path))
    assert line == (
        "this classifier is served as it is by PEFT, vLLM; with --format merged by SGLang, text-embeddings-inference; "
        "not by llama.cpp, TGI, MLX, TensorRT-LLM"
    )
    assert served(KINDS["uniform"](tmp_path / "b")) is None


def test_no_export_is_offered_for_a_server_without_such_classifiers(tmp_path: Path) -> None:
    source = bert_classifier(tmp_path)
    assert format_for(source, "sglang") == "merged"
    with pytest.raises(UnsupportedError, match="BertForSequenceClassification"):
        format_for(source, "tgi")
    with pytest.raises(UnsupportedError, match="64 tokens, the base 60"):
        format_for(KINDS["resized vocabulary"](tmp_path / "b"), "vllm")


def test_sglang_refuses_tokens_that_the_adapter_adds(tmp_path: Path) -> None:
    save_base(tmp_path / "base", tiny_llama())
    source = saved()(tmp_path / "a")
    edit(source, base_model_name_or_path=str(tmp_path / "base"))
    (source / "added_tokens.json").write_text(json.dumps({"<old>": 59}))
    assert verdicts(examine(source))["SGLang"] == "right", "the base has it"
    (source / "added_tokens.json").write_text(json.dumps({"<old>": 59, "<new>": 60}))
    assert of(examine(source), "SGLang")["reasons"] == ["takes no added tokens: <new>"]


def test_trained_tokens_are_refused_by_vllm_and_left_out_by_sglang(tmp_path: Path) -> None:
    report = examine(saved(trainable_token_indices=[1, 2])(tmp_path / "a"))
    assert {of(report, name)["verdict"] for name in VLLM} == {"refused"}
    assert {of(report, name)["verdict"] for name in SGLANG} == {"wrong"}
    assert of(report, "PEFT")["verdict"] == "right"


@pytest.mark.parametrize("dense", [False, True])
def test_parameters_of_experts_are_judged_by_vllms_rule(dense: bool, tmp_path: Path) -> None:
    """PEFT stacks the ranks of all experts, and saves gate_up_proj as `experts.base_layer`."""
    source = with_experts(tmp_path / "a", target_modules=["q_proj"] if dense else [])
    report = examine(source)
    assert (report["rank"], report["variants"]) == (8 if dense else 0, ["target_parameters"])
    assert (report["faults"], verdicts(report)["PEFT"]) == ([], "right")
    assert {of(report, name)["verdict"] for name in ("llama.cpp", *SGLANG, "MLX", "TensorRT-LLM")} == {"refused"}
    assert "as interleaved" in of(report, "vLLM")["reasons"][0]
    (tmp_path / "base").mkdir()
    base = {"architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss", "tie_word_embeddings": False}
    (tmp_path / "base" / CONFIG_JSON).write_text(json.dumps(base))
    edit(source, base_model_name_or_path=str(tmp_path / "base"))
    assert {of(examine(source), name)["verdict"] for name in VLLM} == {"right"}
    assert {one["mend"] for one in report["consumers"]} == {None}
    with pytest.raises(UnsupportedError, match="target_parameters"):
        export(source, tmp_path / "out", format="peft")


def test_vllm_needs_both_parameters_of_experts(tmp_path: Path) -> None:
    source = with_experts(tmp_path / "a", target_parameters=["mlp.experts.down_proj"])
    assert {of(examine(source), name)["verdict"] for name in VLLM} == {"refused"}


def test_factors_by_hand(tmp_path: Path) -> None:
    # s is 16/32 = 0.5 in q and 16/8 = 2 elsewhere; vLLM takes 16/8 for all.
    report = examine(saved(rank_pattern={"q_proj": 32})(tmp_path / "a"))
    assert of(report, "vLLM to 0.31")["factors"] == {Q0: 4.0, Q1: 4.0}
    assert of(report, "vLLM to 0.31")["reasons"] == ["2 of 6 layers at 4 times their scale"]
    assert report["max_lora_rank"] == 32
    # s is 2 everywhere; llama.cpp takes 16/4 where the rank is 4.
    report = examine(saved(rank_pattern={Q0: 4}, alpha_pattern={Q0: 8})(tmp_path / "b"))
    assert of(report, "llama.cpp")["factors"] == {Q0: 2.0}
    # rsLoRA: s is 16/√8, and SGLang takes 16/8.
    report = examine(saved(use_rslora=True)(tmp_path / "c"))
    assert of(report, "SGLang")["factors"][Q0] == pytest.approx(1 / math.sqrt(8))


def test_the_doctor_needs_no_torch(tmp_path: Path) -> None:
    save_base(tmp_path / "base", tiny_llama())
    source = KINDS["ranks, one alpha"](tmp_path / "a")
    edit(source, base_model_name_or_path=str(tmp_path / "base"))
    script = (
        "import sys; from tsqlora.cli import main; sys.argv[0] = 'tsqlora'\n"
        "try: main()\n"
        "finally: assert not {'torch', 'transformers', 'peft'} & sys.modules.keys()"
    )
    done = subprocess.run([sys.executable, "-c", script, "doctor", source, "--json"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["base_found"]
    assert report["universal_parameters"]


def test_the_doctor_takes_less_than_four_tenths_of_a_second(tmp_path: Path) -> None:
    """Of the processor; where neighbours slow it down, at most as long as seven imports of numpy."""
    save_base(tmp_path / "base", tiny_llama())
    source = KINDS["ranks, one alpha"](tmp_path / "a")
    edit(source, base_model_name_or_path=str(tmp_path / "base"))

    def seconds(*command: str) -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-c", *command], check=True, capture_output=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    doctor = ("import sys; sys.argv[0] = 'tsqlora'; from tsqlora.cli import main; main()", "doctor", str(source))
    numpy = "import os; os.environ['OPENBLAS_NUM_THREADS'] = '1'; import numpy"
    taken, yardstick = (min(seconds(*command) for _ in range(3)) for command in (doctor, (numpy,)))
    assert taken < max(0.4, 7 * yardstick), (taken, yardstick)


@pytest.mark.parametrize(("prefix", "body"), [("", False), ("bert.", False), ("", True)])
def test_a_body_and_its_model_with_a_head_name_their_layers_alike(prefix: str, body: bool, tmp_path: Path) -> None:
    bert = tiny_bert().float()
    save_base(tmp_path / "base", bert.bert if body else bert)
    weights = base_weights(str(tmp_path / "base"), [f"{prefix}encoder.layer.0.attention.self.query"])
    assert weights is not None
    assert f"{prefix}encoder.layer.1.attention.self.key" in weights
    assert base_weights(str(tmp_path / "base"), ["encoder.layer.0.other"]) is None


def test_the_base_says_how_many_layers_there_are_and_those_that_tgi_drops_are_named(tmp_path: Path) -> None:
    save_base(tmp_path / "base", tiny_llama())
    source = saved(target_modules=[Q0])(tmp_path / "a")
    assert of(examine(source), "TGI")["verdict"] == "right", "one layer is all that the adapter speaks of"
    edit(source, base_model_name_or_path=str(tmp_path / "base"))
    report = examine(source)
    assert report["base_found"]
    assert of(report, "TGI")["factors"] == {Q0: 0.0}
    assert Q1 in of(report, "TGI")["reasons"][0]


def test_a_base_in_the_hubs_cache_counts_as_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    snapshots = tmp_path / "models--org--base" / "snapshots"
    save_base(snapshots / "abc", tiny_llama())
    (refs := snapshots.parent / "refs").mkdir()
    (refs / "main").write_text("abc")
    source = saved(target_modules=[Q0])(tmp_path / "a")
    edit(source, base_model_name_or_path="org/base")
    report = examine(source)
    assert report["base_found"]
    assert not report["notes"]
    assert of(report, "TGI")["factors"] == {Q0: 0.0}
    for revision in ("other", "../abc"):
        edit(source, revision=revision)
        assert not examine(source)["base_found"]


def test_no_gguf_file_is_promised_for_a_base_that_llama_cpp_arranges_unknown_to_us(tmp_path: Path) -> None:
    bert = tiny_bert().float()
    save_base(tmp_path / "base", bert.bert)
    config = lora_config(task_type="FEATURE_EXTRACTION", target_modules=["query"], use_rslora=True)
    source = save_lora(tmp_path / "a", bert.bert, config)
    assert of(examine(source), "llama.cpp")["mend"] == "gguf", "who knows"
    edit(source, base_model_name_or_path=str(tmp_path / "base"))
    assert of(examine(source), "llama.cpp")["mend"] == "merged"


@pytest.mark.parametrize(("tied", "verdict"), [(True, "refused -> merged"), (False, "right")])
@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_llama_cpp_takes_no_adapter_on_a_weight_that_two_layers_share(
    target: str, tied: bool, verdict: str, tmp_path: Path
) -> None:
    save_base(tmp_path / "base", tiny_llama(tied=tied))
    source = saved(target_modules=[target, "q_proj", "v_proj"])(tmp_path / "a")
    edit(source, base_model_name_or_path=str(tmp_path / "base"))
    assert verdicts(examine(source))["llama.cpp"] == verdict


@pytest.mark.parametrize(
    ("head", "server", "verdict"),
    [
        ("norm", "llama.cpp", "wrong"),
        ("norm", "MLX", "refused"),
        ("norm", "TensorRT-LLM", "refused"),
        ("embed_tokens", "TensorRT-LLM", "wrong"),
        ("embed_tokens", "llama.cpp", "refused"),
    ],
)
def test_some_saved_modules_are_left_out_where_others_are_refused(
    head: str, server: str, verdict: str, tmp_path: Path
) -> None:
    (result,) = examine(saved(modules_to_save=[head])(tmp_path / "a"), server=server)["consumers"]
    assert (result["verdict"], result["mend"]) == (verdict, "merged")
    assert head in result["reasons"][0]


def test_an_activated_lora_is_right_in_llama_cpp_and_no_export_helps_the_others(tmp_path: Path) -> None:
    result = verdicts(examine(saved(alora_invocation_tokens=[1, 2])(tmp_path / "a")))
    assert (result["llama.cpp"], result["vLLM"], result["SGLang"]) == ("right", "refused", "wrong")


@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed")
@pytest.mark.filterwarnings("ignore:Adapter 'default'.*LoRA tensor")  # PEFT takes its own biases for shards
@pytest.mark.parametrize("biased", [False, True])
def test_biases_of_b_are_merged_only_into_a_base_with_biases(biased: bool, tmp_path: Path) -> None:
    base = tiny_gpt2_lm if biased else tiny_llama
    save_base(tmp_path / "base", base())
    config = lora_config(target_modules=["c_attn" if biased else "q_proj"], fan_in_fan_out=biased, lora_bias=True)
    source = save_lora(tmp_path / "a", base(), config)
    assert of(examine(source), "TGI")["mend"] == "merged", "no base to look at"
    edit(source, base_model_name_or_path=str(tmp_path / "base"))
    assert of(examine(source), "TGI")["mend"] == ("merged" if biased else None)


def test_damage_is_found_where_it_is(tmp_path: Path) -> None:
    health = examine(damaged(tmp_path / "a"))["health"]
    assert health["nonfinite"] == {Q0: 1}
    assert (health["zero_slots"], health["duplicate_slots"]) == (2 + 8, 1)
    assert health["idle_layers"] == ["model.layers.1.self_attn.v_proj"]
    assert health["layers"]["model.layers.0.self_attn.k_proj"]["zero"] == 2


def test_effective_rank_by_hand() -> None:
    # Singular values 2 and 2 of four slots, one zero, one doubled: two directions of equal size.
    a = np.array([[1.0, 0, 0], [0, 2, 0], [0, 0, 0], [1, 0, 0]])
    b = np.array([[1.0, 0, 0, 1], [0, 1, 5, 0]])
    result = layer_health(Target(a, b, 0.5))
    assert (result.rank, result.zero, result.duplicate) == (4, 1, 1)
    assert result.effective == pytest.approx(2.0)
    assert result.norm == pytest.approx(0.5 * math.sqrt(8))
    assert layer_health(Target(np.zeros((2, 3)), np.ones((3, 2)), 1.0)).effective == 0
    assert layer_health(Target(np.zeros((0, 3)), np.zeros((3, 0)), 1.0)).effective == 0


def test_weights_whose_product_overflows_are_refused() -> None:
    """LAPACK does not return from the SVD of infinite values; the fuzzer found it."""
    with pytest.raises(DataError, match="so large that B·A overflows"):
        layer_health(Target(np.full((2, 3), 1e200), np.full((3, 2), 1e200), 1.0))


def test_pickles_and_a_base_elsewhere_are_noted(tmp_path: Path) -> None:
    source = saved()(tmp_path / "a")
    (source / "optimizer.pt").write_bytes(b"")
    notes = examine(source)["notes"]
    assert "optimizer.pt" in notes[0]
    assert "base model" in notes[1]
    edit(source, base_model_name_or_path="/elsewhere/model")
    assert "/elsewhere/model" in examine(source)["notes"][1]
    save_base(tmp_path / "base", tiny_bert().float())
    edit(source, base_model_name_or_path=str(tmp_path / "base"))
    report = examine(source)
    assert not report["base_found"], "a base with other layers"
    assert not any("another machine" in note for note in report["notes"])
