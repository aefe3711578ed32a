"""Any LoRA directory is read as PEFT reads it; what is broken, would hang, fill the memory or run code is refused."""

import json
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import nn

from hostile import safetensors_bytes
from kinds import edit
from loras import lora_config, save_base, save_lora, tiny_gpt2_lm, tiny_llama
from models import SIZES
from tsqlora.adapter import files, patterns
from tsqlora.adapter.base import Base
from tsqlora.adapter.doctor import examine
from tsqlora.adapter.files import CONFIG, WEIGHTS, read_adapter
from tsqlora.adapter.patterns import require_quick, scale_of
from tsqlora.errors import DataError, SettingsError
from tsqlora.training.export import export

EVERYTHING = ["q_proj", "k_proj", "down_proj", "embed_tokens", "lm_head"]
CONFIGS: dict[str, Callable[[], tuple[Any, LoraConfig]]] = {
    "patterns": lambda: (
        tiny_llama(),
        lora_config(
            target_modules=EVERYTHING,
            rank_pattern={"layers.0.self_attn.q_proj": 3, "q_proj": 5, "embed_tokens": 2},
            alpha_pattern={"down_proj": 3, r".*\.1\..*": 7},
        ),
    ),
    "rslora": lambda: (tiny_llama(), lora_config(use_rslora=True, rank_pattern={"k_proj": 3})),
    "Conv1D": lambda: (tiny_gpt2_lm(), lora_config(target_modules=["c_attn", "wte"], fan_in_fan_out=True)),
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_every_update_is_the_one_that_peft_computes(kind: str, tmp_path: Path) -> None:
    base, config = CONFIGS[kind]()
    save_lora(tmp_path, base, config)
    model = PeftModel.from_pretrained(CONFIGS[kind]()[0], str(tmp_path))
    theirs = {
        name.removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer)
    }
    targets = read_adapter(tmp_path).targets
    assert targets.keys() == theirs.keys()
    for name, layer in theirs.items():
        assert targets[name].scale == layer.scaling["default"]
        turned = isinstance(layer.get_base_layer(), nn.Embedding) or config.fan_in_fan_out
        mine = targets[name].delta().T if turned else targets[name].delta()
        np.testing.assert_allclose(
            mine, cast(Any, layer).get_delta_weight("default").detach().numpy(), rtol=1e-5, atol=1e-6
        )


NAMES = ("layers.0.q", "layers.1.q", "layers.10.q", "layers.0.mlp.up", "up")
KEYS = st.sampled_from((*NAMES, "q", "0.q", "mlp.up", r".*\.1.*", "layers.(0|1).*", "^up"))


@given(
    ranks=st.dictionaries(KEYS, st.integers(1, 9), max_size=4),
    alphas=st.dictionaries(KEYS, st.sampled_from((1, 3, 0.5, 16)), max_size=4),
    use_rslora=st.booleans(),
)
def test_patterns_are_matched_as_peft_matches_them(ranks: Any, alphas: Any, use_rslora: bool) -> None:
    model = nn.ModuleDict({"up": nn.Linear(2, 2)})
    layers = nn.ModuleDict({"0": nn.ModuleDict({"mlp": nn.ModuleDict({"up": nn.Linear(2, 2)})})})
    for number in ("0", "1", "10"):
        if number not in layers:
            layers[number] = nn.ModuleDict()
        layers[number]["q"] = nn.Linear(2, 2)  # type: ignore[operator]
    model["layers"] = layers
    config = LoraConfig(
        target_modules=list(NAMES), rank_pattern=ranks, alpha_pattern=alphas, r=4, lora_alpha=6, use_rslora=use_rslora
    )
    inject_adapter_in_model(config, model)
    for name in NAMES:
        layer = model.get_submodule(name)
        assert isinstance(layer, LoraLayer)
        assert scale_of(name, config.to_dict()) == (layer.r["default"], layer.scaling["default"])


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_lora(tmp_path_factory.mktemp("sound"), tiny_llama(), lora_config())


@pytest.fixture
def folder(sound: Path, tmp_path: Path) -> Path:
    return shutil.copytree(sound, tmp_path / "adapter")


FIRST = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
A = "lora_A.weight"


def with_tensors(**changed: torch.Tensor | None) -> Callable[[Path], Any]:
    """Adds tensors by their keys, of which "first" is FIRST, or removes them."""

    def change(folder: Path) -> None:
        tensors = {**load_file(folder / WEIGHTS), **{FIRST if k == "first" else k: t for k, t in changed.items()}}
        save_file({key: tensor for key, tensor in tensors.items() if tensor is not None}, folder / WEIGHTS)

    return change


def renamed(old: str, new: str) -> Callable[[Path], Any]:
    def change(folder: Path) -> None:
        save_file({key.replace(old, new): t for key, t in load_file(folder / WEIGHTS).items()}, folder / WEIGHTS)

    return change


def with_settings(**settings: Any) -> Callable[[Path], Any]:
    return lambda folder: edit(folder, **settings)


def with_bytes(name: str, content: bytes) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).write_bytes(content)


def of_size(name: str, size: int) -> Callable[[Path], Any]:
    def change(folder: Path) -> None:
        with open(folder / name, "r+b") as file:
            file.truncate(size)

    return change


def lying(**lies: Any) -> Callable[[Path], Any]:
    """With a header that claims more than there is."""
    return with_bytes(WEIGHTS, safetensors_bytes({FIRST: ("F32", [2, 4], bytes(32))}, **lies))


def pickled(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / "adapter_model.bin").write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")


def linked(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder.parent / "elsewhere")
    (folder / WEIGHTS).symlink_to(folder.parent / "elsewhere")


ONE = torch.zeros(1)
BROKEN: list[tuple[Callable[[Path], Any], str]] = [
    (with_settings(rank_pattern={"q" * 3000: 2}), "rank_pattern"),
    (with_settings(rank_pattern={"(?i)q": 2}), r"rank_pattern .* '\(\?i\)q'"),
    (with_settings(alpha_pattern={"(": 1}), r"alpha_pattern .* '\('"),
    (with_settings(alpha_pattern={"(a|aa)+$": 3}), "too long to match"),
    (with_settings(r=4), "_proj: .* 8 × 16 F32"),
    (with_tensors(first=None), r"q_proj has .*lora_B\.weight"),
    (with_tensors(first=torch.zeros(4, 16)), "lora_A is 4 × 16 F32, lora_B 16 × 8"),
    (with_tensors(first=torch.zeros(8, 0)), "lora_A is 8 × 0 F32"),
    (with_tensors(first=torch.zeros(8, 16, dtype=torch.int8)), "stored as I8"),
    (with_tensors(first=torch.zeros(8, 16).to(torch.float8_e4m3fn)), "stored as F8_E4M3; save .* BF16"),
    (with_tensors(**{FIRST.replace("A", "B"): torch.empty(0)}), "empty tensors.*ZeRO-3.*stage3_gather"),
    (renamed(".weight", ".policy.weight"), "no key matches.*save_pretrained"),
    (with_tensors(**{"base_model.model.h.\u00b2.weight": ONE}), r"h\."),
    (with_tensors(**{f"base_model.model.{'1' * 5000}.weight": ONE}), "1111"),
    (lambda folder: save_file({}, folder / WEIGHTS), "no lora_A"),
    (lambda folder: (folder / CONFIG).unlink(), f"has no {CONFIG}"),
    (with_bytes(CONFIG, b"[]"), f"{CONFIG}.*not a JSON object"),
    (of_size(CONFIG, 1 << 30), "1,073,741,824 bytes"),
    (with_bytes(WEIGHTS, b"\xff" * 8 + b"{}"), WEIGHTS),
    (of_size(WEIGHTS, 1 << 26), WEIGHTS),
    (lying(shape=[2**40, 2**40]), WEIGHTS),
    (lying(data_offsets=[0, 2**60]), WEIGHTS),
    (pickled, r"adapter_model\.bin, a pickle, which can run code and is not opened"),
    (linked, "elsewhere"),
]


@pytest.mark.parametrize(("breaks", "named"), BROKEN, ids=[str(j) for j in range(len(BROKEN))])
def test_what_is_broken_is_named_and_not_read_whole(
    breaks: Callable[[Path], Any], named: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patterns, "SECONDS", 0.2)
    long = {f"base_model.model.{'a' * 60}c.{A}": torch.zeros(8, 16)}
    long |= {key.replace("_A", "_B"): torch.zeros(16, 8) for key in long}
    if "too long" in named:
        with_tensors(**long)(folder)
    breaks(folder)
    tracemalloc.start()
    with pytest.raises(DataError, match=named) as refused:
        read_adapter(folder)
    assert len(str(refused.value)) < 1600
    assert tracemalloc.get_traced_memory()[1] < 1 << 22
    tracemalloc.stop()


def test_an_error_without_a_message_is_named(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="nowhere"):
        read_adapter(tmp_path / "nowhere")
    monkeypatch.setattr(files, "read_tensors", Mock(side_effect=OSError))
    with pytest.raises(DataError, match="OSError"):
        read_adapter(folder)


def test_links_within_a_hub_cache_are_followed(folder: Path, tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "repo" / "blobs", tmp_path / "repo" / "snapshots" / "abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for name in (CONFIG, WEIGHTS):
        (folder / name).rename(blobs / name[:12])
        (snapshot / name).symlink_to(blobs / name[:12])
    assert read_adapter(snapshot).rank == 8


def test_the_weight_that_peft_copies_beside_an_embedding_is_no_head(tmp_path: Path) -> None:
    save_base(tmp_path / "base", tiny_llama())
    save_lora(tmp_path / "a", tiny_llama(), lora_config(target_modules=["embed_tokens"]))
    copied = {"base_model.model.model.embed_tokens.base_layer.weight": tiny_llama().model.embed_tokens.weight.detach()}
    with_tensors(**copied)(tmp_path / "a")
    assert read_adapter(tmp_path / "a").heads() == []
    for format in ("peft", "universal"):
        export(tmp_path / "a", tmp_path / format, format=format, base=str(tmp_path / "base"))
        assert bool(read_adapter(tmp_path / format).base_layers) == (format == "peft")


# ------------------------------------------------------------------------------------ strangers

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


def test_more_patterns_than_anybody_has_are_refused() -> None:
    names = [f"layers.{j}.mlp.up_proj" for j in range(6000)]
    with pytest.raises(DataError, match="too long to match"):
        require_quick(names, names, "x")


def test_block_numbers_take_no_memory_and_a_number_that_nobody_has_is_no_count(tmp_path: Path) -> None:
    assert examine(save(tmp_path / "b", name=f"layers.{'9' * 400}.q"))["ranks"]
    # A thousand matrices of 6.4 MB each would be 6.4 GB.
    report = examine(save(tmp_path / "a", name="layers.999.q", a=(2, 200_000), b=(3, 2)))
    assert report["universal_parameters"] == 1000 * 8 * 200_003


def test_float8_heads_are_looked_at_for_nan(tmp_path: Path) -> None:
    folder, head = save(tmp_path / "a"), torch.tensor([1.0, float("nan")]).to(torch.float8_e4m3fn)
    with_tensors(**{"base_model.model.head.weight": head})(folder)
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
        Base(str(base)).skeleton(read_adapter(folder))
    assert examine(folder)["base_found"] is False
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("named", ["pipeline", "TrainingArguments"])
def test_an_architecture_is_a_model_or_none(named: str, tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text(json.dumps({"model_type": "bert", "architectures": [named], **SIZES}))
    adapter = read_adapter(save(tmp_path / "a", auto_mapping={"base_model_class": named, "parent_library": "os"}))
    assert type(Base(str(base)).skeleton(adapter)).__name__ == "BertModel"


@pytest.mark.parametrize("named", ["../x", "/nowhere/x", "~/x", "https://x/y", "a" * 5000, "", "a\0b", "-rf"])
def test_what_is_no_hub_id_is_not_asked_for_on_the_hub(named: str, tmp_path: Path) -> None:
    report = examine(save(tmp_path / "a", base_model_name_or_path=named))
    assert report["base_found"] is False
