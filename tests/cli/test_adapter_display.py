"""What is shown of an adapter fits 80 columns, names every layer whole, and says what happened."""

import io
from typing import Any

import pytest
from rich.console import Console

from loras import lora_config, save_lora, tiny_llama
from tsqlora.adapter.doctor import examine
from tsqlora.adapter.rewrite import layer_kind
from tsqlora.cli.display import show_doctor, show_export


def shown(show: Any, value: Any, width: int = 80) -> str:
    console = Console(file=io.StringIO(), width=width)
    show(console, value)
    return console.file.getvalue()  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    config = lora_config(rank_pattern={"k_proj": 3, "layers.0.self_attn.v_proj": 20}, modules_to_save=["lm_head"])
    return examine(save_lora(tmp_path_factory.mktemp("display") / "a", tiny_llama(), config))


def unfolded(text: str) -> str:
    return "".join(text.split())


def test_the_doctors_report(report: dict[str, Any]) -> None:
    text = shown(show_doctor, report)
    assert "…" not in text
    for kind in {layer_kind(name) for name in report["ranks"]}:
        assert f"{kind}2" in unfolded(text), "of two blocks"
    for line in (
        "base         not named",
        "layers       6, rank 3 to 20",
        "besides LoRA lm_head",
        "--max-lora-rank 32",
    ):
        assert line in text
    assert "takesnosavedmodules" in unfolded(text)


def test_the_verdict_on_a_template_stands_last(report: dict[str, Any]) -> None:
    template = {"same": 0, "prompts": 2, "stops": ["</s>"], "stops_trained": 1.0}
    template["first"] = {"prompt": 0, "at": 3, "trained": "a", "other": "b"}
    text = shown(show_doctor, report | {"template": template, "notes": ["a note"]})
    assert "0 of 2 prompts are those of training" in text.partition("note: a note")[2]


def test_one_version_is_not_counted_as_the_newest(report: dict[str, Any]) -> None:
    assert "newest versions" in shown(show_doctor, report)
    assert "newest versions" not in shown(show_doctor, report | {"consumers": report["consumers"][:1]})


def test_where_no_export_helps_other_servers_are_named(report: dict[str, Any]) -> None:
    stuck = [server | {"mend": None} for server in report["consumers"]]
    verdicts = {"PEFT": "right", "vLLM": "right", "llama.cpp": "refused"}
    text = shown(show_doctor, report | {"consumers": stuck, "servers": verdicts})
    assert "no export helps llama.cpp; serve it with PEFT or vLLM" in text


def test_of_many_kinds_of_layers_the_first_are_shown(report: dict[str, Any]) -> None:
    one = next(iter(report["health"]["layers"].values()))
    layers = {f"model.layers.0.own{j}.q_proj": one for j in range(50)}
    assert "and 10 more kinds; --json has every layer" in shown(
        show_doctor, report | {"health": report["health"] | {"layers": layers}}
    )


def test_layers_with_one_factor_are_one_line(report: dict[str, Any]) -> None:
    wrong = report["consumers"][0] | {"factors": {f"layers.{j}.q": 1.5 for j in range(9)} | {"layers.9.q": 3.0}}
    text = shown(show_doctor, report | {"consumers": [wrong]}, 120)
    assert "× 1.5  layers.0.q and 8 more" in text
    assert "× 3  layers.9.q" in text
    assert "layers.1.q" not in text


def test_damage_and_idle_layers_are_named(report: dict[str, Any]) -> None:
    result = {"nonfinite": {"h.0.q": 3}, "zero_slots": 2, "duplicate_slots": 1, "idle_layers": ["h.1.q"]}
    text = shown(show_doctor, report | {"health": report["health"] | result})
    assert "NaN or ∞     3 numbers in h.0.q" in text
    assert "unused ranks 2 zero, 1 duplicate" in text
    assert "idle layers  1: h.1.q" in text


def test_an_export_says_what_was_written_and_compared() -> None:
    done = {
        "out": "there",
        "format": "universal",
        "bytes": 1234,
        "rank": 16,
        "targets": 4,
        "max_lora_rank": 16,
        "update_difference": 1e-7,
        "relative_difference": 3e-8,
        "logits_difference": None,
        "largest_logit": None,
        "bfloat16": {"merged": 0.02, "base": 0.03},
        "serve": {},
        "truncation": {f"layer.{j}": j / 10 for j in range(1, 9)},
        "logits_lost": 0.12,
        "notes": ["mind [this]"],
    }
    text = shown(show_export, done)
    assert text.splitlines()[:6] == [
        "wrote there: universal, 1,234 bytes",
        "rank         16, 4 layers",
        "vLLM needs   --max-lora-rank 16",
        "compared     ΔW differs from the cut adapter by 1e-07 at most, 3e-08 of a layer's largest",
        "bfloat16     logits differ by 2.00% from PEFT's in float32; the base's own by 3.00%",
        "note: mind [this]",
    ]
    assert "truncated    8 layers, which moves logits by 0.12 at most; the greatest losses:" in text
    assert "80.0% of ‖ΔW‖  layer.8" in text
    assert "layer.2" not in text
    further = {"logits_difference": 0.25, "largest_logit": 4.0}
    assert "logits differ from the cut adapter by 0.25 at most" in shown(show_export, done | further)
    uncut = done | further | {"truncation": {}}
    assert "logits differ from its source by 0.25 at most" in shown(show_export, uncut)
    assert "compared" not in shown(show_export, done | {"update_difference": None})
