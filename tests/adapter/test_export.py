"""An exported adapter is its source: the same update, the same logits, in plain PEFT, whatever the ranks and scales."""

import itertools
import json
import math
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    BertConfig,
    BertForQuestionAnswering,
    BertForTokenClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

from elsewhere import environment_without_us
from families import FAMILIES, tokenizer_of
from kinds import changed, edit, saved, with_experts
from loras import LAYERS, lora_config, save_base, save_lora, tiny_gpt2_lm, tiny_llama
from made_media import save_vit, save_wav2vec2
from models import SIZES, tiny_bert, tiny_llama_classifier
from tsqlora.adapter import export as export_module
from tsqlora.adapter.base import module_shapes
from tsqlora.adapter.checkpoint import revision_of
from tsqlora.adapter.doctor import examine
from tsqlora.adapter.export import merge_into
from tsqlora.adapter.files import CONFIG, WEIGHTS, read_adapter, write_adapter
from tsqlora.adapter.lora import LoraAdapter, Target
from tsqlora.adapter.rewrite import compact, ranks_for, served_rank, truncate, universal
from tsqlora.adapter.tensors import PRECISIONS
from tsqlora.adapter.verify import TEXTS, compare_updates, compare_weights, logits, probe_rows
from tsqlora.errors import DataError, SettingsError, TsqLoraError, UnsupportedError
from tsqlora.training.export import export

KINDS = ("self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj")
LLAMA = [f"model.layers.{j}.{name}" for j in range(LAYERS) for name in KINDS]
GPT2 = [f"transformer.h.{j}.{name}" for j in range(LAYERS) for name in ("attn.c_attn", "mlp.c_proj")]
BASES = {"llama": (tiny_llama, [*LLAMA, "model.embed_tokens"]), "gpt2": (tiny_gpt2_lm, [*GPT2, "transformer.wte"])}
STACKED = (
    [f"model.layers.*.self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj")],
    [f"model.layers.*.mlp.{name}" for name in ("gate_proj", "up_proj")],
)
"""Kinds of layer of which SGLang makes one matrix; it makes up a missing k (or a missing up) itself."""


@st.composite
def adapters(draw: st.DrawFn) -> tuple[str, dict[str, Any]]:
    """A base, and options of LoraConfig: ranks from 0 to 9 a layer, one scale or many, rsLoRA, an embedding."""
    base = draw(st.sampled_from(sorted(BASES)))
    names = BASES[base][1]
    ranks = dict(zip(names, draw(st.lists(st.integers(0, 9), min_size=len(names), max_size=len(names))), strict=True))
    if not any(ranks.values()):
        ranks[names[0]] = 1
    rslora, constant = draw(st.booleans()), draw(st.booleans())
    active = {name: rank for name, rank in ranks.items() if rank}
    if constant:
        scale = draw(st.sampled_from((0.25, 1.0, 1.7, 2.0)))
        alphas = {name: scale * (rank**0.5 if rslora else rank) for name, rank in active.items()}
    else:
        alphas = {name: draw(st.sampled_from((1, 8, 16, 0.3))) for name in active}
    return base, {
        "target_modules": sorted(active),
        "rank_pattern": active,
        "alpha_pattern": alphas,
        "use_rslora": rslora,
        "fan_in_fan_out": base == "gpt2",
    }


def logits_with(base: PreTrainedModel, folder: Path) -> Tensor:
    return logits(PeftModel.from_pretrained(base, str(folder)))


def assert_close(mine: Tensor, theirs: Tensor, tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=tolerance)


def kind(name: str) -> str:
    return re.sub(r"\.\d+\.", ".*.", name)


def write_into(folder: Path, adapter: LoraAdapter) -> Path:
    folder.mkdir()
    write_adapter(adapter, folder)
    return folder


@given(case=adapters())
@settings(max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_adapter_is_the_same_in_every_form(case: Any, tmp_path: Path) -> None:
    base, options = case
    folder, out = tmp_path / "source", tmp_path / "out"
    for left in (folder, out):
        shutil.rmtree(left, ignore_errors=True)
    save_lora(folder, BASES[base][0](), lora_config(**options))
    source, model = read_adapter(folder), BASES[base][0]()
    constant = len({target.scale for target in source.targets.values()}) == 1
    expected = logits_with(BASES[base][0](), folder)

    padded = universal(source, module_shapes(model), [name for name, _ in model.named_modules()])
    back = read_adapter(write_into(out, padded))
    assert {target.rank for target in back.targets.values()} == {served_rank(source.rank)}
    patterns = [back.config[key] for key in ("rank_pattern", "alpha_pattern", "use_rslora")]
    assert patterns == [{}, {}, False]
    assert all("." not in name or name.count(".") < 3 for name in back.config["target_modules"])
    kinds = {kind(name) for name in source.targets}
    kinds |= {other for name in kinds for pair in STACKED if name in pair for other in pair if "k_proj" not in other}
    assert back.targets.keys() == {name for name in module_shapes(model) if kind(name) in kinds}
    for name, target in back.targets.items():
        mine = source.targets[name].delta() if name in source.targets else np.zeros_like(target.delta())
        if constant:
            assert np.array_equal(target.delta(), mine)
        assert np.abs(target.delta() - mine).max() <= 2 * PRECISIONS["F32"].eps * np.abs(mine).max()
    assert_close(logits_with(model, out), expected)

    small = compact(padded)
    assert {name: t.rank for name, t in small.targets.items()} == {name: t.rank for name, t in source.targets.items()}
    assert compare_updates(source, small, "F32").used <= 1
    if constant:
        for name, target in source.targets.items():
            assert np.array_equal(small.targets[name].a, target.a)
            assert np.array_equal(small.targets[name].b, target.b)

    merged = merge_into(BASES[base][0](), source, folder)
    assert compare_weights(BASES[base][0](), merged, source).used <= 1
    assert_close(logits(merged), expected)


@pytest.mark.parametrize("heads", [("classifier.weight",), ("classifier.weight", "classifier.bias", "score.weight")])
def test_a_head_that_only_one_side_has_is_an_error(heads: tuple[str, ...]) -> None:
    source = read_adapter(Path(__file__).parents[1] / "fixtures" / "v0.1" / "run" / "adapter")
    tensor = next(iter(source.saved.values()))
    source = replace(source, saved={"classifier.weight": tensor, "classifier.bias": tensor})
    with pytest.raises(TsqLoraError, match=r"classifier\.bias|score\.weight"):
        compare_updates(source, replace(source, saved=dict.fromkeys(heads, tensor)), "F32")


# ------------------------------------------------------------------------------------ by hand


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, and an adapter of three ranks and one scale that leaves the second layer's q without any."""
    folder = tmp_path_factory.mktemp("export")
    save_base(folder / "base", tiny_llama())
    ranks = {"model.layers.0.self_attn.q_proj": 3, "model.layers.0.mlp.up_proj": 5, "model.layers.1.mlp.up_proj": 9}
    config = lora_config(
        target_modules=sorted(ranks), rank_pattern=ranks, alpha_pattern={name: 2 * rank for name, rank in ranks.items()}
    )
    save_lora(folder / "adapter", tiny_llama(), config)
    return folder


def exported(place: Path, out: Path, format: str, **options: Any) -> dict[str, Any]:
    return export(place / "adapter", out, format=format, base=str(place / "base"), **options)


def test_universal_by_hand(place: Path, tmp_path: Path) -> None:
    report = exported(place, tmp_path / "out", "universal")
    assert report.pop("bytes") > 0
    assert set(report.pop("serve")) == {"vLLM", "SGLang", "TGI"}
    assert report.pop("logits_difference") < 1e-4 < report.pop("largest_logit")
    assert report == {
        "out": str(tmp_path / "out"),
        "format": "universal",
        "update_difference": 0.0,
        "relative_difference": 0.0,
        "bfloat16": None,
        "rank": 16,
        "targets": 8,
        "max_lora_rank": 16,
        "truncation": {},
        "logits_lost": None,
        "notes": [],
    }
    config = json.loads((tmp_path / "out" / CONFIG).read_text())
    assert (config["r"], config["lora_alpha"]) == (16, 32)
    assert config["target_modules"] == ["gate_proj", "q_proj", "up_proj", "v_proj"]
    filled = read_adapter(tmp_path / "out").targets["model.layers.1.self_attn.q_proj"]
    assert not filled.a.any()
    assert not filled.b.any()


@pytest.mark.parametrize(
    ("named", "problem"), [(None, "names no base model"), ("../base", r"\.\./base"), ("/home/someone/model", "someone")]
)
def test_the_base_that_an_adapter_names_gives_shapes_and_no_logits(
    named: str | None, problem: str, place: Path, tmp_path: Path
) -> None:
    source = shutil.copytree(place / "adapter", tmp_path / "a")
    edit(source, base_model_name_or_path=named)
    with pytest.raises(SettingsError, match=f"{problem}.*--base"):
        export(source, tmp_path / "out", format="universal")
    assert export(source, tmp_path / "out", format="peft")["targets"] == 3, "which needs no base"
    edit(source, base_model_name_or_path=str(place / "base"))
    report = export(source, tmp_path / "universal", format="universal")
    assert (report["logits_difference"], report["targets"]) == (None, 8)


def test_the_revision_that_an_adapter_names_is_its_bases(place: Path) -> None:
    adapter = read_adapter(place / "adapter")

    def named(revision: Any) -> LoraAdapter:
        return replace(adapter, config={**adapter.config, "revision": revision, "base_model_name_or_path": "org/b"})

    assert [revision_of("org/b", named(name)) for name in ("v2", None)] == ["v2", "main"]
    assert revision_of("org/other", named("v2")) == "main"
    with pytest.raises(SettingsError, match=r"\.\./x.*--base"):
        revision_of("org/b", named("../x"))


@pytest.mark.parametrize("cut_to", [{"max_rank": 4}, {"keep": 0.4}])
def test_truncation_is_the_best_there_is_and_reports_its_error(
    cut_to: dict[str, Any], place: Path, tmp_path: Path
) -> None:
    report = exported(place, tmp_path / "out", "universal", **cut_to)
    source, cut = read_adapter(place / "adapter"), read_adapter(tmp_path / "out")
    assert report["truncation"].keys() >= {"model.layers.1.mlp.up_proj"}
    for name, target in source.targets.items():
        mine = target.delta()
        other = cut.targets[name].delta() if name in cut.targets else np.zeros_like(mine)
        singular = np.linalg.svd(mine, compute_uv=False)
        rank = np.linalg.matrix_rank(other)
        assert rank == 4 or "max_rank" not in cut_to or target.rank < 4
        best = np.linalg.norm(singular[rank:]) / np.linalg.norm(singular)
        assert np.linalg.norm(mine - other) / np.linalg.norm(mine) == pytest.approx(best, abs=1e-6)
        assert report["truncation"].get(name, 0.0) == pytest.approx(best, abs=1e-6)
    lost = logits_with(tiny_llama(), place / "adapter") - logits_with(tiny_llama(), tmp_path / "out")
    assert report["logits_lost"] == pytest.approx(float(lost.abs().max()), rel=1e-3)
    assert report["logits_lost"] > 100 * report["logits_difference"]
    whole = exported(place, tmp_path / "merged", "merged", **cut_to)
    assert whole["truncation"] == report["truncation"]
    base, merged = tiny_llama(), AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert_close(logits(merged), logits_with(base, tmp_path / "out"))


ELSEWHERE = """
import importlib.util, json, sys, torch
assert importlib.util.find_spec("tsqlora") is None, "tsqlora is here"
from peft import PeftModel
from transformers import AutoModelForCausalLM
base, rows, *adapters, merged = json.loads(sys.argv[1])
def outputs(model):
    with torch.no_grad():
        return model.eval()(input_ids=torch.tensor(rows)).logits.tolist()
def load(path):
    return AutoModelForCausalLM.from_pretrained(path)
print(json.dumps([*(outputs(PeftModel.from_pretrained(load(base), path)) for path in adapters), outputs(load(merged))]))
"""


def test_every_export_says_the_same_in_an_environment_without_us(place: Path, tmp_path: Path) -> None:
    formats = ("peft", "universal", "merged")
    for format in formats:
        exported(place, tmp_path / format, format)
    base = tiny_llama()
    rows = probe_rows(base)["input_ids"].tolist()
    arguments = json.dumps([str(place / "base"), rows, *(str(tmp_path / format) for format in formats)])
    python = environment_without_us(tmp_path / "environment")
    done = subprocess.run([python, "-I", "-c", ELSEWHERE, arguments], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    before = logits(base)
    expected = logits_with(base, place / "adapter")
    assert float((before - expected).abs().max()) > 0.1, "the adapter does something"
    for values in json.loads(done.stdout.splitlines()[-1]):
        assert_close(torch.tensor(values), expected)


# ------------------------------------------------------------------------------------- models


def test_an_export_has_its_sources_precision_or_the_one_that_is_named(place: Path, tmp_path: Path) -> None:
    report = exported(place, tmp_path / "adapter", "universal", dtype="bfloat16")
    assert 0 < report["relative_difference"] < 0.02
    assert {target.dtype for target in read_adapter(tmp_path / "adapter").targets.values()} == {"BF16"}
    save_base(tmp_path / "half", tiny_llama().bfloat16())
    for name, dtype in (("own", None), ("wide", "float32")):
        export(place / "adapter", tmp_path / name, format="merged", base=str(tmp_path / "half"), dtype=dtype)
    dtypes = [AutoModelForCausalLM.from_pretrained(tmp_path / out, dtype="auto").dtype for out in ("own", "wide")]
    assert dtypes == [torch.bfloat16, torch.float32]


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")  # PEFT's, of which this is the cure
@pytest.mark.parametrize("tied", [True, False])
def test_merging_an_embedding_leaves_the_output_layer_alone(tied: bool, tmp_path: Path) -> None:
    save_base(tmp_path / "base", tiny_llama(tied=tied))
    save_lora(tmp_path / "a", tiny_llama(tied=tied), lora_config(target_modules=["embed_tokens", "q_proj"]))
    export(tmp_path / "a", tmp_path / "out", format="merged", base=str(tmp_path / "base"))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(merged.lm_head.weight, tiny_llama(tied=tied).lm_head.weight)
    assert_close(logits(merged), logits_with(tiny_llama(tied=tied), tmp_path / "a"))


def decoder() -> PreTrainedModel:
    """Without padding, behind which it reads its class."""
    model = tiny_llama_classifier(dtype=torch.float32)
    model.config.pad_token_id = None
    return model


def distilbert(labels: int) -> PreTrainedModel:
    """With a pre_classifier beside the classifier."""
    sizes = {"vocab_size": 40, "dim": 16, "n_heads": 2, "n_layers": 1, "hidden_dim": 16, "max_position_embeddings": 16}
    return DistilBertForSequenceClassification(DistilBertConfig(**sizes, num_labels=labels))


def bert(kind: Any, labels: int = 2) -> PreTrainedModel:
    return kind(BertConfig(**SIZES, num_labels=labels))


HEADED: dict[str, tuple[Callable[[], Any], Callable[[], Any], Any, dict[str, Any]]] = {
    "a body": (
        lambda: tiny_bert(num_labels=3).float().bert,
        lambda: tiny_bert(num_labels=3).float(),
        AutoModelForSequenceClassification,
        {"task_type": "SEQ_CLS", "target_modules": ["query", "output.dense"]},
    ),
    "a decoder": (
        decoder,
        decoder,
        AutoModelForSequenceClassification,
        {"task_type": "SEQ_CLS", "modules_to_save": ["score"]},
    ),
    "a layer whose name ends like the head's": (
        lambda: distilbert(2),
        lambda: distilbert(3),
        AutoModelForSequenceClassification,
        {"task_type": "SEQ_CLS", "target_modules": ["q_lin"]},
    ),
    "no task": (
        lambda: bert(BertForTokenClassification),
        lambda: bert(BertForTokenClassification, 5),
        AutoModelForTokenClassification,
        {"task_type": None, "target_modules": ["query"], "modules_to_save": ["classifier"]},
    ),
    "questions": (
        lambda: bert(BertForQuestionAnswering),
        lambda: bert(BertForQuestionAnswering),
        AutoModelForQuestionAnswering,
        {"task_type": "QUESTION_ANS", "target_modules": ["query"]},
    ),
}
"""A checkpoint, the model that the adapter was trained on, the class that loads what is merged, and LoRA's options."""


@pytest.mark.parametrize("case", HEADED)
def test_a_model_is_merged_with_the_head_that_came_with_the_adapter(case: str, tmp_path: Path) -> None:
    base, model, auto, options = HEADED[case]
    torch.manual_seed(0)
    save_base(tmp_path / "base", base())
    trained = model()
    labels = trained.config.num_labels
    save_lora(tmp_path / "a", trained, lora_config(**options))
    report = export(tmp_path / "a", tmp_path / "out", format="merged", base=str(tmp_path / "base"))
    assert report["logits_difference"] < 1e-4 < report["largest_logit"]
    merged = auto.from_pretrained(tmp_path / "out")
    assert merged.config.num_labels == labels
    if case == "a decoder":
        assert merged.config.pad_token_id == merged.config.eos_token_id is not None


def t5() -> PreTrainedModel:
    torch.manual_seed(0)
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2, "vocab_size": 60}
    return T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0, initializer_factor=0.5))


def test_a_model_that_encodes_and_decodes_is_fed_on_both_sides(tmp_path: Path) -> None:
    save_base(tmp_path / "base", t5())
    options = {"task_type": "SEQ_2_SEQ_LM", "target_modules": ["q", "wo"], "rank_pattern": {"q": 3}}
    save_lora(tmp_path / "a", t5(), lora_config(**options))
    report = export(tmp_path / "a", tmp_path / "out", format="universal", base=str(tmp_path / "base"))
    assert report["logits_difference"] is not None
    assert report["targets"] == 10, "q of three attentions and wo of two sides, in two blocks"


@pytest.mark.filterwarnings("ignore:Adapter 'default'. 2 LoRA tensor")  # PEFT takes its own biases for shards
@pytest.mark.parametrize("options", [{"use_dora": True}, {"init_lora_weights": "pissa"}, {"lora_bias": True}])
def test_what_is_more_than_a_product_is_merged_or_copied_and_refused_otherwise(
    options: Mapping[str, Any], tmp_path: Path
) -> None:
    biased = "lora_bias" in options
    base = tiny_gpt2_lm if biased else tiny_llama
    save_base(tmp_path / "base", base())
    config = lora_config(target_modules=["c_attn" if biased else "q_proj"], fan_in_fan_out=biased, **options)
    save_lora(tmp_path / "a", base(), config)
    (named,) = options
    for request in ({"format": "universal"}, {"format": "gguf"}, {"format": "peft", "max_rank": 2}):
        with pytest.raises(UnsupportedError, match=f"{named}.*--format merged"):
            export(tmp_path / "a", tmp_path / "out", base=str(tmp_path / "base"), **request)
    report = export(tmp_path / "a", tmp_path / "same", format="peft", base=str(tmp_path / "base"))
    assert named in report["notes"][0]
    report = export(tmp_path / "a", tmp_path / "merged", format="merged", base=str(tmp_path / "base"))
    assert named in report["notes"][0]
    assert report["update_difference"] is None
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert_close(logits(merged), logits_with(base(), tmp_path / "a"), 1e-3)


@pytest.mark.parametrize("save", [save_vit, save_wav2vec2])
def test_a_merged_model_of_images_or_recordings_has_its_processor(save: Callable[[Path], Path], tmp_path: Path) -> None:
    base = save(tmp_path / "base")
    save_lora(tmp_path / "a", AutoModel.from_pretrained(base), lora_config(task_type=None, target_modules=["q_proj"]))
    export(tmp_path / "a", tmp_path / "out", format="merged", base=str(base))
    name = "preprocessor_config.json"
    assert json.loads((tmp_path / "out" / name).read_text()) == json.loads((base / name).read_text())


def test_a_text_model_is_merged_without_pillow(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class WithoutPillow:
        @staticmethod
        def from_pretrained(*args: Any, **options: Any) -> Any:
            raise ImportError("AutoImageProcessor requires the PIL library")

    monkeypatch.setattr("tsqlora.adapter.base.AutoImageProcessor", WithoutPillow)
    exported(place, tmp_path / "out", "merged")
    assert (tmp_path / "out" / "model.safetensors").exists()


@pytest.mark.parametrize("format", ["merged", "peft"])
def test_numbers_that_float16_has_no_room_for_are_rounding(format: str, tmp_path: Path) -> None:
    """Below 6e-5 float16 has the same distance between numbers everywhere, however small they are."""

    def small() -> PreTrainedModel:
        bert = tiny_bert(num_labels=3).float()
        with torch.no_grad():
            for module in (bert.classifier, bert.bert.encoder.layer[0].output.dense):
                module.weight.mul_(1e-6)
        return bert

    save_base(tmp_path / "base", small())
    config = lora_config(task_type="SEQ_CLS", target_modules=["query"], modules_to_save=["classifier"])
    folder = save_lora(tmp_path / "a", small(), config)
    stored = load_file(folder / WEIGHTS)
    for name in stored:
        stored[name] *= 1e-5 if "lora_B" in name or "classifier" in name else 1.0
    save_file(stored, folder / WEIGHTS, metadata={"format": "pt"})
    export(folder, tmp_path / "out", format=format, base=str(tmp_path / "base"), dtype="float16")


def half_base(folder: Path) -> str:
    """A base in bfloat16, with a tokenizer."""
    tokenizer_of(FAMILIES["zephyr"]).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {**SIZES, "vocab_size": 400}
    return str(save_base(folder, LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=1)).bfloat16()))


def test_a_merged_bfloat16_model_is_as_near_to_peft_as_its_base_to_float32(tmp_path: Path) -> None:
    base = half_base(tmp_path / "base")
    load = partial(AutoModelForCausalLM.from_pretrained, base)
    save_lora(tmp_path / "a", load(dtype=torch.float32), lora_config(lora_alpha=1))
    report = export(tmp_path / "a", tmp_path / "out", format="merged", base=base)
    tokenizer, exact = AutoTokenizer.from_pretrained(base), load(dtype=torch.float32).eval()
    rows = [tokenizer(text, return_tensors="pt")["input_ids"][:, :16] for text in TEXTS]

    def gap(low: PreTrainedModel, exact: Any) -> float:
        with torch.no_grad():
            pairs = [(low.eval()(row).logits.float(), exact.eval()(row).logits) for row in rows]
        own, other = (torch.cat([pair[k].flatten() for pair in pairs]) for k in (0, 1))
        return float((own - other).norm() / other.norm())

    of_base = gap(load(dtype=torch.bfloat16), exact)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    of_merged = gap(merged, PeftModel.from_pretrained(exact, str(tmp_path / "a")))
    assert len(TEXTS) == 32
    assert report["bfloat16"] == pytest.approx({"base": of_base, "merged": of_merged}, rel=1e-3)
    assert 0 < of_merged < 2 * of_base
    assert not report["notes"]


def test_a_merged_bfloat16_model_beyond_its_bases_rounding_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A large update is merged rightly beyond bfloat16's reach; DoRA's weights are not compared, so it is an error."""
    base = half_base(tmp_path / "base")
    for name, dora in (("large", False), ("dora", True)):
        own = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        save_lora(tmp_path / name, own, lora_config(use_dora=dora))
    (note,) = export(tmp_path / "large", tmp_path / "out", format="merged", base=base)["notes"]
    assert "--dtype float32" in note
    monkeypatch.setattr(export_module, "save_merged", partial(wrong_merge, size=0.5))
    with pytest.raises(TsqLoraError, match="--dtype float32"):
        export(tmp_path / "dora", tmp_path / "other", format="merged", base=base)


# ------------------------------------------------------------------------- what must not happen


def wrong_update(adapter: LoraAdapter, folder: Path) -> None:
    scaled = {name: replace(target, b=target.b * np.float32(1.001)) for name, target in adapter.targets.items()}
    write_adapter(replace(adapter, targets=scaled), folder)


def wrong_merge(model: PreTrainedModel, folder: Path, size: float = 0.01) -> None:
    with torch.no_grad():
        model.get_submodule("model.layers.1.mlp.down_proj").weight[0, 0] += size  # type: ignore[index,operator]
    model.save_pretrained(folder)


def wrong_logits(model: Any, folder: Path) -> Tensor:
    return torch.full((2,), float("adapter" in str(folder)))


@pytest.mark.parametrize(
    ("format", "function", "wrong", "named"),
    [
        ("universal", "write_adapter", wrong_update, r"model\.layers"),
        ("merged", "save_merged", wrong_merge, r"model\.layers\.1\.mlp\.down_proj\.weight"),
        ("peft", "peft_logits", wrong_logits, "logits differ by 1"),
    ],
)
def test_an_export_that_is_not_its_source_writes_nothing(
    format: str, function: str, wrong: Any, named: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export_module, function, wrong)
    with pytest.raises(TsqLoraError, match=named):
        exported(place, tmp_path / "out", format)
    assert list(tmp_path.iterdir()) == []


def filled(number: float) -> Callable[[Path], Path]:
    """An adapter of which every B has this number."""

    def make(folder: Path) -> Path:
        source = read_adapter(save_lora(folder, tiny_llama(), lora_config()))
        broken = {name: replace(target, b=np.full_like(target.b, number)) for name, target in source.targets.items()}
        write_adapter(replace(source, targets=broken), folder)
        return folder

    return make


def large_llama() -> PreTrainedModel:
    large = tiny_llama()
    large.resize_token_embeddings(large.config.vocab_size + 3)
    return large


def lora(base: Callable[[], Any] = tiny_llama, **options: Any) -> Callable[[Path], Path]:
    return lambda folder: save_lora(folder, base(), lora_config(**options))


def tiny_tied() -> PreTrainedModel:
    return tiny_llama(tied=True)


def small_bert() -> PreTrainedModel:
    return tiny_bert().float()


MERGED, PEFT, GGUF = ({"format": format} for format in ("merged", "peft", "gguf"))
UNIVERSAL, SHARED = {"format": "universal"}, {"task_type": "SEQ_2_SEQ_LM"}
EVERY = (PEFT, UNIVERSAL, MERGED)
REFUSED: Mapping[str, tuple[Any, Any, Any, type[Exception], str]] = {
    "NaN": (filled(np.nan), tiny_llama, EVERY, DataError, "NaN or infinite"),
    "nothing": (filled(0.0), tiny_llama, (*EVERY, GGUF), DataError, "every update .* is zero"),
    "another base": (saved(), tiny_gpt2_lm, EVERY, DataError, r"no module model\.layers\.0"),
    "another size": (saved(), lambda: LlamaForCausalLM(LlamaConfig(**SIZES)), EVERY, DataError, "16 → 16 in the base"),
    "no base": (saved(), None, UNIVERSAL, SettingsError, r"--base .*base.*no such directory"),
    "a larger vocabulary": (
        lora(large_llama, modules_to_save=["embed_tokens", "lm_head"]),
        tiny_llama,
        MERGED,
        SettingsError,
        "vocabulary was enlarged",
    ),
    "experts": (with_experts, tiny_llama, PEFT, UnsupportedError, "target_parameters"),
    "what PEFT refuses": (changed(saved(), init_lora_weights="loftq"), tiny_llama, MERGED, DataError, "loftq_config"),
    "a bias of B": (
        lora(lora_bias=True),
        tiny_llama,
        MERGED,
        UnsupportedError,
        r"lora_bias.*layers\.0\.self_attn\.k_proj",
    ),
    "shared": (lora(t5, target_modules=["q", "shared"], **SHARED), t5, MERGED, UnsupportedError, "shared"),
    "shared and saved": (
        lora(t5, target_modules=["q"], modules_to_save=["shared"], **SHARED),
        t5,
        MERGED,
        UnsupportedError,
        "shared",
    ),
    "gguf of a head": (lora(modules_to_save=["lm_head"]), tiny_llama, GGUF, UnsupportedError, "lm_head"),
    "gguf of BERT": (
        lora(small_bert, target_modules=["query"], task_type=None),
        small_bert,
        GGUF,
        UnsupportedError,
        "bert.*arcee, gemma",
    ),
    "gguf of positions": (
        lora(tiny_gpt2_lm, target_modules=["wpe"], fan_in_fan_out=True),
        tiny_gpt2_lm,
        GGUF,
        UnsupportedError,
        r"transformer\.wpe",
    ),
    "gguf of tied weights": (
        lora(tiny_tied, target_modules=["embed_tokens"]),
        tiny_tied,
        GGUF,
        UnsupportedError,
        r"model\.embed_tokens",
    ),
    "an unknown format": (saved(), tiny_llama, {"format": "unversal"}, SettingsError, "--format unversal.*'universal'"),
    "an unknown dtype": (saved(), tiny_llama, PEFT | {"dtype": "int8"}, SettingsError, "--dtype int8"),
    "gguf's dtypes": (saved(), tiny_llama, GGUF | {"dtype": "bfloat16"}, SettingsError, "--dtype bfloat16"),
    "no rank": (saved(), tiny_llama, PEFT | {"max_rank": -1}, SettingsError, "--max-rank"),
    "too little": (saved(), tiny_llama, PEFT | {"keep": 0.001}, SettingsError, "--keep"),
    "more than all": (saved(), tiny_llama, PEFT | {"keep": 1.5}, SettingsError, "--keep 1.5"),
    "no cut": (saved(), tiny_llama, {"format": "compressed"}, SettingsError, "--keep SHARE or --max-rank"),
}
"""An adapter, its base, options of the export, and the error that names what is wrong."""


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed")
@pytest.mark.filterwarnings("ignore:Adapter 'default'.*LoRA tensor")  # PEFT takes its own biases for shards
@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_exported_is_refused_by_name(case: str, tmp_path: Path) -> None:
    build, base, options, kind, named = REFUSED[case]
    source = build(tmp_path / "a")
    if base is not None:
        save_base(tmp_path / "base", base())
    for each in [options] if isinstance(options, dict) else options:
        with pytest.raises(kind, match=named):
            export(source, tmp_path / "out", base=str(tmp_path / "base"), **each)
        assert not (tmp_path / "out").exists()
    if "shared" in case:
        assert "merged" not in {consumer["mend"] for consumer in examine(source)["consumers"]}


def test_a_directory_is_new_or_empty_and_nothing_is_overwritten(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in ("full", "empty", "here", "volume", "linked", f".new.{os.getpid()}"):
        (tmp_path / folder).mkdir()  # the last: of a killed process of the same number
    (tmp_path / "file").write_text("mine")
    (tmp_path / "full" / "mine").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "linked")
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr("os.path.ismount", lambda path: Path(path).name == "volume")
    before = sorted(path.name for path in tmp_path.iterdir())
    for name in ("file", "full", "file/out", "here", "volume"):
        with pytest.raises(SettingsError, match=f"--out .*{name}"):
            export(place / "adapter", tmp_path / name, format="peft")
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    for name in ("empty", "new/deep", "link", "new2"):
        export(place / "adapter", tmp_path / name, format="peft")
        assert (tmp_path / name / CONFIG).exists()
    assert (tmp_path / "link").is_symlink()


# ------------------------------------------------------------------------------------- cuts


def target(singular: list[float], inputs: int, outputs: int, scale: float = 1.0) -> Target:
    """A target whose BA has these singular values."""
    r = len(singular)
    return Target(np.eye(r, inputs), np.eye(outputs, r) * singular, scale)


def by_mean(adapter: LoraAdapter, mean: float) -> dict[str, int]:
    """The ranks at the parameters of a uniform LoRA."""
    return ranks_for(adapter, mean * sum(target.inputs + target.outputs for target in adapter.targets.values()))


def test_ranks_by_hand() -> None:
    # Worth by parameter, of 20 and 10 parameters a slot: 100/20, 1/20 against 4/10, 0.01/10.
    adapter = LoraAdapter({"r": 2}, {"large": target([10, 1], 10, 10), "small": target([2, 0.1], 5, 5)})
    assert by_mean(adapter, 1) == {"large": 1, "small": 1}
    assert by_mean(adapter, 0.7) == {"large": 1, "small": 0}
    cut, errors = truncate(adapter, by_mean(adapter, 0.7))
    assert (list(cut.targets), errors["small"]) == (["large"], 1.0)
    assert by_mean(adapter, 2) == {"large": 2, "small": 2}
    # A scale of 10 makes 4 into 400, and 0.01 into 1: 0.1 by parameter, above the 0.05 of large's second.
    adapter = LoraAdapter({"r": 2}, {"large": target([10, 1], 10, 10), "small": target([2, 0.1], 5, 5, scale=10)})
    assert by_mean(adapter, 5 / 3) == {"large": 1, "small": 2}
    # 9 of 20 parameters are worth less than 6.25 of 10.
    adapter = LoraAdapter({"r": 1}, {"large": target([3], 10, 10), "small": target([2.5], 5, 5)})
    assert by_mean(adapter, 2 / 3) == {"large": 0, "small": 1}


@given(
    values=st.lists(st.lists(st.floats(0.1, 10), min_size=3, max_size=3), min_size=3, max_size=3),
    mean=st.sampled_from((0.5, 1.0, 1.7, 2.5)),
)
def test_nothing_of_equal_cost_loses_less(values: list[list[float]], mean: float) -> None:
    adapter = LoraAdapter({"r": 3}, {str(j): target(row, 4, 4) for j, row in enumerate(values)})
    ranks = by_mean(adapter, mean)
    assert sum(ranks.values()) == math.floor(3 * mean)

    def lost(ranks: dict[str, int]) -> float:
        return sum(sum(v * v for v in sorted(values[int(name)], reverse=True)[rank:]) for name, rank in ranks.items())

    others = (dict(zip(ranks, choice, strict=True)) for choice in itertools.product(range(4), repeat=3))
    best = min(lost(other) for other in others if sum(other.values()) == sum(ranks.values()))
    assert lost(ranks) == pytest.approx(best, rel=1e-5)
