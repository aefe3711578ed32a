"""Adapters of strangers: what would hang, fill the memory or run code is refused, or is not done."""

import json
import tracemalloc
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import save_file

from hostile import safetensors_bytes
from loras import lora_config, save_base, save_lora, tiny_llama
from tsqlora.errors import DataError, SettingsError
from tsqlora.interop import files, patterns
from tsqlora.interop.base import base_skeleton
from tsqlora.interop.doctor import examine
from tsqlora.interop.files import CONFIG, WEIGHTS, read_adapter
from tsqlora.interop.patterns import require_quick
from tsqlora.run.export import export

NAME = "layers.0.self_attn.q_proj"


def save(
    folder: Path, *, name: str = NAME, a: Any = (2, 4), b: Any = (3, 2), dtype: Any = torch.float32, **more: Any
) -> Path:
    folder.mkdir(exist_ok=True)
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "base_model_name_or_path": None}
    (folder / CONFIG).write_text(json.dumps(config | more))
    slots = {"lora_A": torch.ones(a).to(dtype), "lora_B": torch.ones(b).to(dtype)}
    save_file({f"base_model.model.{name}.{slot}.weight": t for slot, t in slots.items()}, folder / WEIGHTS)
    return folder


@pytest.mark.parametrize("bomb", ["(a|aa)+$", "(a|aa|aaa)+b"])
def test_patterns_that_never_end_are_refused(bomb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patterns, "SECONDS", 0.2)
    long = save(tmp_path / "a", name="a" * 60 + "c", alpha_pattern={bomb: 3})
    with pytest.raises(DataError, match="too long to match"):
        read_adapter(long)


@pytest.mark.parametrize("bomb", ["(a+)+$", "(.*)*x", "(.*a){20}b"])
def test_patterns_that_would_hold_up_peft_are_matched_and_never_shown_to_it(bomb: str, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", tiny_llama())
    source = save_lora(tmp_path / "a", tiny_llama(), lora_config(target_modules=["q_proj"]))
    config = json.loads((source / CONFIG).read_text())
    (source / CONFIG).write_text(json.dumps(config | {"alpha_pattern": {f"{'a' * 60}|{bomb}": 3, "1.*": 5}}))
    report = export(source, tmp_path / "out", format="peft", base=str(base))
    assert report["update_difference"] == 0
    scales = {name: target.scale for name, target in read_adapter(tmp_path / "out").targets.items()}
    assert scales == {"model.layers.0.self_attn.q_proj": 2, "model.layers.1.self_attn.q_proj": 5 / 8}


def test_more_patterns_than_anybody_has_are_refused() -> None:
    names = [f"layers.{j}.mlp.up_proj" for j in range(6000)]
    with pytest.raises(DataError, match="too long to match"):
        require_quick(names, names, "x")


def test_settings_as_large_as_a_disk_are_not_read(tmp_path: Path) -> None:
    save(tmp_path / "a")
    with open(tmp_path / "a" / CONFIG, "r+b") as file:
        file.truncate(1 << 30)
    with pytest.raises(DataError, match="1,073,741,824 bytes"):
        read_adapter(tmp_path / "a")


def test_a_header_that_claims_more_than_there_is_is_refused(tmp_path: Path) -> None:
    save(tmp_path / "a")
    name = f"base_model.model.{NAME}.lora_A.weight"
    for lies in ({"shape": [2**40, 2**40]}, {"data_offsets": [0, 2**60]}, {"dtype": "F64"}, {"data_offsets": [32, 0]}):
        (tmp_path / "a" / WEIGHTS).write_bytes(safetensors_bytes({name: ("F32", [2, 4], bytes(32))}, **lies))
        with pytest.raises(DataError, match=WEIGHTS):
            read_adapter(tmp_path / "a")
    (tmp_path / "a" / WEIGHTS).write_bytes(b"\xff" * 8 + b"{}")
    with pytest.raises(DataError, match=WEIGHTS):
        read_adapter(tmp_path / "a")


def test_a_broken_file_is_refused_without_reading_all_of_it(tmp_path: Path) -> None:
    save(tmp_path / "a")
    with open(tmp_path / "a" / WEIGHTS, "r+b") as file:
        file.truncate(1 << 26)
    tracemalloc.start()
    with pytest.raises(DataError, match=WEIGHTS):
        read_adapter(tmp_path / "a")
    assert tracemalloc.get_traced_memory()[1] < 1 << 22
    tracemalloc.stop()


def test_an_error_without_a_message_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "read_tensors", Mock(side_effect=OSError))
    with pytest.raises(DataError, match="OSError"):
        read_adapter(save(tmp_path / "a"))


def test_a_layer_that_implies_a_thousand_takes_the_memory_of_one(tmp_path: Path) -> None:
    # A thousand matrices of 6.4 MB each would be 6.4 GB.
    report = examine(save(tmp_path / "a", name="layers.999.q", a=(2, 200_000), b=(3, 2)))
    assert report["universal_parameters"] == 1000 * 8 * 200_003


def test_nobodys_block_number_is_no_count(tmp_path: Path) -> None:
    assert examine(save(tmp_path / "a", name=f"layers.{'9' * 400}.q"))["ranks"]


def test_float8_heads_are_looked_at_for_nan(tmp_path: Path) -> None:
    folder = save(tmp_path / "a")
    tensors = {
        f"base_model.model.{NAME}.lora_A.weight": torch.ones(2, 4),
        f"base_model.model.{NAME}.lora_B.weight": torch.ones(3, 2),
    }
    head = torch.tensor([1.0, float("nan")]).to(torch.float8_e4m3fn)
    save_file(tensors | {"base_model.model.head.weight": head}, folder / WEIGHTS)
    assert examine(folder)["health"]["nonfinite"] == {"head.weight": 1}


def test_code_that_comes_with_a_base_is_neither_run_nor_asked_about(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tmp_path / "base"
    base.mkdir()
    (base / "evil.py").write_text(f"open({str(tmp_path / 'owned')!r}, 'w')\nclass C: pass\n")
    (base / "config.json").write_text(
        json.dumps({"model_type": "evil", "auto_map": {"AutoConfig": "evil.C", "AutoModel": "evil.C"}})
    )
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    folder = save(tmp_path / "a", base_model_name_or_path=str(base))
    with pytest.raises(SettingsError, match="--base"):
        base_skeleton(str(base), read_adapter(folder))
    assert examine(folder)["base_found"] is False
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("named", ["pipeline", "logging", "TrainingArguments", "set_seed"])
def test_an_architecture_is_a_model_or_none(named: str, tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    sizes = {
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 8,
        "vocab_size": 9,
    }
    (base / "config.json").write_text(json.dumps({"model_type": "bert", "architectures": [named], **sizes}))
    adapter = read_adapter(save(tmp_path / "a", auto_mapping={"base_model_class": named, "parent_library": "os"}))
    assert type(base_skeleton(str(base), adapter)).__name__ == "BertModel"


@pytest.mark.parametrize(
    "named", ["../x", "a/../b", "/nowhere/x", "~/x", "a/b/c", "https://x/y", "a" * 5000, "", "a\0b", "-rf"]
)
def test_what_is_no_hub_id_is_not_asked_for_on_the_hub(named: str, tmp_path: Path) -> None:
    report = examine(save(tmp_path / "a", base_model_name_or_path=named))
    assert report["base_found"] is False


def test_a_pickle_beside_the_settings_is_refused_before_anything_loads_it(tmp_path: Path) -> None:
    folder = save(tmp_path / "a")
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")
    with pytest.raises(DataError, match=r"adapter_model\.bin, a pickle, which can run code and is not opened"):
        read_adapter(folder)
