"""Ten kinds of adapter, each with what every consumer makes of it."""

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from loras import lora_config, save_base, save_lora, tiny_llama
from models import tiny_bert
from tsqlora.adapter.consumers import CONSUMERS, rules_table
from tsqlora.adapter.doctor import examine
from tsqlora.adapter.files import CONFIG, WEIGHTS, read_adapter
from tsqlora.adapter.health import layer_health
from tsqlora.adapter.lora import Target
from tsqlora.adapter.write import write_adapter
from tsqlora.exporting import export

ATTENTION = ("q_proj", "k_proj", "v_proj")
Q0, Q1 = (f"model.layers.{j}.self_attn.q_proj" for j in (0, 1))


def saved(**options: Any) -> Callable[[Path], Path]:
    return lambda folder: save_lora(folder, tiny_llama(), lora_config(**options))


def with_rank_zero(folder: Path) -> Path:
    source = read_adapter(save_lora(folder / "whole", tiny_llama(), lora_config()))
    empty = Target(torch.zeros(0, 16), torch.zeros(16, 0), 1.0)
    config = {**source.config, "rank_pattern": {Q1: 0}}
    write_adapter(replace(source, targets={**source.targets, Q1: empty}, config=config), folder)
    return folder


def damaged(folder: Path) -> Path:
    """NaN in one layer, two zero slots and a doubled one in another, nothing in a third."""
    save_lora(folder, tiny_llama(), lora_config())
    tensors = load_file(folder / WEIGHTS)
    name = "base_model.model.model.layers.{}.self_attn.{}.lora_{}.weight"
    tensors[name.format(0, "q_proj", "A")][0, 0] = math.nan
    tensors[name.format(0, "k_proj", "A")][:2] = 0
    tensors[name.format(0, "k_proj", "A")][3] = 2 * tensors[name.format(0, "k_proj", "A")][4]
    tensors[name.format(1, "v_proj", "B")][:] = 0
    save_file(tensors, folder / WEIGHTS)
    return folder


RIGHT = dict.fromkeys((consumer.name for consumer in CONSUMERS), "right")
SERVERS = ("vLLM", "SGLang", "llama.cpp", "TGI", "MLX", "TensorRT-LLM")
KINDS: dict[str, tuple[Callable[[Path], Path], Mapping[str, str]]] = {
    "uniform": (saved(), RIGHT),
    "ranks, one scale": (
        saved(rank_pattern={Q0: 4}, alpha_pattern={Q0: 8}),
        RIGHT
        | {
            "SGLang": "refused -> universal",
            "llama.cpp": "wrong -> gguf",
            "MLX": "refused -> universal",
            "TensorRT-LLM": "wrong -> universal",
        },
    ),
    "ranks, one alpha": (
        saved(rank_pattern={"q_proj": 32}),
        RIGHT
        | {
            "vLLM": "wrong -> universal",
            "SGLang": "refused -> universal",
            "TGI": "wrong -> universal",
            "MLX": "refused -> universal",
        },
    ),
    "rslora": (saved(use_rslora=True), RIGHT | {"SGLang": "wrong -> universal", "llama.cpp": "wrong -> gguf"}),
    "a layer without": (
        saved(target_modules=[Q0, "k_proj", "v_proj"]),
        RIGHT | {"TGI": "wrong -> universal"},
    ),
    "rank 0": (
        with_rank_zero,
        RIGHT
        | {
            "PEFT": "refused -> peft",
            "diffusers": "refused -> peft",
            "SGLang": "refused -> universal",
            "MLX": "refused -> universal",
        },
    ),
    "dora": (
        saved(use_dora=True),
        RIGHT
        | dict.fromkeys(("vLLM", "SGLang", "llama.cpp"), "refused -> merged")
        | dict.fromkeys(("TGI", "MLX"), "wrong -> merged"),
    ),
    "embedding": (saved(target_modules=["embed_tokens", "q_proj"]), RIGHT | {"TGI": "wrong -> merged"}),
    "head": (
        saved(modules_to_save=["lm_head"]),
        RIGHT | dict.fromkeys(SERVERS, "wrong -> merged") | dict.fromkeys(("vLLM", "llama.cpp"), "refused -> merged"),
    ),
    "damaged": (damaged, RIGHT),
    "pissa": (saved(init_lora_weights="pissa"), RIGHT | dict.fromkeys(SERVERS, "wrong -> merged")),
    "small rank": (saved(r=4, lora_alpha=8), RIGHT | {"TGI": "wrong -> universal"}),
    "bias of B": (
        saved(bias="lora_only"),
        RIGHT
        | {"vLLM": "refused -> merged"}
        | dict.fromkeys(("SGLang", "llama.cpp", "TGI", "MLX", "TensorRT-LLM"), "wrong -> merged"),
    ),
}


def verdicts(report: Mapping[str, Any]) -> dict[str, str]:
    found = {}
    for consumer in report["consumers"]:
        mended = f" -> {consumer['mend']}" if consumer["mend"] else ""
        found[consumer["name"]] = consumer["verdict"] + mended
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_every_consumer_of_every_kind_of_adapter(kind: str, tmp_path: Path) -> None:
    build, expected = KINDS[kind]
    report = examine(build(tmp_path / "a"))
    assert verdicts(report) == dict(expected)
    json.dumps(report, allow_nan=False)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "universal" in str(KINDS[kind][1])])
def test_the_universal_export_is_right_where_it_is_said_to_be(kind: str, tmp_path: Path) -> None:
    save_base(tmp_path / "base", tiny_llama())
    source = KINDS[kind][0](tmp_path / "a")
    export(source, tmp_path / "out", format="universal", base=str(tmp_path / "base"))
    assert verdicts(examine(tmp_path / "out")) == RIGHT


def of(report: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    (found,) = (consumer for consumer in report["consumers"] if consumer["name"] == name)
    return found


def test_factors_by_hand(tmp_path: Path) -> None:
    # s is 16/32 = 0.5 in q and 16/8 = 2 elsewhere; vLLM takes 16/8 for all.
    report = examine(saved(rank_pattern={"q_proj": 32})(tmp_path / "a"))
    assert of(report, "vLLM")["factors"] == {Q0: 4.0, Q1: 4.0}
    assert of(report, "vLLM")["reasons"] == ["2 of 6 layers at 4 times their scale"]
    assert report["max_lora_rank"] == 32
    # s is 2 everywhere; llama.cpp takes 16/4 where the rank is 4.
    report = examine(saved(rank_pattern={Q0: 4}, alpha_pattern={Q0: 8})(tmp_path / "b"))
    assert of(report, "llama.cpp")["factors"] == {Q0: 2.0}
    # rsLoRA: s is 16/√8, and SGLang takes 16/8.
    report = examine(saved(use_rslora=True)(tmp_path / "c"))
    assert of(report, "SGLang")["factors"][Q0] == pytest.approx(1 / math.sqrt(8))


def test_layers_that_tgi_drops_are_named(tmp_path: Path) -> None:
    report = examine(saved(target_modules=[Q0, "k_proj"])(tmp_path / "a"))
    assert of(report, "TGI")["factors"] == {Q0: 0.0}
    assert of(report, "TGI")["reasons"] == [f"{Q1} has no adapter, so that no layer of its kind gets one"]
    assert "taken from the adapter's own names" in report["notes"][-1]


def test_the_base_says_how_many_layers_there_are(tmp_path: Path) -> None:
    save_base(tmp_path / "base", tiny_llama())
    source = saved(target_modules=[Q0])(tmp_path / "a")
    assert of(examine(source), "TGI")["verdict"] == "right", "one layer is all that the adapter speaks of"
    config = json.loads((source / CONFIG).read_text()) | {"base_model_name_or_path": str(tmp_path / "base")}
    (source / CONFIG).write_text(json.dumps(config))
    report = examine(source)
    assert report["base_found"]
    assert of(report, "TGI")["factors"] == {Q0: 0.0}


def test_a_number_that_is_nobodys_block_implies_nothing(tmp_path: Path) -> None:
    source = read_adapter(saved(target_modules=[Q0, Q1])(tmp_path / "a"))
    far = {"model.layers.999999999999.self_attn.q_proj": source.targets[Q0], Q1: source.targets[Q1]}
    (tmp_path / "far").mkdir()
    write_adapter(replace(source, targets=far), tmp_path / "far")
    assert of(examine(tmp_path / "far"), "TGI")["verdict"] == "right"


def test_no_gguf_file_is_promised_for_a_base_that_llama_cpp_arranges_unknown_to_us(tmp_path: Path) -> None:
    bert = tiny_bert().float()
    save_base(tmp_path / "base", bert.bert)
    config = lora_config(task_type="FEATURE_EXTRACTION", target_modules=["query"], use_rslora=True)
    source = save_lora(tmp_path / "a", bert.bert, config)
    assert of(examine(source), "llama.cpp")["mend"] == "gguf", "who knows"
    settings = json.loads((source / CONFIG).read_text()) | {"base_model_name_or_path": str(tmp_path / "base")}
    (source / CONFIG).write_text(json.dumps(settings))
    assert of(examine(source), "llama.cpp")["mend"] == "merged"


def test_damage_is_found_where_it_is(tmp_path: Path) -> None:
    health = examine(damaged(tmp_path / "a"))["health"]
    assert health["nonfinite"] == {Q0: 1}
    assert (health["zero_slots"], health["duplicate_slots"]) == (2 + 8, 1)
    assert health["idle_layers"] == ["model.layers.1.self_attn.v_proj"]
    assert health["layers"]["model.layers.0.self_attn.k_proj"]["zero"] == 2


def test_effective_rank_by_hand() -> None:
    # Singular values 2 and 2 of four slots, one zero, one doubled: two directions of equal size.
    a = torch.tensor([[1.0, 0, 0], [0, 2, 0], [0, 0, 0], [1, 0, 0]])
    b = torch.tensor([[1.0, 0, 0, 1], [0, 1, 5, 0]])
    found = layer_health(Target(a, b, 0.5))
    assert (found.rank, found.zero, found.duplicate) == (4, 1, 1)
    assert found.effective == pytest.approx(2.0)
    assert found.norm == pytest.approx(0.5 * math.sqrt(8))
    assert layer_health(Target(torch.zeros(2, 3), torch.ones(3, 2), 1.0)).effective == 0
    assert layer_health(Target(torch.zeros(0, 3), torch.zeros(3, 0), 1.0)).effective == 0


def test_what_lies_beside_and_who_is_named_is_told(tmp_path: Path) -> None:
    source = saved()(tmp_path / "a")
    (source / "optimizer.pt").write_bytes(b"")
    notes = examine(source)["notes"]
    assert notes[0] == "optimizer.pt would run code when loaded, and was not opened; delete it"
    assert notes[1].startswith("it names no base model")
    config = json.loads((source / CONFIG).read_text()) | {"base_model_name_or_path": "/elsewhere/model"}
    (source / CONFIG).write_text(json.dumps(config))
    assert "is a directory of another machine, /elsewhere/model" in examine(source)["notes"][1]


def test_every_rule_says_where_it_was_read() -> None:
    assert len({consumer.name for consumer in CONSUMERS}) == len(CONSUMERS) == 8
    for consumer in CONSUMERS:
        assert all((consumer.version, consumer.source, consumer.rule))
        assert set(consumer.evidence.split(", ")) <= {"S", "I", "R"}


def test_the_documents_table_is_the_rules() -> None:
    document = (Path(__file__).parents[2] / "docs" / "adapters.md").read_text(encoding="utf-8")
    found = re.search(r"<!-- consumers -->\n\n(.*?)\n\n<!-- end -->", document, re.DOTALL)
    assert found is not None
    assert found[1].splitlines() == rules_table(), "print('\\n'.join(rules_table())) makes it anew"
