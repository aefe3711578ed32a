"""An exported adapter is its source: the same update, the same logits, in plain PEFT, whatever the ranks and scales."""

import json
import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForQuestionAnswering,
    BertForTokenClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

from elsewhere import environment_without_us
from loras import LAYERS, lora_config, save_base, save_lora, tiny_gpt2_lm, tiny_llama
from models import tiny_bert, tiny_llama_classifier
from tsqlora.errors import DataError, SettingsError, TsqLoraError, UnsupportedError
from tsqlora.interop import export as export_module
from tsqlora.interop.base import module_shapes
from tsqlora.interop.checkpoint import revision_of
from tsqlora.interop.files import CONFIG, read_adapter
from tsqlora.interop.lora import LoraAdapter, Target
from tsqlora.interop.merge import merge_into
from tsqlora.interop.rewrite import compact, served_rank, truncate, universal
from tsqlora.interop.verify import compare_updates, compare_weights, logits, probe_rows
from tsqlora.interop.write import write_adapter
from tsqlora.run.export import examine, export

KINDS = ("self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj")
LLAMA = [f"model.layers.{j}.{name}" for j in range(LAYERS) for name in KINDS]
GPT2 = [f"transformer.h.{j}.{name}" for j in range(LAYERS) for name in ("attn.c_attn", "mlp.c_proj")]
BASES = {
    "llama": (tiny_llama, [*LLAMA, "model.embed_tokens"]),
    "gpt2": (tiny_gpt2_lm, [*GPT2, "transformer.wte"]),
}
STACKED = (
    [f"model.layers.*.self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj")],
    [f"model.layers.*.mlp.{name}" for name in ("gate_proj", "up_proj")],
)
"""Kinds of layer of which SGLang makes one matrix; it makes up a missing k (or a missing up) itself."""
FLOAT32 = torch.finfo(torch.float32).eps


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


def kind(name: str) -> str:
    return re.sub(r"\.\d+\.", ".*.", name)


def is_constant(adapter: LoraAdapter) -> bool:
    return len({target.scale for target in adapter.targets.values()}) == 1


@given(case=adapters())
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_universal_is_one_rank_and_the_same_update_in_plain_peft(case: Any, tmp_path: Path) -> None:
    base, options = case
    folder, out = tmp_path / "source", tmp_path / "out"
    for left in (folder, out):
        shutil.rmtree(left, ignore_errors=True)
    save_lora(folder, BASES[base][0](), lora_config(**options))
    source, model = read_adapter(folder), BASES[base][0]()
    names = [name for name, _ in model.named_modules()]
    padded = universal(source, module_shapes(model), names)
    out.mkdir()
    write_adapter(padded, out)
    back = read_adapter(out)
    config = back.config
    assert {target.rank for target in back.targets.values()} == {served_rank(source.rank)}
    assert (config["rank_pattern"], config["alpha_pattern"], config["use_rslora"]) == ({}, {}, False)
    assert all("." not in name or name.count(".") < 3 for name in config["target_modules"])
    kinds = {kind(name) for name in source.targets}
    kinds |= {other for name in kinds for pair in STACKED if name in pair for other in pair if "k_proj" not in other}
    assert back.targets.keys() == {name for name in module_shapes(model) if kind(name) in kinds}
    for name, target in back.targets.items():
        mine = source.targets[name].delta() if name in source.targets else np.zeros_like(target.delta())
        if is_constant(source):
            assert np.array_equal(target.delta(), mine)
        assert np.abs(target.delta() - mine).max() <= 2 * FLOAT32 * np.abs(mine).max()
    torch.testing.assert_close(logits_with(model, out), logits_with(BASES[base][0](), folder), rtol=1e-4, atol=1e-4)


@given(case=adapters())
@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_universal_and_back_is_the_smallest_form_of_the_source(case: Any, tmp_path: Path) -> None:
    base, options = case
    shutil.rmtree(tmp_path / "a", ignore_errors=True)
    source = read_adapter(save_lora(tmp_path / "a", BASES[base][0](), lora_config(**options)))
    model = BASES[base][0]()
    there = universal(source, module_shapes(model), [name for name, _ in model.named_modules()])
    back = compact(there)
    assert {name: t.rank for name, t in back.targets.items()} == {name: t.rank for name, t in source.targets.items()}
    assert compare_updates(source, back, "F32").used <= 1
    if is_constant(source):
        for name, target in source.targets.items():
            assert np.array_equal(back.targets[name].a, target.a)
            assert np.array_equal(back.targets[name].b, target.b)


@given(case=adapters())
@settings(max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_merged_weight_is_the_bases_and_the_update(case: Any, tmp_path: Path) -> None:
    base, options = case
    shutil.rmtree(tmp_path / "a", ignore_errors=True)
    source = read_adapter(save_lora(tmp_path / "a", BASES[base][0](), lora_config(**options)))
    merged = merge_into(BASES[base][0](), source, tmp_path / "a")
    assert compare_weights(BASES[base][0](), merged, source).used <= 1
    torch.testing.assert_close(logits(merged), logits_with(BASES[base][0](), tmp_path / "a"), rtol=1e-4, atol=1e-4)


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


def llama_at(place: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(place / "base")


def test_universal_by_hand(place: Path, tmp_path: Path) -> None:
    report = export(place / "adapter", tmp_path / "out", format="universal", base=str(place / "base"))
    assert report | {"bytes": 0, "logits_difference": 0} == {
        "out": str(tmp_path / "out"),
        "format": "universal",
        "update_difference": 0.0,
        "relative_difference": 0.0,
        "logits_difference": 0,
        "largest_logit": report["largest_logit"],
        "rank": 16,
        "targets": 8,
        "max_lora_rank": 16,
        "bytes": 0,
        "truncation": {},
        "notes": [],
    }
    assert report["logits_difference"] < 1e-4 < report["largest_logit"]
    config = json.loads((tmp_path / "out" / CONFIG).read_text())
    assert config["r"] == 16
    assert config["lora_alpha"] == 32
    assert config["target_modules"] == ["gate_proj", "q_proj", "up_proj", "v_proj"]
    filled = read_adapter(tmp_path / "out").targets["model.layers.1.self_attn.q_proj"]
    assert not filled.a.any()
    assert not filled.b.any()


def test_the_base_that_the_adapter_names_gives_shapes_and_no_logits(place: Path, tmp_path: Path) -> None:
    source = shutil.copytree(place / "adapter", tmp_path / "adapter")
    config = json.loads((source / CONFIG).read_text())
    (source / CONFIG).write_text(json.dumps(config | {"base_model_name_or_path": str(place / "base")}))
    report = export(source, tmp_path / "out", format="universal")
    assert report["logits_difference"] is None
    assert report["targets"] == 8


@pytest.mark.parametrize(
    ("named", "told"),
    [
        (None, "does not name its base model; give --base"),
        ("../base", r"names '\.\./base' as its base model, which is not followed; give --base"),
        ("/home/someone/model", "names '/home/someone/model' as its base model, which is not here; give --base"),
    ],
)
def test_a_base_that_is_not_named_or_not_here_is_asked_for(
    named: str | None, told: str, place: Path, tmp_path: Path
) -> None:
    source = shutil.copytree(place / "adapter", tmp_path / "adapter")
    config = json.loads((source / CONFIG).read_text())
    (source / CONFIG).write_text(json.dumps(config | {"base_model_name_or_path": named}))
    with pytest.raises(SettingsError, match=told):
        export(source, tmp_path / "out", format="universal")
    assert export(source, tmp_path / "out", format="peft")["targets"] == 3, "which needs no base"


def test_rank_zero_in_a_file_is_padded_or_left_out(place: Path, tmp_path: Path) -> None:
    source = read_adapter(place / "adapter")
    empty = Target(np.zeros((0, 16)), np.zeros((16, 0)), 1.0)
    config = {**source.config, "rank_pattern": {**source.config["rank_pattern"], "1.self_attn.q_proj": 0}}
    targets = {**source.targets, "model.layers.1.self_attn.q_proj": empty}
    write_into(tmp_path / "zero", replace(source, targets=targets, config=config))
    small = export(tmp_path / "zero", tmp_path / "small", format="peft", base=str(place / "base"))
    assert small["targets"] == 3
    large = export(tmp_path / "zero", tmp_path / "large", format="universal", base=str(place / "base"))
    assert (large["targets"], large["update_difference"]) == (8, 0.0)


def write_into(folder: Path, adapter: LoraAdapter) -> Path:
    folder.mkdir()
    write_adapter(adapter, folder)
    return folder


def test_truncation_is_the_best_there_is_and_its_error_is_told(place: Path, tmp_path: Path) -> None:
    report = export(place / "adapter", tmp_path / "out", format="universal", base=str(place / "base"), max_rank=4)
    assert report["rank"] == 8
    source, cut = read_adapter(place / "adapter"), read_adapter(tmp_path / "out")
    assert report["truncation"].keys() == {"model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj"}
    for name, target in source.targets.items():
        mine, other = target.delta(), cut.targets[name].delta()
        singular = np.linalg.svd(mine, compute_uv=False)
        best = np.linalg.norm(singular[4:]) / np.linalg.norm(singular)
        assert np.linalg.norm(mine - other) / np.linalg.norm(mine) == pytest.approx(best, abs=1e-6)
        assert report["truncation"].get(name, 0.0) == pytest.approx(best, abs=1e-6)
    exact, errors = truncate(source, dict.fromkeys(source.targets, 9))
    assert errors == {}
    assert compare_updates(source, exact, "F32").update == 0


ELSEWHERE = """
import importlib.util, json, sys, torch
assert importlib.util.find_spec("tsqlora") is None, "tsqlora is here"
from peft import PeftModel
from transformers import AutoModelForCausalLM
base, rows, *adapters, merged = json.loads(sys.argv[1])
def said(model):
    with torch.no_grad():
        return model.eval()(input_ids=torch.tensor(rows)).logits.tolist()
def load(path):
    return AutoModelForCausalLM.from_pretrained(path)
print(json.dumps([*(said(PeftModel.from_pretrained(load(base), path)) for path in adapters), said(load(merged))]))
"""


def test_every_export_says_the_same_in_an_environment_without_us(place: Path, tmp_path: Path) -> None:
    formats = ("peft", "universal", "merged")
    for format in formats:
        export(place / "adapter", tmp_path / format, format=format, base=str(place / "base"))
    rows = probe_rows(llama_at(place))["input_ids"].tolist()
    given = json.dumps([str(place / "base"), rows, *(str(tmp_path / format) for format in formats)])
    python = environment_without_us(tmp_path / "environment")
    done = subprocess.run([python, "-I", "-c", ELSEWHERE, given], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    expected = logits_with(llama_at(place), place / "adapter")
    for found in json.loads(done.stdout.splitlines()[-1]):
        torch.testing.assert_close(torch.tensor(found), expected, rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------------------------- merged


def test_a_merged_model_is_loaded_by_transformers_alone_with_the_same_logits(place: Path, tmp_path: Path) -> None:
    report = export(place / "adapter", tmp_path / "out", format="merged", base=str(place / "base"))
    assert "rank" not in report
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    expected = logits_with(llama_at(place), place / "adapter")
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-4)
    assert float((logits(llama_at(place)) - expected).abs().max()) > 0.1, "the adapter does something"


def test_a_merged_model_has_the_bases_precision_or_the_one_asked_for(place: Path, tmp_path: Path) -> None:
    save_base(tmp_path / "half", llama_at(place).bfloat16())
    export(place / "adapter", tmp_path / "own", format="merged", base=str(tmp_path / "half"))
    export(place / "adapter", tmp_path / "wide", format="merged", base=str(tmp_path / "half"), dtype="float32")
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
    expected = logits_with(tiny_llama(tied=tied), tmp_path / "a")
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-4)


def test_a_classifier_is_merged_with_its_head(tmp_path: Path) -> None:
    bert = tiny_bert(num_labels=3).float()
    save_base(tmp_path / "base", bert.bert)
    save_lora(tmp_path / "a", bert, lora_config(task_type="SEQ_CLS", target_modules=["query", "output.dense"]))
    export(tmp_path / "a", tmp_path / "out", format="merged", base=str(tmp_path / "base"))
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    bert = tiny_bert(num_labels=3).float()
    torch.testing.assert_close(logits(merged), logits_with(bert, tmp_path / "a"), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("format", ["universal", "merged"])
def test_a_model_that_encodes_and_decodes_is_fed_on_both_sides(format: str, tmp_path: Path) -> None:
    def base() -> PreTrainedModel:
        torch.manual_seed(0)
        sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2, "vocab_size": 60}
        return T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0, initializer_factor=0.5))

    save_base(tmp_path / "base", base())
    save_lora(
        tmp_path / "a", base(), lora_config(task_type="SEQ_2_SEQ_LM", target_modules=["q", "wo"], rank_pattern={"q": 3})
    )
    report = export(tmp_path / "a", tmp_path / "out", format=format, base=str(tmp_path / "base"))
    assert report["logits_difference"] is not None
    assert report.get("targets") in (None, 2 * 2 + 2 + 2 * 2), (
        "q of three attentions and wo of two sides, in two blocks"
    )


@pytest.mark.filterwarnings("ignore:Adapter 'default'. 2 LoRA tensor")  # PEFT takes its own biases for shards
@pytest.mark.parametrize("options", [{"use_dora": True}, {"init_lora_weights": "pissa"}, {"lora_bias": True}])
def test_what_is_more_than_a_product_is_merged_or_copied_and_refused_otherwise(
    options: Mapping[str, Any], tmp_path: Path
) -> None:
    def base() -> PreTrainedModel:
        return tiny_gpt2_lm() if "lora_bias" in options else tiny_llama()

    targets = ["c_attn"] if "lora_bias" in options else ["q_proj"]
    save_base(tmp_path / "base", base())
    config = lora_config(target_modules=targets, fan_in_fan_out="lora_bias" in options, **options)
    save_lora(tmp_path / "a", base(), config)
    (named,) = (f"{name}={value}" if name == "init_lora_weights" else name for name, value in options.items())
    for format in ("universal", "gguf"):
        with pytest.raises(UnsupportedError, match=f"the adapter has {named}, which .* --format merged"):
            export(tmp_path / "a", tmp_path / "out", format=format, base=str(tmp_path / "base"))
    with pytest.raises(UnsupportedError, match=f"the adapter has {named}"):
        export(tmp_path / "a", tmp_path / "out", format="peft", base=str(tmp_path / "base"), max_rank=2)
    report = export(tmp_path / "a", tmp_path / "same", format="peft", base=str(tmp_path / "base"))
    assert report["notes"] == [f"it has {named}: tensors and settings are copied as they are"]
    report = export(tmp_path / "a", tmp_path / "merged", format="merged", base=str(tmp_path / "base"))
    assert report["notes"] == [f"it has {named}: merged by PEFT, compared by logits alone"]
    assert report["update_difference"] is None
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged), logits_with(base(), tmp_path / "a"), rtol=1e-3, atol=1e-3)


# ------------------------------------------------------------------------- what must not happen


def test_an_export_that_is_not_its_source_writes_nothing(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(adapter: LoraAdapter, folder: Path) -> None:
        scaled = {name: replace(target, b=target.b * 1.001) for name, target in adapter.targets.items()}
        write_adapter(replace(adapter, targets=scaled), folder)

    monkeypatch.setattr(export_module, "write_adapter", wrong)
    with pytest.raises(TsqLoraError, match=r"the export's update differs by .* in model\.layers.*; nothing"):
        export(place / "adapter", tmp_path / "out", format="universal", base=str(place / "base"))
    assert list(tmp_path.iterdir()) == []


def test_a_merge_that_is_not_its_source_writes_nothing(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = export_module.save_merged

    def wrong(model: PreTrainedModel, *rest: Any) -> None:
        with torch.no_grad():
            model.get_submodule("model.layers.1.mlp.down_proj").weight[0, 0] += 0.01  # type: ignore[index,operator]
        save(model, *rest)

    monkeypatch.setattr(export_module, "save_merged", wrong)
    with pytest.raises(TsqLoraError, match=r"merged model\.layers\.1\.mlp\.down_proj\.weight is not base \+ ΔW"):
        export(place / "adapter", tmp_path / "out", format="merged", base=str(place / "base"))
    assert list(tmp_path.iterdir()) == []


def test_logits_that_differ_write_nothing(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = iter((torch.zeros(2), torch.ones(2)))
    monkeypatch.setattr(export_module, "peft_logits", lambda *_: next(wrong))
    with pytest.raises(TsqLoraError, match="the export's logits differ by 1 of 0, more than"):
        export(place / "adapter", tmp_path / "out", format="peft", base=str(place / "base"))
    assert list(tmp_path.iterdir()) == []


def test_nan_is_not_exported(place: Path, tmp_path: Path) -> None:
    source = read_adapter(place / "adapter")
    name, target = next(iter(source.targets.items()))
    broken = replace(target, a=np.full_like(target.a, np.nan))
    write_into(tmp_path / "nan", replace(source, targets={**source.targets, name: broken}))
    with pytest.raises(TsqLoraError, match=f"{name}: the update is not finite"):
        export(tmp_path / "nan", tmp_path / "out", format="universal", base=str(place / "base"))
    assert not (tmp_path / "out").exists()


def test_an_adapter_that_does_nothing_is_not_exported_as_nothing(place: Path, tmp_path: Path) -> None:
    source = read_adapter(place / "adapter")
    zero = {name: replace(target, b=np.zeros_like(target.b)) for name, target in source.targets.items()}
    write_into(tmp_path / "zero", replace(source, targets=zero))
    with pytest.raises(DataError, match="every layer of the adapter is zero"):
        export(tmp_path / "zero", tmp_path / "out", format="peft")


def test_another_base_is_refused_by_name(place: Path, tmp_path: Path) -> None:
    save_base(tmp_path / "other", tiny_gpt2_lm())
    for format in ("universal", "merged", "peft"):
        with pytest.raises(DataError, match=r"the base model has no module model\.layers\.0"):
            export(place / "adapter", tmp_path / "out", format=format, base=str(tmp_path / "other"))
    with pytest.raises(SettingsError, match=r"--base .*nowhere: no model can be loaded"):
        export(place / "adapter", tmp_path / "out", format="universal", base=str(tmp_path / "nowhere"))


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"format": "onnx"}, "--format onnx: choices: gguf, merged, peft, universal"),
        ({"format": "unversal"}, "did you mean 'universal'?"),
        ({"format": "peft", "dtype": "int8"}, "--dtype int8: choices: bfloat16, float16, float32"),
        ({"format": "peft", "max_rank": 0}, "--max-rank 0: it must be at least 1"),
        ({"format": "merged", "max_rank": 4}, "--max-rank and --mean-rank are for adapters"),
    ],
)
def test_wrong_options_are_told(options: dict[str, Any], told: str, place: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=re.escape(told)):
        export(place / "adapter", tmp_path / "out", base=str(place / "base"), **options)


def test_what_is_there_is_not_overwritten(place: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("")
    (tmp_path / "empty").mkdir()
    for name in ("file", "full"):
        with pytest.raises(SettingsError, match="exists already; name a directory that does not"):
            export(place / "adapter", tmp_path / name, format="peft")
    with pytest.raises(SettingsError, match="cannot be written"):
        export(place / "adapter", tmp_path / "file" / "out", format="peft")
    export(place / "adapter", tmp_path / "empty", format="peft")
    export(place / "adapter", tmp_path / "new" / "deep", format="peft")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "file", "full", "new"]


@pytest.mark.parametrize("format", ["universal", "merged", "peft"])
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
    stored = load_file(folder / "adapter_model.safetensors")
    for name in stored:
        stored[name] *= 1e-5 if "lora_B" in name or "classifier" in name else 1.0
    save_file(stored, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    export(folder, tmp_path / "out", format=format, base=str(tmp_path / "base"), dtype="float16")


def test_a_decoder_that_classifies_is_merged_with_the_padding_it_reads_its_class_at(tmp_path: Path) -> None:
    def base() -> PreTrainedModel:
        model = tiny_llama_classifier(dtype=torch.float32)
        model.config.pad_token_id = None
        return model

    save_base(tmp_path / "base", base())
    folder = save_lora(tmp_path / "a", base(), lora_config(task_type="SEQ_CLS", modules_to_save=["score"]))
    export(folder, tmp_path / "out", format="merged", base=str(tmp_path / "base"))
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert merged.config.pad_token_id == merged.config.eos_token_id is not None


def test_a_head_is_told_from_a_layer_whose_name_ends_alike(tmp_path: Path) -> None:
    """DistilBERT has a pre_classifier, too; and the base has a head of another size."""
    config = DistilBertConfig(vocab_size=40, dim=16, n_heads=2, n_layers=1, hidden_dim=16, max_position_embeddings=16)

    def bert(labels: int) -> PreTrainedModel:
        torch.manual_seed(0)
        config.num_labels = labels
        return DistilBertForSequenceClassification(config)

    save_base(tmp_path / "base", bert(2))
    folder = save_lora(tmp_path / "a", bert(3), lora_config(task_type="SEQ_CLS", target_modules=["q_lin"]))
    export(folder, tmp_path / "out", format="merged", base=str(tmp_path / "base"))
    assert AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").config.num_labels == 3


def test_a_classifier_of_tokens_without_a_task_has_its_head(tmp_path: Path) -> None:
    """Though the base has one of another size."""
    config = BertConfig(vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    torch.manual_seed(0)
    save_base(tmp_path / "base", BertForTokenClassification(config))
    config.num_labels = 5
    options: dict[str, Any] = {"target_modules": ["query"], "modules_to_save": ["classifier"], "task_type": None}
    folder = save_lora(tmp_path / "a", BertForTokenClassification(config), lora_config(**options))
    export(folder, tmp_path / "out", format="merged", base=str(tmp_path / "base"))
    assert load_file(tmp_path / "out" / "model.safetensors")["classifier.weight"].shape == (5, 16)


def test_answers_to_questions_are_compared_by_their_starts_and_ends(tmp_path: Path) -> None:
    config = BertConfig(vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    torch.manual_seed(0)
    model = BertForQuestionAnswering(config)
    save_base(tmp_path / "base", model)
    folder = save_lora(tmp_path / "a", model, lora_config(task_type="QUESTION_ANS", target_modules=["query"]))
    report = export(folder, tmp_path / "out", format="merged", base=str(tmp_path / "base"))
    assert report["logits_difference"] < 1e-4 < report["largest_logit"]


def test_an_enlarged_vocabulary_is_named(tmp_path: Path) -> None:
    small = tiny_llama()
    save_base(tmp_path / "base", small)
    large = tiny_llama()
    large.resize_token_embeddings(large.config.vocab_size + 3)
    folder = save_lora(tmp_path / "a", large, lora_config(modules_to_save=["embed_tokens", "lm_head"]))
    with pytest.raises(SettingsError, match=r"came with .* and the base has .*: where its vocabulary was enlarged"):
        export(folder, tmp_path / "out", format="merged", base=str(tmp_path / "base"))


def test_the_revision_that_an_adapter_names_is_its_bases(place: Path) -> None:
    adapter = read_adapter(place / "adapter")

    def named(revision: Any) -> LoraAdapter:
        return replace(adapter, config={**adapter.config, "revision": revision, "base_model_name_or_path": "org/b"})

    assert [revision_of("org/b", named(name)) for name in ("v2", None)] == ["v2", "main"]
    assert revision_of("org/other", named("v2")) == "main"
    with pytest.raises(SettingsError, match=r"names '\.\./x' as its base's revision, which is none"):
        revision_of("org/b", named("../x"))


def test_a_link_to_an_empty_directory_is_a_place(place: Path, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "there")
    export(place / "adapter", tmp_path / "link", format="peft")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "there" / "adapter_config.json").exists()


def test_a_run_without_an_adapter_is_said_to_be_unfinished(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("")
    with pytest.raises(DataError, match="has no adapter yet; `tsqlora train --resume` goes on with it"):
        examine(tmp_path)


def test_a_place_that_no_new_directory_can_take_is_refused(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SettingsError, match=r"--out \. is the working directory; name a directory in it"):
        export(place / "adapter", Path(), format="peft")
    (tmp_path / "volume").mkdir()
    monkeypatch.setattr("os.path.ismount", lambda path: Path(path).name == "volume")
    with pytest.raises(SettingsError, match="volume is a mounted volume; name a directory in it"):
        export(place / "adapter", tmp_path / "volume", format="peft")
    (tmp_path / f".out.{os.getpid()}").mkdir()  # of a killed process of the same number
    export(place / "adapter", tmp_path / "out", format="peft")


def test_numbers_of_another_precision_are_within_it(place: Path, tmp_path: Path) -> None:
    report = export(place / "adapter", tmp_path / "out", format="universal", base=str(place / "base"), dtype="bfloat16")
    assert 0 < report["relative_difference"] < 0.02
    assert {target.dtype for target in read_adapter(tmp_path / "out").targets.values()} == {"BF16"}


def test_an_export_names_its_targets_by_endings_that_no_other_module_has(tmp_path: Path) -> None:
    save_base(tmp_path / "base", tiny_bert().float())
    save_lora(tmp_path / "a", tiny_bert().float(), LoraConfig(target_modules=["attention.output.dense", "query"]))
    export(tmp_path / "a", tmp_path / "out", format="universal", base=str(tmp_path / "base"))
    config = json.loads((tmp_path / "out" / CONFIG).read_text())
    assert config["target_modules"] == ["attention.output.dense", "query"]
