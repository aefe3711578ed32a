"""Kinds of adapter, each with what every server makes of it, and the faults of adapters that load and do nothing."""

import inspect
import json
import math
import re
import resource
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import RobertaConfig, RobertaForSequenceClassification

from kinds import KINDS, Q0, Q1, UNREADABLE, Build, bert_classifier, damaged, edit, saved, with_experts
from loras import lora_config, save_base, save_lora, tiny_gpt2_lm, tiny_llama
from models import SIZES, tiny_bert
from tsqlora.adapter.checkpoint import as_adapted, unfit
from tsqlora.adapter.doctor import examine, faults_in, format_for, served, serving
from tsqlora.adapter.files import WEIGHTS, read_adapter
from tsqlora.adapter.health import layer_health
from tsqlora.adapter.lora import Target
from tsqlora.adapter.servers import CONSUMERS, Consumer, rule_for
from tsqlora.errors import DataError, SettingsError, UnsupportedError
from tsqlora.training.export import export

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
    "bias of B": of_all(VLLM, "refused -> universal"),  # by the setting alone: Llama has no biases
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
    return {one["name"]: one["verdict"] + (f" -> {one['mend']}" if one["mend"] else "") for one in report["consumers"]}


def of(report: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    (result,) = (consumer for consumer in report["consumers"] if consumer["name"] == name)
    return result


SEEN = json.loads((Path(__file__).parents[2] / "bench" / "results" / "servers.json").read_text())
"""What the servers' own code did, by bench/servers.py."""


@pytest.mark.parametrize("kind", KINDS)
def test_every_consumer_of_every_kind_of_adapter(kind: str, tmp_path: Path) -> None:
    source = KINDS[kind](tmp_path / "a")
    report = examine(source)
    assert verdicts(report) == RIGHT | EXPECTED[kind]
    json.dumps(report, allow_nan=False)
    for server, seen in SEEN["servers"].items():
        rule, _ = rule_for(server.replace(" ", "=="))
        result, done = of(report, rule.name), seen[kind]
        assert result["verdict"] == done["verdict"], (server, done)
        assert result["factors"] == pytest.approx(done.get("factors", {}), rel=1e-5), server
    if "universal" in str(EXPECTED[kind]):
        save_base(tmp_path / "base", tiny_llama())
        export(source, tmp_path / "out", format="universal", base=str(tmp_path / "base"))
        assert verdicts(examine(tmp_path / "out")) == RIGHT


REFUSED = {
    "empty (ZeRO-3)": "empty tensors.*stage3_gather",
    "huge header": "cannot be read",
    "path in a name": "no key matches.*/etc/passwd",
    "adapter's name in keys": "no key matches.*cut the name out",
}


@pytest.mark.parametrize("kind", UNREADABLE)
def test_what_no_server_can_apply_is_refused_by_name(kind: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=REFUSED[kind]):
        examine(UNREADABLE[kind](tmp_path / "a"))
    assert "right" not in {seen[kind]["verdict"] for seen in SEEN["servers"].values()}


def test_the_bases_of_vllm_and_the_layers_of_sglang_are_those_of_their_code() -> None:
    for field in ("bases", "layers"):
        for server, names in SEEN[field].items():
            rule, _ = rule_for(server.replace(" ", "=="))
            assert list(getattr(rule, field)) == names, server
    assert rule_for("sglang")[0].layers == rule_for("sglang==0.5.23")[0].layers


def test_every_check_of_a_rule_is_a_case() -> None:
    cases = re.findall(r'case "([^"]+)"', Path(inspect.getfile(Consumer)).read_text())
    assert {check for rule in CONSUMERS for check in rule.checks} <= set(cases)


def beside(build: Build, **config: Any) -> Build:
    """An adapter that names a base, of which config.json alone is here."""

    def make(folder: Path) -> Path:
        source, base = build(folder), folder.parent / "base"
        base.mkdir(exist_ok=True)
        written = json.loads((base / CONFIG_JSON).read_text()) if (base / CONFIG_JSON).exists() else {}
        (base / CONFIG_JSON).write_text(json.dumps(written | config))
        edit(source, base_model_name_or_path=str(base))
        return source

    return make


def on(base: Callable[[], Any], build: Build) -> Build:
    """An adapter that names a base whose files are here."""

    def make(folder: Path) -> Path:
        save_base(folder.parent / "base", base())
        return beside(build)(folder)

    return make


def bert(folder: Path) -> Path:
    return bert_classifier(folder.parent)


def gpt2(**options: Any) -> Build:
    config = {"target_modules": ["c_attn"], "fan_in_fan_out": True, **options}
    return lambda folder: save_lora(folder, tiny_gpt2_lm(), lora_config(**config))


def roberta(folder: Path) -> Path:
    base = RobertaForSequenceClassification(RobertaConfig(**SIZES))
    return save_lora(folder, base, lora_config(task_type="SEQ_CLS", target_modules=["query", "value"]))


def body(folder: Path) -> Path:
    config = lora_config(task_type="FEATURE_EXTRACTION", target_modules=["query"], use_rslora=True)
    return save_lora(folder, tiny_bert().float().bert, config)


def adding(*tokens: str) -> Build:
    def make(folder: Path) -> Path:
        source = on(tiny_llama, saved())(folder)
        (source / "added_tokens.json").write_text(json.dumps({token: 59 + j for j, token in enumerate(tokens)}))
        return source

    return make


def tiny_tied() -> Any:
    return tiny_llama(tied=True)


def names_of(labels: int) -> dict[str, str]:
    return {str(number): f"LABEL_{number}" for number in range(labels)}


def tei(family: str) -> Build:
    return beside(bert, architectures=[f"{family}ForSequenceClassification"])


GPT_OSS = {"architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss", "tie_word_embeddings": False}
HEAD, EMBEDDING = (saved(target_modules=[name, "q_proj", "v_proj"]) for name in ("lm_head", "embed_tokens"))
PLAIN = saved(target_modules=["q_proj"], lora_bias=True)
CASES: Mapping[str, tuple[Build, Mapping[str, str], str]] = {
    "a base by its config": (
        bert,
        of_all(("PEFT", "vLLM"), "right")
        | of_all(("vLLM to 0.32", *OLD_VLLM, *SGLANG, "text-embeddings-inference"), "refused -> merged")
        | of_all(("llama.cpp", "TGI", "MLX", OLD_MLX, "TensorRT-LLM"), "refused*"),
        "takes no LoRA on layers named key, query, value",
    ),
    "as many classes": (beside(bert, id2label=names_of(3)), {"vLLM": "right"}, ""),
    "more classes": (beside(bert, id2label=names_of(2)), {"vLLM": "refused -> merged"}, "--max-lora-cls-labels 3"),
    "DistilBERT": (tei("DistilBert"), {"text-embeddings-inference": "refused -> merged"}, ""),
    "MPNet": (tei("MPNet"), {"text-embeddings-inference": "refused*"}, "takes no LoRA on MPNet"),
    "a head of two layers": (roberta, of_all(("vLLM", "text-embeddings-inference"), "refused -> merged"), ""),
    "rank 512": (saved(r=512), of_all(VLLM, "right"), ""),
    "rank 513": (saved(r=513), of_all(VLLM, "refused -> merged"), "rank 513 is above 512"),
    "Llama": (beside(saved(), architectures=["LlamaForCausalLM"]), {"TGI": "right"}, ""),
    "Qwen 3": (beside(saved(), architectures=["Qwen3ForCausalLM"]), {"TGI": "refused*"}, "LoRA on Qwen3ForCausalLM"),
    "an unknown base": (beside(saved(), architectures=[]), {"TGI": "right"}, ""),
    "other names": (gpt2(), {"TGI": "wrong*"} | of_all(SGLANG, "refused -> merged"), "layers named c_attn"),
    "a body": (body, {"llama.cpp": "wrong -> gguf"}, ""),
    "a body of BERT": (on(lambda: tiny_bert().float().bert, body), {"llama.cpp": "wrong -> merged"}, ""),
    "a body on its model": (on(lambda: tiny_bert().float(), body), {"llama.cpp": "wrong -> merged"}, ""),
    "old tokens": (adding("<old>"), {"SGLang": "right"}, ""),
    "new tokens": (adding("<old>", "<new>"), {"SGLang": "refused*"}, "takes no added tokens: <new>"),
    "experts": (beside(with_experts, **GPT_OSS), of_all(VLLM, "right"), ""),
    "experts alone": (lambda folder: with_experts(folder, target_modules=[]), of_all(VLLM, "wrong*"), "as interleaved"),
    "half of the experts": (
        lambda folder: with_experts(folder, target_parameters=["mlp.experts.down_proj"]),
        of_all(VLLM, "refused*"),
        "needs gate_up_proj and down_proj",
    ),
    "tied head": (on(tiny_tied, HEAD), {"llama.cpp": "refused -> merged"}, "another layer of the base shares"),
    "tied embedding": (on(tiny_tied, EMBEDDING), {"llama.cpp": "refused -> merged"}, ""),
    "untied head": (on(tiny_llama, HEAD), {"llama.cpp": "right"}, ""),
    "saved norm": (
        saved(modules_to_save=["norm"]),
        {"llama.cpp": "wrong -> merged", "MLX": "refused -> merged", "TensorRT-LLM": "refused -> merged"},
        "model.norm",
    ),
    "saved embedding": (
        saved(modules_to_save=["embed_tokens"]),
        {"TensorRT-LLM": "wrong -> merged", "llama.cpp": "refused -> merged"},
        "saved modules: model.embed_tokens",
    ),
    "activated": (
        saved(alora_invocation_tokens=[1, 2]),
        {"llama.cpp": "right", "vLLM": "refused*", "SGLang": "wrong*"},
        "",
    ),
    "biases of the base": (
        gpt2(bias="lora_only"),
        {"TGI": "wrong -> merged", "MLX to 0.31": "wrong -> merged", "vLLM": "refused -> merged"},
        "ignores bias=lora_only",
    ),
    "biases of B, base unknown": (PLAIN, {"TGI": "wrong -> merged"}, ""),
    "biases of B, no base's": (on(tiny_llama, PLAIN), {"TGI": "wrong"}, ""),
    "biases of B and the base's": (on(tiny_gpt2_lm, gpt2(lora_bias=True)), {"TGI": "refused -> merged"}, ""),
}
"""An adapter, what some servers make of it, and a reason of one of them."""


@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed")
@pytest.mark.filterwarnings("ignore:Adapter 'default'.*LoRA tensor")  # PEFT takes its own biases for shards
@pytest.mark.parametrize("case", CASES)
def test_what_the_files_and_the_base_say_decides(case: str, tmp_path: Path) -> None:
    build, expected, reason = CASES[case]
    report = examine(build(tmp_path / "a"))
    verdict_of = verdicts(report)
    for name, pattern in expected.items():
        assert fnmatchcase(verdict_of[name], pattern), (name, verdict_of[name])
    assert reason in " ".join(reason for consumer in report["consumers"] for reason in consumer["reasons"])
    assert report["faults"] == []


def test_no_export_is_offered_that_cannot_be(tmp_path: Path) -> None:
    source = bert_classifier(tmp_path)
    assert format_for(source, "sglang") == "merged"
    experts = with_experts(tmp_path / "c")
    assert {one["mend"] for one in examine(experts)["consumers"]} == {None}
    for of, server, named in (
        (source, "tgi", "BertForSequenceClassification"),
        (KINDS["resized vocabulary"](tmp_path / "b"), "vllm", "64 tokens, the base 60"),
    ):
        with pytest.raises(UnsupportedError, match=named):
            format_for(of, server)


@pytest.mark.parametrize(
    ("server", "rule", "noted"),
    [
        ("vllm", "vLLM", False),
        ("vLLM==0.33.0", "vLLM", False),
        ("vllm==main", "vLLM", True),
        ("vllm==0.32.0", "vLLM to 0.32", False),
        ("vllm==v0.31.2rc1", "vLLM to 0.31", True),
        ("vllm==0.6.3", "vLLM to 0.30", True),
        ("llama-cpp==b4567", "llama.cpp", True),
        ("mlx==0.31.3", OLD_MLX, False),
        ("vlm", "did you mean 'vllm'", None),
        ("vllm==new", "'new'", None),
    ],
)
def test_a_version_finds_its_rule_and_is_named_where_it_was_not_read(
    server: str, rule: str, noted: bool | None, tmp_path: Path
) -> None:
    if noted is None:
        with pytest.raises(SettingsError, match=rule):
            examine(tmp_path, server=server)
    else:
        result, notes = rule_for(server)
        assert (result.name, bool(notes)) == (rule, noted)


def test_verdicts_are_counted_by_server_and_a_line_says_who_serves_a_classifier(tmp_path: Path) -> None:
    for named in (True, False):
        source = bert_classifier(tmp_path / str(named), named=named)
        report = examine(source)
        assert report["base_class"] == "BertForSequenceClassification"
        others = (consumer.server for consumer in CONSUMERS if consumer.server != "diffusers")
        assert list(report["servers"]) == list(dict.fromkeys(others)), "it serves no classifiers"
        assert served(source) == (
            "this classifier is served as it is by PEFT, vLLM; with --format merged by SGLang, "
            "text-embeddings-inference; not by llama.cpp, TGI, MLX, TensorRT-LLM"
        )
    assert served(KINDS["uniform"](tmp_path / "b")) is None


def test_the_doctor_needs_no_torch_and_four_tenths_of_a_second(tmp_path: Path) -> None:
    """Of the processor; where neighbours slow it down, at most as long as seven imports of numpy."""
    source = on(tiny_llama, KINDS["ranks, one alpha"])(tmp_path / "a")
    doctor = (
        "import sys; from tsqlora.cli import main; sys.argv[0] = 'tsqlora'\n"
        "try: main()\n"
        "finally: {}; assert not {{'torch', 'transformers', 'peft'}} & sys.modules.keys()"
    )

    def seconds(*command: str) -> tuple[float, str]:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run([sys.executable, "-c", *command], check=True, capture_output=True, text=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, done.stdout

    numpy = "import os; os.environ['OPENBLAS_NUM_THREADS'] = '1'; import numpy"
    also = ("import tsqlora.adapter.template", "pass", "pass")
    taken, out = min(seconds(doctor.format(each), "doctor", str(source), "--json") for each in also)
    yardstick, _ = min(seconds(numpy) for _ in range(2))
    assert taken < max(0.4, 7 * yardstick), (taken, yardstick)
    report = json.loads(out)
    assert report["base_found"]
    assert report["universal_parameters"]


def test_a_tied_head_has_the_size_of_the_embedding(tmp_path: Path) -> None:
    for targets in (["lm_head", "q_proj", "v_proj"], ["lm_head"]):
        report = examine(on(tiny_tied, saved(target_modules=targets))(tmp_path / targets[-1]))
        assert (report["base_found"], report["notes"], report["faults"]) == (True, [], [])
    sizes = {"wte": (60, 16), "h.0.attn.c_attn": (16, 48)}  # as on the hub
    names = as_adapted(sizes, ["lm_head", "transformer.h.0.attn.c_attn"], tied=True)
    assert names is not None
    assert names["lm_head"] == (60, 16)


def test_the_base_says_how_many_layers_there_are_also_in_the_hubs_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    source, snapshots = saved(target_modules=[Q0])(tmp_path / "a"), tmp_path / "models--org--base" / "snapshots"
    assert of(examine(source), "TGI")["verdict"] == "right", "one layer is all that the adapter speaks of"
    save_base(snapshots / "abc", tiny_llama())
    (refs := snapshots.parent / "refs").mkdir()
    (refs / "main").write_text("abc")
    for base in (str(snapshots / "abc"), "org/base"):
        edit(source, base_model_name_or_path=base)
        report = examine(source)
        assert (report["base_found"], report["notes"]) == (True, [])
        assert of(report, "TGI")["factors"] == {Q0: 0.0}
        assert Q1 in of(report, "TGI")["reasons"][0]
    for revision in ("other", "../abc"):
        edit(source, revision=revision)
        assert not examine(source)["base_found"]


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
    assert (result.effective, result.norm) == pytest.approx((2.0, 0.5 * math.sqrt(8)))
    assert layer_health(Target(np.zeros((2, 3)), np.ones((3, 2)), 1.0)).effective == 0
    assert layer_health(Target(np.zeros((0, 3)), np.zeros((3, 0)), 1.0)).effective == 0
    with pytest.raises(DataError, match="so large that B·A overflows"):  # LAPACK does not return from infinite values
        layer_health(Target(np.full((2, 3), 1e200), np.full((3, 2), 1e200), 1.0))


def test_pickles_and_a_base_elsewhere_are_noted(tmp_path: Path) -> None:
    source = saved()(tmp_path / "a")
    (source / "optimizer.pt").write_bytes(b"")
    notes = examine(source)["notes"]
    assert "optimizer.pt" in notes[0]
    assert "base model" in notes[1]
    edit(source, base_model_name_or_path="/elsewhere/model")
    assert "/elsewhere/model" in examine(source)["notes"][1]
    report = examine(on(lambda: tiny_bert().float(), saved())(tmp_path / "b"))
    assert not report["base_found"], "a base with other layers"
    assert not any("another machine" in note for note in report["notes"])


# ------------------------------------------------------------------------------------ faults

Change = Callable[[str, Tensor], tuple[str, Tensor] | None]


def adapter(change: Change = lambda key, tensor: (key, tensor), base: Any = tiny_llama, **options: Any) -> Build:
    """An adapter of a tiny Llama, which names its base beside it, with each tensor and its key changed."""

    def make(folder: Path) -> Path:
        source = on(base, saved(**options))(folder)
        tensors = [change(key, tensor) for key, tensor in load_file(source / WEIGHTS).items()]
        save_file(dict(filter(None, tensors)), source / WEIGHTS)
        return source

    return make


def with_part(part: str, new: Callable[[Tensor], Tensor]) -> Change:
    return lambda key, tensor: (key, new(tensor) if part in key else tensor)


def without(part: str) -> Change:
    return lambda key, tensor: None if part in key else (key, tensor)


def grown(tensor: Tensor) -> Tensor:
    return torch.cat([tensor, tensor[:4]])


ZERO_B = with_part("lora_B", lambda tensor: tensor * 0)
WIDE = with_part("0.self_attn.q_proj.lora_A", lambda tensor: torch.ones(8, 24))
NAN = with_part("0.self_attn.q", lambda tensor: tensor * math.nan)
HEADED, TOKENS = {"modules_to_save": ["lm_head"]}, {"trainable_token_indices": [1, 2]}
FAULTS: Mapping[str, tuple[Build, str | None]] = {
    "none": (adapter(), None),
    "B is zero": (adapter(ZERO_B), "every update is zero: .*lora_B gets a gradient"),
    "B is zero, a head": (adapter(ZERO_B, **HEADED), None),
    "NaN": (adapter(NAN), "not finite: training diverged"),
    "another family": (adapter(base=tiny_gpt2_lm), "no key matches the base: .*another model"),
    "another prefix": (adapter(lambda key, tensor: (key.replace("l.layers", "l.text.layers"), tensor)), None),
    "another size": (adapter(WIDE), "shapes differ from the base.* 16 × 24, the base's 16 × 16"),
    "resized": (adapter(with_part("lm_head", grown), **HEADED), "shapes differ.*resize_token_.* lm_head has 64 tokens"),
    "a head is lacking": (adapter(without("lm_head"), **HEADED), "a trained module is not in the file.*lm_head"),
    "its head": (adapter(**HEADED), None),
    "tokens are lacking": (adapter(without("trainable_tokens"), **TOKENS), "is not in the file.*token_indices"),
    "its tokens": (adapter(**TOKENS), None),
}


@pytest.mark.parametrize("case", FAULTS)
def test_what_keeps_an_adapter_from_working_is_named(case: str, tmp_path: Path) -> None:
    build, named = FAULTS[case]
    source = build(tmp_path / "a")
    report = examine(source)
    lines = [f"{one['name']}: {one['cure']} {' '.join(one['layers'])}" for one in report["faults"]]
    assert len(lines) == (named is not None)
    for line in lines:
        assert re.match(f".*{named}", line)
    assert [line.partition(":")[0] for line in faults_in(source)] == [line.partition(":")[0] for line in lines]
    if case in ("another family", "another size", "NaN"):  # neither served nor mended
        assert {(one["serve"], one["mend"]) for one in report["consumers"]} == {(None, None)}
    if case in ("another family", "another size"):
        assert set(report["servers"].values()) == {"refused"}
        assert serving(source, source, "peft") == {}
        with pytest.raises(UnsupportedError, match=report["faults"][0]["name"]):
            format_for(source, "sglang")
    (source / WEIGHTS).write_bytes(b"")
    assert "cannot be read" in faults_in(source)[0]


def test_towers_of_two_widths_may_have_layers_of_one_name(tmp_path: Path) -> None:
    source = read_adapter(adapter()(tmp_path / "a"))
    shapes = {name: (16, 16) if "q_proj" in name else (8, 16) for name in source.targets}
    vision = {name.replace("model.", "vision."): (64, 64) for name in source.targets}
    assert [unfit(source, both) for both in (shapes | vision, vision | shapes)] == [{}, {}]


def test_a_resized_vocabulary_is_seen_in_the_config_alone(tmp_path: Path) -> None:
    source = adapter(with_part("lm_head", grown), **HEADED)(tmp_path / "a")
    (tmp_path / "base" / "model.safetensors").unlink()
    report = examine(source)
    (fault,) = report["faults"]
    assert (fault["name"], fault["layers"]) == ("shapes differ from the base", ("lm_head has 64 tokens",))
    refused = [one for one in report["consumers"] if "enlarged" in " ".join(one["reasons"])]
    assert {one["server"] for one in refused} == {"PEFT", "vLLM", "SGLang", "llama.cpp", "MLX"}
    assert not any(one["mend"] for one in report["consumers"]), "no export fits the base that is named"


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")  # PEFT's
@pytest.mark.parametrize(
    ("names", "apart"),
    [(["lm_head"], False), (["embed_tokens", "lm_head"], False), (["embed_tokens", "lm_head"], True)],
)
def test_tied_weights_that_were_saved_are_named_and_merged_as_two(
    names: list[str], apart: bool, tmp_path: Path
) -> None:
    save_base(tmp_path / "base", tiny_tied())
    source = beside(lambda folder: save_lora(folder, tiny_tied(), lora_config(modules_to_save=names)))(tmp_path / "a")
    tensors = load_file(source / WEIGHTS)
    head, embedding = (f"base_model.model.{name}.weight" for name in ("lm_head", "model.embed_tokens"))
    tensors[head] = tensors.get(embedding, tensors[head]) + (0.1 if apart else 0.0)
    save_file(tensors, source / WEIGHTS)
    cures = {fault["name"]: fault["cure"] for fault in examine(source)["faults"]}
    assert list(cures) == ["tied weights were saved twice"] * (len(names) - 1)
    assert not cures or ("trained apart" in cures["tied weights were saved twice"]) == apart
    export(source, tmp_path / "out", format="merged")
    merged = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(merged["lm_head.weight"], tensors[head])
    assert embedding not in tensors or torch.equal(merged["model.embed_tokens.weight"], tensors[embedding])
    save_base(tmp_path / "base", tiny_llama(tied=False))
    assert examine(source)["faults"] == []
